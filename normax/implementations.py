"""Kernels that can be asked for by name, in place of the form that XLA compiles.

A kernel that was asked for is had or refused: where it cannot be, that is said when the program is
traced or, of the wrong platform, lowered. None of them is the default, as none was timed yet.
"""

import functools
import importlib
from typing import NamedTuple

import jax.numpy as jnp

from normax.kernels.dispatch import by_platform
from normax.kernels.sharding import sharded

XLA = "xla"


class Kernels(NamedTuple):
    """Where the kernels of an implementation are, and what for."""

    module: str
    platform: str
    interpret: bool = False


NAMED = {
    "mosaic_gpu": Kernels("normax.kernels.mosaic_gpu", "cuda"),
    "mosaic_tpu": Kernels("normax.kernels.mosaic_tpu", "tpu"),
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def why_not(plan, x, scale, bias, mask):
    """Returns why the implementation of a plan cannot have these arguments, or None."""
    if plan.implementation in (None, XLA):
        return None
    if plan.reduction.axes != (x.ndim - 1,):
        return f"groups over axes {plan.reduction.axes} of {x.ndim}, and not over the last one"
    for label, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.shape != (1,) * (x.ndim - 1) + x.shape[-1:]:
            return f"a {label} along other axes than the last"
    if mask is not None or plan.reduction.axis_name is not None:
        return "a mask or an axis_name"
    if plan.activation is not None:
        return "an activation"
    if plan.floor or plan.on_deviation or plan.epsilon > 1:
        return "a floor, epsilon on the deviation, or above 1"
    if jnp.iscomplexobj(x):
        return "complex entries"
    return _module(plan).supports(x, dtype=plan.dtype)


def forward(plan, form, on_gpu, x, scale, bias, mask, measured):
    """Returns `y`, by the kernel of the plan or by one of the two forms."""
    if plan.implementation in (None, XLA):
        return by_platform(form, cuda=on_gpu, rocm=on_gpu)(x, scale, bias, mask, measured)
    return _named(plan, form, functools.partial(_forward, plan))(x, scale, bias, mask, measured)


def backward(plan, shape, whole, on_gpu, known, dy):
    """Returns the cotangents of x, scale and bias, by the kernel or by one of the two forms."""
    if plan.implementation in (None, XLA):
        return by_platform(whole, cuda=on_gpu, rocm=on_gpu)(known, dy)
    return _named(plan, whole, functools.partial(_backward, plan, shape))(known, dy)


def _module(plan):
    return importlib.import_module(NAMED[plan.implementation].module)


def _named(plan, form, kernel):
    """Returns the kernel where it was asked for, and a refusal on every other platform."""
    refusal = functools.partial(_refuse, plan.implementation)
    platform = NAMED[plan.implementation].platform
    others = {name: refusal for name in PLATFORMS if name != platform}
    return by_platform(form, sharded=True, **others, **{platform: kernel})


def _refuse(implementation, *operands):
    del operands
    raise NotImplementedError(
        f"implementation={implementation!r} is for {NAMED[implementation].platform} alone, and "
        'this program is lowered for another platform; implementation="xla" is for all'
    )


def _forward(plan, x, scale, bias, mask, measured):
    del mask, measured
    given = [v.reshape(-1) for v in (scale, bias) if v is not None]
    rule = f"... d{', d' * len(given)} -> ... d"
    call = functools.partial(_call_forward, plan, scale is not None, bias is not None)
    return sharded(call, rule, whole="d")(x, *given)


def _call_forward(plan, scaled, biased, x, *given):
    given = iter(given)
    scale = next(given) if scaled else None
    bias = next(given) if biased else None
    return _module(plan).forward(x, scale, bias, dtype=plan.dtype, **_options(plan))


def _backward(plan, shape, known, dy):
    x, scale, *_ = known
    given = [] if scale is None else [scale.reshape(-1)]
    rule = f"... d{', d' * len(given)}, ... d -> ... d, d, d"
    call = functools.partial(_call_backward, plan, scale is not None)
    dx, dscale, dbias = sharded(call, rule, whole="d")(x, *given, dy)
    if shape is None:
        return dx, None, None
    return dx, dscale.reshape(shape), dbias.reshape(shape)


def _call_backward(plan, scaled, x, *given):
    scale, dy = given if scaled else (None, *given)
    return _module(plan).backward(x, scale, dy, **_options(plan))


def _options(plan):
    interpret = NAMED[plan.implementation].interpret
    return {
        "centered": plan.reduction.centered,
        "epsilon": plan.epsilon,
        "interpret": interpret,
    }
