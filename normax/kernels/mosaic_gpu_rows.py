"""How rows come to a Hopper GPU's registers and leave them: plans, copies, sums over threads.

A program of one or more warpgroups runs through rows of its own. While it works on some, the bulk
copy engine brings the next into shared memory. A row is split over the warps of a program ("wide"),
or, if it is short, each warp has one of its own ("narrow"): then no warp waits for another.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from normax.kernels import row_arithmetic as arithmetic

WARPS = 4  # of a warpgroup
LANES = 32
PROCESSORS = 132  # of an H100 or H200; elsewhere the programs are a few more or fewer
ENTRIES = 32  # of a row that a thread may have
REGISTERS = 65536  # of a processor
SHARED_BYTES = 227 * 1024  # of a processor, for the programs on it
MOST_STAGES = 4
ROUNDS = 3  # of sums over a row, at most


class Task(NamedTuple):
    """A kernel over rows.

    `work` gets totals, the rule, and inputs, parameters and sums so far as pieces. It returns the
    pieces of each output, the statistics of the row and the new sums. `arrays` is how many arrays
    of the size of a row it keeps in registers. `passes` is the same for a row that is not kept.
    """

    name: str
    rule: arithmetic.Rule
    work: Callable
    passes: Callable
    arrays: int
    outputs: tuple[Any, ...]
    statistics: int = 0
    sums: int = 0


class Plan(NamedTuple):
    """Which thread has which entries of which row."""

    rows: int
    length: int
    narrow: bool
    warpgroups: int
    vector: int
    pieces: int
    programs: int
    stages: int
    shared: int

    @property
    def run(self) -> int:
        """Entries side by side that one warp has in a piece."""
        return LANES * self.vector

    @property
    def room(self) -> int:
        """Entries that the pieces have room for."""
        return self.pieces * self.run * (1 if self.narrow else WARPS * self.warpgroups)

    @property
    def at_once(self) -> int:
        """Rows that a program works on at a time."""
        return WARPS if self.narrow else 1

    @property
    def steps(self) -> int:
        """How many times a program would work to do all rows."""
        return -(-self.rows // self.at_once)


def make_plan(task: Task, rows: int, length: int, inputs: Sequence[Any], parameters: int) -> Plan:
    """Returns the plan for a task over rows; `shared` is what it needs, above the limit or not."""
    narrow = length <= LANES * ENTRIES
    warpgroups = 1
    while not narrow and length > LANES * WARPS * ENTRIES * warpgroups:
        warpgroups *= 2
    threads = LANES * (1 if narrow else WARPS * warpgroups)
    # The widest of what wastes the least.
    vector = min((4, 2, 1), key=lambda vector: -(-length // (threads * vector)) * vector)
    if not narrow and length % (threads * vector):
        vector = 4
    pieces = -(-length // (threads * vector))
    held = pieces * vector * threads * (WARPS if narrow else 1)
    stage = held * sum(jnp.dtype(dtype).itemsize for dtype in inputs)
    fixed = held * (4 * parameters + sum(jnp.dtype(dtype).itemsize for dtype in task.outputs))
    fixed += 4096  # barriers, sums on their way, what is reserved
    per_thread = 48 + 5 * pieces * vector * task.arrays // 4
    share = max(1, min(8, REGISTERS // (LANES * WARPS * warpgroups * per_thread)))
    while share > 1 and (fixed + 2 * stage) * share > SHARED_BYTES:
        share -= 1
    stages = max(2, min(MOST_STAGES, (SHARED_BYTES // share - fixed) // stage))
    programs = max(1, min(-(-rows // (WARPS if narrow else 1)), PROCESSORS * share))
    shared = fixed + stages * stage
    return Plan(rows, length, narrow, warpgroups, vector, pieces, programs, stages, shared)


def launch(
    plan: Plan, task: Task, inputs: Sequence[jax.Array], parameters, interpret: bool
) -> list[jax.Array]:
    """Runs a task over rows; returns outputs, statistics of each row, and sums over the rows."""
    inputs = [_view(plan, x) for x in inputs]
    types = [jax.ShapeDtypeStruct(inputs[0].shape, dtype) for dtype in task.outputs]
    per_row = (plan.steps * plan.at_once,)
    types += [jax.ShapeDtypeStruct(per_row, jnp.float32)] * task.statistics
    held = (plan.warpgroups, plan.pieces, WARPS, plan.run)
    partial = (plan.programs, task.sums, *(held[1::2] if plan.narrow else held))
    types += [jax.ShapeDtypeStruct(partial, jnp.float32)] * (task.sums > 0)
    copies = len(inputs) * len(list(_runs(plan, 0, 0)))
    scratch = [
        [plgpu.SMEM((plan.stages, *held), x.dtype) for x in inputs],
        [plgpu.SMEM(held, jnp.float32) for _ in parameters],
        [plgpu.SMEM(held, dtype) for dtype in task.outputs],
        [plgpu.SMEM((WARPS,), jnp.float32) for _ in range(task.statistics * plan.narrow)],
        plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages * plan.warpgroups),
        plgpu.Barrier(num_arrivals=max(1, len(parameters)), num_barriers=plan.warpgroups),
    ]
    if not plan.narrow:
        warps = WARPS * plan.warpgroups
        scratch.append(plgpu.SMEM((2, ROUNDS, 2, warps), jnp.float32))
        scratch.append(plgpu.Barrier(num_arrivals=plan.warpgroups))
    threads = {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        functools.partial(_body, plan, task, len(inputs), len(parameters), interpret),
        out_type=types,
        scratch_types=scratch,
        grid=(plan.programs,),
        grid_names=("program",),
        # Lane: layouts are as written here, on every version; barriers: written here too.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=task.name,
        interpret=_interpreter() if interpret else None,
        **(threads if plan.warpgroups > 1 else {}),
    )
    return _finish(plan, task, list(call(*inputs, *(_laid_out(plan, p) for p in parameters))))


def _view(plan, x):
    """Returns an array of rows as the copies address it."""
    if plan.narrow or plan.room != plan.length:
        return x.reshape(plan.rows, plan.length)
    return x.reshape(plan.rows, plan.warpgroups, plan.pieces, WARPS, plan.run)


def _laid_out(plan, parameter):
    """Returns a scale or bias in float32, laid out as the pieces of a row are."""
    parameter = jnp.pad(parameter.astype(jnp.float32), (0, plan.room - plan.length))
    if not plan.narrow:
        return parameter.reshape(plan.warpgroups, plan.pieces, WARPS, plan.run)
    shape = (1, plan.pieces, WARPS, plan.run)
    return jnp.broadcast_to(parameter.reshape(1, plan.pieces, 1, plan.run), shape)


def _finish(plan, task, results):
    """Returns the results in the shapes of the caller, the sums in float32."""
    count = len(task.outputs)
    outputs = [y.reshape(plan.rows, plan.length) for y in results[:count]]
    outputs += [each[: plan.rows] for each in results[count : count + task.statistics]]
    if task.sums:
        # In one order, whichever program was first: the same bits each time.
        sums = results[-1].sum(0).reshape(task.sums, plan.room)
        outputs += list(sums[:, : plan.length])
    return outputs


def _interpreter():
    """Returns what asks for Mosaic GPU's own interpreter: of it JAX 0.10 has no public name."""
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams()


def _body(plan, task, n_inputs, n_parameters, interpret, *refs):
    counts = [n_inputs, n_parameters, len(task.outputs), task.statistics, int(task.sums > 0)]
    inputs, parameters, outputs, statistics, partials, scratch = _split(refs, counts)
    arriving, gains, leaving, measures, arrived, gains_arrived, *exchange = scratch
    program = lax.axis_index("program")
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else 0
    layout = functools.partial(_layout, plan, interpret)
    steps = lax.div(plan.steps - 1 - program, plan.programs) + 1

    def fetch(step):
        slot, place = lax.rem(step, plan.stages), program + step * plan.programs
        for source, target in zip(inputs, arriving, strict=True):
            for there, here in _runs(plan, place, group):
                barrier = arrived.at[group * plan.stages + slot]
                plgpu.copy_gmem_to_smem(source.at[there], target.at[(slot, group, *here)], barrier)

    def load(ref, *slot):
        rows = [layout(ref[(*slot, group, piece)]) for piece in range(plan.pieces)]
        return [piece.astype(jnp.float32) for piece in rows]

    def step(index, sums):
        ahead = index + plan.stages - 1
        pl.when(ahead < steps)(lambda: fetch(ahead))
        slot, place = lax.rem(index, plan.stages), program + index * plan.programs
        plgpu.barrier_wait(arrived.at[group * plan.stages + slot])
        total = Totals(plan, layout, group, index, *exchange)
        loaded, given = [load(ref, slot) for ref in arriving], [load(ref) for ref in gains]
        rule = task.rule._replace(valid=_valid(plan, group, layout))
        made, measured, sums = task.work(total, rule, loaded, given, sums)
        # What left last time has to be gone before its place is written again.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for output, target in zip(made, leaving, strict=True):
            for piece, value in enumerate(output):
                target[group, piece] = value.astype(target.dtype)
        if plan.narrow:
            for value, target in zip(measured, measures, strict=True):
                target[...] = jnp.max(value, axis=1)
        # All warps have read their entries by now, so that the next copy may overwrite them.
        plgpu.commit_smem()
        for source, target in zip(leaving, outputs, strict=True):
            _depart(plan, place, group, source, target)
        if plan.narrow:
            for source, target in zip(measures, statistics, strict=True):
                plgpu.copy_smem_to_gmem(source, target.at[pl.ds(place * WARPS, WARPS)])
        else:
            pl.when(group == 0)(functools.partial(_leave, measured, statistics, place))
        return sums

    for source, target in zip(parameters, gains, strict=True):
        plgpu.copy_gmem_to_smem(source.at[group], target.at[group], gains_arrived.at[group])
    for early in range(plan.stages - 1):
        pl.when(early < steps)(functools.partial(fetch, early))
    if parameters:
        plgpu.barrier_wait(gains_arrived.at[group])
    zero = layout(jnp.zeros((WARPS, plan.run), jnp.float32))
    sums = lax.fori_loop(0, steps, step, [[zero] * plan.pieces for _ in range(task.sums)])
    for index, of_row in enumerate(sums):
        for piece, value in enumerate(of_row):
            if plan.narrow:
                partials[0][program, index, piece] = jnp.sum(value, axis=0)
            else:
                partials[0][program, index, group, piece] = value
    plgpu.wait_smem_to_gmem(0)


def _depart(plan, place, group, source, target):
    """Copies what a warpgroup has of an output to memory."""
    if plan.narrow or plan.room == plan.length:
        for there, here in _runs(plan, place, group):
            plgpu.copy_smem_to_gmem(source.at[(group, *here)], target.at[there])
        return
    # A copy of a single run ends where the array does, not where the row does: so it is cut short.
    for number in range(plan.warpgroups):
        first = number * plan.pieces * WARPS
        sizes = [plan.length - (first + run) * plan.run for run in range(plan.pieces * WARPS)]
        sizes = [min(size, plan.run) for size in sizes if size > 0]

        def copy(first=first, sizes=sizes):
            for run, size in enumerate(sizes):
                here = source.at[group, run // WARPS, run % WARPS, pl.ds(0, size)]
                there = target.at[place, pl.ds((first + run) * plan.run, size)]
                plgpu.copy_smem_to_gmem(here, there)

        if plan.warpgroups == 1:
            copy()
        else:
            pl.when(group == number)(copy)


def _leave(measured, statistics, place):
    for value, target in zip(measured, statistics, strict=True):
        target[place] = value


def _split(refs, counts):
    parts = []
    for count in counts:
        parts.append(refs[:count])
        refs = refs[count:]
    return *parts, refs


def _layout(plan, interpret, value):
    """Gives a warp each line of a piece, and each lane entries side by side."""
    if interpret:
        return value
    tiling = plgpu.Tiling(((WARPS, plan.run), (plan.vector,)))
    places = {"warp_dims": (-3,), "lane_dims": (-2,), "vector_dim": -1}
    return plgpu.layout_cast(value, plgpu.Layout.TILED(tiling, **places))


def _runs(plan, place, group):
    """Yields where each copy begins, in memory and in what a warpgroup holds.

    What lies past the end of the array comes as zeros.
    """
    # Where it sees that a run ends past the end, JAX refuses; so the run begins at a variable.
    zero = place * 0
    for piece in range(plan.pieces):
        if plan.narrow:
            rows, columns = pl.ds(place * WARPS, WARPS), pl.ds(zero + piece * plan.run, plan.run)
            yield (rows, columns), (piece,)
        elif plan.room != plan.length:
            for warp in range(WARPS):
                start = zero + ((group * plan.pieces + piece) * WARPS + warp) * plan.run
                yield (place, pl.ds(start, plan.run)), (piece, warp)
        elif piece == 0:
            yield (place, group), ()


def _valid(plan, group, layout):
    """Returns for each piece where it is row, None for all of it."""
    found = []
    for piece in range(plan.pieces):
        lines = 1 if plan.narrow else WARPS
        last = ((plan.warpgroups - 1) * plan.pieces + piece + 1) * lines * plan.run
        if last <= plan.length:
            found.append(None)
            continue
        shape = (WARPS, plan.run)
        column = layout(lax.broadcasted_iota(jnp.int32, shape, 1)) + piece * lines * plan.run
        if not plan.narrow:
            column += layout(lax.broadcasted_iota(jnp.int32, shape, 0)) * plan.run
            column += group * (plan.pieces * lines * plan.run)
        found.append(column < plan.length)
    return found


class Totals:
    """Sums over a row. Of a wide one, warps leave theirs in shared memory and wait for all.

    Rows take turns between two halves of it: a warp that is late may still read the other.
    """

    def __init__(self, plan, layout, group, index, shared: Any = None, barrier: Any = None):
        """Begins the sums of the row at `index`."""
        self.plan, self.layout, self.group = plan, layout, group
        self.half = lax.rem(index, 2)
        self.shared, self.barrier = shared, barrier
        self.round = 0

    def __call__(self, wanted):
        """Returns the totals of a few (operation, pieces), in one exchange."""
        own = [self._of_warps(op, pieces) for op, pieces in wanted]
        if self.plan.narrow:
            shape = (WARPS, self.plan.run)
            return [self.layout(lax.broadcast_in_dim(value, shape, (0,))) for value in own]
        for index, value in enumerate(own):
            warps = pl.ds(self.group * WARPS, WARPS)
            self.shared[self.half, self.round, index, warps] = value
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        warps = range(WARPS * self.plan.warpgroups)
        found = [
            arithmetic.combine(
                op, [self.shared[self.half, self.round, index, warp] for warp in warps]
            )
            for index, (op, _) in enumerate(wanted)
        ]
        self.round += 1
        return found

    def _of_warps(self, op, pieces):
        reduce = {"add": jnp.sum, "max": jnp.max}[op]
        return reduce(arithmetic.combine(op, pieces), axis=1)
