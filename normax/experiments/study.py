"""What every study has in common: options, progress, and what it leaves behind."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import normax
from normax import Moments, merge, moments
from normax.experiments.data import UsageError

# Okabe and Ito's colours, told apart by the colour-blind too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777")


def add_common(parser: argparse.ArgumentParser, name: str) -> None:
    """Declares the options that every study has."""
    parser.add_argument("--quick", action="store_true", help="fewer of everything, in a minute")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results") / name)


def prepare(folder: pathlib.Path, name: str) -> None:
    """Makes a folder for the results; one that cannot be written is known before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        for path in _written(folder, name):
            if path.exists():
                path.open("a").close()
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error}") from error


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar; yields a function that advances it and says what was done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the numbers depend on: the command, its options and the versions."""
    arguments = _plain(options)
    return {"command": arguments.pop("command"), "arguments": arguments, "versions": versions()}


def finish(
    options: argparse.Namespace,
    name: str,
    results: list[dict[str, Any]],
    interrupted: bool,
    draw: Callable[[Any, dict[str, Any]], None],
) -> int:
    """Writes what was measured, says where, and returns the exit status."""
    record = {**record_of(options), "interrupted": interrupted, "results": results}
    for path in write(options.out, name, record, draw):
        print(path)
    if interrupted:
        raise KeyboardInterrupt  # for the exit status
    return 0


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
    """Prints a table, the first column to the left, and a sentence below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, grid = Console(), Table(title=title, box=box.SIMPLE)
    for column in columns:
        first = column == columns[0]
        grid.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
    console.print(note, highlight=False, soft_wrap=True, markup=False)


def measured(per_batch: Callable[[Any], Any], keys: Any, check: Callable[[], None]) -> Moments:
    """Returns the moments of what a simulation gives for each key, in constant memory."""
    found = None
    for key in keys:
        part = moments(per_batch(key), 0)
        found = part if found is None else merge(found, part)
        check()
    assert found is not None
    return found


def error_of(found: Moments) -> float:
    """Returns the standard error of a mean."""
    return float((found.var / found.count) ** 0.5)


def write(
    folder: pathlib.Path,
    name: str,
    record: dict[str, Any],
    draw: Callable[[Any, dict[str, Any]], None],
) -> list[pathlib.Path]:
    """Writes the numbers and the figure, where there are any; returns their paths.

    Args:
      folder: where to.
      name: of the study.
      record: everything; what an earlier run left stays where `results` is empty.
      draw: draws the record on a figure of matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not record["results"]:
        return []
    numbers, picture = _written(folder, name)
    numbers.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw_on(figure, draw, record)
    figure.savefig(picture)
    return [numbers, picture]


def draw_on(figure: Any, draw: Callable[[Any, dict[str, Any]], None], record: Any) -> None:
    """Draws a record on a figure of matplotlib, in the style of all studies."""
    draw(figure, record)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def _written(folder, name):
    return folder / f"{name}.json", folder / f"{name}.png"


def _finite(value):
    """Returns the numbers with null for the loss of a training that diverged: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Returns the versions that the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {package: importlib.metadata.version(package) for package in packages}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"normax": normax.__version__, "python": python, **found}


def _plain(options):
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in vars(options).items()
    }


def positive_int(text: str) -> int:
    """Reads an option."""
    return _number(int, text, lambda n: n > 0, "a whole number above 0")


def batch_size(text: str) -> int:
    """Reads an option."""
    # Batch normalization has nothing to measure on a single example.
    return _number(int, text, lambda n: n > 1, "a whole number above 1")


def seed(text: str) -> int:
    """Reads an option."""
    return _number(int, text, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")


def positive_float(text: str) -> float:
    """Reads an option."""
    return _number(float, text, lambda n: 0 < n < float("inf"), "a number above 0")


def fraction(text: str) -> float:
    """Reads an option."""
    return _number(float, text, lambda n: 0 < n <= 1, "a number above 0, at most 1")


def _number(kind, text, fits, expected):
    with contextlib.suppress(ValueError):
        if fits(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
