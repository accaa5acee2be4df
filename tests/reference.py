"""The papers' formulas, written twice: in long double with the backward pass by hand, and in plain
JAX for its autodiff. Neither knows normax.
"""

import jax.numpy as jnp
import numpy as np

LONG = np.longdouble


def grouped(case, array, xp=np):
    """Splits the feature axis of an array into groups, where the case has any."""
    if case.groups is None or array is None:
        return array
    axis = case.features[0] % len(case.shape)
    size = array.shape[axis]
    split = (1, 1) if size == 1 else (case.groups, size // case.groups)
    return xp.reshape(array, (*array.shape[:axis], *split, *array.shape[axis + 1 :]))


def laid_out(case, value, xp=np):
    """Lays a scale or bias along the feature axes of x."""
    rank = len(case.shape)
    features = {axis % rank for axis in case.features}
    return xp.expand_dims(value, tuple(axis for axis in range(rank) if axis not in features))


def statistics(case, x, mask=None):
    """Returns count, deviations, variance and validity of grouped x, in long double."""
    x = grouped(case, np.asarray(x).astype(LONG))
    valid = np.ones(x.shape, bool)
    if mask is not None:
        valid = np.broadcast_to(grouped(case, np.broadcast_to(mask, case.shape)), x.shape)
    x = np.where(valid, x, 0)
    n = np.maximum(valid.sum(case.reduced, keepdims=True), 1)
    mean = x.sum(case.reduced, keepdims=True) / n if case.centered else 0
    d = np.where(valid, x - mean, 0)
    return n, d, (d * d).sum(case.reduced, keepdims=True) / n, valid


def forward(case, x, scale=1, bias=0, mask=None):
    """Returns y in long double; scale and bias laid out along x."""
    _, d, var, _ = statistics(case, x, mask)
    xhat = (d / np.sqrt(var + LONG(case.epsilon))).reshape(np.shape(x))
    return xhat * scale + bias


def backward(case, x, ct, mask=None):
    """Returns dx for the cotangent of xhat, in long double: Ioffe and Szegedy, section 3."""
    n, d, var, valid = statistics(case, x, mask)
    rstd = 1 / np.sqrt(var + LONG(case.epsilon))
    ct = np.where(valid, grouped(case, np.asarray(ct).astype(LONG)), 0)
    xhat = d * rstd
    mean = ct.sum(case.reduced, keepdims=True) / n if case.centered else 0
    inner = (ct * xhat).sum(case.reduced, keepdims=True) / n
    return np.where(valid, rstd * (ct - mean - xhat * inner), 0).reshape(np.shape(x))


def naive(case):
    """Returns the plain formula in JAX, to be differentiated automatically."""

    def apply(x, scale, bias, mask=None):
        shape = x.shape
        g = grouped(case, x, jnp)
        if case.fixed:
            xhat = g / jnp.sqrt(1 + case.epsilon)
            xhat = xhat if mask is None else jnp.where(mask, xhat, 0)
        else:
            if mask is None:
                valid = jnp.ones(g.shape, bool)
            else:
                valid = grouped(case, jnp.broadcast_to(mask, shape), jnp)
            n = jnp.maximum(valid.sum(case.reduced, keepdims=True), 1).astype(g.dtype)
            g = jnp.where(valid, g, 0)
            mean = g.sum(case.reduced, keepdims=True) / n if case.centered else jnp.zeros_like(n)
            d = jnp.where(valid, g - mean, 0)
            var = (d * d).sum(case.reduced, keepdims=True) / n
            xhat = d / jnp.sqrt(var + case.epsilon)
        y = xhat.reshape(shape) * laid_out(case, scale, jnp)
        return y + laid_out(case, bias, jnp) if case.bias else y

    return apply


def silu(x, ct):
    """Returns SiLU of x, and what of the cotangent ct goes back through it."""
    gate = 1 / (1 + np.exp(-x))
    return x * gate, np.asarray(ct).astype(LONG) * gate * (1 + x * (1 - gate))
