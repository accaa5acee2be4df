"""Measure how unevenly least squares curves on incomes and heights, before and after scaling.

Incomes of mean 3,000 and deviation 400 dollars, heights of mean 69 and deviation 3 inches; in other
units; and scaled in four ways.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normax
from normax.experiments import study

MEAN, DEVIATION = (3000.0, 69.0), (400.0, 3.0)
UNITS = (1000.0, 12.0)  # thousands of dollars, feet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "conditioning")


def scaled(x: jax.Array) -> dict[str, jax.Array]:
    """Returns the features as they are, and scaled."""
    standard = normax.standardize_features(x)
    no_offset, no_factor = jnp.zeros(2), jnp.ones(2)
    by = {
        "dollars and inches": normax.FeatureScaling(no_offset, no_factor),
        "thousands of dollars and feet": normax.FeatureScaling(no_offset, jnp.array(UNITS)),
        "means subtracted": standard._replace(factor=no_factor),
        "over the deviations": standard._replace(offset=no_offset),
        "from 0 to 1": normax.min_max_features(x),
        "standardized": standard,
    }
    return {name: normax.transform_features(x, scaling) for name, scaling in by.items()}


def steps_to_converge(x: jax.Array) -> int:
    """Returns how many steps of gradient descent take the slowest error to a thousandth.

    At a rate of one over the largest curvature, along the axis of the smallest.
    """
    curvature = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False) ** 2
    left = 1 - curvature.min() / curvature.max()
    return int(np.ceil(np.log(1e-3) / np.log(left))) if left > 1e-3 else 1


def population(units: tuple[float, float] = (1.0, 1.0)) -> float:
    """Returns the condition number of the second moments themselves, without a sample."""
    mean, deviation = np.divide(MEAN, units), np.divide(DEVIATION, units)
    low, high = np.linalg.eigvalsh(np.outer(mean, mean) + np.diag(deviation**2))
    return float(high / low)


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Draws, scales, measures, and returns the exit status."""
    study.prepare(options.out, "conditioning")
    people, draws = 1000, 20 if options.quick else 400
    keys = jax.random.split(jax.random.key(options.seed), draws)
    found: dict[str, list[tuple[float, int]]] = {}
    interrupted = False
    with study.progress(draws, "samples") as advance:
        try:
            for number, key in enumerate(keys, 1):
                x = jnp.array(MEAN) + jnp.array(DEVIATION) * jax.random.normal(key, (people, 2))
                for name, y in scaled(x).items():
                    numbers = float(normax.condition_number(y)), steps_to_converge(y)
                    found.setdefault(name, []).append(numbers)
                advance(f"sample {number} of {people:,} people")
                check()
        except KeyboardInterrupt:
            interrupted = True
    exact = {"dollars and inches": population(), "standardized": 1.0}
    exact["thousands of dollars and feet"] = population(UNITS)
    results = []
    for name, numbers in found.items():
        condition, steps = np.array(numbers, np.float64).T
        results.append(
            {
                "features": name,
                "condition_number": float(condition.mean()),
                "deviation": float(condition.std()),
                "population": exact.get(name),
                "steps": float(np.median(steps)),
            }
        )
    show(results, draws, people)
    return study.finish(options, "conditioning", results, interrupted, draw)


def show(results: list[dict[str, Any]], draws: int, people: int) -> None:
    """Prints the table."""
    rows = [
        (
            row["features"],
            _short(row["condition_number"]),
            _short(row["deviation"]),
            "" if row["population"] is None else _short(row["population"]),
            f"{row['steps']:,.0f}",
        )
        for row in results
    ]
    study.table(
        "condition number of least squares on incomes and heights",
        ("features", "measured", "deviation", "population", "steps"),
        rows,
        f"measured: mean and deviation over {draws} samples of {people:,} people; population: of "
        "the law itself; steps: of gradient descent at one over the largest curvature, to a "
        "thousandth of the slowest error, median",
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws the condition numbers as bars, on a logarithmic scale."""
    axes = figure.subplots()
    rows = record["results"][::-1]
    names = [row["features"] for row in rows]
    values = [row["condition_number"] for row in rows]
    axes.barh(names, values, xerr=[row["deviation"] for row in rows], color=study.COLORS[0])
    for place, value in enumerate(values):
        axes.text(value * 1.25, place, _short(value), va="center", fontsize=9)
    axes.set(xscale="log", xlim=(0.5, 1e6), xlabel="condition number")
    figure.suptitle("least squares on incomes and heights", fontsize=11)


def _short(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
