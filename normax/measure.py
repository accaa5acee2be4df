"""The measuring step: mean and variance of an array over axes, a mask and devices.

What a device measures is `forms.py`; here are its derivative, its count, and what several devices
make of what each of them measured.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from normax import axes as ax
from normax import parts, pool, sums, units
from normax.entries import DIGIT, at_least_one, near_one, over, settled, there, weigh
from normax.entries import inner as inner
from normax.entries import present as present
from normax.entries import square as square
from normax.entries import subtract as subtract
from normax.entries import times as times
from normax.forms import measure_here

MAX_COUNT = np.iinfo(np.int32).max


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
    here = Measured(*measure_here(reduction._replace(axis_name=None, groups=None), x, mask))
    measured = here if reduction.axis_name is None else pooled(reduction, here)
    return as_precise(reduction, measured, x.dtype)


def as_precise(reduction, measured, dtype):
    """Returns what was measured on entries of a dtype, as precisely as that makes sense."""
    if reduction.centered and measured.unit is not None and dtype == jnp.bfloat16:
        return measured._replace(mean=settled(measured.mean + measured.rest), rest=None)
    return measured


@functools.partial(measure.defjvp, symbolic_zeros=True)
def _measure_jvp(reduction, primals, tangents):
    x, mask = primals
    measured = measure(reduction, x, mask)
    moves = [None if isinstance(t, SymbolicZero) else t for t in tangents]
    return measured, measure_tangents(reduction, x, mask, measured, *moves)


@functools.partial(jax.checkpoint, static_argnums=(0,))
def measure_tangents(reduction, x, mask, measured, t, dmask):
    """Returns the tangent of what was measured on `x`; None is zero."""
    d = deviation(x, mask, measured)
    t = jnp.zeros_like(d) if t is None else present(t, mask)
    moves = moment_tangents(reduction, d, t, measured, mask, dmask)
    return measured_tangents(measured, *moves)


def moment_tangents(reduction, direction, t, measured, mask, dmask=None, length: Any = 1):
    """Returns how the mean moves, None if there is none; half the variance; and the count.

    `direction` holds the deviations times `length`, by which half the variance comes out
    multiplied too; `t` is how the entries move, `dmask` how their weights do.
    """
    n = at_least_one(count_entries(reduction, t, measured), t)
    # What all weights add up to is known everywhere; for the largest, devices would have to ask.
    mask, weight = near_one(mask, None if measured.count is None else measured.count[0], ())
    moves = [weigh(t, mask), weigh(inner(direction, t), mask)]
    if dmask is not None:
        unit = 1 if measured.unit is None else measured.unit
        d = over(direction, jnp.where(jnp.asarray(length) > 0, length, 1))
        dmask = jnp.where(there(mask), parts.spread(dmask, t), 0)
        further = square(d) - measured.var
        moves = [
            moves[0] + times(d, dmask * (unit / weight)),
            moves[1] + further * dmask * (unit * length / (2 * weight)),
            dmask,
        ]
    mean, along, *count = (
        parts.total(sums.total, v, reduction.axes).astype(t.dtype) for v in moves
    )
    moves = jnp.stack([*(over(times(v, weight), n) for v in (mean, along)), *count])
    together = pool.sum_over_devices(reduction.axis_name, reduction.groups, moves)
    mean, along, *count = together
    return (mean if reduction.centered else None, jnp.real(along), *map(jnp.real, count))


def measured_tangents(measured, dmean, along, dcount=None):
    """Returns the tangent of a `Measured`: a mask's count does not move, nor a rounding error."""
    zeros = jax.tree.map(jnp.zeros_like, measured)
    mean = None if dmean is None else units.divide(dmean, measured.unit)
    count = zeros.count
    if dcount is not None:
        count = (dcount,)
    return zeros._replace(count=count, mean=mean, var=units.divide(2 * along, measured.unit))


def count_entries(reduction, x, measured=None):
    """Returns how many entries were measured on all devices: an int if static, real if weighed."""
    if measured is not None and measured.count is not None:
        return _number(measured.count)
    return _size(reduction, x) * pool.devices(reduction.axis_name, reduction.groups)


def deviation(x, mask, measured, divide=units.divide):
    """Returns the entries of `x` less their mean, in multiples of the unit."""
    entries = divide(present(x, mask), measured.unit)
    return subtract(entries, measured.mean, measured.rest, mask)


def _size(reduction, x):
    """Returns how many entries of one device are summarised together."""
    return math.prod(x.shape[axis] for axis in reduction.axes)


def _number(count):
    """Returns a count of two digits as int32, held at its largest; a sum of weights as it is."""
    if len(count) == 1:
        return count[0]
    high, low = count
    full = high * DIGIT >= 2.0**31
    number = high.astype(jnp.int32) * jnp.int32(DIGIT) + low.astype(jnp.int32)
    return jnp.where(full, MAX_COUNT, number)


def pooled(reduction, here):
    """Merges what the devices of a group measured, after one exchange."""
    axis_name, groups = reduction.axis_name, reduction.groups
    lay_out = functools.partial(pool.gather, axis_name, groups)
    members = ax.along(pool.members(axis_name, groups), here.var.ndim + 1, (0,))
    size = jnp.asarray(pool.devices(axis_name, groups), here.var.dtype)
    share = members.astype(here.var.dtype) / size
    return Measured(*parts.together(reduction, lay_out, share, *here))
