"""Batch Kalman normalization: a batch's statistics joined to what the layer below foretells."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.batch import check_trainable, infer, prepare
from normax.measure import square
from normax.moments import Moments, RunningStats, moments, moments_over, update
from normax.standardize import normalize, root


def kalman_batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    prior: Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    prior_weight: ArrayLike = 0.9,
    largest_ratio: float = 100.0,
    feature_axes: ax.Axes = -1,
    momentum: float | None = 0.9,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats, Moments]:
    r"""Normalizes by a mixture of the batch's statistics and a prior from the layer below.

    .. math::
        \mu = p \mu^- + (1 - p) \mu_B,\qquad
        \sigma^2 = p \sigma^{2-} + (1 - p) \sigma_B^2 + p (1 - p) (\mu_B - \mu^-)^2

    the exact moments of such a mixture. Gradients flow through both. Where the prior is far off,
    the mean over the features of its variance to the batch's being `largest_ratio` or more, the
    batch's statistics are used alone. See `kalman_prior` for the prior.

    Args:
      x: array of any rank, floating-point.
      stats: `RunningStats` of shape `x.shape[feature_axes]`; they average the mixture.
      prior: `Moments` of the same shape, of what the layer below lets expect.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      prior_weight: p, in [0, 1]; 0 is `batch_norm`. A number or a scalar array.
      largest_ratio: the ratio of variances from which on the prior is left out.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`; the new `RunningStats`; and the mixture, `Moments`, for the
      prior of the layer above. At inference the mixture is that of the running statistics.

    Raises:
      ValueError: as `batch_norm`; a `prior` of another shape; a `prior_weight` that is no scalar,
        or a Python one outside [0, 1].
      TypeError: as `batch_norm`; a `prior` that is no `Moments`; complex `x`.

    Where others differ: the paper carries matrices for the transition; as in its authors' code,
    the layer itself is the transition here.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.array([[1.0], [3.0]]), normax.RunningStats.create(1)
      >>> prior = normax.Moments(jnp.array([8]), jnp.array([0.0]), jnp.array([1.0]))
      >>> _, _, mixture = normax.kalman_batch_norm(
      ...     x, stats, prior, use_running_average=False, prior_weight=0.5
      ... )
      >>> print(mixture.mean, mixture.var)
      [1.] [2.]

    Wang, Peng, Luo, Wang and Lin, "Batch Kalman Normalization", 2018,
    https://arxiv.org/abs/1802.03133.
    """
    name = "kalman_batch_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    ax.check_real(name, "x", x)
    ax.check_statistics(name, "prior", prior, Moments)
    ax.check_real(name, "prior", prior.mean)
    ax.check_feature_shape(name, "prior.mean", jnp.shape(prior.mean), x, features)
    ax.check_fraction(name, "prior_weight", prior_weight)
    ax.check_shape(name, "prior_weight", jnp.shape(prior_weight), ())
    ax.check_limit(name, "largest_ratio", largest_ratio, 0.0)
    if use_running_average:
        y = infer(name, x, stats, scale, bias, features, epsilon, mask, dtype)
        return y, stats, Moments(stats.count, stats.mean, stats.var)
    check_trainable(name, x, features, axis_name, axis_index_groups)
    mask = ax.to_weights(name, mask, x)
    m = moments_over(
        name,
        x,
        ax.other_axes(features, x.ndim),
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    mixture = _mixture(prior, m, jnp.asarray(prior_weight), largest_ratio)
    y = normalize(
        x,
        ax.along(mixture.mean, x.ndim, features),
        ax.along(mixture.var, x.ndim, features),
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )
    return y, update(stats, lax.stop_gradient(mixture), momentum, nonfinite=nonfinite), mixture


def _mixture(prior, m, weight, largest_ratio):
    """Returns the moments of a draw from the prior with this weight, else from the batch."""
    mean, var = (jnp.asarray(v).astype(m.var.dtype) for v in (prior.mean, prior.var))
    ratios = var / jnp.where(m.var > 0, m.var, jnp.finfo(m.var.dtype).tiny)
    # A feature without an entry says nothing of how far the prior is off.
    seen = m.count > 0
    ratio = jnp.sum(jnp.where(seen, ratios, 0)) / jnp.maximum(jnp.sum(seen, dtype=var.dtype), 1)
    p = jnp.where(ratio < largest_ratio, weight.astype(m.var.dtype), 0)
    # What is left out must not bring its inf or NaN; what is finite has a derivative by p.
    unknown = (p == 0) & ~(jnp.isfinite(mean) & jnp.isfinite(var))
    mean, var = jnp.where(unknown, 0, mean), jnp.where(unknown, 0, var)
    here = jnp.where((p == 1) & ~jnp.isfinite(m.var), 0, m.var)
    apart = m.mean - mean
    apart = jnp.where(((p == 0) | (p == 1)) & ~jnp.isfinite(square(apart)), 0, apart)
    return Moments(
        m.count,
        p * mean + (1 - p) * m.mean,
        p * var + (1 - p) * here + p * (1 - p) * square(apart),
    )


def kalman_prior(
    posterior: Moments,
    layer: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    *,
    shape: tuple[int, ...],
    feature_axes: ax.Axes = -1,
) -> Moments:
    r"""Pushes the moments of one layer through the next, by drawing from them.

    .. math:: x \sim N(\mu, \sigma^2), \qquad \mu^-, \sigma^{2-} = \mathrm{moments}(f(x))

    Args:
      posterior: `Moments` that `kalman_batch_norm` gave for the layer below.
      layer: what is between the two normalizers, such as ReLU and a convolution.
      key: random key.
      shape: shape of what to draw, the features of `posterior` at `feature_axes`.
      feature_axes: axes of the features, of what is drawn and of what the layer gives.

    Returns:
      `Moments` of the layer's output, per feature, differentiable.

    Raises:
      ValueError: a `shape` that does not have the features of `posterior`.
      TypeError: a `posterior` that is no `Moments`.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> below = normax.Moments(jnp.array([8]), jnp.array([1.0]), jnp.array([4.0]))
      >>> prior = normax.kalman_prior(below, lambda x: 3 * x, jax.random.key(0), shape=(100000, 1))
      >>> print(prior.mean.round(), prior.var.round())
      [3.] [36.]

    Wang and others, "Batch Kalman Normalization", 2018, https://arxiv.org/abs/1802.03133.
    """
    name = "kalman_prior"
    ax.check_statistics(name, "posterior", posterior, Moments)
    ax.check_real(name, "posterior", ax.to_float_array(name, posterior.mean, "posterior.mean"))
    posterior = jax.tree.map(jnp.asarray, posterior)
    drawn = jax.random.normal(key, shape, posterior.mean.dtype)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, drawn.ndim)
    ax.check_feature_shape(name, "posterior.mean", posterior.mean.shape, drawn, features)
    mean, var = (ax.along(v, drawn.ndim, features) for v in (posterior.mean, posterior.var))
    out = layer(drawn * root(var) + mean)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, out.ndim)
    return moments(out, ax.other_axes(features, out.ndim))
