"""Norms of rows on a Hopper GPU, every array read or written once.

The kernels are Mosaic GPU, the backend that JAX keeps. Each program sums its share of the gradients
of scale and bias in registers and leaves one row of them, which XLA adds up in a fixed order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import row_arithmetic as arithmetic

DTYPES = ("float32", "bfloat16", "float16")
ALIGNMENT = 16
LONGEST = {"forward": 16384, "backward": 8192}


def supports(
    x: Any, *, dtype: DTypeLike | None = None, residual: bool = False, backward: bool = True
) -> str | None:
    """Returns why rows like those of `x` cannot be had, or None.

    Args:
      x: array, or shape and dtype, whose last axis is the row.
      dtype: dtype of the output or, going backward, of dy; that of `x` by default.
      residual: whether there is a residual, or its cotangent.
      backward: whether the backward pass is wanted too; it takes shorter rows.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    for each in (jnp.dtype(x.dtype), dtype):
        if each.name not in DTYPES:
            return f"dtype {each.name} is none of {', '.join(DTYPES)}"
    if not x.ndim or not x.shape[-1]:
        return "there is no row"
    length, least = x.shape[-1], min(jnp.dtype(x.dtype).itemsize, dtype.itemsize)
    if length * least % ALIGNMENT:
        return f"a row of {length * least} bytes is no multiple of {ALIGNMENT}, as copies must be"
    longest = LONGEST["backward" if backward else "forward"]
    if length > longest:
        return f"a row of {length} entries is above {longest}"
    rule, one = _rule(x, True, 0.0), [x.dtype] * residual
    wanted = [(_forward_task(rule, x, dtype, True, True, residual, True), [x.dtype, *one], 2)]
    if backward:
        wanted += [(_backward_task(rule, x, True, residual), [x.dtype, dtype, *one], 1)]
    for task, inputs, parameters in wanted:
        shared = rows.make_plan(task, 1, length, inputs, parameters).shared
        if shared > rows.SHARED_BYTES:
            return f"a row of {length} entries needs {shared} bytes of shared memory"
    return None


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
    return rows.Task("normax_forward", rule, work, 1 + residual, outputs, count)


def _work_forward(dtype, scaled, shifted, statistics, total, rule, inputs, parameters, sums):
    x, *residual = inputs
    outputs = []
    if residual:
        # Rounded as it is stored: what is normalized is what the backward pass will read.
        x = [(a + b).astype(dtype).astype(jnp.float32) for a, b in zip(x, *residual, strict=True)]
        outputs = [x]
    scale = parameters[0] if scaled else None
    bias = parameters[-1] if shifted else None
    y, mean, var = arithmetic.forward(rule, x, scale, bias, total)
    return [*outputs, y], [each for each in (mean, var) if each is not None][:statistics], sums


def _backward_task(rule, x, scaled, residual):
    work = functools.partial(_work_backward, scaled)
    return rows.Task("normax_backward", rule, work, 4, (x.dtype,), sums=2)


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


def _run(task, inputs, parameters, interpret):
    """Returns the outputs in the shape of x, statistics in that of its rows, and the sums."""
    shape = inputs[0].shape
    count, length = math.prod(shape[:-1]), shape[-1]
    parameters = [each for each in parameters if each is not None]
    shapes = [shape] * len(task.outputs) + [shape[:-1]] * task.statistics
    if not count:
        made = [jnp.zeros(shape, dtype) for dtype in task.outputs]
        made += [jnp.zeros(shape[:-1], jnp.float32)] * task.statistics
        return made + [jnp.zeros(length, jnp.float32)] * task.sums
    plan = rows.make_plan(task, count, length, [x.dtype for x in inputs], len(parameters))
    flat = [x.reshape(count, length) for x in inputs]
    results = rows.launch(plan, task, flat, parameters, interpret)
    shapes += [(length,)] * task.sums
    return [each.reshape(shape) for each, shape in zip(results, shapes, strict=True)]
