"""Half of batch normalization: the mean alone, or the variance alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.batch import check_trainable, prepare
from normax.moments import RunningStats, moments_over, update
from normax.standardize import normalize


def mean_only_batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    feature_axes: ax.Axes = -1,
    momentum: float | None = 0.99,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Subtracts from each feature its mean over the batch; the deviation stays.

    .. math:: y = x - \mu + \beta

    For a layer under weight normalization, which sets the deviation but not the mean.

    Args:
      x: array of any rank, floating-point or complex.
      stats: `RunningStats` of shape `x.shape[feature_axes]`; its variance is remembered too.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`.
      TypeError: as `batch_norm`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.array([[1.0], [5.0]]), normax.RunningStats.create(1)
      >>> y, stats = normax.mean_only_batch_norm(x, stats, use_running_average=False)
      >>> print(y.ravel())
      [-2.  2.]

    Salimans and Kingma, "Weight Normalization", 2016, section 4, https://arxiv.org/abs/1602.07868.
    """
    name = "mean_only_batch_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    reduced = ax.other_axes(features, x.ndim)
    mask = ax.to_weights(name, mask, x)
    if use_running_average:
        mean = ax.along(jnp.asarray(stats.mean), x.ndim, features)
    else:
        check_trainable(name, x, features, axis_name, axis_index_groups)
        m = moments_over(
            name,
            x,
            reduced,
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        mean = ax.along(m.mean, x.ndim, features)
        stats = update(stats, lax.stop_gradient(m), momentum, nonfinite=nonfinite)
    y = normalize(
        x,
        mean,
        # Not divided by: one, for every feature.
        jnp.ones_like(mean, ax.real_dtype(mean.dtype)),
        None,
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=0.0,
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, bias=bias, stats=stats.mean),
    )
    return y, stats


def variance_only_batch_norm(
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
) -> tuple[jax.Array, RunningStats]:
    r"""Divides each feature by its deviation over the batch; the mean is not subtracted.

    .. math:: y = \frac{x}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    with the variance about the mean.

    Args:
      x: array of any rank, floating-point or complex.
      stats: `RunningStats` of shape `x.shape[feature_axes]`; its mean is remembered too.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      unbiased: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`.
      TypeError: as `batch_norm`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.array([[1.0], [5.0]]), normax.RunningStats.create(1)
      >>> y, stats = normax.variance_only_batch_norm(x, stats, use_running_average=False)
      >>> print(y.ravel().round(3))
      [0.5 2.5]

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.
    """
    name = "variance_only_batch_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    mask = ax.to_weights(name, mask, x)
    var = stats.var
    if not use_running_average:
        check_trainable(name, x, features, axis_name, axis_index_groups)
        m = moments_over(
            name,
            x,
            ax.other_axes(features, x.ndim),
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        var = m.var
        stats = update(
            stats, lax.stop_gradient(m), momentum, unbiased=unbiased, nonfinite=nonfinite
        )
    var = ax.along(jnp.asarray(var), x.ndim, features)
    y = normalize(
        x,
        jnp.zeros_like(var),
        var,
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )
    return y, stats
