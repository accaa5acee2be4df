"""Switchable normalization: learned proportions of instance, layer and batch statistics."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.batch import check_trainable, prepare
from normax.measure import times
from normax.moments import RunningStats, moments_over, update
from normax.parts import spread
from normax.rescale import alike
from normax.standardize import normalize


def switchable_norm(
    x: ArrayLike,
    stats: RunningStats,
    mean_weights: ArrayLike,
    var_weights: ArrayLike,
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
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Normalizes by a learned mixture of instance, layer and batch statistics.

    .. math::
        \mu = \sum_k \mathrm{softmax}(\lambda)_k \mu_k,\qquad
        \sigma^2 = \sum_k \mathrm{softmax}(\lambda')_k \sigma_k^2,\qquad
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    with k running over instance, layer, batch. At inference the batch's part is the running one;
    `momentum=None` makes that the statistics of all data seen, which is steadier than an average.

    Args:
      x: array of rank 2 or more, floating-point or complex; its leading axis is the batch.
      stats: `RunningStats` of shape `x.shape[feature_axes]`.
      mean_weights: logits of the means, in the order instance, layer, batch: of shape (3,), or
        where there is no axis between batch and features and so no instance, (2,).
      var_weights: logits of the variances, likewise.
      scale: gamma, of the feature shape; None is one.
      bias: beta, of the feature shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      feature_axes: axes that keep statistics of their own, the leading one not among them.
      momentum: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`, for the batch's statistics.
      axis_index_groups: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`; logits of another shape; a feature axis 0.
      TypeError: as `batch_norm`.

    Where others differ: the authors' PyTorch code takes the unbiased variance of an instance, 9 %
    more at 12 pixels, and adds up second moments instead of variances where it averages batches.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.arange(12.0).reshape(2, 3, 2), normax.RunningStats.create(2)
      >>> instance_only = jnp.array([50.0, 0.0, 0.0])
      >>> y, _ = normax.switchable_norm(
      ...     x, stats, instance_only, instance_only, use_running_average=False
      ... )
      >>> bool(jnp.allclose(y, normax.instance_norm(x, epsilon=1e-5), atol=1e-5))
      True

    Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable
    Normalization", 2018, https://arxiv.org/abs/1806.10779.
    """
    name = "switchable_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    spatial = ax.spatial_axes(name, features, x.ndim)
    number = 3 if spatial else 2
    mask = ax.to_weights(name, mask, x)

    def measured(axes, **devices):
        m = moments_over(name, x, axes, mask=mask, **devices)
        return m, [jnp.expand_dims(v, axes) for v in (m.mean, m.var)]

    layer = tuple(sorted((*spatial, *features)))
    parts = [measured(axes)[1] for axes in ([spatial] if spatial else []) + [layer]]
    if use_running_average:
        batch = [ax.along(jnp.asarray(v), x.ndim, features) for v in (stats.mean, stats.var)]
    else:
        check_trainable(name, x, features, axis_name, axis_index_groups)
        m, batch = measured((0, *spatial), axis_name=axis_name, axis_index_groups=axis_index_groups)
        stats = update(stats, lax.stop_gradient(m), momentum, nonfinite=nonfinite)
    means, variances = zip(*parts, batch, strict=True)
    y = normalize(
        x,
        _mixture(name, "mean_weights", mean_weights, means, number),
        _mixture(name, "var_weights", var_weights, variances, number),
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=ax.to_epsilon(name, epsilon),
        mask=mask,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )
    return y, stats


def _mixture(name, label, logits, values, number):
    """Returns the values weighted by the softmax of their logits."""
    logits = ax.to_float_array(name, logits, label)
    ax.check_shape(name, label, logits.shape, (number,))
    ax.check_real(name, label, logits)
    weights = jax.nn.softmax(logits.astype(ax.compute_dtype(logits.dtype)))
    total = 0.0
    for weight, value in zip(weights, alike(*values), strict=True):
        weight = jnp.reshape(weight, [1] * value.ndim)
        total = total + times(value, spread(weight, value))
    return total
