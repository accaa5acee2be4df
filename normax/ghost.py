"""Ghost batch normalization: a large batch normalized as several small ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import measure as me
from normax import pool
from normax.batch import check_trainable, infer, prepare
from normax.moments import RunningStats, moments_over, update
from normax.standardize import standardize


def ghost_batch_norm(
    x: ArrayLike,
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    ghost_size: int,
    feature_axes: ax.Axes = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    unbiased: bool = False,
    nonfinite: str = "skip",
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    r"""Normalizes ghost batches, runs of `ghost_size` examples, each by its own statistics.

    .. math:: y_i = \frac{x_i - \mu_{g(i)}}{\sqrt{\sigma_{g(i)}^2 + \epsilon}} \gamma + \beta

    A large batch regularized as a small one, or a batch sharded over devices that exchange no
    statistics: under plain jit the examples of a ghost batch that are on one device stay there.
    The running statistics move once, by the moments of the whole batch.

    Args:
      x: array of rank 2 or more, floating-point or complex; its leading axis is the batch.
      stats: `RunningStats` of shape `x.shape[feature_axes]`.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, where there are no ghosts; False in training.
      ghost_size: examples in a ghost batch, at most. A batch that it does not divide is split as
        evenly as can be, into larger ghosts if one would be left with a single value. It means the
        same on any number of devices: with `axis_name` it either divides the examples of a device,
        or is a multiple of them, and then so many neighbouring devices pool.
      feature_axes: axes that keep statistics of their own, the leading one not among them.
      momentum: as in `batch_norm`.
      epsilon: as in `batch_norm`.
      mask: as in `batch_norm`.
      axis_name: as in `batch_norm`; the running statistics are those of all devices.
      unbiased: as in `batch_norm`.
      nonfinite: as in `batch_norm`.
      dtype: as in `batch_norm`.

    Returns:
      The output, of the shape of `x`, and the new `RunningStats`.

    Raises:
      ValueError: as `batch_norm`; a `ghost_size` below 1 or with one value per feature; ghosts
        that end in the middle of a device's examples, or may not divide a symbolic batch; a feature
        axis 0.
      TypeError: as `batch_norm`; a `ghost_size` that is no int.

    Where others differ: the paper folds ghost batches into the running statistics one after the
    other, each with the variance about its own mean; here it is the variance of all.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x, stats = jnp.array([[1.0], [3.0], [10.0], [30.0]]), normax.RunningStats.create(1)
      >>> y, stats = normax.ghost_batch_norm(x, stats, use_running_average=False, ghost_size=2)
      >>> print(y.ravel().round(3))
      [-1.  1. -1.  1.]

    Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017,
    https://arxiv.org/abs/1705.08741.
    """
    name = "ghost_batch_norm"
    x, features = prepare(name, x, stats, use_running_average, momentum, feature_axes)
    inner = (0, *ax.spatial_axes(name, features, x.ndim))
    size = ax.to_positive_int(name, "ghost_size", ghost_size)
    if use_running_average:
        return infer(name, x, stats, scale, bias, features, epsilon, mask, dtype), stats
    check_trainable(name, x, features, axis_name)
    mask = ax.to_weights(name, mask, x)
    batch, groups = x.shape[0], None
    if axis_name is not None:
        size, groups = _devices_of_a_ghost(name, size, batch, ax.axis_size(name, axis_name))
    ax.check_divides(name, "ghost_size", size, batch)
    number = max(-(-batch // size), 1)
    each = me.Reduction(tuple(axis + 1 for axis in inner))
    if axis_name is None and size > 1 and math.prod(x.shape[axis] for axis in inner[1:]) == 1:
        number = max(min(number, batch // 2), 1)
    shared = 1 if groups is None else len(groups[0])
    smallest = jax.ShapeDtypeStruct((1, max(batch // number, 1), *x.shape[1:]), x.dtype)
    ax.check_more_than_one_value(name, shared * me.count_entries(each, smallest), x)
    here = _split(x, number)
    y, _ = standardize(
        here,
        scale,
        bias,
        reduction_axes=tuple(axis + 1 for axis in inner),
        feature_axes=tuple(axis + 1 for axis in features),
        epsilon=epsilon,
        mask=_split_mask(mask, batch, number, here.ndim),
        axis_name=axis_name if groups is not None else None,
        axis_index_groups=groups,
        dtype=dtype,
        caller=name,
    )
    m = moments_over(name, x, inner, mask=mask, axis_name=axis_name)
    new = update(stats, lax.stop_gradient(m), momentum, unbiased=unbiased, nonfinite=nonfinite)
    return _join(y, x, number), new


def _devices_of_a_ghost(name, size, batch, devices):
    """Returns the size of a ghost batch here, and the groups of devices that share one."""
    ax.check_ghosts(name, size, batch, devices)
    if size <= batch:
        return size, None
    together = min(size // batch, devices)
    starts = range(0, devices, together)
    return batch, tuple(tuple(range(start, start + together)) for start in starts)


def _rows(batch, number):
    """Returns which examples each ghost batch has, repeating one, and which of them count."""
    length = math.ceil(batch / number)
    lengths = batch // number + (np.arange(number) < batch % number)
    starts = np.cumsum(lengths) - lengths
    slots = np.arange(length)
    there = slots < lengths[:, None]
    return np.where(there, starts[:, None] + slots, starts[:, None]), there


def _split(x, number):
    """Returns x with its examples in ghost batches, along a new leading axis."""
    if x.shape[0] % number == 0:
        x = pool.examples_together(x, number)
        spec = jax.typeof(x).sharding.spec
        shape = (number, x.shape[0] // number, *x.shape[1:])
        return pool.reshape(x, shape, (spec[0], None, *spec[1:]))
    rows, _ = _rows(x.shape[0], number)
    return pool.examples_together(x, 1)[jnp.asarray(rows)]


def _split_mask(mask, batch, number, ndim):
    """Returns the mask of the ghost batches, which leaves out what only fills them."""
    if batch % number == 0:
        if mask is None or mask.shape[0] != 1:
            return None if mask is None else _split(mask, number)
        return mask[None]
    rows, there = _rows(batch, number)
    there = jnp.asarray(there).reshape(*there.shape, *[1] * (ndim - 2))
    if mask is None:
        return there
    mask = pool.examples_together(mask, 1)
    mask = mask[None] if mask.shape[0] == 1 else mask[jnp.asarray(rows)]
    return jnp.where(there, mask, jnp.zeros((), mask.dtype))


def _join(y, x, number):
    """Returns the examples of the ghost batches in their order again."""
    if x.shape[0] % number == 0:
        return pool.reshape(y, x.shape, jax.typeof(x).sharding.spec)
    _, there = _rows(x.shape[0], number)
    at = np.flatnonzero(there)
    return pool.placed_like(y.reshape(-1, *y.shape[2:])[jnp.asarray(at)], x)
