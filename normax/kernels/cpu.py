"""Norms of rows on CPU by native code, and how such code is called.

The code is C++, in the folder `native`, called by XLA on its own threads. A row is read from memory
once, if a core's cache holds it, and summed in double precision; of 16 bits a few entries at a time
in float32, if that is enough. The backward pass writes dx and adds up the gradients of scale and
bias as it goes, in an order that the number of threads fixes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normax.kernels import cpu_library
from normax.kernels import primitive as pr

DTYPES = ("float32", "bfloat16", "float16", "float64")


def supports(x: Any, *, dtype: DTypeLike | None = None) -> str | None:
    """Returns why rows like those of `x` cannot be had, or None.

    Args:
      x: array, or shape and dtype, whose last axis is the row.
      dtype: dtype of the output or, going backward, of dy; that of `x` by default, or float32.
    """
    reason = cpu_library.unavailable() or unsupported_dtypes(x, dtype)
    return reason or (None if x.ndim and x.shape[-1] else "there is no row")


def unsupported_dtypes(x: Any, dtype: DTypeLike | None) -> str | None:
    """Returns why there is no kernel for the dtypes of `x` and the output, or None."""
    given = jnp.dtype(x.dtype)
    made = given if dtype is None else jnp.dtype(dtype)
    for each in (given, made):
        if each.name not in DTYPES:
            return f"dtype {each.name} is none of {', '.join(DTYPES)}"
    if made != given and (made != jnp.float32 or given == jnp.float64):
        return f"dtype {made.name} out of {given.name}"
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
      dtype: of the output, that of `x` by default, or float32.
      interpret: nothing depends on it: what runs on a CPU runs as it is.

    Returns:
      y, of the shape of `x`.
    """
    del interpret

    def run(calls, entries, parameters):
        del calls
        [x] = entries
        given = [x, *lines(x, *parameters)]
        return tuple(call("normax_forward", [like(x, dtype)], given, **rule(centered, epsilon)))

    [y] = _mapped_as_rows(run, (), (x,), (scale, bias))
    return y


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
      dx, of the shape and dtype of `x`; dscale and dbias, of the shape of a row, float32 or, of
      float64 entries, float64.
    """
    del interpret
    return _backward(x, scale, dy, None, centered, epsilon)


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
    del interpret

    def run(calls, entries, parameters):
        del calls
        x, residual = entries
        given = [x, residual.astype(x.dtype), *lines(x, *parameters)]
        outputs = [like(x), like(x, dtype)]
        return tuple(call("normax_add_forward", outputs, given, **rule(centered, epsilon)))

    s, y = _mapped_as_rows(run, (), (x, residual), (scale, bias))
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
      dx, which is also that of the residual; dscale and dbias, as `backward` does.
    """
    del interpret
    return _backward(s, scale, dy, ds, centered, epsilon)


def _backward(x, scale, dy, ds, centered, epsilon):
    def run(calls, entries, parameters):
        x, dy, ds = entries
        line = jax.ShapeDtypeStruct((*calls, x.shape[-1]), parameter_dtype(x))
        ds = nothing(x.dtype) if ds is None else ds.astype(x.dtype)
        given, outputs = [x, *lines(x, *parameters), dy, ds], [like(x), line, line]
        return tuple(call("normax_backward", outputs, given, **rule(centered, epsilon)))

    dx, dscale, dbias = _mapped_as_rows(run, (), (x, dy, ds), (scale,))
    return dx, dscale, dbias


def _mapped_as_rows(run, calls, entries, parameters):
    """Returns `run(calls, entries, parameters)`; of what is mapped over there are more rows.

    Parameters that are not mapped over are there once for all rows, else once for each call, as
    their gradients are: `calls` are the sizes of the axes in front.
    """

    @jax.custom_batching.custom_vmap
    def mappable(entries, parameters):
        return run(calls, entries, parameters)

    @mappable.def_vmap
    def mapped(size, batched, entries, parameters):
        entries = pr.in_front(size, batched[0], entries)
        if any(jax.tree.leaves(batched[1])) or any(v.ndim > 1 for v in jax.tree.leaves(parameters)):
            parameters = pr.in_front(size, batched[1], parameters)
            # What all calls had in common until now each has for itself.
            parameters = jax.tree.map(
                lambda v: jnp.broadcast_to(
                    v.reshape(size, *[1] * (len(calls) + 2 - v.ndim), *v.shape[1:]),
                    (size, *calls, v.shape[-1]),
                ),
                parameters,
            )
        outputs = _mapped_as_rows(run, (size, *calls), entries, parameters)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return mappable(entries, parameters)


def call(
    target: str, outputs: Sequence[Any], operands: Sequence[jax.Array], **attributes: Any
) -> Sequence[jax.Array]:
    """Calls native code; of what is mapped over all lead with the axis, and it is called once.

    Raises:
      NotImplementedError: it was not built, or this JAX cannot take it.
    """
    if reason := cpu_library.unavailable():
        raise NotImplementedError(reason)
    function = jax.ffi.ffi_call(target, outputs, vmap_method="broadcast_all")
    return function(*operands, **attributes)


def rule(centered: bool, epsilon: float) -> dict[str, Any]:
    """Returns what rows are standardized by, as native code takes it."""
    return {"centered": bool(centered), "epsilon": np.float64(epsilon)}


def like(x: jax.Array, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
    """Returns the shape of `x`, and a dtype, by default its own."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype)


def parameter_dtype(x: jax.Array) -> Any:
    """Returns the dtype that a scale or bias is converted to."""
    return jnp.dtype("float64" if x.dtype == jnp.float64 else "float32")


def lines(x: jax.Array, *parameters: jax.Array | None) -> list[jax.Array]:
    """Returns scale or bias in the dtype to compute in; one with no entries is none."""
    dtype = parameter_dtype(x)
    return [nothing(dtype) if v is None else v.astype(dtype) for v in parameters]


def nothing(dtype: DTypeLike) -> jax.Array:
    """Returns what native code reads as an operand that is not there."""
    return jnp.zeros(0, dtype)
