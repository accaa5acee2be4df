"""The derivative of `standardize`, and its transpose, the backward pass, written by hand.

A transposed program reads what it needs as often as the first one mentions it. Here what is summed
is summed once: `dy` and `dy d` over the axes that all sums have in common, then over the others,
where little is left. For entries that are real, all present, and on one device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from normax import axes as ax
from normax import implementations, parts, rows, sums, units
from normax import measure as me
from normax.entries import are_short_rows
from normax.kernels.linear import linear
from normax.rescale import alike, reciprocal_per_unit, rescaled, rescaled_tangent, standardized

# Of no more rows than these, or as many as the others, XLA finds two sums in one read.
FEW_ROWS, MANY_ROWS = 36, sums.COLUMN


def by_hand(plan, x, scale, bias, mask):
    """Returns whether the backward pass here is that of the plan."""
    alone = mask is None and plan.reduction.axis_name is None
    real = not any(v is not None and jnp.iscomplexobj(v) for v in (x, scale, bias))
    return alone and real and plan.floor == 0 and not plan.on_deviation and x.size > 0


def tangent(plan, x, scale, bias, measured, dx, dscale, dbias):
    """Returns the tangent of `y`; None is zero."""
    if implementations.measures_again(plan):
        measured = None  # nor is it then kept
    known = x, scale, None if plan.activation is None else bias, measured
    shape, dtypes = of_parameters(scale, bias)
    return linear(
        functools.partial(forward, plan),
        functools.partial(backward, plan, shape, dtypes),
        known,
        (dx, dscale, dbias),
    )


def of_parameters(scale, bias):
    """Returns the shape of the parameters and their dtypes; None where there is none."""
    one = next((v for v in (scale, bias) if v is not None), None)
    dtypes = tuple(v if v is None else v.dtype for v in (scale, bias))
    return None if one is None else one.shape, dtypes


def forward(plan, known, dx, dscale, dbias):
    """Returns the tangent of `y`, of those of x, scale and bias."""
    x, scale, bias, measured = _measured(plan, known)
    rstd, xhat = standardized(plan, x, measured, None)
    t = None
    if dx is not None:
        t, total = me.present(dx, None), functools.partial(parts.total, sums.total)
        n = me.count_entries(plan.reduction, x)
        if plan.reduction.centered:
            t = t - total(t, plan.reduction.axes) / n
        t = t - xhat * (total(xhat * t, plan.reduction.axes) / n)
        t = t * units.divide(rstd, measured.unit)
    return rescaled_tangent(plan, xhat, scale, bias, t, dscale, dbias)


def backward(plan, shape, dtypes, known, dy):
    """Returns the cotangents of x, scale and bias, of that of `y`."""
    whole = functools.partial(_whole, plan, shape, sums.total)
    on_cpu = functools.partial(_whole, plan, shape, sums.total_in_parts)
    if rows.stay_on_chip(plan, known[0], None):
        on_gpu = functools.partial(_rows, plan, shape)
    else:
        on_gpu = functools.partial(_columns, plan, shape)
    on_tpu = functools.partial(_in_few_arrays, plan, shape)
    forms = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu, "tpu": on_tpu}
    by_sums = functools.partial(_by_sums, plan, shape)
    dx, *found = implementations.backward(plan, shape, whole, forms, by_sums, known, dy)
    return dx, *rounded(found, dtypes)


def _measured(plan, known):
    """Returns what is known, with what was measured."""
    *others, measured = known
    measured = me.measure(plan.reduction, known[0], None) if measured is None else measured
    return *others, measured


def rounded(cotangents, dtypes):
    """Returns the cotangents of parameters in their dtypes; None where there is no parameter."""
    return [
        None if dtype is None else v.astype(dtype)
        for v, dtype in zip(cotangents, dtypes, strict=True)
    ]


def _by_sums(plan, shape, known, dy):
    """Returns the cotangents of x, scale and bias, the sums by a kernel over columns."""
    x, scale, _, measured = known
    through = _factors(plan, known, dy)[1] if plan.activation is not None else dy
    found = implementations.column_sums(plan, x, through, measured)
    whole = functools.partial(_whole, plan, shape, sums.total, known, dy, found=found)
    dx = implementations.column_cotangent(
        plan, lambda: whole()[0], x, scale, through, measured, found
    )
    return dx, *([None, None] if shape is None else found)


def _columns(plan, shape, known, dy, devices=1):
    """Returns the cotangents of x, scale and bias, in two reads of what they are made of."""
    # Parts that are not those of devices would have to be sent.
    total = functools.partial(sums.total_in_one_read, cut_columns=devices == 1)
    again = known, dy
    if plan.activation is not None:
        # Else what goes through the activation, which both reads need, would be written down.
        again = lax.optimization_barrier(again)
    return _whole(plan, shape, total, known, dy, again)


def _in_few_arrays(plan, shape, known, dy, devices=1):
    """Returns the cotangents of x, scale and bias, that of x by few operations of few arrays.

    The fewer there are, the sooner does XLA for TPU compute it in the products that need it, rather
    than write it down.
    """
    del devices
    known = _measured(plan, known)
    x, scale, _, measured = known
    rstd = reciprocal_per_unit(plan, measured)
    total = functools.partial(parts.total, sums.total)
    xhat, through = _standardized(plan, known, dy)
    common = _common(plan, shape)
    of_parameters, ones, along = _means(
        plan, shape, total, x, scale, total(through, common), total(through * xhat, common)
    )
    per_unit = units.divide(rstd, measured.unit)
    slope = per_unit if scale is None else jnp.multiply(*alike(per_unit, scale))
    along, ones = along * per_unit, ones * per_unit
    narrow = x.dtype == jnp.bfloat16 and not are_short_rows(x, plan.reduction.axes)
    if plan.activation is not None and ax.compute_dtype(plan.dtype) != plan.dtype:
        measured = _in_deviations(plan, measured)
        entries, through = _factors(plan, (*known[:-1], measured), dy)
        along = along * reciprocal_per_unit(plan, measured)
        ones = ones if measured.rest is None else ones - along * measured.rest
    elif narrow and plan.reduction.centered:
        # Entries of so few digits need not be less their mean: what is made of both will do. A
        # quarter, because one over the largest power of two is subnormal.
        size = jnp.maximum(jnp.abs(measured.mean), jnp.sqrt(measured.var)) / 4
        size = units.choose(size, (), 0.0)
        entries = me.present(x, None) * units.divide(1 / size, measured.unit)
        along = along * (rstd * size)
        ones = ones - along * (measured.mean / size)
    else:
        entries = xhat
    shift = entries * along + ones if plan.reduction.centered else entries * along
    return (through * slope - shift).astype(x.dtype), *of_parameters


def _in_deviations(plan, measured):
    """Returns the same in units near the deviation, behind a barrier.

    So what goes through the activation is found twice by XLA for TPU, not written down in float32
    where `dy` is made; a barrier before `x` and `dy` would have them laid out anew. And in such
    units the entries less their mean are all that both uses need. A quarter, because one over the
    largest power of two is subnormal; nor may the unit be.
    """
    measured = measured._replace(var=lax.optimization_barrier(measured.var))
    size = units.choose(1 / reciprocal_per_unit(plan, measured), (), 0.0) / 4
    size = jnp.maximum(size, units.divide(4 * jnp.finfo(size.dtype).tiny, measured.unit))
    unit = size if measured.unit is None else measured.unit * size
    mean, rest = jax.tree.map(lambda v: v / size, (measured.mean, measured.rest))
    return measured._replace(unit=unit, mean=mean, rest=rest, var=measured.var / size / size)


def _rows(plan, shape, known, dy, devices=1):
    """Returns the cotangents of x, scale and bias: rows on chip for x, then the columns."""
    del devices
    apart, through = _apart(plan, known, dy)
    x, scale, *_ = apart
    if not rows.take_activation(plan, x):
        first, (apart, through) = (apart, through), lax.optimization_barrier((apart, through))
        dx = _in_two_reads(plan, *first, apart, through)
    else:
        before = through if plan.activation is None else _factors(plan, apart, through)[1]
        dx = rows.gradient(plan, x, scale, before)
    if shape is None:
        return dx, None, None
    if _have_much_in_common(plan):
        known, dy = _apart(plan, apart, through)
    *others, measured = known
    unit, rstd = units.found_once(measured.unit, reciprocal_per_unit(plan, measured))
    known = *others, measured._replace(unit=unit)
    xhat, alone = _standardized(plan, known, dy, rstd)
    ones, along = _over_rows(plan, alone, alone * xhat, _shared(shape))
    return dx, along, ones


def _over_rows(plan, a, b, axes):
    """Returns the sums of two arrays over the axes along which the parameters do not differ.

    In one read; as one sum only where two would not be: what was summed so has to be taken apart.
    """
    sizes = [a.shape[axis] for axis in axes]
    may_be_apart = plan.activation is None and all(isinstance(size, int) for size in sizes)
    if may_be_apart and not FEW_ROWS < math.prod(sizes) < MANY_ROWS:
        return [parts.total(sums.total, v, axes) for v in (a, b)]
    total = functools.partial(sums.total_in_one_read, cut_columns=False)
    return sums.totals_in_one_read(a, b, axes, functools.partial(parts.total, total))


def _in_two_reads(plan, known, dy, again, dy_again):
    """Returns the cotangent of x by the sums of each row, and by what those are made of, again."""
    x, scale, _, measured = known

    def factors(known, dy):
        xhat, dy = _standardized(plan, known, dy)
        return xhat, dy if scale is None else jnp.multiply(*alike(dy, scale))

    xhat, t = factors(known, dy)
    axes = plan.reduction.axes
    ones, along = sums.totals_in_one_read(t, t * xhat, axes)
    n = math.prod(x.shape[axis] for axis in axes)
    xhat, t = factors(again, dy_again)
    t = t - ones / n if plan.reduction.centered else t
    per_unit = units.divide(reciprocal_per_unit(plan, measured), measured.unit)
    return ((t - xhat * (along / n)) * per_unit).astype(x.dtype)


def _apart(plan, known, dy):
    """Returns the same behind a barrier.

    Else XLA would find the same in two of the three kernels, write that down in float32, and keep
    no row on chip. What `dy` alone comes from it does better to compute twice.
    """
    if _have_much_in_common(plan):
        return lax.optimization_barrier((known, dy))
    return lax.optimization_barrier(known), dy


def _have_much_in_common(plan):
    """Returns whether the kernels of rows and of columns do, but for what `dy` comes from."""
    return plan.reduction.centered or plan.activation is not None


def _shared(shape):
    """Returns along which axes the parameters do not differ."""
    return () if shape is None else tuple(i for i, size in enumerate(shape) if size == 1)


def _whole(plan, shape, total, known, dy, summed=None, found=None, devices=1):
    """Returns the cotangents of x, scale and bias, from what was measured.

    What is summed may be told apart from what the cotangent of x is made of, the same numbers; or
    the sums of dy xhat and dy over all that is shared are found already.
    """
    del devices
    known = _measured(plan, known)
    x, scale, _, measured = known
    total = functools.partial(parts.total, total)
    rstd = reciprocal_per_unit(plan, measured)
    xhat, dy = _standardized(plan, known, dy)
    common = _common(plan, shape)
    if found is not None:
        along, ones = found
    elif summed is None:
        ones, along = total(dy, common), total(dy * xhat, common)
    else:
        about_mean, alone = _factors(plan, *summed)
        ones, along = sums.totals_in_one_read(alone, alone * (about_mean * rstd), common, total)
        along = along if measured.rest is None else along - measured.rest * rstd * ones
    of_parameters, ones, along = _means(plan, shape, total, x, scale, ones, along)
    dy = dy if scale is None else jnp.multiply(*alike(dy, scale))
    t = dy - ones if plan.reduction.centered else dy
    dx = (t - xhat * along) * units.divide(rstd, measured.unit)
    return dx.astype(x.dtype), *of_parameters


def _common(plan, shape):
    """Returns the axes over which the sums for x and those for the parameters both are."""
    return tuple(axis for axis in plan.reduction.axes if shape is None or axis in _shared(shape))


def _means(plan, shape, total, x, scale, ones, along):
    """Returns the cotangents of scale and bias, and the means of dy and dy xhat, both scaled.

    Of the sums of dy and of dy xhat over what those have in common.
    """
    axes, of_parameters = plan.reduction.axes, [None, None]
    if shape is not None:
        others = tuple(axis for axis in _shared(shape) if axis not in axes)
        of_parameters = [total(along, others), total(ones, others)]
    if scale is not None:
        ones, along = (jnp.multiply(*alike(v, scale)) for v in (ones, along))
    n = math.prod(x.shape[axis] for axis in axes)
    rest = tuple(axis for axis in axes if axis not in _common(plan, shape))
    return of_parameters, *(total(v, rest) / n for v in (ones, along))


def _standardized(plan, known, dy, rstd=None):
    """Returns the standardized entries, and the cotangent of `y` before activation."""
    d, dy = _factors(plan, known, dy, rstd)
    rest = known[-1].rest
    rstd = reciprocal_per_unit(plan, known[-1]) if rstd is None else rstd
    return (d if rest is None else d - rest) * rstd, dy


def _factors(plan, known, dy, rstd=None):
    """Returns the entries less their rounded mean, and the cotangent of `y` before activation."""
    x, scale, bias, measured = known
    d = me.deviation(x, None, measured._replace(rest=None))
    dy = dy.astype(d.dtype)
    if plan.activation is not None:
        before = rescaled(plan, d, measured, scale, bias, rstd)
        (dy,) = jax.vjp(plan.activation, before)[1](dy.astype(before.dtype))
    return d, dy
