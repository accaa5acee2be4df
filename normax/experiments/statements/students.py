"""Statements of the linear teacher and its students, solved directly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import normax
from normax import theory
from normax.experiments.statements.verdict import generator, row

NOISE = 0.25  # delta^2
DIMENSIONS = 100


def _teacher(rng, examples, dimensions, number):
    """Returns inputs, the teacher's weights and noisy outputs, of many repetitions."""
    x = rng.standard_normal((number, examples, dimensions))
    truth = rng.standard_normal((number, dimensions))
    truth /= np.linalg.norm(truth, axis=-1, keepdims=True)
    noise = np.sqrt(NOISE) * rng.standard_normal((number, examples))
    return x, truth, (x @ truth[..., None])[..., 0] + noise


def _least_squares(x, y):
    """Returns the shortest of the weights of the smallest squared error."""
    inputs = np.swapaxes(x, -1, -2)
    if x.shape[-2] < x.shape[-1]:
        return (inputs @ np.linalg.solve(x @ inputs, y[..., None]))[..., 0]
    return np.linalg.solve(inputs @ x, inputs @ y[..., None])[..., 0]


def _mean_and_error(values):
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


# Of scikit-learn's. A hundred rows are too few to share: threads that wait cost twenty times more.
@threadpool_limits.wrap(limits=1)
def least_squares(key, draws, check) -> list[dict[str, Any]]:
    """Measures the error of plain least squares, against the teacher and its noisy outputs."""
    rng = generator(key)
    found = {}
    for alpha in (0.5, 0.9, 2.0):
        errors, noisy = [], []
        for _ in range((20 if alpha == 0.9 else 5) * draws):
            x, truth, y = _teacher(rng, round(alpha * DIMENSIONS), DIMENSIONS, 10)
            w = _least_squares(x, y)
            errors.append(np.sum((w - truth) ** 2, -1))
            new, _, _ = _teacher(rng, 100, DIMENSIONS, 10)
            label = np.sqrt(NOISE) * rng.standard_normal((10, 100))
            missed = (new @ (w - truth)[..., None])[..., 0] - label
            noisy.append(np.mean(missed**2, -1))
            check()
        found[alpha] = _mean_and_error(np.concatenate(errors))
        found[alpha, "noisy"] = _mean_and_error(np.concatenate(noisy))

    def of(alpha, claimed, statement, claim, **others):
        measured, error = found[alpha]
        return row(
            statement,
            f"error of least squares, alpha = {alpha:g}",
            claim,
            others.pop("source", "seed 002, 2.3"),
            claimed,
            measured,
            error=float(error),
            expected=theory.least_squares_error(alpha, NOISE, dimensions=DIMENSIONS),
            note=others.pop("note", f"N = {DIMENSIONS}, delta^2 = 0.25"),
            **others,
        )

    def below(alpha):
        return theory.least_squares_error(alpha, NOISE)

    return [
        of(
            0.5,
            below(0.5),
            "15-below",
            "SGD's error is 1 - alpha + alpha delta^2 / (1 - alpha) for alpha < 1",
            room=2 / DIMENSIONS,
        ),
        of(
            2.0,
            NOISE / (1 - 2.0),
            "15",
            "SGD's error is delta^2 / (1 - alpha) for alpha > 1",
            note="the sign is wrong: it is delta^2 / (alpha - 1)",
        ),
        of(
            0.9,
            below(0.9),
            "22",
            "N > 100 is enough for the limit",
            note="N = 100; near alpha = 1 the term of the noise is P / (N - P - 1) of delta^2",
        ),
        row(
            "19",
            "squared error against y, alpha = 0.5",
            "eps_gen = <(phi(x) - y)^2>, for which the formula of SGD is given",
            "seed 002, 2.2",
            below(0.5),
            found[0.5, "noisy"][0],
            error=float(found[0.5, "noisy"][1]),
            expected=theory.least_squares_error(0.5, NOISE, dimensions=DIMENSIONS) + NOISE,
            note="y is the teacher's output with its noise; the formulas are against it without",
        ),
    ]


def printed_trace(alpha: float, z: float) -> float:
    """Returns G as it is printed, with its misplaced bracket and its alpha without a root."""
    inside = z + (1 + np.sqrt(alpha)) ** 2 * (z + (1 - alpha) ** 2)
    return float((1 - alpha - z + np.sqrt(inside)) / (2 * z))


GRID = np.geomspace(1 / 64, 4.0, 121)
DECAY = 1 / 64  # 1 / (2 M), M = 32


@threadpool_limits.wrap(limits=1)
def ridge(key, draws, check) -> list[dict[str, Any]]:
    """Measures the error of ridge regression in both scales."""
    rng = generator(key)
    dimensions, repetitions = (100, 5 * draws) if draws < 16 else (400, 3 * draws // 2)
    traces, errors, best, scaled = [], [], [], []
    for _ in range(repetitions):
        eigenvalues, curve, _ = _ridge(rng, 2, dimensions)
        traces.append(np.mean(1 / (eigenvalues + DECAY)))
        errors.append(curve[0])
        _, curve, by_loss = _ridge(rng, 4, dimensions)
        best.append(GRID[curve.argmin()])
        scaled.append(by_loss)
        check()
    trace, error, smallest, quarter = (
        dict(zip(("measured", "error"), _mean_and_error(np.array(values)), strict=True))
        for values in (traces, errors, best, scaled)
    )
    about, source = f"N = {dimensions}, delta^2 = 0.25, {repetitions} repetitions", "seed 002, 2.3"
    return [
        row(
            "16",
            "G at alpha = 2, zeta = 1/64",
            "G = (1 - alpha - zeta + sqrt(zeta + (1 + sqrt(alpha))^2 (zeta + (1 - alpha)^2))) "
            "/ (2 zeta)",
            source,
            printed_trace(2.0, DECAY),
            **trace,
            expected=theory.resolvent_trace(2.0, DECAY)[0],
            note=about + "; a bracket and a root are misplaced",
        ),
        row(
            "17",
            "error at lambda = N / 64, alpha = 2",
            "eps = delta^2 d(zeta G) / d zeta - zeta^2 dG / d zeta",
            source,
            theory.ridge_error(2.0, DECAY, NOISE),
            **error,
            expected=theory.ridge_error(2.0, DECAY, NOISE),
            room=4 / dimensions,
            note=about + "; with G mended, and zeta read as lambda / N",
        ),
        row(
            "17-scale",
            "error at zeta = 1/4, alpha = 4",
            "the same formula is of the student that trains with zeta gamma^2",
            source,
            theory.ridge_error(4.0, NOISE, NOISE),
            **quarter,
            expected=theory.ridge_error(4.0, theory.ridge_of_decay(NOISE, 4.0), NOISE),
            note=about + "; of a mean loss lambda = P zeta: the formula's zeta is alpha zeta",
        ),
        row(
            "18",
            "best lambda / N, alpha = 4",
            "zeta = 0.25 = delta^2 is the best curve",
            source,
            NOISE,
            **smallest,
            expected=NOISE,
            room=4 / dimensions,
            note=about + "; of each repetition, on a grid of steps of 5 %",
        ),
        row(
            "18-scale",
            "best zeta of the loss, alpha = 4",
            "zeta = 0.25 = delta^2 is the best curve, of the loss as it is trained",
            source,
            NOISE,
            **{name: value / 4 for name, value in smallest.items()},
            expected=NOISE / 4,
            note=about + "; lambda = P zeta",
        ),
    ]


def _ridge(rng, alpha, dimensions):
    """Returns eigenvalues, errors over the grid of lambda / N, and that of the printed loss."""
    (x,), (truth,), (y,) = _teacher(rng, alpha * dimensions, dimensions, 1)
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / dimensions)
    along = vectors.T @ (x.T @ y / dimensions)
    w = along / (eigenvalues + GRID[:, None])
    # The loss as it is printed: the mean of the squares, and beside it zeta gamma^2.
    hessian = x.T @ x / len(x) + NOISE * np.eye(dimensions)
    by_loss = np.linalg.solve(hessian, x.T @ y / len(x))
    curve = np.sum((w - vectors.T @ truth) ** 2, -1)
    return eigenvalues, curve, np.sum((by_loss - truth) ** 2)


@jax.jit
def _normalized(w, x, mean, var, scale):
    stats = normax.RunningStats(mean[None], var[None], jnp.ones(1, jnp.int32))
    y = normax.population_norm((x @ w)[:, None], stats, scale[None], epsilon=0.0)[:, 0]
    return y, x @ normax.weight_norm(w, feature_axes=())


def weight_normalization(key, draws, check) -> list[dict[str, Any]]:
    """Measures the v that makes weight norm of population norm, inputs of covariance a^2 I."""
    a, gamma, center, rng = 1.7, 0.8, 0.5, generator(key)
    w = rng.standard_normal(200)
    x = center + a * rng.standard_normal((64, len(w)))
    mean, length = center * w.sum(), np.linalg.norm(w)
    with jax.enable_x64(True):
        given = map(np.float64, (mean, (a * length) ** 2, gamma))
        y, h = map(np.asarray, _normalized(w, x, *given))
    slope, offset = np.polyfit(h, y, 1)
    printed = -gamma * mean / (a * length)
    source, note = "seed 002, 1.5", "covariance 2.89 I, deviation 1.7, gamma = 0.8"
    return [
        row(
            "14",
            "v of WN that is PN",
            "inputs of covariance a I: v = gamma / a",
            source,
            gamma / a**2,
            slope,
            expected=gamma / a,
            note=note + ": a is the deviation, not the covariance",
        ),
        row(
            "14-bias",
            "b of WN that is PN",
            "b = beta - gamma mu_P / (a |w|)",
            source,
            printed,
            offset,
            expected=printed,
            note=note + "; a read as the deviation; beta = 0",
        ),
    ]
