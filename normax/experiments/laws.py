"""Laws of mean 0 and variance 1 to draw inputs from."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax


class Law(NamedTuple):
    """A law: how it is drawn, and the two numbers that the theory asks for."""

    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    excess_kurtosis: float
    skewness: float


def _uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-math.sqrt(3), maxval=math.sqrt(3))


LAWS = {
    "gaussian": Law(jax.random.normal, 0.0, 0.0),
    "uniform": Law(_uniform, -1.2, 0.0),
    "laplace": Law(lambda key, shape: jax.random.laplace(key, shape) / math.sqrt(2), 3.0, 0.0),
    "exponential": Law(lambda key, shape: jax.random.exponential(key, shape) - 1, 6.0, 2.0),
}
