"""Layer and root mean square norm on TPU: a row is read once and stays on chip.

A block of rows is fetched to VMEM while the one before is worked on, chunk by chunk, each so small
that what is between its passes stays near the registers. Rows are independent, so a last block that
hangs over the end needs a mask only where rows are summed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels.mosaic_tpu_columns import column_moments as column_moments
from normax.kernels.mosaic_tpu_columns import column_moments_in_units as column_moments_in_units
from normax.kernels.mosaic_tpu_columns import supports_columns as supports_columns

# What v5e's compiler finds room for: rows in flight, and for gradients their sums.
LONGEST = 65536
LONGEST_WITH_GRADIENT = 24576
CHUNK = 2**16  # entries that are worked on together
# From here up epsilon hides whatever is too small to be squared.
HIDES_SMALL = 1e-24


class Rows(NamedTuple):
    """How rows are normalized, known when it is traced."""

    centered: bool
    epsilon: float
    length: int
    walk: bl.Walk


def supports(x: Any, *, dtype: DTypeLike | None = None, gradient: bool = True) -> str | None:
    """Returns why the kernels over rows cannot take an array, or None.

    Args:
      x: the array, or anything with its shape and dtype.
      dtype: dtype of the output, or of its cotangent; that of `x` by default.
      gradient: whether `backward` is to take it, too.
    """
    for each in (x.dtype, dtype):
        reason = None if each is None else bl.unsupported_dtype(each)
        if reason:
            return reason
    reason = bl.unsupported_shape(x.shape)
    if reason:
        return reason
    longest = LONGEST_WITH_GRADIENT if gradient else LONGEST
    if x.shape[-1] > longest:
        return f"row length {x.shape[-1]}: the TPU kernels hold rows of up to {longest} on chip"
    return None


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Normalizes over the last axis.

    Args:
      x: array of any leading shape, bfloat16 or float32.
      scale: gamma, of shape `x.shape[-1:]`; None is one.
      bias: beta, likewise; None is zero.
      centered: subtract the mean; False divides by the root mean square.
      epsilon: added to the variance.
      dtype: dtype of the output, bfloat16 or float32; that of `x` by default.
      interpret: run it in Pallas' interpreter; True or `pltpu.InterpretParams`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: what `supports` names.
    """
    return _forward(x, scale, bias, centered, epsilon, dtype, interpret, False)[0]


def forward_with_statistics(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes as `forward`, and returns the mean and variance too.

    Returns:
      y, and float32 mean and var of shape `x.shape[:-1]`; not centered, the mean is zero and the
      variance the mean square.
    """
    y, *mean, var = _forward(x, scale, bias, centered, epsilon, dtype, interpret, True)
    return y, mean[0] if mean else jnp.zeros_like(var), var


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `forward`; the statistics are measured anew.

    Args:
      x: what `forward` was given.
      scale: likewise.
      dy: cotangent of its output, of the shape of `x`, bfloat16 or float32.
      centered: as there.
      epsilon: as there.
      interpret: as there.

    Returns:
      dx, of the dtype of `x`; dscale and dbias, float32 of shape `x.shape[-1:]`, summed over all
      rows in a fixed order.

    Raises:
      ValueError: what `supports` names.
    """
    _check(x, dy.dtype, gradient=True)
    length = x.shape[-1]
    if 0 in x.shape:
        return x, jnp.zeros(length, jnp.float32), jnp.zeros(length, jnp.float32)
    shape = bl.grouped(x.shape)
    flat = x.reshape(shape)
    walk = plan_backward(shape, 2 * x.dtype.itemsize + dy.dtype.itemsize)
    rows = Rows(centered, float(epsilon), length, walk)
    scales = _parameters(scale)
    at_rows, at_features = _specs(rows)
    accumulator = pltpu.VMEM((bl.SUBLANES, length), jnp.float32)
    dx, dscale, dbias = bl.call(
        functools.partial(_backward_kernel, rows, len(scales)),
        [(flat.shape, x.dtype), ((1, length), jnp.float32), ((1, length), jnp.float32)],
        flat,
        dy.reshape(flat.shape),
        bl.counts_of(shape),
        *scales,
        grid=walk.grid(shape),
        in_specs=[at_rows, at_rows, bl.IN_SMEM(), *[at_features] * len(scales)],
        out_specs=[at_rows, at_features, at_features],
        scratch_shapes=[accumulator] * 6,
        semantics=("arbitrary", "arbitrary"),
        name="normax_rows_backward",
        flops=25,
        interpret=interpret,
    )
    return dx.reshape(x.shape), dscale.reshape(length), dbias.reshape(length)


def _check(x, dtype, gradient):
    reason = supports(x, dtype=dtype, gradient=gradient)
    if reason:
        raise ValueError(reason)


def plan(shape: tuple[Any, Any, int], moved: int) -> bl.Walk:
    """Returns how to walk groups of rows of which `moved` bytes an entry are in flight."""
    return bl.Walk.over(shape, shape[-1], moved, CHUNK)


def plan_backward(shape: tuple[Any, Any, int], moved: int) -> bl.Walk:
    """Returns as `plan`; beside their sums the longest rows find half the room."""
    return plan(shape, moved * (2 if shape[-1] > LONGEST // 4 else 1))


def _parameters(*values):
    """Returns those parameters that are there, as rows of a dtype that Mosaic reads."""
    rows = [value.reshape(1, -1) for value in values if value is not None]
    return [row.astype(jnp.float32) if bl.unsupported_dtype(row.dtype) else row for row in rows]


def _specs(rows):
    return (
        pl.BlockSpec((rows.walk.groups, rows.walk.block, rows.length), lambda i, j: (i, j, 0)),
        pl.BlockSpec((1, rows.length), lambda i, j: (0, 0)),
    )


def _forward(x, scale, bias, centered, epsilon, dtype, interpret, with_statistics):
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    _check(x, dtype, gradient=False)
    if 0 in x.shape:
        nothing = jnp.zeros(x.shape[:-1], jnp.float32)
        return [jnp.zeros(x.shape, dtype), nothing, nothing]
    shape = groups, count, length = bl.grouped(x.shape)
    flat = x.reshape(shape)
    walk = plan(shape, x.dtype.itemsize + dtype.itemsize)
    rows = Rows(centered, float(epsilon), length, walk)
    parameters = _parameters(scale, bias)
    at_rows, at_features = _specs(rows)
    outputs, out_specs = [(flat.shape, dtype)], [at_rows]
    if with_statistics:
        # A number for each row, a hundred and twenty-eight to a line of the output.
        held, shared = max(1, walk.block // bl.LANES), max(1, bl.LANES // walk.block)
        lines = pl.BlockSpec(
            (walk.groups, held, 1, bl.LANES), lambda i, j: (i, lax.div(j, shared), 0, 0)
        )
        number = 2 if centered else 1
        outputs += [((groups, pl.cdiv(count, bl.LANES), 1, bl.LANES), jnp.float32)] * number
        out_specs += [lines] * number
    y, *statistics = bl.call(
        functools.partial(_forward_kernel, rows, scale is not None, bias is not None),
        outputs,
        flat,
        *parameters,
        grid=walk.grid(shape),
        in_specs=[at_rows, *[at_features] * len(parameters)],
        out_specs=out_specs,
        semantics=("parallel", "arbitrary" if with_statistics else "parallel"),
        name="normax_rows_forward",
        flops=15,
        interpret=interpret,
    )
    statistics = [v.reshape(groups, -1)[:, :count].reshape(x.shape[:-1]) for v in statistics]
    return [y.reshape(x.shape), *statistics]


class Standardized(NamedTuple):
    """Rows of deviations in a unit, and numbers of each row."""

    d: Any
    rstd: Any  # per unit
    inverse: Any  # one over the unit
    mean: Any
    var: Any


def _standardize(rows: Rows, x: jax.Array) -> Standardized:
    """Measures rows, float32.

    Less its largest entry a row of equal entries is exactly zero, and others are off by less than
    an ulp of the largest deviation.
    """
    small_too = rows.epsilon < HIDES_SMALL
    part = bl.mean_factor(rows.length)
    inverse = bl.inverse_unit(jnp.max(jnp.abs(x), 1, keepdims=True), small_too)
    unit = bl.unit_of(inverse)
    d, mean = x * inverse, None
    if rows.centered:
        top = jnp.max(d, 1, keepdims=True)
        d = d - top
        center = bl.total(d) * part
        d = d - center
        mean = (top + center) * unit
    var = bl.total(d * d) * part
    # Nothing deviates: epsilon alone rules, and in the unit it may have vanished.
    inverse = jnp.where(var == 0, jnp.float32(1), inverse)
    epsilon = jnp.float32(rows.epsilon)
    squared = var + (epsilon * inverse * inverse if small_too else epsilon)
    rstd = lax.rsqrt(squared)
    if small_too:
        rstd = jnp.where(squared <= 0, jnp.float32(0), rstd)
    return Standardized(d, rstd, inverse, mean, var * unit * unit)


def _forward_kernel(rows, scaled, biased, x_ref, *refs):
    refs = list(refs)
    scale_ref = refs.pop(0) if scaled else None
    bias_ref = refs.pop(0) if biased else None
    y_ref, *statistics = refs
    walk = rows.walk
    first = pl.program_id(1) * walk.block
    chunks = walk.block // walk.chunk

    def each(k, carry):
        group, i = (0, k) if walk.groups == 1 else (lax.div(k, chunks), lax.rem(k, chunks))
        here = pl.ds(pl.multiple_of(i * walk.chunk, walk.chunk), walk.chunk)
        done = _standardize(rows, x_ref[group, here, :].astype(jnp.float32))
        y = done.d * done.rstd
        y = y if scale_ref is None else y * scale_ref[...].astype(jnp.float32)
        y = y if bias_ref is None else y + bias_ref[...].astype(jnp.float32)
        y_ref[group, here, :] = y.astype(y_ref.dtype)
        measured = [done.mean, done.var] if rows.centered else [done.var]
        for ref, column in zip(statistics, measured, strict=False):
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


def _backward_kernel(rows, scaled, x_ref, dy_ref, counts_ref, *refs):
    scale_ref = refs[0] if scaled else None
    dx_ref, dscale_ref, dbias_ref, *sums = refs[scaled:]
    dscale, dbias = _Sum(*sums[:3]), _Sum(*sums[3:])
    i, j = pl.program_id(0), pl.program_id(1)
    last = (i == pl.num_programs(0) - 1) & (j == pl.num_programs(1) - 1)

    @pl.when((i == 0) & (j == 0))
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def each(group, here, mask, carry):
        x, dy = (mask(ref[group, here, :].astype(jnp.float32)) for ref in (x_ref, dy_ref))
        scale = None if scale_ref is None else scale_ref[...].astype(jnp.float32)
        dx, xhat = _row_gradients(rows, x, scale, dy)
        dx_ref[group, here, :] = dx.astype(dx_ref.dtype)
        dscale.block[...] += bl.fold(dy * xhat)
        dbias.block[...] += bl.fold(dy)
        return carry

    rows.walk.each(rows.walk.present(counts_ref, i, j), each, 0)
    dscale.close_block()
    dbias.close_block()

    @pl.when(last)
    def _():
        dscale_ref[...] = dscale.total()
        dbias_ref[...] = dbias.total()


def _row_gradients(rows, x, scale, dy):
    part = bl.mean_factor(rows.length)
    done = _standardize(rows, x)
    xhat = done.d * done.rstd
    t = dy if scale is None else dy * scale
    if rows.centered:
        t = t - bl.total(t) * part
    along = bl.total(t * xhat) * part
    return (t - xhat * along) * done.rstd * done.inverse, xhat


class _Sum(NamedTuple):
    """A sum over rows, in as many as a register has; over blocks to twice the precision."""

    block: Any
    high: Any
    low: Any

    def close_block(self):
        """Adds the block's sum to the others, and begins the next."""
        self.high[...], lost = bl.add_exactly(self.high[...], self.block[...])
        self.low[...] += lost
        self.block[...] = jnp.zeros_like(self.block)

    def total(self):
        """Returns the sum of the blocks over their rows."""
        high, low, size = self.high[...], self.low[...], bl.SUBLANES
        while size > 1:
            size //= 2
            high, lost = bl.add_exactly(high[:size], high[size:])
            low = low[:size] + low[size:] + lost
        return high + low
