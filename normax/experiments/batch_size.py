"""Measure gamma^2 and the test error against the size of the batch, batch norm layer by layer.

Batch norm after one layer of a network at a time, after all, and after none. The size of a batch
changes the noise of its statistics, that of its gradient and the number of updates: measured after
as many epochs, after as many steps, and in one size of batch with statistics of fewer examples.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import linen as norms
from normax import train
from normax.experiments import compare, data, study
from normax.experiments.network import Network

AFTER = {
    "conv 1": ("norm1",),
    "conv 2": ("norm2",),
    "dense 1": ("norm3",),
    "all": ("norm1", "norm2", "norm3"),
    "none": (),
}
CONTROLS = {
    "epochs": "as many epochs",
    "steps": "as many steps",
    "ghosts": "statistics of M in batches of {}",
}
SIDE = 16  # of an image: an eighth of the work of 28
RATE = 0.1


class Scope(NamedTuple):
    """How much is run."""

    after: tuple[str, ...]
    sizes: tuple[int, ...]
    ghosts: tuple[int, ...]
    whole: int  # the batch that is split into ghosts
    epochs: int
    steps: int
    seeds: int


FULL = Scope(tuple(AFTER), (8, 16, 32, 64, 128, 256), (8,), 128, 10, 200, 3)
QUICK = Scope(("dense 1",), (8, 64), (8,), 64, 3, 60, 2)


class LayerByLayer(Network):
    """The network of the comparison with batch norm after some of its layers.

    Attributes:
      layers: the names of the batch norms that are there.
      ghost_size: number of examples that statistics are of; None: of the whole batch.
    """

    norm: str = "batch"
    layers: tuple[str, ...] = ()
    ghost_size: int | None = None

    def normalized(self, layer, x, train, name):
        """Applies a layer, and batch norm if it is one of those."""
        x = layer(x)
        if name not in self.layers:
            return x
        # The statistics of the batch that came last: measured on one of all the images.
        options: dict[str, Any] = {"use_running_average": not train, "momentum": 0.0, "name": name}
        if self.ghost_size is None:
            return norms.BatchNorm(**options)(x)
        return norms.GhostBatchNorm(ghost_size=self.ghost_size, **options)(x)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "batch-size")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Trains, reports, and returns the exit status; an interruption keeps what was measured."""
    study.prepare(options.out, "batch-size")
    scope = QUICK if options.quick else FULL
    runs: list[dict[str, Any]] = []
    interrupted = False
    networks = [(after, None, size) for after in scope.after for size in scope.sizes]
    networks += [(a, size, scope.whole) for a in scope.after if AFTER[a] for size in scope.ghosts]
    trainer = Trainer(scope, options.seed, check)
    with study.progress(scope.seeds * len(networks), "trainings") as advance:
        try:
            for seed in range(options.seed, options.seed + scope.seeds):
                for network in networks:
                    runs.extend(trainer.train(seed, *network))
                    advance(f"after {network[0]}, batches of {network[2]}")
        except KeyboardInterrupt:
            interrupted = True
    # A ghost of the whole batch is the batch: that one is not trained twice.
    whole = [r for r in runs if (r["control"], r["batch_size"]) == ("steps", scope.whole)]
    runs += [{**row, "control": "ghosts"} for row in whole if row["gamma2"]]
    results = [*rows_of(runs), *trends_of(runs)]
    show(results, scope)
    return study.finish(options, "batch-size", results, interrupted, draw)


class Made(NamedTuple):
    """A model and what trains and measures it.

    Attributes:
      model: the network.
      step: a training step.
      evaluate: an evaluation step.
      statistics: of variables and images, the running statistics after a batch of these.
      start: a state to put what is measured in.
    """

    model: LayerByLayer
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    statistics: Callable[..., Any]
    start: train.TrainState


class Trainer:
    """Trains networks, each compiled once for all seeds."""

    def __init__(self, scope: Scope, first: int, check: Callable[[], None]):
        self.scope, self.check = scope, check
        self.splits: dict[int, Any] = {
            seed: data.load("digits", seed, size=SIDE) for seed in range(first, first + scope.seeds)
        }
        self.tx = optax.sgd(RATE)
        self.made: dict[tuple[str, int | None], Made] = {}

    def make(self, after: str, ghost_size: int | None) -> "Made":
        """Returns a model and what trains and measures it."""
        if (after, ghost_size) not in self.made:
            model = LayerByLayer(layers=AFTER[after], ghost_size=ghost_size)

            def statistics(variables, image):
                return model.apply(variables, image, train=True, mutable=["batch_stats"])[1]

            step, evaluate = train.train_step(compare.loss), train.eval_step(compare.loss)
            start = self.start(model, 0)
            made = Made(model, step, evaluate, jax.jit(statistics), start)
            self.made[after, ghost_size] = made
        return self.made[after, ghost_size]

    def start(self, model, seed: int) -> train.TrainState:
        """Returns the state before the first step."""
        image = jnp.zeros((1, SIDE, SIDE, 1))
        return train.TrainState.create(model, self.tx, jax.random.key(seed), image, train=False)

    def train(
        self, seed: int, after: str, ghost_size: int | None, size: int
    ) -> Iterator[dict[str, Any]]:
        """Yields what one network is after as many steps, and after as many epochs."""
        made = self.make(after, ghost_size)
        training, scope = self.splits[seed][0], self.scope
        state, rng = self.start(made.model, seed), np.random.default_rng(seed)
        marks = {"steps": scope.steps}
        if ghost_size is None:
            marks["epochs"] = scope.epochs * (len(training.label) // size)
        for taken, batch in enumerate(endless(training, size, rng), start=1):
            state, metrics = made.step(state, batch)
            jax.block_until_ready(metrics)
            self.check()
            for name in (name for name, at in marks.items() if at == taken):
                yield {
                    "control": name if ghost_size is None else "ghosts",
                    "after": after,
                    "batch_size": ghost_size or size,
                    "seed": seed,
                    "steps": taken,
                    "epochs": taken / (len(training.label) // size),
                    **self.measure(state.params, seed, after),
                }
            if taken == max(marks.values()):
                return

    def measure(self, params, seed: int, after: str) -> dict[str, Any]:
        """Returns gamma^2 of each layer, error and loss, by the statistics of all images.

        Running averages would be noisier the smaller the batch is.
        """
        made = self.make(after, None)
        training, test = self.splits[seed]
        variables = {"params": params, **made.start.model_state}
        model_state = made.statistics(variables, training.image)
        state = made.start.replace(params=params, model_state=dict(model_state))
        found = {
            f"{split}_{name}": value
            for split, images in (("train", training), ("test", test))
            for name, value in compare.measure(made.evaluate, state, images).items()
        }
        scales = {name: params[name]["scale"] for name in AFTER[after]}
        return {
            "gamma2": {name: float(jnp.mean(scale**2)) for name, scale in scales.items()},
            "test_error": 1 - found["test_accuracy"],
            "test_loss": found["test_loss"],
            "train_loss": found["train_loss"],
        }


def endless(images, size, rng):
    """Yields batches, epoch after epoch."""
    while True:
        yield from compare.shuffled(images, size, rng)


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """Returns what was measured of one network, by name."""
    scales = {f"gamma2 {name}": value for name, value in row["gamma2"].items()}
    return {**scales, **{name: row[name] for name in ("test_error", "test_loss", "train_loss")}}


def over_seeds(values: list[float]) -> list[float | None]:
    """Returns the mean and its standard error."""
    several = len(values) > 1
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if several else None
    return [float(np.mean(values)), error]


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the means over the seeds, with their standard errors."""
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault((run["control"], run["after"], run["batch_size"]), []).append(run)
    order = [(c, a) for c in CONTROLS for a in AFTER]
    rows = []
    for key in sorted(groups, key=lambda key: (order.index(key[:2]), key[2])):
        several = [numbers_of(run) for run in groups[key]]
        measured = {name: over_seeds([n[name] for n in several]) for name in several[0]}
        row = {"part": "training", "control": key[0], "after": key[1], "batch_size": key[2]}
        first = groups[key][0]
        row |= {name: first[name] for name in ("steps", "epochs")}
        rows.append({**row, "runs": len(several), **measured})
    return rows


def trends_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns how much each number grows with each doubling of M: a line through each seed's."""
    lines: dict[tuple, dict[int, dict[int, dict[str, float]]]] = {}
    for run in runs:
        line = lines.setdefault((run["control"], run["after"]), {}).setdefault(run["seed"], {})
        line[run["batch_size"]] = numbers_of(run)
    trends = []
    for (control, after), seeds in lines.items():
        sizes = set().union(*seeds.values())
        whole = [line for line in seeds.values() if set(line) == sizes and len(sizes) > 1]
        if not whole:
            continue
        x = np.log2(sorted(sizes))
        slopes = {
            name: over_seeds(
                [
                    float(np.polyfit(x, [line[s][name] for s in sorted(sizes)], 1)[0])
                    for line in whole
                ]
            )
            for name in next(iter(whole[0].values()))
        }
        trends.append({"part": "trend", "control": control, "after": after, **slopes})
    return trends


def show(results: list[dict[str, Any]], scope: Scope) -> None:
    """Prints a table for each control, and the trends."""
    for control, text in CONTROLS.items():
        rows = [r for r in results if (r["part"], r["control"]) == ("training", control)]
        study.table(
            text.format(scope.whole),
            ("batch norm after", "M", "steps", "gamma^2", "test error, %", "test loss"),
            [
                (row["after"], str(row["batch_size"]), str(row["steps"]), *columns)
                for row in rows
                for columns in columns_of(row, 3)
            ],
            "gamma^2: mean over the features; of all, each layer's has a line; ±: standard error "
            f"over {scope.seeds} seeds",
        )
    study.table(
        "growth with each doubling of M",
        ("control", "batch norm after", "gamma^2", "test error, %", "test loss"),
        [
            (row["control"], row["after"], *columns)
            for row in results
            if row["part"] == "trend"
            for columns in columns_of(row, 4)
        ],
        "slope of a straight line in log2 M, of each seed; mean and standard error over the seeds",
    )


def columns_of(row: dict[str, Any], places: int) -> list[tuple[str, ...]]:
    """Returns a line of a table for each gamma^2 of a row, or one if there is none."""
    error, loss = _pair(row["test_error"], 100, places - 1), _pair(row["test_loss"], 1, places)
    scales = [_pair(row[name], 1, places) for name in scales_of(row)] or [""]
    return [(scale, *((error, loss) if scale is scales[0] else ("", ""))) for scale in scales]


def scales_of(row: dict[str, Any]) -> list[str]:
    """Returns the names of a row's gamma^2."""
    return [name for name in row if name.startswith("gamma2")]


def _pair(pair, unit, places):
    value, error = pair
    text = f"{unit * value:.{places}f}"
    return text if error is None else f"{text}±{unit * error:.{places}f}"


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws gamma^2 above and the test error below, a column for each control."""
    rows = [row for row in record["results"] if row["part"] == "training"]
    panels = figure.subplots(2, len(CONTROLS), sharex=True, sharey="row")
    sizes = sorted({row["batch_size"] for row in rows})
    scope = QUICK if record["arguments"]["quick"] else FULL
    colors = dict(zip(AFTER, (*study.COLORS[:4], study.COLORS[-1]), strict=True))
    for (control, text), (above, below) in zip(CONTROLS.items(), panels.T, strict=True):
        for after, color in colors.items():
            line = [r for r in rows if (r["control"], r["after"]) == (control, after)]
            if not line:
                continue
            x = [row["batch_size"] for row in line]
            style = {"color": color, "marker": "o", "markersize": 3.5, "capsize": 2}
            for name in scales_of(line[0]):
                # Of all three, the layers alone have lines too: dashed, in their colours.
                place = list(AFTER.values()).index((name.removeprefix("gamma2 "),))
                own = {**style, "color": study.COLORS[place]}
                dashes = "-" if len(scales_of(line[0])) == 1 else (0, (3, 1.5))
                _errors(above, x, [row[name] for row in line], 1, linestyle=dashes, **own)
            _errors(below, x, [row["test_error"] for row in line], 100, label=after, **style)
        above.set_title(text.format(scope.whole), fontsize=9)
        below.set(xscale="log", xlabel="M")
        below.set_xticks(sizes)
        below.get_xaxis().set_major_formatter("{x:.0f}")
        below.minorticks_off()
    panels[0][0].set_ylabel("mean gamma²")
    panels[1][0].set_ylabel("test error, %")
    panels[1][0].set_yscale("log")
    panels[1][0].set_yticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
    panels[1][0].minorticks_off()
    handles = panels[1][0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside right center", frameon=False, title="batch norm\nafter", fontsize=9
    )
    figure.suptitle(
        f"digits of {SIDE}x{SIDE}, SGD at {RATE:g}: mean and two standard errors; dashed: "
        "batch norm after all",
        fontsize=10,
    )


def _errors(axes, x, pairs, unit, **style):
    axes.errorbar(
        x, [unit * p[0] for p in pairs], [2 * unit * (p[1] or 0.0) for p in pairs], **style
    )
