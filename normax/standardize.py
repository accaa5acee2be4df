"""The one differentiable primitive: measure, standardize, rescale."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import gradient, implementations, parts, rows, units
from normax import measure as me
from normax.entries import are_short_rows
from normax.forms import one_read_is_enough
from normax.layout import layout_of
from normax.moments import Moments, to_moments
from normax.rescale import Plan, alike, rescale, rescaled, rescaled_tangent, standardized
from normax.rescale import reciprocal_deviation as reciprocal_deviation
from normax.rescale import root as root

EPSILON_ON = ("variance", "deviation")


def standardize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes,
    feature_axes: ax.Axes = -1,
    centered: bool = True,
    epsilon: float = 1e-6,
    floor: float = 0.0,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
    epsilon_on: str = "variance",
    activation: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    caller: str = "standardize",
) -> tuple[jax.Array, Moments]:
    r"""Standardizes `x` by its own statistics, then rescales it; every normalizer is a call of it.

    .. math:: \hat{x} = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              y = \hat{x} \gamma + \beta

    Its derivative is the projection
    :math:`d\hat{x} = \rho\,(P t - \hat{x} \langle \hat{x}, P t \rangle)`, where P subtracts the
    mean, :math:`\rho` is the reciprocal deviation, and the means are those of the statistics:
    masked and pooled alike. It is linear JAX code, so its transpose is the textbook's backward
    pass; forward mode, reverse mode and their compositions follow from it. Kept for it are `x` as
    it came and the statistics of each group.

    Args:
      x: array of any rank, floating-point or complex.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale and bias of their own.
      centered: subtract the mean; False divides by the root mean square.
      epsilon: added to the variance, inside the root.
      floor: a group whose variance plus epsilon is not above it comes out as `bias`, and neither
        it nor its moments have a derivative.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`.
      axis_name: name, or names, of a mapped axis whose devices pool their statistics, by count.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.
      epsilon_on: "variance", inside the root, or "deviation", outside: then a constant group has
        the derivative of a division by epsilon.
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
      implementation: None or "xla", or a kernel by name: "mosaic_gpu", for what is summarised over
        the last axis, or over groups of it at all positions of an example; "mosaic_tpu", for the
        former, or what is summarised over all but the last axis; "cpu", for all three. One that
        cannot be had is refused.
      caller: the function to name in error messages.

    Returns:
      An array of the shape of `x`, and the `Moments` it was standardized by, of the shape of `x`
      without `reduction_axes`.

    Raises:
      ValueError: axes out of range or repeated; a scale or bias that is not of the feature shape;
        epsilon below 0; a mask that does not broadcast; an unbound axis_name; `epsilon_on` another
        word; an `implementation` that is not for these arguments.
      NotImplementedError: an `implementation` that is not for the platform, when lowered.
      TypeError: integer `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> y, m = normax.standardize(jnp.array([[1.0, 3.0]]), reduction_axes=(0, 1))
      >>> print(y.round(3), m.mean, m.var)
      [[-1.  1.]] 2.0 1.0
    """
    plan, *arguments = planned(
        caller,
        x,
        scale,
        bias,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        centered=centered,
        epsilon=epsilon,
        floor=floor,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
        epsilon_on=epsilon_on,
        activation=activation,
        implementation=implementation,
    )
    return from_measured(plan, *arguments)


def planned(
    caller,
    x,
    scale,
    bias,
    *,
    reduction_axes,
    feature_axes,
    centered,
    epsilon,
    mask,
    dtype,
    implementation,
    floor=0.0,
    axis_name=None,
    axis_index_groups=None,
    epsilon_on="variance",
    activation=None,
    residual=False,
):
    """Returns the plan, and x, scale, bias and mask as it takes them; bad input is refused."""
    x = ax.to_float_array(caller, x)
    reduced = ax.sorted_axes(caller, "reduction_axes", reduction_axes, x.ndim)
    features = ax.sorted_axes(caller, "feature_axes", feature_axes, x.ndim)
    epsilon = ax.to_epsilon(caller, epsilon)
    floor = ax.to_number(caller, "floor", floor)
    reduction = me.Reduction.over(caller, reduced, centered, axis_name, axis_index_groups)
    reduction = reduction._replace(least=units.least(max(epsilon, floor)))
    dtype = ax.to_dtype(caller, dtype, x, x=x, scale=scale, bias=bias)
    ax.check_choice(caller, "epsilon_on", epsilon_on, EPSILON_ON)
    ax.check_activation(caller, activation, x)
    on_deviation = epsilon_on == "deviation"
    plan = Plan(reduction, epsilon, floor, dtype, on_deviation, activation, implementation)
    scale = ax.to_parameter(caller, "scale", scale, x, features)
    bias = ax.to_parameter(caller, "bias", bias, x, features)
    mask = ax.to_weights(caller, mask, x)
    ax.check_choice(caller, "implementation", implementation, implementations.CHOICES)
    plan = plan._replace(layout=layout_of(plan, x, scale, bias))
    reason = implementations.why_not(plan, x, scale, bias, mask, residual)
    ax.check_available(caller, implementation, reason)
    if 0 in x.shape:
        plan = plan._replace(implementation=None)  # no kernel, for no entry
    return plan, x, scale, bias, mask


# So that outside jit this is one program, not forty.
@functools.partial(jax.jit, static_argnums=0)
def from_measured(plan, x, scale, bias, mask):
    """Returns `y`, and the moments it was standardized by."""
    y, measured = _standardize(plan, x, scale, bias, mask)
    return y, to_moments(plan.reduction, x, measured)


def normalize(
    x,
    mean,
    var,
    scale=None,
    bias=None,
    *,
    epsilon,
    mask=None,
    dtype=None,
    epsilon_on="variance",
    activation=None,
):
    """Standardizes `x` by the statistics it is given, then rescales it; all broadcast to x."""
    ax.check_choice("normalize", "epsilon_on", epsilon_on, EPSILON_ON)
    ax.check_activation("normalize", activation, x)
    dtype = x.dtype if dtype is None else dtype
    how = epsilon, epsilon_on == "deviation", activation
    return _normalize(how, dtype, x, mean, var, scale, bias, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _normalize(how, dtype, x, mean, var, scale, bias, mask):
    """Kept for the backward pass: the arguments, nothing of x's size in float32."""
    epsilon, on_deviation, activation = how
    x, mean = alike(me.present(x, mask), mean)
    d = me.subtract(x, mean, None, mask)
    rstd = reciprocal_deviation(var, epsilon, 0.0, on_deviation)
    return rescale(jnp.multiply(*alike(d, rstd)), scale, bias, activation).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(plan, x, scale, bias, mask):
    return _measured_too(plan, x, scale, bias, mask)


def _measured_too(plan, x, scale, bias, mask, differentiated=False):
    measured = implementations.measure(plan, x, mask)
    form = shorter = on_gpu = functools.partial(_form, plan)
    if one_read_is_enough(plan.reduction, x, mask):
        shorter = on_gpu = functools.partial(_in_few_steps, plan)
    read_again = not differentiated or are_short_rows(x, plan.reduction.axes)
    if rows.stay_on_chip(plan, x, mask) and read_again and rows.take_activation(plan, x):
        # Measuring a row again costs less there than to have it written down. The backward pass
        # needs that all the same, and what comes after y, which it may need too, joins no row; but
        # of short rows it is too much to be read once more.
        on_gpu = functools.partial(_row_by_row, plan)
    forms = {"cuda": on_gpu, "rocm": on_gpu, "tpu": shorter}
    args = x, scale, bias, mask, measured
    return implementations.forward(plan, form, forms, *args, differentiated), measured


def _form(plan, x, scale, bias, mask, measured):
    _, xhat = standardized(plan, x, measured, mask, units.divide_exactly)
    return rescale(xhat, scale, bias, plan.activation).astype(plan.dtype)


def _row_by_row(plan, x, scale, bias, mask, measured):
    del mask, measured
    return rows.forward(plan, x, scale, bias)


def _in_few_steps(plan, x, scale, bias, mask, measured):
    d = me.deviation(x, mask, measured._replace(rest=None))
    y = rescaled(plan, d, measured, scale, bias)
    return (y if plan.activation is None else plan.activation(y)).astype(plan.dtype)


@functools.partial(_standardize.defjvp, symbolic_zeros=True)
def _standardize_jvp(plan, primals, tangents):
    x, scale, bias, mask = primals
    y, measured = _measured_too(plan, x, scale, bias, mask, differentiated=True)
    moves = [None if isinstance(t, SymbolicZero) else t for t in tangents]
    if not gradient.by_hand(plan, x, scale, bias, mask):
        return (y, measured), _tangents(plan, x, scale, bias, mask, measured, *moves)
    dy = gradient.tangent(plan, x, scale, bias, measured, *moves[:3])
    return (y, measured), (
        dy,
        me.measure_tangents(plan.reduction, x, mask, measured, moves[0], None),
    )


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _tangents(plan, x, scale, bias, mask, measured, dx, dscale, dbias, dmask):
    """Returns the tangents of y and of what was measured. Kept for it: the arguments."""
    rstd, xhat = standardized(plan, x, measured, mask)
    move = jax.tree.map(jnp.zeros_like, measured)
    dxhat = None
    if dx is not None or dmask is not None:
        t = jnp.zeros_like(xhat) if dx is None else me.present(dx, mask)
        direction, length = xhat, rstd
        if plan.on_deviation:
            length = reciprocal_deviation(measured.var, 0.0)
            direction = me.times(me.deviation(x, mask, measured), length)
        # Where the length is zero the deviations are too, or the group is below the floor.
        safe = jnp.where(length > 0, length, 1)
        dmean, along, *dcount = me.moment_tangents(
            plan.reduction, direction, t, measured, mask, dmask, length
        )
        move = me.measured_tangents(measured, dmean, along / safe, *dcount)
        # Of one dtype, so that what spreading them transposes to is one exchange.
        dmean = dmean if dmean is None else parts.spread(dmean, t)
        along = jnp.real(parts.spread(along.astype(t.dtype), t))
        pt = me.subtract(t, dmean, None, mask)
        dxhat = me.times(pt - me.times(xhat, along), units.divide(rstd, measured.unit))
    return rescaled_tangent(plan, xhat, scale, bias, dxhat, dscale, dbias), move
