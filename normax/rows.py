"""Rows that stay on chip: the form of the formula that XLA on a GPU makes one kernel of.

There a reduction over the last axis, its broadcast, and one operation of that with what was reduced
are one step; a chain of such steps is one kernel, which reads `x` once and writes `y`. A second
output, or two sums of one array, would break it. So each step is that and no more: a unit, exact
zeros for equal entries, the mean, the deviation.
"""

import math

import jax.numpy as jnp
from jax import lax

from normax import measure as me
from normax.entries import settled
from normax.kernels import entrywise
from normax.rescale import alike, rescale


def stay_on_chip(plan, x, mask):
    """Returns whether the groups are rows, alone on their device, that this form is right for."""
    axes = plan.reduction.axes
    trailing = axes == tuple(range(x.ndim - len(axes), x.ndim)) and len(axes) > 0
    plain = mask is None and plan.reduction.axis_name is None and not jnp.iscomplexobj(x)
    one_epsilon = plan.floor == 0 and not plan.on_deviation
    # Smaller entries than can be squared are nothing beside it, and it beside those in a unit.
    usual = 1e-24 <= plan.epsilon <= 1.0
    return trailing and plain and one_epsilon and usual and x.size > 0


def take_activation(plan, x):
    """Returns whether XLA computes the activation with the rows.

    It pads a row to a power of two, and where that is much it does nothing costly there, but writes
    down what would go into it, in float32.
    """
    sizes = [x.shape[axis] for axis in plan.reduction.axes]
    if plan.activation is None or not all(isinstance(size, int) for size in sizes):
        return True
    length = math.prod(sizes)
    padding = 2 ** (length - 1).bit_length() - length
    return 8 * padding <= length or not entrywise.is_costly(plan.activation)


def forward(plan, x, scale, bias):
    """Returns `x` standardized row by row, and rescaled."""
    d, rstd = _deviations(plan, _rows(plan, x))
    y = rescale((d * rstd).reshape(x.shape), scale, bias, plan.activation)
    return y.astype(plan.dtype)


def gradient(plan, x, scale, dy):
    """Returns the cotangent of `x`, of that of `y` before its activation."""
    entries = _rows(plan, x)
    d, rstd = _deviations(plan, entries)
    xhat, n = d * rstd, d.shape[-1]
    t = dy.astype(d.dtype)
    t = (t if scale is None else jnp.multiply(*alike(t, scale))).reshape(d.shape)
    if plan.reduction.centered:
        t = t - jnp.sum(t, -1, keepdims=True) / n
    dx = (t - xhat * (jnp.sum(xhat * t, -1, keepdims=True) / n)) * rstd
    # The largest entry again, asked for in other words: used twice, the unit would be no step.
    highest, lowest = jnp.max(entries, -1, keepdims=True), jnp.min(entries, -1, keepdims=True)
    unit = _unit(jnp.maximum(highest, -lowest))
    # Of equal entries only epsilon is left, and that is in no unit.
    equal = (highest == lowest) & plan.reduction.centered
    dx = dx * jnp.where(equal, 1, 1 / unit)
    return dx.reshape(x.shape).astype(x.dtype)


def _rows(plan, x):
    """Returns `x` with the axes of a row as one, in the dtype to compute in."""
    length = math.prod(x.shape[axis] for axis in plan.reduction.axes)
    return me.present(x, None).reshape(*x.shape[: plan.reduction.axes[0]], length)


def _deviations(plan, x):
    """Returns the deviations of each row in its unit, and their reciprocal deviation."""
    d = x * (1 / _unit(jnp.max(jnp.abs(x), -1, keepdims=True)))
    if plan.reduction.centered:
        entries = d
        for _ in range(2):
            d = d - settled(jnp.sum(d, -1, keepdims=True) / d.shape[-1])
        # What is left of equal entries is rounding, twice; no other deviation is so small.
        nothing = 4 * jnp.finfo(d.dtype).eps ** 2
        d = jnp.where(jnp.abs(d) < jnp.abs(entries) * nothing, 0, d)
    var = jnp.sum(d * d, -1, keepdims=True) / d.shape[-1]
    # A unit above one is so large that epsilon is nothing beside the variance in it, unless that is
    # zero: so epsilon can be added as it is.
    return d, lax.rsqrt(var + plan.epsilon)


def _unit(peak):
    """Returns one, or the power of two that brings a row to a size that can be squared."""
    info = jnp.finfo(peak.dtype)
    integer = jnp.dtype(f"int{8 * peak.dtype.itemsize}")
    exponent = lax.bitcast_convert_type(jnp.asarray(jnp.inf, peak.dtype), integer)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(peak, integer) & exponent, peak.dtype)
    largest = 2.0 ** ((info.maxexp - 28) // 2)
    return jnp.maximum(power * (1 / largest), 1)
