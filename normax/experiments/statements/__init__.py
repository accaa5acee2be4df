"""Measure the small statements of the theory, one by one, each beside what it claims.

Those that need a network, a curve or a table of their own are in the other studies.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax

from normax.experiments import study
from normax.experiments.statements import features, gradients, heads, layers, noise, students

# Each returns the rows of some statements, given a key, how often to draw and `check`.
MEASURE = [
    noise.statistics,
    noise.kurtosis,
    noise.expansion,
    noise.conditional,
    heads.softplus,
    heads.heads,
    students.weight_normalization,
    students.least_squares,
    students.ridge,
    layers.slopes,
    layers.outputs,
    gradients.backward,
    gradients.epsilon,
    layers.sizes,
    features.scaling,
    features.hessians,
    features.running,
    features.absorbed,
]
COLORS = {"to first order": study.COLORS[0], "no": study.COLORS[1]}
WORDS = {"to first order": "which holds to first order", "no": "which does not hold"}
LEAST, MOST = 0.25, 4.0  # of claimed over measured, in the figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "statements")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Measures, reports, and returns the exit status."""
    study.prepare(options.out, "statements")
    draws = 8 if options.quick else 96
    results: list[dict[str, Any]] = []
    interrupted = False
    with study.progress(len(MEASURE), "groups of statements") as advance:
        try:
            for number, measure in enumerate(MEASURE):
                key = jax.random.fold_in(jax.random.key(options.seed), number)
                results += measure(key, draws, check)
                advance(measure.__name__.replace("_", " "))
                check()
        except KeyboardInterrupt:
            interrupted = True
    results.sort(key=_place)
    show(results)
    return study.finish(options, "statements", results, interrupted, draw)


def _place(row):
    """Returns where a statement stands: the numbered ones, then those of each other document."""
    head = row["statement"].split("-")[0]
    return len(head) == 3, int(head)


def show(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    study.table(
        "statements",
        ("", "quantity", "claimed", "measured", "corrected", "holds"),
        [
            (
                row["statement"].split("-")[0],
                row["quantity"],
                *(_short(row[name]) for name in ("claimed", "measured", "expected")),
                row["holds"],
            )
            for row in results
        ],
        "corrected: what the mended formula comes to; to first order: off by no more than the "
        "next order in 1 / M or 1 / N. Each sentence, its source, the standard error and a note "
        "are in the file.",
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws claimed and corrected over measured, of the numbers that do not hold as they are."""
    rows = [row for row in record["results"] if _is_drawn(row)]
    half = -(-len(rows) // 2)
    for axes, part in zip(figure.subplots(1, 2), (rows[:half], rows[half:]), strict=True):
        axes.axvline(1, color="black", linewidth=0.8, alpha=0.5)
        for place, row in enumerate(part):
            _draw_row(axes, place, row)
        labels = [f"{row['quantity']}   {row['statement'].split('-')[0]}" for row in part]
        axes.set_yticks(range(len(part)), labels, fontsize=8)
        axes.set_ylim(half - 0.4, -0.6)
        axes.set(xscale="log", xlim=(LEAST / 1.25, MOST * 1.25))
        axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axes.tick_params("x", labelsize=8)
        axes.minorticks_off()
        for holds, color in COLORS.items():
            axes.plot([], [], "x", color=color, label=f"as claimed, {WORDS[holds]}")
        axes.plot([], [], "o", color="black", markersize=3, label="corrected, with 2 se")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    verdicts = [row["holds"] for row in record["results"]]
    figure.suptitle(
        "numbers that do not hold as claimed, over what was measured; arrows: off the axis\n"
        f"(of {len(verdicts)} rows of the study {verdicts.count('yes')} hold, and "
        f"{verdicts.count('to first order')} to first order)",
        fontsize=10,
    )


def _draw_row(axes, place, row):
    measured, color = row["measured"], COLORS[row["holds"]]
    claimed, corrected = row["claimed"] / measured, row["expected"] / measured
    error = 2 * abs((row["error"] or 0.0) / measured)
    dot = {"color": "black", "marker": "o", "markersize": 3, "elinewidth": 1, "zorder": 3}
    axes.errorbar(corrected, place, xerr=error, **dot)
    if LEAST <= claimed <= MOST:
        axes.plot(claimed, place, "x", color=color, markersize=6, zorder=4)
        return
    low = claimed < LEAST
    axes.plot(LEAST if low else MOST, place, "<" if low else ">", color=color, markersize=5)
    text = f"  {claimed:.2g}  " if abs(claimed) < 1000 else f"  {claimed:.0e}  "
    side = "left" if low else "right"
    axes.text(LEAST if low else MOST, place, text, ha=side, va="center", fontsize=8)


def _is_drawn(row):
    if row["holds"] not in COLORS:
        return False
    numbers = [row[name] for name in ("claimed", "measured", "expected")]
    return all(isinstance(number, int | float) and number for number in numbers)


def _short(value):
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(map(_short, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
