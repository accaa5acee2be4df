"""The largest singular value of any linear map, such as a convolution with its padding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normax import axes as ax
from normax.length import l2_norm
from normax.weight import SpectralState, iterate


def operator_norm(
    linear: Callable[[jax.Array, jax.Array], jax.Array],
    w: ArrayLike,
    state: SpectralState,
    *,
    n_steps: int = 1,
) -> tuple[jax.Array, SpectralState]:
    r"""Estimates the largest singular value of a linear map by power iteration.

    .. math:: v \leftarrow \frac{A u}{\|A u\|},\quad u \leftarrow \frac{A^T v}{\|A^T v\|},\quad
              \sigma = \langle v, A u \rangle

    A kernel over its `spectral_norm` is a bound for one position; the convolution as an operator,
    with its strides and padding on inputs of a given size, may stretch more. Divide the kernel by
    what this returns. JAX transposes the map, so any one that is linear will do.

    Args:
      linear: function `linear(w, u)`, linear in each.
      w: what the map depends on, such as a kernel; gradients flow to it, none through u and v.
      state: `SpectralState` with `u` an input of the map; `SpectralState(u, sigma)` starts from any
        `u` that is not zero, such as a random one.
      n_steps: power iterations, at least 1; 15 make a good start.

    Returns:
      The singular value, a scalar, and the new `SpectralState`.

    Raises:
      ValueError: `n_steps` below 1.
      TypeError: integer or complex `w`; an `n_steps` that is no int; a `state` that is no
        `SpectralState`.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> convolve = lambda w, u: jnp.convolve(u, w, mode="same")
      >>> state = normax.SpectralState(jnp.linspace(1.0, 2.0, 9), jnp.zeros(()))
      >>> sigma, state = normax.operator_norm(convolve, jnp.ones(3), state, n_steps=50)
      >>> print((1000 * sigma).round())  # 1 + 2 cos(pi / 10): more than the kernel's root of 3
      2902.0

    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", 2018, https://arxiv.org/abs/1802.05957; for convolutions: Gouk and others,
    "Regularisation of Neural Networks by Enforcing Lipschitz Continuity", 2018,
    https://arxiv.org/abs/1804.04368.
    """
    name = "operator_norm"
    w = ax.to_float_array(name, w, "w")
    ax.check_real(name, "w", w)
    ax.check_kind(name, "state", state, SpectralState)
    n_steps = ax.to_positive_int(name, "n_steps", n_steps)
    fixed, start = lax.stop_gradient((w, jnp.asarray(state.u)))

    def apply(u):
        return linear(fixed, u)

    transpose = jax.linear_transpose(apply, start)

    def step(u):
        v = _unit(apply(u))
        return v, _unit(*transpose(v))

    v, u = iterate(step, start, n_steps)
    sigma = jnp.sum(v * linear(w, u))
    # From zero no later step would leave.
    u = jnp.where(jnp.all(jnp.isfinite(u)) & jnp.any(u != 0), u, start)
    new = SpectralState(u, lax.stop_gradient(sigma).astype(jnp.result_type(state.sigma)))
    return sigma, new


def _unit(array):
    return l2_norm(array, reduction_axes=tuple(range(array.ndim)))
