"""Statements of the scaling of features, of running averages and of gamma before a linear layer."""

import math
from typing import Any

import jax
import numpy as np

import normax
from normax.experiments.conditioning import DEVIATION, MEAN
from normax.experiments.statements.verdict import generator, row

PEOPLE = 1000
BATCH = 32


@jax.jit
def _scaled(x):
    """Returns a sample from 0 to 1, and its first ten standardized in two ways."""
    by = [normax.standardize_features(x[:10], unbiased=unbiased) for unbiased in (True, False)]
    standard = [normax.transform_features(x[:10], one) for one in by]
    return normax.transform_features(x, normax.min_max_features(x)), standard


def scaling(key, draws, check) -> list[dict[str, Any]]:
    """Scales the incomes of a sample by the formulas as they are printed, and by the library."""
    x = MEAN[0] + DEVIATION[0] * generator(key).normal(size=(PEOPLE, 1))
    with jax.enable_x64(True):
        scaled, standard = jax.tree.map(np.asarray, _scaled(x))
    spread = [one.var(ddof=1) for one in standard]
    low, high = float(x.min()), float(x.max())
    first = float(x[0, 0])
    source = "seed 004"
    return [
        row(
            "004-min-max",
            "least and largest",
            "min-max normalization takes the samples to [0, 1]",
            source,
            [0.0, 1.0],
            [scaled.min(), scaled.max()],
            note=f"{PEOPLE} incomes",
        ),
        row(
            "004-min-max-formula",
            "an income, scaled to [0, 1]",
            "x' = x min(x) / (max(x) min(x)), as printed",
            source,
            first * low / (high * low),
            scaled[0, 0],
            expected=(first - low) / (high - low),
            note="both minus signs are lost in print; the program beside it has them",
        ),
        row(
            "004-standardize",
            "variance over n - 1, by the formula",
            "standardized by the sample deviation the variance is 1",
            source,
            1.0,
            spread[0],
            note="n = 10",
        ),
        row(
            "004-standardize-program",
            "variance over n - 1, by the program",
            "the program beside the formula does the same",
            source,
            1.0,
            spread[1],
            expected=10 / 9,
            note="n = 10; numpy.std divides by n",
        ),
    ]


def hessians(key, draws, check) -> list[dict[str, Any]]:
    """Measures the condition numbers of the printed matrices and of another reading."""
    printed = {
        "004-rounded": (9.2e4, [[9137.3, 206.6], [206.6, 4.8]], "dollars and inches"),
        "004-rounded-units": (281.7, [[9.1, 17.2], [17.2, 33.1]], "thousands and feet"),
    }
    rows = [
        row(
            statement,
            f"condition of the printed H, {units}",
            f"the Hessian as printed has the condition number {claimed:g}",
            "seed 004",
            claimed,
            float(np.linalg.cond(np.array(matrix))),
            holds=abs(np.linalg.cond(np.array(matrix)) / claimed - 1) < 0.05,
            note="its rounded entries do not determine it",
        )
        for statement, (claimed, matrix, units) in printed.items()
    ]
    squares = np.outer(MEAN, MEAN) + np.diag(np.power(DEVIATION, 4))
    rows.append(
        row(
            "004-deviation",
            "condition if 400^2, 3^2 were deviations",
            "incomes and heights have standard deviations 400^2 and 3^2",
            "seed 004",
            9.2e4,
            float(np.linalg.cond(squares)),
            holds=False,
            note="400^2 and 3^2 are variances: 99,492 of the law itself",
        )
    )
    return rows


@jax.jit
def _remember(stats, x):
    return normax.batch_norm(x, stats, use_running_average=False, momentum=0.99)[1]


def running(key, draws, check) -> list[dict[str, Any]]:
    """Measures the running variance of 64 features against that of the population."""
    rng, found = generator(key), []
    for _ in range(draws // 8):
        stats = normax.RunningStats.create(64)
        for _ in range(600):
            stats = _remember(stats, rng.standard_normal((BATCH, 64), np.float32))
        found.append(np.asarray(stats.var, np.float64))
        check()
    values = np.concatenate(found)
    return [
        row(
            "003-running",
            "running variance, M = 32, sigma = 1",
            "the moving averages are the global statistics",
            "seed 003, 4",
            1.0,
            values.mean(),
            error=values.std(ddof=1) / math.sqrt(values.size),
            expected=1 - 1 / BATCH,
            room=1 / BATCH,
            note="the variance of a batch is divided by M; normax has unbiased=True for M - 1",
        )
    ]


@jax.jit
def _with_and_without(x, scale, bias):
    """Returns batch norm with gamma, and without it but for what beta is of it."""
    y, _ = normax.normalize_batch(x, scale, bias)
    return y, normax.normalize_batch(x, None, bias / scale)[0]


def absorbed(key, draws, check) -> list[dict[str, Any]]:
    """Measures what is lost where gamma is left to the next layer."""
    rng = generator(key)
    x, w, (scale, bias) = (rng.normal(size=shape) for shape in ((64, 8), (8, 5), (2, 8)))

    def away(scale, activation):
        y, without = map(np.asarray, _with_and_without(x, scale, bias))
        ours, theirs = activation(y) @ w, activation(without) @ (scale[:, None] * w)
        return np.abs(ours - theirs).max() / np.abs(ours).max()

    with jax.enable_x64(True):
        linear = away(scale, lambda y: y)
        relu, signed = (away(gamma, lambda y: np.maximum(y, 0)) for gamma in (np.abs(scale), scale))
    note = "the relative difference of a network with gamma and one with gamma in the next kernel"
    return [
        row(
            "001-scale",
            "gamma left to a linear layer",
            "where the next layer is linear gamma is not needed",
            "seed 001",
            0.0,
            linear,
            holds=linear <= 1e-12,
            note=note,
        ),
        row(
            "002-scale",
            "gamma left to the layer after a ReLU",
            "where ReLU follows gamma is not needed",
            "seed 002, 1.5",
            [0.0, 0.0],
            [relu, signed],
            holds="for gamma > 0" if relu <= 1e-12 < signed else bool(signed <= 1e-12),
            note=note + ": gamma above 0, and of both signs",
        ),
    ]
