"""Times normax, its peers and the machine's limits, part by part.

    python -m benchmarks.speed [--matrix rows|backward|fused|batch|group|models|latency|compile|all]

Each case is written as soon as it is measured, so a run that is stopped keeps what it has; another
run into the same folder replaces the parts that it measures. See benchmarks/README.md.
"""

import argparse
import datetime
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# PyTorch takes its memory from the same device: JAX may not take nearly all of it at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed import (
    cases,
    compiling,
    figures,
    in_torch,
    machine,
    measure,
    models,
    peers,
    report,
    timing,
)

KERNELS = [name for names in peers.KERNELS.values() for name in names]
CONTESTANTS = [*peers.NAMES, *(f"normax {name}" for name in ("xla", *KERNELS)), *in_torch.NAMES]


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("--matrix", choices=(*cases.PARTS, "all"), default="all", help="the part to measure")
    add("--quick", action="store_true", help="tiny cases, to see that all works")
    add("--output", type=pathlib.Path, default=pathlib.Path("results/speed"), metavar="DIR")
    add("--minutes", type=float, default=9.0, help="begin no case of a part after this long")
    add("--resume", action="store_true", help="measure only the cases that the folder has not")
    add("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help="of the single operations")
    add("--combine", type=pathlib.Path, nargs="+", metavar="JSON", help="join results, run nothing")
    return made


def jobs(
    part: str, size: str, options: argparse.Namespace, check: Callable[[], None]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields the name of each case of a part, and what measures it."""
    effort = timing.EFFORTS[size]
    if part == "models":
        for kind in ("transformer", "resnet"):
            yield kind, lambda kind=kind: models.run(kind, size, effort, check)
    elif part == "compile":
        for kind in ("LayerNorm", "BatchNorm"):
            yield kind, lambda kind=kind: compiling.run(kind, size, check)
    else:
        for case in cases.cases(part, size):
            yield (
                case.name,
                lambda case=case: measure.run(case, effort, options.quick, check, options.only),
            )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 130 after Ctrl-C, else 0."""
    options = parser().parse_args(arguments)
    # Where nobody sets a width, that of a log file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    path = options.output / report.JSON
    stored = report.load([*(options.combine or []), *([path] if path.exists() else [])])
    if options.combine:
        write(stored, options.output)
        return 0
    backend = jax.default_backend()
    size = "quick" if options.quick else "cpu" if backend == "cpu" else "gpu"
    if options.quick:
        # Nearly all of it is compiling.
        jax.config.update("jax_disable_most_optimizations", True)
    about = machine.describe()
    wanted = cases.PARTS if options.matrix == "all" else (options.matrix,)
    stop = stopper()
    status = 0
    try:
        for part in wanted:
            before = stored.get(part, {})
            same = all(before.get(k) == v for k, v in (("about", about), ("size", size)))
            stored[part] = {
                "about": about,
                "size": size,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": spelled(options),
                "complete": False,
                "cases": before["cases"] if options.resume and before and same else [],
            }
            measure_part(part, size, options, stop, stored, console)
    except KeyboardInterrupt:
        console.print("stopped: what was measured is kept")
        status = 130
    write(stored, options.output)
    console.print(f"wrote {report.JSON}, {report.TABLE} and figures to {options.output}")
    return status


def measure_part(
    part: str,
    size: str,
    options: argparse.Namespace,
    check: Callable[[], None],
    stored: dict[str, Any],
    console: Console,
) -> None:
    """Measures a part, shows each case, and writes after each."""
    todo = list(jobs(part, size, options, check))
    there = {case["job"] for case in stored[part]["cases"]}
    todo = [(name, job) for name, job in todo if name not in there]
    begun = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(part, total=len(todo))
        for name, job in todo:
            if time.monotonic() - begun > 60 * options.minutes:
                console.print(f"{part}: {options.minutes:g} minutes are over, the rest is left out")
                return
            check()
            progress.update(task, description=f"{part}: {name}")
            record = {"job": name} | job()
            stored[part]["cases"].append(record)
            report.save(stored, options.output / report.JSON)
            console.print(report.rich_table(record))
            progress.advance(task)
    stored[part]["complete"] = True


def stopper() -> Callable[[], None]:
    """Returns a function that raises KeyboardInterrupt once Ctrl-C was pressed.

    The first Ctrl-C lets the running contestant end: compilers and kernels are not to be broken
    off. The second ends the program.
    """
    pressed = []

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, press)

    def check():
        if pressed:
            raise KeyboardInterrupt

    return check


def spelled(options: argparse.Namespace) -> str:
    """Returns the command, without the folder it wrote to."""
    words = ["python -m benchmarks.speed --matrix", options.matrix]
    words += ["--quick"] * options.quick
    words += ["--minutes", f"{options.minutes:g}"] * (options.minutes != 9.0)
    words += ["--only", *(f'"{name}"' for name in options.only)] if options.only else []
    return " ".join(words)


def write(stored: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes JSON, table and figures."""
    report.save(stored, folder / report.JSON)
    (folder / report.TABLE).write_text(report.markdown(stored))
    figures.draw(stored, folder)


if __name__ == "__main__":
    sys.exit(main())
