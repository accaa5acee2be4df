"""Norms of rows on a Hopper GPU, every array read or written once if a row fits into registers.

The kernels are Mosaic GPU, the backend that JAX keeps. Each program sums its share of the gradients
of scale and bias on chip and leaves one row of them, which XLA adds up in a fixed order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normax.kernels import mosaic_gpu_long as long
from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import primitive as pr
from normax.kernels import row_arithmetic as arithmetic
from normax.kernels import row_passes as passes

DTYPES = ("float32", "bfloat16", "float16")
ALIGNMENT = 16
LONGEST = {"forward": 16384, "backward": 8192}


def supports(x: Any, *, dtype: DTypeLike | None = None) -> str | None:
    """Returns why rows like those of `x` cannot be had, or None.

    Args:
      x: array, or shape and dtype, whose last axis is the row.
      dtype: dtype of the output or, going backward, of dy; that of `x` by default.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    for each in (jnp.dtype(x.dtype), dtype):
        if each.name not in DTYPES:
            return f"dtype {each.name} is none of {', '.join(DTYPES)}"
    if not x.ndim or not x.shape[-1]:
        return "there is no row"
    return "a row is a single entry" if x.shape[-1] == 1 else None


def forward(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Standardizes each row of `x`, then rescales it.

    Args:
      x: array of any rank; its last axis is the row.
      scale: of the shape of a row; None is one.
      bias: likewise; None is zero.
      centered: subtract the mean; False divides by the root mean square.
      epsilon: added to the variance, inside the root.
      dtype: of the output, that of `x` by default.
      interpret: run on a CPU, by the interpreter of Mosaic GPU.

    Returns:
      y, of the shape of `x`.
    """
    rule = _rule(x, centered, epsilon)
    task = _forward_task(rule, x, dtype, scale is not None, bias is not None, False, False)
    [y] = _run(task, [x], [scale, bias], interpret)
    return y


def forward_with_statistics(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `forward` does, and mean and variance, float32 of `x.shape[:-1]`.

    Uncentred, the mean is zero and the variance is the mean of the squares.
    """
    rule = _rule(x, centered, epsilon)
    task = _forward_task(rule, x, dtype, scale is not None, bias is not None, False, True)
    y, *statistics = _run(task, [x], [scale, bias], interpret)
    var = statistics[-1]
    return y, statistics[0] if centered else jnp.zeros_like(var), var


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differentiates `forward` backward; the statistics are measured again, in the same read.

    Args:
      x: what `forward` was given.
      scale: likewise.
      dy: cotangent of y.
      centered: as in `forward`.
      epsilon: as in `forward`.
      interpret: as in `forward`.

    Returns:
      dx, of the shape and dtype of `x`; dscale and dbias, float32 of the shape of a row.
    """
    task = _backward_task(_rule(x, centered, epsilon), x, scale is not None, False)
    dx, dscale, dbias = _run(task, [x, dy], [scale], interpret)
    return dx, dscale, dbias


def add_forward(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns s = x + residual, rounded to the dtype of `x`, and `forward` of it, in one read."""
    rule = _rule(x, centered, epsilon)
    task = _forward_task(rule, x, dtype, scale is not None, bias is not None, True, False)
    s, y = _run(task, [x, residual], [scale, bias], interpret)
    return s, y


def add_backward(
    s: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    ds: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differentiates `add_forward` backward, `ds` being the cotangent of the sum.

    Returns:
      dx, which is also that of the residual; dscale and dbias, float32.
    """
    task = _backward_task(_rule(s, centered, epsilon), s, scale is not None, True)
    dx, dscale, dbias = _run(task, [s, dy, ds], [scale], interpret)
    return dx, dscale, dbias


def _rule(x, centered, epsilon):
    units = jnp.dtype(x.dtype) != jnp.float16  # whose squares stay in range in float32
    return arithmetic.Rule(x.shape[-1], centered, float(epsilon), units)


def _forward_task(rule, x, y_dtype, scaled, shifted, residual, statistics):
    outputs = ((x.dtype,) if residual else ()) + (jnp.dtype(y_dtype or x.dtype),)
    count = (1 + rule.centered) * statistics
    how = x.dtype, scaled, shifted, count
    work = functools.partial(_work_forward, *how)
    again = functools.partial(_pass_forward, *how, residual)
    return rows.Task("normax_forward", rule, work, again, 1 + residual, outputs, count)


def _work_forward(dtype, scaled, shifted, statistics, total, rule, inputs, parameters, sums):
    x = _added(dtype, *inputs)
    outputs = [x] if len(inputs) > 1 else []
    scale = parameters[0] if scaled else None
    bias = parameters[-1] if shifted else None
    y, mean, var = arithmetic.forward(rule, x, scale, bias, total)
    return [*outputs, y], [each for each in (mean, var) if each is not None][:statistics], sums


def _added(dtype, x, residual=None):
    """Returns what is normalized."""
    if residual is None:
        return x
    # Rounded as it is stored: what is normalized is what the backward pass will read.
    return [(a + b).astype(dtype).astype(jnp.float32) for a, b in zip(x, residual, strict=True)]


def _pass_forward(dtype, scaled, shifted, statistics, residual, total, rule, sweep, write, found):
    del found

    def x(block):
        return _added(dtype, *(block.input(which) for which in range(1 + residual)))

    def each(block):
        scale = block.parameter(0) if scaled else None
        bias = block.parameter(scaled) if shifted else None
        given = x(block)
        d = passes.deviations(measured, given)
        y = arithmetic.rescaled(d, measured.rstd, scale, bias)
        return [given] * residual + [y], []

    measured = passes.measure(rule, x, sweep, total)
    write(each)
    return [each for each in measured.statistics if each is not None][:statistics]


def _backward_task(rule, x, scaled, residual):
    work = functools.partial(_work_backward, scaled)
    again = functools.partial(_pass_backward, scaled, residual)
    return rows.Task("normax_backward", rule, work, again, 4, (x.dtype,), sums=2)


def _work_backward(scaled, total, rule, inputs, parameters, sums):
    x, dy, *ds = inputs
    dx, along = arithmetic.backward(rule, x, parameters[0] if scaled else None, dy, total)
    for each in ds:
        dx = [a + b for a, b in zip(dx, each, strict=True)]
    sums = [
        [a + b for a, b in zip(sofar, share, strict=True)]
        for sofar, share in zip(sums, (along, dy), strict=True)
    ]
    return [dx], [], sums


def _pass_backward(scaled, residual, total, rule, sweep, write, found):
    """Returns, if `found` is asked for, what xhat is made from."""

    def x(block):
        return block.input(0)

    def t(block):
        return arithmetic.scaled(block.input(1), block.parameter(0) if scaled else None)

    def each(block):
        dy = block.input(1)
        t = arithmetic.scaled(dy, block.parameter(0) if scaled else None)
        d, t = passes.deviations(row, x(block)), passes.centred(row, t)
        dx, xhat = arithmetic.derivative(d, t, row.rstd, row.along, row.per_unit)
        if residual:
            dx = [a + b for a, b in zip(dx, block.input(2), strict=True)]
        return [dx], [[a * b for a, b in zip(dy, xhat, strict=True)], dy]

    row = passes.measure(rule, x, sweep, total, t)
    write(each)
    numbers = (row.rstd, row.per_unit, row.pivot, row.mean) if found else ()
    return [each for each in numbers if each is not None]


def _run(task, inputs, parameters, interpret):
    """Returns what `_run_rows` does. What is mapped over is more rows, if no sums are asked for.

    Else the grid has an axis more, which CUDA ends at 65535.
    """

    @jax.custom_batching.custom_vmap
    def mappable(inputs, parameters):
        return _run_rows(task, inputs, parameters, interpret)

    @mappable.def_vmap
    def mapped(size, batched, inputs, parameters):
        if task.sums or any(jax.tree.leaves(batched[1])):
            dims = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, batched)
            each = functools.partial(_run_rows, task, interpret=interpret)
            outputs = jax.vmap(each, dims, axis_size=size)(inputs, parameters)
        else:
            outputs = _run(task, pr.in_front(size, batched[0], inputs), parameters, interpret)
        return outputs, [True] * len(outputs)

    return mappable(inputs, parameters)


# Else a loop's numbers, which are of 32 bits, would meet integers of 64.
@jax.enable_x64(False)
def _run_rows(task, inputs, parameters, interpret):
    """Returns the outputs in the shape of x, statistics in that of its rows, and the sums."""
    shape = inputs[0].shape
    count, length = math.prod(shape[:-1]), shape[-1]
    parameters = [each for each in parameters if each is not None]
    shapes = [shape] * len(task.outputs) + [shape[:-1]] * task.statistics
    if not count:
        made = [jnp.zeros(shape, dtype) for dtype in task.outputs]
        made += [jnp.zeros(shape[:-1], jnp.float32)] * task.statistics
        return made + [jnp.zeros(length, jnp.float32)] * task.sums
    flat = [x.reshape(count, length) for x in inputs]
    if _in_registers(task, length, inputs, parameters):
        plan = rows.make_plan(task, count, length, [x.dtype for x in inputs], len(parameters))
        results = rows.launch(plan, task, flat, parameters, interpret)
    else:
        results = long.launch(task, flat, parameters, interpret)
    shapes += [(length,)] * task.sums
    return [each.reshape(shape) for each, shape in zip(results, shapes, strict=True)]


def _in_registers(task, length, inputs, parameters):
    """Tells whether bulk copies may bring a row, and registers and shared memory hold it."""
    dtypes = [x.dtype for x in inputs]
    least = min(jnp.dtype(dtype).itemsize for dtype in (*dtypes, *task.outputs))
    if length * least % ALIGNMENT or length > LONGEST["backward" if task.sums else "forward"]:
        return False
    return rows.make_plan(task, 1, length, dtypes, len(parameters)).shared <= rows.SHARED_BYTES
