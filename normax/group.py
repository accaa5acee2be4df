"""Group normalization: each example's features in groups, each group by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import pool
from normax.standardize import standardize


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    feature_axes: ax.Axes = -1,
    reduction_axes: ax.Axes | None = None,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Normalizes groups of neighbouring features of each example.

    .. math:: y = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} \gamma + \beta

    with the statistics of the group g that a feature is in, over its features and every axis but
    the leading one. One group is `layer_norm` over those axes; as many groups as features is
    `instance_norm`.

    Args:
      x: array of rank 2 or more, floating-point or complex.
      scale: gamma, of shape `x.shape[feature_axes]`; None is one.
      bias: beta, of the same shape; None is zero.
      num_groups: number of groups; it must divide the number of features.
      group_size: features in a group, in place of `num_groups`.
      feature_axes: the one axis of features, anywhere but first unless `reduction_axes` is given.
      reduction_axes: axes that are summarised together, the feature axis among them; every axis
        but the leading one by default.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      axis_name: name, or names, of a mapped axis over which the reduced axes are sharded.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: None or "xla", or a kernel by name: "cpu", which knows no activation, or
        "mosaic_gpu", which knows those of a few operations, such as SiLU and ReLU. One that cannot
        be had is refused, here or when the program is lowered; exported for other platforms, it is
        "xla" there, with a warning.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: a number or size of groups that does not divide the features; both or neither
        of the two; more than one feature axis; reduction axes without it; otherwise as
        `layer_norm`.
      TypeError: integer `x`, or a number of groups that is no int.

    Where others differ: flax has the features last; PyTorch, Haiku and Equinox have an epsilon of
    1e-5, Keras of 1e-3.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> print(normax.group_norm(x, num_groups=2).round(3))
      [[-1.  1. -1.  1.]]
      >>> same = normax.instance_norm(x[..., None], feature_axes=1)
      >>> bool((normax.group_norm(x, num_groups=4) == same[..., 0]).all())
      True

    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.
    """
    name = "group_norm"
    x = ax.to_float_array(name, x)
    feature = ax.only_axis(name, "feature_axes", feature_axes, x.ndim)
    reduced = ax.group_axes(name, reduction_axes, feature, x.ndim)
    groups = ax.group_count(name, x.shape[feature], num_groups, group_size)
    for label, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            ax.check_feature_shape(name, label, jnp.shape(value), x, (feature,))
    mask = ax.to_weights(name, mask, x)
    split = (groups, x.shape[feature] // groups)
    y, _ = standardize(
        split_features(x, feature, split),
        split_features(scale, 0, split),
        split_features(bias, 0, split),
        # The axis of groups comes before that of their members; later axes move by one.
        reduction_axes=tuple(axis + 1 if axis >= feature else axis for axis in reduced),
        feature_axes=(feature, feature + 1),
        epsilon=epsilon,
        mask=split_features(mask, feature, split),
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
        caller=name,
    )
    return pool.reshape(y, x.shape, jax.typeof(x).sharding.spec)


def split_features(value: Any, axis: int, split: tuple[int, int]) -> Any:
    """Returns `value` with its features split into groups and members."""
    if value is None:
        return None
    value = jnp.asarray(value)
    sizes = (1, 1) if value.shape[axis] == 1 != split[0] * split[1] else split
    shape = (*value.shape[:axis], *sizes, *value.shape[axis + 1 :])
    # Sharded features are sharded groups.
    spec = jax.typeof(value).sharding.spec
    return pool.reshape(value, shape, (*spec[: axis + 1], None, *spec[axis + 1 :]))
