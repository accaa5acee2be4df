"""Sums on the TPU in a fixed order: of rows, of columns over blocks, and moments merged by Chan.

What is added up block by block is kept to twice the precision.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from normax.kernels import mosaic_tpu_blocks as bl


def total(v: jax.Array) -> jax.Array:
    """Returns the sums of rows, (rows, 1): by halves, so that the error grows with a logarithm."""
    length, start = v.shape[1], 0
    parts = None
    while length - start >= bl.LANES:
        size = bl.LANES * bl.power_below((length - start) // bl.LANES)
        part = v[:, start : start + size]
        start += size
        while size > bl.LANES:
            size //= 2
            part = part[:, :size] + part[:, size:]
        parts = part if parts is None else parts + part
    sums = None if parts is None else jnp.sum(parts, 1, keepdims=True)
    if start == length:
        assert sums is not None
        return sums
    tail = jnp.sum(v[:, start:], 1, keepdims=True)
    return tail if sums is None else sums + tail


def fold(v: jax.Array) -> jax.Array:
    """Returns sums over rows in as many rows as a register has, by halves."""
    rows = v.shape[0]
    while rows > bl.SUBLANES:
        rows //= 2
        v = v[:rows] + v[rows:]
    return v


def fold_lanes(v: jax.Array) -> jax.Array:
    """Returns sums over columns in as many columns as a register has, by halves."""
    lanes = v.shape[1]
    while lanes > bl.LANES:
        lanes //= 2
        v = v[:, :lanes] + v[:, lanes:]
    return v


def add_exactly(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a + b and what its rounding lost: Knuth's two-sum."""
    s = a + b
    there = s - a
    return s, (a - (s - there)) + (b - there)


def mean_factor(count: int) -> np.float32:
    """Returns what to multiply a sum by for the mean."""
    return np.float32(1 / count)


class Sum(NamedTuple):
    """A sum over rows, in as many as a register has; over blocks to twice the precision."""

    block: Any
    high: Any
    low: Any

    def close_block(self):
        """Adds the block's sum to the others, and begins the next."""
        self.high[...], lost = add_exactly(self.high[...], self.block[...])
        self.low[...] += lost
        self.block[...] = jnp.zeros_like(self.block)

    def total(self):
        """Returns the sum of the blocks over their rows."""
        high, low, size = self.high[...], self.low[...], bl.SUBLANES
        while size > 1:
            size //= 2
            high, lost = add_exactly(high[:size], high[size:])
            low = low[:size] + low[size:] + lost
        return high + low

    def total_of_lanes(self):
        """Returns the sum of the blocks over their columns."""
        return jnp.sum(self.high[...], 1, keepdims=True) + jnp.sum(self.low[...], 1, keepdims=True)


def over_blocks(
    refs: Sequence[Any],
    outputs: Sequence[Any],
    begins: Any,
    ends: Any,
    add: Callable,
    total: Callable = Sum.total,
) -> None:
    """Writes sums over blocks to the outputs; `add` adds what a block has to each of them.

    Args:
      refs: the memory for them, three of the shape of a block's sum for each.
      outputs: where the last block puts them.
      begins: whether this is the first block.
      ends: whether it is the last.
      add: takes a `Sum` for each.
      total: of each, over its rows.
    """
    sums = [Sum(*refs[k : k + 3]) for k in range(0, len(refs), 3)]

    @pl.when(begins)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)

    add(*sums)
    for each in sums:
        each.close_block()

    @pl.when(ends)
    def _():
        for output, each in zip(outputs, sums, strict=True):
            output[...] = total(each)


class Moments(NamedTuple):
    """What is known of some entries of each group, in multiples of a unit."""

    inverse: Any  # one over the unit
    mean: Any
    rest: Any  # what the mean lacks
    squares: Any  # the sum of squared deviations
    lost: Any  # what that lacks


def merge(
    a: Moments, count_a: jax.Array, b: Moments, count_b: jax.Array
) -> tuple[Moments, jax.Array]:
    """Returns the moments of two sets of entries together, and how far their means are apart.

    Chan, Golub and LeVeque, 1979.
    """
    inverse = jnp.minimum(a.inverse, b.inverse)
    a, b = _in_unit(a, inverse), _in_unit(b, inverse)
    share = count_b / (count_a + count_b)
    apart, mean, rest = merge_means(a, b, share)
    squares, lost = add_exactly(a.squares, b.squares + apart * apart * (count_a * share))
    return Moments(inverse, mean, rest, squares, a.lost + lost), apart


def merge_means(a: Any, b: Any, share: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns how far means are apart, and the mean and rest of both, `share` being that of b."""
    apart, lost = add_exactly(b.mean, -a.mean)
    apart += lost + (b.rest - a.rest)
    mean, lost = add_exactly(a.mean, apart * share)
    return apart, mean, a.rest + lost


def _in_unit(moments: Moments, inverse: jax.Array) -> Moments:
    """Returns moments in multiples of a larger unit."""
    ratio = inverse * bl.unit_of(moments.inverse)
    squared = ratio * ratio
    return Moments(
        inverse,
        moments.mean * ratio,
        moments.rest * ratio,
        moments.squares * squared,
        moments.lost * squared,
    )


def as_float(number: Any, like: jax.Array) -> jax.Array:
    """Returns an integer of the kernel as floats."""
    return jnp.full(like.shape, number, jnp.int32).astype(jnp.float32)
