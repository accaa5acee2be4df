"""Group and instance norms on a Hopper GPU, every array read or written once.

A program keeps a block of whole groups of one example in shared memory; where it has no room, the
norm is refused. Gradients of scale and bias leave as one line of an example, which XLA adds up in a
fixed order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normax.kernels import entrywise
from normax.kernels import mosaic_gpu_slab_plans as plans
from normax.kernels import mosaic_gpu_slabs as slabs
from normax.kernels import row_arithmetic as arithmetic
from normax.kernels.deferred import each
from normax.kernels.entrywise import Activation
from normax.kernels.mosaic_gpu import DTYPES


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
      dtype: dtype of the output or, going backward, of dy; that of `x` by default.
      backward: whether the backward pass is wanted too; it takes smaller groups.
      activation: what is to be applied to the output.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    for one in (jnp.dtype(x.dtype), dtype):
        if one.name not in DTYPES:
            return f"dtype {one.name} is none of {', '.join(DTYPES)}"
    if len(x.shape) != 4:
        return f"a shape of rank {len(x.shape)} is none of (N, L, G, K)"
    if not math.prod(x.shape[1:]):
        return "there is no group"
    found = [plans.make_plan(x.shape, [x.dtype], dtype)]
    if backward:
        found += [plans.make_plan(x.shape, [x.dtype, dtype], x.dtype)]
    why = next((plan for plan in found if isinstance(plan, str)), None)
    if why is None and activation is not None:
        return entrywise.refusal(activation)
    return why


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
      dtype: of the output, that of `x` by default.
      activation: applied to the output, entry by entry, before it is rounded.
      interpret: run on a CPU, by the interpreter of Mosaic GPU.

    Returns:
      y, of the shape of `x`.
    """
    how = scale is not None, bias is not None, activation
    work = functools.partial(_work_forward, *how)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    rule, activated = _rule(x, centered, epsilon), activation is not None
    task = slabs.Task("normax_groups", rule, work, dtype, activated)
    [y] = _run(task, [x], [scale, bias], interpret)
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
      bias: likewise; only an activation asks for it.
      dy: cotangent of the output.
      centered: as in `forward_groups`.
      epsilon: as in `forward_groups`.
      activation: as in `forward_groups`.
      interpret: as in `forward_groups`.

    Returns:
      dx, of the shape and dtype of `x`; dscale and dbias, float32 of shape (G, K).
    """
    bias = None if activation is None else bias
    how = scale is not None, bias is not None, activation
    work = functools.partial(_work_backward, *how)
    rule = _rule(x, centered, epsilon)
    activated = activation is not None
    task = slabs.Task("normax_groups_backward", rule, work, jnp.dtype(x.dtype), activated, 2)
    dx, [dscale, dbias] = _run(task, [x, dy], [scale, bias], interpret)
    return dx, dscale, dbias


def _rule(x, centered, epsilon):
    units = jnp.dtype(x.dtype) != jnp.float16  # whose squares stay in range in float32
    return arithmetic.Rule(x.shape[1] * x.shape[3], centered, float(epsilon), units)


def _work_forward(scaled, shifted, activation, total, rule, inputs, parameters):
    scale = parameters[0] if scaled else None
    bias = parameters[-1] if shifted else None
    y, _, _ = arithmetic.forward(rule, inputs[0], scale, bias, total)
    if activation is not None:
        y = [each(functools.partial(entrywise.apply, activation), piece) for piece in y]
    return y, []


def _work_backward(scaled, shifted, activation, total, rule, inputs, parameters):
    x, dy = inputs
    scale = parameters[0] if scaled else None
    bias = parameters[-1] if shifted else None
    if activation is None:
        dx, along = arithmetic.backward(rule, x, scale, dy, total)
    else:
        dx, along, dy = arithmetic.backward_through(rule, x, scale, bias, dy, total, activation)
    return dx, [along, dy]


@jax.enable_x64(False)
def _run(task, inputs, parameters, interpret):
    """Returns the output and, if there are any, the sums."""
    shape = inputs[0].shape
    if not shape[0]:
        sums = [jnp.zeros((task.sums, *shape[2:]), jnp.float32)] * (task.sums > 0)
        return jnp.zeros(shape, task.dtype), *sums
    plan = plans.make_plan(shape, [x.dtype for x in inputs], task.dtype, task.activated)
    if isinstance(plan, str):
        raise ValueError(f"{task.name}: {plan}")
    parameters = [one for one in parameters if one is not None]
    return slabs.launch(plan, task, inputs, parameters, interpret)
