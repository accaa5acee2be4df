"""Batch normalization: statistics of each feature over everything else, remembered for later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import implementations
from normax import measure as me
from normax.moments import Moments, RunningStats, update
from normax.standardize import normalize, standardize


def batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    feature_axes: ax.Axes = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    unbiased: bool = False,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
    epsilon_on: str = "variance",
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Normalizes each feature over the batch and every other axis.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    In training :math:`\mu, \sigma^2` are those of this batch and the running statistics move
    towards them; at inference they are the running statistics, which stay as they are.

    Args:
      x: array of any rank, floating-point or complex.
      stats: `RunningStats` of shape `x.shape[feature_axes]`.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: weight of the past in the running statistics; None makes them the statistics of
        all data seen. See `update`.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      axis_name: name, or names, of a mapped axis whose devices pool their statistics, by count.
      axis_index_groups: groups of device indices that pool among themselves.
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
      nonfinite: "skip" leaves the statistics of a feature as they were where those of the batch are
        not finite; "keep" lets NaN and inf in. The output shows them either way.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      epsilon_on: "variance", inside the root, or "deviation", outside of it.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: None or "xla", or a kernel by name, features last: "cpu" or "mosaic_tpu", for
        the statistics of a batch and the sums of its backward pass. "cpu" also writes the output
        and the gradient of x; with an activation, or an output that is neither of the dtype of `x`
        nor float32, those are XLA's. One that cannot be had is refused, here or when the program is
        lowered; exported for other platforms, it is "xla" there, with a warning. At inference
        nothing is measured, and no kernel is asked for.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`, of the dtypes of `stats`. No
      gradient flows from them to `x`.

    Raises:
      ValueError: a shape that is not the feature shape; axes out of range or repeated; epsilon
        below 0; momentum outside [0, 1]; one value per feature in training; an unbound axis_name;
        `nonfinite` or `epsilon_on` another word.
      TypeError: integer `x`; a traced `use_running_average`; `stats` that is no `RunningStats`; a
        dtype that cannot hold the output.

    Where others differ: PyTorch's momentum is one minus this one, and it remembers the unbiased
    variance; Keras's epsilon is 1e-3; flax averages the means of devices, not the entries.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> stats = normax.RunningStats.create(2)
      >>> y, stats = normax.batch_norm(x, stats, use_running_average=False, momentum=None)
      >>> print(y.round(3))
      [[-1. -1.]
       [ 1.  1.]]
      >>> print(stats.mean, stats.var)
      [ 2. 20.] [  1. 100.]
      >>> y, _ = normax.batch_norm(x, stats, use_running_average=True)
      >>> print(y.round(3)[0])
      [-1. -1.]

    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
    """
    name = "batch_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    ax.check_choice(name, "implementation", implementation, implementations.CHOICES)
    if use_running_average:
        y = infer(
            name, x, stats, scale, bias, features, epsilon, mask, dtype, epsilon_on, activation
        )
        return y, stats
    check_trainable(name, x, features, axis_name, axis_index_groups)
    y, m = normalize_batch(
        x,
        scale,
        bias,
        feature_axes=features,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        epsilon_on=epsilon_on,
        activation=activation,
        implementation=implementation,
    )
    return y, update(stats, lax.stop_gradient(m), momentum, unbiased=unbiased, nonfinite=nonfinite)


def prepare(name, x, stats, use_running_average, momentum, feature_axes):
    """Returns x and its feature axes, of a normalizer with running statistics."""
    ax.check_switch(name, "use_running_average", use_running_average)
    ax.check_momentum(name, momentum)
    ax.check_statistics(name, "stats", stats, RunningStats)
    x = ax.to_float_array(name, x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    for label, leaf in zip(RunningStats._fields, stats, strict=True):
        ax.check_feature_shape(name, f"stats.{label}", jnp.shape(leaf), x, features)
    return x, features


def check_trainable(name, x, features, axis_name=None, axis_index_groups=None):
    """Refuses a training batch that has one value per feature."""
    reduced = ax.other_axes(features, x.ndim)
    reduction = me.Reduction.over(name, reduced, True, axis_name, axis_index_groups)
    ax.check_more_than_one_value(name, me.count_entries(reduction, x), x)


def infer(
    name,
    x,
    stats,
    scale,
    bias,
    features,
    epsilon,
    mask,
    dtype,
    epsilon_on="variance",
    activation=None,
):
    """Returns x normalized by running statistics."""
    mean, var = (ax.along(jnp.asarray(v), x.ndim, features) for v in (stats.mean, stats.var))
    return normalize(
        x,
        mean,
        var,
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=ax.to_weights(name, mask, x),
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias, stats=stats.mean),
        epsilon_on=epsilon_on,
        activation=activation,
    )


def normalize_batch(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    epsilon_on: str = "variance",
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes by the statistics of this batch and returns them; nothing is remembered.

    `batch_norm` in training without its state: for initialization, for batch statistics at test
    time, and for callers who decide for themselves what to do with the moments.

    Args:
      x: array of any rank, floating-point or complex.
      scale: as in `batch_norm`.
      bias: as in `batch_norm`.
      feature_axes: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      dtype: as in `batch_norm`.
      epsilon_on: as in `batch_norm`.
      activation: as in `batch_norm`.
      implementation: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the `Moments` of the batch, differentiable.

    Raises:
      ValueError: as `batch_norm`, but one value per feature is taken: it comes out as `bias`.
      TypeError: integer `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> y, m = normax.normalize_batch(jnp.array([[1.0], [3.0]]))
      >>> print(m.mean, m.var, m.count)
      [2.] [1.] [2]

    Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167.
    """
    x = ax.to_float_array("batch_norm", x)
    features = ax.sorted_axes("batch_norm", "feature_axes", feature_axes, x.ndim)
    return standardize(
        x,
        scale,
        bias,
        reduction_axes=ax.other_axes(features, x.ndim),
        feature_axes=features,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        epsilon_on=epsilon_on,
        activation=activation,
        implementation=implementation,
        caller="batch_norm",
    )
