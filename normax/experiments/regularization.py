"""Measure what the noise of a batch's statistics does to a loss, against zeta gamma^2.

L_BN - L_PN of three generalized linear models and four laws of inputs: at the truth, where the
model is the one that made the labels, and away from it; the gamma that is best; and batches that
are drawn without replacement.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normax
from normax import theory
from normax.experiments import study
from normax.experiments.laws import LAWS

ENTRIES = 2**21  # that are drawn at once


class Head(NamedTuple):
    """A generalized linear model.

    Attributes:
      loss: of a pre-activation and the mean of the label, but for what depends on the label alone.
      link: the mean of the label at the pre-activation that made it.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    link: Callable[[jax.Array], jax.Array]


HEADS = {
    "linear": Head(lambda h, mean: (h - mean) ** 2, lambda h: h),
    "logistic": Head(lambda h, mean: jax.nn.softplus(h) - mean * h, jax.nn.sigmoid),
    "relu": Head(lambda h, mean: jax.nn.relu(h) ** 2 / 2 - mean * h, jax.nn.relu),
}
# Head, law, and gamma and beta of the model and of the truth.
AWAY = [
    ("linear", "gaussian", (1.0, 0.0), (2.0, 0.0)),
    ("linear", "gaussian", (1.0, 0.0), (0.5, 0.0)),
    ("logistic", "gaussian", (1.0, 0.0), (2.0, 0.0)),
    ("logistic", "uniform", (3.0, 0.0), (1.0, 0.0)),
    ("logistic", "laplace", (3.0, 0.0), (1.0, 0.0)),
]
SKEWED = ("logistic", "exponential", (2.0, 0.5), (2.0, 0.5))
LARGEST = 128
OF = {"truth": "at the truth", "away": "away from it"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "regularization")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Simulates, reports, and returns the exit status."""
    study.prepare(options.out, "regularization")
    sizes = (32,) if options.quick else (8, 16, 32, 64, LARGEST)
    laws = ("gaussian",) if options.quick else tuple(LAWS)
    draws = 2 if options.quick else 48
    cases = [(head, law, (1.0, 0.0), (1.0, 0.0)) for head in HEADS for law in laws] + [SKEWED]
    populations = (64,) if options.quick else (40, 48, 64, 128, 512)
    work = [("truth", (*case, size)) for case in cases for size in sizes]
    work += [("away", (*case, LARGEST)) for case in AWAY[: 2 if options.quick else None]]
    work += [("gamma", (size,)) for size in sizes]
    work += [("without replacement", (number,)) for number in populations]
    results: list[dict[str, Any]] = []
    interrupted = False
    with study.progress(len(work), "measurements") as advance:
        try:
            for part, case in work:
                key = jax.random.key(options.seed)
                keys = jax.random.split(jax.random.fold_in(key, len(results)), draws)
                results.append({"part": part, **MEASURE[part](keys, check, *case)})
                advance(f"{part}: {', '.join(map(str, case))}")
        except KeyboardInterrupt:
            interrupted = True
    show(results)
    return study.finish(options, "regularization", results, interrupted, draw)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def simulated(key, head, law, model, truth, size):
    """Returns the gap of each of many batches, and the coefficients of the theory of them all."""
    loss, link = HEADS[head]
    x = LAWS[law].draw(key, (size, ENTRIES // size))
    xhat, _ = normax.normalize_batch(x, epsilon=0.0)
    (gamma, beta), (true_gamma, true_beta) = model, truth
    mean = link(true_gamma * x + true_beta)
    h = gamma * x + beta
    gap = jnp.mean(loss(gamma * xhat + beta, mean) - loss(h, mean), 0)
    slope, curvature = theory.loss_derivatives(loss, h, mean)
    zeta = [
        theory.decay_coefficient(curvature, x, size, axes=(0, 1), form=form).zeta * gamma**2
        for form in ("published", "corrected")
    ]
    first = theory.first_order_gap(slope, x, gamma, size, axes=(0, 1))
    return gap, jnp.stack([*zeta, first])


def gap_of(keys, check, head, law, model, truth, size) -> dict[str, Any]:
    """Measures L_BN - L_PN of a head, and what the theory says."""
    said = []

    def per_batch(key):
        gap, terms = simulated(key, head, law, model, truth, size)
        said.append(np.asarray(terms, np.float64))
        return gap

    found = study.measured(per_batch, keys, check)
    published, zeta, first = np.mean(said, 0)
    return {
        "head": head,
        "inputs": law,
        "gamma": model[0],
        "beta": model[1],
        "true_gamma": truth[0],
        "batch_size": size,
        "measured": float(found.mean),
        "error": study.error_of(found),
        "published": float(published),
        "corrected": float(zeta + first),
    }


@functools.partial(jax.jit, static_argnums=1)
def _best_gamma(key, size):
    x = jax.random.normal(key, (size, ENTRIES // size))
    return jnp.mean(x * normax.normalize_batch(x, epsilon=0.0)[0], 0)


def gamma_of(keys, check, size) -> dict[str, Any]:
    """Measures the gamma of the smallest squared loss, over the true one, of Gaussian inputs."""
    found = study.measured(lambda key: _best_gamma(key, size), keys, check)
    return {
        "batch_size": size,
        "measured": float(found.mean),
        "error": study.error_of(found),
        "published": 1 / (1 + theory.approximate_noise(size)),
        "corrected": theory.expected_deviation(size),
    }


@functools.partial(jax.jit, static_argnums=1)
def _drawn_without_replacement(key, number):
    # The first entries of a population in any order: it is standardized whole, the batch alone.
    x = jax.random.normal(key, (number, ENTRIES // number))
    batch = normax.normalize_batch(x, epsilon=0.0)[0][:32]
    return jnp.mean((normax.normalize_batch(batch, epsilon=0.0)[0] - batch) ** 2, 0)


def without_replacement(keys, check, number) -> dict[str, Any]:
    """Measures the gap of the squared loss in batches of 32 of a population."""
    found = study.measured(lambda key: _drawn_without_replacement(key, number), keys, check)
    left = theory.finite_population(32, number)
    return {
        "population": number,
        "batch_size": 32,
        "measured": float(found.mean),
        "error": study.error_of(found),
        "published": theory.approximate_noise(32),
        "corrected": left * theory.batch_noise(32),
    }


MEASURE = {
    "truth": gap_of,
    "away": gap_of,
    "gamma": gamma_of,
    "without replacement": without_replacement,
}


def show(results: list[dict[str, Any]]) -> None:
    """Prints a table for each part."""
    for part, text in OF.items():
        rows = [row for row in results if row["part"] == part]
        study.table(
            f"M (L_BN - L_PN) {text}",
            ("head, inputs", "gamma", "M", "measured", "se", "paper", "corrected"),
            [
                (
                    f"{row['head']}, {row['inputs']}",
                    f"{row['gamma']:g}" + (f" of {row['true_gamma']:g}" if part == "away" else ""),
                    str(row["batch_size"]),
                    *(
                        f"{row['batch_size'] * row[name]:.4f}"
                        for name in ("measured", "error", "published", "corrected")
                    ),
                )
                for row in rows
            ],
            "paper: zeta gamma^2 as published; corrected: with the term of a skewed input and, "
            "away from the truth, the first-order term",
        )
    columns = {"gamma": "batch_size", "without replacement": "population"}
    titles = {
        "gamma": "the best gamma over the true one, squared loss, Gaussian inputs",
        "without replacement": "L_BN - L_PN, squared loss, batches of 32 of a population",
    }
    for part, label in columns.items():
        study.table(
            titles[part],
            (label.replace("_", " "), "measured", "se", "published", "corrected"),
            [
                (
                    str(row[label]),
                    *(f"{row[n]:.5f}" for n in ("measured", "error", "published", "corrected")),
                )
                for row in results
                if row["part"] == part
            ],
            "corrected: E[s_M]"
            if part == "gamma"
            else "corrected: (P - M)/(P - 1) of 2 - 2 E[s_M]; published: 3/(2 M)",
        )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws measured over predicted at the truth, and away from it the gaps themselves."""
    ratios, gaps = figure.subplots(1, 2)
    truth = [row for row in record["results"] if row["part"] == "truth"]
    laws = list(dict.fromkeys(row["inputs"] for row in truth))
    dashes = {"linear": "-", "logistic": (0, (5, 1.5)), "relu": (0, (1, 1))}
    cases = dict.fromkeys((row["head"], row["inputs"], row["gamma"]) for row in truth)
    for head, law, gamma in cases:
        rows = [r for r in truth if (r["head"], r["inputs"], r["gamma"]) == (head, law, gamma)]
        sizes = [row["batch_size"] for row in rows]
        style = {"color": study.COLORS[laws.index(law)], "linestyle": dashes[head]}
        ratios.plot(sizes, [r["measured"] / r["corrected"] for r in rows], marker=".", **style)
        if law == "exponential" and head != "linear":
            published = [row["measured"] / row["published"] for row in rows]
            ratios.plot(sizes, published, marker="x", linewidth=0.9, **style)
    ratios.axhline(1, color="black", linewidth=0.8, alpha=0.5)
    ratios.set(xscale="log", xlabel="batch size M", ylabel="measured / predicted, at the truth")
    ratios.set_xticks(sorted({row["batch_size"] for row in truth}))
    ratios.get_xaxis().set_major_formatter("{x:.0f}")
    ratios.minorticks_off()
    for place, law in enumerate(laws):
        ratios.plot([], [], color=study.COLORS[place], linewidth=3, label=law)
    for head, line in dashes.items():
        ratios.plot([], [], color="black", linestyle=line, label=head)
    ratios.plot([], [], color="black", marker="x", linewidth=0.9, label="as published")
    ratios.legend(frameon=False, fontsize=8, ncols=2)
    away = [row for row in record["results"] if row["part"] == "away"]
    places = np.arange(len(away))
    labels = {
        "measured": "measured",
        "published": "zeta gamma² as published",
        "corrected": "corrected",
    }
    for shift, (name, label) in enumerate(labels.items()):
        values = [row["batch_size"] * row[name] for row in away]
        gaps.bar(places + 0.27 * (shift - 1), values, 0.25, label=label, color=study.COLORS[shift])
    gaps.set_xticks(
        places,
        [f"{r['head']}\n{r['inputs']}\n{r['gamma']:g}, true {r['true_gamma']:g}" for r in away],
        fontsize=8,
    )
    gaps.set(ylabel=f"M (L_BN - L_PN), away from the truth, M = {LARGEST}")
    gaps.legend(frameon=False, fontsize=9)
    figure.suptitle("what the noise of a batch's statistics does to a loss", fontsize=11)
