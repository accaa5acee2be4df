"""A batch that is measured in parts: those that devices have, each about its own mean, joined once.

Of a batch as a whole each sum is an exchange between devices, and a deviation waits for the mean.
Of a part that one device has, neither is: only what was measured is exchanged.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax import pool, units
from normax.entries import DIGIT, at_least_one, counted, near_one, settled, square, times
from normax.kernels import primitive

# Laid side by side more parts are more to send than the exchanges that they save.
MOST = 256


def shared(measure: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that measures part by part where a partitioner deals out a batch.

    Args:
      measure: function of a reduction, entries, mask and how many of them count, to unit, mean,
        rest and var, with the reduced axes kept.

    Returns:
      A function of a reduction, entries, mask, and of how many `devices` the program is spread
      over, to count, unit, mean, rest and var.
    """

    def here(reduction, x, mask):
        mask, weight = near_one(mask, mask, reduction.axes)
        count = None if mask is None else counted(reduction.axes, x, mask)
        size = math.prod(x.shape[axis] for axis in reduction.axes)
        n = at_least_one(size if count is None else _number(*count), x)
        unit, *measured, var = measure(reduction, x, mask, n)
        # As wide as the others: devices that have some of the features would have to agree on one.
        count = jax.tree.map(lambda digit: _like(times(digit, weight), var), count)
        return count, unit if unit is None else _like(unit, var), *measured, var

    @functools.wraps(measure)
    def form(reduction, x, mask, devices=1):
        cuts = _cuts_of(reduction, x, devices)
        if not cuts:
            return here(reduction, x, mask)
        within = reduction._replace(axes=_within(cuts, reduction.axes))
        each = here(within, _parted(x, cuts), _parted(mask, cuts))
        each = jax.tree.map(functools.partial(_led_by_parts, cuts), each)
        count = math.prod(cuts.values())
        share = jnp.full((count, *[1] * x.ndim), 1 / count, each[-1].dtype)
        return together(reduction, pool.lay_out, share, *each)

    return form


def of_part(value: jax.Array, whole: Any, part: Any) -> jax.Array:
    """Returns what is known of a whole as its parts have it: with their axes.

    Args:
      value: with the axes that `whole` reduces kept.
      whole: the reduction that was asked for.
      part: the one that `measure` was given.
    """
    shifts = [after - before for before, after in zip(whole.axes, part.axes, strict=True)]
    cut = [shift > before for before, shift in itertools.pairwise([0, *shifts])]
    return jnp.expand_dims(value, [axis - 1 for axis in itertools.compress(part.axes, cut)])


def _cuts_of(reduction, x, devices) -> dict[int, int]:
    """Returns along which axes there are parts, and how many, none of which two devices share.

    Where layouts are part of types they are axes that are dealt out, else the examples'.
    """
    if devices == 1 or not reduction.axes or not x.size:
        return {}
    mesh, cuts = jax.typeof(x).sharding.mesh, {0: devices}
    if mesh.explicit_axes:
        cuts = _dealt_out(x, reduction.axes)
        # What a partitioner deals out along other axes of the mesh is examples, or none of these.
        seen = math.prod(mesh.shape[name] for name in mesh.explicit_axes)
        both, size = cuts.get(0, 1) * (devices // seen), x.shape[0]
        first = {*cuts} <= {0} <= {*reduction.axes} and both > 1
        if first and isinstance(size, int) and size % both == 0:
            cuts = {0: both}
    # Cut otherwise than it is dealt out, all of it would be sent.
    for axis, count in cuts.items():
        size = x.shape[axis]
        if axis not in reduction.axes or not isinstance(size, int) or size % count:
            return {}
    # Groups may be as many as rows: what is laid side by side is no more than a device has of x.
    count, whole = math.prod(cuts.values()), math.prod(x.shape[axis] for axis in reduction.axes)
    few = [*cuts] == [0] or (isinstance(whole, int) and 4 * count**2 <= whole)
    return cuts if few and count <= MOST else {}


def _dealt_out(x, axes) -> dict[int, int]:
    """Returns among how many devices axes are dealt out, where layouts are part of types."""
    counts = {axis: pool.dealt_out(jax.typeof(x).sharding, axis) for axis in axes}
    return {axis: count for axis, count in counts.items() if count > 1}


def total(add: Callable[..., Any], x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `add(x, axes)`, a sum with the axes kept, in one exchange if several are dealt out.

    Else XLA would exchange what it summed along one of them before it sums along the next.
    """
    cuts = _dealt_out(x, axes)
    if len(cuts) < 2:
        return add(x, axes)
    each = add(_parted(x, cuts), _within(cuts, axes))
    return jnp.sum(_led_by_parts(cuts, each), 0)


def spread(value: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `value` broadcast to the shape of another: what transposes to a `total`."""
    sizes = enumerate(zip(value.shape, like.shape, strict=True))
    axes = tuple(axis for axis, (mine, size) in sizes if mine != size)
    value = pool.placed_like(value, like)
    if len(_dealt_out(like, axes)) < 2:
        return primitive.spread(value, like)
    value = primitive.varying(value, primitive.axes_of(like))
    add = functools.partial(jnp.sum, keepdims=True)
    summed = functools.partial(total, add, axes=axes)
    return jax.linear_transpose(summed, jnp.real(like).astype(value.dtype))(value)[0]


def _within(cuts, axes):
    """Returns where axes are once there are axes of parts in front of those that are cut."""
    return tuple(axis + sum(cut <= axis for cut in cuts) for axis in axes)


def _parted(x, cuts):
    """Returns an array with axes of so many parts of others in front of those; None stays."""
    for cut, count in sorted(cuts.items(), reverse=True):
        if x is not None:
            spec, shape = jax.typeof(x).sharding.spec, x.shape
            count = count if shape[cut] > 1 else 1
            shape = (*shape[:cut], count, shape[cut] // count, *shape[cut + 1 :])
            x = pool.reshape(x, shape, (*spec[: cut + 1], None, *spec[cut + 1 :]))
    return x


def _led_by_parts(cuts, leaf):
    """Returns an array of all parts along one axis, in front of the others."""
    places = [cut + before for before, cut in enumerate(cuts)]
    leaf = jnp.moveaxis(leaf, places, range(len(cuts)))
    spec, shape = jax.typeof(leaf).sharding.spec, leaf.shape
    if len(cuts) == 1:
        return leaf
    first = tuple(name for entry in spec[: len(cuts)] for name in pool.names_of(entry))
    count = math.prod(cuts.values())
    return pool.reshape(leaf, (count, *shape[len(cuts) :]), (first, *spec[len(cuts) :]))


def _like(row, var):
    return pool.placed_like(jnp.broadcast_to(row, var.shape), var)


def together(reduction, lay_out, share, count, unit, mean, rest, var):
    """Returns count, unit, mean, rest and var of all parts or devices, after one exchange.

    Args:
      reduction: says whether the mean was subtracted, and what the least unit is.
      lay_out: what gives arrays of one shape, each led by the parts.
      share: of the entries, by part, where nothing was counted.
      count: digits, or a sum of weights; None if all are alike.
      unit: with the rest, what each part was measured to be.
      mean: None if it was not to be subtracted.
      rest: likewise.
      var: in multiples of the square of the unit.
    """
    digits = () if count is None else count
    *counts, unit, mean, rest, var = _exchanged(lay_out, *digits, unit, mean, rest, var)
    if count is not None:
        number = _number(*counts)
        if len(counts) == 1:  # of weights, whose sum may be out of range
            number = number / units.choose(number, (0,), 0.0)
        share = number / at_least_one(jnp.sum(number, 0, keepdims=True), var)
        count = tuple(jnp.sum(digit, 0) for digit in counts)
        if len(count) == 2:
            carry = jnp.floor(count[1] / DIGIT)
            count = count[0] + carry, count[1] - carry * DIGIT
    return count, *_joined(reduction, unit, mean, rest, var, share)


def _number(*digits):
    """Returns a count of digits as one real number."""
    *high, low = digits
    return sum((digit * DIGIT for digit in high), low)


def _exchanged(lay_out, *leaves) -> list[Any]:
    """Returns what all have of each array, of the shape of the last, in its place; None stays."""
    *_, var = leaves
    rows = [part for leaf in leaves if leaf is not None for part in units.parts(leaf)]
    rows = [_like(row, var) for row in rows]
    given = iter(lay_out(*rows))

    def whole(leaf):
        if leaf is None:
            return None
        return lax.complex(next(given), next(given)) if jnp.iscomplexobj(leaf) else next(given)

    return [whole(leaf) for leaf in leaves]


def _joined(reduction, unit, mean: Any, rest, var, share):
    """Returns unit, mean, rest and var of all parts, which lead; `share` is of the entries."""
    if unit is not None:
        sizes = [jnp.sqrt(var)] + ([jnp.abs(mean)] if reduction.centered else [])
        peak = functools.reduce(jnp.maximum, sizes) * unit
        common = units.choose(peak, (0,), reduction.least)
        ratio = unit / common
        mean, rest = (v if v is None else times(v, ratio) for v in (mean, rest))
        unit, var = common[0], var * ratio * ratio
    if not reduction.centered:
        return unit, None, None, jnp.sum(share * var, 0)
    # About the mean of the largest part: where all are equal nothing is left, whatever the shares.
    largest = jnp.argmax(share, 0, keepdims=True)
    places = lax.broadcasted_iota(largest.dtype, share.shape, 0)
    pivot = jnp.sum(jnp.where(places == largest, mean, 0), 0)
    apart = (mean - pivot[None]) + rest
    above = jnp.sum(times(apart, share), 0)
    apart = apart - above[None]
    lost = jnp.sum(times(apart, share), 0)
    apart = apart - lost[None]
    center = settled(pivot + above)
    left = ((pivot - center) + above) + lost
    return unit, center, left, jnp.sum(share * (var + square(apart)), 0)
