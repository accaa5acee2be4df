"""How a block of groups comes to a Hopper GPU's shared memory, stays there, and leaves.

A thread has the same features in each of its pieces: it adds them up by itself, and threads meet
once for a sum, in shared memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import row_arithmetic as arithmetic
from normax.kernels.deferred import INDEX, Deferred
from normax.kernels.mosaic_gpu_slab_plans import AT_ONCE, BOX, THREADS, Plan


class Task(NamedTuple):
    """A kernel over slabs.

    `work` gets totals, the rule, and inputs and parameters as pieces; it returns the pieces of the
    output and those to be added up over lines, feature by feature. `dtype` is the output's.
    """

    name: str
    rule: arithmetic.Rule
    work: Callable
    dtype: Any
    activated: bool
    sums: int = 0


def launch(plan: Plan, task: Task, inputs: Sequence[jax.Array], parameters, interpret: bool):
    """Runs a task over x, and what has its shape; returns the output and sums, (sums, G, K)."""
    examples, positions, groups, size = plan.shape
    features = groups * size
    flat = (examples, positions, features)
    types = [jax.ShapeDtypeStruct(flat, task.dtype)]
    if task.sums:
        partial = (examples, task.sums, features)
        types.append(jax.ShapeDtypeStruct(partial, jnp.float32))
    held, threads = (plan.room, plan.width), plan.warpgroups
    piece = plan.lines * plan.width
    scratch = [
        [plgpu.SMEM(held, x.dtype) for x in inputs],
        [plgpu.SMEM(held, task.dtype)] * (not plan.in_place),
        plgpu.SMEM((AT_ONCE, threads, piece + plan.columns), jnp.float32),
        plgpu.SMEM((AT_ONCE, threads, plan.reach), jnp.float32),
        plgpu.SMEM((AT_ONCE, threads, plan.columns), jnp.float32),
        plgpu.Barrier(num_arrivals=len(inputs) * -(-positions // BOX)),
    ]
    if threads > 1:
        scratch.append(plgpu.SMEM((2, AT_ONCE, threads, plan.columns), jnp.float32))
        scratch.append(plgpu.Barrier(num_arrivals=threads))
    named = {"num_threads": threads, "thread_name": "warpgroup"}
    call = plgpu.kernel(
        functools.partial(_body, plan, task, len(inputs), len(parameters), interpret),
        out_type=types,
        scratch_types=scratch,
        grid=(examples * plan.blocks,),
        grid_names=("program",),
        # As for rows: layouts and barriers are as written here, on every version.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=task.name,
        interpret=rows._interpreter() if interpret else None,
        **(named if threads > 1 else {}),
    )
    laid_out = [_laid_out(plan, parameter) for parameter in parameters]
    output, *partials = call(*(x.reshape(flat) for x in inputs), *laid_out)
    # In one order, whichever program was first: the same bits each time.
    sums = [each.sum(0).reshape(task.sums, groups, size) for each in partials]
    return output.reshape(plan.shape), *sums


def _laid_out(plan, parameter):
    """Returns a scale or bias in float32, for each block laid out as a piece is."""
    parameter = parameter.astype(jnp.float32).reshape(plan.blocks, 1, plan.width)
    return jnp.broadcast_to(parameter, (plan.blocks, plan.lines, plan.width))


def _boxes(plan, sizes):
    """Returns where the lines of each copy begin, and how many they are.

    Those of the last one may end past the end: they come as zeros, and are not written.
    """
    positions = plan.shape[1]
    # A copy is of a multiple of as many bytes as a warpgroup has threads.
    whole = max(THREADS // math.gcd(THREADS, plan.width * size) for size in sizes)
    starts = range(0, positions, BOX)
    return [(start, min(BOX, -(-(positions - start) // whole) * whole)) for start in starts]


def _body(plan, task, n_inputs, n_parameters, interpret, *refs):
    counts = [n_inputs, n_parameters, 1, int(task.sums > 0)]
    inputs, parameters, [output], partials, scratch = rows._split(refs, counts)
    arriving, leaving, dealt, totals, folded, arrived, *crossing = scratch
    program = lax.axis_index("program")
    group = lax.axis_index("warpgroup") if plan.warpgroups > 1 else 0
    example, block = lax.div(program, plan.blocks), lax.rem(program, plan.blocks)
    layout = functools.partial(_layout, plan, interpret)
    features = pl.ds(block * plan.width, plan.width)
    sizes = [jnp.dtype(ref.dtype).itemsize for ref in (*inputs, output)]
    # Where it sees that a copy ends past the end, JAX refuses; so it begins at a variable.
    boxes = [(start + block * 0, lines) for start, lines in _boxes(plan, sizes)]

    def first(function):
        return pl.when(group == 0)(function) if plan.warpgroups > 1 else function()

    @first
    def _():
        for source, target in zip(inputs, arriving, strict=True):
            for start, lines in boxes:
                there = source.at[example, pl.ds(start, lines), features]
                plgpu.copy_gmem_to_smem(there, target.at[pl.ds(start, lines)], arrived)

    given = [layout(ref[block]) for ref in parameters]
    plgpu.barrier_wait(arrived)
    slab = Slab(plan, group, layout)
    total = Totals(slab, dealt, totals, folded, *crossing)
    rule = task.rule._replace(valid=slab.valid)
    loaded = [slab.pieces_of(ref) for ref in arriving]
    pieces = [[one] * len(slab.valid) for one in given]
    made, sums = task.work(total, rule, loaded, pieces)
    [target] = leaving or arriving[:1]
    added = slab.finish(made, target, sums)
    plgpu.commit_smem()
    if sums:
        total.by_feature(added, ["add"] * len(sums))
        plgpu.commit_smem()
    elif plan.warpgroups > 1:
        total.meet()

    @first
    def _():
        for start, lines in boxes:
            there = output.at[example, pl.ds(start, lines), features]
            plgpu.copy_smem_to_gmem(target.at[pl.ds(start, lines)], there)
        for index in range(len(sums)):
            source = totals.at[index, 0, pl.ds(0, plan.width)]
            plgpu.copy_smem_to_gmem(source, partials[0].at[example, index, features])
        plgpu.wait_smem_to_gmem(0)


def _layout(plan, interpret, value):
    """Gives the threads of a warpgroup entries side by side, one thread after the other."""
    if interpret:
        return value
    layout = plgpu.Layout.WG_STRIDED(value.shape, vec_size=plan.vector)
    return plgpu.layout_cast(value, layout)


class Slab:
    """What a warpgroup has of a slab: the pieces of its loops, and those it holds."""

    def __init__(self, plan, group, layout):
        """Tells which entries of the held pieces are there."""
        self.plan, self.group, self.layout = plan, group, layout
        self.shape = (plan.lines, plan.width)
        self.feature = layout(lax.broadcasted_iota(jnp.int32, self.shape, 1))
        looped = plan.together * (plan.iterations > 0)
        self.held = range(plan.iterations * plan.together, plan.pieces)
        self.valid = [None] * (looped + len(self.held))
        self.ragged = plan.room > plan.shape[1]
        if self.ragged:
            line = layout(lax.broadcasted_iota(jnp.int32, self.shape, 0))
            self.valid[-1] = line < plan.shape[1] - self.start(plan.pieces - 1)

    def start(self, piece):
        """Returns the line of a piece."""
        return (piece * self.plan.warpgroups + self.group) * self.plan.lines

    def pieces_of(self, ref):
        """Returns the pieces of what lies in shared memory."""

        def load(piece):
            value = self.layout(ref[pl.ds(self.start(piece), self.plan.lines)])
            return value.astype(jnp.float32)

        together = self.plan.together
        pieces: list[Any] = [
            Deferred(lambda index, one=one: load(index * together + one), INDEX)
            for one in range(together * (self.plan.iterations > 0))
        ]
        pieces += [load(piece) for piece in self.held]
        if self.ragged:
            # Not all of it was copied there: it may be anything.
            pieces[-1] = jnp.where(self.valid[-1], pieces[-1], jnp.zeros(self.shape, jnp.float32))
        return pieces

    def reduce(self, wanted):
        """Returns for each (operation, pieces) one piece, the pieces combined."""

        def combined(index, sofar):
            met: dict[int, Any] = {}
            return [
                arithmetic.combine(op, [old, *(piece.at(index, met) for piece in _looped(pieces))])
                for old, (op, pieces) in zip(sofar, wanted, strict=True)
            ]

        found = self.loop(combined, [op for op, _ in wanted])
        return [
            arithmetic.combine(op, [*found[index : index + 1], *_held(pieces)])
            for index, (op, pieces) in enumerate(wanted)
        ]

    def loop(self, function, operations):
        """Runs the loop, if there is one, with a piece for each operation, its neutral at first."""
        if not self.plan.iterations:
            return []
        neutral = {"add": 0.0, "max": -jnp.inf}
        start = [self.layout(jnp.full(self.shape, neutral[op], jnp.float32)) for op in operations]
        return lax.fori_loop(0, self.plan.iterations, function, start)

    def finish(self, made, target, sums):
        """Writes the pieces of the output, and returns the sums over pieces, in one loop."""

        def write(piece, value):
            place = pl.ds(self.start(piece), self.plan.lines)
            target[place] = value.astype(target.dtype)

        def step(index, sofar):
            met: dict[int, Any] = {}
            for one, piece in enumerate(_looped(made)):
                write(index * self.plan.together + one, piece.at(index, met))
            return [
                arithmetic.combine("add", [old, *(piece.at(index, met) for piece in _looped(each))])
                for old, each in zip(sofar, sums, strict=True)
            ]

        found = self.loop(step, ["add"] * len(sums))
        for piece, value in zip(self.held, _held(made), strict=True):
            write(piece, value)
        return [
            arithmetic.combine("add", [*found[index : index + 1], *_held(each)])
            for index, each in enumerate(sums)
        ]


def _looped(pieces):
    return [piece for piece in pieces if isinstance(piece, Deferred)]


def _held(pieces):
    return [piece for piece in pieces if not isinstance(piece, Deferred)]


class Totals:
    """Sums over the groups of a slab, spread over the entries of a piece."""

    def __init__(self, slab, dealt, totals, folded, columns: Any = None, barrier: Any = None):
        """Begins the sums of a slab."""
        self.slab, self.dealt, self.totals, self.folded = slab, dealt, totals, folded
        self.columns, self.barrier = columns, barrier
        self.round = 0

    def __call__(self, wanted):
        """Returns the totals of a few (operation, pieces), in one exchange."""
        operations = [op for op, _ in wanted]
        self.by_feature(self.slab.reduce(wanted), operations)
        plgpu.commit_smem()
        plan, group = self.slab.plan, self.slab.group
        if plan.groups == 1 or plan.shape[3] == 1:
            return [self._of_groups(self.totals, index, op) for index, op in enumerate(operations)]
        for index, op in enumerate(operations):
            # Each thread as if a group began with its feature, which one of a few does.
            features = [
                self.totals[index, group, pl.ds(feature, plan.columns)]
                for feature in range(plan.shape[3])
            ]
            self.folded[index, group] = arithmetic.combine(op, features)
        plgpu.commit_smem()
        return [self._of_groups(self.folded, index, op) for index, op in enumerate(operations)]

    def meet(self):
        """Waits for the other warpgroups."""
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)

    def by_feature(self, pieces, operations):
        """Leaves for each piece the totals of its features, of all warpgroups."""
        plan, group = self.slab.plan, self.slab.group
        length = plan.lines * plan.width
        for index, piece in enumerate(pieces):
            self.dealt[index, group, pl.ds(0, length)] = piece.reshape(length)
        plgpu.commit_smem()
        for index, op in enumerate(operations):
            # A warpgroup reads a line, and of the next what it has no feature for.
            lines = [
                self.dealt[index, group, pl.ds(line * plan.width, plan.columns)]
                for line in range(plan.lines)
            ]
            own = arithmetic.combine(op, lines)
            if plan.warpgroups == 1:
                self.totals[index, group, pl.ds(0, plan.columns)] = own
            else:
                self.columns[self.round % 2, index, group] = own
        if plan.warpgroups > 1:
            self.meet()
            for index, op in enumerate(operations):
                # In turns: a warpgroup that is late may still read those of the last exchange.
                each = self.columns.at[self.round % 2, index]
                own = arithmetic.combine(op, [each[other] for other in range(plan.warpgroups)])
                self.totals[index, group, pl.ds(0, plan.columns)] = own
        self.round += 1

    def _of_groups(self, source, index, op):
        """Returns the totals of the groups, each where the entries of its group are."""
        slab, plan = self.slab, self.slab.plan
        size = plan.shape[3]
        found: Any = None
        for number in range(plan.groups):
            features = range(size) if plan.groups == 1 else [number * size]
            one = arithmetic.combine(op, [source[index, slab.group, each] for each in features])
            found = jnp.where(slab.feature >= number * size, one, found) if number else one
        return found
