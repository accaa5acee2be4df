"""What a study shows and leaves behind: progress, a table, a figure, the numbers."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

# Okabe and Ito's colours, told apart by the colour-blind too, and a dash for each.
STYLES = {
    "none": ("#777777", (0, (1, 1))),
    "batch": ("#0072B2", "-"),
    "layer": ("#D55E00", "-"),
    "group": ("#009E73", (0, (5, 1.5))),
    "instance": ("#CC79A7", (0, (4, 1, 1, 1))),
    "weight": ("#B8860B", (0, (2, 1))),
}


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar; yields a function that advances it and says what was done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def show(results: dict[str, dict[str, Any]], target: float) -> None:
    """Prints the parameter counts and the table of results."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for norm, result in results.items():
        counts = result["parameters"]
        layers = ", ".join(f"{layer} {count:,}" for layer, count in counts.items())
        total, trainable = sum(counts.values()), result["trainable"]
        console.print(
            f"{norm}: {layers}; {total:,} in all, {trainable:,} trainable, "
            f"{total - trainable:,} not",
            highlight=False,
            soft_wrap=True,
        )
    longest = max((len(result["epochs"]) for result in results.values()), default=0)
    # Every epoch where they fit a terminal of 80 columns; otherwise the first ones and the last.
    shown = [i for i in range(longest) if longest <= 4 or i < 3 or i == longest - 1]
    table = Table(title="test accuracy after each epoch, in per cent")
    table.add_column("norm", no_wrap=True)
    for i in shown:
        table.add_column(f"{i + 1}", justify="right", no_wrap=True)
    for heading in ("best", f"epochs to {target:.0%}", "train - test", "step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for norm, result in results.items():
        epochs = result["epochs"]
        table.add_row(
            norm,
            *(f"{100 * epochs[i]['test_accuracy']:.1f}" if i < len(epochs) else "-" for i in shown),
            f"{100 * result['best_test_accuracy']:.1f}",
            str(result["epochs_to_target"] or "never"),
            f"{100 * result['generalization_gap']:.1f}",
            f"{result['step_ms']:.1f} ms",
        )
    console.print(table)


def write(folder: pathlib.Path, record: dict[str, Any]) -> list[pathlib.Path]:
    """Writes the numbers and, where there are any, the figure; returns their paths."""
    paths = [folder / "compare.json"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    if record["results"]:
        paths.append(folder / "compare.png")
        draw(paths[1], record)
    return paths


def draw(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Draws test accuracy and training loss by epoch, a labelled line for each normalizer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss = figure.subplots(1, 2)
    for norm, result in record["results"].items():
        color, dashes = STYLES[norm]
        epochs = range(1, len(result["epochs"]) + 1)
        style = {"color": color, "linestyle": dashes, "linewidth": 2, "label": norm}
        style |= {"marker": "o", "markersize": 3.5}
        accuracy.plot(epochs, [100 * e["test_accuracy"] for e in result["epochs"]], **style)
        loss.semilogy(epochs, [max(e["train_loss"], 1e-6) for e in result["epochs"]], **style)
    arguments = record["arguments"]
    lowest = min(
        100 * e["test_accuracy"] for result in record["results"].values() for e in result["epochs"]
    )
    accuracy.axhline(100 * arguments["target"], color="black", linewidth=0.8, alpha=0.5)
    accuracy.set(ylabel="test accuracy, %", ylim=(max(lowest - 1, 0), 100.3))
    loss.set(ylabel="training loss")
    for axes in (accuracy, loss):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    accuracy.legend(frameon=False, ncols=2, loc="lower right", title="normalization")
    figure.suptitle(
        f"{arguments['dataset']}, batch {arguments['batch_size']}, Adam at "
        f"{arguments['learning_rate']:g}, {arguments['dtype']}; "
        f"grey line: {arguments['target']:.0%}",
        fontsize=11,
    )
    figure.savefig(path)
