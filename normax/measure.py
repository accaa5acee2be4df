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
DIGIT = 2.0**15


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
    `count` is None where there is no mask: then it is static, and nothing to keep. Otherwise it
    is two floats, the count over and modulo `DIGIT`: exact in float32, and with a tangent.
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
    n = _at_least_one(_size(reduction, x) if count is None else _number(count), entries)
    total = functools.partial(_total, axes=reduction.axes)
    mean = rest = None
    if reduction.centered:
        mean = _settled(_over(total(entries), n))
        # The mean is rounded; the mean of what it leaves over carries the digits it lost.
        rest = _over(total(deviation(entries, mean, jnp.zeros_like(mean), mask)), n)
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
    sums = [_total(v, reduction.axes) for v in (t, _inner(d, t))]
    together = jnp.stack([v.astype(t.dtype) for v in sums])
    mean, inner = pool.sum_over_devices(reduction.axis_name, reduction.groups, together)
    return _over(mean, n) if reduction.centered else None, 2 * jnp.real(inner) / n


def measured_tangents(measured, dmean, dvar):
    """Returns the tangent of a `Measured`: a count does not move, nor does a rounding error."""
    count, rest = jax.tree.map(jnp.zeros_like, (measured.count, measured.rest))
    return Measured(count, dmean, rest, dvar)


def count_entries(reduction, x, measured=None):
    """Returns how many entries were measured, over all devices: an int where that is static."""
    if measured is not None and measured.count is not None:
        return _number(measured.count)
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


def times(x, real):
    """Returns `x * real`, x real or complex."""
    return x * real.astype(x.dtype)


def _over(x, real):
    return x / real.astype(x.dtype)


def _settled(x):
    """Returns `x` as the number it is when stored.

    A compiler may take `a - b * c` in one operation and keep digits of the product that the stored
    product has lost; then what is left over would not belong to the mean that is kept for the
    backward pass. It cannot look through this: the bits as an integer, bounded where no bound is.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_settled(jnp.real(x)), _settled(jnp.imag(x)))
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    # Only -0.0 is below the bound, and comes out as the number next to it.
    bits = jnp.maximum(bits, jnp.asarray(-np.iinfo(integer).max, integer))
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def square(x):
    """Returns |x|^2, real."""
    return _inner(x, x)


def _inner(a, b):
    """Returns the real inner product of entries, Re(conj(a) b)."""
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b


def _total(x, axes):
    """Returns the sum over axes, which are kept; one run of neighbouring axes after the other.

    In one go, XLA on CPU adds over separate runs one number at a time: slowly, and with an error
    that grows with their number. The division in between keeps it from joining them again.
    """
    runs: list[list[int]] = []
    for axis in axes:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    length = 1
    for run in runs[:-1]:
        size = math.prod(x.shape[axis] for axis in run)
        x, length = jnp.sum(x, run, keepdims=True) / max(size, 1), length * size
    total = jnp.sum(x, runs[-1] if runs else (), keepdims=True)
    return total * length if len(runs) > 1 else total


def _size(reduction, x):
    """Returns how many entries of one device are summarised together."""
    return math.prod(x.shape[axis] for axis in reduction.axes)


def _count_valid(reduction, x, mask):
    """Returns how many entries of this device the mask lets count, as two digits."""
    repeats = math.prod(x.shape[axis] for axis in reduction.axes if mask.shape[axis] == 1)
    number = jnp.sum(mask, reduction.axes, dtype=jnp.int32, keepdims=True) * repeats
    dtype = ax.real_dtype(ax.compute_dtype(x.dtype))
    return tuple(digit.astype(dtype) for digit in jnp.divmod(number, jnp.int32(DIGIT)))


def _number(count):
    """Returns a count of two digits as int32, held at its largest."""
    high, low = count
    full = high * DIGIT >= 2.0**31
    number = high.astype(jnp.int32) * jnp.int32(DIGIT) + low.astype(jnp.int32)
    return jnp.where(full, MAX_COUNT, number)


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
        rows += [jnp.broadcast_to(digit, here.var.shape) for digit in here.count]
    var, *rows = pool.gather(axis_name, groups, *rows)
    if here.count is None:
        members = ax.along(pool.members(axis_name, groups), var.ndim, (0,))
        number = jnp.asarray(pool.devices(axis_name, groups), real)
        count, weights = None, members.astype(real) / number
    else:
        *rows, high, low = rows
        counts = high * DIGIT + low
        weights = counts / jnp.maximum(jnp.sum(counts, 0, keepdims=True), 1)
        carry = jnp.floor(jnp.sum(low, 0) / DIGIT)
        count = jnp.sum(high, 0) + carry, jnp.sum(low, 0) - carry * DIGIT
    if not reduction.centered:
        return Measured(count, None, None, jnp.sum(weights * var, 0))
    mean, rest = rows if len(split) == 1 else (jax.lax.complex(*rows[i:][:2]) for i in (0, 2))
    center = _settled(jnp.sum(times(mean, weights), 0))
    apart = (mean - center[None]) + rest
    rest_of_all = jnp.sum(times(apart, weights), 0)
    apart = apart - rest_of_all[None]
    return Measured(count, center, rest_of_all, jnp.sum(weights * (var + square(apart)), 0))
