"""Measure E[(xhat_B - xhat_P)^2] against the size of the batch, for four laws and in a network.

xhat_B is an input normalized by the statistics of its batch, xhat_P by those of the population.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normax
import normax.linen
from normax import theory, train
from normax.diagnostics.watch import watched
from normax.experiments import compare, data, study
from normax.experiments.laws import LAWS
from normax.experiments.network import Network

ENTRIES = 2**21  # that are drawn at once
LAYERS = "trained network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "noise")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Simulates, trains, reports, and returns the exit status."""
    study.prepare(options.out, "noise")
    sizes = (8, 32, 128) if options.quick else (4, 8, 16, 32, 64, 128, 256)
    draws = 1 if options.quick else 48
    results: list[dict[str, Any]] = []
    interrupted = False
    key = jax.random.key(options.seed)
    number = len(LAWS) * len(sizes) + (1 if options.quick else len(sizes))
    with study.progress(number, "measurements") as advance:
        try:
            for law in LAWS:
                for size in sizes:
                    keys = jax.random.split(jax.random.fold_in(key, size), draws)
                    results.append(simulate(law, size, keys, check))
                    advance(f"{law}, batches of {size}")
            for row in in_a_network(options, sizes[1::2] if options.quick else sizes, key, check):
                results.append(row)
                advance(f"{LAYERS}, batches of {row['batch_size']}")
        except KeyboardInterrupt:
            interrupted = True
    show(results)
    return study.finish(options, "noise", results, interrupted, draw)


@functools.partial(jax.jit, static_argnums=(1, 2))
def noise(key, law, size):
    """Returns the noise of each of many batches."""
    x = LAWS[law].draw(key, (size, ENTRIES // size))
    return jnp.mean((normax.normalize_batch(x, epsilon=0.0)[0] - x) ** 2, 0)


def simulate(law, size, keys, check) -> dict[str, Any]:
    """Measures the noise of one law and size."""
    found = study.measured(lambda key: noise(key, law, size), keys, check)
    kurtosis = LAWS[law].excess_kurtosis
    return {
        "inputs": law,
        "batch_size": size,
        "measured": float(found.mean),
        "error": study.error_of(found),
        "exact": theory.batch_noise(size) if law == "gaussian" else None,
        "first_order": theory.approximate_noise(size, excess_kurtosis=kurtosis),
    }


def in_a_network(options, sizes, key, check):
    """Yields the noise of the inputs of batch norms of a trained network, all layers together."""
    training, _ = data.load("digits", options.seed)
    model = Network("batch")
    example = jnp.asarray(training.image[:2])
    state = train.TrainState.create(model, optax.adam(3e-3), key, example, train=False)
    step, rng = train.train_step(compare.loss), np.random.default_rng(options.seed)
    for _ in range(1 if options.quick else 5):
        for batch in compare.shuffled(training, 64, rng):
            state, _ = step(state, batch)
            check()
    image = jnp.asarray(training.image[: 64 if options.quick else 512])
    layers = [x.reshape(-1, x.shape[-1]) for x in inputs_of_norms(state, image)]
    shapes = [(theory.excess_kurtosis(x, 0), theory.skewness(x, 0)) for x in layers]
    kurtosis, skewness = (np.concatenate(values) for values in zip(*shapes, strict=True))
    for size in sizes:
        batches = max(2**19 // size // (16 if options.quick else 1), 256)
        parts = []
        for x in layers:
            xhat = normax.normalize_batch(x, epsilon=0.0)[0]
            parts.append(normax.moments(_noise_of_drawn(key, xhat, size, batches), (0, 1)))
            check()
        found = functools.reduce(normax.merge, parts)
        yield {
            "inputs": LAYERS,
            "batch_size": size,
            "measured": float(found.mean),
            "error": study.error_of(found),
            "exact": None,
            "first_order": theory.approximate_noise(size, excess_kurtosis=float(kurtosis.mean())),
            "excess_kurtosis": [float(q) for q in np.quantile(kurtosis, (0, 0.5, 1))],
            "skewness": [float(q) for q in np.quantile(skewness, (0, 0.5, 1))],
        }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _noise_of_drawn(key, xhat, size, batches):
    """Returns the noise of batches drawn from the entries of each feature."""

    def of_feature(carry, column):
        x = jax.random.choice(jax.random.fold_in(key, carry), column, (size, batches))
        return carry + 1, jnp.mean((normax.normalize_batch(x, epsilon=0.0)[0] - x) ** 2, 0)

    return jax.lax.scan(of_feature, 0, xhat.T)[1]


def inputs_of_norms(state, image) -> list[jax.Array]:
    """Returns what each batch norm of a model is given."""

    def note(call):
        return call.input if isinstance(call.module, normax.linen.BatchNorm) else None

    def call_it(model, image, train):
        return jnp.sum(model(image, train=train))

    _, notes = watched(call_it, state, image, train=False, note=note)
    return [x for calls in notes.values() for x in calls]


def show(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    rows = [
        (
            row["inputs"],
            str(row["batch_size"]),
            f"{row['measured']:.6f}",
            f"{row['error']:.6f}",
            "" if row["exact"] is None else f"{row['exact']:.6f}",
            f"{row['first_order']:.6f}",
            f"{row['measured'] / row['first_order']:.3f}",
        )
        for row in results
    ]
    study.table(
        "noise of a batch's statistics",
        ("inputs", "M", "measured", "se", "exact", "first order", "ratio"),
        rows,
        "exact: 2 - 2 E[s_M], of a Gaussian; first order: 1/M + (excess kurtosis + 2)/(4 M), which "
        "is 3/(2 M) for a Gaussian; ratio: measured over the first order; se: standard error",
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws M times the noise against M, with what the first order says."""
    absolute, relative = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["inputs"] for row in record["results"]))
    for color, name in zip(study.COLORS, names, strict=False):
        rows = [row for row in record["results"] if row["inputs"] == name]
        sizes = np.array([row["batch_size"] for row in rows])
        found, error, first = (
            np.array([row[label] for row in rows]) for label in ("measured", "error", "first_order")
        )
        style = {"color": color, "marker": "o", "markersize": 4.5, "label": name, "capsize": 2}
        absolute.errorbar(sizes, found, 2 * error, linestyle="none", **style)
        absolute.plot(sizes, first, color=color, linewidth=1.2)
        relative.errorbar(sizes, found / first, 2 * error / first, linewidth=1.5, **style)
    exact = [row for row in record["results"] if row["exact"] is not None]
    relative.plot(
        [row["batch_size"] for row in exact],
        [row["exact"] / row["first_order"] for row in exact],
        color="black",
        linewidth=0.8,
        linestyle=(0, (2, 2)),
        label="exact, gaussian",
        zorder=5,
    )
    absolute.set(xscale="log", yscale="log", ylabel="noise; lines: first order")
    relative.axhline(1, color="black", linewidth=0.8, alpha=0.5)
    relative.set(xscale="log", ylabel="measured / first order")
    for axes in (absolute, relative):
        axes.set(xlabel="batch size M")
        axes.set_xticks(sorted({row["batch_size"] for row in record["results"]}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
    relative.legend(frameon=False, fontsize=9)
    figure.suptitle("E (xhat of the batch - xhat of the population)^2", fontsize=11)
