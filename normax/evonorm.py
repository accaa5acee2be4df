"""EvoNorm: normalization and activation in one, found by search."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import parts, pool
from normax.batch import check_trainable, prepare
from normax.group import split_features
from normax.measure import present
from normax.moments import RunningStats, moments_over, update
from normax.quotient import quotient
from normax.rescale import alike, reciprocal_deviation, root


def evonorm_s0(
    x: ArrayLike,
    slope: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides a gated input by the deviation of its group, of each example.

    .. math:: y = \frac{x\, \mathrm{sigmoid}(v x)}{\sqrt{\sigma_g^2 + \epsilon}} \gamma + \beta

    In place of `group_norm` and an activation.

    Args:
      x: array of rank 2 or more, floating-point; its leading axis is the batch.
      slope: v, of shape `x.shape[feature_axes]`; None is one.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      num_groups: number of groups; it must divide the number of features. The paper has 32.
      group_size: features in a group, in place of `num_groups`.
      feature_axes: the one axis of features, not the leading one.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: as `group_norm`.
      TypeError: as `group_norm`; complex `x`.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 4))
      >>> steep = jnp.full(4, 1e6)  # where the gate is a step, it is ReLU over the deviation
      >>> y = normax.evonorm_s0(x, steep, num_groups=1)
      >>> bool(jnp.allclose(y, jax.nn.relu(x) / x.std(), rtol=1e-4))
      True

    Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020,
    https://arxiv.org/abs/2004.02967.
    """
    name = "evonorm_s0"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    feature = ax.only_axis(name, "feature_axes", feature_axes, x.ndim)
    spatial = ax.spatial_axes(name, (feature,), x.ndim)
    groups = ax.group_count(name, x.shape[feature], num_groups, group_size)
    parameters = _parameters(name, x, (feature,), slope, scale, bias)
    dtype = ax.to_dtype(name, dtype, x, x=x, slope=slope, scale=scale, bias=bias)
    plan = feature, spatial, groups, ax.to_epsilon(name, epsilon), dtype
    return _gated(*plan, x, *parameters, ax.to_weights(name, mask, x))


@functools.partial(jax.checkpoint, static_argnums=(0, 1, 2, 3, 4))
def _gated(feature, spatial, groups, epsilon, dtype, x, slope, scale, bias, mask):
    x = present(x, mask)
    split = (groups, x.shape[feature] // groups)
    reduced = (*(axis + (axis > feature) for axis in spatial), feature + 1)
    grouped = split_features(x, feature, split)
    m = moments_over("", grouped, tuple(sorted(reduced)), mask=split_features(mask, feature, split))
    rstd = reciprocal_deviation(jnp.expand_dims(m.var, sorted(reduced)), epsilon)
    gated = x * jax.nn.sigmoid(x if slope is None else x * _spread(slope, x))
    y = split_features(gated, feature, split) * parts.spread(rstd, grouped)
    return _rescale(pool.reshape(y, x.shape, jax.typeof(x).sharding.spec), scale, bias, dtype)


def evonorm_b0(
    x: ArrayLike,
    stats: RunningStats,
    slope: ArrayLike | None = None,
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
    r"""Divides by the larger of the batch's deviation and one of the instance with the input.

    .. math:: y = \frac{x}{\max\left(\sqrt{\sigma_B^2 + \epsilon},\
              v x + \sqrt{\sigma_I^2 + \epsilon}\right)} \gamma + \beta

    In place of `batch_norm` and an activation. No mean is subtracted.

    Args:
      x: array of rank 3 or more, floating-point; its leading axis is the batch.
      stats: `RunningStats` of shape `x.shape[feature_axes]`; its mean is remembered too.
      slope: v, of the same shape; None is one.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
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
      ValueError: as `batch_norm`; no axis between batch and features; a feature axis 0.
      TypeError: as `batch_norm`; complex `x`.

    Where others differ: timm remembers the unbiased variance, which is inf at one value.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 2))
      >>> stats, flat = normax.RunningStats.create(2), jnp.zeros(2)
      >>> y, _ = normax.evonorm_b0(x[:1], stats, flat, use_running_average=False)
      >>> bool(jnp.allclose(y, x[:1] / x[:1].std((0, 1), keepdims=True), rtol=1e-4))
      True

    Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020,
    https://arxiv.org/abs/2004.02967.
    """
    name = "evonorm_b0"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    ax.check_real(name, "x", x)
    ax.check_real(name, "stats", stats.mean)
    spatial = ax.reduced_axes(
        name, "the axes between batch and features", ax.spatial_axes(name, features, x.ndim), x.ndim
    )
    mask = ax.to_weights(name, mask, x)
    var = stats.var
    if not use_running_average:
        check_trainable(name, x, features, axis_name, axis_index_groups)
        m = moments_over(
            name,
            x,
            (0, *spatial),
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        var = m.var
        stats = update(stats, lax.stop_gradient(m), momentum, nonfinite=nonfinite)
    dtype = ax.to_dtype(name, dtype, x, x=x, slope=slope, scale=scale, bias=bias)
    plan = spatial, ax.to_epsilon(name, epsilon), dtype
    parameters = _parameters(name, x, features, slope, scale, bias)
    return _larger(*plan, x, ax.along(jnp.asarray(var), x.ndim, features), *parameters, mask), stats


@functools.partial(jax.checkpoint, static_argnums=(0, 1, 2))
def _larger(spatial, epsilon, dtype, x, var, slope, scale, bias, mask):
    x, var = alike(present(x, mask), var)
    instance = jnp.expand_dims(moments_over("", x, spatial, mask=mask).var, spatial)
    sloped = x if slope is None else x * _spread(slope, x)
    divisor = jnp.maximum(parts.spread(root(var + epsilon), x), sloped + root(instance + epsilon))
    # Only without an epsilon is it zero, of equal entries.
    ratio = jnp.where(divisor == 0, 0, quotient(x, jnp.where(divisor == 0, 1, divisor)))
    return _rescale(ratio, scale, bias, dtype)


def _parameters(name, x, features, slope, scale, bias):
    return [
        ax.to_parameter(name, label, value, x, features)
        for label, value in (("slope", slope), ("scale", scale), ("bias", bias))
    ]


def _rescale(y, scale, bias, dtype):
    y = y if scale is None else y * _spread(scale, y)
    return (y if bias is None else y + _spread(bias, y)).astype(dtype)


def _spread(parameter, like):
    return parts.spread(parameter.astype(like.dtype), like)
