"""The measuring step: mean and variance of an array over axes, a mask and devices.

The form is the corrected two-pass one: the mean is taken, then the mean of what it left over, and
the deviations are squared only after both are gone. That is what keeps a few units in the last
place where the mean is a million times the deviation.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normax import axes as ax
from normax import pool

MAX_COUNT = np.iinfo(np.int32).max


class Reduction(NamedTuple):
    """Which elements are summarised together: axes of the array, and devices. Static."""

    axes: tuple[int, ...]
    centered: bool = True
    axis_name: Any = None
    groups: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def over(cls, name, axes, centered=True, axis_name=None, axis_index_groups=None):
        """Returns the reduction over `axes` and over the devices of a bound `axis_name`."""
        if axis_name is None:
            return cls(axes, centered)
        axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        size = ax.axis_size(name, axis_name)
        if axis_index_groups is not None:
            axis_index_groups = ax.check_axis_index_groups(name, axis_index_groups, size)
        return cls(axes, centered, axis_name, axis_index_groups)


class Measured(NamedTuple):
    """What was measured, with the reduced axes kept.

    `mean + rest` is the mean to twice the precision, both None where it was not to be subtracted.
    `count` is None where there is no mask: then it is static, and nothing to keep.
    """

    count: Any
    mean: Any
    rest: Any
    var: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def measure(reduction: Reduction, x: jax.Array, mask: jax.Array | None) -> Measured:
    """Measures `x` over a reduction; the arguments have been through `axes.py`."""
    entries = present(x, mask)
    count = None if mask is None else _count_valid(reduction, x, mask)
    n = _at_least_one(_size(reduction, x) if mask is None else count, entries)
    total = functools.partial(jnp.sum, axis=reduction.axes, keepdims=True)
    mean = rest = None
    if reduction.centered:
        mean = total(entries) / n
        # The mean is rounded; the mean of what it leaves over carries the digits it lost.
        rest = total(deviation(entries, mean, jnp.zeros_like(mean), mask)) / n
    var = total(square(deviation(entries, mean, rest, mask))) / n
    here = Measured(count, mean, rest, var)
    return here if reduction.axis_name is None else _pool(reduction, here)


@measure.defjvp
def _measure_jvp(reduction, primals, tangents):
    x, mask = primals
    measured = measure(reduction, x, mask)
    dmean, dvar = _measure_tangents(reduction, x, mask, measured, tangents[0])
    return measured, measured_tangents(measured, dmean, dvar)


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _measure_tangents(reduction, x, mask, measured, t):
    d = deviation(present(x, mask), measured.mean, measured.rest, mask)
    return moment_tangents(reduction, d, present(t, mask), measured)


def moment_tangents(reduction, d, t, measured):
    """Returns how mean and variance move where the entries, at deviations `d`, move by `t`."""
    n = _at_least_one(count_entries(reduction, d, measured), d)
    sums = [jnp.sum(v, reduction.axes, keepdims=True) for v in (t, _inner(d, t))]
    together = jnp.stack([v.astype(t.dtype) for v in sums])
    mean, inner = pool.sum_over_devices(reduction.axis_name, reduction.groups, together)
    return mean / n if reduction.centered else None, 2 * jnp.real(inner) / n


def measured_tangents(measured, dmean, dvar):
    """Returns the tangent of a `Measured`: a count has none, and the rest is a rounding error."""
    count = None
    if measured.count is not None:
        count = np.zeros(measured.count.shape, jax.dtypes.float0)
    return Measured(count, dmean, None if dmean is None else jnp.zeros_like(dmean), dvar)


def count_entries(reduction, x, measured=None):
    """Returns how many entries were measured, over all devices: an int where that is static."""
    if measured is not None and measured.count is not None:
        return measured.count
    return _size(reduction, x) * pool.devices(reduction.axis_name, reduction.groups)


def present(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype to compute in, with zeros where an entry is absent."""
    x = x.astype(ax.compute_dtype(x.dtype))
    return x if mask is None else jnp.where(mask, x, 0)


def deviation(x, mean, rest, mask):
    """Returns `x - mean`, the mean given as two numbers or None; 0 where an entry is absent."""
    if mean is None:
        return x
    d = (x - mean) - rest
    return d if mask is None else jnp.where(mask, d, 0)


def square(x):
    """Returns |x|^2, real."""
    return _inner(x, x)


def _inner(a, b):
    """Returns the real inner product of entries, Re(conj(a) b)."""
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b


def _size(reduction, x):
    """Returns how many entries of one device are summarised together."""
    return math.prod(x.shape[axis] for axis in reduction.axes)


def _count_valid(reduction, x, mask):
    """Returns how many entries of this device the mask lets count."""
    repeats = math.prod(x.shape[axis] for axis in reduction.axes if mask.shape[axis] == 1)
    return jnp.sum(mask, reduction.axes, dtype=jnp.int32, keepdims=True) * repeats


def _at_least_one(count, like):
    """Returns a count to divide by, real, of the precision of `like`."""
    dtype = ax.real_dtype(like.dtype)
    if isinstance(count, int):
        return jnp.asarray(max(count, 1), dtype)
    return jnp.maximum(jnp.asarray(count, dtype), 1)


def _pool(reduction, here):
    """Merges what the devices of a group measured, after one exchange."""
    axis_name, groups, real = reduction.axis_name, reduction.groups, here.var.dtype
    split = [jnp.real, jnp.imag] if jnp.iscomplexobj(here.mean) else [jnp.real]
    rows = [here.var]
    if reduction.centered:
        rows += [part(leaf) for leaf in (here.mean, here.rest) for part in split]
    if here.count is not None:
        count = jnp.broadcast_to(here.count, here.var.shape)
        rows += [digit.astype(real) for digit in jnp.divmod(count, pool.DIGIT)]
    var, *rows = pool.gather(axis_name, groups, *rows)
    if here.count is None:
        members = ax.along(pool.members(axis_name, groups), var.ndim, (0,))
        count, weights = None, members.astype(real) / pool.devices(axis_name, groups)
    else:
        *rows, high, low = rows
        counts = high * pool.DIGIT + low
        n = jnp.sum(counts, 0)
        weights = counts / jnp.maximum(n, 1)
        exact = jnp.sum(high.astype(jnp.int32) * pool.DIGIT + low.astype(jnp.int32), 0)
        count = jnp.where(n < MAX_COUNT, exact, MAX_COUNT)
    if not reduction.centered:
        return Measured(count, None, None, jnp.sum(weights * var, 0))
    mean, rest = rows if len(split) == 1 else (jax.lax.complex(*rows[i:][:2]) for i in (0, 2))
    center = jnp.sum(weights * mean, 0)
    rest_of_all = jnp.sum(weights * ((mean - center) + rest), 0)
    apart = ((mean - center) + rest) - rest_of_all
    return Measured(count, center, rest_of_all, jnp.sum(weights * (var + square(apart)), 0))
