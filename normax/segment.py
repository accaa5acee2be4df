"""Segments: entries summarised together by a number each carries, such as the graph it is of."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import units
from normax.group import split_features
from normax.measure import inner, present, square
from normax.moments import Moments, RunningStats, update
from normax.standardize import normalize


def segment_moments(
    x: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int,
    *,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> Moments:
    r"""Measures the rows of `x` by segment.

    .. math:: n_s = \sum_{i \in s} w_i,\quad \mu_s = \frac{\sum_{i \in s} w_i x_i}{\sum w_i},\quad
              \sigma_s^2 = \frac{\sum_{i \in s} w_i |x_i - \mu_s|^2}{\sum w_i}

    Args:
      x: array of rank 1 or more, floating-point or complex; its leading axis is that of the rows.
      segment_ids: int for each row, of shape `x.shape[:1]`; rows with an id outside
        `[0, num_segments)`, such as padding of -1, read as absent and may hold NaN.
      num_segments: number of segments, static.
      weights: real number for each row, of shape `x.shape[:1]`: how often it counts; None is once.
        Rows of weight 0, or less, read as absent.
      axis_name: name, or names, of a mapped axis over which the rows are sharded; an id means the
        same segment on every device.

    Returns:
      `Moments` of shape `(num_segments, *x.shape[1:])`; with weights the count is their sum.

    Raises:
      ValueError: ids or weights of another shape; `num_segments` below 1; rows that are dealt out
        along explicit mesh axes.
      TypeError: integer `x`; ids that are no ints; weights that are no floats.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, ids = jnp.array([1.0, 3.0, 10.0]), jnp.array([0, 0, 1])
      >>> print(normax.segment_moments(x, ids, 2).mean)
      [ 2. 10.]
      >>> weights = jnp.array([3.0, 1.0, 1.0])
      >>> print(normax.segment_moments(x, ids, 2, weights=weights).mean)
      [ 1.5 10. ]
    """
    name = "segment_moments"
    x, ids, weights = _prepare(name, x, segment_ids, num_segments, weights)
    return _measure(x, ids, num_segments, weights, _devices(name, axis_name))[0]


def segment_norm(
    x: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    mean_scale: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    num_groups: int | None = None,
    centered: bool = True,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    axis_name: Any = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Normalizes each feature over the rows of each segment: graph normalization.

    .. math:: y_i = \frac{x_i - \alpha \mu_{s(i)}}{\sqrt{\sigma_{s(i)}^2 + \epsilon}} \gamma + \beta

    `instance_norm` for graphs, or packed sequences, of any number of nodes; with `num_groups` it is
    `group_norm`, with one group and `centered=False` an RMS norm of the whole segment. With alpha
    the variance is that about :math:`\alpha \mu`.

    Args:
      x: array of rank 2 or more, floating-point; its leading axis is that of the rows.
      segment_ids: as in `segment_moments`; absent rows come out as `bias`.
      num_segments: number of segments, static.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      mean_scale: alpha, of the same shape; None is one.
      weights: as in `segment_moments`.
      num_groups: groups of neighbouring features that share statistics; None: each has its own.
      centered: subtract the mean; False divides by the root mean square.
      feature_axes: axes that have parameters of their own, the leading one not among them.
      epsilon: added to the variance, inside the root.
      axis_name: as in `segment_moments`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: as `segment_moments`; parameters that are not of the feature shape; feature axes
        that include axis 0; epsilon below 0; groups that do not divide the features, or with
        several feature axes; a `mean_scale` with groups or uncentred.
      TypeError: as `segment_moments`; complex `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, ids = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
      >>> print(normax.segment_norm(x, ids, 2).ravel().round(3))
      [-1.  1. -1.  1.]

    Cai and others, "GraphNorm: A Principled Approach to Accelerating Graph Neural Network
    Training", 2020, https://arxiv.org/abs/2009.03294.
    """
    name = "segment_norm"
    x, ids, weights = _prepare(name, x, segment_ids, num_segments, weights)
    ax.check_real(name, "x", x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    ax.spatial_axes(name, features, x.ndim)
    pooled = _devices(name, axis_name)
    mean, var = _by_row(name, x, ids, num_segments, weights, num_groups, feature_axes, pooled)
    if not centered:
        mean, var = jnp.zeros_like(mean), var + square(mean)
    ax.check_real(name, "mean_scale", mean_scale)
    if mean_scale is not None:
        ax.check_not_both(name, "mean_scale", "num_groups", num_groups is not None)
        ax.check_not_both(name, "mean_scale", "centered=False", not centered)
        alpha = ax.to_parameter(name, "mean_scale", mean_scale, x, features).astype(mean.dtype)
        var = var + jnp.square((1 - alpha) * mean)
        mean = alpha * mean
    there = jnp.expand_dims(ids < num_segments, tuple(range(1, x.ndim)))
    return normalize(
        x,
        mean,
        var,
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=there,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )


def domain_batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    domain_ids: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
    unbiased: bool = False,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Batch normalization with statistics of their own for each domain, example by example.

    .. math:: y_i = \frac{x_i - \mu_{d(i)}}{\sqrt{\sigma_{d(i)}^2 + \epsilon}} \gamma + \beta

    Real and generated images, clean and adversarial ones, several tasks or sites, in one batch in
    any order: parameters are shared, statistics are not. A domain that is not in the batch, or has
    one value per feature, keeps its running statistics.

    Args:
      x: array of rank 2 or more, floating-point; batch first, features last.
      stats: `RunningStats` of shape `(domains, x.shape[-1])`.
      domain_ids: int for each example, of shape `x.shape[:1]`; an id out of range reads as absent.
      scale: gamma, of shape `x.shape[-1:]`; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      momentum: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      weights: real number for each example, of shape `x.shape[:1]`: how often it counts; one of
        weight 0 reads as absent.
      axis_name: as in `segment_moments`; of training only.
      unbiased: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`; statistics or ids of another shape; rows that are dealt out along
        explicit mesh axes.
      TypeError: as `batch_norm`; ids that are no ints; complex `x`.

    Where others differ: timm splits the batch by position.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, domain = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> stats = normax.RunningStats.create((2, 1))
      >>> y, stats = normax.domain_batch_norm(
      ...     x, stats, domain, use_running_average=False, momentum=0.0
      ... )
      >>> print(y.ravel().round(3), stats.mean.ravel())
      [-1. -1.  1.  1.] [ 2. 20.]

    Chang, You, Seo, Kwak and Han, "Domain-Specific Batch Normalization for Unsupervised Domain
    Adaptation", 2019, https://arxiv.org/abs/1906.03950.
    """
    name = "domain_batch_norm"
    ax.check_switch(name, "use_running_average", use_running_average)
    ax.check_momentum(name, momentum)
    ax.check_statistics(name, "stats", stats, RunningStats)
    ax.check_rank(name, "stats.mean", stats.mean, 2)
    x, ids, weights = _prepare(name, x, domain_ids, stats.mean.shape[0], weights, "domain_ids")
    ax.check_real(name, "x", x)
    ax.check_rank(name, "x", x, 2)
    number, features = stats.mean.shape[0], (x.ndim - 1,)
    ax.check_feature_shape(name, "stats.mean[0]", stats.mean.shape[1:], x, features)
    if use_running_average:
        mean, var = stats.mean, stats.var
    else:
        pooled = _devices(name, axis_name)
        m, mean = _measure(x, ids, number, weights, pooled, tuple(range(1, x.ndim - 1)))
        var = m.var
        stats = update(
            stats, jax.lax.stop_gradient(m), momentum, unbiased=unbiased, nonfinite=nonfinite
        )
    rows = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    y = normalize(
        x,
        jnp.asarray(mean)[ids].reshape(rows),
        jnp.asarray(var)[ids].reshape(rows),
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=jnp.expand_dims(ids < number, tuple(range(1, x.ndim))),
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )
    return y, stats


def _devices(name: str, axis_name: Any) -> Any:
    """Returns the axis over which statistics are pooled, where it is bound."""
    if axis_name is not None:
        ax.axis_size(name, axis_name)
    return axis_name


def _prepare(name, x, ids, number, weights, label="segment_ids"):
    """Returns rows, ids with every absent row in one more segment, and weights."""
    x = ax.to_float_array(name, x)
    ax.check_rank(name, "x", x, 1)
    ax.check_not_dealt_out(name, "x", x)
    number = ax.to_positive_int(name, "num_segments", number)
    ids = ax.to_ids(name, label, ids)
    # Not all to int32: of a larger id only the lower digits would be left.
    ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    ax.check_shape(name, label, ids.shape, x.shape[:1])
    there = (ids >= 0) & (ids < number)
    if weights is not None:
        weights = ax.to_float_array(name, weights, "weights")
        ax.check_shape(name, "weights", weights.shape, x.shape[:1])
        there &= weights > 0
        weights = weights.astype(ax.real_dtype(ax.compute_dtype(x.dtype)))
    return x, jnp.where(there, ids, number).astype(jnp.int32), weights


def _by_row(name, x, ids, number, weights, num_groups, feature_axes, pooled):
    """Returns the mean and variance that each row is to be standardized by."""
    if num_groups is None:
        m, mean = _measure(x, ids, number, weights, pooled)
        return mean[ids], m.var[ids]
    feature = ax.only_axis(name, "feature_axes", feature_axes, x.ndim)
    groups = ax.group_count(name, x.shape[feature], num_groups, None)
    grouped = split_features(x, feature, (groups, x.shape[feature] // groups))
    m, mean = _measure(grouped, ids, number, weights, pooled, (feature + 1,))
    return [
        jnp.broadcast_to(jnp.expand_dims(v[ids], feature + 1), grouped.shape).reshape(x.shape)
        for v in (mean, m.var)
    ]


def _measure(x, ids, number, weights, pooled, axes=()):
    """Returns the moments of each segment, and the means with one more row for the absent."""
    there = ids < number

    def column(values):
        return jnp.expand_dims(values, tuple(range(1, x.ndim)))

    rows = present(x, column(there))
    one = jnp.ones((), ax.real_dtype(rows.dtype))
    counted = jnp.where(there, one if weights is None else weights.astype(one.dtype), 0)
    rows_weigh = counted
    if weights is not None:  # near one, they can be multiplied by squares
        unit = lax.stop_gradient(units.choose(counted, (0,), 0.0))
        rows_weigh = counted / (lax.pmax(unit, pooled) if pooled else unit)
    pixels = math.prod(x.shape[axis] for axis in axes)

    def total(values):
        sums = jax.ops.segment_sum(jnp.mean(values, axes) if axes else values, ids, number + 1)
        return lax.psum(sums, pooled) if pooled else sums

    def of_each(values):
        return jnp.expand_dims(values[ids], axes)

    weight = total(jnp.broadcast_to(column(rows_weigh), rows.shape))
    weight = jnp.where(weight > 0, weight, 1)
    weighed = column(rows_weigh).astype(rows.dtype)
    mean = total(rows * weighed) / weight.astype(rows.dtype)
    d = rows - of_each(mean)
    # The mean is rounded; the mean of what it leaves over carries the digits it lost.
    rest = total(d * weighed) / weight.astype(rows.dtype)
    d = d - of_each(rest)
    var = total(inner(d, d) * column(rows_weigh)) / weight
    mean = mean + rest
    counted = there.astype(jnp.int32) if weights is None else counted
    number_of_rows = jax.ops.segment_sum(counted, ids, number + 1) * pixels
    number_of_rows = lax.psum(number_of_rows, pooled) if pooled else number_of_rows
    count = jnp.broadcast_to(
        jnp.expand_dims(number_of_rows, tuple(range(1, mean.ndim))), mean.shape
    )
    return Moments(count[:number], mean[:number], var[:number]), mean
