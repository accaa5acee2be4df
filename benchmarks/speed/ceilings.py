"""How fast the machine is at all: programs that only read and write, and compute next to nothing.

A pass over memory is named by the arrays that it reads and writes: 1R1W is a copy. What a case
cannot avoid is a few of them, each over arrays of the size of x; they are timed in the same rounds
as its contestants. The best time for the case is the sum of theirs, of each that of the faster
library.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import in_torch
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant, Inputs, device_times

Pass = tuple[int, int]
# Two passes that move as much as one, which a library may do faster.
SPLIT = {(2, 2): [(1, 1), (1, 1)], (3, 2): [(2, 1), (1, 1)]}


def label(mix: Pass) -> str:
    """Returns how a pass is written: `2R1W`."""
    return f"{mix[0]}R{mix[1]}W"


def _in_jax(mix: Pass, arrays: list[jax.Array]) -> Contestant:
    reads, writes = mix

    def run(*given):
        total = given[0]
        if not writes:
            for other in given[1:]:
                total = total * other
            return jnp.sum(total.astype(jnp.float32))
        for other in given[1:]:
            total = total + other
        return tuple(total + (i + 1) for i in range(writes))

    compiled = jax.jit(run).lower(*arrays[:reads]).compile()
    return Contestant(
        lambda i: compiled(*_turned(arrays, i, reads)),
        jax.block_until_ready,
        kernel=device_times(compiled, arrays[:reads]),
    )


def _turned(arrays: list[Any], i: int, reads: int) -> list[Any]:
    """Returns that many arrays, others at each call."""
    return [arrays[(i + j) % len(arrays)] for j in range(reads)]


def _in_torch(mix: Pass, arrays: list[jax.Array]) -> Contestant | None:
    import torch

    tensors = [torch.from_dlpack(array).flatten() for array in arrays]
    run: Any = {
        (1, 1): torch.neg,
        (2, 1): torch.add,
        (3, 1): torch.addcmul,
        (1, 0): torch.sum,
        (2, 0): torch.dot,
    }.get(mix)
    if run is None:
        return None

    def call(i):
        with torch.no_grad():
            return run(*_turned(tensors, i, mix[0]))

    in_torch.wait(call(0))
    return Contestant(call, in_torch.wait, kernel=in_torch.device_times(call))


def timed(case: Case) -> list[Pass]:
    """Returns the passes to time for a case."""
    parts = [part for mix in case.passes for part in SPLIT.get(mix, [])]
    return list(dict.fromkeys([*case.passes, *parts]))


def ceilings(case: Case, inputs: Inputs) -> dict[str, Contestant]:
    """Returns the passes of a case as contestants: `ceiling 1R1W jax`."""
    arrays = [given[name] for given in inputs.sets for name in ("x", "dy")]
    found = {}
    for mix in timed(case):
        found[f"ceiling {label(mix)} jax"] = _in_jax(mix, arrays)
        other = _in_torch(mix, arrays) if in_torch.usable() else None
        if other is not None:
            found[f"ceiling {label(mix)} torch"] = other
    return found


def best(case: Case, times: dict[str, float]) -> float:
    """Returns the time that the passes of a case take one after another.

    Args:
      case: the operation.
      times: of one round, by contestant.

    Returns:
      The sum over its passes, each by the library that was faster in that round, and in two where
      that was faster.
    """

    def of(mix):
        return min(t for name, t in times.items() if name.startswith(f"ceiling {label(mix)} "))

    return sum(
        min([of(mix), *([sum(map(of, SPLIT[mix]))] if mix in SPLIT else [])]) for mix in case.passes
    )
