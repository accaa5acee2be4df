"""Norms and layers, marked in the graph of a model where they are called."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.linen.dtypes import promote_dtype
from flax.nnx.nn.dtypes import promote_dtype as promote_dtype_of_nnx

import normax.linen
import normax.nnx
from normax import axes as ax
from normax.interop.graph import Seen, marked
from normax.options import Activated

# A class that extends one of these may compute something else.
LINEN_NORMS = (linen.BatchNorm, normax.linen.BatchNorm)
LINEN_LAYERS = (linen.Dense, linen.Conv, linen.ConvTranspose)
NNX_NORMS = (nnx.BatchNorm, normax.nnx.BatchNorm)
NNX_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# What a layer multiplies by unless it is told otherwise, which need not be linear.
_PRODUCTS = (None, jax.lax.dot_general, jax.lax.conv_general_dilated)
_PRODUCT_OPTIONS = ("dot_general", "conv_general_dilated")
_PRODUCT_OPTIONS += tuple(f"{name}_cls" for name in _PRODUCT_OPTIONS)
# Paddings that bring in no zeros.
_OF_THE_INPUT = ("VALID", "CIRCULAR", "REFLECT")
# How a layer brings its input and weights to one dtype unless it is told otherwise.
_PROMOTIONS = (None, promote_dtype, promote_dtype_of_nnx)


def is_known(module: Any) -> bool:
    """Returns whether a module is a norm or layer, or extends one."""
    kinds = LINEN_NORMS + LINEN_LAYERS + NNX_NORMS + NNX_LAYERS
    return isinstance(module, kinds) and not hasattr(module, "is_folded")


def marking(kind: Any, path: str, seen: dict[str, Seen], shapes: list) -> Any:
    """Returns a class of nnx that marks in a graph what enters and leaves its only instance."""

    def call(self, *args, **kwargs):
        def itself(*args, **kwargs):
            return kind.__call__(self, *args, **kwargs)

        own = jax.tree.leaves(nnx.state(self))
        stacked = [value.shape for value in own] != shapes
        return marked_call(itself, self, kind, path, seen, own, stacked, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def marked_call(
    call: Any,
    module: Any,
    kind: Any,
    path: str,
    seen: dict[str, Seen],
    own: list[jax.Array],
    stacked: bool,
    args: Any,
    kwargs: Any,
) -> Any:
    """Calls a norm or layer of a class with marks around it, and notes what it is.

    Args:
      call: what calls it.
      module: the norm or layer.
      kind: its class, before it was marked.
      path: where it is.
      seen: where to note.
      own: its variables, as it uses them.
      stacked: whether those in store are of another shape.
      args: what it is called with.
      kwargs: likewise.
    """
    is_norm = isinstance(module, LINEN_NORMS + NNX_NORMS)
    each = seen.setdefault(path, Seen(is_norm))
    name, x = inputs(args, kwargs)
    for value in own:
        marked("own", path, value)
    if kind not in LINEN_NORMS + LINEN_LAYERS + NNX_NORMS + NNX_LAYERS:
        each.why_not = "it is of a class of its own"
    if any(getattr(module, name, None) not in _PRODUCTS for name in _PRODUCT_OPTIONS):
        each.why_not = "it multiplies in a way of its own"
    if not is_norm and getattr(module, "promote_dtype", None) not in _PROMOTIONS:
        each.why_not = "it multiplies in a way of its own"
    if stacked:
        each.why_not = "its variables are stacked"
    if is_norm:
        each.why_not = each.why_not or _why_not(module, x, args, kwargs)
        if each.why_not:
            return call(*args, **kwargs)
        each.dtype = jax.eval_shape(lambda: call(*args, **kwargs)).dtype
        return without_norm(module, marked("norm", path, x), each.dtype)
    x = marked("enter", path, x)
    args, kwargs = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, name: x})
    out = call(*args, **kwargs)
    # What is far from zero has few digits left in 16 bits: a norm before such a layer has to stay,
    # and so has one beside weights that would be rounded to fewer than the layer computes with.
    digits = jnp.finfo(out.dtype).bits
    each.takes_any_input = digits >= 32 and _pads_nothing(module)
    if any(_digits(value) < digits for value in own):
        each.why_not = each.why_not or "its weights have fewer digits than its output"
    return marked("leave", path, out)


def _digits(value):
    """Returns the bits of a float; of what is none, such as a key or a counter, more than any."""
    return jnp.finfo(value.dtype).bits if jnp.issubdtype(value.dtype, jnp.inexact) else 128


def _why_not(norm, x, args, kwargs) -> str:
    """Returns what keeps a norm, called so, from being one factor and offset for each feature."""
    mode = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    mode = norm.use_running_average if mode is None else mode
    axes = (norm.axis,) if isinstance(norm.axis, int) else tuple(norm.axis)
    if not isinstance(mode, bool) or not mode:
        return "it normalizes by the batch"
    for name in ("mask", "scale", "bias"):
        if kwargs.get(name) is not None:
            return f"it is given a {name}"
    if [axis % x.ndim for axis in axes] != [x.ndim - 1]:
        return "its features are not last"
    return ""


def without_norm(norm: Any, x: jax.Array, dtype: Any) -> jax.Array:
    """Returns what a folded norm still makes of its input: the activation, and the dtype.

    Args:
      norm: the norm; Flax's have no activation.
      x: what comes to it, normalized.
      dtype: that of its output.
    """
    if isinstance(norm, Activated) and norm.activation is not None:
        x = norm.activation(x.astype(ax.promote(jnp.float32, x)))
    return x.astype(dtype)


def inputs(args: Any, kwargs: Any) -> tuple[str, Any]:
    """Returns what a layer or norm is called on, its first argument, and how that is called."""
    name = next((name for name in ("x", "inputs") if name in kwargs), "")
    return (name, kwargs[name]) if name else ("", args[0])


def _pads_nothing(layer) -> bool:
    """Returns whether all that a layer sums up is of its input."""
    if isinstance(layer, linen.Dense | nnx.Linear):
        return True
    if isinstance(layer, linen.ConvTranspose | nnx.ConvTranspose) or layer.mask is not None:
        return False
    if set(jax.tree.leaves(layer.input_dilation)) - {1}:
        return False
    padding = layer.padding
    return (
        padding in _OF_THE_INPUT if isinstance(padding, str) else not any(jax.tree.leaves(padding))
    )
