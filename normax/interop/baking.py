"""Weights as their wrappers compute them, kept as plain weights: weight norm and kin left out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core.scope import union_filters

import normax.linen
import normax.nnx
from normax.intercept import intercepted
from normax.interop.marking import LINEN_LAYERS, NNX_LAYERS

_NAMES = ("WeightNorm", "SpectralNorm", "CenteredWeightNorm")
_NAMES += ("WeightStandardization", "ScaledWeightStandardization")
LINEN_WRAPPERS = (linen.WeightNorm, linen.SpectralNorm)
LINEN_WRAPPERS += tuple(getattr(normax.linen, name) for name in _NAMES)
SPECTRAL = (linen.SpectralNorm, normax.linen.SpectralNorm)
# Flax's write into their layer, or their scale is not the weight's length: they stay.
OUR_NNX_WRAPPERS = tuple(getattr(normax.nnx, name) for name in _NAMES)
NNX_WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm, *OUR_NNX_WRAPPERS)
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
# The collection that takes the weights out of a model, out of what it compiles or remats too.
_WEIGHTS = "weights in use"


class Baked(NamedTuple):
    """Plain weights.

    Attributes:
      variables: of linen, the variables with them, and without those of the wrappers.
      layers: by the path of each wrapper that is not needed any more, that of its layer.
      left: paths of the wrappers that are, each with the reason.
    """

    variables: Any
    layers: dict[str, str]
    left: dict[str, str]


def bake_linen(
    model: linen.Module, variables: Any, stay: Mapping[str, str], *args: Any, **kwargs: Any
) -> Baked:
    """Returns a linen model's weights as its wrappers compute them at inference.

    Args:
      model: the model.
      variables: its variables.
      stay: wrappers that are to stay, each with the reason.
      *args: what the model is called with.
      **kwargs: likewise.
    """
    layers: dict[str, str] = {}
    wrappers_of: dict[str, tuple[str, ...]] = {}  # around each layer
    why_not = dict(stay)
    around: list[str] = []

    def look(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, LINEN_WRAPPERS):
            layers[path] = "/".join(_inmost(module).path)
            if not _is_around_a_layer(module, LINEN_WRAPPERS, LINEN_LAYERS):
                why_not[path] = "it is of a class of its own, or around more than a layer"
            around.append(path)
            out = call(*args, **kwargs)
            around.pop()
            return out
        here = tuple(around)
        own = module.variables.get("params", {})
        if wrappers_of.setdefault(path, here) != here:
            shared = dict.fromkeys(here + wrappers_of[path], "its layer is used without it too")
            why_not.update(shared)
        elif here and type(module) in LINEN_LAYERS:
            if _shapes(own) != _shapes(at(variables, f"params/{path}") or {}):
                why_not.update(dict.fromkeys(here, "its variables are stacked"))
            elif not module.is_mutable_collection(_WEIGHTS):
                why_not.update(dict.fromkeys(here, "its weights are out of reach"))
            else:
                for name, value in own.items():
                    module.put_variable(_WEIGHTS, name, value)
        return call(*args, **kwargs)

    def apply(variables, *args, mutable=False, **kwargs):
        mutable = union_filters(mutable, _WEIGHTS)
        with intercepted(look):
            return model.apply(variables, *args, mutable=mutable, **kwargs)[1]

    traced, arrays = with_arrays(apply, args, kwargs)
    arrays = [  # no weight depends on them
        jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a for a in arrays
    ]
    weights = jax.jit(lambda *inputs: traced(*inputs).get(_WEIGHTS, {}))(variables, arrays)
    for _ in layers:  # a layer within two wrappers keeps both, or none
        for here in wrappers_of.values():
            reasons = [why_not[path] for path in here if path in why_not]
            why_not.update({path: reason for reason in reasons[:1] for path in here})
    layers = {path: layer for path, layer in layers.items() if path not in why_not}
    for layer in set(layers.values()):
        used = at(weights, layer)
        variables = edited(variables, f"params/{layer}", lambda own, used=used: {**own, **used})
    for path in layers:  # what is a wrapper's own is named by a path in its layer
        variables = {name: edited(part, path, _without_paths) for name, part in variables.items()}
    return Baked(variables, layers, why_not)


def bake_nnx(model: nnx.Module, stay: Mapping[str, str], *args: Any, **kwargs: Any) -> Baked:
    """Gives an nnx model's layers their weights as the wrappers compute them; the model changes.

    Args:
      model: the model.
      stay: wrappers that are to stay, each with the reason.
      *args: what the model is called with.
      **kwargs: likewise.
    """
    found: dict[str, Any] = {"/".join(map(str, p)): m for p, m in nnx.iter_modules(model)}
    found = {path: module for path, module in found.items() if isinstance(module, NNX_WRAPPERS)}
    found = {path: m for path, m in found.items() if not getattr(m, "is_plain", False)}
    why_not: dict[str, str | None] = dict.fromkeys(found)  # of one that is not called, None
    copy = nnx.clone(model)
    for path, module in list(nnx.iter_modules(copy)):
        if (path := "/".join(map(str, path))) in found:
            module.__class__ = _looking(type(module), found[path], path, why_not)
    graph, state = nnx.split(copy)
    traced, arrays = with_arrays(
        lambda state, *args, **kwargs: nnx.merge(graph, state)(*args, **kwargs), args, kwargs
    )
    jax.eval_shape(traced, state, arrays)
    left = {path: "it is not called" if why is None else why for path, why in why_not.items()}
    left = {path: why for path, why in left.items() if why} | dict(stay)
    for path, module in found.items():
        if not _is_around_a_layer(module, OUR_NNX_WRAPPERS, NNX_LAYERS):
            left[path] = "it is of a class of its own, or around more than a layer"
        elif _is_shared(model, module):
            left[path] = "its layer is used without it too"
    for path in found:
        nested = [p for p in found if is_within(p, path)]
        reasons = [left[p] for p in nested if p in left]
        left.update({p: reason for reason in reasons[:1] for p in nested})
    kept = {path: module for path, module in found.items() if path not in left}
    layers = {path: path + "/layer_instance" * _depth(module) for path, module in kept.items()}
    for path in sorted(layers, key=len):  # the outer of two is the first to change a weight
        found[path].bake()
    return Baked(None, {path: layer.lstrip("/") for path, layer in layers.items()}, left)


def is_within(path: str, outer: str) -> bool:
    """Returns whether a path is another, or below it."""
    return outer in ("", path) or path.startswith(f"{outer}/")


def _inmost(module):
    """Returns the layer of a wrapper, or of the wrapper that it is around."""
    while isinstance(module, LINEN_WRAPPERS + NNX_WRAPPERS):
        module = module.layer_instance
    return module


def _depth(module):
    """Returns how many wrappers there are around a layer, the outermost given."""
    inner = getattr(module, "layer_instance", None)
    return 0 if inner is None else 1 + _depth(inner)


def _is_around_a_layer(module, wrappers, layers):
    """Returns whether a wrapper, and those that it is around, are ones of a layer that is known."""
    while type(module) in wrappers:
        module = module.layer_instance
    return type(module) in layers


def _looking(kind, original, path, why_not):
    """Returns a class of nnx that notes whether its only instance can be baked."""

    def call(self, *args, **kwargs):
        reason = ""
        if jax.tree.map(jnp.shape, nnx.state(self)) != jax.tree.map(jnp.shape, nnx.state(original)):
            reason = "its variables are stacked"
        elif kwargs.get("update_stats"):
            reason = "it keeps its state"
        why_not[path] = why_not[path] or reason
        return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _is_shared(model, module):
    """Returns whether a model reaches the layer of a wrapper in another way."""
    layer = module.layer_instance
    inside = {id(node) for _, node in nnx.iter_graph(layer) if isinstance(node, nnx.Variable)}
    module.layer_instance = None
    outside = {id(node) for _, node in nnx.iter_graph(model)}
    module.layer_instance = layer
    return not inside.isdisjoint(outside)


def with_arrays(apply: Any, args: Any, kwargs: Any) -> tuple[Any, list]:
    """Returns `apply` as a function of variables and of the arrays of its arguments, and those."""
    leaves, structure = jax.tree.flatten((args, kwargs))

    def traced(variables, arrays):
        queue = iter(arrays)
        filled = [next(queue) if isinstance(leaf, _ARRAYS) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return apply(variables, *args, **kwargs)

    return traced, [leaf for leaf in leaves if isinstance(leaf, _ARRAYS)]


def _shapes(tree):
    """Returns the shapes of the entries of a dict."""
    return {name: jnp.shape(value) for name, value in tree.items()}


def _without_paths(own):
    """Returns the entries that have a plain name."""
    return {name: value for name, value in own.items() if "/" not in name}


def at(tree: Any, path: str) -> Any:
    """Returns the part of nested dicts at a path; None where there is none."""
    for name in filter(None, path.split("/")):
        tree = tree.get(name) if tree is not None else None
    return tree


def edited(tree: Any, path: str, edit: Any) -> Any:
    """Returns nested dicts with those at a path edited, or left out where nothing is left."""
    name, _, rest = path.partition("/")
    if not name:
        return edit(tree)
    if name not in tree:
        return tree
    part = edited(tree[name], rest, edit)
    others = {other: value for other, value in tree.items() if other != name}
    return {**tree, name: part} if part else others
