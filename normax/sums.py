"""Sums over axes, and mean and variance from one read of an array.

Where a compiler keeps no row on chip each reduction is a read of memory. There the deviations are
taken from a guess of the mean, not from the mean itself: a median of a few entries, which costs
next to nothing and is near the mean where that matters, or zero, whose result is checked.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from normax import axes as ax
from normax import units

SAMPLES = 5
FEW, MANY = 4, 64
# Columns shorter than this XLA on a GPU reads just once if they are cut into parts of such lengths.
COLUMN, LEAST, MOST = 8192, 32, 128
# What is added one by one may lose digits in proportion to the root of their number.
LONG, PART = 32768, 256
# A sum of squares may hold this many times the variance before digits of it are missed.
LOST = 4.0


def total(x, axes):
    """Returns the sum over axes, which are kept; one run of neighbouring axes after the other.

    In one go, XLA on CPU adds over separate runs one number at a time: slowly, and with an error
    that grows with their number.
    """
    return _one_after_the_other(x, _runs(axes))


def total_in_parts(x, axes):
    """Returns the sum over axes, which are kept, to the last digits however many entries there are.

    Long runs are summed part by part: on CPU that costs nothing where the parts are equal.
    """
    return functools.reduce(_total_in_parts, _runs(axes), x)


def _total_in_parts(x, run):
    size = math.prod(x.shape[axis] for axis in run)
    spec = jax.typeof(x).sharding.spec
    cut = any(spec[axis] is not None for axis in run)  # among devices, whose parts are shorter
    if cut or not isinstance(size, int) or size < LONG:
        return jnp.sum(x, run, keepdims=True)
    axis, *others = run
    # Divided, so that XLA does not join the two sums.
    if others:
        each = math.prod(x.shape[other] for other in others)
        return _total_in_parts(_total_in_parts(x, others) / each, [axis]) * each
    parts = (part for part in range(MANY + 1, PART + 1) if size % part == 0)
    # The odder a part, the more devices can share their number.
    part = min(parts, key=lambda part: (part & -part, -part), default=PART)
    equal = size - size % part
    found = lax.slice_in_dim(x, 0, equal, axis=axis)
    found = found.reshape(*x.shape[:axis], equal // part, part, *x.shape[axis + 1 :])
    found = jnp.sum(jnp.sum(found, axis + 1) / equal, axis, keepdims=True) * equal
    if equal < size:
        found += jnp.sum(lax.slice_in_dim(x, equal, size, axis=axis), axis, keepdims=True)
    return found


def total_in_one_read(x, axes, cut_columns=True):
    """Returns the sum over axes, which are kept, in an order in which a GPU reads `x` just once.

    Where axes on both sides are kept, XLA would write down what is to be summed first, unless it
    has more sums to do than results: a few parts of each. So it may over leading axes, of short
    columns, the more is done to an entry before: then those are cut too, unless told not to, for
    what parts add up to weighs beside them.
    """
    length = 1
    for run in _runs(axes):
        size = math.prod(x.shape[axis] for axis in run)
        axis, part = _part(x, run, size, cut_columns)
        x = _total_of_parts(x, run, axis, part) if part else jnp.sum(x, run, keepdims=True)
        x, length = _over(x, _near(size)), length * _near(size)
    return _times(x, length)


def totals_in_one_read(a, b, axes, total=total_in_one_read):
    """Returns the sums of two arrays over axes, as `total_in_one_read`, or as what adds like it.

    As one sum, of complex numbers: of two, XLA may write down first what both are made of.
    """
    both = total(lax.complex(a, b), axes)
    return both.real, both.imag


def _part(x, run, size, cut_columns):
    """Returns which of neighbouring axes to cut, into parts of which length; 0 is not at all."""
    first, lengths = run[0], [x.shape[axis] for axis in run]
    if run[-1] == x.ndim - 1:
        return first, 0
    if first > 0:
        parts = 1
        if isinstance(lengths[0], int):  # not a symbol of a program to export
            parts = next((parts for parts in range(FEW, MANY) if lengths[0] % parts == 0), 1)
        return first, lengths[0] // parts
    dealt_out = any(jax.typeof(x).sharding.spec[axis] is not None for axis in run)
    if dealt_out or not cut_columns or not isinstance(size, int) or size >= COLUMN:
        return first, 0
    cuts = (
        (part * math.prod(lengths[axis + 1 :]), axis, part)
        for axis, length in enumerate(lengths)
        for part in range(1, MOST + 1)
        if length % part == 0
    )
    _, axis, part = max(
        (c for c in cuts if LEAST <= c[0] <= min(MOST, size - 1)), default=(0, 0, 0)
    )
    return axis, part


def _total_of_parts(x, run, axis, length):
    """Returns the sum over neighbouring axes: of parts of one of them and all behind it, first."""
    x = x.reshape(*x.shape[:axis], x.shape[axis] // length, length, *x.shape[axis + 1 :])
    within = [other + 1 for other in run if other >= axis]
    size = _near(math.prod(x.shape[other] for other in within))
    x = _over(jnp.sum(x, within, keepdims=True), size)
    x = jnp.sum(x, [other for other in run if other <= axis], keepdims=True)
    return _times(jnp.squeeze(x, axis), size)


def _runs(axes):
    runs: list[list[int]] = []
    for axis in axes:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs


def _one_after_the_other(x, runs):
    """Returns the sum over several axes at a time; divisions keep XLA from joining them."""
    length = 1
    for run in runs[:-1]:
        size = math.prod(x.shape[axis] for axis in run)
        x, length = _over(jnp.sum(x, run, keepdims=True), _near(size)), length * _near(size)
    result = jnp.sum(x, runs[-1] if runs else (), keepdims=True)
    return _times(result, length) if len(runs) > 1 else result


def _parts_of(function, x):
    """Returns a function of the two parts of complex numbers, as two sums may be one."""
    return lax.complex(function(x.real), function(x.imag)) if jnp.iscomplexobj(x) else function(x)


def _near(size):
    """Returns a power of two that is near a size: a quotient by it is not rounded."""
    return 2.0 ** (size.bit_length() - 1) if isinstance(size, int) and size > 0 else max(size, 1)


def _over(x, size):
    return _parts_of(lambda part: part / size, x)


def _times(x, size):
    return _parts_of(lambda part: part * size, x)


def about_samples(x, axes, n, least, centered, cut_columns=True):
    """Returns unit, mean, rest and var of `x`, measured about the median of a few of its entries.

    The relative error of the variance is that of a sum, times one plus the squared distance of the
    median from the mean, in deviations. That is large only where most of the samples are alike and
    far from nearly all of the entries.
    """
    dtype = ax.compute_dtype(x.dtype)
    samples = [_sample(x, axes, index).astype(dtype) for index in range(SAMPLES)]
    unit = None
    if units.needed(x.dtype):
        peak = functools.reduce(jnp.maximum, map(jnp.abs, samples))
        unit = units.choose(peak, (), max(least, 1.0))
    mean = units.divide(_median(samples), unit) if centered else None
    unit, mean = units.found_once(unit, mean)
    entries = units.divide(x.astype(dtype), unit)
    total = functools.partial(total_in_one_read, cut_columns=cut_columns)
    if not centered:
        return unit, None, None, total(entries * entries, axes) / n
    d = entries - mean
    rest, squares = totals_in_one_read(d, d * d, axes, total)
    rest = rest / n
    var = squares / n - rest * rest
    return unit, mean, rest, jnp.maximum(var, 0)


def about_zero(x, axes, n, at_once=False):
    """Returns mean and variance of `x`, and where digits of the variance were lost.

    At once: both sums in one operation, where XLA would read `x` twice.
    """
    if at_once:
        zero = jnp.zeros((), x.dtype)
        both = lax.reduce((x, x * x), (zero, zero), _add_both, axes)
        mean, squares = (lax.expand_dims(v, axes) / n for v in both)
    else:
        mean, squares = total(x, axes) / n, total(x * x, axes) / n
    var = squares - mean * mean
    return mean, var, ~((mean * mean <= LOST * var) & jnp.isfinite(squares))


def _add_both(a, b):
    return a[0] + b[0], a[1] + b[1]


def mean_square(x, axes, n):
    """Returns a unit, and the mean square of `x` in it.

    Squared as they are entries may be too large; then those in a large unit are right.
    """
    unit = 2.0 ** (jnp.finfo(x.dtype).maxexp * 19 // 32)
    far = x * (1 / unit)
    squares, further = (total(v * v, axes) / n for v in (x, far))
    is_right = jnp.isfinite(squares)
    one = jnp.ones_like(squares)
    return jnp.where(is_right, one, unit), jnp.where(is_right, squares, further)


def _sample(x, axes, index):
    """Returns an entry of each group: along each axis another one."""
    for order, axis in enumerate(axes):
        # In thousandths: nothing that is periodic, or padded at its ends, has such places.
        place = x.shape[axis] * ((index + 1) * (order + 1) * 618 % 1000) // 1000
        x = lax.slice_in_dim(x, place, place + 1, axis=axis)
    return x


def _median(five):
    """Returns the median of five arrays, entry by entry."""
    a, b, c, d, e = five
    a, b, c, d = jnp.minimum(a, b), jnp.maximum(a, b), jnp.minimum(c, d), jnp.maximum(c, d)
    # The smallest of the four is too small, the largest too large.
    b, c = jnp.minimum(b, d), jnp.maximum(a, c)
    low, high = jnp.minimum(b, c), jnp.maximum(b, c)
    return jnp.maximum(low, jnp.minimum(high, e))
