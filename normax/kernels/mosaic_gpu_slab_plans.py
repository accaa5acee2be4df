"""How the features of an example are dealt out to programs of a Hopper GPU, and to their threads.

A program has one example and a block of whole groups: a slab of `positions` lines, each of them the
block's features side by side. Threads have entries of it by their place in memory: a piece is as
many whole lines as give every thread of a warpgroup the same features in each piece, whatever their
number.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from normax.kernels import mosaic_gpu_rows as rows

THREADS = 128  # of a warpgroup
ALIGNMENT = 16
BOX = 256  # entries along an axis that a copy may have
AT_ONCE = 2  # sums in one exchange
MOST_SLOTS = 20  # entries of a piece that a thread may have
MOST_REGISTERS = 200  # of a thread, estimated
# Whether a thread keeps its entries in registers, and warpgroups of a program.
WAYS = ((True, 1), (True, 2), (True, 4), (False, 4), (False, 2), (False, 1))
# Bytes of a line and of a slab, programs of a processor, and warpgroups of it, at least: one of
# them computes while another waits for memory, which comes in sectors of 32 bytes. A large slab
# has more entries for its sums, if that leaves all processors some.
LARGE = 16384
PREFERRED = (
    *((64, LARGE, 3, 4), (64, 4096, 3, 4), (64, 4096, 2, 4), (32, 4096, 3, 4), (32, 4096, 2, 4)),
    *((64, 0, 3, 3), (32, 0, 3, 3), (32, 0, 1, 4), (32, 0, 1, 2), (0, 0, 2, 4), (0, 0, 1, 2)),
)
ALLOCATED = 1024  # bytes, and multiples of them
RESERVED = 3 * ALLOCATED  # for barriers, and what the runtime takes


class Plan(NamedTuple):
    """Which thread has which entries of which slab; `programs` is how many fit on a processor."""

    shape: tuple[int, int, int, int]
    groups: int
    vector: int
    warpgroups: int
    in_place: bool
    held: bool
    shared: int
    programs: int

    @property
    def width(self) -> int:
        """Features of a slab."""
        return self.groups * self.shape[3]

    @property
    def blocks(self) -> int:
        """Slabs of an example."""
        return self.shape[2] // self.groups

    @property
    def slots(self) -> int:
        """Entries of a piece that a thread has."""
        return self.lines * self.width // THREADS

    @property
    def lines(self) -> int:
        """Lines of a piece."""
        return math.lcm(self.width, THREADS * self.vector) // self.width

    @property
    def pieces(self) -> int:
        """Pieces of a warpgroup; the warpgroups take turns."""
        return -(-self.shape[1] // (self.lines * self.warpgroups))

    @property
    def room(self) -> int:
        """Lines that the pieces have room for."""
        return self.pieces * self.lines * self.warpgroups

    @property
    def reach(self) -> int:
        """The columns, and a group more in whole warps."""
        return self.columns + -(-self.shape[3] // rows.LANES) * rows.LANES

    @property
    def together(self) -> int:
        """Pieces of one iteration."""
        return max(1, 8 // self.slots)

    @property
    def iterations(self) -> int:
        """Iterations of the loops over pieces; pieces beyond them stay in registers."""
        if self.held:
            return 0
        return (self.pieces - (self.room > self.shape[1])) // self.together

    @property
    def columns(self) -> int:
        """The width, to whole warpgroups."""
        return -(-self.width // THREADS) * THREADS


def make_plan(
    shape: tuple[int, ...], inputs: Sequence[Any], output: Any, activated: bool = False
) -> Plan | str:
    """Returns the plan for slabs of x of a shape (N, L, G, K), or why there is none."""
    _, positions, groups, size = shape
    least = min(jnp.dtype(dtype).itemsize for dtype in (*inputs, output))
    aligned = [
        count
        for count in range(1, groups + 1)
        if groups % count == 0 and count * size * least % ALIGNMENT == 0
    ]
    if not aligned:
        line = groups * size * least
        return f"a line of {line} bytes is no multiple of {ALIGNMENT}, as copies must be"
    narrow = [count for count in aligned if count * size <= BOX]
    if not narrow:
        return f"no whole groups of {size} features are {ALIGNMENT} bytes and at most {BOX} wide"
    rest = inputs, output, activated
    plans = [_plan(shape, count, *way, *rest) for count in narrow for way in WAYS]
    plans = [plan for plan in plans if plan.slots <= MOST_SLOTS]
    if not plans:
        return f"{size} features of a group are dealt out too unevenly to {THREADS} threads"
    for wide, large, programs, busy in PREFERRED:
        for plan in plans:
            line = plan.width * least
            slabs = shape[0] * plan.blocks
            enough = line >= wide and line * positions >= large and plan.programs >= programs
            enough &= large < LARGE or slabs >= 2 * rows.PROCESSORS
            if enough and (plan.held or plan.programs * plan.warpgroups >= busy):
                return plan
    # A single warpgroup on a processor would be slower than what is saved.
    smallest = min(plan.shared for plan in plans if plan.warpgroups > 1)
    return f"{positions} positions of a block of groups need {smallest} bytes of shared memory"


def _plan(shape, groups, held, warpgroups, inputs, output, activated):
    in_place = jnp.dtype(output) == jnp.dtype(inputs[0])
    plan = Plan(shape, groups, 2, warpgroups, in_place, held, 0, 0)
    # Two side by side are loaded at once, and twice the sums and factors are kept.
    short = min(jnp.dtype(dtype).itemsize for dtype in inputs) < 4
    if not short or plan.slots * (len(inputs) + activated) > 24:
        plan = plan._replace(vector=1)
    sizes = [jnp.dtype(dtype).itemsize for dtype in [*inputs] + [output] * (not in_place)]
    allocated = [plan.room * plan.width * size for size in sizes]
    exchanged = [plan.lines * plan.width + plan.columns, plan.reach, plan.columns]
    exchanged += [2 * plan.columns] * (warpgroups > 1)
    allocated += [AT_ONCE * warpgroups * entries * 4 for entries in exchanged]
    shared = sum(-(-each // ALLOCATED) * ALLOCATED for each in allocated) + RESERVED
    # By what ptxas says of a few: entries that stay, and what a loop has of the ones at hand.
    each = 2.25 if activated else 1.6
    entries = plan.pieces * len(inputs) * each if held else 2 + len(inputs) * 5 // 2
    threads, registers = THREADS * warpgroups, 56 + int(entries * plan.slots)
    programs = min(rows.SHARED_BYTES // shared, rows.REGISTERS // (threads * registers))
    programs = 0 if registers > MOST_REGISTERS else min(programs, 16 // warpgroups)
    return plan._replace(shared=shared, programs=programs)
