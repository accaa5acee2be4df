"""The measuring step: mean and variance of an array over axes, a mask and devices.

The form is the corrected two-pass one: the mean is taken, then the mean of what it left over, and
the deviations are squared only after both are gone. That is what keeps a few units in the last
place where the mean is a million times the deviation. Numbers whose squares would leave the range
of the dtype are measured in units of their own, powers of two.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from normax import axes as ax
from normax import pool, units

MAX_COUNT = np.iinfo(np.int32).max
DIGIT = 2.0**15


class Reduction(NamedTuple):
    """Which elements are summarised together: axes of the array, and devices. Static."""

    axes: tuple[int, ...]
    centered: bool = True
    axis_name: Any = None
    groups: tuple[tuple[int, ...], ...] | None = None
    least: float = 0.0  # the smallest unit to measure in

    @classmethod
    def over(cls, name, axes, centered=True, axis_name=None, axis_index_groups=None):
        """Returns the reduction over `axes` and over the devices of a bound `axis_name`."""
        ax.check_axis_name_with_groups(name, axis_name, axis_index_groups)
        if axis_name is None:
            return cls(axes, centered)
        axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        size = ax.axis_size(name, axis_name)
        if axis_index_groups is not None:
            axis_index_groups = ax.check_axis_index_groups(name, axis_index_groups, size)
        return cls(axes, centered, axis_name, axis_index_groups)


class Measured(NamedTuple):
    """What was measured, with the reduced axes kept.

    `count` is None where there is no mask: then it is static, and nothing to keep. Otherwise it
    is two floats, the count over and modulo `DIGIT`: exact in float32, and with a tangent. With
    weights it is one, their sum.
    The others are in multiples of `unit`, a power of two; None is one. `mean + rest` is the mean
    to twice the precision, both None where it was not to be subtracted; of a bfloat16 input,
    whose entries have few digits, there is no rest.
    """

    count: Any
    unit: Any
    mean: Any
    rest: Any
    var: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def measure(reduction: Reduction, x: jax.Array, mask: jax.Array | None) -> Measured:
    """Measures `x` over a reduction; the arguments have been through `axes.py`."""
    mask, weight = _near_one(reduction, mask)
    count = None if mask is None else _count(reduction, x, mask)
    n = _at_least_one(_size(reduction, x) if count is None else _number(count), x)
    if count is not None and len(count) == 1:
        count = (count[0] * weight,)
    here = Measured(
        count, *_measure_here(reduction._replace(axis_name=None, groups=None), x, mask, n)
    )
    measured = here if reduction.axis_name is None else _pool(reduction, here)
    if reduction.centered and measured.unit is not None and x.dtype == jnp.bfloat16:
        measured = measured._replace(mean=_settled(measured.mean + measured.rest), rest=None)
    return measured


@functools.partial(measure.defjvp, symbolic_zeros=True)
def _measure_jvp(reduction, primals, tangents):
    x, mask = primals
    measured = measure(reduction, x, mask)
    moves = [None if isinstance(t, SymbolicZero) else t for t in tangents]
    return measured, _measure_tangents(reduction, x, mask, measured, *moves)


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _measure_tangents(reduction, x, mask, measured, t, dmask):
    d = deviation(x, mask, measured)
    t = jnp.zeros_like(d) if t is None else present(t, mask)
    moves = moment_tangents(reduction, d, t, measured, mask, dmask)
    return measured_tangents(measured, *moves)


@functools.partial(jax.jit, static_argnums=0)
def _measure_here(reduction, x, mask, n):
    """Returns unit, mean, rest and var of this device's entries."""
    if not units.needed(x.dtype):
        return _measure_in(None, reduction, x, mask, n)

    def choose(x, mask):
        return units.choose(present(x, mask), reduction.axes, reduction.least)

    def in_a_unit(x, mask, n):
        return _measure_in(choose(x, mask), reduction, x, mask, n)

    def in_a_unit_where_needed(x, mask, n):
        common = _measure_in(None, reduction, x, mask, n)
        common = (jnp.ones_like(common[-1]), *common[1:])
        var = common[-1]
        tiny, wild = var < _smallest_square(var.dtype), ~jnp.isfinite(var)
        doubtful = jnp.any(tiny | wild)
        unit = _at_most_once(doubtful, lambda x: choose(x, mask), x, common[0])
        # Entries near one, or larger, have so small a variance only where they are equal.
        needed = (tiny & (unit < 2.0**-10)) | wild
        unit = jnp.where(needed, unit, 1)
        return _at_most_once(
            jnp.any(needed), lambda x: _measure_in(unit, reduction, x, mask, n), x, common
        )

    # A GPU would have to ask the host whether to go on; reading x once more is cheaper there.
    return lax.platform_dependent(
        x, mask, n, cpu=in_a_unit_where_needed, tpu=in_a_unit_where_needed, default=in_a_unit
    )


def _measure_in(unit, reduction, x, mask, n):
    """Returns unit, mean, rest and var in multiples of the unit."""
    entries = units.divide_exactly(present(x, mask), unit)

    def total(v):
        return _total(weigh(v, mask), reduction.axes)

    mean = rest = None
    if reduction.centered:
        mean = _settled(_over(total(entries), n))
        # The mean is rounded; the mean of what it leaves over carries the digits it lost.
        rest = _settled(_over(total(subtract(entries, mean, None, mask)), n))
        mean, rest = _two_parts(mean, rest)
    return unit, mean, rest, total(square(subtract(entries, mean, rest, mask))) / n


def _two_parts(mean, rest):
    """Returns a rounded sum and what it lacks; nothing where that is only the rounding of `rest`.

    So the mean of equal entries is what they are, and their deviations are zero.
    """
    total = _settled(mean + rest)
    lacking = (mean - total) + rest
    size = jnp.abs(rest) * (64 * jnp.finfo(rest.dtype).eps)
    return total, jnp.where(jnp.abs(lacking) <= size, 0, lacking)


def _smallest_square(dtype):
    """Returns the size below which a mean of squares may lack some that were too small."""
    info = jnp.finfo(dtype)
    return 2.0 ** (info.minexp + info.nmant + 2)


def _at_most_once(needed, compute, x, otherwise):
    """Returns `compute(x)` if needed, else `otherwise`. Unlike cond, not both under vmap."""

    def body(loop):
        now, _ = loop
        # Depending on the loop, the work is not moved out of it.
        return jnp.logical_and(now, False), compute(jnp.where(now, x, 0))

    return lax.while_loop(lambda loop: loop[0], body, (needed, otherwise))[1]


def moment_tangents(reduction, direction, t, measured, mask, dmask=None, length: Any = 1):
    """Returns how the mean moves, None if there is none; half the variance; and the count.

    `direction` holds the deviations times `length`, by which half the variance comes out
    multiplied too; `t` is how the entries move, `dmask` how their weights do.
    """
    n = _at_least_one(count_entries(reduction, t, measured), t)
    mask, weight = _near_one(reduction, mask)
    moves = [weigh(t, mask), weigh(inner(direction, t), mask)]
    if dmask is not None:
        unit = 1 if measured.unit is None else measured.unit
        d = _over(direction, jnp.where(jnp.asarray(length) > 0, length, 1))
        dmask = jnp.where(there(mask), jnp.broadcast_to(dmask, t.shape), 0)
        further = square(d) - measured.var
        moves = [
            moves[0] + times(d, dmask * (unit / weight)),
            moves[1] + further * dmask * (unit * length / (2 * weight)),
            dmask,
        ]
    mean, along, *count = (_total(v, reduction.axes).astype(t.dtype) for v in moves)
    sums = [*(_over(times(v, weight), n) for v in (mean, along)), *count]
    together = pool.sum_over_devices(reduction.axis_name, reduction.groups, jnp.stack(sums))
    mean, along, *count = together
    return (mean if reduction.centered else None, jnp.real(along), *map(jnp.real, count))


def measured_tangents(measured, dmean, along, dcount=None):
    """Returns the tangent of a `Measured`: a mask's count does not move, nor a rounding error."""
    zeros = jax.tree.map(jnp.zeros_like, measured)
    mean = None if dmean is None else units.divide(dmean, measured.unit)
    count = zeros.count
    if dcount is not None:  # alike along the axes that the weights are broadcast over
        count = (lax.slice(dcount, [0] * dcount.ndim, count[0].shape),)
    return zeros._replace(count=count, mean=mean, var=units.divide(2 * along, measured.unit))


def count_entries(reduction, x, measured=None):
    """Returns how many entries were measured on all devices: an int if static, real if weighed."""
    if measured is not None and measured.count is not None:
        return _number(measured.count)
    return _size(reduction, x) * pool.devices(reduction.axis_name, reduction.groups)


def present(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype to compute in, with zeros where an entry is absent."""
    x = x.astype(ax.compute_dtype(x.dtype))
    return x if mask is None else jnp.where(there(mask), x, 0)


def there(mask: jax.Array) -> jax.Array:
    """Returns which entries are present, by a mask or by weights."""
    return mask if mask.dtype == jnp.bool_ else mask > 0


def weigh(x, mask):
    """Returns what is to be summed: `x`, zero where an entry is absent, times weights if any."""
    if mask is None or mask.dtype == jnp.bool_:
        return x
    return times(x, jnp.where(there(mask), mask, 0))


def deviation(x, mask, measured, divide=units.divide):
    """Returns the entries of `x` less their mean, in multiples of the unit."""
    entries = divide(present(x, mask), measured.unit)
    return subtract(entries, measured.mean, measured.rest, mask)


def subtract(x, mean, rest, mask):
    """Returns `x - mean - rest`, either None for zero; 0 where an entry is absent."""
    if mean is None:
        return x
    d = x - mean if rest is None else (x - mean) - rest
    return d if mask is None else jnp.where(there(mask), d, 0)


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
    return inner(x, x)


def inner(a, b):
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


def _near_one(reduction, mask) -> Any:
    """Returns weights of a size that can be multiplied by squares, and their unit; else one."""
    if mask is None or mask.dtype == jnp.bool_:
        return mask, jnp.ones((), bool)
    weight = lax.stop_gradient(units.choose(jnp.where(there(mask), mask, 0), reduction.axes, 0.0))
    return mask / weight, weight


def _count(reduction, x, mask):
    """Returns how many entries of this device the mask lets count, as two digits, or its sum."""
    repeats = math.prod(x.shape[axis] for axis in reduction.axes if mask.shape[axis] == 1)
    if mask.dtype != jnp.bool_:
        return (_total(weigh(jnp.ones_like(mask), mask), reduction.axes) * repeats,)
    number = jnp.sum(mask, reduction.axes, dtype=jnp.int32, keepdims=True) * repeats
    dtype = ax.real_dtype(ax.compute_dtype(x.dtype))
    return tuple(digit.astype(dtype) for digit in jnp.divmod(number, jnp.int32(DIGIT)))


def _number(count):
    """Returns a count of two digits as int32, held at its largest; a sum of weights as it is."""
    if len(count) == 1:
        return count[0]
    high, low = count
    full = high * DIGIT >= 2.0**31
    number = high.astype(jnp.int32) * jnp.int32(DIGIT) + low.astype(jnp.int32)
    return jnp.where(full, MAX_COUNT, number)


def _at_least_one(count, like):
    """Returns a count to divide by, real, of the precision of `like`; one for nothing."""
    dtype = ax.real_dtype(ax.compute_dtype(like.dtype))
    if isinstance(count, int):
        return jnp.asarray(max(count, 1), dtype)
    count = jnp.asarray(count, dtype)
    return jnp.where(count > 0, count, 1)


def _pool(reduction, here):
    """Merges what the devices of a group measured, after one exchange."""
    axis_name, groups, real = reduction.axis_name, reduction.groups, here.var.dtype
    leaves, form = jax.tree.flatten(here)
    rows = [part for leaf in leaves for part in units.parts(leaf)]
    rows = [jnp.broadcast_to(row, here.var.shape) for row in rows]
    gathered = iter(pool.gather(axis_name, groups, *rows))
    each = [
        lax.complex(next(gathered), next(gathered)) if jnp.iscomplexobj(leaf) else next(gathered)
        for leaf in leaves
    ]
    each = jax.tree.unflatten(form, each)
    if each.count is None:
        members = ax.along(pool.members(axis_name, groups), each.var.ndim, (0,))
        number = jnp.asarray(pool.devices(axis_name, groups), real)
        count, weights = None, members.astype(real) / number
    else:
        *high, low = each.count
        counts = sum((digit * DIGIT for digit in high), low)
        count = tuple(jnp.sum(digit, 0) for digit in each.count)
        if high:
            carry = jnp.floor(count[1] / DIGIT)
            count = count[0] + carry, count[1] - carry * DIGIT
        weights = counts / _at_least_one(jnp.sum(counts, 0, keepdims=True), counts)
    each, unit = _in_one_unit(reduction, each)
    if not reduction.centered:
        return Measured(count, unit, None, None, jnp.sum(weights * each.var, 0))
    center = _settled(jnp.sum(times(each.mean, weights), 0))
    apart = (each.mean - center[None]) + each.rest
    rest = jnp.sum(times(apart, weights), 0)
    apart = apart - rest[None]
    var = jnp.sum(weights * (each.var + square(apart)), 0)
    return Measured(count, unit, center, rest, var)


def _in_one_unit(reduction, each):
    """Returns what each device measured in a unit for them all, and that unit."""
    if each.unit is None:
        return each, None
    sizes = [jnp.sqrt(each.var)] + ([jnp.abs(each.mean)] if reduction.centered else [])
    unit = units.choose(functools.reduce(jnp.maximum, sizes) * each.unit, (0,), reduction.least)
    ratio = each.unit / unit
    mean, rest = (v if v is None else times(v, ratio) for v in (each.mean, each.rest))
    return each._replace(mean=mean, rest=rest, var=each.var * ratio * ratio), unit[0]
