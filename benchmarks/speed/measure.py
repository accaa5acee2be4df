"""One case: its contestants are made, held to what is exact, timed in turn, and written down."""

import functools
import gc
from collections.abc import Callable, Collection, Iterable
from typing import Any

from benchmarks.speed import ceilings, contestant, exact, in_torch, peers, timing
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant, Inputs


def makers(case: Case, inputs: Inputs, quick: bool) -> dict[str, Callable[[], Contestant | None]]:
    """Returns what makes each contestant of a case, by name."""

    def jax_one(build):
        norm = build()
        return None if norm is None else contestant.in_jax(case, norm, inputs)

    found: dict[str, Callable[[], Contestant | None]] = {
        name: functools.partial(jax_one, build) for name, build in peers.norms(case).items()
    }
    for name in in_torch.names(case, quick):
        found[name] = functools.partial(in_torch.make, case, name, inputs)
    return found


def said(error: BaseException) -> str:
    """Returns an exception on one line that is not too long."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def prepare(
    case: Case, make: Callable[[], Contestant | None], answers: dict[str, Any]
) -> tuple[Contestant | None, dict[str, Any]]:
    """Makes a contestant and checks it.

    Args:
      case: the operation.
      make: of `makers`.
      answers: of `contestant.expected`.

    Returns:
      The contestant if it may be timed, and its record: status "right", "wrong", "failed" or
      "absent" and, in the first two, the largest error of y or dx as a part of its largest value.
    """
    try:
        made = make()
        if made is None or made.check is None:
            return None, {"status": "absent"}
        right, error = exact.verdict(case, made.check(), answers)
    except Exception as failure:
        return None, {"status": "failed", "why": said(failure)}
    record = {"status": "right" if right else "wrong", "error": error}
    record |= {"kept": made.kept, "scratch": made.scratch}
    return (made if right else None), record


def kernel_times(
    contestants: dict[str, Contestant], calls: int
) -> tuple[dict[str, dict[str, float | int]], dict[str, str]]:
    """Returns summaries of device times, by name, and why those that failed did."""
    found, why = {}, {}
    for name, made in contestants.items():
        if made.kernel is None or not calls:
            continue
        try:
            times = made.kernel(calls)
        except Exception as failure:
            why[name] = said(failure)
        else:
            if times:
                found[name] = timing.summary(times)
    return found, why


def run(
    case: Case,
    effort: timing.Effort,
    quick: bool,
    check: Callable[[], None],
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Measures a case.

    Args:
      case: operation, shape and mode.
      effort: how long to measure.
      quick: whether to leave out what takes long to compile.
      check: raises KeyboardInterrupt if the run is to end; called between contestants.
      only: names of contestants to keep; None is all.

    Returns:
      The record of the case, as `report` reads it.
    """
    inputs = contestant.make_inputs(case)
    answers = contestant.expected(case, inputs)
    ready, records = {}, {}
    for name, make in makers(case, inputs, quick).items():
        if only is not None and name not in only:
            continue
        check()
        made, records[name] = prepare(case, make, answers)
        if made is not None:
            ready[name] = made
    check()
    limits = ceilings.ceilings(case, inputs)
    found = timing.rounds(limits | ready, effort)
    device, why = kernel_times(limits | ready, effort.kernel)
    ours = own(ready)
    del ready
    for name, record in records.items():
        if record["status"] == "right":
            record |= evaluated(case, found, name)
            record["kernel_ms"] = device.get(name)
            if name in why:
                record["kernel_why"] = why[name]
    result = {
        "name": case.name,
        "title": case.title,
        "norm": case.norm,
        "wrap": case.wrap,
        "mode": case.mode,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "groups": case.groups,
        "bytes": case.bytes,
        "passes": [ceilings.label(mix) for mix in case.passes],
        "best_ms": timing.summary([ceilings.best(case, times) for times in found]),
        "ceilings": {name: _ceiling(case, found, name, device) for name in limits},
        "own": ours,
        "contestants": records,
    }
    # Inputs and results of the last case would be there while those of the next are made.
    del inputs, limits
    gc.collect()
    in_torch.release()
    return result


def evaluated(case: Case, found: list[dict[str, float]], name: str) -> dict[str, Any]:
    """Returns what the rounds say of one contestant."""
    record: dict[str, Any] = {"ms": timing.summary([times[name] for times in found])}
    record["gb_s"] = case.floor / record["ms"]["median"] / 1e6
    record["of_ceiling"] = timing.share(found, functools.partial(ceilings.best, case), name)
    ours = own(found[0])
    if ours is not None:
        record["normax_over"] = timing.over(found, ours, name)
    return record


def own(names: Iterable[str]) -> str | None:
    """Returns which contestant the others are compared with: normax as it comes, or by a kernel."""
    named = [name for name in names if name.split()[0] == "normax"]
    return "normax" if "normax" in named else named[-1] if named else None


def _ceiling(case: Case, found: list[dict[str, float]], name: str, device: dict) -> dict[str, Any]:
    """Returns what the rounds say of one pass over memory."""
    mix = next(m for m in ceilings.timed(case) if f" {ceilings.label(m)} " in name)
    ms = timing.summary([times[name] for times in found])
    gb_s = case.bytes * sum(mix) / ms["median"] / 1e6
    return {"ms": ms, "gb_s": gb_s, "kernel_ms": device.get(name)}
