"""Kernels that can be asked for by name, in place of the form that XLA compiles.

A kernel that was asked for is had or refused: where it cannot be, that is said when the program is
traced or, of the wrong platform, lowered. Exported for another platform, a program has XLA's form
there, and a warning says so. By default they are taken where they were measured faster
than that form: those of rows on a Hopper GPU. Those of other GPUs and of TPU were not timed, and a
program with those of CPU is exported only if asked to.
"""

import functools
import importlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax import defaults, units
from normax import measure as me
from normax.forms import equal_in_no_unit
from normax.kernels.dispatch import by_platform
from normax.kernels.sharding import sharded
from normax.layout import COLUMNS, ROWS

XLA = "xla"
PARAMETERS = "scale", "bias"


class Kernels(NamedTuple):
    """Where the kernels of an implementation are, and what for."""

    rows: str
    groups: str | None
    columns: str | None
    platform: str
    writes_columns: bool = False  # or measures them only
    symbols: bool = False  # whether sizes may be symbols of a program to export
    interpret: bool = False


NAMED = {
    "cpu": Kernels(
        "normax.kernels.cpu",
        "normax.kernels.cpu_groups",
        "normax.kernels.cpu_columns",
        "cpu",
        writes_columns=True,
    ),
    "mosaic_gpu": Kernels(
        "normax.kernels.mosaic_gpu", "normax.kernels.mosaic_gpu_groups", None, "cuda"
    ),
    "mosaic_tpu": Kernels(
        "normax.kernels.mosaic_tpu", None, "normax.kernels.mosaic_tpu", "tpu", symbols=True
    ),
}
CHOICES = (None, XLA, *NAMED)
LEAST_EPSILON = 1e-24  # over columns: they are measured in units above one alone
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def why_not(plan, x, scale, bias, mask, residual=False):
    """Returns why the implementation of a plan cannot have these arguments, or None."""
    if plan.implementation in (None, XLA):
        return None
    layout, kernels = plan.layout, NAMED[plan.implementation]
    if 0 in x.shape:  # There is nothing to do; what could be is that of other sizes.
        x = jax.ShapeDtypeStruct([size or 16 for size in x.shape], x.dtype)
    refused = {
        "a mask": mask is not None,
        f"axis_name={plan.reduction.axis_name!r}": plan.reduction.axis_name is not None,
        f"floor={plan.floor}": plan.floor,
        "epsilon_on='deviation'": plan.on_deviation,
        f"epsilon={plan.epsilon}, above 1": plan.epsilon > 1,
        "complex entries": jnp.iscomplexobj(x),
        f"shape {x.shape}, with symbols": not kernels.symbols
        and not all(isinstance(size, int) for size in x.shape),
    }
    for reason, applies in refused.items():
        if applies:
            return reason
    if layout == ROWS:
        return _module(plan).supports(x, dtype=plan.dtype)
    where = f"groups over axes {plan.reduction.axes} of {x.ndim}"
    if residual:
        return f"a residual, with {where}"
    if layout == COLUMNS and kernels.columns:
        if not plan.reduction.centered:
            return "columns that are not centred"
        if plan.epsilon < LEAST_EPSILON:
            return f"epsilon={plan.epsilon}, below {LEAST_EPSILON} over columns"
        module = _module(plan)
        y = jax.ShapeDtypeStruct(x.shape, plan.dtype)
        return module.supports_columns(x) or module.supports_columns(y)
    if layout in (None, COLUMNS) or kernels.groups is None:
        shapes = ", ".join(str(v.shape) for v in (scale, bias) if v is not None)
        activated = "" if plan.activation is None else ", and an activation"
        return where + activated + (f", and parameters of shape {shapes}" if shapes else "")
    four = jax.ShapeDtypeStruct(layout.four(x.shape), x.dtype)
    module = _module(plan)
    return module.supports_groups(four, dtype=plan.dtype, activation=plan.activation)


def measures_again(plan):
    """Returns whether a plan has a kernel whose backward pass needs nothing that was measured."""
    return plan.implementation not in (None, XLA) and plan.layout not in (None, COLUMNS)


def measure(plan, x, mask):
    """Returns what a plan standardizes by: columns by the kernel of the plan, where it has one."""
    if plan.implementation in (None, XLA) or plan.layout != COLUMNS:
        return me.measure(plan.reduction, x, mask)
    return _measure_by_kernel(plan, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure_by_kernel(plan, x):
    form = functools.partial(me.measure, plan.reduction, mask=None)
    return _named(plan, form, functools.partial(_measure_columns, plan))(x)


@_measure_by_kernel.defjvp
def _measure_by_kernel_jvp(plan, primals, tangents):
    # In the unit that the kernel chose, which need not be that of the form.
    measured = _measure_by_kernel(plan, *primals)
    return measured, me.measure_tangents(plan.reduction, *primals, None, measured, *tangents, None)


def forward(plan, form, forms, x, scale, bias, mask, measured, differentiated):
    """Returns `y`, by the kernel of the plan or by the form of a platform."""
    if plan.implementation in (None, XLA):
        kernels = _by_default(plan, _forward, forms["cuda"], x)
        if kernels and not (mask is None and defaults.beat_xla_forward(plan, x, differentiated)):
            kernels = {}
        return by_platform(form, **forms, **kernels)(x, scale, bias, mask, measured)
    if plan.layout == COLUMNS:
        if not _writes_columns(plan, x, plan.dtype):
            return form(x, scale, bias, mask, measured)
        return _named(plan, form, functools.partial(_forward_columns, plan))(
            x, scale, bias, mask, measured
        )
    return _named(plan, form, functools.partial(_forward, plan))(x, scale, bias, mask, measured)


def backward(plan, shape, whole, forms, by_sums, known, dy):
    """Returns the cotangents of x, scale and bias, by the kernel or by the form of a platform."""
    if plan.implementation in (None, XLA):
        kernels = _by_default(plan, _backward, forms["cuda"], known[0], shape)
        return by_platform(whole, tell_devices=True, **forms, **kernels)(known, dy)
    if plan.layout == COLUMNS:
        return _named(plan, whole, by_sums)(known, dy)
    return _named(plan, whole, functools.partial(_backward, plan, shape))(known, dy)


def add_forward(plan, form, x, residual, scale, bias):
    """Returns `x + residual` and `y`, by the kernel of the plan; `form` says what they are."""
    return _named(plan, form, functools.partial(_add_forward, plan))(x, residual, scale, bias)


def add_backward(plan, shape, whole, known, dtotal, dy):
    """Returns the cotangents of the sum, scale and bias, by the kernel of the plan."""
    return _named(plan, whole, functools.partial(_add_backward, plan, shape))(known, dtotal, dy)


def _module(plan):
    kernels = NAMED[plan.implementation]
    where = kernels.rows if plan.layout == ROWS else kernels.groups
    return importlib.import_module(str(kernels.columns if plan.layout == COLUMNS else where))


def _by_default(plan, kernel, form, x, *args) -> dict[str, Any]:
    """Returns the kernels that a plan of no implementation takes, by kind of device."""
    if plan.implementation is not None or plan.layout != ROWS or not defaults.are_timed(plan, x):
        return {}
    found = {}
    for kind, name in defaults.KERNELS.items():
        its = plan._replace(implementation=name)
        call = functools.partial(kernel, its, *args, alone=True)
        given = jax.ShapeDtypeStruct(x.shape, x.dtype)
        refused = functools.partial(why_not, its, given, None, None, None)
        found[kind] = functools.partial(defaults.kernel_or_form, refused, call, form)
    return found


def _named(plan, form, kernel):
    """Returns the kernel where it was asked for, and a refusal on every other platform.

    A program that is exported for several platforms, of which that is one or none, has the form on
    the others, and that is said.
    """
    refusal = functools.partial(_refuse, plan.implementation)
    exported = functools.partial(_export, plan.implementation, form)
    platform = NAMED[plan.implementation].platform
    elsewhere = [name for name in PLATFORMS if name != platform]
    others = dict.fromkeys(elsewhere, refusal)
    others |= {f"exported_{name}": exported for name in elsewhere}
    return by_platform(form, sharded=True, **others, **{platform: kernel})


def _export(implementation, form, *operands):
    # With the shapes: of warnings that are alike, Python shows the first alone.
    warnings.warn(
        f"implementation={implementation!r} is for {NAMED[implementation].platform} alone: "
        "exported for another platform, the program has XLA's form there; its operands are "
        f"{', '.join(f'{x.dtype}{list(x.shape)}' for x in jax.tree.leaves(operands))}",
        stacklevel=2,
    )
    return form(*operands)


def _refuse(implementation, *operands):
    del operands
    raise NotImplementedError(
        f"implementation={implementation!r} is for {NAMED[implementation].platform} alone, and "
        'this program is lowered for another platform; implementation="xla" is for all'
    )


def _measure_columns(plan, x):
    module, interpret = _module(plan), NAMED[plan.implementation].interpret
    kernel = functools.partial(module.column_moments_in_units, interpret=interpret)
    together = functools.partial(_columns_of_devices, plan.reduction)
    found = sharded(kernel, "... d -> d, d, d, d", together=together)(x)
    unit, *kept = (v.reshape((1,) * (x.ndim - 1) + v.shape) for v in found)
    if not units.needed(x.dtype):
        # As in the form: squares of float16 are in the range of float32. Devices chose one.
        mean, rest, var = kept
        unit, kept = None, [mean * unit, rest * unit, var * unit * unit]
    measured = me.Measured(None, *equal_in_no_unit(unit, *kept))
    return me.as_precise(plan.reduction, measured, x.dtype)


def _columns_of_devices(reduction, axes, moments):
    here = me.Measured(None, *equal_in_no_unit(*moments))
    return list(me.pooled(reduction._replace(axis_name=axes), here)[1:])


def column_sums(plan, x, dy, measured):
    """Returns the sums of dy xhat and of dy over each column, by the kernel of the plan."""
    options = {"epsilon": plan.epsilon, "interpret": NAMED[plan.implementation].interpret}
    lines = _lines_of(measured)
    if measured.unit is None:
        lines["unit"] = jnp.ones_like(measured.var)
    entries = {"x": x, "dy": dy}
    found = _call_columns(plan, "column_gradients", entries, lines, options, "d, d")
    return [v.reshape(measured.var.shape) for v in found]


def _writes_columns(plan, x, dtype):
    writes = NAMED[plan.implementation].writes_columns and plan.activation is None
    return writes and _module(plan).can_write(x, dtype)


def _forward_columns(plan, x, scale, bias, mask, measured):
    del mask
    lines = {"scale": scale, "bias": bias, **_lines_of(measured)}
    options = {"epsilon": plan.epsilon, "dtype": plan.dtype}
    return _call_columns(plan, "forward_columns", {"x": x}, lines, options, "... d")


def column_cotangent(plan, form, x, scale, dy, measured, found):
    """Returns the cotangent of x by the sums of dy xhat and of dy, which are found: by the kernel
    of the plan where it has one, else by the form.
    """
    if not _writes_columns(plan, x, dy.dtype):
        return form()
    along, ones = found
    lines = {"scale": scale, **_lines_of(measured), "dscale": along, "dbias": ones}
    options = {"epsilon": plan.epsilon, "count": me.count_entries(plan.reduction, x)}
    entries = {"x": x, "dy": dy}
    return _call_columns(plan, "backward_columns", entries, lines, options, "... d")


def _lines_of(measured):
    return dict(zip(("unit", "mean", "rest", "var"), measured[1:], strict=True))


def _call_columns(plan, function, entries, lines, options, outputs):
    """Returns what a kernel over columns makes of operands by name, each device of its part."""
    there = {name: v.reshape(-1) for name, v in lines.items() if v is not None}
    absent = tuple(name for name in lines if name not in there)
    call = functools.partial(
        _call_lines, _module(plan), function, (*entries, *there), absent, tuple(options.items())
    )
    rule = f"{', '.join(['... d'] * len(entries) + ['d'] * len(there))} -> {outputs}"
    return sharded(call, rule)(*entries.values(), *there.values())


def _call_lines(module, function, names, absent, options, *arrays):
    given = dict(zip(names, arrays, strict=True)) | dict.fromkeys(absent)
    return getattr(module, function)(**given, **dict(options))


def _forward(plan, x, scale, bias, mask, measured, alone=False):
    del mask, measured
    return _run(plan, "forward", {"x": x, "scale": scale, "bias": bias}, alone)


def _backward(plan, shape, known, dy, alone=False):
    x, scale, bias, _ = known
    operands = {"x": x, "scale": scale, "dy": dy} | ({} if plan.layout == ROWS else {"bias": bias})
    dx, *sums = _run(plan, "backward", operands, alone)
    return dx, *_of_shape(shape, sums)


def _add_forward(plan, x, residual, scale, bias):
    operands = {"x": x, "residual": residual, "scale": scale, "bias": bias}
    return _run(plan, "add_forward", operands)


def _add_backward(plan, shape, known, dtotal, dy):
    total, scale, *_ = known
    operands = {"s": total, "scale": scale, "dy": dy, "ds": dtotal}
    dx, *sums = _run(plan, "add_backward", operands)
    return dx, *_of_shape(shape, sums)


def _of_shape(shape, sums):
    """Returns the sums in the shape of the parameters; None where there are none."""
    return [None if shape is None else v.reshape(shape) for v in sums]


def _run(plan, function, operands, alone=False):
    """Returns what a kernel makes of operands by name, some of them None, where they lie."""
    layout = plan.layout
    features = len(layout.parameters.split())
    arrays, sides = [], []
    for name, value in operands.items():
        if value is not None:
            is_line = name in PARAMETERS
            arrays.append(value.reshape(value.shape[-features:]) if is_line else value)
            sides.append(layout.parameters if is_line else layout.entries)
    entries, line = layout.entries, layout.parameters
    outputs = {
        "forward": [entries],
        "add_forward": [entries, entries],
        "backward": [entries, line, line],
        "add_backward": [entries, line, line],
    }[function]
    there = tuple((name, value is not None) for name, value in operands.items())
    call = functools.partial(_call, plan, function, there)
    rule = f"{', '.join(sides)} -> {', '.join(outputs)}"
    return sharded(call, rule, whole=layout.whole, alone=alone)(*arrays)


def _call(plan, function, there, *arrays):
    given = iter(arrays)
    operands = {name: next(given) if is_there else None for name, is_there in there}
    options = {
        "centered": plan.reduction.centered,
        "epsilon": plan.epsilon,
        "interpret": NAMED[plan.implementation].interpret,
    }
    if function.endswith("forward"):
        options["dtype"] = plan.dtype
    module, layout = _module(plan), plan.layout
    if layout == ROWS:
        return getattr(module, function)(**operands, **options)
    shapes = {True: layout.two, False: layout.four}
    operands = {
        name: value if value is None else value.reshape(shapes[name in PARAMETERS](value.shape))
        for name, value in operands.items()
    }
    outputs = getattr(module, f"{function}_groups")(
        **operands, activation=plan.activation, **options
    )
    shape = arrays[0].shape
    line = shape[layout.examples + layout.positions :]
    return jax.tree.map(lambda out: out.reshape(shape if out.ndim == 4 else line), outputs)
