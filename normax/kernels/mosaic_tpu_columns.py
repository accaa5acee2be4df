"""Moments over all but the last axis on TPU, in one read: what batch norm measures.

A block is measured in VMEM about its own mean, and again in a unit if its squares leave the range.
Blocks are merged in their order, by Chan's formula, with the mean and the squares kept to twice the
precision.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels import mosaic_tpu_sums as sm
from normax.kernels.mosaic_tpu_sums import Moments

WIDEST = 1024
CHUNK = 2**15  # entries that are worked on together


def supports_columns(x: Any) -> str | None:
    """Returns why the kernel over columns cannot take `x`, or None."""
    return bl.unsupported_dtype(x.dtype) or bl.unsupported_shape(x.shape)


def column_moments_in_units(
    x: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Measures every column over all rows, in multiples of a power of two for each.

    Args:
      x: array of any leading shape, bfloat16 or float32.
      interpret: run it in Pallas' interpreter; True or `pltpu.InterpretParams`.

    Returns:
      unit, mean, rest and var, float32 of shape `x.shape[-1:]`: the mean is (mean + rest) * unit,
      to twice the precision, and the variance var * unit^2. The unit is one up to entries of 2^50,
      so that an epsilon of 1e-24 or more can be added to var: where the unit is larger, var is too.

    Raises:
      ValueError: what `supports_columns` names.
    """
    reason = supports_columns(x)
    if reason:
        raise ValueError(reason)
    length = x.shape[-1]
    if 0 in x.shape:
        nothing = jnp.zeros(length, jnp.float32)
        return jnp.ones_like(nothing), nothing, nothing, nothing
    shape = bl.grouped(x.shape)
    width, walk = plan_columns(shape, x.dtype.itemsize)
    block = pl.BlockSpec((walk.groups, walk.block, width), lambda c, i, j: (i, j, c))
    line = pl.BlockSpec((1, width), lambda c, i, j: (0, c))
    unit, mean, rest, var = bl.call(
        functools.partial(_kernel, width, walk),
        [((1, length), jnp.float32)] * 4,
        x.reshape(shape),
        bl.counts_of(shape),
        grid=(pl.cdiv(length, width), *walk.grid(shape)),
        in_specs=[block, bl.IN_SMEM()],
        out_specs=[line] * 4,
        scratch_shapes=[pltpu.VMEM((1, width), jnp.float32)] * (2 * len(Moments._fields)),
        semantics=("parallel", "arbitrary", "arbitrary"),
        name="normax_column_moments",
        flops=12,
        interpret=interpret,
    )
    return unit.reshape(length), mean.reshape(length), rest.reshape(length), var.reshape(length)


def plan_columns(shape: tuple[Any, Any, int], itemsize: int) -> tuple[int, bl.Walk]:
    """Returns how many columns of groups of rows to take at a time, and how to walk them."""
    width = min(shape[-1], WIDEST)
    return width, bl.Walk.over(shape, width, 2 * itemsize, CHUNK)


def _kernel(width, walk, x_ref, counts_ref, *refs):
    size = len(Moments._fields)
    outputs, kept, here = refs[:4], Moments(*refs[4 : 4 + size]), Moments(*refs[4 + size :])
    i, j = pl.program_id(1), pl.program_id(2)
    begins = (i == 0) & (j == 0)
    present = walk.present(counts_ref, i, j)
    number = present[0] * present[1]
    before = i * walk.groups * counts_ref[1] + present[0] * j * walk.block
    _keep(here, _measure_block(width, walk, x_ref, present, False))

    # What has left the range is measured again, in a unit; so is what is no number.
    @pl.when(jnp.max(jnp.where(here.squares[...] < jnp.inf, 0.0, 1.0)) > 0)
    def _():
        _keep(here, _measure_block(width, walk, x_ref, present, True))

    @pl.when(begins)
    def _():
        _keep(kept, _read(here))

    @pl.when(~begins)
    def _():
        a, b = _read(kept), _read(here)
        counts = sm.as_float(before, a.mean), sm.as_float(number, b.mean)
        _keep(kept, sm.merge(a, counts[0], b, counts[1])[0])

    @pl.when((i == pl.num_programs(1) - 1) & (j == pl.num_programs(2) - 1))
    def _():
        sums = _read(kept)
        var = (sums.squares + sums.lost) / sm.as_float(counts_ref[0] * counts_ref[1], sums.mean)
        moments = bl.unit_of(sums.inverse), *sm.add_exactly(sums.mean, sums.rest), var
        _keep(outputs, moments)


def _read(refs):
    return Moments(*(ref[...] for ref in refs))


def _keep(refs, sums):
    for ref, value in zip(refs, sums, strict=True):
        ref[...] = value


def _measure_block(width, walk, x_ref, present, in_a_unit) -> Moments:
    """Measures a block about its mean, which is first taken about its first row.

    So equal entries leave exact zeros, and what the second pass finds left of the mean is too
    small for its square to cancel the sum of squares.
    """
    zero = jnp.zeros((bl.SUBLANES, width), jnp.float32)
    number = sm.as_float(present[0] * present[1], zero[:1])

    def over(step: Callable, start: Any) -> Any:
        def each(group, here, mask, carry):
            return step(x_ref[group, here, :].astype(jnp.float32), mask, carry)

        return walk.each(present, each, start)

    inverse = jnp.ones_like(number)
    if in_a_unit:
        peak = over(lambda x, there, m: jnp.maximum(m, _highest(there(jnp.abs(x)))), zero)
        inverse = bl.inverse_unit(jnp.max(peak, 0, keepdims=True))

    def scaled(x):
        return x * inverse if in_a_unit else x

    first = scaled(x_ref[0, :1, :].astype(jnp.float32))
    sums = over(lambda x, there, s: s + sm.fold(there(scaled(x) - first)), zero)
    center = first + jnp.sum(sums, 0, keepdims=True) / number

    def about_center(x, there, sums):
        d = there(scaled(x) - center)
        return sums[0] + sm.fold(d), sums[1] + sm.fold(d * d)

    left, squares = over(about_center, (zero, zero))
    rest = jnp.sum(left, 0, keepdims=True) / number
    squares = jnp.sum(squares, 0, keepdims=True) - rest * rest * number
    return Moments(
        inverse, center, rest, jnp.where(squares < 0, 0.0, squares), jnp.zeros_like(center)
    )


def _highest(v):
    """Returns the largest entries over rows in as many rows as a register has."""
    rows = v.shape[0]
    while rows > bl.SUBLANES:
        rows //= 2
        v = jnp.maximum(v[:rows], v[rows:])
    return v
