"""Measure how a loss curves as a network is trained, and how far its activations shift in a step.

One network with each of several normalizers, trained alike; along the way, on one held batch: the
largest step along the gradient that does not raise the loss, how fast the gradient changes on the
way, the largest curvature, and how far the input of each layer moves when a step is taken.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import diagnostics, train
from normax.experiments import compare, data, study
from normax.experiments.deep import Deep
from normax.experiments.gradients import COLORS, IMAGES, images_of

NORMS = ("none", "batch", "layer", "weight")
RATE = 0.1  # of training
TX = optax.sgd(RATE)  # one for all: a state is compiled for once with its optimizer
RATES = (0.01, 0.03, 0.1, 0.3)
MEASURES = {
    "largest_rate": "largest step along the gradient",
    "smoothness": "change of the gradient over the step",
    "curvature": "largest eigenvalue of the Hessian",
    "shift": "shift of layers' inputs in a step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "landscape")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Trains, measures, reports, and returns the exit status."""
    study.prepare(options.out, "landscape")
    norms = NORMS[:2] if options.quick else NORMS
    seeds, moments, depth = (1, (0, 10), 3) if options.quick else (5, (0, 10, 30, 100, 300), 8)
    results: list[dict[str, Any]] = []
    interrupted = False
    look, step = programs(depth, 8 if options.quick else 24)
    with study.progress(len(norms) * seeds, "trainings") as advance:
        try:
            for norm in norms:
                model = Deep(norm, "relu", depth)
                for seed in range(options.seed, options.seed + seeds):
                    for row in trained(model, seed, moments, look, step, check):
                        results.append({"norm": norm, "seed": seed, **row})
                    advance(f"{norm}, seed {seed}")
        except KeyboardInterrupt:
            interrupted = True
    show(results)
    return study.finish(options, "landscape", results, interrupted, draw)


def programs(depth: int, vectors: int):
    """Returns what looks at a state, and a training step, both jitted."""
    step = train.train_step(compare.loss, donate=False)

    @jax.jit
    def look(state, held, batch, key):
        of_params = diagnostics.objective(compare.loss, state, held)
        along = diagnostics.gradient_smoothness(of_params, state.params, jnp.array(RATES))
        spectrum = diagnostics.hessian_spectrum(of_params, state.params, key=key, steps=vectors)
        before, after = (
            diagnostics.layer_statistics(compare.loss, s, held)
            for s in (state, step(state, batch)[0])
        )
        shifts = diagnostics.activation_shift(before, after)
        # The input of the first layer is the data, which does not move.
        moved = [shifts[f"dense{layer}"].mean for layer in range(2, depth + 1)]
        return {
            "loss": of_params(state.params),
            "largest_rate": diagnostics.largest_learning_rate(of_params, state.params),
            "smoothness": along.smoothness.max(),
            "curvature": spectrum.values[-1],
            "lowest": spectrum.values[0],
            "shift": jnp.stack(moved).mean(),
            "shifts": moved,
        }

    return look, step


def trained(model, seed, moments, look, step, check):
    """Yields what is seen of a network after so many steps of its training."""
    training, _ = data.load("digits", seed, size=8)
    held, key = images_of(training, IMAGES), jax.random.key(seed)
    state = train.TrainState.create(model, TX, key, held["image"], train=False)
    rng = np.random.default_rng(seed)
    batches = iter(())
    for number in range(max(moments) + 1):
        if (batch := next(batches, None)) is None:
            batches = compare.shuffled(training, 64, rng)
            batch = next(batches)
        if number in moments:
            seen = look(state, held, batch, jax.random.fold_in(key, number))
            yield {"step": number, **jax.tree.map(float, seen)}
        state, _ = step(state, batch)
        check()


def averaged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns geometric means over the seeds, and the factor that one error is."""
    found = []
    for norm, number in dict.fromkeys((row["norm"], row["step"]) for row in results):
        rows = [row for row in results if (row["norm"], row["step"]) == (norm, number)]
        logs = {name: np.log([row[name] for row in rows]) for name in ("loss", *MEASURES)}
        one = {name: float(np.exp(log.mean())) for name, log in logs.items()}
        errors = {
            name: float(np.exp(log.std() / max(len(rows) - 1, 1) ** 0.5))
            for name, log in logs.items()
        }
        found.append({"norm": norm, "step": number, "mean": one, "error": errors})
    return found


def show(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    rows = [
        (
            f"{row['norm']}, step {row['step']}",
            *(f"{row['mean'][name]:.3g}" for name in ("loss", *MEASURES)),
        )
        for row in averaged(results)
    ]
    study.table(
        "a loss as it is trained",
        ("normalizer", "loss", "largest step", "smoothness", "curvature", "shift"),
        rows,
        "geometric means over seeds. largest step: learning rate up to which the loss of the held "
        "batch does not rise; smoothness: largest change of the gradient over the length of the "
        f"step, for steps of {', '.join(map(str, RATES))}; curvature: largest eigenvalue of the "
        "Hessian; shift: of the means of layers' inputs when a step is taken, in deviations",
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws each measure against the steps taken."""
    from matplotlib.ticker import LogLocator

    rows = averaged(record["results"])
    figure.set_size_inches(10, 6.4)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    last = max(row["step"] for row in rows)
    for axes, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for norm in dict.fromkeys(row["norm"] for row in rows):
            mine = [row for row in rows if row["norm"] == norm]
            value = np.array([row["mean"][name] for row in mine])
            error = np.array([row["error"][name] for row in mine]) ** 2
            axes.errorbar(
                [row["step"] for row in mine],
                value,
                (value - value / error, value * error - value),
                color=COLORS[norm],
                marker="o",
                markersize=4,
                capsize=2,
                label=norm,
            )
        axes.set(yscale="log")
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(-1, 1.2 * last)
        axes.set_xticks(sorted({row["step"] for row in rows}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.get_yaxis().set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.get_yaxis().set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
    for axes in panels[2:]:
        axes.set(xlabel="steps taken")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"a network with ReLU on the digits, SGD at {RATE:g}: geometric means over seeds, 2 errors",
        fontsize=11,
    )
