"""What the TPU kernels share: sizes of blocks, units, and the call."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
BUFFERS = 8 * 2**20  # bytes for the blocks that are in flight, of the 16 MiB that v5e lends
DTYPES = ("bfloat16", "float32")


def unsupported_dtype(dtype: Any) -> str | None:
    """Returns why Mosaic cannot read or write a dtype, or None."""
    if np.dtype(dtype).name in DTYPES:
        return None
    return f"dtype {np.dtype(dtype).name}: the TPU kernels take {' and '.join(DTYPES)}"


def unsupported_shape(shape: tuple[Any, ...]) -> str | None:
    """Returns why the kernels cannot walk a shape, or None."""
    if not shape:
        return "shape (): the TPU kernels work along the last axis"
    if not is_static(shape[-1]):
        return f"row length {shape[-1]}: the TPU kernels need a number"
    return "row length 0: the TPU kernels need an entry" if shape[-1] == 0 else None


def padded(length: int) -> int:
    """Returns a row's length in VMEM."""
    return pl.cdiv(length, LANES) * LANES


def power_below(number: int) -> int:
    """Returns the largest power of two that is not above a number of one or more."""
    return 1 << (number.bit_length() - 1)


def is_static(size: Any) -> bool:
    """Returns whether a dimension is a number, not a symbol of jax.export."""
    return isinstance(size, int)


def grouped(shape: tuple[Any, ...]) -> tuple[Any, Any, int]:
    """Returns a shape as groups of rows, in which it lies in memory as it is.

    Rows are tiled by eight: where the last axis but one is no multiple of that, to join it with
    those before it is to copy the array. Groups of a few registers are not worth a step each.
    """
    *leading, rows, length = (1, *shape) if len(shape) == 1 else shape
    fits = is_static(rows) and (rows % SUBLANES == 0 or rows == 1)
    small = is_static(rows) and rows * padded(length) < 4 * SUBLANES * LANES
    if leading and not (fits or small):
        return math.prod(leading), rows, length
    return 1, math.prod(shape[:-1]), length


class Walk(NamedTuple):
    """How groups of rows are walked: blocks of groups and rows, and chunks of a group's rows."""

    groups: int
    block: int
    chunk: int
    across: bool = False  # whether rows lie side by side

    @classmethod
    def over(cls, shape: tuple[Any, Any, int], width: int, moved: int, entries: int) -> "Walk":
        """Returns the walk with `moved` bytes an entry in flight in two buffers."""
        held = max(SUBLANES, power_below(BUFFERS // (2 * moved * padded(width))))
        groups, rows, _ = shape
        block = held
        if is_static(rows):
            block = min(held, max(SUBLANES, 2 * power_below(max(1, rows - 1))))
        together = held // block
        chunk = max(SUBLANES, power_below(max(1, entries // padded(width))))
        together = min(together, groups) if is_static(groups) else together
        return cls(together, block, min(chunk, block))

    def grid(self, shape: tuple[Any, Any, int]) -> tuple[Any, Any]:
        """Returns how many blocks there are."""
        return pl.cdiv(shape[0], self.groups), pl.cdiv(shape[1], self.block)

    def present(self, counts: Any, i: Any, j: Any) -> tuple[Any, Any]:
        """Returns how many groups and rows of block (i, j) there are."""
        groups = jnp.minimum(counts[0] - i * self.groups, self.groups)
        return groups, jnp.minimum(counts[1] - j * self.block, self.block)

    def each(self, present: tuple[Any, Any], body: Callable, carry: Any) -> Any:
        """Folds `body(group, rows, mask, carry)` over the chunks of what is present in a block.

        The mask makes zero of what hangs over the end.
        """
        groups, rows = present

        def step(group, masked):
            def run(i, carry):
                here = pl.ds(pl.multiple_of(i * self.chunk, self.chunk), self.chunk)

                def mask(v):
                    if not masked:
                        return v
                    row = lax.broadcasted_iota(jnp.int32, v.shape, int(self.across))
                    row += i * self.chunk
                    return jnp.where(row < rows, v, jnp.float32(0))

                return body(group, here, mask, carry)

            return run

        def over_group(group, carry):
            whole = lax.div(rows, self.chunk)
            end = lax.div(rows + self.chunk - 1, self.chunk)
            carry = lax.fori_loop(0, whole, step(group, False), carry)
            return lax.fori_loop(whole, end, step(group, True), carry)

        if self.groups == 1:
            return over_group(0, carry)
        return lax.fori_loop(0, groups, over_group, carry)


def inverse_unit(peak: jax.Array, least: int | None = None) -> jax.Array:
    """Returns one over the unit for entries up to `peak`, a power of two, from bits alone.

    The unit is the peak's power of two over 2^50, not below one; squares of entries in it are in
    range. `least`: the peak's power itself, not below 2^-least, so that small entries can be
    squared too.
    """
    exponent = lax.bitcast_convert_type(peak, jnp.int32) >> 23
    if least is None:
        field = jnp.minimum(127 + 50 + 127 - exponent, 127)
    else:
        field = jnp.clip(254 - exponent, 27, 127 + least)
    return lax.bitcast_convert_type(field << 23, jnp.float32)


def unit_of(inverse: jax.Array) -> jax.Array:
    """Returns one over a power of two, exactly."""
    bits = lax.bitcast_convert_type(inverse, jnp.int32)
    return lax.bitcast_convert_type((254 << 23) - bits, jnp.float32)


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the arrays, all varying over the mesh axes of shard_map that any of them does."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    missing = [tuple(sorted(union - own)) for own in varying]
    return [
        lax.pcast(array, axes, to="varying") if axes else array
        for array, axes in zip(arrays, missing, strict=True)
    ]


# Else the numbers of blocks, which are of 32 bits, would meet integers of 64.
@jax.enable_x64(False)
def call(
    kernel: Callable,
    outputs: Sequence[tuple[tuple[Any, ...], Any]],
    *operands: jax.Array,
    name: str,
    flops: int,
    interpret: Any,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    **options: Any,
) -> Any:
    """Calls a kernel on the TPU, or interprets it; `flops` is per entry of the first operand."""
    operands = tuple(alike(*operands))
    kind = jax.typeof(operands[0]).manual_axis_type
    shapes = [jax.ShapeDtypeStruct(*output, manual_axis_type=kind) for output in outputs]
    arrays = [*operands, *shapes]
    cost = None
    if all(is_static(size) for array in arrays for size in array.shape):
        size = math.prod(operands[0].shape)
        moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        cost = pl.CostEstimate(flops=flops * size, bytes_accessed=moved, transcendentals=0)
    return pl.pallas_call(
        kernel,
        shapes,
        name=name,
        interpret=interpret,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        **options,
    )(*operands)


def counts_of(shape: tuple[Any, Any, int]) -> jax.Array:
    """Returns how many groups and rows there are as an operand for SMEM, symbols included."""
    # Computed, not a constant: `custom_partitioning` takes no function that has one.
    return jnp.concatenate([jnp.full(1, size, jnp.int32) for size in shape[:2]])


IN_SMEM = functools.partial(pl.BlockSpec, memory_space=pltpu.SMEM)


def taken(refs: list[Any], *present: bool) -> list[Any]:
    """Takes from the front of the refs those that are there; the others are None."""
    return [refs.pop(0) if there else None for there in present]
