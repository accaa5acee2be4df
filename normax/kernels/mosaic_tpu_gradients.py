"""The sums of batch norm's derivative on TPU, over all but the last axis, in one read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels import mosaic_tpu_sums as sm
from normax.kernels.mosaic_tpu_columns import CHUNK, WIDEST, supports_columns


def column_gradients(
    x: jax.Array,
    dy: jax.Array,
    unit: jax.Array,
    mean: jax.Array | None,
    rest: jax.Array | None,
    var: jax.Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the scale and bias of every column.

    Args:
      x: array of any leading shape, bfloat16 or float32.
      dy: cotangent of the output, of the shape of `x`, bfloat16 or float32.
      unit: as `column_moments_in_units` returned it, like the next three.
      mean: in multiples of the unit; None where none was subtracted.
      rest: what it lacks; None is zero.
      var: in multiples of the unit's square.
      epsilon: added to the variance itself, whatever the unit.
      interpret: run it in Pallas' interpreter; True or `pltpu.InterpretParams`.

    Returns:
      dscale, the sums of dy xhat, and dbias, those of dy: float32 of shape `x.shape[-1:]`, summed
      over all rows in a fixed order.

    Raises:
      ValueError: what `supports_columns` names, or a cotangent of another shape.
    """
    reason = supports_columns(x) or supports_columns(dy)
    if reason:
        raise ValueError(reason)
    if dy.shape != x.shape:
        raise ValueError(f"expected dy.shape == {x.shape}, got {dy.shape}")
    length = x.shape[-1]
    if 0 in x.shape:
        return jnp.zeros(length, jnp.float32), jnp.zeros(length, jnp.float32)
    shape = bl.grouped(x.shape)
    width, walk = plan_gradients(shape, x.dtype.itemsize + dy.dtype.itemsize)
    given = [unit, *(v for v in (mean, rest) if v is not None), var]
    block = pl.BlockSpec((walk.groups, walk.block, width), lambda c, i, j: (i, j, c))
    line = pl.BlockSpec((1, width), lambda c, i, j: (0, c))
    present = mean is not None, rest is not None
    dscale, dbias = bl.call(
        functools.partial(_kernel, walk, float(epsilon), present),
        [((1, length), jnp.float32)] * 2,
        x.reshape(shape),
        dy.reshape(shape),
        bl.counts_of(shape),
        *(v.astype(jnp.float32).reshape(1, length) for v in given),
        grid=(pl.cdiv(length, width), *walk.grid(shape)),
        in_specs=[block, block, bl.IN_SMEM(), *[line] * len(given)],
        out_specs=[line] * 2,
        scratch_shapes=[pltpu.VMEM((bl.SUBLANES, width), jnp.float32)] * 6,
        semantics=("parallel", "arbitrary", "arbitrary"),
        name="normax_column_gradients",
        flops=7,
        interpret=interpret,
    )
    return dscale.reshape(length), dbias.reshape(length)


def plan_gradients(shape: tuple[Any, Any, int], moved: int) -> tuple[int, bl.Walk]:
    """Returns how many columns are walked together, and how their rows are."""
    width = min(shape[-1], WIDEST)
    return width, bl.Walk.over(shape, width, moved, CHUNK)


def _kernel(walk, epsilon, present, x_ref, dy_ref, counts_ref, *refs):
    refs = list(refs)
    unit_ref, mean_ref, rest_ref, var_ref = bl.taken(refs, True, *present, True)
    dscale_ref, dbias_ref, *sums = refs
    i, j = pl.program_id(1), pl.program_id(2)
    begins = (i == 0) & (j == 0)
    ends = (i == pl.num_programs(1) - 1) & (j == pl.num_programs(2) - 1)
    inverse = bl.unit_of(unit_ref[...])
    squared = var_ref[...] + jnp.float32(epsilon) * inverse * inverse
    rstd = jnp.where(squared <= 0, jnp.float32(0), lax.rsqrt(squared))

    def add(dscale, dbias):
        def each(group, here, mask, carry):
            x, dy = (ref[group, here, :].astype(jnp.float32) for ref in (x_ref, dy_ref))
            d = x * inverse
            d = d if mean_ref is None else d - mean_ref[...]
            # In this order: xhat is of the size of one, whatever that of x.
            dscale.block[...] += sm.fold(mask(dy * (d * rstd)))
            dbias.block[...] += sm.fold(mask(dy))
            return carry

        walk.each(walk.present(counts_ref, i, j), each, 0)

    sm.over_blocks(sums, (dscale_ref, dbias_ref), begins, ends, add)

    if rest_ref is not None:

        @pl.when(ends)
        def _():
            # Off every entry it would be rounded alike in all, which does not cancel in the sum.
            dscale_ref[...] -= rest_ref[...] * rstd * dbias_ref[...]
