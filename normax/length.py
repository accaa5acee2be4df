"""Unit length: each vector divided by its length."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.kernels.primitive import spread
from normax.standardize import standardize


def l2_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes = -1,
    epsilon: float = 1e-12,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides each vector by its length.

    .. math:: y = g \frac{x}{\|x\|}

    With a learned scalar g it is ScaleNorm; for queries and keys of attention, QK-norm.

    Args:
      x: array of any rank, floating-point or complex.
      scale: g, a scalar; None is one.
      reduction_axes: axes of a vector.
      epsilon: vectors not longer than this come out as zero, with a zero derivative.
      mask: booleans that broadcast to `x.shape`. False entries read as absent: they may hold NaN,
        add nothing to the length, get no gradient, and come out as zero.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: axes out of range, repeated, none or of symbolic sizes; a `scale` that is no
        scalar; epsilon below 0; a mask that does not broadcast.
      TypeError: integer `x`.

    Where others differ: PyTorch divides what is shorter than epsilon by epsilon; Keras and Flax's
    private one add epsilon to the squared length.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.l2_norm(jnp.array([3.0, 4.0])))
      [0.6 0.8]

    Nguyen and Salazar, "Transformers without Tears", 2019, https://arxiv.org/abs/1910.05895;
    Henry and others, "Query-Key Normalization for Transformers", 2020,
    https://arxiv.org/abs/2010.04245.
    """
    name = "l2_norm"
    x = ax.to_float_array(name, x)
    reduced = ax.reduced_axes(name, "reduction_axes", reduction_axes, x.ndim)
    size = max(ax.known_size(name, "reduction_axes", x, reduced), 1)
    mask = ax.to_mask(name, mask, x)
    scale = jnp.ones((), ax.real_dtype(x.dtype)) if scale is None else scale
    scale = ax.to_float_array(name, scale, "scale")
    ax.check_shape(name, "scale", scale.shape, ())
    wide = scale.astype(ax.compute_dtype(scale.dtype))
    # What is absent is a zero here: the mean square is of all entries, and so of fixed weight.
    y, _ = standardize(
        x if mask is None else jnp.where(mask, x, 0),
        wide / math.sqrt(size),
        reduction_axes=reduced,
        feature_axes=(),
        centered=False,
        epsilon=0.0,
        floor=ax.to_epsilon(name, epsilon) ** 2 / size,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale),
        caller=name,
    )
    return y


def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike = 0.5,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Squashes each entry in place of normalizing it.

    .. math:: y = \gamma \tanh(\alpha x) + \beta

    In place of `layer_norm` and `rms_norm` in a transformer: nothing is measured.

    Args:
      x: array of any rank, floating-point.
      alpha: a scalar, learned; the paper starts it at 0.5, lower in wide language models.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      feature_axes: axes that have a scale and bias of their own.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`. There is no mask: an entry moves no other.

    Raises:
      ValueError: an `alpha` that is no scalar; a scale or bias that is not of the feature shape.
      TypeError: integer or complex `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.dynamic_tanh(jnp.array([-100.0, 0.0, 2.0])).round(3))
      [-1.     0.     0.762]

    Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization", 2025,
    https://arxiv.org/abs/2503.10622.
    """
    name = "dynamic_tanh"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    alpha = ax.to_float_array(name, alpha, "alpha")
    ax.check_shape(name, "alpha", alpha.shape, ())
    ax.check_real(name, "alpha", alpha)
    wide = ax.promote(jnp.float32, x.dtype, alpha.dtype)
    y = jnp.tanh(x.astype(wide) * spread(alpha.astype(wide), x))
    for label, value, join in (("scale", scale, jnp.multiply), ("bias", bias, jnp.add)):
        value = ax.to_parameter(name, label, value, x, features)
        if value is not None:
            y = join(y, value.astype(y.dtype))
    return y.astype(ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias))
