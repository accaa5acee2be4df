"""Conditional normalization: scale and bias that come from a condition, example by example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import units
from normax.measure import present
from normax.moments import moments_over
from normax.standardize import root, standardize


def adaptive_instance_norm(
    x: ArrayLike,
    style: ArrayLike,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    style_mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Gives each feature of each example the mean and deviation it has in another input.

    .. math:: y = \sigma_s \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \mu_s, \qquad
              \sigma_s = \sqrt{\mathrm{var}(s) + \epsilon}

    over the axes between batch and features.

    Args:
      x: content, of rank 3 or more, floating-point; its leading axis is the batch.
      style: array of the rank of `x`, and of its batch and features; otherwise of any shape.
      feature_axes: axes of the features, the leading one not among them.
      epsilon: added to both variances, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as the style's
        mean.
      style_mask: the same for `style`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: a style of another rank, batch or features; otherwise as `instance_norm`.
      TypeError: integer or complex input.

    Where others differ: the authors' code takes the unbiased variance.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> x, style = jax.random.normal(jax.random.key(0), (2, 1, 50, 3)) * jnp.ones((2, 1, 1, 1))
      >>> y = normax.adaptive_instance_norm(x, 5 + 2 * style)
      >>> bool(jnp.allclose(y.mean(1), (5 + 2 * style).mean(1), atol=1e-4))
      True

    Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", 2017, https://arxiv.org/abs/1703.06868.
    """
    name = "adaptive_instance_norm"
    x, style = ax.to_float_array(name, x), ax.to_float_array(name, style, "style")
    ax.check_real(name, "x", x)
    ax.check_real(name, "style", style)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    spatial = ax.reduced_axes(
        name, "the axes between batch and features", ax.spatial_axes(name, features, x.ndim), x.ndim
    )
    ax.check_shape(name, "style", _outer(style, spatial), _outer(x, spatial))
    epsilon = ax.to_epsilon(name, epsilon)
    style_mask = ax.to_weights(name, style_mask, style)
    entries = present(style, style_mask)
    # In a unit of each group, for a deviation may be in range where its square is not.
    unit = lax.stop_gradient(units.choose(entries, spatial, units.least(epsilon)))
    m = moments_over(name, units.divide(entries, unit), spatial, mask=style_mask)
    unit = jnp.squeeze(unit, spatial)
    y, _ = standardize(
        x,
        root(m.var + epsilon / unit / unit) * unit,
        m.mean * unit,
        reduction_axes=spatial,
        feature_axes=(0, *features),
        epsilon=epsilon,
        mask=mask,
        dtype=dtype,
        caller=name,
    )
    return y


def _outer(array, spatial):
    """Returns the shape with what may differ left out."""
    return tuple(-1 if axis in spatial else size for axis, size in enumerate(array.shape))


def film(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    scale_offset: float = 0.0,
    feature_axes: ax.Axes = -1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Rescales each example's features by a scale and bias of its own.

    .. math:: y_{b \ldots c} = x_{b \ldots c} (o + \gamma_{b c}) + \beta_{b c}

    After any normalizer without a scale and bias it makes the conditional one: conditional batch
    norm, adaptive layer norm.

    Args:
      x: array of rank 2 or more, floating-point or complex; its leading axis is the batch.
      scale: gamma, of shape `(x.shape[0], *x.shape[feature_axes])`; None leaves x as it is.
      bias: beta, of the same shape; None is zero.
      scale_offset: o, added to the scale; 1 where the condition gives what is to be added to one.
      feature_axes: axes of the features, the leading one not among them.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`. There is no mask: an entry moves no other.

    Raises:
      ValueError: a scale or bias of another shape; feature axes that include axis 0.
      TypeError: integer `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.ones((2, 3, 1))
      >>> print(normax.film(x, jnp.array([[2.0], [3.0]]), jnp.array([[0.0], [1.0]]))[:, 0].ravel())
      [2. 4.]

    Perez, Strub, de Vries, Dumoulin and Courville, "FiLM: Visual Reasoning with a General
    Conditioning Layer", 2017, https://arxiv.org/abs/1709.07871.
    """
    name = "film"
    x = ax.to_float_array(name, x)
    ax.check_number(name, "scale_offset", scale_offset)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    ax.spatial_axes(name, features, x.ndim)
    dtype = ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias)
    y = x.astype(ax.compute_dtype(x.dtype))
    scale, bias = (
        ax.to_parameter(name, label, value, x, (0, *features))
        for label, value in (("scale", scale), ("bias", bias))
    )
    if scale is not None:
        wide = scale.astype(ax.compute_dtype(scale.dtype))
        wide = wide + jnp.asarray(scale_offset, wide.dtype)
        y = y.astype(ax.promote(y.dtype, wide.dtype)) * wide.astype(ax.promote(y.dtype, wide.dtype))
    if bias is not None:
        wide = ax.promote(y.dtype, bias.dtype)
        y = y.astype(wide) + bias.astype(wide)
    return y.astype(dtype)


def adaln_zero(
    x: ArrayLike,
    block: Callable[[jax.Array], jax.Array],
    scale: ArrayLike,
    bias: ArrayLike,
    gate: ArrayLike,
    *,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Adds to the input what a block makes of it, normalized, modulated and gated by a condition.

    .. math:: y = x + \alpha\, f(\mathrm{LN}(x) (1 + \gamma) + \beta)

    Scale, bias and gate are what a linear layer makes of the condition; started at zero, it makes
    the whole the identity, and training easy.

    Args:
      x: array of rank 2 or more, floating-point; batch first, features last.
      block: f, such as attention or a perceptron; its output has the shape of `x`.
      scale: gamma, of shape `(x.shape[0], x.shape[-1])`.
      bias: beta, of the same shape.
      gate: alpha, of the same shape.
      epsilon: added to the variance, inside the root.
      mask: as in `layer_norm`; an absent entry is zero in the sum, and the block is given its beta.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: a scale, bias or gate of another shape; a block that changes the shape.
      TypeError: integer `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, zero = jnp.arange(6.0).reshape(2, 3), jnp.zeros((2, 3))
      >>> y = normax.adaln_zero(x, jnp.tanh, zero, zero, zero)
      >>> bool((y == x).all())
      True

    Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022,
    https://arxiv.org/abs/2212.09748.
    """
    name = "adaln_zero"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    scale = ax.to_float_array(name, scale, "scale")
    one_more = scale.astype(ax.compute_dtype(scale.dtype)) + 1
    modulated, _ = standardize(
        x,
        one_more,
        bias,
        reduction_axes=-1,
        feature_axes=(0, -1),
        epsilon=epsilon,
        mask=mask,
        caller=name,
    )
    out = jnp.asarray(block(modulated))
    ax.check_shape(name, "block(x)", out.shape, x.shape)
    ax.check_real(name, "block(x)", out)
    gated = film(out, gate, dtype=ax.promote(jnp.float32, x.dtype, out.dtype))
    there = present(x, ax.to_weights(name, mask, x)).astype(gated.dtype)
    return (there + gated).astype(ax.to_dtype(name, dtype, x, x=x))
