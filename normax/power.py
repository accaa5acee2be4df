"""Power normalization: running statistics in the forward pass, and others in the backward pass."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import measure as me
from normax.moments import moments_over
from normax.standardize import normalize, reciprocal_deviation


class PowerState(NamedTuple):
    """What power normalization remembers.

    Attributes:
      square: running mean square, of the feature shape.
      drift: running mean of the gradient along the normalized input, of the feature shape.
    """

    square: Any
    drift: Any

    @classmethod
    def create(cls, feature_shape, dtype: DTypeLike = jnp.float32) -> "PowerState":
        """Returns the state before any data: a mean square of 1, a drift of 0.

        >>> print(PowerState.create(2).square)
        [1. 1.]
        """
        ax.dtype_of("PowerState.create", dtype)  # refuses what is none
        dtype = ax.compute_dtype(dtype)
        return cls(jnp.ones(feature_shape, dtype), jnp.zeros(feature_shape, dtype))


def power_norm(
    x: ArrayLike,
    state: PowerState,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    feature_axes: ax.Axes = -1,
    momentum: float = 0.9,
    drift_momentum: float = 0.9,
    epsilon: float = 1e-5,
    warming_up: ArrayLike = False,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, PowerState]:
    r"""Divides by a running root mean square, with a running approximation of its gradient.

    .. math::
        \hat{x} = \frac{x}{\sqrt{\psi^2 + \epsilon}},\quad y = \gamma \hat{x} + \beta,\quad
        \psi^2 \leftarrow \alpha \psi^2 + (1 - \alpha) \frac1n \sum x^2

    and backwards, with g the gradient of :math:`\hat{x}`,

    .. math::
        dx = \frac{g - \nu \hat{x}}{\sqrt{\psi^2 + \epsilon}},\quad
        \nu \leftarrow \nu \left(1 - \frac{1 - \alpha'}n \sum \hat{x}^2\right)
                       + \frac{1 - \alpha'}n \sum g \hat{x}

    For transformers, whose batches have unsteady statistics. What is known only in the backward
    pass cannot be returned by the forward pass: the "gradient" with respect to `state.drift` is its
    new value. Differentiate with respect to it and put it back, as in the example. This derivative
    is not that of the output, so that there is only reverse mode, and once.

    Args:
      x: array of any rank, floating-point.
      state: `PowerState` of shape `x.shape[feature_axes]`.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      use_running_average: True at inference, where nothing is remembered; False in training.
      feature_axes: axes that keep statistics of their own; every other axis is reduced.
      momentum: alpha, weight of the past in the mean square.
      drift_momentum: alpha', weight of the past in the drift.
      epsilon: added to the mean square, inside the root.
      warming_up: divide by this batch's root mean square instead, as the paper does in the first
        steps; a bool or a traced one.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      The output, of the shape of `x`, and the new `PowerState`, its drift still the old one. Under
      jit with sharded inputs statistics are those of the whole batch; there is no `axis_name`,
      since JAX would add up over devices what is no gradient.

    Raises:
      ValueError: a shape that is not the feature shape; axes out of range or repeated; epsilon
        below 0; a momentum outside [0, 1].
      TypeError: integer or complex `x`; a `state` that is no `PowerState`.

    Where others differ: the authors' code divides the gradient by the deviation of the batch.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> x, state = jnp.array([[1.0], [3.0]]), normax.PowerState.create(1)
      >>> def loss(drift, state):
      ...     y, state = normax.power_norm(
      ...         x, state._replace(drift=drift), use_running_average=False, epsilon=0.0
      ...     )
      ...     return jnp.sum(y), state
      >>> drift, state = jax.grad(loss, has_aux=True)(state.drift, state)
      >>> state = state._replace(drift=drift)
      >>> print((10 * state.square).round(), (10 * state.drift).round())
      [14.] [2.]

    Shen, Yao, Gholami, Mahoney and Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, https://arxiv.org/abs/2003.07845.
    """
    name = "power_norm"
    ax.check_switch(name, "use_running_average", use_running_average)
    ax.check_given(name, "momentum", momentum)
    ax.check_momentum(name, momentum)
    drift_momentum = ax.to_fraction(name, "drift_momentum", drift_momentum)
    ax.check_statistics(name, "state", state, PowerState)
    x = ax.to_float_array(name, x)
    for label, value in {"x": x, "state": state.drift}.items():
        ax.check_real(name, label, value)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    ax.check_feature_shape(name, "state.square", jnp.shape(state.square), x, features)
    reduced = ax.other_axes(features, x.ndim)
    mask, epsilon = ax.to_weights(name, mask, x), ax.to_epsilon(name, epsilon)
    dtype = ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias)
    scale, bias = (
        ax.to_parameter(name, label, value, x, features)
        for label, value in (("scale", scale), ("bias", bias))
    )
    square = lax.stop_gradient(ax.along(jnp.asarray(state.square), x.ndim, features))
    if use_running_average:
        zero = jnp.zeros_like(square)
        return normalize(
            x, zero, square, scale, bias, epsilon=epsilon, mask=mask, dtype=dtype
        ), state
    m = lax.stop_gradient(moments_over(name, x, reduced, centered=False, mask=mask))
    here = ax.along(m.var, x.ndim, features)
    divided_by = jnp.where(jnp.asarray(warming_up), here, square.astype(here.dtype))
    drift = ax.along(jnp.asarray(state.drift), x.ndim, features)
    plan = reduced, drift_momentum, dtype
    y = _forward(plan, x, reciprocal_deviation(divided_by, epsilon), drift, scale, bias, mask)
    weight, square = jnp.asarray(momentum, m.var.dtype), jnp.asarray(state.square)
    new = weight * square.astype(m.var.dtype) + (1 - weight) * m.var
    moves = (m.count > 0) & jnp.isfinite(new)
    return y, state._replace(square=jnp.where(moves, new.astype(square.dtype), square))


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _forward(plan, x, rstd, drift, scale, bias, mask):
    reduced, momentum, dtype = plan
    weights = jnp.ones((1,) * x.ndim, bool) if mask is None else mask
    y: Any = _divide(reduced, momentum, me.present(x, mask), rstd, drift, weights)
    y = y if scale is None else y * scale.astype(y.dtype)
    return (y if bias is None else y + bias.astype(y.dtype)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divide(reduced, momentum, x, rstd, drift, weights) -> jax.Array:
    del reduced, momentum, drift, weights
    return x * rstd


def _divide_forward(reduced, momentum, x, rstd, drift, weights):
    del reduced, momentum
    return x * rstd, (x, rstd, drift, weights)


def _divide_backward(reduced, momentum, kept, g):
    x, rstd, drift, weights = kept
    xhat = x * rstd
    there = me.there(weights)
    each = jnp.broadcast_to(jnp.where(there, weights.astype(x.dtype), 0), x.shape)
    count = jnp.sum(each, reduced, keepdims=True)
    n = jnp.where(count > 0, count, 1)

    def mean(values):
        return jnp.sum(values, reduced, keepdims=True) / n

    old = drift.astype(x.dtype)
    # The weight of an entry is in how it moves the mean square, not in how that moves the loss.
    dx = jnp.where(there, (g - each * old * xhat) * rstd, 0)
    rest = 1 - momentum
    new = old * (1 - rest * mean(each * xhat * xhat)) + rest * mean(jnp.where(there, g * xhat, 0))
    new = jnp.where((count > 0) & jnp.isfinite(new), new, old)
    return dx, jnp.zeros_like(rstd), new.astype(drift.dtype), None


_divide.defvjp(_divide_forward, _divide_backward)
