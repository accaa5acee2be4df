"""What was measured, as JSON, as Markdown, and as a table for the terminal.

The JSON is a dict of parts; each part has machine, versions, date, command and a list of cases. In
all of them the contestants' times are medians with quartiles, and a ratio is the median of the
ratios of each round.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

JSON, TABLE = "speed.json", "speed.md"
MIB = 2**20


def load(paths: Iterable[pathlib.Path]) -> dict[str, Any]:
    """Returns the parts of several files; of two with the same part, that of the later file."""
    stored: dict[str, Any] = {}
    for path in paths:
        stored |= json.loads(path.read_text())
    return stored


def save(stored: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(finite(stored), indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)


def finite(value: Any) -> Any:
    """Returns a value with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with that many digits that count, or a dash."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def middle(record: dict[str, Any], key: str) -> float | None:
    """Returns a median, or None where it was not measured."""
    found = record.get(key)
    return None if found is None else found["median"]


def _spread(record: dict[str, Any], key: str, short: bool = False) -> str:
    """Returns a median, with its quartiles unless it is to be short."""
    found = record.get(key)
    if found is None or short:
        return number(middle(record, key))
    return f"{number(found['median'])} ({number(found['q1'])} to {number(found['q3'])})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def columns(case: dict[str, Any]) -> list[str]:
    """Returns the headings of a case's table."""
    if "passes" in case:
        found = ["ms", "device ms", "GB/s", "of ceiling", "normax / it"]
        return [*found, "kept / x", "new / x", "error"]
    if any("norms_ms" in record for record in case["contestants"].values()):
        return ["ms", "norms, ms", "normax / it", "new, MiB", "loss", "from flax"]
    if any("trace_s" in record for record in case["contestants"].values()):
        return ["trace, s", "lower, s", "compile, s", "all, s", "normax / it", "lines"]
    return ["ms", "normax / it"]


def cells(case: dict[str, Any], record: dict[str, Any], short: bool = False) -> list[str]:
    """Returns the row of a contestant, one text for each heading; short: without quartiles."""
    if record["status"] != "right":
        first = record["status"] + (f": {record['why']}" if "why" in record else "")
        rest = [""] * (len(columns(case)) - 1)
        if record["status"] == "wrong" and "passes" in case:
            rest[-1] = _error(record)
        return [first, *rest]
    size = case.get("bytes", 1)
    texts = {
        "ms": _spread(record, "ms", short),
        "device ms": number(middle(record, "kernel_ms")),
        "GB/s": number(record.get("gb_s")),
        "of ceiling": _percent(middle(record, "of_ceiling")),
        "normax / it": _spread(record, "normax_over", short),
        "kept / x": _over(record.get("kept"), size),
        "new / x": _over(record.get("scratch"), size),
        "error": _error(record),
        "norms, ms": number(middle(record, "norms_ms")),
        "new, MiB": _over(record.get("scratch"), MIB),
        "loss": number(record.get("loss"), 5),
        "from flax": "-" if record.get("apart") is None else f"{record['apart']:.0e}",
        "lines": str(record.get("lines", "-")),
    }
    texts |= {f"{stage}, s": _spread(record, f"{stage}_s", short) for stage in ("trace", "lower")}
    texts |= {f"{stage}, s": _spread(record, f"{stage}_s", short) for stage in ("compile", "all")}
    return [texts[heading] for heading in columns(case)]


def _over(value: float | None, size: int) -> str:
    return "-" if value is None else f"{value / size:.2f}"


def _error(record: dict[str, Any]) -> str:
    return "-" if record.get("error") is None else f"{record['error']:.0e}"


def shown(case: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the contestants of a case that took part, by name."""
    return [(n, r) for n, r in case["contestants"].items() if r["status"] != "absent"]


def rich_table(case: dict[str, Any]) -> Table:
    """Returns a case as a table for the terminal."""
    table = Table(title=case["name"], title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for heading in columns(case):
        table.add_column(heading, justify="right")
    for name, record in shown(case):
        table.add_row(name, *cells(case, record, short=True))
    for name, limit in case.get("ceilings", {}).items():
        table.add_row(name, *_limit(case, limit, short=True), style="dim")
    return table


def _limit(case: dict[str, Any], limit: dict[str, Any], short: bool = False) -> list[str]:
    """Returns the row of a pass over memory."""
    found = {"ms": _spread(limit, "ms", short), "device ms": number(middle(limit, "kernel_ms"))}
    found["GB/s"] = number(limit["gb_s"])
    return [found.get(heading, "") for heading in columns(case)]


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table, names to the left and numbers to the right."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return lines + ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def ratios(part: dict[str, Any]) -> list[str]:
    """Returns the table of normax's time over each other's: least and most over the shapes."""
    found: dict[str, dict[str, list[float]]] = {}
    ours: dict[str, None] = {}
    for case in part["cases"]:
        own = case.get("own") or "normax"
        for name, record in shown(case):
            ratio = middle(record, "normax_over")
            if name != own and ratio is not None:
                ours[own] = None
                title = f"{case['title']}{', ' + case['dtype'] if 'passes' in case else ''}"
                found.setdefault(title, {}).setdefault(name, []).append(ratio)
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    if not names:
        return []

    def cell(values):
        if not values:
            return "-"
        low, high = number(min(values), 2), number(max(values), 2)
        return low if low == high else f"{low} to {high}"

    rows = ([title, *(cell(by.get(name)) for name in names)] for title, by in found.items())
    who = " or ".join(f"`{own}`" for own in ours)
    text = f"The time of {who} over that of each other, from the least to the most of the shapes:"
    return [text, "", *_rows(["", *names], rows), ""]


def markdown(stored: dict[str, Any]) -> str:
    """Returns all parts as Markdown."""
    lines = ["# Speed", "", LEGEND, ""]
    for name, part in stored.items():
        about = part["about"]
        versions = ", ".join(f"{package} {v}" for package, v in about["versions"].items())
        settings = " ".join(f"{key}={value}" for key, value in about["settings"].items())
        state = about["commit"] or "unknown"
        lines += [f"## {name}", "", f"`{part['command']}`, {part['date']}."]
        lines += [
            f"{about['gpu'] or about['device']}; {about['processor']}, {about['cores']} cores."
        ]
        lines += [f"Python {about['python']}, {versions}. {settings}".strip()]
        lines += [f"Commit {state}{', with changes' if about['changed'] else ''}."]
        if part["size"] == "quick":
            lines += ["**Tiny cases, to see that all works: these times say nothing.**"]
        if not part["complete"]:
            lines += ["**The run was stopped before its end.**"]
        lines += ["", *ratios(part)]
        for case in part["cases"]:
            rows = [[n, *cells(case, record)] for n, record in shown(case)]
            rows += [[n, *_limit(case, limit)] for n, limit in case.get("ceilings", {}).items()]
            lines += [f"### {case['name']}", "", *_rows(["contestant", *columns(case)], rows), ""]
    return "\n".join(lines)


LEGEND = """\
- ms: wall time of a call, several in a row, median and quartiles; device ms: what the device was
  busy for, where that can be had.
- GB/s: the bytes that the operation cannot avoid, over that time.
- of ceiling: the time that programs need which only read and write as many arrays, in the same
  rounds, over that time. Rows "ceiling 2R1W" are these programs: two arrays read, one written.
- normax / it: normax's time over the contestant's, median of the ratios of each round; below one
  normax is faster. Where normax as it comes did not take part, that of the kernel asked for.
- kept / x: bytes kept for the backward pass, over those of x. new / x: bytes of outputs and of
  what is in between.
- error: the largest of y or dx against float64 on a slice, over its largest value. A contestant
  that is wrong is not timed.
- norms, ms: what the step takes longer than without any norms. from flax: how far the first step
  is from that with Flax's norms, as a part of its length."""
