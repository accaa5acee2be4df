"""Batch renormalization: a batch's statistics, corrected towards those that are remembered."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax.batch import check_trainable, infer, prepare
from normax.measure import there, times
from normax.moments import RunningStats, moments_over, update
from normax.rescale import alike
from normax.standardize import standardize


def batch_renorm(
    x: ArrayLike,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    feature_axes: ax.Axes = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Normalizes by the batch, then corrects towards the running statistics, within limits.

    .. math::
        y = \left(\frac{x - \mu_B}{\sigma_B} r + d\right) \gamma + \beta,\quad
        r = \mathrm{clip}\left(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\right),\quad
        d = \mathrm{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma^2` the variance plus epsilon, the running statistics those before this batch,
    and no gradient through r and d. Without limits the output is that of inference; at
    `r_max=1, d_max=0` it is `batch_norm`. For small batches, or batches that are not drawn alike.

    Args:
      x: array of any rank, floating-point.
      stats: `RunningStats` of shape `x.shape[feature_axes]`. The deviation is averaged, not the
        variance, and its square remembered.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, False in training. A Python bool.
      r_max: limit of r, at least 1; a number or a scalar array, so that a schedule may move it.
      d_max: limit of d, at least 0; likewise. The paper begins with 1 and 0 and raises them to 3
        and 5 from 5,000 steps on, until 40,000 and 25,000.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: weight of the past; not None, since a deviation cannot be merged.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`.
      axis_index_groups: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`; a Python `r_max` below 1 or `d_max` below 0.
      TypeError: as `batch_norm`; complex `x`, `scale` or `bias`; a momentum of None.

    Where others differ: Keras clips to limits that do not move, and knows no warm-up.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0], [3.0]])
      >>> stats = normax.RunningStats(jnp.array([1.0]), jnp.array([4.0]), jnp.array([9]))
      >>> y, _ = normax.batch_renorm(x, stats, use_running_average=False, epsilon=0.0)
      >>> print(y.ravel())  # (x - 1) / 2: within the limits it is what inference would give
      [0. 1.]

    Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275.
    """
    name = "batch_renorm"
    ax.check_given(name, "momentum", momentum)
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    ax.check_real(name, "x", x)
    ax.check_limit(name, "r_max", r_max, 1.0)
    ax.check_limit(name, "d_max", d_max, 0.0)
    if use_running_average:
        return infer(name, x, stats, scale, bias, features, epsilon, mask, dtype), stats
    check_trainable(name, x, features, axis_name, axis_index_groups)
    reduced = ax.other_axes(features, x.ndim)
    epsilon = ax.to_epsilon(name, epsilon)
    mask = ax.to_weights(name, mask, x)
    options = {"mask": mask, "axis_name": axis_name, "axis_index_groups": axis_index_groups}
    m = moments_over(name, x, reduced, **options)
    m = lax.stop_gradient(m)
    batch = m._replace(var=jnp.sqrt(m.var + epsilon))
    past = stats._replace(var=jnp.sqrt(stats.var + jnp.asarray(epsilon, stats.var.dtype)))
    # Without an epsilon there may be no deviation to correct towards.
    unit = jnp.where(past.var == 0, jnp.finfo(past.var.dtype).tiny, past.var)
    deviation, unit, mean, mean_past = alike(batch.var, unit, batch.mean, past.mean)
    r = lax.stop_gradient(_clip(deviation / unit, 1 / jnp.asarray(r_max), r_max))
    d = lax.stop_gradient(_clip((mean - mean_past) / unit, -jnp.asarray(d_max), d_max))
    for label, value in (("scale", scale), ("bias", bias)):
        if value is not None:
            value = ax.to_float_array(name, value, label)
            ax.check_real(name, label, value)
            ax.check_feature_shape(name, label, value.shape, x, features)
    y, _ = standardize(
        x,
        r if scale is None else _product(r, scale),
        (d if scale is None else _product(d, scale)) + (0 if bias is None else _like(bias, d)),
        reduction_axes=reduced,
        feature_axes=features,
        epsilon=epsilon,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
        caller=name,
        **options,
    )
    if mask is not None:
        absent = ax.along(jnp.zeros_like(d) if bias is None else _like(bias, d), x.ndim, features)
        y = jnp.where(there(mask), y, absent.astype(y.dtype))
    new = update(past, batch, momentum, nonfinite=nonfinite)
    moved = (new.count != past.count) | (new.var != past.var) | (new.mean != past.mean)
    # Where nothing moved not even the root and the square may leave their rounding.
    var = jnp.where(moved, jnp.maximum(new.var * new.var - epsilon, 0), stats.var)
    return y, new._replace(var=var.astype(stats.var.dtype))


def _clip(value, low, high):
    return jnp.clip(value, _like(low, value), _like(high, value))


def _like(value, array):
    return jnp.asarray(value).astype(array.dtype)


def _product(factor, scale):
    return times(factor, _like(scale, factor))
