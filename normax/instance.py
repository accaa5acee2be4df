"""Instance normalization that remembers: the average example's statistics, for inference."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import pool
from normax.batch import infer, prepare
from normax.measure import MAX_COUNT, Reduction, count_entries, times
from normax.moments import Moments, RunningStats, bessel, update
from normax.standardize import standardize


def running_instance_norm(
    x: ArrayLike,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    feature_axes: ax.Axes = -1,
    momentum: float | None = 0.9,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    unbiased: bool = False,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Normalizes as `instance_norm` in training, and by the average example at inference.

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) \frac1n \sum_b n_b \mu_b, \qquad
              \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) \frac1n \sum_b n_b \sigma_b^2

    over the examples b, each with its count of valid entries.

    Args:
      x: array of rank 3 or more, floating-point or complex; its leading axis is the batch.
      stats: `RunningStats` of shape `x.shape[feature_axes]`.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      feature_axes: axes that keep statistics, a scale and a bias of their own.
      momentum: weight of the past, as in `batch_norm`; None: the average of all examples seen.
      epsilon: added to the variance, inside the root.
      mask: as in `batch_norm`; an example with nothing valid is left out of the average.
      axis_name: name, or names, of a mapped axis over which examples are sharded: what is
        remembered is the average of all.
      axis_index_groups: groups of device indices that pool among themselves.
      unbiased: remember each example's variance times n / (n - 1), as PyTorch does.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`; feature axes that include axis 0; in training, one value per
        example and feature.
      TypeError: as `batch_norm`.

    Where others differ: this is PyTorch's `InstanceNorm` with `track_running_stats=True`, whose
    momentum is one minus this one, and which remembers the unbiased variance.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [14.0]]])
      >>> stats = normax.RunningStats.create(1)
      >>> y, stats = normax.running_instance_norm(
      ...     x, stats, use_running_average=False, momentum=0.0
      ... )
      >>> print(stats.mean, stats.var)
      [7.] [2.5]

    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016,
    https://arxiv.org/abs/1607.08022.
    """
    name = "running_instance_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    spatial = ax.spatial_axes(name, features, x.ndim)
    if use_running_average:
        return infer(name, x, stats, scale, bias, features, epsilon, mask, dtype), stats
    ax.check_more_than_one_value(name, count_entries(Reduction(spatial), x), x)
    reduction = Reduction.over(name, (0,), True, axis_name, axis_index_groups)
    y, m = standardize(
        x,
        scale,
        bias,
        reduction_axes=spatial,
        feature_axes=features,
        epsilon=epsilon,
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias, stats=stats.mean),
        caller=name,
    )
    average = _average(reduction, lax.stop_gradient(m), unbiased)
    past: Any = momentum
    if momentum is None:
        seen, new = (jnp.asarray(n).astype(m.var.dtype) for n in (stats.count, average.count))
        past = seen / jnp.where(seen + new > 0, seen + new, 1)
    return y, update(stats, average, past, nonfinite=nonfinite)


def _average(reduction, m, unbiased):
    """Returns the average over examples, of all devices, of what was measured on each."""
    real = m.var.dtype
    var = m.var * bessel(m.count, real) if unbiased else m.var
    weights = m.count.astype(real)
    there = weights > 0

    def total(v):
        here = jnp.sum(v, reduction.axes, dtype=v.dtype)
        return pool.sum_over_devices(reduction.axis_name, reduction.groups, here)

    number = total(weights)
    each = 1 / jnp.where(number > 0, number, 1)
    mean = times(total(times(jnp.where(there, m.mean, 0), weights)), each)
    var = total(jnp.where(there, var, 0) * weights) * each
    count = total(m.count)
    if jnp.issubdtype(count.dtype, jnp.integer):
        count = jnp.where(number >= 2.0**31, MAX_COUNT, count)
    return Moments(count, mean, var)
