"""Measure how much better each network does on the images it was trained on than on others.

Four convolutions and a hidden layer, with batch norm, weight norm, mixtures of both, population
norm and dropout: validation loss minus training loss, both in inference mode.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import diagnostics, theory, train
from normax.experiments import compare, data, study
from normax.experiments import generalization_claims as claims
from normax.experiments.variants import VARIANTS, Network, standardized
from normax.population_training import population_step

QUICK = ("SGD", "BN", "WN, dropout")
# How many steps measured statistics and coefficients of decay serve, and the probes of these.
POPULATION_EVERY, DECAY_EVERY, PROBES = 2, 20, 4
POPULATION = 10_000  # images at most that population statistics are of
SCORES = ("train_loss", "validation_loss", "gap", "accuracy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "generalization")
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, default="digits", help="digits are as shipped, 8x8")
    add("--data-home", help="folder of scikit-learn's cache, for mnist and cifar10")
    add("--train-images", type=study.positive_int, default=512, help="256 or more")
    add("--validation-images", type=study.positive_int, default=10_000, help="at most")
    add("--seeds", type=study.positive_int, default=4, help="how many, from --seed on")
    add("--epochs", type=study.positive_int, default=16)
    text = "at a batch of 64, in proportion at others; falls to 0 as a cosine"
    add("--learning-rate", type=study.positive_float, default=0.01, help=text)


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Trains, reports, and returns the exit status; an interruption keeps what was measured."""
    study.prepare(options.out, "generalization")
    if options.quick:
        options.train_images, options.validation_images = 256, 256
        options.seeds, options.epochs = 2, 3
    names = QUICK if options.quick else tuple(VARIANTS)
    pool, test = data.load(options.dataset, options.seed, options.data_home, size=8)
    least = max(VARIANTS[name].batch_size for name in names)
    if not least <= options.train_images <= len(pool.label):
        raise data.UsageError(
            f"--train-images {options.train_images} is not from {least}, the largest batch, "
            f"to {len(pool.label)}, all there are"
        )
    results: list[dict[str, Any]] = []
    interrupted = False
    with study.progress(len(names) * options.seeds, "networks") as advance:
        try:
            for name in names:
                row: dict[str, Any] = {"variant": name, **VARIANTS[name]._asdict(), "runs": []}
                results.append(row)
                for scores in fits(name, pool, test, options, check):
                    row["runs"].append(scores)
                    advance(f"{name}: gap {scores['gap']:.4f}")
        except KeyboardInterrupt:
            interrupted = True
    results = [row for row in results if row["runs"]]
    for row in results:
        row.update(claims.summary(row["runs"], SCORES))
    results += claims.judge(results)
    show(results, options)
    return study.finish(options, "generalization", results, interrupted, draw)


def optimizer_and_step(variant, options):
    """Returns the optimizer of a variant, and how it takes a step."""
    size = variant.batch_size
    steps = options.train_images // size * options.epochs
    rate = options.learning_rate * variant.rate * size / 64
    tx = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
    if variant.decay:
        zeta = diagnostics.measured_decay(compare.loss, batch_size=size, probes=PROBES)
        tx = optax.chain(theory.gamma_decay(zeta, every=DECAY_EVERY), tx)
    if variant.population:
        gradient = variant.population
        return tx, population_step(compare.loss, every=POPULATION_EVERY, gradient=gradient)
    step = train.train_step(compare.loss)
    return tx, lambda state, batch, population: step(state, batch)


def split(pool: data.Images, test: data.Images, seed: int, options: argparse.Namespace):
    """Returns images to train on, and others to validate on: what is left, and the test images."""
    order = np.random.default_rng(seed).permutation(len(pool.label))
    chosen, left = np.split(order, [options.train_images])
    rest = data.Images(
        *(np.concatenate([new, old[left]]) for new, old in zip(test, pool, strict=True))
    )
    return (
        data.Images(pool.image[chosen], pool.label[chosen]),
        data.Images(*(array[: options.validation_images] for array in rest)),
    )


def fits(name, pool, test, options, check):
    """Yields what networks of one variant reach, one for each seed."""
    model, evaluate = Network(VARIANTS[name]), train.eval_step(compare.loss)
    tx, step = optimizer_and_step(VARIANTS[name], options)

    for seed in range(options.seed, options.seed + options.seeds):
        training, validation = split(pool, test, seed, options)
        image = jnp.asarray(training.image[:256])
        key = jax.random.key(seed, impl="rbg")  # of which a dropout is faster
        state = train.TrainState.create(model, tx, key, image[:2], train=False)
        if model.variant.weight_norm:
            state = state.replace(params=standardized(model, state.variables, image))
        rng, losses = np.random.default_rng(seed), []
        most = min(options.train_images, POPULATION)
        everything = jax.device_put(next(compare.shuffled(training, most, rng)))
        for _ in range(options.epochs):
            for batch in compare.shuffled(training, model.variant.batch_size, rng):
                state, metrics = step(state, batch, everything)
                losses.append(metrics["loss"])
                jax.block_until_ready(metrics)
                check()
        seen, others = (
            compare.measure(evaluate, state, images, size=256) for images in (training, validation)
        )
        yield {
            "seed": seed,
            "steps": len(losses),
            "first_batch_loss": float(losses[0]),
            "train_loss": seen["loss"],
            "validation_loss": others["loss"],
            "gap": others["loss"] - seen["loss"],
            "train_accuracy": seen["accuracy"],
            "accuracy": others["accuracy"],
            "validation_images": len(validation.label),
        }


def show(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints a table of the variants, and one of the claims."""
    rows = [row for row in results if "variant" in row]
    study.table(
        "training and validation loss, in inference mode",
        ("variant", "train", "valid", "gap", "se", "right", "se"),
        [
            (
                row["variant"],
                *(f"{row[name]:.3f}" for name in (*SCORES[:3], "gap_error")),
                *(f"{row[name]:.3f}" for name in ("accuracy", "accuracy_error")),
            )
            for row in rows
        ],
        f"mean and standard error over {options.seeds} seeds; {options.train_images} images of "
        f"{options.dataset}, {options.epochs} epochs; M = 64 but "
        "where named; gap: validation minus training; right: accuracy",
    )
    study.table(
        "the claims",
        ("claim", "of", "difference", ""),
        [
            (
                row["claim"],
                row["of"],
                f"{row['difference']:+.4f} ± {row['room']:.4f}",
                row["verdict"],
            )
            for row in results
            if "claim" in row
        ],
        "difference: the first minus the second, seed by seed, with its 95 % interval",
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws the gap and the accuracy of each variant, with the seeds as dots."""
    rows = [row for row in record["results"] if "variant" in row][::-1]
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1))
    titles = {
        "gap": "validation minus training loss",
        "train_loss": "training loss",
        "accuracy": "validation accuracy",
    }
    for axes, (name, title), color in zip(panels, titles.items(), study.COLORS, strict=False):
        for place, row in enumerate(rows):
            values = [run[name] for run in row["runs"]]
            axes.plot(values, [place] * len(values), ".", color=color, alpha=0.35, markersize=5)
            style = {"color": color, "marker": "o", "markersize": 5, "capsize": 2.5}
            axes.errorbar(row[name], place, xerr=row[f"{name}_error"], **style)
        axes.set(xlabel=title)
    panels[0].set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=9)
    panels[1].set(xscale="log")
    panels[1].get_xaxis().set_minor_formatter("")
    number, images = len(rows[0]["runs"]), record["arguments"]["train_images"]
    figure.suptitle(
        f"four convolutions on {images} images of {record['arguments']['dataset']}: mean and "
        f"standard error over {number} seeds (dots)",
        fontsize=11,
    )
