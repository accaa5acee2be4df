"""Statements of the coefficient zeta: its curvature, and Fisher's information of gamma."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normax import theory
from normax.experiments.statements.verdict import estimated, row

ENTRIES = 2**17  # that are drawn at once
NOISE = 0.25  # delta^2, of the labels of the squared loss


def _relu(h, mean):
    return jax.nn.relu(h) ** 2 / 2 - mean * h


def _squared(h, y):
    return (h - y) ** 2


def _logistic(h, y):
    return jax.nn.softplus(h) - y * h


@jax.jit
def _heads(key):
    """Returns means over Gaussian inputs of what the statements compare."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (ENTRIES,))
    h = x + 1.0
    _, active = theory.loss_derivatives(_relu, h, jax.nn.relu(h))
    _, identity = theory.loss_derivatives(lambda h, y: _squared(h, y) / 2, x, x)
    y = x + math.sqrt(NOISE) * jax.random.normal(keys[1], x.shape)
    slope, curvature = theory.loss_derivatives(_squared, x, y)
    label = jax.random.bernoulli(keys[2], jax.nn.sigmoid(x)).astype(x.dtype)
    of_label, of_head = theory.loss_derivatives(_logistic, x, label)
    values = (
        active,
        jax.nn.sigmoid(h),
        identity,
        (slope * x) ** 2,
        curvature * x * x,
        (of_label * x) ** 2,
        of_head * x * x,
    )
    return jnp.stack([jnp.mean(value) for value in values])


def heads(key, draws, check) -> list[dict[str, Any]]:
    """Measures curvatures and squared derivatives."""
    values, errors = estimated(_heads, jax.random.split(key, 2 * draws), check)
    active, proxy, identity, squared, fisher, of_label, of_head = values
    return [
        row(
            "10-sigmoid",
            "mean of A'' of ReLU",
            "for ReLU mu_d2A is about the mean of sigmoid(hbar)",
            "seed 002, 1.4",
            proxy,
            active,
            error=errors[0],
            expected=0.5 * math.erfc(-1 / math.sqrt(2)),
            note="gamma = beta = 1, Gaussian inputs",
        ),
        row(
            "11-mean",
            "mean of A'' of the identity",
            "for the identity mu_d2A is the mean of hbar",
            "seed 002, 1.4",
            0.0,
            identity,
            error=errors[2],
            expected=1.0,
            note="gamma = 1, beta = 0; 3 / (4 M) of the same section needs 1",
        ),
        row(
            "13-squared",
            "E[(dl / dgamma)^2], squared loss",
            "F_gamma = E[(dl / dgamma)^2]",
            "seed 002, 1.5",
            fisher,
            squared,
            error=errors[3],
            expected=4 * NOISE,
            note="claimed: F_gamma = E[A'' x^2]; labels of noise 0.25; (phi - y)^2 is no "
            "log-likelihood of such labels",
        ),
        row(
            "13-logistic",
            "E[(dl / dgamma)^2], logistic",
            "F_gamma = E[(dl / dgamma)^2]",
            "seed 002, 1.5",
            of_head,
            of_label,
            error=errors[5],
            expected=_fisher_of_logistic(),
            note="claimed: F_gamma = E[A'' x^2]; labels drawn from the model",
        ),
    ]


def _fisher_of_logistic():
    """Returns E[A'' x^2] by Gauss and Hermite."""
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    p = 1 / (1 + np.exp(-x))
    return float(np.sum(weight * p * (1 - p) * x * x) / math.sqrt(2 * math.pi))


def softplus(key, draws, check) -> list[dict[str, Any]]:
    """Follows the printed limit of ReLU, with the logarithm and without."""
    t = 30.0
    without, with_log = (1 + math.exp(t)) / t, math.log1p(math.exp(t)) / t
    h = np.linspace(-2, 2, 401)
    away = np.abs(np.log1p(np.exp(t * h)) / t - np.maximum(h, 0)).max()
    return [
        row(
            "10",
            "ReLU of 1, t = 30",
            "ReLU is the limit of (1 / t) (1 + exp(t h))",
            "seed 002, 1.4",
            without,
            float(jax.nn.relu(1.0)),
            expected=with_log,
            note=f"the logarithm is missing; with it the formula is off by at most {away:.3f}",
        )
    ]
