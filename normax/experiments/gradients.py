"""Measure the gradient that reaches each layer of a deep network, before any training.

Thirty dense layers with each normalizer, by activation, and by how well the weights are scaled.
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
from normax.experiments.deep import ACTIVATIONS, NORMS, Deep

GAINS = {0.3: "weights times 0.3", 1.0: "usual weights", 3.0: "weights times 3"}
IMAGES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "gradients")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Measures, reports, and returns the exit status."""
    study.prepare(options.out, "gradients")
    norms = ("none", "batch") if options.quick else NORMS
    activations = ("sigmoid",) if options.quick else tuple(ACTIVATIONS)
    depth, seeds = (8, 1) if options.quick else (30, 5)
    training, _ = data.load("digits", options.seed, size=8)
    batch = images_of(training, IMAGES)
    results: list[dict[str, Any]] = []
    interrupted = False
    with study.progress(len(norms) * len(activations) * len(GAINS), "networks") as advance:
        try:
            for activation in activations:
                for norm in norms:
                    for row in measured(norm, activation, depth, seeds, options.seed, batch, check):
                        results.append(row)
                        advance(f"{activation}, {norm}, {GAINS[row['gain']]}")
        except KeyboardInterrupt:
            interrupted = True
    show(results)
    return study.finish(options, "gradients", results, interrupted, draw)


def images_of(images: data.Images, number: int) -> dict[str, jax.Array]:
    """Returns a batch of the first images, as the loss takes it."""
    return {
        "image": jnp.asarray(images.image[:number]),
        "label": jnp.asarray(images.label[:number]),
        "weight": jnp.ones(number),
    }


def measured(norm, activation, depth, seeds, seed, batch, check):
    """Yields the lengths of the gradients at each layer, for each gain."""
    model = Deep(norm, activation, depth)
    key = jax.random.key(seed)
    state = train.TrainState.create(model, optax.sgd(0.1), key, batch["image"], train=False)
    # One program: with the gain and the seed only the weights change.
    lengths = jax.jit(
        lambda params: diagnostics.gradient_norms(compare.loss, state.replace(params=params), batch)
    )
    init = jax.jit(model.init, static_argnames="train")
    keys = [jax.random.fold_in(key, number) for number in range(seeds)]
    starts = [init(key, batch["image"], train=False)["params"] for key in keys]
    for gain in GAINS:
        found = []
        for params in starts:
            norms = lengths(scaled(params, gain))
            layers = [norms[f"dense{layer}"] for layer in range(1, depth + 1)]
            found.append([[float(each.weights), float(each.output)] for each in layers])
            check()
        with np.errstate(divide="ignore"):  # what float32 cannot hold is written as null
            logs = np.log10(np.array(found))
        # By what a gradient is multiplied in a layer on its way back; the first layer is left out,
        # whose inputs are pixels of a scale of their own.
        factors = 10 ** ((logs[:, 1, 1] - logs[:, -1, 1]) / (depth - 2))
        yield {
            "norm": norm,
            "activation": activation,
            "gain": gain,
            "weights": (10 ** logs[..., 0].mean(0)).tolist(),
            "outputs": (10 ** logs[..., 1].mean(0)).tolist(),
            "factor": float(factors.mean()),
            "error": float(factors.std() / max(seeds - 1, 1) ** 0.5),
        }


def scaled(params: dict[str, Any], gain: float) -> dict[str, Any]:
    """Returns parameters whose kernels, but for the logits', are larger by a factor."""
    return jax.tree.map_with_path(
        lambda path, leaf: gain * leaf if path[0].key != "logits" and leaf.ndim > 1 else leaf,
        params,
    )


def show(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    cases = dict.fromkeys((row["activation"], row["norm"]) for row in results)
    rows = []
    for activation, norm in cases:
        of = {
            row["gain"]: row
            for row in results
            if (row["activation"], row["norm"]) == (activation, norm)
        }
        cells = [f"{of[gain]['factor']:.3f}" if gain in of else "" for gain in GAINS]
        ends = [_ratio(of[gain]["weights"]) if gain in of else "" for gain in GAINS]
        rows.append((f"{activation}, {norm}", *cells, *ends))
    study.table(
        "gradients in a deep network before training",
        ("layers", *(f"x{gain:g}" for gain in GAINS), *(f"ends x{gain:g}" for gain in GAINS)),
        rows,
        "x0.3, x1, x3: by what the gradient at a layer's output is multiplied on its way back "
        "through a layer, but for the first, the weights the usual ones times this; 1 neither "
        "vanishes nor explodes; ends: gradient of the first layer's weights over the last's",
    )


def _ratio(weights):
    return f"{weights[0] / weights[-1]:.1e}" if weights[-1] else "-"


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws the length of the gradient of each layer's weights, a panel for each case."""
    results = record["results"]
    activations = list(dict.fromkeys(row["activation"] for row in results))
    figure.set_size_inches(10, 8)
    panels = figure.subplots(len(GAINS), len(activations), sharex=True, sharey=True, squeeze=False)
    for line, (gain, title) in zip(panels, GAINS.items(), strict=True):
        for axes, activation in zip(line, activations, strict=True):
            for row in results:
                if (row["activation"], row["gain"]) == (activation, gain):
                    lengths = np.array(row["weights"], float)
                    style = dict(zip(STYLED, STYLES[row["norm"]], strict=True))
                    layers = range(1, len(lengths) + 1)
                    axes.semilogy(layers, np.clip(lengths, 1e-30, 1e30), label=row["norm"], **style)
            axes.axhline(1, color="black", linewidth=0.8, alpha=0.4)
            axes.set_title(f"{activation}, {title}", fontsize=9.5)
    for axes in panels[-1]:
        axes.set(xlabel="layer")
    for axes in panels[:, 0]:
        axes.set(ylabel="gradient of the weights", ylim=(1e-22, 1e22))
    panels[0, 0].legend(frameon=False, fontsize=8.5, ncols=2)
    figure.suptitle("gradient norm by layer before training: digits, width 100", fontsize=11)


COLORS = dict(zip(NORMS, ("#777777", *study.COLORS[:5]), strict=True))
STYLED = ("color", "linestyle", "linewidth")
# Three of them are all but one line.
STYLES = {
    "none": (COLORS["none"], "-", 1.8),
    "batch": (COLORS["batch"], "-", 1.8),
    "layer": (COLORS["layer"], "-", 4.5),
    "rms": (COLORS["rms"], "-", 2.2),
    "group": (COLORS["group"], (0, (3, 3)), 1.6),
    "weight": (COLORS["weight"], (0, (2, 1)), 1.8),
}
