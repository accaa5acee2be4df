"""Rows of any length on a Hopper GPU, read from memory as often as the arithmetic asks.

For rows that no bulk copy may bring, as their bytes are no multiple of 16, and for those too long
for registers. Threads load and store entries themselves, a block of a row at a time; the second
read of a row and those after it are of what the first left in a cache. The last block of a row
begins where it ends with the row, so that nothing past an end is touched: what it shares with the
block before is written twice, the same, by the same warpgroup, and counted once.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import row_arithmetic as arithmetic
from normax.kernels import row_passes as passes
from normax.kernels.mosaic_gpu_rows import LANES, PROCESSORS, REGISTERS, SHARED_BYTES, WARPS, Task

NARROW = 1024  # entries of a row that one warp does alone, at most
WIDEST = 16  # bytes that a thread loads at once
ENTRIES = 16  # of each array that a thread has at a time
OVERHEAD = 8192  # bytes of shared memory for sums on their way, and what is reserved


class Plan(NamedTuple):
    """Which warp reads what at a time: a line of each of `pieces`, side by side in a block."""

    rows: int
    length: int
    narrow: bool
    warpgroups: int
    lanes: int
    vector: int
    pieces: int
    programs: int
    sums_kept: bool

    @property
    def run(self) -> int:
        """Entries side by side that one warp has in a piece."""
        return self.lanes * self.vector

    @property
    def piece(self) -> int:
        """Entries of a row in a piece."""
        return self.run * (1 if self.narrow else WARPS)

    @property
    def block(self) -> int:
        """Entries of a row in a block."""
        return self.pieces * self.piece

    @property
    def whole(self) -> int:
        """Blocks of a row that share nothing."""
        return self.length // self.block

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.length // self.block)

    @property
    def at_once(self) -> int:
        """Rows that a program works on at a time."""
        return WARPS if self.narrow else 1


def make_plan(task: Task, rows: int, length: int, inputs: Sequence[Any], parameters: int) -> Plan:
    """Returns the plan for a task over rows, at least four of them if they are narrow."""
    narrow = length <= NARROW
    sizes = [jnp.dtype(dtype).itemsize for dtype in (*inputs, *task.outputs)]
    vector = max(v for v in (8, 4, 2, 1) if length % v == 0 and v * max(sizes) <= WIDEST)
    lanes = LANES
    while lanes * vector > length:
        vector, lanes = (vector // 2, lanes) if vector > 1 else (1, lanes // 2)
    pieces = min(8, ENTRIES // vector)
    piece = lanes * vector * (1 if narrow else WARPS)
    while pieces > 1 and piece * pieces > length:
        pieces //= 2
    warpgroups = 1
    while not narrow and warpgroups < 4 and length >= 2 * warpgroups * piece * pieces:
        warpgroups *= 2
    plan = Plan(rows, length, narrow, warpgroups, lanes, vector, pieces, 1, task.sums > 0)
    kept = 4 * task.sums * plan.blocks * pieces * WARPS * plan.run
    if kept + OVERHEAD > SHARED_BYTES:
        kept, plan = 0, plan._replace(sums_kept=False)
    per_thread = 48 + 2 * pieces * vector * (len(inputs) + parameters)
    share = REGISTERS // (LANES * WARPS * warpgroups * per_thread)
    share = max(1, min(8, share, SHARED_BYTES // (kept + OVERHEAD)))
    # No more programs than it takes: each leaves a row of sums.
    most = -(-rows // (plan.at_once * PROCESSORS * share))
    programs = -(-rows // (plan.at_once * most))
    return plan._replace(programs=max(1, min(rows // plan.at_once, programs)))


def launch(
    task: Task, inputs: Sequence[jax.Array], parameters: Sequence[jax.Array], interpret: bool
) -> list[jax.Array]:
    """Runs a task over rows; returns outputs, statistics of each row, and sums over the rows."""
    count, length = inputs[0].shape
    missing = max(0, WARPS - count) if length <= NARROW else 0
    inputs = [jnp.pad(x, ((0, missing), (0, 0))) for x in inputs]
    plan = make_plan(task, count + missing, length, [x.dtype for x in inputs], len(parameters))
    shape = (plan.rows, length)
    measured = task.statistics if plan.sums_kept or not task.sums else _numbers(task.rule)
    types = [jax.ShapeDtypeStruct(shape, dtype) for dtype in task.outputs]
    types += [jax.ShapeDtypeStruct((plan.rows,), jnp.float32)] * measured
    held = (task.sums, plan.blocks * plan.pieces, WARPS, plan.run)
    partial = held[:2] + held[2 + plan.narrow :]
    types += [jax.ShapeDtypeStruct((plan.programs, *partial), jnp.float32)] * plan.sums_kept
    scratch: list[Any] = [plgpu.SMEM(held, jnp.float32)] * plan.sums_kept
    if not plan.narrow:
        warps = WARPS * plan.warpgroups
        scratch.append(plgpu.SMEM((2, rows.ROUNDS, 2, warps), jnp.float32))
        scratch.append(plgpu.Barrier(num_arrivals=plan.warpgroups))
    threads = {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        functools.partial(_body, plan, task, len(inputs), len(parameters), measured, interpret),
        out_type=types,
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=f"{task.name}_long",
        interpret=rows._interpreter() if interpret else None,
        **(threads if plan.warpgroups > 1 else {}),
    )
    wide = [parameter.astype(jnp.float32) for parameter in parameters]
    if plan.narrow:
        wide = [jnp.broadcast_to(each, (WARPS, length)) for each in wide]
    results = list(call(*inputs, *wide))
    found = [each[:count] for each in results[: len(task.outputs) + measured]]
    if plan.sums_kept:
        found += _finish(plan, results[-1])
    elif task.sums:
        outputs, statistics = found[: len(task.outputs)], found[len(task.outputs) :]
        found = outputs + _sums_by_xla(task.rule, inputs[0], inputs[1], statistics)
    return found


def _finish(plan, partials):
    """Returns the sums over rows, each of the shape of a row."""
    # In one order, whichever program was first: the same bits each time.
    sums = partials.sum(0).reshape(partials.shape[1], -1)
    shared = plan.blocks * plan.block - plan.length
    cut = plan.whole * plan.block
    return list(jnp.concatenate([sums[:, :cut], sums[:, cut + shared :]], axis=1))


def _numbers(rule):
    """How many numbers of a row its xhat is made from."""
    return 1 + rule.units + 2 * rule.centered


def _sums_by_xla(rule, x, dy, statistics):
    """Returns dscale and dbias of rows too long for their sums to stay on chip."""
    statistics = iter(each[:, None] for each in statistics)
    found = passes.Measured(*[None] * 6)._replace(rstd=next(statistics))
    if rule.units:
        found = found._replace(per_unit=next(statistics))
    if rule.centered:
        found = found._replace(pivot=next(statistics), mean=next(statistics))
    [d] = passes.deviations(found, [x.astype(jnp.float32)])
    dy = dy.astype(jnp.float32)
    return [(dy * (d * found.rstd)).sum(0), dy.sum(0)]


def _body(plan, task, n_inputs, n_parameters, n_measured, interpret, *refs):
    counts = [n_inputs, n_parameters, len(task.outputs), n_measured, plan.sums_kept]
    counts.append(plan.sums_kept)
    inputs, parameters, outputs, statistics, partials, kept, exchange = rows._split(refs, counts)
    program = lax.axis_index("program")
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else 0
    layout = functools.partial(_layout, plan, interpret)
    steps = _share(plan.rows // plan.at_once, plan.rows % plan.at_once, program, plan.programs)
    mine = _share(plan.whole, plan.length % plan.block, group, plan.warpgroups)

    def at(number):
        """Returns where a block begins, and which of its entries no block before it has."""
        start = jnp.minimum(number * plan.block, plan.length - plan.block)
        return start, jnp.minimum(number, plan.whole) * plan.block

    def over_blocks(each, carry=()):
        return lax.fori_loop(0, mine, lambda i, c: each(group + i * plan.warpgroups, c), carry)

    def step(index, _):
        number = program + index * plan.programs
        row = jnp.minimum(number * plan.at_once, plan.rows - plan.at_once)
        new_row = jnp.minimum(number, plan.rows // plan.at_once) * plan.at_once
        total = rows.Totals(plan, layout, group, index, *exchange)
        places = functools.partial(_places, plan, row)

        def read(refs, rows_of, start, which):
            found = [_load(plan, interpret, layout, refs[which], p) for p in rows_of(start)]
            return [piece.astype(jnp.float32) for piece in found]

        def block_at(start, new):
            valid = [None] * plan.pieces
            if plan.length % plan.block:
                valid = [column >= new for column in _columns(plan, layout, start)]
            return passes.Block(
                functools.partial(read, inputs, places, start),
                functools.partial(read, parameters, functools.partial(_places, plan, None), start),
                valid,
            )

        def sweep(ops, each):
            def one(number, found):
                given = each(block_at(*at(number)))
                return [
                    arithmetic.combine(op, [sofar, arithmetic.combine(op, pieces)])
                    for op, sofar, pieces in zip(ops, found, given, strict=True)
                ]

            first = {"add": 0.0, "max": -jnp.inf}
            full = [layout(jnp.full((WARPS, plan.run), first[op], jnp.float32)) for op in ops]
            return over_blocks(one, full)

        def write(each):
            def one(number, _):
                start, new = at(number)
                block = block_at(start, new)
                made, shares = each(block)
                for pieces, ref in zip(made, outputs, strict=True):
                    for piece, place in zip(pieces, places(start), strict=True):
                        _store(plan, interpret, ref, place, piece.astype(ref.dtype))
                slot = jnp.minimum(number, plan.whole) * plan.pieces
                for which, pieces in enumerate(shares if kept else []):
                    pieces = arithmetic.present(task.rule._replace(valid=block.valid), pieces)
                    for k, piece in enumerate(_new_rows(plan, layout, row, new_row, pieces)):
                        line = kept[0].at[which, slot + k]
                        _put(line, _get(line, interpret, layout) + piece, interpret)
                return ()

            over_blocks(one)

        measured = task.passes(total, task.rule, sweep, write, not kept)
        if plan.narrow:
            for value, target in zip(measured, statistics, strict=True):
                _put(target.at[pl.ds(row, WARPS)], jnp.max(value, axis=1), interpret)
        else:
            pl.when(group == 0)(functools.partial(rows._leave, measured, statistics, row))
        return ()

    def over_kept(each):
        def one(number, _):
            for which in range(task.sums):
                for k in range(plan.pieces):
                    each(which, jnp.minimum(number, plan.whole) * plan.pieces + k)
            return ()

        over_blocks(one)

    def clear(which, slot):
        zero = layout(jnp.zeros((WARPS, plan.run), jnp.float32))
        _put(kept[0].at[which, slot], zero, interpret)

    def leave(which, slot):
        value = _get(kept[0].at[which, slot], interpret, layout)
        value = jnp.sum(value, axis=0) if plan.narrow else value
        _put(partials[0].at[program, which, slot], value, interpret)

    if kept:
        over_kept(clear)
    lax.fori_loop(0, steps, step, ())
    if kept:
        over_kept(leave)


def _share(whole, rest, index, among):
    """How many of `whole` parts one of a few has; a rest goes to who has the last of them."""
    if among == 1:
        return whole + (rest > 0)
    count = lax.div(whole - 1 - index, among) + 1
    return count + (index == (whole - 1) % among).astype(jnp.int32) if rest else count


def _layout(plan, interpret, value):
    """Gives a warp each line of a piece, and each lane entries side by side."""
    if interpret:
        return value
    repeated = (plgpu.Replicated(LANES // plan.lanes),) * (plan.lanes < LANES)
    return plgpu.layout_cast(
        value,
        plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, plan.run), (plan.vector,))),
            warp_dims=(-3,),
            lane_dims=((-2,) if plan.lanes > 1 else ()) + repeated,
            vector_dim=-1,
        ),
    )


def _places(plan, row, start):
    """Returns where in an array of rows, or in a parameter if there is no row, each piece is."""
    found = []
    for piece in range(plan.pieces):
        columns = pl.ds(start + piece * plan.piece, plan.piece)
        if plan.narrow:
            found.append((pl.ds(0 if row is None else row, WARPS), columns))
        else:
            found.append((columns,) if row is None else (row, columns))
    return found


def _columns(plan, layout, start):
    """Returns for each piece which entry of the row each of it is."""
    shape = (WARPS, plan.run)
    column = layout(lax.broadcasted_iota(jnp.int32, shape, 1)) + start
    if not plan.narrow:
        column += layout(lax.broadcasted_iota(jnp.int32, shape, 0)) * plan.run
    return [column + piece * plan.piece for piece in range(plan.pieces)]


def _new_rows(plan, layout, row, new, pieces):
    """Returns the pieces with zeros for the rows that the last but one step has had."""
    if not plan.narrow or not plan.rows % plan.at_once:
        return pieces
    line = layout(lax.broadcasted_iota(jnp.int32, (WARPS, plan.run), 0)) + row
    return [jnp.where(line >= new, piece, jnp.zeros_like(piece)) for piece in pieces]


def _load(plan, interpret, layout, ref, place):
    """Loads a piece from memory."""
    if interpret:
        return ref[place].reshape(WARPS, plan.run)
    ref = ref.at[place]
    return _get(ref if plan.narrow else ref.reshape(WARPS, plan.run), interpret, layout)


def _store(plan, interpret, ref, place, value):
    """Stores a piece to memory."""
    if interpret:
        ref[place] = value if plan.narrow else value.reshape(-1)
        return
    ref = ref.at[place]
    _put(ref if plan.narrow else ref.reshape(WARPS, plan.run), value, interpret)


def _get(ref, interpret, layout):
    if interpret:
        return ref[...]
    # An index is asked for before JAX 0.11, and deprecated or refused from then on.
    index = inspect.signature(plgpu.load).parameters.get("idx")
    index = [...] if index is not None and index.default is index.empty else []
    return layout(plgpu.load(ref, *index, optimized=False))


def _put(ref, value, interpret):
    # Before JAX 0.12 there is no `store`, and no need of it: nothing was refused as slow.
    store = None if interpret else getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)
