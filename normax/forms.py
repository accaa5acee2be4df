"""What is measured on one device, in the form that suits a platform.

The form is the corrected two-pass one: the mean is taken, then the mean of what it left over, and
the deviations are squared only after both are gone. That is what keeps a few units in the last
place where the mean is a million times the deviation. Numbers whose squares would leave the range
of the dtype are measured in units of their own, powers of two. Where every sum is a read of memory
there is one read, if that is enough.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax import parts, pool, sums, units
from normax.entries import (
    are_short_rows,
    at_least_one,
    over,
    present,
    settled,
    square,
    subtract,
    times,
    weigh,
)
from normax.kernels import primitive as pr
from normax.kernels.dispatch import by_platform


@functools.partial(jax.jit, static_argnums=0)
def measure_here(reduction, x, mask):
    """Returns count, unit, mean, rest and var of this device's entries."""
    mask = mask if mask is None else pool.placed_like(mask, x)
    if units.needed(x.dtype):
        # A GPU would have to ask the host whether to go on; reading x once more is cheaper there.
        anywhere, on_tpu, on_cpu = _in_a_unit, _in_a_unit_where_needed, _in_a_unit_where_none_asks
    else:
        anywhere = on_tpu = on_cpu = _in_no_unit
    forms = {"cpu": on_cpu, "tpu": on_tpu}
    if one_read_is_enough(reduction, x, mask):
        forms |= {"cuda": _about_samples, "rocm": _about_samples, "tpu": _about_zero}
    partials: dict[str, Any] = {k: functools.partial(f, reduction) for k, f in forms.items()}
    form = by_platform(functools.partial(anywhere, reduction), tell_devices=True, **partials)
    count, *measured = form(x, mask)
    return count, *equal_in_no_unit(*measured)


def equal_in_no_unit(unit, mean, rest, var):
    """Returns the same, with one as the unit of equal entries: epsilon would vanish in a larger."""
    if unit is None or mean is None:
        return unit, mean, rest, var
    own = jnp.where((var == 0) & (unit > 1), unit, 1)
    return unit / own, times(mean, own), times(rest, own), var


def one_read_is_enough(reduction, x, mask):
    """Returns whether deviations from something near the mean, in one unit, tell all."""
    small_do_not_matter = reduction.least > 2.0**-90 or not units.needed(x.dtype)
    plain = mask is None and not jnp.iscomplexobj(x)
    return plain and small_do_not_matter and x.size > 0


def _about_samples(reduction, x, mask, devices=1):
    @parts.shared
    def measure(reduction, x, mask, n):
        del mask
        # Parts of columns that are not those of devices would have to be sent.
        cut = devices == 1
        return sums.about_samples(x, reduction.axes, n, reduction.least, reduction.centered, cut)

    return measure(reduction, x, mask, devices)


def _about_zero(reduction, x, mask, devices=1):
    entries, n = present(x, mask), at_least_one(math.prod(x.shape[i] for i in reduction.axes), x)
    in_range = not units.needed(x.dtype)
    # Of float32 that is not centred two sums are found in one read, else a branch is needed.
    branches = not in_range and (reduction.centered or x.dtype == jnp.bfloat16)
    if branches and devices == 1 and are_short_rows(x, reduction.axes):
        return _of_short_rows(reduction, x, entries, n)
    if not reduction.centered and in_range:
        return None, None, None, None, sums.total(entries * entries, reduction.axes) / n
    if not reduction.centered and devices == 1:  # of several each sum is an exchange
        unit, squares = sums.mean_square(entries, reduction.axes, n)
        return None, unit, None, None, squares
    mean, rest, var, lost = _in_one_read(reduction, entries, n)
    unit = None if in_range else jnp.ones_like(var)
    again = _in_no_unit if unit is None else _in_a_unit
    again = functools.partial(again, reduction, devices=devices)
    if _are_members_apart(reduction, x):
        # As groups a TPU would lay `x` out anew for the branch, even if that is not taken.
        shape, spec = x.shape, jax.typeof(x).sharding.spec
        x = pool.reshape(x, (*shape[:-2], shape[-2] * shape[-1]), spec[:-1])
        again = functools.partial(_as_groups, again, shape, spec)
    measured = None, unit, mean, rest, var
    return _again_where_lost(again)(jnp.any(lost), (x, mask), measured)


def _in_one_read(reduction, entries, n, at_once=False):
    """Returns mean, rest and var, and where digits of the variance were lost."""
    if reduction.centered:
        mean, var, lost = sums.about_zero(entries, reduction.axes, n, at_once)
        return mean, jnp.zeros_like(mean), var, lost
    var = sums.total(entries * entries, reduction.axes) / n
    return None, None, var, ~jnp.isfinite(var)


def _of_short_rows(reduction, x, entries, n):
    """Returns the same of rows beside which what is measured weighs.

    What comes out of a branch is written down, so of each row it is as few numbers as can be, which
    are in range whatever the entries are: the mean, in two parts if it has digits for them, and the
    deviation.
    """
    narrow = x.dtype == jnp.bfloat16
    # Of narrow ones XLA would read `x` once for each sum.
    mean, rest, var, lost = _in_one_read(reduction, entries, n, at_once=narrow)
    rest = None if narrow else rest

    def again(x, mask):
        _, unit, mean, rest, var = _in_a_unit(reduction, x, mask)
        if narrow and reduction.centered:
            mean, rest = mean + rest, None
        return jax.tree.map(lambda v: v * unit, (mean, rest, jnp.sqrt(var)))

    measured = mean, rest, jnp.sqrt(var)
    measured = _again_where_lost(again)(jnp.any(lost), (x, None), measured)
    unit = jnp.where(measured[-1] > 2.0**60, 2.0**76, jnp.ones_like(measured[-1]))
    mean, rest, deviation = jax.tree.map(lambda v: v / unit, measured)
    if narrow and reduction.centered:
        rest = jnp.zeros_like(mean)
    return None, unit, mean, rest, square(deviation)


def _are_members_apart(reduction, x):
    """Returns whether the last axis was made of one of features, as group norm does."""
    axes = reduction.axes
    return len(axes) > 1 and axes[-1] == x.ndim - 1 and axes[-2] != x.ndim - 2


def _as_groups(measure, shape, spec, x, mask):
    # Behind a barrier, or XLA would do it before the branch.
    return measure(pool.reshape(lax.optimization_barrier(x), shape, spec), mask)


def _again_where_lost(measure):
    """Returns a function that measures again if told to; a mapped one asks once for all."""

    @jax.custom_batching.custom_vmap
    def again(lost, arguments, measured):
        return lax.cond(lost, lambda: measure(*arguments), lambda: measured)

    @again.def_vmap
    def mapped(size, batched, lost, arguments, measured):
        _, *dims = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, batched)
        measured = pr.in_front(size, batched[2], measured)
        every = _again_where_lost(jax.vmap(lambda *arguments: measure(*arguments), dims[0]))
        return every(jnp.any(lost), arguments, measured), jax.tree.map(lambda _: True, measured)

    return again


@parts.shared
def _in_no_unit(reduction, x, mask, n):
    return _measure_in(None, reduction, x, mask, n)


@parts.shared
def _in_a_unit(reduction, x, mask, n):
    return _measure_in(_unit(reduction, x, mask), reduction, x, mask, n)


def _in_a_unit_where_needed(reduction, x, mask, devices=1):
    count, _, *common = _in_no_unit(reduction, x, mask, devices)
    var = common[-1]
    common = (count, jnp.ones_like(var), *common)
    tiny, wild = var < _smallest_square(var.dtype), ~jnp.isfinite(var)

    def doubted(guarded):
        unit = _unit(reduction, guarded, mask)
        # Entries near one, or larger, have so small a variance only where they are equal.
        needed = (tiny & (unit < 2.0**-10)) | wild
        unit = jnp.where(needed, unit, 1)

        @parts.shared
        def in_it(part, x, mask, n):
            return _measure_in(parts.of_part(unit, reduction, part), part, x, mask, n)

        again = functools.partial(in_it, reduction, mask=mask, devices=devices)
        # Not what is guarded for this loop: passed on to the next it would be written down.
        return _at_most_once(jnp.any(needed), again, x, common)

    # One question within the other: where devices have to agree, they ask only the first.
    return _at_most_once(jnp.any(tiny | wild), doubted, x, common)


def _in_a_unit_where_none_asks(reduction, x, mask, devices=1):
    # Several devices would have to agree on the answer: that costs more than one more read.
    form = _in_a_unit_where_needed if devices == 1 else _in_a_unit
    return form(reduction, x, mask, devices)


def _unit(reduction, x, mask):
    return units.choose(present(x, mask), reduction.axes, reduction.least)


def _measure_in(unit, reduction, x, mask, n):
    """Returns unit, mean, rest and var in multiples of the unit."""
    entries = units.divide_exactly(present(x, mask), unit)

    def total(v):
        return sums.total(weigh(v, mask), reduction.axes)

    mean = rest = None
    if reduction.centered:
        mean = settled(over(total(entries), n))
        # The mean is rounded; the mean of what it leaves over carries the digits it lost.
        rest = settled(over(total(subtract(entries, mean, None, mask)), n))
        mean, rest = _two_parts(mean, rest)
    return unit, mean, rest, total(square(subtract(entries, mean, rest, mask))) / n


def _two_parts(mean, rest):
    """Returns a rounded sum and what it lacks; nothing where that is only the rounding of `rest`.

    So the mean of equal entries is what they are, and their deviations are zero.
    """
    total = settled(mean + rest)
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
