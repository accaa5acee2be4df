"""Two figures: bandwidth over row length under its ceiling, and each other case's part of it."""

import math
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.speed.report import middle

# Okabe and Ito's colours, which the colour-blind can tell apart; the markers tell them again.
LOOKS = {
    "normax": ("#0072B2", "o"),
    "normax xla": ("#56B4E9", "o"),
    "normax fused": ("#56B4E9", "*"),
    "normax mosaic_gpu": ("#0072B2", "*"),
    "normax mosaic_tpu": ("#0072B2", "*"),
    "plain jax": ("#999999", "x"),
    "flax linen": ("#D55E00", "s"),
    "flax nnx": ("#D55E00", "D"),
    "haiku": ("#CC79A7", "v"),
    "equinox": ("#CC79A7", "^"),
    "keras": ("#E69F00", "P"),
    "torch": ("#009E73", "<"),
    "torch nchw": ("#009E73", "1"),
    "torch native": ("#009E73", "2"),
    "torch compile": ("#009E73", ">"),
    "liger": ("#000000", "X"),
}
ROOFLINE, SHARE = "roofline.png", "share.png"
LINES, DOTS = ("rows", "backward"), ("fused", "batch", "group")


def draw(stored: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there is to draw, and returns the files."""
    made = []
    panels: dict[str, list[dict[str, Any]]] = {}
    for part in LINES:
        for case in stored.get(part, {}).get("cases", []):
            panels.setdefault(f"{case['title']}, {case['dtype']}", []).append(case)
    if panels:
        made.append(folder / ROOFLINE)
        roofline(panels, subtitle(stored, LINES)).savefig(made[-1], dpi=140)
    dots = {part: stored[part]["cases"] for part in DOTS if stored.get(part, {}).get("cases")}
    if dots:
        made.append(folder / SHARE)
        share(dots, subtitle(stored, DOTS)).savefig(made[-1], dpi=140)
    return made


def subtitle(stored: dict[str, Any], parts: tuple[str, ...]) -> str:
    """Returns machine and days of some parts."""
    found = [stored[part] for part in parts if part in stored]
    where = dict.fromkeys(
        (p["about"]["gpu"] or p["about"]["processor"]).split(",")[0] for p in found
    )
    days = sorted({part["date"][:10] for part in found})
    tiny = any(part["size"] == "quick" for part in found)
    return ", ".join([*where, *days]) + (", tiny cases: no measurement" if tiny else "")


def bandwidth(case: dict[str, Any]) -> float:
    """Returns the ceiling of a case in GB/s: the bytes of its passes over their best time."""
    total = sum(int(label[0]) + int(label[2]) for label in case["passes"])
    return case["bytes"] * total / case["best_ms"]["median"] / 1e6


def roofline(panels: dict[str, list[dict[str, Any]]], where: str) -> Figure:
    """Returns bandwidth over the length of a row, a panel for each operation and dtype."""
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across + 2.4, 3.2 * down + 1.0), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    names: dict[str, None] = {}
    for axes, (title, cases) in zip(grid.flat, panels.items(), strict=False):
        cases = sorted(cases, key=lambda case: case["shape"][-1])
        names |= dict.fromkeys(_lines(axes, cases))
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        lengths = [case["shape"][-1] for case in cases]
        axes.set_xticks(lengths, [str(v) for v in lengths], rotation=60, fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("row length", fontsize=10)
    figure.supylabel("GB/s of the bytes that cannot be avoided", fontsize=10)
    figure.suptitle(f"Normalization under the memory's ceiling\n{where}", fontsize=11)
    _legend(figure, list(names), "ceiling: only reads and\nwrites as much")
    return figure


def _lines(axes: Axes, cases: list[dict[str, Any]]) -> list[str]:
    """Draws the ceiling and the contestants of a panel, and returns their names."""
    lengths = [case["shape"][-1] for case in cases]
    axes.plot(lengths, [bandwidth(case) for case in cases], "k--", lw=1.5, marker="_")
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    drawn = []
    for name in reversed(names):
        points = [
            (case["shape"][-1], case["contestants"][name]["gb_s"])
            for case in cases
            if "gb_s" in case["contestants"].get(name, {})
        ]
        if points:
            colour, marker = LOOKS.get(name, ("#444444", "."))
            ours = name.startswith("normax")
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, ms=7 if ours else 5,
                lw=2.0 if ours else 1.0, alpha=1 if ours else 0.8,
            )  # fmt: skip
            drawn.append(name)
    return drawn[::-1]


def share(parts: dict[str, list[dict[str, Any]]], where: str) -> Figure:
    """Returns each contestant's part of the ceiling, a line for each case."""
    heights = [len(cases) for cases in parts.values()]
    figure = Figure(figsize=(10, 0.3 * sum(heights) + 0.8 * len(heights) + 1.2))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=heights)
    names: dict[str, None] = {}
    for axes, (part, cases) in zip(grid.flat, parts.items(), strict=True):
        for row, case in enumerate(cases):
            for name, record in reversed(case["contestants"].items()):
                part_of_it = middle(record, "of_ceiling")
                if part_of_it is not None:
                    colour, marker = LOOKS.get(name, ("#444444", "."))
                    size = 60 if name.startswith("normax") else 30
                    axes.scatter(100 * part_of_it, row, s=size, c=colour, marker=marker, alpha=0.85)
                    names[name] = None
        axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.axvline(100, color="k", ls="--", lw=1.5)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.set_title(part, fontsize=10, loc="left")
    grid.flat[-1].set_xlabel("% of the ceiling")
    figure.suptitle(f"How near to the memory's ceiling\n{where}", fontsize=11)
    _legend(figure, [name for name in LOOKS if name in names], "ceiling")
    return figure


def _legend(figure: Figure, names: list[str], ceiling: str) -> None:
    """Draws one legend for all panels, in the order of `LOOKS`."""
    order = [name for name in LOOKS if name in names] + [n for n in names if n not in LOOKS]
    handles = [Line2D([], [], color="k", ls="--", label=ceiling)]
    for name in order:
        colour, marker = LOOKS.get(name, ("#444444", "."))
        handles.append(Line2D([], [], color=colour, marker=marker, label=name))
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
