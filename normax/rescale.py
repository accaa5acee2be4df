"""Standardized entries from what was measured, and the rescaling of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax import axes as ax
from normax import measure as me
from normax import parts, units
from normax.quotient import quotient, reciprocal_root


class Plan(NamedTuple):
    """What `standardize` is to do, known when it is traced."""

    reduction: me.Reduction
    epsilon: float
    floor: float
    dtype: Any
    on_deviation: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: str | None = None
    layout: Any = None  # how the kernel of that name has the axes


def standardized(plan, x, measured, mask, divide=units.divide):
    """Returns the reciprocal deviation, per unit, and the standardized entries."""
    d = me.deviation(x, mask, measured, divide)
    rstd = reciprocal_per_unit(plan, measured)
    return rstd, me.times(d, rstd)


def rescaled(plan, d, measured, scale, bias, rstd=None):
    """Returns what goes into the activation, of entries less their rounded mean.

    The fewer arrays there are to spread out, the less does XLA think of writing it down.
    """
    slope = reciprocal_per_unit(plan, measured) if rstd is None else rstd
    slope = slope if scale is None else jnp.multiply(*alike(slope, scale))
    rest = None if measured.rest is None else -measured.rest * slope
    offset = [jnp.add(*alike(rest, bias))] if None not in (rest, bias) else [rest, bias]
    return rescale(d, slope, next((v for v in offset if v is not None), None))


def reciprocal_per_unit(plan, measured):
    """Returns the reciprocal deviation of what was measured in units, in those units."""
    per_unit = 1 if measured.unit is None else 1 / measured.unit
    floor = plan.floor * per_unit * per_unit
    epsilon = plan.epsilon * per_unit * (1 if plan.on_deviation else per_unit)
    return reciprocal_deviation(measured.var, epsilon, floor, plan.on_deviation)


def reciprocal_deviation(var, epsilon, floor=0.0, on_deviation=False):
    """Returns 1 / sqrt(var + epsilon); 0, and so are its derivatives, where that is a floor.

    What is no number, or negative, comes out as NaN: it must show.
    """
    if on_deviation:
        deviation = root(var) + epsilon
        below = deviation == 0
        one = jnp.ones_like(deviation)
        return jnp.where(below, 0, quotient(one, jnp.where(below, one, deviation)))
    squared = var + epsilon
    below = (squared <= floor) & (squared >= 0)
    return jnp.where(below, 0, reciprocal_root(jnp.where(below, 1, squared)))


def root(squared):
    """Returns the square root, with a derivative of zero at zero."""
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def rescale(xhat, scale, bias, activation=None):
    """Returns `xhat * scale + bias`, and the activation of that."""
    if scale is not None:
        xhat = jnp.multiply(*alike(xhat, scale))
    if bias is not None:
        xhat = jnp.add(*alike(xhat, bias))
    return xhat if activation is None else activation(xhat)


def rescaled_tangent(plan, xhat, scale, bias, dxhat, dscale, dbias):
    """Returns the tangent of `y`, of those of xhat, scale and bias; None is zero."""
    terms = []
    if dxhat is not None:
        terms.append(dxhat if scale is None else jnp.multiply(*alike(dxhat, scale)))
    # In the dtype to add up in: that is what spreading them transposes to.
    dscale, dbias = (
        v if v is None else parts.spread(alike(v, xhat)[0], xhat) for v in (dscale, dbias)
    )
    if dscale is not None:
        terms.append(jnp.multiply(*alike(xhat, dscale)))
    if dbias is not None:
        terms.append(dbias)
    t = functools.reduce(jnp.add, alike(*terms))
    if plan.activation is not None:
        t = jax.jvp(plan.activation, (rescale(xhat, scale, bias),), (t,))[1]
    return t.astype(plan.dtype)


def alike(*arrays):
    """Returns the arrays in their common dtype, float32 at least."""
    dtype = ax.promote(jnp.float32, *(array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]
