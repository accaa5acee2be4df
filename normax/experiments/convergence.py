"""Count the epochs that one network takes to an accuracy, with and without batch norm.

For learning rates over more than three decades, and for initial kernels ten times as large and as
small as they are meant to be.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import train
from normax.experiments import compare, data, study
from normax.experiments.network import Network

NETS = {"batch": "with batch norm", "none": "without"}
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALES = (0.1, 10.0)  # of the initial kernels, beside 1
OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}
GUESS = math.log(10)  # the loss of one that has learned nothing


class Scope(NamedTuple):
    """How much is run."""

    rates: tuple[float, ...]
    seeds: int
    epochs: int
    target: float
    scale_seeds: int  # for the initializations
    steps_aside: tuple[int, ...]  # their rates, counted in RATES from the one of choice


FULL = Scope(RATES, 4, 15, 0.95, 3, (-2, 0, 2))
QUICK = Scope((0.1, 1.0), 1, 8, 0.85, 1, (0,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "convergence")
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, default="digits")
    text = "of the digits, height and width; 28, the network's own, or 16 with --quick"
    add("--size", type=int, choices=(16, 28), help=text)
    add("--data-home", help="folder of scikit-learn's cache, for mnist and cifar10")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="sgd")
    add("--batch-size", type=study.batch_size, default=64)
    add("--epochs", type=study.positive_int, help="after which it is never")
    add("--target", type=study.fraction, help="test accuracy to count the epochs to")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Trains, reports, and returns the exit status; an interruption keeps what was measured."""
    study.prepare(options.out, "convergence")
    scope = QUICK if options.quick else FULL
    options.size = options.size or (16 if options.quick else 28)
    options.epochs = options.epochs or scope.epochs
    options.target = options.target or scope.target
    trainer, runs, interrupted = Trainer(options, check), [], False
    grid = [(s, net, 1.0, r) for s in range(scope.seeds) for net in NETS for r in scope.rates]
    rest = len(NETS) * len(SCALES) * scope.scale_seeds * len(scope.steps_aside)
    with study.progress(len(grid) + rest, "trainings") as advance:
        try:
            train_each(grid, trainer, runs, advance)
            # Every rate of choice is known only after the whole grid.
            train_each(initializations(runs, scope), trainer, runs, advance)
        except KeyboardInterrupt:
            interrupted = True
    results = results_of(runs)
    show(results, options)
    return study.finish(options, "convergence", results, interrupted, draw)


def train_each(work: Iterable[tuple[int, str, float, float]], trainer, runs, advance) -> None:
    """Trains each network of a list of them, adding to `runs`."""
    for seed, net, scale, rate in work:
        runs.append(trainer.train(seed, net, scale, rate))
        advance(f"{NETS[net]}, learning rate {rate:g}")


def initializations(runs, scope) -> list[tuple[int, str, float, float]]:
    """Returns what is trained from other kernels: around the rate that is best for these."""
    work = []
    for net in NETS:
        at = RATES.index(best(cells_of(runs), net)["learning_rate"])
        places = dict.fromkeys(min(max(at + a, 0), len(RATES) - 1) for a in scope.steps_aside)
        for scale in SCALES:
            for place in places:
                work += [(s, net, scale, RATES[place]) for s in range(scope.scale_seeds)]
    return sorted(work, key=lambda row: row[0])


class Trainer:
    """Trains networks, each compiled once for all seeds, rates and scales."""

    def __init__(self, options: argparse.Namespace, check: Callable[[], None]):
        self.options, self.check = options, check
        self.tx = optax.inject_hyperparams(OPTIMIZERS[options.optimizer])(1.0)
        self.models = {net: Network(net) for net in NETS}
        self.steps = {net: train.train_step(compare.loss, donate=False) for net in NETS}
        self.evaluates = {net: train.eval_step(compare.loss) for net in NETS}
        self.splits, self.starts = {}, {}

    def split(self, seed: int):
        """Returns training and test images; of the digits another split for each seed."""
        name, home = self.options.dataset, self.options.data_home
        seed = seed if name == "digits" else 0
        if seed not in self.splits:
            training, test = data.load(name, self.options.seed + seed, home, self.options.size)
            if self.options.batch_size > len(training.label):
                raise data.UsageError(
                    f"--batch-size {self.options.batch_size} is more than the "
                    f"{len(training.label)} images"
                )
            self.splits[seed] = training, test
        return self.splits[seed]

    def start(self, seed: int, net: str, scale: float, rate: float) -> train.TrainState:
        """Returns the state before the first step."""
        if (seed, net) not in self.starts:
            example = jnp.asarray(self.split(seed)[0].image[:2])
            key = jax.random.key(self.options.seed + seed)
            self.starts[seed, net] = train.TrainState.create(
                self.models[net], self.tx, key, example, train=False
            )
        state = self.starts[seed, net]
        hyperparams = {**state.opt_state.hyperparams, "learning_rate": jnp.float32(rate)}
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * scale if path[-1].key == "kernel" else leaf, state.params
        )
        return state.replace(
            params=params, opt_state=state.opt_state._replace(hyperparams=hyperparams)
        )

    def train(self, seed: int, net: str, scale: float, rate: float) -> dict[str, Any]:
        """Trains one network to the target, to the last epoch, or until its loss is no number."""
        training, test = self.split(seed)
        state, options = self.start(seed, net, scale, rate), self.options
        rng = np.random.default_rng(options.seed + seed)
        each = len(training.label) // options.batch_size
        losses, reached, look = [], None, 1
        for batch in batches(training, options, rng):
            state, metrics = self.steps[net](state, batch)
            losses.append(float(metrics["loss"]))
            self.check()
            if not math.isfinite(losses[-1]):
                break
            if len(losses) >= look or len(losses) == each * options.epochs:
                look = max(len(losses) + 1, int(1.1 * len(losses)))
                scores = compare.measure(self.evaluates[net], state, test)
                if scores["accuracy"] >= options.target:
                    reached = len(losses) / each
                    break
        last = float(np.mean(losses[-each:]))
        dead = last > 0.98 * GUESS and max(losses) > 1.1 * GUESS
        return {
            "seed": options.seed + seed,
            "net": net,
            "scale": scale,
            "learning_rate": rate,
            "epochs": reached,
            "last_loss": last,
            "diverged": not math.isfinite(last) or (dead and reached is None),
        }


def batches(training, options, rng):
    """Yields the batches of all epochs."""
    for _ in range(options.epochs):
        yield from compare.shuffled(training, options.batch_size, rng)


def cells_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the seeds of one network, scale and rate have in common."""
    groups: dict[tuple, list] = {}
    for row in runs:
        groups.setdefault((row["net"], row["scale"], row["learning_rate"]), []).append(row)
    cells = []
    for (net, scale, rate), rows in sorted(groups.items()):
        epochs = np.array([row["epochs"] for row in rows if row["epochs"] is not None])
        several = len(epochs) > 1
        cells.append(
            {
                "part": "training",
                "net": net,
                "scale": scale,
                "learning_rate": rate,
                "runs": len(rows),
                "reached": len(epochs),
                "diverged": sum(row["diverged"] for row in rows),
                "epochs": float(epochs.mean()) if len(epochs) else None,
                "error": float(epochs.std(ddof=1) / len(epochs) ** 0.5) if several else None,
                "each": [row["epochs"] for row in rows],
            }
        )
    return cells


def best(
    cells: list[dict[str, Any]], net: str, scale: float = 1.0, rates: Iterable[float] = RATES
) -> dict[str, Any]:
    """Returns the cell of the rate of choice: most seeds to the target, then fewest epochs."""
    rows = [c for c in cells if (c["net"], c["scale"]) == (net, scale)]
    rows = [row for row in rows if row["learning_rate"] in rates]
    return min(rows, key=lambda c: (-c["reached"] / c["runs"], c["epochs"] or math.inf))


def results_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns all cells, and what they say of the claims once both networks are measured."""
    cells = cells_of(runs)
    if {cell["net"] for cell in cells} != set(NETS):
        return cells
    plain = {c["learning_rate"]: c for c in cells if (c["net"], c["scale"]) == ("none", 1.0)}
    equal = {}
    for cell in cells:
        other = plain.get(cell["learning_rate"])
        if other and (cell["net"], cell["scale"]) == ("batch", 1.0):
            equal[f"{cell['learning_rate']:g}"] = ratio(other, cell)
    summary = {
        "part": "summary",
        "largest_usable_rate": {net: largest_usable(cells, net) for net in NETS},
        "rate_of_choice": {net: best(cells, net)["learning_rate"] for net in NETS},
        "ratio_of_best": ratio(best(cells, "none"), best(cells, "batch")),
        "ratio_at_equal_rate": equal,
    }
    return [*cells, summary]


def largest_usable(cells: list[dict[str, Any]], net: str) -> float | None:
    """Returns the largest rate at which every seed reached the target."""
    rows = [c for c in cells if (c["net"], c["scale"]) == (net, 1.0) and c["reached"] == c["runs"]]
    return max((row["learning_rate"] for row in rows), default=None)


def ratio(above: dict[str, Any], below: dict[str, Any]) -> list[float | None] | None:
    """Returns the ratio of two means and its standard error, where every seed got there."""
    if any(cell["reached"] < cell["runs"] for cell in (above, below)):
        return None
    value = above["epochs"] / below["epochs"]
    if above["error"] is None or below["error"] is None:
        return [value, None]
    return [value, value * math.hypot(*(c["error"] / c["epochs"] for c in (above, below)))]


def show(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the table and the ratios."""
    cells = [row for row in results if row["part"] == "training"]
    study.table(
        f"epochs to a test accuracy of {options.target:g}",
        ("network", "kernels", "rate", "epochs", "se", "reached", "diverged"),
        [
            (
                NETS[c["net"]],
                f"x {c['scale']:g}",
                f"{c['learning_rate']:g}",
                "never" if c["epochs"] is None else f"{c['epochs']:.2f}",
                "" if c["error"] is None else f"{c['error']:.2f}",
                f"{c['reached']} of {c['runs']}",
                f"{c['diverged']}",
            )
            for c in cells
        ],
        f"mean over the seeds that reached it in {options.epochs} epochs; looked at each tenth "
        "more steps; se: standard error; diverged: the loss stopped being a number, or it rose "
        f"a tenth above that of a guess, {GUESS:.2f}, and ended there",
    )
    for row in results[len(cells) :]:
        usable, choice = row["largest_usable_rate"], row["rate_of_choice"]
        for net, name in NETS.items():
            print(f"{name}: rate of choice {choice[net]:g}, largest usable rate {usable[net]}")
        print(f"epochs without over epochs with, each at its best: {_ratio(row['ratio_of_best'])}")
        for rate, value in row["ratio_at_equal_rate"].items():
            print(f"the same, both at {rate}: {_ratio(value)}")


def _ratio(value):
    if value is None:
        return "not all got there"
    return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws epochs against learning rates, and against the scale of the initial kernels."""
    by_rate, by_scale = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    options = record["arguments"]
    cells = [row for row in record["results"] if row["part"] == "training"]
    never, diverged = 1.6 * options["epochs"], 2.6 * options["epochs"]

    def height(cell):
        return cell["epochs"] or (diverged if 2 * cell["diverged"] > cell["runs"] else never)

    def point(axes, x, cell, color, marker, **style):
        whole = cell["reached"] == cell["runs"]
        axes.errorbar(
            x,
            height(cell),
            2 * (cell["error"] or 0.0),
            color=color,
            marker=marker if cell["epochs"] else "x",
            markerfacecolor=color if whole else "white",
            markersize=6,
            capsize=2,
            zorder=3,
            **style,
        )

    marks = {"batch": (study.COLORS[0], "o", 0.95), "none": (study.COLORS[1], "s", 1.05)}
    for net, (color, marker, aside) in marks.items():
        rows = [c for c in cells if (c["net"], c["scale"]) == (net, 1.0)]
        for cell in rows:
            point(by_rate, aside * cell["learning_rate"], cell, color, marker)
        there = [cell for cell in rows if cell["epochs"]]
        by_rate.plot(
            [aside * cell["learning_rate"] for cell in there],
            [cell["epochs"] for cell in there],
            color=color,
            marker=marker,
            label=NETS[net],
        )
        if any(c["net"] == net and c["scale"] != 1 for c in cells):
            _draw_scales(by_scale, point, cells, net, color, marker)
    by_rate.set(xscale="log", yscale="log", xlabel="learning rate")
    by_rate.set_ylabel(f"epochs to {options['target']:.0%} of the test images right")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if t <= options["epochs"]]
    by_rate.set_yticks([*ticks, never, diverged], [*(f"{t:g}" for t in ticks), "never", "diverged"])
    by_rate.minorticks_off()
    for axes in (by_rate, by_scale):
        axes.axhline(options["epochs"], color="black", linewidth=0.8, linestyle=(0, (2, 2)))
    by_scale.set(xlabel="initial kernels times")
    by_scale.tick_params(labelleft=True)
    by_scale.plot([], [], "o", color="black", label="rate that is best for 1")
    by_scale.plot([], [], "^", color="black", label="best of it, a tenth, ten times")
    by_rate.legend(frameon=False, fontsize=9, loc="lower left")
    by_scale.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    side = f" of {options['size']}x{options['size']}" if options["dataset"] == "digits" else ""
    figure.suptitle(
        f"{options['dataset']}{side}, {options['optimizer']}, batch {options['batch_size']}: mean "
        f"and two standard errors; hollow: some seeds never did in {options['epochs']} epochs",
        fontsize=10,
    )


def _draw_scales(axes, point, cells, net, color, marker):
    """Draws the rate of choice of the usual kernels, and the best of the rates around it."""
    scales = sorted({c["scale"] for c in cells})
    around = {c["learning_rate"] for c in cells if c["net"] == net and c["scale"] != 1}
    choice = best(cells, net)["learning_rate"]
    shift = -0.15 if net == "batch" else 0.15
    for place, scale in enumerate(scales):
        rows = [c for c in cells if (c["net"], c["scale"]) == (net, scale)]
        for cell in rows:
            if cell["learning_rate"] == choice:
                point(axes, place + shift, cell, color, marker)
        if rows:
            row = best(cells, net, scale, around)
            point(axes, place + shift + 0.1, row, color, "^")
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
