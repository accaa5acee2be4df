"""Statements of batch norm's backward pass and of its epsilon."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normax
from normax.experiments.statements.verdict import generator, row


def backward(key, draws, check) -> list[dict[str, Any]]:
    """Holds the printed backward passes to the library's."""
    rng = generator(key)
    with jax.enable_x64(True):
        exact, restored = _printed(rng, *CASE)
        away = [_dropped(rng, size) for size in (8, 32, 128, 1024)]
        x, dy = rng.normal(size=(2, 32, 4))
        frozen = np.abs(_frozen(x, dy) * (math.sqrt(0.3) + 0.001) / dy - 1).max()
    return [
        row(
            "003-backward",
            "dx, dgamma, dbeta: relative error",
            "dx = gamma / (m s) (m dy - sum dy - xhat sum dy xhat)",
            "seed 003, 5",
            0.0,
            exact,
            holds=exact <= 1e-12,
            note="s = sqrt(var + epsilon); m = 32, epsilon = 0.1, float64",
        ),
        row(
            "003-restore",
            "largest |y - x|",
            "gamma = sqrt(var + epsilon) and beta = mu give the input back",
            "seed 003, 3",
            0.0,
            restored,
            holds=restored <= 1e-12,
            note="float64",
        ),
        row(
            "004-backward",
            "dropped terms over dx, m = 8 to 1024",
            "dx = gamma dy / (sigma + 0.001)",
            "seed 004",
            [0.0] * len(away),
            away,
            expected=1 / 3,
            note="m = 8, 32, 128, 1024; squared loss of labels correlated by 0.8; it lacks what "
            "flows through the statistics, which does not vanish with m; corrected: its limit",
        ),
        row(
            "004-frozen",
            "dx at inference: relative error",
            "dx = gamma dy / (sigma + 0.001), of statistics that are given",
            "seed 004",
            0.0,
            frozen,
            holds=frozen <= 1e-12,
        ),
    ]


CASE = 32, 0.1  # batch size, epsilon


@functools.partial(jax.jit, static_argnums=0)
def _pulled(epsilon, x, scale, bias, dy, deviation, mean):
    """Returns the gradients, and the input as its own scale and bias give it back."""

    def norm(x, scale, bias):
        return normax.normalize_batch(x, scale, bias, epsilon=epsilon)[0]

    return jax.vjp(norm, x, scale, bias)[1](dy), norm(x, deviation, mean)


def _printed(rng, size, epsilon):
    """Returns how far the formula of seed 003 is from the library, and how well x comes back."""
    x, dy = 3 + 2 * rng.normal(size=(size, 4)), rng.normal(size=(size, 4))
    scale, bias = 1 + 0.3 * rng.normal(size=(2, 4))
    deviation, mean = np.sqrt(x.var(0) + epsilon), x.mean(0)
    xhat = (x - mean) / deviation
    dscale, dbias = (dy * xhat).sum(0), dy.sum(0)
    dx = scale / (size * deviation) * (size * dy - dbias - xhat * dscale)
    found, back = _pulled(epsilon, x, scale, bias, dy, deviation, mean)
    away = [
        np.abs(np.asarray(ours) - printed).max() / np.abs(printed).max()
        for ours, printed in zip(found, (dx, dscale, dbias), strict=True)
    ]
    return max(away), np.abs(np.asarray(back) - x).max()


@jax.jit
def _of_squared_loss(x, label, mask):
    def loss(x):
        options: dict[str, Any] = {"epsilon": 0.001, "epsilon_on": "deviation", "mask": mask}
        y, _ = normax.normalize_batch(x, **options)
        return jnp.sum((y - label) ** 2, where=mask) / 2, y

    return jax.grad(loss, has_aux=True)(x)


def _dropped(rng, size):
    """Returns the error of the backward pass of seed 004, over the true one, of a squared loss."""
    x, other = rng.normal(size=(2, 1024, 64))
    label, mask = 0.8 * x + 0.6 * other, np.arange(1024)[:, None] < size
    true, y = (np.asarray(v)[:size] for v in _of_squared_loss(x, label, mask))
    printed = (y - label[:size]) / (x[:size].std(0) + 0.001)
    return np.sqrt(np.sum((printed - true) ** 2) / np.sum(true**2))


@jax.jit
def _frozen(x, dy):
    """Returns the gradient at inference, by a variance of 0.3."""
    stats = normax.RunningStats(jnp.ones(4), jnp.full(4, 0.3), jnp.ones(4, jnp.int32))
    options: dict[str, Any] = {"use_running_average": True, "epsilon_on": "deviation"}
    norm = functools.partial(normax.batch_norm, stats=stats, epsilon=0.001, **options)
    return jax.vjp(lambda x: norm(x)[0], x)[1](dy)[0]


@jax.jit
def _epsilons(small, constant, dy):
    """Returns the factors and the gradients of epsilon inside the root, outside, and printed."""
    keras = normax.convention("keras", "batch_norm")["epsilon"]

    def norm(x, on):
        return normax.normalize_batch(x, epsilon=keras, epsilon_on=on)[0]

    def printed(x):
        return (x - jnp.mean(x, 0)) / (jnp.std(x, 0) + 0.001)

    norms = [functools.partial(norm, on=on) for on in ("variance", "deviation")]
    factors = [f(small)[1, 0] / small[1, 0] for f in norms]
    return factors, [jax.vjp(f, constant)[1](dy)[0] for f in (*norms, printed)]


def epsilon(key, draws, check) -> list[dict[str, Any]]:
    """Measures what epsilon does outside the root and inside, as Keras has it."""
    keras = normax.convention("keras", "batch_norm")
    with jax.enable_x64(True):
        given = np.array([[-0.01], [0.01]]), np.ones((8, 1)), np.arange(8.0)[:, None]
        (inside, outside), gradients = jax.tree.map(np.asarray, _epsilons(*given))
    lost = [int(np.sum(~np.isfinite(gradient))) for gradient in gradients]
    return [
        row(
            "001-keras",
            "momentum and epsilon of Keras",
            "Keras has momentum=0.99, epsilon=0.001",
            "seed 001",
            [0.99, 0.001],
            [keras["momentum"], keras["epsilon"]],
            note="as normax.convention has them, which a test holds to Keras itself",
        ),
        row(
            "004-epsilon",
            "factor at sigma = 0.01, Keras",
            "Keras divides by sigma + 0.001",
            "seed 004",
            1 / 0.011,
            inside,
            expected=1 / math.sqrt(1e-4 + keras["epsilon"]),
            note=f"its epsilon is inside the root; with the library's outside it is {outside:.2f}",
        ),
        row(
            "004-constant",
            "gradients that are no number, of 8",
            "sigma + 0.001 keeps the division safe",
            "seed 004",
            0,
            lost[2],
            note=f"a constant column, the formula differentiated; normax has {lost[1]} with "
            f"epsilon outside and {lost[0]} inside",
        ),
    ]
