"""Norms of rows that stay on the TPU's chip: every array is read or written once.

A block of rows is fetched to VMEM while the one before is worked on, chunk by chunk, each so small
that what is between its passes stays near the registers. Rows are independent, so a last block that
hangs over the end needs a mask only where rows are summed.

Rows shorter than a line of lanes would leave some of each empty, in memory too. XLA lays such
arrays out with a longer axis along the lanes, and so they are taken: the rows lie across, each in a
lane of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels import mosaic_tpu_sums as sm

# What v5e's compiler finds room for: rows in flight, and for gradients their sums.
LONGEST = 65536
LONGEST_OF_SUM = 49152
LONGEST_WITH_GRADIENT = 24576
CHUNK = 2**16  # entries that are worked on together
# From here up epsilon hides whatever is too small to be squared.
HIDES_SMALL = 1e-24


class Rows(NamedTuple):
    """How rows are normalized, known when it is traced."""

    centered: bool
    epsilon: float
    length: int
    width: int  # entries of a row in a block
    walk: bl.Walk

    @property
    def across(self) -> bool:
        """Whether the entries of a row lie below each other, the rows side by side."""
        return self.walk.across

    def at(self, group: Any, here: Any) -> tuple[Any, Any, Any]:
        """Returns where rows of a group are in a block."""
        return (group, slice(None), here) if self.across else (group, here, slice(None))

    def total(self, v: jax.Array) -> jax.Array:
        """Returns the sum of each row."""
        return jnp.sum(v, 0, keepdims=True) if self.across else sm.total(v)

    def highest(self, v: jax.Array) -> jax.Array:
        """Returns the largest entry of each row."""
        return jnp.max(v, 0 if self.across else 1, keepdims=True)

    def fold(self, v: jax.Array) -> jax.Array:
        """Returns the sums over rows in as many rows as a register has."""
        return sm.fold_lanes(v) if self.across else sm.fold(v)


def lanes_of(shape: tuple[Any, ...]) -> int | None:
    """Returns which axis lies along the lanes where rows lie across: that which fills them best."""
    *leading, length = shape
    if not all(bl.is_static(size) for size in shape) or length >= bl.LANES:
        return None
    empty = {i: bl.padded(size) / size for i, size in enumerate(leading) if size >= bl.LANES}
    return min(empty, key=lambda i: (empty[i], -i), default=None)


def turned(x: jax.Array, axis: int) -> jax.Array:
    """Returns an array as groups of rows that lie across, an axis along the lanes."""
    return jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[-1], x.shape[axis])


def turned_back(v: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Returns what `turned` made, or a number for each of its rows, as it was in a shape."""
    *others, length = shape
    size = others.pop(axis)
    v = v.reshape((*others, length, size) if v.ndim == 3 else (*others, size))
    return jnp.moveaxis(v, -1, axis)


def fits(length: int, *, gradient: bool, residual: bool) -> bool:
    """Returns whether rows of a length stay on chip."""
    if gradient:
        return length <= LONGEST_WITH_GRADIENT
    return length <= (LONGEST_OF_SUM if residual else LONGEST)


def plan(shape: tuple[Any, Any, int], moved: int) -> bl.Walk:
    """Returns how to walk groups of rows of which `moved` bytes an entry are in flight."""
    return bl.Walk.over(shape, shape[-1], moved, CHUNK)


def plan_backward(shape: tuple[Any, Any, int], moved: int) -> bl.Walk:
    """Returns as `plan`; beside their sums the longest rows find half the room."""
    return plan(shape, moved * (2 if shape[-1] > LONGEST // 4 else 1))


def bytes_of(*dtypes: Any) -> int:
    """Returns the bytes of an entry of each of arrays."""
    return sum(jnp.dtype(dtype).itemsize for dtype in dtypes)


def parameters_of(*values: jax.Array | None, across: bool = False) -> list[jax.Array]:
    """Returns those parameters that are there, as rows of a dtype that Mosaic reads."""
    shape = (-1, 1) if across else (1, -1)
    rows = [value.reshape(shape) for value in values if value is not None]
    return [row.astype(jnp.float32) if bl.unsupported_dtype(row.dtype) else row for row in rows]


def _specs(rows):
    walk, width = rows.walk, rows.width
    if rows.across:
        return (
            pl.BlockSpec((walk.groups, width, walk.block), lambda i, j: (i, 0, j)),
            pl.BlockSpec((width, 1), lambda i, j: (0, 0)),
        )
    return (
        pl.BlockSpec((walk.groups, walk.block, width), lambda i, j: (i, j, 0)),
        pl.BlockSpec((1, width), lambda i, j: (0, 0)),
    )


def _sizes(x, across):
    """Returns how many groups of how many rows of what length there are."""
    groups, count, length = x.shape
    return (groups, length, count) if across else (groups, count, length)


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
    across: bool = False,
) -> list[jax.Array]:
    """Returns x + residual if there is one, y, and the statistics if wanted; of groups of rows."""
    shape = groups, count, length = _sizes(x, across)
    arrays = [x] if residual is None else [x, residual]
    outputs = [(x.shape, x.dtype)] * (len(arrays) - 1) + [(x.shape, dtype)]
    moved = bytes_of(*(array.dtype for array in arrays), *(kind for _, kind in outputs))
    walk = plan(shape, moved)._replace(across=across)
    rows = Rows(centered, epsilon, length, length, walk)
    parameters = parameters_of(scale, bias, across=across)
    at_rows, at_features = _specs(rows)
    out_specs = [at_rows] * len(outputs)
    number = (2 if centered else 1) * with_statistics
    if across:
        outputs += [((groups, 1, count), jnp.float32)] * number
        out_specs += [pl.BlockSpec((walk.groups, 1, walk.block), lambda i, j: (i, 0, j))] * number
    elif with_statistics:
        # A number for each row, a hundred and twenty-eight to a line of the output.
        held, shared = max(1, walk.block // bl.LANES), max(1, bl.LANES // walk.block)
        lines = pl.BlockSpec(
            (walk.groups, held, 1, bl.LANES), lambda i, j: (i, lax.div(j, shared), 0, 0)
        )
        outputs += [((groups, pl.cdiv(count, bl.LANES), 1, bl.LANES), jnp.float32)] * number
        out_specs += [lines] * number
    present = residual is not None, scale is not None, bias is not None
    made = bl.call(
        functools.partial(_forward_kernel, rows, present),
        outputs,
        *arrays,
        *parameters,
        grid=walk.grid(shape),
        in_specs=[at_rows] * len(arrays) + [at_features] * len(parameters),
        out_specs=out_specs,
        semantics=("parallel", "arbitrary" if with_statistics else "parallel"),
        name="normax_rows_forward" if residual is None else "normax_rows_add_forward",
        flops=15,
        interpret=interpret,
    )
    size = len(arrays)
    return [*made[:size], *(v.reshape(groups, -1)[:, :count] for v in made[size:])]


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    ds: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    interpret: Any,
    across: bool = False,
) -> list[jax.Array]:
    """Returns dx, to which `ds` is added if there is one, dscale and dbias; of groups of rows."""
    shape = _sizes(x, across)
    length = shape[-1]
    arrays = [x, dy] if ds is None else [x, dy, ds]
    walk = plan_backward(shape, bytes_of(*(array.dtype for array in arrays), x.dtype))
    rows = Rows(centered, epsilon, length, length, walk._replace(across=across))
    scales = parameters_of(scale, across=across)
    at_rows, at_features = _specs(rows)
    line = (length, 1) if across else (1, length)
    held = (length, bl.LANES) if across else (bl.SUBLANES, length)
    accumulator = pltpu.VMEM(held, jnp.float32)
    return bl.call(
        functools.partial(_backward_kernel, rows, (ds is not None, scale is not None)),
        [(x.shape, x.dtype), (line, jnp.float32), (line, jnp.float32)],
        *arrays,
        bl.counts_of(shape),
        *scales,
        grid=walk.grid(shape),
        in_specs=[at_rows] * len(arrays) + [bl.IN_SMEM()] + [at_features] * len(scales),
        out_specs=[at_rows, at_features, at_features],
        scratch_shapes=[accumulator] * 6,
        semantics=("arbitrary", "arbitrary"),
        name="normax_rows_backward" if ds is None else "normax_rows_add_backward",
        flops=25,
        interpret=interpret,
    )


class Standardized(NamedTuple):
    """Rows of deviations in a unit, and numbers of each row."""

    d: Any
    rstd: Any  # per unit
    inverse: Any  # one over the unit
    mean: Any
    var: Any


def standardize(rows: Rows, x: jax.Array) -> Standardized:
    """Measures rows, float32.

    Less its largest entry a row of equal entries is exactly zero, and others are off by less than
    an ulp of the largest deviation.
    """
    small_too = rows.epsilon < HIDES_SMALL
    part = sm.mean_factor(rows.length)
    inverse = bl.inverse_unit(rows.highest(jnp.abs(x)), 100 if small_too else None)
    unit = bl.unit_of(inverse)
    d, mean = x * inverse, None
    if rows.centered:
        top = rows.highest(d)
        d = d - top
        center = rows.total(d) * part
        d = d - center
        mean = (top + center) * unit
    var = rows.total(d * d) * part
    # Nothing deviates: epsilon alone rules, and in the unit it may have vanished.
    inverse = jnp.where(var == 0, jnp.float32(1), inverse)
    rstd = root(rows, var, inverse if small_too else None)
    return Standardized(d, rstd, inverse, mean, var * unit * unit)


def root(rows: Rows, var: jax.Array, inverse: jax.Array | None) -> jax.Array:
    """Returns 1 / sqrt(var + epsilon) for a variance in a unit, which may be one."""
    epsilon = jnp.float32(rows.epsilon)
    squared = var + (epsilon if inverse is None else epsilon * inverse * inverse)
    rstd = lax.rsqrt(squared)
    return rstd if inverse is None else jnp.where(squared <= 0, jnp.float32(0), rstd)


def rescale(y: jax.Array, scale_ref: Any, bias_ref: Any) -> jax.Array:
    """Returns y by the scale and bias that are there."""
    y = y if scale_ref is None else y * scale_ref[...].astype(jnp.float32)
    return y if bias_ref is None else y + bias_ref[...].astype(jnp.float32)


def _forward_kernel(rows, present, x_ref, *refs):
    refs = list(refs)
    residual_ref, scale_ref, bias_ref, s_ref = bl.taken(refs, *present, present[0])
    y_ref, *statistics = refs
    walk = rows.walk
    first = pl.program_id(1) * walk.block
    chunks = walk.block // walk.chunk

    def each(k, carry):
        group, i = (0, k) if walk.groups == 1 else (lax.div(k, chunks), lax.rem(k, chunks))
        here = pl.ds(pl.multiple_of(i * walk.chunk, walk.chunk), walk.chunk)
        at = rows.at(group, here)
        x = x_ref[at].astype(jnp.float32)
        if s_ref is not None:
            s = x + residual_ref[at].astype(jnp.float32)
            s_ref[at] = s.astype(s_ref.dtype)
            # As it was stored: what is normalized is what the backward pass will read.
            x = s_ref[at].astype(jnp.float32)
        done = standardize(rows, x)
        y_ref[at] = rescale(done.d * done.rstd, scale_ref, bias_ref).astype(y_ref.dtype)
        measured = [done.mean, done.var] if rows.centered else [done.var]
        for ref, column in zip(statistics, measured, strict=False):
            if rows.across:
                ref[at] = column
                continue
            _lay_down(walk, first, i, ref.at[group], column)
        return carry

    lax.fori_loop(0, walk.groups * chunks, each, 0)


def _lay_down(walk, first, i, ref, column):
    """Writes a number for each row of chunk i along the lanes."""
    first += i * walk.chunk
    size = min(walk.chunk, bl.LANES)
    lane = lax.broadcasted_iota(jnp.int32, (size, bl.LANES), 1)
    ahead = first & (bl.LANES - 1)
    row = lax.broadcasted_iota(jnp.int32, (size, bl.LANES), 0) + ahead
    for start in range(0, walk.chunk, size):
        spread = jnp.where(row == lane, column[start : start + size], jnp.float32(0))
        line = jnp.sum(spread, 0, keepdims=True)
        slot = lax.div(i * walk.chunk + start, bl.LANES) if walk.block > bl.LANES else 0
        if size < bl.LANES:
            before = jnp.where(ahead == 0, jnp.float32(0), ref[slot])
            line = line + before
        ref[slot] = line


def _backward_kernel(rows, present, x_ref, dy_ref, *refs):
    refs = list(refs)
    ds_ref, counts_ref, scale_ref = bl.taken(refs, present[0], True, present[1])
    dx_ref, dscale_ref, dbias_ref, *sums = refs
    i, j = pl.program_id(0), pl.program_id(1)
    begins = (i == 0) & (j == 0)
    ends = (i == pl.num_programs(0) - 1) & (j == pl.num_programs(1) - 1)

    def add(dscale, dbias):
        def each(group, here, mask, carry):
            at = rows.at(group, here)
            x, dy = (mask(ref[at].astype(jnp.float32)) for ref in (x_ref, dy_ref))
            dx, xhat = _row_gradients(rows, x, scale_ref, dy)
            if ds_ref is not None:
                dx += ds_ref[at].astype(jnp.float32)
            dx_ref[at] = dx.astype(dx_ref.dtype)
            dscale.block[...] += rows.fold(dy * xhat)
            dbias.block[...] += rows.fold(dy)
            return carry

        rows.walk.each(rows.walk.present(counts_ref, i, j), each, 0)

    total = sm.Sum.total_of_lanes if rows.across else sm.Sum.total
    sm.over_blocks(sums, (dscale_ref, dbias_ref), begins, ends, add, total)


def _row_gradients(rows, x, scale_ref, dy):
    part = sm.mean_factor(rows.length)
    done = standardize(rows, x)
    xhat = done.d * done.rstd
    t = rescale(dy, scale_ref, None)
    if rows.centered:
        t = t - rows.total(t) * part
    along = rows.total(t * xhat) * part
    return (t - xhat * along) * done.rstd * done.inverse, xhat
