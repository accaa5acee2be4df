"""Statements of batch norm as a layer: its output, what comes after it, its size."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import normax
import normax.linen
from normax import theory
from normax.experiments.network import Network, count_parameters
from normax.experiments.statements.verdict import estimated, generator, row

ROWS, COLUMNS = 256, 512  # of a batch, and features
WIDE = 5.0  # deviation of pre-activations without batch norm
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


@jax.jit
def _outputs(key):
    """Returns what of batch norm's outputs and of what comes after them the statements say."""
    keys = jax.random.split(key, 3)
    skewed = jax.random.exponential(keys[0], (ROWS, COLUMNS))
    x = WIDE * jax.random.normal(keys[1], skewed.shape)
    both, pull = jax.vjp(_normalized, jnp.stack([skewed, x], 1))
    kurtosis = jnp.mean(theory.excess_kurtosis(jnp.stack([both[:, 0], skewed]), 1), 1)
    xhat, cotangent = both[:, 1], jax.random.normal(keys[2], x.shape)
    found = [jnp.mean(jnp.abs(xhat) > 1), kurtosis[0], kurtosis[1]]
    for activation in ACTIVATIONS.values():
        after, before, top = (_slope(activation, v) for v in (xhat, x, jnp.zeros(())))
        found += [jnp.mean(after >= share * top) for share in (0.9, 0.5)]
        found += [jnp.mean(after), jnp.mean(before)]
        (pulled,) = pull(jnp.stack([jnp.zeros_like(x), after * cotangent], 1))
        lengths = jnp.mean(pulled[:, 1] ** 2), jnp.mean((before * cotangent) ** 2)
        found.append(jnp.sqrt(lengths[0] / lengths[1]))
    return jnp.stack(found)


def _normalized(x):
    return normax.normalize_batch(x, feature_axes=(1, 2), epsilon=0.0)[0]


def _slope(activation, x):
    return jax.jvp(activation, (x,), (jnp.ones_like(x),))[1]


PER_ACTIVATION = ("linear 0.9", "linear 0.5", "slope", "slope before", "gradient")


def outputs(key, draws, check) -> list[dict[str, Any]]:
    """Measures the outputs of batch norm."""
    values, errors = estimated(_outputs, jax.random.split(key, draws), check)
    names = ["beyond", "kurtosis", "kurtosis before"]
    names += [f"{name}, {part}" for name in ACTIVATIONS for part in PER_ACTIVATION]
    found = dict(zip(names, values, strict=True))
    error = dict(zip(names, errors, strict=True))
    about = f"batches of {ROWS}"
    rows = [
        row(
            "001-bounded",
            "share of outputs beyond 1",
            "batch norm presses the inputs into [-1, 1]",
            "seed 001",
            0.0,
            found["beyond"],
            error=error["beyond"],
            expected=math.erfc(math.sqrt(0.5)),
            note=f"{about} of Gaussian inputs; an output is bounded by sqrt(M - 1) alone",
        ),
        row(
            "001-normal",
            "excess kurtosis of the outputs",
            "batch norm makes the inputs normal",
            "seeds 000, 001",
            0.0,
            found["kurtosis"],
            error=error["kurtosis"],
            expected=found["kurtosis before"],
            note=f"{about} of exponential inputs; corrected: that of the inputs, which it keeps",
        ),
    ]
    most = [found[f"{name}, linear {part}"] > 0.5 for name in ACTIVATIONS for part in (0.9, 0.5)]
    parts = [found[f"{name}, linear {part}"] for name in ACTIVATIONS for part in (0.9, 0.5)]
    rows.append(
        row(
            "001-linear",
            "shares within the linear region",
            "most activations come to lie in the linear region of the nonlinearity",
            "seed 001",
            "more than half",
            parts,
            holds="yes" if all(most) else "in part" if any(most) else "no",
            note="sigmoid where its slope is above 0.9 and 0.5 of the largest, and tanh likewise; "
            "Gaussian inputs, gamma = 1, beta = 0",
        )
    )
    for name in ACTIVATIONS:
        ratio = found[f"{name}, slope"] / found[f"{name}, slope before"]
        rows += [
            row(
                f"001-slope-{name}",
                f"mean slope of {name}, after / before",
                "batch norm makes the gradient larger",
                "seed 001",
                "above 1",
                ratio,
                holds=ratio > 1,
                note="inputs of deviation 5: the slope of the nonlinearity where it is taken",
            ),
            row(
                f"001-gradient-{name}",
                f"gradient to the input, {name}, with / without",
                "batch norm makes the gradient larger",
                "seed 001",
                "above 1",
                found[f"{name}, gradient"],
                error=error[f"{name}, gradient"],
                holds=found[f"{name}, gradient"] > 1,
                note="inputs of deviation 5: what reaches them, divided by that deviation",
            ),
        ]
    return rows


def slopes(key, draws, check) -> list[dict[str, Any]]:
    """Measures the largest derivatives of the nonlinearities, and a layer's gain."""
    rng, width, gains = generator(key), 100, []
    grid, x = np.linspace(-5, 5, 1001, dtype=np.float32), rng.normal(size=2**16)
    largest = [float(_slope(f, grid).max()) for f in ACTIVATIONS.values()]
    open_share = float(_slope(jax.nn.relu, x.astype(np.float32)).mean())
    for _ in range(20 * draws):
        weights, cotangent = 1 + 0.1 * rng.normal(size=(width, width)), rng.normal(size=width)
        gains.append(np.sum((weights @ cotangent) ** 2) / np.sum(cotangent**2))
    gain = math.sqrt(np.mean(gains))
    deviation = float(np.std(gains, ddof=1))
    source = "seed 000, 1.1"
    return [
        row(
            "000-saturating",
            "largest slope of sigmoid and tanh",
            "the derivatives of sigmoid and tanh are below 1",
            source,
            "below 1",
            largest,
            holds="yes" if max(largest) < 1 else "in part",
            note="tanh's is 1 at 0 and below elsewhere; sigmoid's at most 1/4",
        ),
        row(
            "000-relu",
            "mean slope of ReLU",
            "the derivative of ReLU is 1",
            source,
            1.0,
            open_share,
            error=0.5 / math.sqrt(len(x)),
            expected=0.5,
            note="Gaussian pre-activations: it is 0 for the other half",
        ),
        row(
            "000-weights",
            "gain of a gradient through a layer of 100",
            "weights should be spread around 1",
            source,
            1.0,
            gain,
            error=deviation / math.sqrt(len(gains)) / (2 * gain),
            expected=math.sqrt(width * 1.01),
            note="weights of mean 1 and deviation 0.1: the root of the mean square gain; 1 needs "
            "weights of mean 0 and deviation 0.1",
        ),
    ]


def sizes(key, draws, check) -> list[dict[str, Any]]:
    """Counts the parameters of the first network, and of batch norm of one layer of VGG16."""
    model = Network("batch")
    variables = jax.eval_shape(lambda: model.init(key, jnp.zeros((1, 28, 28, 1)), train=False))
    counts = list(count_parameters(variables).values())
    learned = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    features = jnp.zeros((2, 150, 150, 64))

    def numbers(axis):
        norm: nn.Module = normax.linen.BatchNorm(use_running_average=False, axis=axis)
        made = jax.eval_shape(lambda: norm.init(key, features))
        return sum(leaf.size for leaf in jax.tree.leaves(made))

    images = jnp.zeros((8, 4, 5, 6))  # batch, channels, height, width
    y, m = jax.eval_shape(lambda: normax.normalize_batch(images, feature_axes=1))
    source = "seed 004"
    kept = [numbers(axis) for axis in (3, 1, 2)]
    return [
        row(
            "000-channels",
            "means, of 8 images of 4 channels",
            "batch norm of [B, k, H, W] normalizes each of the k channels over all the rest",
            "seed 000, 3.1",
            4,
            m.mean.size,
        ),
        row(
            "001-shape",
            "shape of the output",
            "batch norm does not change the shape",
            "seed 001",
            images.shape,
            y.shape,
        ),
        row(
            "004-parameters",
            "parameters by layer",
            "the layers hold 260, 40, 5020, 80, 32100, 400, 1010",
            source,
            [260, 40, 5020, 80, 32100, 400, 1010],
            counts,
        ),
        row(
            "004-total",
            "all, trainable, not trainable",
            "38,910 parameters, of which 38,650 are trainable and 260 not",
            source,
            [38_910, 38_650, 260],
            [sum(counts), learned, sum(counts) - learned],
        ),
        row(
            "004-4d",
            "4 d, one of each per pixel",
            "batch norm of 150 x 150 x 64 has 4 d = 1.44M parameters",
            source,
            1_440_000,
            numbers((1, 2, 3)),
            expected=4 * 150 * 150 * 64,
            note="1.44M is d",
        ),
        row(
            "004-shared",
            "4 d by channel, row, column",
            "the four may be 1 x 1 x 64, 150 x 1 x 1 or 1 x 150 x 1 instead",
            source,
            [4 * 64, 4 * 150, 4 * 150],
            kept,
        ),
    ]
