"""Normalizers of kernels that subtract the mean: weight standardization and centred lengths."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.moments import Moments, moments_over
from normax.standardize import normalize, root, standardize


def weight_standardization(
    w: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    unbiased: bool = False,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Gives each output's weights mean 0 and deviation 1.

    .. math:: \bar{w} = \frac{w - \mathrm{mean}(w)}{\mathrm{std}(w) + \epsilon} \gamma

    over every axis but `feature_axes`.

    Args:
      w: kernel of rank 2 or more, floating-point or complex.
      scale: gamma, of shape `w.shape[feature_axes]`, the axes ascending; None is one.
      feature_axes: axes of the outputs; add the leading one for stacked kernels.
      epsilon: added to the deviation, outside the root.
      unbiased: the deviation of n - 1, as the authors' PyTorch code has it.
      dtype: dtype of the output, that of `w` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `w`.

    Raises:
      ValueError: axes out of range or repeated; a scale that is not of the feature shape; epsilon
        below 0.
      TypeError: integer `w`.

    Where others differ: the authors' TensorFlow code has the biased deviation, that of PyTorch the
    unbiased one.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.weight_standardization(jnp.array([[1.0], [3.0]])).ravel().round(3))
      [-1.  1.]

    Qiao, Wang, Liu, Shen and Yuille, "Weight Standardization", 2019,
    https://arxiv.org/abs/1903.10520.
    """
    name = "weight_standardization"
    w, features, reduced, size = _prepare(name, w, feature_axes)
    # std * c + epsilon is c times std + epsilon / c.
    larger = math.sqrt(size / max(size - 1, 1)) if unbiased else 1.0
    scale = jnp.ones(_at(w, features), ax.real_dtype(w.dtype)) if scale is None else scale
    scale = ax.to_float_array(name, scale, "scale")
    ax.check_feature_shape(name, "scale", scale.shape, w, features)
    y, _ = standardize(
        w,
        scale.astype(ax.compute_dtype(scale.dtype)) / larger,
        reduction_axes=reduced,
        feature_axes=features,
        epsilon=ax.to_epsilon(name, epsilon) / larger,
        epsilon_on="deviation",
        dtype=ax.to_dtype(name, dtype, w, w=w, scale=scale),
        caller=name,
    )
    return y


def scaled_weight_standardization(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-4,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Gives each output's weights sum 0 and length 1: a layer that keeps the variance.

    .. math:: \bar{w} = g \frac{w - \mathrm{mean}(w)}{\sqrt{\max(N \mathrm{var}(w), \epsilon)}}

    over every axis but `feature_axes`, N weights to an output. Networks without a normalizer of
    activations use it, each activation scaled to keep the variance too.

    Args:
      w: kernel of rank 2 or more, floating-point.
      gain: g, of shape `w.shape[feature_axes]`, the axes ascending; None is one.
      feature_axes: axes of the outputs; add the leading one for stacked kernels.
      epsilon: least square of the length that is divided by.
      dtype: dtype of the output, that of `w` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `w`.

    Raises:
      ValueError: axes out of range or repeated; a gain that is not of the feature shape; epsilon
        below 0.
      TypeError: integer or complex `w`.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> w = normax.scaled_weight_standardization(jax.random.normal(jax.random.key(0), (9, 2)))
      >>> print((w**2).sum(0).round(3))
      [1. 1.]

    Brock, De and Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, https://arxiv.org/abs/2101.08692.
    """
    name = "scaled_weight_standardization"
    w, features, reduced, size = _prepare(name, w, feature_axes)
    ax.check_real(name, "w", w)
    m = moments_over(name, w, reduced)
    mean, var = (jnp.expand_dims(v, reduced) for v in (m.mean, m.var))
    return normalize(
        w,
        mean,
        jnp.maximum(var * size, ax.to_epsilon(name, epsilon)),
        ax.to_parameter(name, "gain", gain, w, features),
        epsilon=0.0,
        dtype=ax.to_dtype(name, dtype, w, w=w, gain=gain),
    )


def centered_weight_norm(
    v: ArrayLike,
    g: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Gives each output's weights mean 0 and the length `g`.

    .. math:: w = g \frac{\hat{v}}{\|\hat{v}\| + \epsilon}, \qquad \hat{v} = v - \mathrm{mean}(v)

    over every axis but `feature_axes`. A g of the root of 2 keeps the variance through ReLU.

    Args:
      v: kernel of rank 2 or more, floating-point or complex.
      g: lengths, of shape `v.shape[feature_axes]`, the axes ascending; None is one.
      feature_axes: axes of the outputs; add the leading one for stacked kernels.
      epsilon: added to the length.
      dtype: dtype of the output, that of `v` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `v`.

    Raises:
      ValueError: axes out of range or repeated; a `g` that is not of the feature shape; epsilon
        below 0.
      TypeError: integer `v`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> print(normax.centered_weight_norm(jnp.array([[1.0], [9.0]])).ravel().round(3))
      [-0.707  0.707]

    Huang, Liu, Liu, Lang and Tao, "Centered Weight Normalization in Accelerating Training of Deep
    Neural Networks", 2017, https://doi.org/10.1109/ICCV.2017.305.
    """
    name = "centered_weight_norm"
    v, features, reduced, size = _prepare(name, v, feature_axes)
    g = jnp.ones(_at(v, features), ax.real_dtype(v.dtype)) if g is None else g
    g = ax.to_float_array(name, g, "g")
    ax.check_feature_shape(name, "g", g.shape, v, features)
    # A length is the deviation times the root of the number of entries; so is epsilon.
    length = math.sqrt(size)
    w, _ = standardize(
        v,
        g.astype(ax.compute_dtype(g.dtype)) / length,
        reduction_axes=reduced,
        feature_axes=features,
        epsilon=ax.to_epsilon(name, epsilon) / length,
        epsilon_on="deviation",
        dtype=ax.to_dtype(name, dtype, v, v=v, g=g),
        caller=name,
    )
    return w


def weight_norm_init(m: Moments, *, epsilon: float = 1e-10) -> tuple[jax.Array, jax.Array]:
    r"""Returns the lengths and biases that start a weight-normalized layer standardized.

    .. math:: g = \frac{1}{\sigma[t]}, \qquad b = -\frac{\mu[t]}{\sigma[t]}

    t being what the layer gives on a first batch with lengths of one and no bias. Then its output
    on that batch has mean 0 and variance 1 in every feature.

    Args:
      m: `Moments` of t, per feature: `normax.moments(t, every axis but the features)`.
      epsilon: added to the variance, inside the root.

    Returns:
      g and b, of the shape of the moments.

    Raises:
      ValueError: epsilon below 0.
      TypeError: an `m` that is no `Moments`.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> x, v = jax.random.normal(jax.random.key(0), (64, 5)), jnp.eye(5)[:, :2]
      >>> g, b = normax.weight_norm_init(normax.moments(x @ normax.weight_norm(v), 0))
      >>> y = x @ normax.weight_norm(v, g) + b[None]
      >>> bool(jnp.allclose(y.std(0), 1, atol=1e-3))
      True

    Salimans and Kingma, "Weight Normalization", 2016, section 3, https://arxiv.org/abs/1602.07868.
    """
    name = "weight_norm_init"
    ax.check_statistics(name, "m", m, Moments)
    g = 1 / root(m.var + ax.to_epsilon(name, epsilon))
    return g, -m.mean * g


def _prepare(name, w, feature_axes):
    """Returns a kernel, the axes of its outputs and the others, and the number of its inputs."""
    w = ax.to_float_array(name, w, "w")
    features = ax.sorted_axes(name, "feature_axes", feature_axes, w.ndim)
    reduced = ax.other_axes(features, w.ndim)
    return w, features, reduced, max(math.prod(_at(w, reduced)), 1)


def _at(w, axes):
    return tuple(w.shape[axis] for axis in axes)
