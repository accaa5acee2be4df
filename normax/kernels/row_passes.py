"""The arithmetic of `row_arithmetic`, for a row that is read as often as it takes, block by block.

`sweep` reads a row once: of each block it is given the pieces to add (or to take the largest of),
and returns what each thread found. `total` does the same over threads, as elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from normax.kernels import row_arithmetic as arithmetic
from normax.kernels.row_arithmetic import Pieces, Rule, Total


class Block(NamedTuple):
    """A part of a row. Inputs and parameters are read where they are asked for.

    `valid` tells for each piece what no other block has, None for all of it.
    """

    input: Callable[[int], Pieces]
    parameter: Callable[[int], Pieces]
    valid: Sequence[Any]


Sweep = Callable[[Sequence[str], Callable[[Block], Sequence[Pieces]]], list[jax.Array]]
Read = Callable[[Block], Pieces]


class Measured(NamedTuple):
    """What is known of a row: `mean` is above `pivot`, and both, `var` and `rstd` are in units."""

    unit: Any
    per_unit: Any
    pivot: Any
    mean: Any
    var: Any
    rstd: Any
    mean_t: Any = None
    along: Any = None

    @property
    def statistics(self) -> tuple[Any, Any]:
        """Mean, or None, and variance."""
        mean = None if self.mean is None else self.mean + self.pivot
        if self.unit is None:
            return mean, self.var
        return None if mean is None else mean * self.unit, self.var * self.unit * self.unit


def measure(rule: Rule, x: Read, sweep: Sweep, total: Total, t: Read | None = None) -> Measured:
    """Measures a row in up to three sweeps; `t` is the cotangent of xhat, going backward."""

    def own(block, read):
        return arithmetic.present(rule._replace(valid=block.valid), read(block))

    def extremes(block):
        wanted = arithmetic.extremes(rule._replace(valid=block.valid), own(block, x))
        return [pieces for _, pieces in wanted]

    def totals(op, count, each):
        return total([(op, [value]) for value in sweep([op] * count, each)]) if count else []

    count = rule.units + rule.centered if rule.centered else int(rule.units)
    unit, per_unit, high = arithmetic.unit_of(rule, totals("max", count, extremes))
    found = Measured(unit, per_unit, None, None, None, None)
    if rule.centered:
        pivot = arithmetic.pivot_of(high, per_unit)

        def first(block):
            d = [piece - pivot for piece in arithmetic.in_units(x(block), per_unit)]
            return [own(block, lambda _: d)] + ([own(block, t)] if t else [])

        sums = totals("add", 2 if t else 1, first)
        found = found._replace(pivot=pivot, mean=sums[0] / rule.length)
        found = found._replace(mean_t=sums[1] / rule.length if t else None)

    def second(block):
        d = own(block, lambda block: deviations(found, x(block)))
        squares = [piece * piece for piece in d]
        if t is None:
            return [squares]
        return [squares, [a * b for a, b in zip(d, centred(found, t(block)), strict=True)]]

    sums = totals("add", 2 if t else 1, second)
    var = sums[0] / rule.length
    rstd = arithmetic.reciprocal_deviation(rule, var, per_unit)
    along = sums[1] / rule.length * rstd if t else None
    return found._replace(var=var, rstd=rstd, along=along)


def deviations(found: Measured, x: Pieces) -> Pieces:
    """Returns the deviations of pieces of a row, in its unit."""
    d = arithmetic.in_units(x, found.per_unit)
    if found.mean is not None:
        d = [(piece - found.pivot) - found.mean for piece in d]
    return d


def centred(found: Measured, t: Pieces) -> Pieces:
    """Returns the cotangent of xhat less its mean, if that was subtracted."""
    return t if found.mean_t is None else [piece - found.mean_t for piece in t]
