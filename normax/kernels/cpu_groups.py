"""Group and instance norms on CPU by native code: an example at a time, which a cache may hold.

Sums go down the columns, as the entries lie, a few rows in float32, if that is enough, and all of
them in double precision; columns of one group are then taken together.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normax.kernels import cpu, cpu_library
from normax.kernels.entrywise import Activation


def supports_groups(
    x: Any,
    *,
    dtype: DTypeLike | None = None,
    backward: bool = True,
    activation: Activation | None = None,
) -> str | None:
    """Returns why groups like those of `x` cannot be had, or None.

    Args:
      x: array, or shape and dtype, of shape (N, L, G, K): G groups of K features at L positions.
      dtype: dtype of the output or, going backward, of dy; that of `x` by default, or float32.
      backward: whether the backward pass is wanted too; nothing depends on it.
      activation: what is to be applied to the output; there is none here.
    """
    del backward
    reason = cpu_library.unavailable() or cpu.unsupported_dtypes(x, dtype)
    if reason:
        return reason
    if len(x.shape) != 4:
        return f"a shape of rank {len(x.shape)} is none of (N, L, G, K)"
    if not math.prod(x.shape[1:]):
        return "there is no group"
    return None if activation is None else "an activation of groups"


def forward_groups(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    activation: Activation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Standardizes each group of each example of `x`, then rescales it.

    Args:
      x: array of shape (N, L, G, K), normalized over L and K.
      scale: of shape (G, K); None is one.
      bias: likewise; None is zero.
      centered: subtract the mean; False divides by the root mean square.
      epsilon: added to the variance, inside the root.
      dtype: of the output, that of `x` by default, or float32.
      activation: None.
      interpret: nothing depends on it: what runs on a CPU runs as it is.

    Returns:
      y, of the shape of `x`.

    Raises:
      ValueError: an activation.
    """
    del interpret
    _check(activation)
    given = [x, *cpu.lines(x, scale, bias)]
    attributes = cpu.rule(centered, epsilon)
    [y] = cpu.call("normax_groups_forward", [cpu.like(x, dtype)], given, **attributes)
    return y


def backward_groups(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    dy: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    activation: Activation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differentiates `forward_groups` backward; all but `x` and `dy` is computed again.

    Args:
      x: what `forward_groups` was given.
      scale: likewise.
      bias: likewise; nothing depends on it.
      dy: cotangent of the output.
      centered: as in `forward_groups`.
      epsilon: as in `forward_groups`.
      activation: None.
      interpret: as in `forward_groups`.

    Returns:
      dx, of the shape and dtype of `x`; dscale and dbias, of shape (G, K), float32 or, of
      float64 entries, float64.

    Raises:
      ValueError: an activation.
    """
    del bias, interpret
    _check(activation)
    line = jax.ShapeDtypeStruct(x.shape[2:], cpu.parameter_dtype(x))
    if not x.size:
        return x, jnp.zeros(line.shape, line.dtype), jnp.zeros(line.shape, line.dtype)
    given = [x, *cpu.lines(x, scale), dy]
    outputs = [cpu.like(x), line, line]
    attributes = cpu.rule(centered, epsilon)
    dx, dscale, dbias = cpu.call("normax_groups_backward", outputs, given, **attributes)
    return dx, dscale, dbias


def _check(activation):
    if activation is not None:
        raise ValueError(f"expected no activation of groups, got {activation}")
