"""Columns on CPU by native code: batch norm's statistics, output and gradients.

Sums go down the columns, as the entries lie: a few rows in float32, if that is enough, and all of
them in double precision. What is written afterwards is written from the last rows to the first: of
what was summed, they are what a cache still holds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normax.kernels import cpu, cpu_library


def supports_columns(x: Any) -> str | None:
    """Returns why the columns of arrays like `x` cannot be measured, or None."""
    reason = cpu_library.unavailable() or cpu.unsupported_dtypes(x, None)
    return reason or (None if len(x.shape) and x.shape[-1] else "there is no column")


def can_write(x: Any, dtype: DTypeLike) -> bool:
    """Returns whether there is an output, or a cotangent of it, of a dtype for arrays like `x`."""
    return cpu.unsupported_dtypes(x, dtype) is None


def column_moments_in_units(
    x: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Measures every column over all rows, in multiples of a power of two for each.

    Args:
      x: array of any leading shape.
      interpret: as in `forward`.

    Returns:
      unit, mean, rest and var, float32 or, of float64 entries, float64, of shape `x.shape[-1:]`:
      the mean is (mean + rest) * unit, the variance var * unit^2. The unit is one up to deviations
      of 2^50, so that an epsilon of 1e-24 or more can be added to var: where the unit is larger,
      var is too.
    """
    del interpret
    line = jax.ShapeDtypeStruct(x.shape[-1:], cpu.parameter_dtype(x))
    if not x.size:
        zero = jnp.zeros(line.shape, line.dtype)
        return jnp.ones_like(zero), zero, zero, zero
    unit, mean, rest, var = cpu.call("normax_column_moments", [line] * 4, [x])
    return unit, mean, rest, var


def column_gradients(
    x: jax.Array,
    dy: jax.Array,
    unit: jax.Array | None,
    mean: jax.Array | None,
    rest: jax.Array | None,
    var: jax.Array,
    *,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the scale and bias of every column.

    Args:
      x: array of any leading shape.
      dy: cotangent of the output, of the shape of `x`, of its dtype or float32.
      unit: as `column_moments_in_units` returned it, like the next three; None is one.
      mean: in multiples of the unit; None where none was subtracted.
      rest: what it lacks; None is zero.
      var: in multiples of the unit's square.
      epsilon: added to the variance itself, whatever the unit.
      interpret: as in `forward`.

    Returns:
      dscale, the sums of dy xhat, and dbias, those of dy: of shape `x.shape[-1:]`, float32 or, of
      float64 entries, float64, summed over all rows in a fixed order.
    """
    del interpret
    line = jax.ShapeDtypeStruct(x.shape[-1:], cpu.parameter_dtype(x))
    if not x.size:
        return jnp.zeros(line.shape, line.dtype), jnp.zeros(line.shape, line.dtype)
    if cpu.unsupported_dtypes(x, dy.dtype):
        x, dy = x.astype(line.dtype), dy.astype(line.dtype)
    given = [x, dy, *cpu.lines(x, unit, mean, rest, var)]
    dscale, dbias = cpu.call(
        "normax_column_gradients", [line] * 2, given, epsilon=np.float64(epsilon)
    )
    return dscale, dbias


def forward_columns(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    unit: jax.Array | None,
    mean: jax.Array | None,
    rest: jax.Array | None,
    var: jax.Array,
    *,
    epsilon: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Standardizes every column by what was measured, then rescales it.

    Args:
      x: array of any leading shape.
      scale: of shape `x.shape[-1:]`; None is one.
      bias: likewise; None is zero.
      unit: as in `column_gradients`, like the next three.
      mean: likewise.
      rest: likewise.
      var: likewise.
      epsilon: added to the variance itself, whatever the unit.
      dtype: of the output, that of `x` or float32.

    Returns:
      y, of the shape of `x`.
    """
    if not x.size:
        return x.astype(dtype)
    given = [x, *cpu.lines(x, scale, bias, unit, mean, rest, var)]
    y = cpu.like(x, dtype)
    [y] = cpu.call("normax_columns_forward", [y], given, epsilon=np.float64(epsilon))
    return y


def backward_columns(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    unit: jax.Array | None,
    mean: jax.Array | None,
    rest: jax.Array | None,
    var: jax.Array,
    dscale: jax.Array,
    dbias: jax.Array,
    *,
    epsilon: float,
    count: int,
) -> jax.Array:
    """Returns the cotangent of `x`, by the sums that `column_gradients` returned.

    Args:
      x: array of any leading shape.
      scale: of shape `x.shape[-1:]`; None is one.
      dy: cotangent of the output, of the shape of `x`, of its dtype or float32.
      unit: as in `column_gradients`, like the next three.
      mean: likewise.
      rest: likewise.
      var: likewise.
      dscale: sums of dy xhat, those of all devices.
      dbias: sums of dy, likewise.
      epsilon: added to the variance itself, whatever the unit.
      count: how many entries were summed, on all devices.

    Returns:
      dx, of the shape and dtype of `x`.
    """
    if not x.size:
        return x
    lines = cpu.lines(x, scale, unit, mean, rest, var, dscale, dbias)
    given = [x, lines[0], dy, *lines[1:]]
    numbers = {"epsilon": np.float64(epsilon), "count": np.float64(count)}
    [dx] = cpu.call("normax_columns_backward", [cpu.like(x)], given, **numbers)
    return dx
