"""Norms of rows that are too long for the TPU's chip: measured chunk by chunk, then read again.

One kernel leaves a line of numbers for each row, a chunk's merged with those before it by Chan's
formula, for the derivative with the products of deviations too. Another reads the row again and
writes. So 3 arrays are moved where 2 would do, and 5 where 3 would.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels import mosaic_tpu_sums as sm
from normax.kernels.mosaic_tpu_rows import (
    Rows,
    bytes_of,
    parameters_of,
    rescale,
    root,
)

WIDEST = 8192  # entries of a row in a block
CHUNK = 2**16  # entries that are worked on together


class Cotangents(NamedTuple):
    """What is known of t = dy scale in some entries of each row."""

    mean: Any
    rest: Any  # what the mean lacks
    products: Any  # the sum of its deviations by those of x
    lost: Any  # what that lacks


class Measured(NamedTuple):
    """What is known of a whole row, in multiples of a unit."""

    inverse: Any  # one over the unit
    mean: Any
    rest: Any  # what the mean lacks
    var: Any
    rstd: Any
    t_mean: Any  # of t = dy scale
    t_rest: Any
    along: Any  # the mean of t xhat


def plan(shape: tuple[Any, ...], moved: int, centered: bool, epsilon: float) -> Rows:
    """Returns how to walk rows of which `moved` bytes an entry are in flight."""
    groups, count, length = shape
    width = bl.padded(pl.cdiv(length, pl.cdiv(length, WIDEST)))
    walk = bl.Walk.over((groups, count, length), width, moved, CHUNK)
    return Rows(centered, epsilon, length, width, walk)


def forward(
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: Any,
    with_statistics: bool,
    interpret: Any,
) -> list[jax.Array]:
    """Returns x + residual if there is one, y, and the statistics if wanted; of groups of rows."""
    made = []
    if residual is not None:
        x = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
        made = [x]
    numbers = _measure([x], [], centered, epsilon, interpret)
    rows = plan(x.shape, bytes_of(x.dtype, dtype), centered, epsilon)
    grid, at_rows, at_numbers, at_features = _specs(rows, x.shape, 2)
    parameters = parameters_of(scale, bias)
    y = bl.call(
        functools.partial(_write_kernel, rows, (scale is not None, bias is not None)),
        [(x.shape, dtype)],
        x,
        numbers,
        *parameters,
        grid=grid,
        in_specs=[at_rows, at_numbers, *[at_features] * len(parameters)],
        out_specs=[at_rows],
        semantics=("parallel", "parallel", "parallel"),
        name="normax_long_write",
        flops=5,
        interpret=interpret,
    )
    made += y
    if with_statistics:
        row = Measured(*(numbers[..., k] for k in range(len(Measured._fields))))
        unit = bl.unit_of(row.inverse)
        made += [(row.mean + row.rest) * unit] * centered + [row.var * unit * unit]
    return made


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    ds: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    interpret: Any,
) -> list[jax.Array]:
    """Returns dx, to which `ds` is added if there is one, dscale and dbias; of groups of rows."""
    groups, count, length = x.shape
    shape = groups, count, length
    arrays = [x, dy] if ds is None else [x, dy, ds]
    scales = parameters_of(scale)
    numbers = _measure([x, dy], scales, centered, epsilon, interpret)
    moved = bytes_of(*(array.dtype for array in arrays), x.dtype)
    rows = plan(shape, moved, centered, epsilon)
    # Chunks outside, so that the sums of one are complete before the next.
    grid, at_rows, at_numbers, at_features = _specs(rows, shape, 0)
    accumulator = pltpu.VMEM((bl.SUBLANES, rows.width), jnp.float32)
    return bl.call(
        functools.partial(_write_gradients_kernel, rows, (ds is not None, scale is not None)),
        [(shape, x.dtype), ((1, length), jnp.float32), ((1, length), jnp.float32)],
        *arrays,
        numbers,
        bl.counts_of(shape),
        *scales,
        grid=grid,
        in_specs=[at_rows] * len(arrays) + [at_numbers, bl.IN_SMEM()] + [at_features] * len(scales),
        out_specs=[at_rows, at_features, at_features],
        scratch_shapes=[accumulator] * 6,
        semantics=("parallel", "arbitrary", "arbitrary"),
        name="normax_long_write_gradients",
        flops=15,
        interpret=interpret,
    )


def _specs(rows, shape, place):
    """Returns the grid, chunks at a place of it, and blocks of rows, numbers and features."""
    walk = rows.walk
    grid = list(walk.grid(shape))
    grid.insert(place, pl.cdiv(rows.length, rows.width))

    def at(block, *dimensions):
        def index(*ids):
            i, j = ids[:place] + ids[place + 1 :]
            return tuple({"i": i, "j": j, "c": ids[place], "0": 0}[d] for d in dimensions)

        return pl.BlockSpec(block, index)

    return (
        tuple(grid),
        at((walk.groups, walk.block, rows.width), "i", "j", "c"),
        at((walk.groups, walk.block, bl.LANES), "i", "j", "0"),
        at((1, rows.width), "0", "c"),
    )


def _measure(arrays, scales, centered, epsilon, interpret):
    """Returns the numbers of each row, one to a lane, of x and maybe dy."""
    shape = arrays[0].shape
    rows = plan(shape, bytes_of(*(array.dtype for array in arrays)), centered, epsilon)
    grid, at_rows, at_numbers, at_features = _specs(rows, shape, 2)
    [numbers] = bl.call(
        functools.partial(_measure_kernel, rows, (len(arrays) > 1, len(scales) > 0)),
        [((*shape[:2], bl.LANES), jnp.float32)],
        *arrays,
        *scales,
        grid=grid,
        in_specs=[at_rows] * len(arrays) + [at_features] * len(scales),
        out_specs=[at_numbers],
        semantics=("parallel", "parallel", "arbitrary"),
        name="normax_long_measure",
        flops=15,
        interpret=interpret,
    )
    return numbers


def _each_chunk(walk, body):
    """Calls `body(group, rows)` for the chunks of rows of a block."""
    chunks = walk.block // walk.chunk

    def each(k, carry):
        group, i = (0, k) if walk.groups == 1 else (lax.div(k, chunks), lax.rem(k, chunks))
        body(group, pl.ds(pl.multiple_of(i * walk.chunk, walk.chunk), walk.chunk))
        return carry

    lax.fori_loop(0, walk.groups * chunks, each, 0)


def _read(line, kind):
    """Returns the numbers of rows, (rows, 1) each."""
    return kind(*(line[:, k : k + 1] for k in range(len(kind._fields))))


def _line(numbers, rows):
    """Returns the numbers of rows side by side in lanes."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, bl.LANES), 1)
    line = jnp.zeros((rows, bl.LANES), jnp.float32)
    for k, number in enumerate(numbers):
        line = jnp.where(lane == k, number, line)
    return line


def _measure_kernel(rows, present, x_ref, *refs):
    refs = list(refs)
    dy_ref, scale_ref = bl.taken(refs, *present)
    [numbers_ref] = refs
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    before = step * rows.width
    there = jnp.minimum(rows.length - before, rows.width)
    size = len(sm.Moments._fields)

    def mask(v):
        if rows.length % rows.width == 0:
            return v
        lane = lax.broadcasted_iota(jnp.int32, v.shape, 1)
        return jnp.where(lane < there, v, jnp.float32(0))

    def each(group, here):
        x = x_ref[group, here, :].astype(jnp.float32)
        moments, d = _measure_chunk(rows, x, mask, there)
        number, zero = sm.as_float(there, moments.mean), jnp.zeros_like(moments.mean)
        cotangents = Cotangents(zero, zero, zero, zero)
        if dy_ref is not None:
            t = mask(rescale(dy_ref[group, here, :].astype(jnp.float32), scale_ref, None))
            mean = zero
            if rows.centered:
                mean = sm.total(t) / number
                t = mask(t - mean)
            cotangents = Cotangents(mean, zero, sm.total(t * d), zero)

        @pl.when(step == 0)
        def _():
            numbers_ref[group, here, :] = _line([*moments, *cotangents], rows.walk.chunk)

        @pl.when(step > 0)
        def _():
            line = numbers_ref[group, here, :]
            kept = _read(line, sm.Moments), _read(line[:, size:], Cotangents)
            count = sm.as_float(before, number)
            merged = _merge(kept, count, (moments, cotangents), number)
            numbers_ref[group, here, :] = _line([*merged[0], *merged[1]], rows.walk.chunk)

        @pl.when(step == last)
        def _():
            line = numbers_ref[group, here, :]
            measured = _finish(rows, _read(line, sm.Moments), _read(line[:, size:], Cotangents))
            numbers_ref[group, here, :] = _line(measured, rows.walk.chunk)

    _each_chunk(rows.walk, each)


def _measure_chunk(rows, x, mask, there):
    """Returns the moments of a chunk of rows, about a mean first taken about its first entry.

    So equal entries leave exact zeros, and the others' deviations are centred a second time.
    """
    inverse = bl.inverse_unit(jnp.max(mask(jnp.abs(x)), 1, keepdims=True), _least(rows.epsilon))
    d = x * inverse
    zero = jnp.zeros_like(inverse)
    if not rows.centered:
        d = mask(d)
        return sm.Moments(inverse, zero, zero, sm.total(d * d), zero), d
    number = sm.as_float(there, inverse)
    first = d[:, :1]
    center = first + sm.total(mask(d - first)) / number
    d = mask(d - center)
    rest = sm.total(d) / number
    d = mask(d - rest)
    return sm.Moments(inverse, center, rest, sm.total(d * d), zero), d


def _least(epsilon):
    """Returns the power of two below which a unit would take epsilon over its square to infinity.

    In a unit of their own size neither the squares of entries nor their products with cotangents
    leave the range.
    """
    return 100 if epsilon == 0 else min(100, math.floor((120 - math.log2(epsilon)) / 2))


def _merge(a, count_a, b, count_b):
    """Returns moments and cotangents of two parts of rows together."""
    (x_a, t_a), (x_b, t_b) = a, b
    moments, x_apart = sm.merge(x_a, count_a, x_b, count_b)
    into_a, into_b = (moments.inverse * bl.unit_of(x.inverse) for x in (x_a, x_b))
    share = count_b / (count_a + count_b)
    t_apart, mean, rest = sm.merge_means(t_a, t_b, share)
    between = x_apart * (t_apart * (count_a * share))
    products, lost = sm.add_exactly(t_a.products * into_a, t_b.products * into_b + between)
    return moments, Cotangents(mean, rest, products, t_a.lost * into_a + lost)


def _finish(rows, moments, cotangents):
    part = sm.mean_factor(rows.length)
    var = (moments.squares + moments.lost) * part
    # Nothing deviates: epsilon alone rules, and in the unit it may have vanished.
    unit = jnp.where(var == 0, bl.unit_of(moments.inverse), jnp.float32(1))
    inverse = moments.inverse * unit
    rstd = root(rows, var, inverse)
    along = (cotangents.products + cotangents.lost) * part * rstd
    mean, rest = sm.add_exactly(moments.mean, moments.rest)
    means = mean * unit, rest * unit
    return Measured(inverse, *means, var, rstd, cotangents.mean, cotangents.rest, along)


def _standardized(rows, x, row):
    d = x * row.inverse
    d = (d - row.mean) - row.rest if rows.centered else d
    return d * row.rstd


def _write_kernel(rows, present, x_ref, numbers_ref, *refs):
    refs = list(refs)
    scale_ref, bias_ref = bl.taken(refs, *present)
    [y_ref] = refs

    def each(group, here):
        row = _read(numbers_ref[group, here, :], Measured)
        y = _standardized(rows, x_ref[group, here, :].astype(jnp.float32), row)
        y_ref[group, here, :] = rescale(y, scale_ref, bias_ref).astype(y_ref.dtype)

    _each_chunk(rows.walk, each)


def _write_gradients_kernel(rows, present, x_ref, dy_ref, *refs):
    refs = list(refs)
    ds_ref, numbers_ref, counts_ref, scale_ref = bl.taken(refs, present[0], True, True, present[1])
    dx_ref, dscale_ref, dbias_ref, *sums = refs
    i, j = pl.program_id(1), pl.program_id(2)
    begins = (i == 0) & (j == 0)
    ends = (i == pl.num_programs(1) - 1) & (j == pl.num_programs(2) - 1)

    def add(dscale, dbias):
        def each(group, here, mask, carry):
            x, dy = (ref[group, here, :].astype(jnp.float32) for ref in (x_ref, dy_ref))
            row = _read(numbers_ref[group, here, :], Measured)
            xhat = _standardized(rows, x, row)
            t = rescale(dy, scale_ref, None)
            t = (t - row.t_mean) - row.t_rest if rows.centered else t
            dx = (t - xhat * row.along) * row.rstd * row.inverse
            if ds_ref is not None:
                dx += ds_ref[group, here, :].astype(jnp.float32)
            dx_ref[group, here, :] = dx.astype(dx_ref.dtype)
            dscale.block[...] += sm.fold(mask(dy * xhat))
            dbias.block[...] += sm.fold(mask(dy))
            return carry

        rows.walk.each(rows.walk.present(counts_ref, i, j), each, 0)

    sm.over_blocks(sums, (dscale_ref, dbias_ref), begins, ends, add)
