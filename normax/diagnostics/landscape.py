"""How a loss curves: along its gradient, and in all directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from normax import axes as ax
from normax.diagnostics.length import length
from normax.train import TrainState, value_and_metrics

Objective = Callable[[Any], jax.Array]


class Smoothness(NamedTuple):
    """How a loss and its gradient change along the gradient.

    Attributes:
      rate: how far the steps are, in gradients; shape (k,).
      loss: the loss after each step.
      gradient_change: length of the gradient's change, over the gradient's length.
      smoothness: length of the gradient's change over that of the step: the largest is the
        effective smoothness beta, a lower bound of Lipschitz's constant of the gradient.
    """

    rate: jax.Array
    loss: jax.Array
    gradient_change: jax.Array
    smoothness: jax.Array


class Spectrum(NamedTuple):
    """What Lanczos' method resolves of the eigenvalues of a Hessian.

    Attributes:
      values: Ritz values in ascending order, shape (steps,).
      weights: the share of each in the spectral density as the start sees it; they sum to 1.
      errors: a bound of the distance from each value to an eigenvalue, of Lanczos' method alone: it
        knows nothing of rounding, which in float32 is 1e-7 of the largest value.
    """

    values: jax.Array
    weights: jax.Array
    errors: jax.Array

    @property
    def condition_number(self) -> jax.Array:
        """The largest magnitude over the smallest: of the Hessian itself where it is resolved.

        For features and least squares `normax.condition_number` is exact.
        """
        return jnp.abs(self.values).max() / jnp.abs(self.values).min()

    @property
    def stable_rate(self) -> jax.Array:
        """The learning rate above which gradient descent diverges along the steepest direction.

        It is inf where the loss curves up in none.
        """
        steepest = self.values.max()
        return jnp.where(steepest > 0, 2 / jnp.where(steepest > 0, steepest, 1), jnp.inf)


def objective(
    loss: Callable[[Any, Any, bool], Any], state: TrainState, batch: Any, *, train: bool = True
) -> Objective:
    """Returns the loss of a batch as a function of a model's parameters.

    Args:
      loss: as in `normax.train.train_step`.
      state: of the model; its running statistics and random key are held.
      batch: what the loss takes.
      train: the mode that the model is in.

    Returns:
      A function of a pytree like `state.params` that returns a scalar.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from normax import diagnostics, train
      >>> state = train.TrainState.create(
      ...     nn.Dense(1), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3))
      ... )
      >>> loss = lambda model, batch, train: (model(batch) ** 2).mean()
      >>> diagnostics.objective(loss, state, jnp.ones((8, 3)))(state.params).shape
      ()
    """

    def of_params(params):
        model = state.bind(params, state.model_state, state.key, train=train, dtype=None)
        return value_and_metrics(loss(model, batch, train))[0]

    return of_params


def gradient_smoothness(function: Objective, params: Any, rates: ArrayLike) -> Smoothness:
    r"""Measures how a loss and its gradient change along the gradient.

    .. math:: L(\theta - \eta g),\qquad \frac{\|g(\theta - \eta g) - g\|}{\|g\|},\qquad
              \frac{\|g(\theta - \eta g) - g\|}{\eta \|g\|}

    Args:
      function: of the parameters, such as `objective` gives.
      params: where to measure, a pytree.
      rates: learning rates eta, above 0, shape (k,).

    Returns:
      `Smoothness`; NaN where the gradient is zero.

    Raises:
      ValueError: rates that are no vector.
      TypeError: integer rates.

    Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?", 2018,
    https://arxiv.org/abs/1805.11604.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import diagnostics
      >>> bowl = lambda x: 1.5 * jnp.sum(x**2)
      >>> found = diagnostics.gradient_smoothness(bowl, jnp.ones(4), jnp.array([0.25, 0.5]))
      >>> print(found.smoothness, found.gradient_change)
      [3. 3.] [0.75 1.5 ]
    """
    rates = ax.to_float_array("gradient_smoothness", rates, "rates")
    ax.check_shape("gradient_smoothness", "rates", rates.shape, (rates.size,))
    grad = jax.grad(function)(params)
    size = length(grad)

    def at(rate):
        value, there = jax.value_and_grad(function)(_step(params, grad, rate))
        change = length(optax.tree.sub(there, grad))
        return Smoothness(rate, value, change / size, change / (rate.astype(size.dtype) * size))

    return jax.lax.map(at, rates)


def largest_learning_rate(
    function: Objective, params: Any, *, start: float = 1.0, digits: int = 8
) -> jax.Array:
    r"""Finds the largest step along the gradient that does not raise the loss.

    .. math:: \max \{\eta : L(\theta - \eta g) \le L(\theta)\}

    Halved to one that does not raise the loss, doubled until it does, then bisected: what lies
    beyond the first crossing that doubling finds is not seen. Of a quadratic bowl it is 2 over the
    curvature along the gradient.

    Args:
      function: of the parameters, such as `objective` gives.
      params: where to measure, a pytree.
      start: a first guess, above 0.
      digits: how often to bisect: the rate is known to one part in 2**digits.

    Returns:
      A scalar, float32; 0 where each step of 2**-40 times the start or more raises the loss, and
      2**40 times the start where none up to there does, as where the gradient is zero.

    Raises:
      ValueError: a start that is not above 0, no digits.
      TypeError: a start that is no number, digits that are no int.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import diagnostics
      >>> bowl = lambda x: 1.5 * jnp.sum(x**2)
      >>> print(f"{diagnostics.largest_learning_rate(bowl, jnp.ones(4)):.2f}")
      0.67
    """
    name = "largest_learning_rate"
    ax.check_positive(name, "start", start)
    digits = ax.to_positive_int(name, "digits", digits)
    value, grad = jax.value_and_grad(function)(params)
    lowers = lambda rate: function(_step(params, grad, rate)) <= value  # noqa: E731
    least, most = start * 2.0**-40, start * 2.0**40

    def move(rate, factor, goes_on):
        more = lambda rate: goes_on(rate) & (rate >= least) & (rate < most)  # noqa: E731
        return jax.lax.while_loop(more, lambda rate: factor * rate, rate)

    low = move(jnp.float32(start), 0.5, lambda rate: ~lowers(rate))
    high = move(low, 2.0, lowers)

    def bisect(_, ends):
        low, high = ends
        middle = jnp.sqrt(low * high)
        fits = lowers(middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    found, _ = jax.lax.fori_loop(0, digits, bisect, (high / 2, high))
    return jnp.where(low < least, 0.0, jnp.where(high >= most, high, found))


def hessian_spectrum(
    function: Objective, params: Any, *, key: jax.Array, steps: int = 32
) -> Spectrum:
    r"""Resolves the spectrum of a loss's Hessian by Lanczos' method on its products with vectors.

    .. math:: H v = \frac{d}{dt} \nabla L(\theta + t v)

    The extremes of the spectrum are found first; with as many steps as there are parameters all of
    it. Every vector is made orthogonal to all before it, twice. Each step, and one before
    them for the size of what is measured, costs two to three gradients, and memory that of the
    parameters.

    Args:
      function: of the parameters, such as `objective` gives.
      params: where to measure, a pytree of real arrays.
      key: random key for the start.
      steps: how many values to resolve; no more than there are parameters.

    Returns:
      `Spectrum`, which has a `condition_number` and a `stable_rate`.

    Raises:
      ValueError: fewer steps than 1; no parameters.
      TypeError: steps that are no int.

    Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential
    and integral operators", 1950. Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net
    Optimization via Hessian Eigenvalue Density", 2019, https://arxiv.org/abs/1901.10159.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normax import diagnostics
      >>> valley = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 4.0, 100.0]) * x**2)
      >>> found = diagnostics.hessian_spectrum(valley, jnp.ones(3), key=jax.random.key(0), steps=3)
      >>> print(found.values.round(1), f"{found.condition_number:.1f} {found.stable_rate:.3f}")
      [  1.   4. 100.] 100.0 0.020
    """
    steps = ax.to_positive_int("hessian_spectrum", "steps", steps)
    own, back = ravel_pytree(params)
    start = own.astype(ax.promote(jnp.float32, own))
    ax.check_found("hessian_spectrum", "a parameter", start.size > 0)
    steps = min(steps, start.size)

    def slope(flat):
        grad, _ = ravel_pytree(jax.grad(function)(back(flat.astype(own.dtype))))
        return grad.astype(start.dtype)

    curve = lambda v: jax.jvp(slope, (start,), (v,))[1]  # noqa: E731
    keys = jax.random.split(key, steps + 1)
    noise = lambda key: jax.random.normal(key, start.shape, start.dtype)  # noqa: E731
    first = noise(keys[0])
    first /= jnp.linalg.norm(first)
    # Curvatures near 1, whose squares are in range, whatever they are.
    size = jnp.max(jnp.abs(curve(first)))
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    product = lambda v: curve(v) / unit  # noqa: E731

    def step(carry, inputs):
        basis, v, v_before, beta = carry
        number, key = inputs
        basis = basis.at[number].set(v)
        w = product(v)
        alpha = v @ w
        size = jnp.linalg.norm(w)
        w = _orthogonal(w - alpha * v - beta * v_before, basis)
        beta = jnp.linalg.norm(w)
        # What is left of a space that is used up is rounding: go on in another direction.
        is_used_up = beta <= 100 * jnp.finfo(start.dtype).eps * jnp.maximum(size, 1e-30)
        beta = jnp.where(is_used_up, 0, beta)
        w = jnp.where(is_used_up, _orthogonal(noise(key), basis), w)
        return (basis, w / jnp.linalg.norm(w), v, beta), (alpha, beta)

    carry = (
        jnp.zeros((steps, start.size), start.dtype),
        first,
        jnp.zeros_like(first),
        0.0 * first[0],
    )
    _, (alpha, beta) = jax.lax.scan(step, carry, (jnp.arange(steps), keys[1:]))
    values, vectors = jnp.linalg.eigh(
        jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    )
    return Spectrum(values * unit, vectors[0] ** 2, beta[-1] * jnp.abs(vectors[-1]) * unit)


def _orthogonal(w, basis):
    """Returns w without its part in the span of the rows."""
    for _ in range(2):  # what rounding leaves goes the second time
        w = w - basis.T @ (basis @ w)
    return w


def _step(params, grad, rate):
    def moved(param, slope):
        dtype = ax.promote(jnp.float32, slope)
        return param - (rate.astype(dtype) * slope.astype(dtype)).astype(param.dtype)

    return jax.tree.map(moved, params, grad)
