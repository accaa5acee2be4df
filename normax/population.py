"""Statistics that are given: of a population, of running averages corrected, or of a mixture."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.batch import infer, prepare
from normax.measure import times
from normax.moments import Moments, RunningStats, moments_over
from normax.standardize import normalize


def population_norm(
    x: ArrayLike,
    stats: RunningStats | Moments,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes by the statistics of a population, in training and at inference alike.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    No gradient flows through the statistics: what batch normalization would be without its noise.

    Args:
      x: array of any rank, floating-point or complex.
      stats: `Moments`, merged over the data, or `RunningStats`, of shape `x.shape[feature_axes]`.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      feature_axes: axes that have statistics of their own.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries may
        hold NaN, get no gradient, and come out as `bias`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: as `batch_norm`.
      TypeError: as `batch_norm`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> data = jnp.array([[1.0], [1.0], [3.0], [3.0]])
      >>> chunks = [normax.moments(chunk, 0) for chunk in (data[:1], data[1:])]
      >>> print(normax.population_norm(data, normax.merge(*chunks)).ravel().round(3))
      [-1. -1.  1.  1.]

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.
    """
    name = "population_norm"
    if isinstance(stats, Moments):
        stats = RunningStats(stats.mean, stats.var, stats.count)
    x, features = prepare(name, x, stats, True, None, feature_axes)
    fixed = lax.stop_gradient(stats)
    return infer(name, x, fixed, scale, bias, features, epsilon, mask, dtype)


def mixed_batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_weight: ArrayLike,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes by a mixture of running and batch statistics, at test time.

    .. math:: \mu = \alpha \mu_{run} + (1 - \alpha) \mu_B,\qquad
              \sigma^2 = \alpha \sigma_{run}^2 + (1 - \alpha) \sigma_B^2

    For data that has shifted since training: 1 is inference, 0 the batch alone. Nothing is
    remembered; gradients flow through the batch's part, as test-time training needs.

    Args:
      x: array of any rank, floating-point or complex.
      stats: `RunningStats` of shape `x.shape[feature_axes]`.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      running_weight: alpha, in [0, 1]; a number or a scalar array.
      feature_axes: axes that have statistics of their own; every other axis is reduced.
      epsilon: added to the variance, inside the root.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: as `batch_norm`; a Python `running_weight` outside [0, 1].
      TypeError: as `batch_norm`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.array([[1.0], [3.0]]), normax.RunningStats.create(1)
      >>> print(normax.mixed_batch_norm(x, stats, running_weight=0.0).ravel().round(3))
      [-1.  1.]

    Schneider and others, "Improving robustness against common corruptions by covariate shift
    adaptation", 2020, https://arxiv.org/abs/2006.16971.
    """
    name = "mixed_batch_norm"
    x, features = prepare(name, x, stats, False, None, feature_axes)
    ax.check_fraction(name, "running_weight", running_weight)
    mask = ax.to_weights(name, mask, x)
    m = moments_over(
        name,
        x,
        ax.other_axes(features, x.ndim),
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    weight = jnp.asarray(running_weight).astype(m.var.dtype)
    # A batch without a valid entry has nothing to say.
    weight = jnp.where(m.count > 0, weight, 1)

    def mixture(old, new):
        wide = ax.promote(old, new)
        # What has no weight may be out of range, or NaN.
        new = jnp.where((weight == 1) & ~jnp.isfinite(new), 0, new)
        old = jnp.where((weight == 0) & ~jnp.isfinite(old), 0, old)
        return times(old.astype(wide), weight) + times(new.astype(wide), 1 - weight)

    return normalize(
        x,
        ax.along(mixture(jnp.asarray(stats.mean), m.mean), x.ndim, features),
        ax.along(mixture(jnp.asarray(stats.var), m.var), x.ndim, features),
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias, stats=stats.mean),
    )


def debias(stats: RunningStats, start: RunningStats, past_weight: ArrayLike) -> RunningStats:
    r"""Takes out of an exponential average what is left in it of its start.

    .. math:: \mu \leftarrow \frac{\mu - w \mu_0}{1 - w},\qquad
              \sigma^2 \leftarrow \frac{\sigma^2 - w \sigma_0^2}{1 - w}

    with w the weight of the start: momentum to the power of the number of updates, or the product
    of the momenta. The average of the batches alone is left, whatever the start was.

    Args:
      stats: the average.
      start: what it started from, such as `RunningStats.create(shape)`.
      past_weight: w, in [0, 1]; a number or a scalar array. At 1 the start comes back.

    Returns:
      `RunningStats` of the dtypes of `stats`.

    Raises:
      ValueError: a start of another shape; a Python `past_weight` outside [0, 1].
      TypeError: what is no `RunningStats`.

    Where others differ: Adam and Haiku start from zero and divide by 1 - w alone; Equinox starts
    its variance from one and divides too, so that it is too large by w / (1 - w).

    Example:
      >>> import jax.numpy as jnp, normax
      >>> start = normax.RunningStats.create(())
      >>> batch = normax.moments(jnp.array([1.0, 5.0]), 0)
      >>> stats = normax.update(start, batch, momentum=0.75)
      >>> mean, var, _ = normax.debias(stats, start, 0.75)
      >>> print(mean, var)
      3.0 4.0

    Kingma and Ba, "Adam", 2014, section 3, https://arxiv.org/abs/1412.6980.
    """
    name = "debias"
    ax.check_statistics(name, "stats", stats, RunningStats)
    ax.check_statistics(name, "start", start, RunningStats)
    ax.check_shape(name, "start.mean", jnp.shape(start.mean), jnp.shape(stats.mean))
    ax.check_fraction(name, "past_weight", past_weight)

    def without(average, first):
        average, first = jnp.asarray(average), jnp.asarray(first)
        weight = jnp.asarray(past_weight).astype(ax.real_dtype(average.dtype))
        rest = jnp.where(weight < 1, 1 - weight, 1)
        moved = times(average - times(first.astype(average.dtype), weight), 1 / rest)
        return jnp.where(weight < 1, moved, first.astype(average.dtype))

    mean = without(stats.mean, start.mean)
    return stats._replace(mean=mean, var=jnp.maximum(without(stats.var, start.var), 0))


def momentum_per_entry(momentum: float, m: Moments, *, reference: int) -> jax.Array:
    r"""Returns the momentum for a batch of any size that is `momentum` for one of `reference`.

    .. math:: \alpha = \alpha_0^{n / n_0}

    A ragged last batch, or half as many entries on twice as many steps, then moves the running
    statistics as far, entry by entry.

    Args:
      momentum: alpha_0, in [0, 1].
      m: `Moments` of the batch, whose largest count is n.
      reference: n_0, the entries per feature of a full batch, at least 1.

    Returns:
      A scalar, float32 at least, for `update` or `batch_norm`.

    Raises:
      ValueError: a momentum outside [0, 1]; a `reference` below 1.
      TypeError: an `m` that is no `Moments`; a `reference` that is no int.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> half = normax.moments(jnp.ones(16), 0)
      >>> print(normax.momentum_per_entry(0.25, half, reference=32))
      0.5
    """
    name = "momentum_per_entry"
    ax.check_given(name, "momentum", momentum)
    ax.check_momentum(name, momentum)
    ax.check_statistics(name, "m", m, Moments)
    reference = ax.to_positive_int(name, "reference", reference)
    dtype = ax.promote(jnp.float32, m.var)
    exponent = jnp.max(jnp.asarray(m.count), initial=0).astype(dtype) / reference
    return jnp.asarray(momentum, dtype) ** exponent
