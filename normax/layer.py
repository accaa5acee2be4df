"""Normalization of each example by itself: layer, root mean square, instance."""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.standardize import standardize


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes = -1,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Normalizes over the trailing axis, or over any others.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    with the mean and the biased variance of the entries along `reduction_axes`.

    Args:
      x: array of any rank, floating-point or complex.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale and bias of their own.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      axis_name: name, or names, of a mapped axis over which the reduced axes are sharded.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: "xla", or a kernel by name: "cpu", "mosaic_gpu" or "mosaic_tpu". One that
        cannot be had is refused, here or when the program is lowered; exported for other platforms,
        it is "xla" there, with a warning. None is "mosaic_gpu" for rows on a Hopper GPU that it was
        measured faster for, else "xla".

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: axes out of range, repeated or none; a scale or bias that is not of the feature
        shape; epsilon below 0; a mask that does not broadcast; an unbound axis_name.
      TypeError: integer `x`.

    Where others differ: epsilon is 1e-5 in PyTorch, Haiku and Equinox and 1e-3 in Keras.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.layer_norm(jnp.array([1.0, 2.0, 3.0])).round(3))
      [-1.225  0.     1.225]
      >>> x = jnp.array([1e6, 1e6 + 1, 1e6 + 2])
      >>> print(normax.layer_norm(x).round(3))
      [-1.225  0.     1.225]

    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450.
    """
    x = ax.to_float_array("layer_norm", x)
    reduced = ax.reduced_axes("layer_norm", "reduction_axes", reduction_axes, x.ndim)
    y, _ = standardize(
        x,
        scale,
        bias,
        reduction_axes=reduced,
        feature_axes=feature_axes,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
        caller="layer_norm",
    )
    return y


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes = -1,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    scale_offset: float = 0.0,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Divides by the root mean square over the trailing axis, or over any others.

    .. math:: y = \frac{x}{\sqrt{\frac1n \sum |x|^2 + \epsilon}} (o + \gamma)

    `layer_norm` without the mean.

    Args:
      x: array of any rank, floating-point or complex.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale of their own.
      epsilon: added to the mean square, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as zero.
      axis_name: name, or names, of a mapped axis over which the reduced axes are sharded.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      scale_offset: o, added to a scale that is given; 1 for weights that were stored less one.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: "xla", or a kernel by name: "cpu", "mosaic_gpu" or "mosaic_tpu". One that
        cannot be had is refused, here or when the program is lowered; exported for other platforms,
        it is "xla" there, with a warning. None is "mosaic_gpu" for rows on a Hopper GPU that it was
        measured faster for, else "xla".

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: as `layer_norm`.
      TypeError: integer `x`; a `scale_offset` that is no number.

    Where others differ: epsilon is 1e-5 in Haiku and Equinox, that of the dtype in PyTorch.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.rms_norm(jnp.array([3.0, 4.0, 0.0, 0.0])).round(3))
      [1.2 1.6 0.  0. ]

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
    https://arxiv.org/abs/1910.07467.
    """
    x = ax.to_float_array("rms_norm", x)
    reduced = ax.reduced_axes("rms_norm", "reduction_axes", reduction_axes, x.ndim)
    dtype = ax.to_dtype("rms_norm", dtype, x, x=x, scale=scale)
    ax.check_number("rms_norm", "scale_offset", scale_offset)
    if scale is not None and (isinstance(scale_offset, jax.Array) or scale_offset != 0):
        scale = ax.to_float_array("rms_norm", scale, "scale")
        scale = scale.astype(ax.compute_dtype(scale.dtype)) + scale_offset
    y, _ = standardize(
        x,
        scale,
        reduction_axes=reduced,
        feature_axes=feature_axes,
        centered=False,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
        caller="rms_norm",
    )
    return y


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    r"""Normalizes each feature of each example over the axes in between.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    `layer_norm` over every axis but the leading one, the batch, and `feature_axes`.

    Args:
      x: array of rank 2 or more, floating-point or complex.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      feature_axes: axes that keep statistics, a scale and a bias of their own.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      axis_name: name, or names, of a mapped axis over which the reduced axes are sharded.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: None or "xla", or a kernel by name: "cpu" or "mosaic_gpu". One that cannot
        be had is refused, here or when the program is lowered; exported for other platforms, it is
        "xla" there, with a warning.

    Returns:
      An array of the shape of `x`. Where no axis is left to reduce each entry is alone, equals
      its mean, and comes out as `bias`, as in flax.

    Raises:
      ValueError: feature axes that include axis 0; otherwise as `layer_norm`.
      TypeError: integer `x`.

    Where others differ: PyTorch has no scale and bias by default, and an epsilon of 1e-5.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.arange(12.0).reshape(2, 3, 2)
      >>> same = normax.layer_norm(x, reduction_axes=1)
      >>> bool((normax.instance_norm(x) == same).all())
      True

    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016,
    https://arxiv.org/abs/1607.08022.
    """
    x = ax.to_float_array("instance_norm", x)
    features = ax.sorted_axes("instance_norm", "feature_axes", feature_axes, x.ndim)
    reduced = ax.spatial_axes("instance_norm", features, x.ndim)
    y, _ = standardize(
        x,
        scale,
        bias,
        reduction_axes=reduced,
        feature_axes=features,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        activation=activation,
        implementation=implementation,
        caller="instance_norm",
    )
    return y
