"""Statements of the noise of a batch's statistics, and of what it does to a loss."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import normax
from normax import theory
from normax.experiments.laws import LAWS
from normax.experiments.statements.verdict import estimated, generator, row

SIZE = 32
MEAN, DEVIATION = 3.0, 5.0
ENTRIES = 2**18  # that are drawn at once
RUN = 10_000  # batches, of the printed program
EVERY = tuple(LAWS)


def _drawn(key, law, shape):
    """Draws from the law of a number, so that one program serves all."""
    return jax.lax.switch(
        law, [lambda key, d=LAWS[name].draw: d(key, shape) for name in EVERY], key
    )


def _snippet(noise):
    """Returns the rows of what the program of the introduction prints, given that of batches."""
    values = noise[: len(noise) // RUN * RUN].reshape(-1, RUN).mean(1)
    spread = values.std(ddof=1)
    source = "seed 002, 1.1"
    return [
        row(
            "1",
            "noise, M = 32",
            "the program's error is about 0.046875 = 3 / (2 M)",
            source,
            theory.approximate_noise(SIZE),
            values.mean(),
            error=spread / math.sqrt(len(values)),
            expected=theory.batch_noise(SIZE),
            room=1 / SIZE,
            note=f"mean of {len(values)} runs of the program",
        ),
        row(
            "1-run",
            "lowest and highest of the runs",
            "one run of the program prints about 0.046875",
            source,
            "0.046875",
            [values.min(), values.max()],
            holds="within 5 %" if np.abs(values / 0.046875 - 1).max() < 0.05 else "no",
            note=f"{len(values)} runs; the deviation of one is {spread:.2e}",
        ),
    ]


@jax.jit
def _statistics(key, law):
    """Returns moments of the means and deviations of batches, and the noise of each batch."""
    x = _drawn(key, law, (SIZE, ENTRIES // SIZE))
    y, m = normax.normalize_batch(MEAN + DEVIATION * x, epsilon=0.0)
    both = jnp.stack([m.mean, jnp.sqrt(m.var)])
    of_both, skewness = normax.moments(both, 1), theory.skewness(both, 1)
    uncentred, _ = normax.standardize(x, reduction_axes=0, centered=False, epsilon=0.0)
    again, _ = normax.normalize_batch(y, epsilon=0.0)
    noise = jnp.mean((y - x) ** 2, 0)
    others = jnp.stack([jnp.mean((uncentred - x) ** 2), jnp.mean((again - y) ** 2)])
    shape = jnp.stack([of_both.mean, of_both.var, skewness])
    return jnp.concatenate([shape.ravel(), jnp.mean(noise)[None], others]), noise


STATISTICS = ("mean", "deviation", "var", "deviation var", "skew", "deviation skew")
NOISE = ("noise", "noise of the deviation", "noise of all")


def statistics(key, draws, check) -> list[dict[str, Any]]:
    """Measures the law of a batch's mean and deviation."""
    source, rows = "seed 002, 1.3", []
    for law in ("gaussian", "exponential"):
        noise: list[Any] = []

        def measure(key, law=law, noise=noise):
            found, each = _statistics(key, EVERY.index(law))
            noise.append(np.asarray(each, np.float64))
            return found

        values, errors = estimated(measure, jax.random.split(key, 2 * draws), check)
        found = dict(zip(STATISTICS + NOISE, values, strict=True))
        error = dict(zip(STATISTICS + NOISE, errors, strict=True))
        kurtosis, skewness = LAWS[law].excess_kurtosis, LAWS[law].skewness
        shape = {"excess_kurtosis": kurtosis, "skewness": skewness}
        theirs = theory.deviation_law(SIZE, **shape)
        ours = theory.deviation_law(SIZE, deviation=DEVIATION, **shape)
        gaussian = law == "gaussian"
        exact = DEVIATION * theory.expected_deviation(SIZE)
        square = DEVIATION**2 * (1 - 1 / SIZE)
        about = f"{law} inputs of mean 3 and deviation 5, M = 32"
        claims = [
            ("2-mean", "mean", "the mean of mu_B is mu_P", MEAN, MEAN, 0),
            ("2-variance", "var", "the variance of mu_B is sigma_P^2 / M", *[ours.mean_var] * 2, 0),
            ("2-normal", "skew", "mu_B is normal", 0.0, skewness / math.sqrt(SIZE), 0),
            (
                "3-mean",
                "deviation",
                "the mean of sigma_B is sigma_P",
                DEVIATION,
                exact if gaussian else ours.deviation_mean,
                4 / SIZE,
            ),
            (
                "3-variance",
                "deviation var",
                "the variance of sigma_B is (rho + 2) / (4 M)",
                theirs.deviation_var,
                square - exact**2 if gaussian else ours.deviation_var,
                8 / SIZE,
            ),
            (
                "3-normal",
                "deviation skew",
                "sigma_B is normal",
                0.0,
                _skewness_of_deviation(exact / DEVIATION) if gaussian else None,
                0,
            ),
        ]
        for statement, name, claim, claimed, expected, room in claims:
            rows.append(
                row(
                    f"{statement}-{law}",
                    _named(name, law),
                    claim,
                    source,
                    claimed,
                    found[name],
                    error=error[name],
                    expected=expected,
                    room=room,
                    note=about,
                )
            )
        if gaussian:
            rows += _snippet(np.concatenate(noise)) + _of_noise(found, error)
    return rows


def _skewness_of_deviation(mean):
    """Returns the skewness of a chi variable of 31 degrees, of which `mean` is that over root M."""
    length = math.sqrt(SIZE) * mean
    var = SIZE - 1 - length**2
    return length * (1 - 2 * var) / var**1.5


def _named(name, law):
    whose = "sigma_B" if "deviation" in name else "mu_B"
    what = name.removeprefix("deviation").strip() or "mean"
    return f"{what} of {whose}, {law}"


def _of_noise(found, error):
    """Returns the rows of what follows for the squared loss, of Gaussian inputs."""
    both, one = (
        {"measured": scale * SIZE * found[name], "error": scale * SIZE * error[name]}
        for name, scale in (("noise", 1), ("noise of the deviation", 1))
    )
    halved = {name: value / 2 for name, value in one.items()}
    about = "the gap of the loss at the truth, times M, M = 32"
    exact = {
        name: SIZE * theory.batch_noise(SIZE, statistics=name) for name in ("both", "variance")
    }
    return [
        row(
            "7",
            "noise, M = P = 32",
            "the expansion holds as M -> P",
            "seed 002, 1.3",
            theory.approximate_noise(SIZE),
            found["noise of all"],
            error=error["noise of all"],
            expected=theory.finite_population(SIZE, SIZE) * theory.batch_noise(SIZE),
            note="a batch that is the population; it has (P - M) / (P - 1) of the noise",
        ),
        row(
            "12",
            "M zeta of (phi - y)^2",
            "zeta of the squared loss is 3 / (2 M)",
            "seed 002, 1.4",
            1.5,
            **both,
            expected=exact["both"],
            room=1 / SIZE,
            note=about,
        ),
        row(
            "11",
            "M zeta of (h - y)^2 / 2",
            "zeta of the identity is 3 / (4 M)",
            "seed 002, 1.4",
            0.75,
            **{name: value / 2 for name, value in both.items()},
            expected=exact["both"] / 2,
            room=1 / SIZE,
            note=about,
        ),
        row(
            "12-no-mean",
            "M zeta, no mean, (phi - y)^2",
            "without the mean zeta is 1 / (2 M)",
            "seed 002, 1.4",
            0.5,
            **one,
            expected=exact["variance"],
            room=1 / SIZE,
            note=about,
        ),
        row(
            "12-no-mean-halved",
            "M zeta, no mean, half of it",
            "without the mean zeta is 1 / (2 M), read of the halved loss",
            "seed 002, 1.4",
            0.5,
            **halved,
            expected=exact["variance"] / 2,
            note=about,
        ),
        row(
            "20",
            "M zeta of the BN student",
            "the student with mu_B has zeta = 1 / (2 M)",
            "seed 002, 2.3",
            0.5,
            **both,
            expected=exact["both"],
            note="of the squared loss that the section trains with",
        ),
    ]


def kurtosis(key, draws, check) -> list[dict[str, Any]]:
    """Measures rho of four laws by the printed formula and by the library."""
    rng, number = generator(key), 12_500 * draws
    laws = (rng.standard_normal, rng.random, rng.laplace, rng.exponential)
    draw = dict(zip(EVERY, laws, strict=True))
    x = np.stack([MEAN + DEVIATION * draw[law](size=number) for law in EVERY])
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(theory.excess_kurtosis, static_argnums=1)(x, 1))
    var, fourth = x.var(1), np.mean((x - x.mean(1, keepdims=True)) ** 4, 1)
    printed = (fourth - var**2) / var**2 - 2
    said = ", ".join(f"{law} {value:.3f}" for law, value in zip(LAWS, ours, strict=True))
    return [
        row(
            "4",
            "rho / excess kurtosis - 1",
            "rho = (C - sigma^4) / sigma^4 - 2 is the kurtosis",
            "seed 002, 1.3",
            0.0,
            np.abs(printed / ours - 1).max(),
            expected=0.0,
            note=f"it is the excess kurtosis: {said}",
        )
    ]


def _logistic(h, y):
    return jax.nn.softplus(h) - y * h


@jax.jit
def _expanded(h, y):
    """Returns the slope, and what the expansion leaves out at most over two distances."""
    slope, curvature = theory.loss_derivatives(_logistic, h, y)
    rests = [
        _logistic(h + d, y) - _logistic(h, y) - slope * d - curvature * d * d / 2
        for d in (0.02, 0.01)
    ]
    return slope, jnp.stack([jnp.abs(rest).max() for rest in rests])


def expansion(key, draws, check) -> list[dict[str, Any]]:
    """Differentiates the loss of a logistic head, and measures what the expansion leaves out."""
    h, y, at = np.linspace(-3, 3, 61), 0.3, 40
    with jax.enable_x64(True):
        slope, left = map(np.asarray, _expanded(h, y))
    order = math.log2(left[0] / left[1])
    return [
        row(
            "5",
            "dl / dhbar at 1, y = 0.3, logistic",
            "the derivative of the loss is A'(hbar - y)",
            "seed 002, 1.3",
            scipy.special.expit(h[at] - y),
            slope[at],
            expected=scipy.special.expit(h[at]) - y,
            note="it is A'(hbar) - y, as the formula above that sentence has it",
        ),
        row(
            "5-remainder",
            "order of the remainder",
            "what the expansion leaves out is O((hhat - hbar)^2)",
            "seed 002, 1.3",
            2.0,
            order,
            holds=order >= 2,
            note="of a higher order than its last term: o of the square; logistic",
        ),
    ]


CONDITIONAL = 128


@jax.jit
def _conditional(key, law, at):
    """Returns M E[(xhat - x)^2] of an entry that is given, in a batch of others."""
    x = _drawn(key, law, (CONDITIONAL, ENTRIES // CONDITIONAL)).at[0].set(at)
    y, _ = normax.normalize_batch(x, epsilon=0.0)
    return CONDITIONAL * jnp.mean((y[0] - x[0]) ** 2)


def conditional(key, draws, check) -> list[dict[str, Any]]:
    """Measures the noise of an entry of a given value."""
    rows = []
    for law, at in (("gaussian", 1.0), ("exponential", 1.0), ("exponential", -0.9)):
        keys = jax.random.split(jax.random.fold_in(key, len(rows)), 2 * draws)
        drawn = EVERY.index(law), at
        found, error = estimated(lambda k, drawn=drawn: _conditional(k, *drawn), keys, check)
        rho, skewness = LAWS[law].excess_kurtosis, LAWS[law].skewness
        spread = (rho + 2) / 4
        rows.append(
            row(
                f"6-{law}" + (f"-{at:g}" if law == "exponential" else ""),
                f"M E[(hhat - hbar)^2 | x = {at:g}], {law}",
                "E[(hhat - hbar)^2 | x] = x^2 (rho + 2) gamma^2 / (4 M) "
                "+ (1 + 3 (rho + 2) / (4 M)) gamma^2 / M",
                "seed 002, 1.3",
                at * at * spread + 1 + 3 * spread / CONDITIONAL,
                found,
                error=float(error),
                expected=at * at * spread + skewness * at + 1,
                room=4 / CONDITIONAL,
                note="gamma = 1, M = 128; x by the population's statistics, where the print has "
                "the batch's",
            )
        )
    return rows
