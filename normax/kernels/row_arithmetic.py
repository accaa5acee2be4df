"""What a kernel does with a row that lies on chip: the arithmetic, apart from how it got there.

A row is a list of pieces, arrays of one shape, because registers hold it so. `total` adds (or takes
the largest of) all entries of a row, over pieces, lanes, warps and warpgroups; what it returns
broadcasts against a piece. Entries past the end of the row read as zero and are told by `valid`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normax.kernels import deferred, entrywise

Pieces = list[jax.Array]
Total = Callable[[Sequence[tuple[str, Pieces]]], list[jax.Array]]

LEAST_EPSILON = 1e-24
# Where a row is this large, or small, in powers of two, and its unit there: few, for selects are
# cheap and all that is asked is that squares, and what is 2^-24 of the largest, stay in range.
LARGE = ((False, 50, 26), (False, 76, 52), (False, 102, 78))
SMALL = ((True, -26, -52), (True, -78, -100))


class Rule(NamedTuple):
    """What a row is standardized by.

    `units` tells whether squares could leave the range of float32. `valid` has an entry for each
    piece: where it is row, or None for all of it.
    """

    length: int
    centered: bool
    epsilon: float
    units: bool
    valid: Sequence[Any] = ()


def deviations(rule: Rule, x: Pieces, total: Total, others: Pieces | None = None) -> Any:
    """Returns deviations, mean, sum of `others` if given, unit and its reciprocal; in that unit.

    The largest entry is subtracted first. That leaves exact zeros of a constant row, and of any
    other an error below a unit in the last place of its largest deviation.
    """
    wanted = extremes(rule, x)
    unit, per_unit, high = unit_of(rule, total(wanted) if wanted else [])
    d = in_units(x, per_unit)
    mean: Any = None
    extra: Any = None
    if rule.centered:
        pivot = pivot_of(high, per_unit)
        d = present(rule, [piece - pivot for piece in d])
        sums = total([("add", d)] + ([("add", others)] if others is not None else []))
        mean, extra = sums[0] / rule.length, sums[-1]
        d = present(rule, [piece - mean for piece in d])
        mean = mean + pivot
    return d, mean, extra, unit, per_unit


def in_units(x: Pieces, per_unit: Any) -> Pieces:
    """Returns x over its unit."""
    return x if per_unit is None else [piece * per_unit for piece in x]


def pivot_of(high, per_unit):
    """Returns the largest entry, over the unit."""
    return high if per_unit is None else high * per_unit


def forward(rule: Rule, x: Pieces, scale: Pieces | None, bias: Pieces | None, total: Total):
    """Returns the pieces of y, and the row's mean and variance."""
    d, mean, _, unit, per_unit = deviations(rule, x, total)
    [squares] = total([("add", [piece * piece for piece in d])])
    var = squares / rule.length
    y = rescaled(d, reciprocal_deviation(rule, var, per_unit), scale, bias)
    if unit is not None:
        mean, var = None if mean is None else mean * unit, var * unit * unit
    return y, mean, var


def rescaled(d: Pieces, rstd, scale: Pieces | None, bias: Pieces | None) -> Pieces:
    """Returns y of deviations."""
    return _affine([piece * rstd for piece in d], scale, bias)


def _affine(xhat: Pieces, scale: Pieces | None, bias: Pieces | None) -> Pieces:
    y = scaled(xhat, scale)
    return y if bias is None else [piece + shift for piece, shift in zip(y, bias, strict=True)]


def backward(rule: Rule, x: Pieces, scale: Pieces | None, dy: Pieces, total: Total):
    """Returns the pieces of dx, and of the row's share of dscale."""
    t = scaled(dy, scale)
    d, _, sum_t, _, per_unit = deviations(rule, x, total, t)
    if rule.centered:
        mean_t = sum_t / rule.length
        t = [piece - mean_t for piece in t]
    products = [a * b for a, b in zip(d, t, strict=True)]
    squares, along = total([("add", [piece * piece for piece in d]), ("add", products)])
    rstd = reciprocal_deviation(rule, squares / rule.length, per_unit)
    dx, xhat = derivative(d, t, rstd, along / rule.length * rstd, per_unit)
    return dx, [a * b for a, b in zip(dy, xhat, strict=True)]


def scaled(pieces: Pieces, scale: Pieces | None) -> Pieces:
    """Returns the pieces times a scale; so xhat, and the cotangent of xhat out of that of y."""
    if scale is None:
        return pieces
    return [piece * gain for piece, gain in zip(pieces, scale, strict=True)]


def derivative(d: Pieces, t: Pieces, rstd, along, per_unit) -> tuple[Pieces, Pieces]:
    """Returns dx and xhat, `t` being centred and `along` the mean of t xhat."""
    xhat = [piece * rstd for piece in d]
    length = rstd if per_unit is None else rstd * per_unit
    return [(a - b * along) * length for a, b in zip(t, xhat, strict=True)], xhat


def backward_through(
    rule: Rule,
    x: Pieces,
    scale: Pieces | None,
    bias: Pieces | None,
    dy: Pieces,
    total: Total,
    activation: Callable[[jax.Array], jax.Array],
):
    """Returns the pieces of dx, and of the row's shares of dscale and dbias.

    `dy` is the cotangent of the activation of y; that of y takes y, so the sums that it is in come
    after the statistics.
    """
    d, _, _, _, per_unit = deviations(rule, x, total)
    [squares] = total([("add", [piece * piece for piece in d])])
    rstd = reciprocal_deviation(rule, squares / rule.length, per_unit)
    xhat = [piece * rstd for piece in d]
    pull = functools.partial(entrywise.pull, activation)
    dy = [deferred.each(pull, a, b) for a, b in zip(_affine(xhat, scale, bias), dy, strict=True)]
    t = scaled(dy, scale)
    # xhat adds up to zero but for rounding, so that the mean of t need not be subtracted first.
    products = [a * b for a, b in zip(xhat, t, strict=True)]
    along, *sum_t = total([("add", products)] + [("add", t)] * rule.centered)
    if rule.centered:
        mean_t = sum_t[0] / rule.length
        t = [piece - mean_t for piece in t]
    dx, xhat = derivative(d, t, rstd, along / rule.length, per_unit)
    return dx, [a * b for a, b in zip(dy, xhat, strict=True)], dy


def present(rule: Rule, pieces: Pieces) -> Pieces:
    """Returns the pieces with zeros past the end of the row."""
    return [
        piece if valid is None else jnp.where(valid, piece, jnp.zeros_like(piece))
        for piece, valid in zip(pieces, rule.valid, strict=True)
    ]


def reciprocal_deviation(rule: Rule, var, per_unit):
    """Returns 1 / sqrt(var + epsilon), epsilon in the unit of var; 0 where that sum is 0."""
    if rule.epsilon >= LEAST_EPSILON or per_unit is None:
        # A row in a unit above one varies so much that epsilon is nothing to it.
        squared = var + rule.epsilon
    else:
        squared = var + rule.epsilon * per_unit * per_unit
    return jnp.where(squared == 0, jnp.zeros_like(squared), lax.rsqrt(squared))


def extremes(rule: Rule, x: Pieces) -> list[tuple[str, Pieces]]:
    """Returns what `total` is asked for before `unit_of` can tell the unit of a row."""
    if not rule.centered:
        return [("max", [abs(piece) for piece in x])] if rule.units else []
    high = _filled(rule, x, -jnp.inf)
    if not rule.units:
        return [("max", high)]
    return [("max", high), ("max", [-piece for piece in _filled(rule, x, jnp.inf)])]


def unit_of(rule: Rule, found: Sequence[jax.Array]) -> Any:
    """Returns the unit, its reciprocal and the largest entry; None for what is not needed.

    The unit follows the range of a row that is to be centred: a constant row is its own mean
    whatever its size, and its derivative is that of a division by the root of epsilon.
    """
    high = found[0] if rule.centered else None
    if not rule.units:
        return None, None, high
    # Quarters, because the range of the largest entries is out of range.
    size = found[0] * 0.25 + found[1] * 0.25 if rule.centered else found[0]
    steps = LARGE if rule.epsilon >= LEAST_EPSILON else LARGE + SMALL
    return _chosen(size, steps, 1), _chosen(size, steps, -1), high


def _chosen(size, steps, sign):
    """Returns 2 to the exponent that `steps` gives for `size`, times a sign; 1 where none does."""
    unit = jnp.ones_like(size)
    for below, limit, exponent in steps:
        there = (size < 2.0**limit) & (size > 0) if below else size >= 2.0**limit
        unit = jnp.where(there, jnp.full_like(size, 2.0 ** (sign * exponent)), unit)
    return unit


def _filled(rule, x, value):
    return [
        piece if valid is None else jnp.where(valid, piece, jnp.full_like(piece, value))
        for piece, valid in zip(x, rule.valid, strict=True)
    ]


def combine(op: str, values: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum or the largest of a few arrays, by halves."""
    function = {"add": jnp.add, "max": jnp.maximum}[op]
    values = list(values)
    while len(values) > 1:
        pairs = [function(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
