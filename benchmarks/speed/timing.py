"""Contestants in turn, round after round, so that what slows the machine slows them all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.speed.contestant import Contestant


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
      rounds: how often each contestant has its turn.
      sample: seconds that one turn should last, by calling several times.
      calls: the most calls in one turn.
      kernel: calls to look at the device's own clock for, or zero.
      queue: whether to wait for the last call of a turn only. A CPU would run several at once.
      warm: seconds that calls before a turn last, one of them or more, but no more than `calls`.
        Threads of the contestant before may spin on for some milliseconds, on cores that this one
        is to have; its own may sleep.
    """

    rounds: int
    sample: float
    calls: int
    kernel: int
    queue: bool
    warm: float = 0.0


EFFORTS = {
    "gpu": Effort(rounds=30, sample=0.01, calls=50, kernel=10, queue=True),
    "cpu": Effort(rounds=15, sample=0.005, calls=50, kernel=0, queue=False, warm=0.01),
    "quick": Effort(rounds=3, sample=0.0, calls=1, kernel=0, queue=False),
}


def turn(contestant: Contestant, first: int, calls: int, queue: bool, before: int = 1) -> float:
    """Returns seconds per call of several calls, after some that are not counted."""
    for i in range(first - before, first):
        contestant.wait(contestant.call(i))
    start = time.perf_counter()
    for i in range(first, first + calls):
        result = contestant.call(i)
        if not queue:
            contestant.wait(result)
    contestant.wait(result)
    return (time.perf_counter() - start) / calls


def rounds(contestants: Mapping[str, Contestant], effort: Effort) -> list[dict[str, float]]:
    """Returns milliseconds per call, by contestant, of each round.

    Args:
      contestants: compiled already; each has a turn of one call to warm up.
      effort: how long to measure.

    Returns:
      A dict for each round. Each round begins with another contestant.
    """
    calls, before = {}, {}
    for name, contestant in contestants.items():
        once = turn(contestant, 1, 1, effort.queue)
        calls[name] = max(1, min(effort.calls, round(effort.sample / max(once, 1e-9))))
        before[name] = max(1, min(effort.calls, round(effort.warm / max(once, 1e-9))))
    names, found = list(contestants), []
    for number in range(effort.rounds):
        shift = number % max(len(names), 1)
        times = {}
        for name in names[shift:] + names[:shift]:
            seconds = turn(contestants[name], number, calls[name], effort.queue, before[name])
            times[name] = 1e3 * seconds
        found.append(times)
    return found


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Returns median, quartiles and number of values."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": low, "q3": high, "n": len(values)}


def over(found: Sequence[Mapping[str, float]], upper: str, lower: str) -> dict[str, float | int]:
    """Returns the summary of the ratio of two contestants, round by round."""
    return summary([times[upper] / times[lower] for times in found])


def share(
    found: Sequence[Mapping[str, float]], best: Callable[[Any], float], name: str
) -> dict[str, float | int]:
    """Returns the summary of the best time over a contestant's, round by round."""
    return summary([best(times) / times[name] for times in found])
