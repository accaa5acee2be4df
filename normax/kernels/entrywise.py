"""Functions of single entries, in the operations that a Mosaic GPU kernel can be made of.

Functions within functions are written out, rules for their derivatives among them, and a sum of
cotangents is an addition: of these the kernels know nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

Activation = Callable[[jax.Array], jax.Array]

# What both passes may be made of; each is known to the kernels of every version that is tested.
# fmt: off
KNOWN = frozenset([
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "cos",
    "div", "eq", "erf", "exp", "exp2", "ge", "gt", "integer_pow", "le", "log", "logistic", "lt",
    "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "round", "rsqrt", "select_n",
    "sign", "sin", "square", "sub", "tanh", "xor",
])
# What takes a processor longer than to read a number, wherever it is.
COSTLY = frozenset([
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "digamma",
    "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "logistic",
    "pow", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh",
])
# fmt: on
# Equations that call a function and do no more, and where they have it.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
WITHIN = ("call_jaxpr", "jaxpr")


def apply(activation: Activation, y: jax.Array) -> jax.Array:
    """Returns the activation of y."""
    return _run(jax.make_jaxpr(activation)(y), [y])[0]


def pull(activation: Activation, y: jax.Array, ct: jax.Array) -> jax.Array:
    """Returns the cotangent of y for that of its activation."""
    return _run(jax.make_jaxpr(_pulled(activation))(y, ct), [y, ct])[0]


def is_costly(activation: Activation) -> bool:
    """Returns whether an activation takes longer than a few additions."""
    made = jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((1, 1), jnp.float32))
    return bool(_names(made.jaxpr) & COSTLY)


def refusal(activation: Activation) -> str | None:
    """Returns why a kernel cannot have an activation or its derivative, or None."""
    y = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    found: set[str] = set()
    for function, count in ((activation, 1), (_pulled(activation), 2)):
        closed = jax.make_jaxpr(function)(*[y] * count)
        if closed.consts:
            return "the activation holds arrays"
        found |= _names(closed.jaxpr)
    unknown = sorted(found - KNOWN)
    return f"the activation takes {', '.join(unknown)}" if unknown else None


def _pulled(activation):
    return lambda y, ct: jax.vjp(activation, y)[1](ct)[0]


def _within(equation) -> Any:
    """Returns the closed function that an equation calls, or None."""
    if equation.primitive.name not in CALLS:
        return None
    found = next(equation.params[name] for name in WITHIN if name in equation.params)
    return core.ClosedJaxpr(found, ()) if isinstance(found, core.Jaxpr) else found


def _names(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        inner = _within(equation)
        found |= {equation.primitive.name} if inner is None else _names(inner.jaxpr)
    return found


def _run(closed, arguments):
    jaxpr = closed.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        inner = _within(equation)
        if inner is not None:
            outputs = _run(inner, inputs)
        elif equation.primitive is primitives.add_jaxvals_p:
            outputs = [inputs[0] + inputs[1]]
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
        if not isinstance(outputs, list | tuple):
            outputs = [outputs]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]
