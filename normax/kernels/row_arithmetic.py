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
    unit, per_unit, high = _unit(rule, x, total)
    d = x if per_unit is None else [piece * per_unit for piece in x]
    mean: Any = None
    extra: Any = None
    if rule.centered:
        pivot = high if per_unit is None else high * per_unit
        d = present(rule, [piece - pivot for piece in d])
        sums = total([("add", d)] + ([("add", others)] if others is not None else []))
        mean, extra = sums[0] / rule.length, sums[-1]
        d = present(rule, [piece - mean for piece in d])
        mean = mean + pivot
    return d, mean, extra, unit, per_unit


def forward(rule: Rule, x: Pieces, scale: Pieces | None, bias: Pieces | None, total: Total):
    """Returns the pieces of y, and the row's mean and variance."""
    d, mean, _, unit, per_unit = deviations(rule, x, total)
    [squares] = total([("add", [piece * piece for piece in d])])
    var = squares / rule.length
    rstd = reciprocal_deviation(rule, var, per_unit)
    y = _rescaled([piece * rstd for piece in d], scale, bias)
    if unit is not None:
        mean, var = None if mean is None else mean * unit, var * unit * unit
    return y, mean, var


def backward(rule: Rule, x: Pieces, scale: Pieces | None, dy: Pieces, total: Total):
    """Returns the pieces of dx, and of the row's share of dscale."""
    t = dy
    if scale is not None:
        t = [piece * gain for piece, gain in zip(dy, scale, strict=True)]
    d, _, sum_t, _, per_unit = deviations(rule, x, total, t)
    if rule.centered:
        mean_t = sum_t / rule.length
        t = [piece - mean_t for piece in t]
    products = [a * b for a, b in zip(d, t, strict=True)]
    squares, along = total([("add", [piece * piece for piece in d]), ("add", products)])
    rstd = reciprocal_deviation(rule, squares / rule.length, per_unit)
    along = along / rule.length * rstd
    xhat = [piece * rstd for piece in d]
    length = rstd if per_unit is None else rstd * per_unit
    dx = [(a - b * along) * length for a, b in zip(t, xhat, strict=True)]
    return dx, [a * b for a, b in zip(dy, xhat, strict=True)]


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
    dy = [deferred.each(pull, a, b) for a, b in zip(_rescaled(xhat, scale, bias), dy, strict=True)]
    t = dy
    if scale is not None:
        t = [piece * gain for piece, gain in zip(dy, scale, strict=True)]
    # xhat adds up to zero but for rounding, so that the mean of t need not be subtracted first.
    products = [a * b for a, b in zip(xhat, t, strict=True)]
    along, *sum_t = total([("add", products)] + [("add", t)] * rule.centered)
    if rule.centered:
        mean_t = sum_t[0] / rule.length
        t = [piece - mean_t for piece in t]
    along = along / rule.length
    length = rstd if per_unit is None else rstd * per_unit
    dx = [(a - b * along) * length for a, b in zip(t, xhat, strict=True)]
    return dx, [a * b for a, b in zip(dy, xhat, strict=True)], dy


def _rescaled(xhat, scale, bias):
    y = xhat
    if scale is not None:
        y = [piece * gain for piece, gain in zip(y, scale, strict=True)]
    if bias is not None:
        y = [piece + shift for piece, shift in zip(y, bias, strict=True)]
    return y


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


def _unit(rule: Rule, x: Pieces, total: Total) -> Any:
    """Returns the unit, its reciprocal and the largest entry; None for what is not needed.

    The unit follows the range of a row that is to be centred: a constant row is its own mean
    whatever its size, and its derivative is that of a division by the root of epsilon.
    """
    if not rule.units and not rule.centered:
        return None, None, None
    low, high = _lowest(rule, x), _highest(rule, x)
    if not rule.units:
        return None, None, total([("max", high)])[0]
    if rule.centered:
        # Quarters, because the range of the largest entries is out of range.
        high, fallen = total([("max", high), ("max", [-piece for piece in low])])
        size = high * 0.25 + fallen * 0.25
    else:
        high, size = None, total([("max", [abs(piece) for piece in x])])[0]
    steps = LARGE if rule.epsilon >= LEAST_EPSILON else LARGE + SMALL
    return _chosen(size, steps, 1), _chosen(size, steps, -1), high


def _chosen(size, steps, sign):
    """Returns 2 to the exponent that `steps` gives for `size`, times a sign; 1 where none does."""
    unit = jnp.ones_like(size)
    for below, limit, exponent in steps:
        there = (size < 2.0**limit) & (size > 0) if below else size >= 2.0**limit
        unit = jnp.where(there, jnp.full_like(size, 2.0 ** (sign * exponent)), unit)
    return unit


def _highest(rule, x):
    return _filled(rule, x, -jnp.inf)


def _lowest(rule, x):
    return _filled(rule, x, jnp.inf)


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
