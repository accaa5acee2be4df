"""Whole models without their batch norms: found in the graph of the model, folded, left out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import normax.linen
import normax.nnx
from normax import axes as ax
from normax.intercept import intercepted
from normax.interop.baking import (
    LINEN_WRAPPERS,
    at,
    bake_linen,
    bake_nnx,
    edited,
    with_arrays,
)
from normax.interop.folding import affine_of, fold_into_next, fold_into_previous
from normax.interop.graph import Seen, marked, plan
from normax.moments import RunningStats
from normax.regularize import names_of

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


class Folded(NamedTuple):
    """A model without those batch norms that could be folded.

    Attributes:
      model: of linen, a function of (variables, ...) that applies the model at inference; of nnx,
        the new model.
      variables: of linen, what the function takes; of nnx, None.
      folded: pairs of the path of a batch norm, or of a wrapper that normalizes weights, and that
        of the layer that took it.
      left: paths of batch norms and wrappers that are left, each with the reason.
    """

    model: Any
    variables: Any
    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]


def fold_linen(model: linen.Module, variables: Any, *args: Any, **kwargs: Any) -> Folded:
    """Folds the batch norms of a linen model into the Dense and Conv layers before or behind them.

    Weights that a wrapper normalizes, weight norm, weight standardization or spectral norm, become
    plain weights first, and the wrapper is left out: at inference they are the same at each call.

    A batch norm is folded into the layer whose output it alone normalizes, or else into the one
    layer that alone takes its output and pads it with no zeros. What counts is the computation, not
    the names: a norm with a mask, in training, or called twice stays, and so does one beside a
    layer whose kernel is read elsewhere too. Flax's batch norms are folded like those of `normax`.

    Args:
      model: the model.
      variables: its variables; they stay as they are.
      *args: what the model is called with at inference, such as `x, False`: arrays, and what is no
        array as it is.
      **kwargs: likewise.

    Returns:
      `Folded`: a function to apply, its variables, without those of the norms, and what was folded
      and what was not. Outputs are equal but for rounding; inference only.

    Raises:
      Whatever the model raises when it is called so.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, normax.linen
      >>> from normax import interop
      >>> model = nn.Sequential([nn.Dense(4), normax.linen.BatchNorm(True)])
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> apply, new, folded, left = interop.fold_linen(model, variables, x)
      >>> folded, left, "batch_stats" in new
      ((('layers_1', 'layers_0'),), (), False)
      >>> bool(jnp.allclose(apply(new, x), model.apply(variables, x), atol=1e-5))
      True
    """
    variables, baked, unbaked = bake_linen(model, linen.meta.unbox(variables), *args, **kwargs)
    params, batch_stats = variables.get("params", {}), variables.get("batch_stats", {})
    modules: dict[str, linen.Module] = {}
    seen: dict[str, Seen] = {}
    around: list[linen.Module] = []

    def mark(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if path in baked:
            return _call_layer(call, args, kwargs, context)
        if isinstance(module, LINEN_WRAPPERS):
            around.append(module)
            out = call(*args, **kwargs)
            around.pop()
            return out
        if context.method_name != "__call__" or around or not _is_known(module):
            return call(*args, **kwargs)
        modules[path] = module.clone(parent=None)
        inside = jax.tree.map(jnp.shape, dict(module.variables))
        outside = {"params": at(params, path), "batch_stats": at(batch_stats, path)}
        outside = {name: part for name, part in outside.items() if part}
        stacked = inside != jax.tree.map(jnp.shape, outside)
        if isinstance(module, LINEN_NORMS) and not outside.get("batch_stats"):
            return call(*args, **kwargs)  # which says what is missing
        return _marked_call(call, module, type(module), path, seen, stacked, args, kwargs)

    def apply_marked(variables, *args, **kwargs):
        with intercepted(mark):
            return model.apply(variables, *args, **kwargs)

    jaxpr, places = _graph(apply_marked, variables, args, kwargs)
    own = {path: _places(places, path) for path in seen}
    sites, left = plan(jaxpr, seen, own)
    for site in sites:
        norm, layer = at(params, site.norm) or {}, at(params, site.layer)
        stats = at(batch_stats, site.norm)
        new = _fold(
            (modules[site.norm], stats["mean"], stats["var"], norm.get("scale"), norm.get("bias")),
            (modules[site.layer], layer["kernel"], layer.get("bias")),
            site.is_behind,
        )
        params = edited(params, site.layer, lambda own, new=new: {**own, **new})
        params = edited(params, site.norm, lambda own: {})
        batch_stats = edited(batch_stats, site.norm, lambda own: {})
    new = {**variables, "params": params, "batch_stats": batch_stats}
    new = {name: part for name, part in new.items() if part or variables.get(name) == {}}
    gone = {site.norm for site in sites}
    without_bias = {site.layer for site in sites if not modules[site.layer].use_bias}

    def skip(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if path in baked:
            return _call_layer(call, args, kwargs, context)
        if context.method_name == "__call__" and path in gone:
            return _inputs(args, kwargs).astype(seen[path].dtype)
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and path in without_bias:
            bias = module.get_variable("params", "bias").astype(out.dtype)
            out = out + ax.along(bias, out.ndim, (out.ndim - 1,))
        return out

    def apply(variables, *args, **kwargs):
        """Applies the model without the norms that are folded."""
        with intercepted(skip):
            return model.apply(variables, *args, **kwargs)

    folded = (*baked.items(), *((site.norm, site.layer) for site in sites))
    return Folded(apply, new, folded, (*unbaked, *left))


def _identity(self, x, *args, **kwargs):
    return x.astype(self.dtype)


class Identity(normax.nnx.BatchNorm):
    """What is left of a folded norm; it extends the norm, to be laid out in memory like it."""

    __call__ = _identity
    is_folded = True


class FlaxIdentity(nnx.BatchNorm):
    """What is left of a folded norm of Flax."""

    __call__ = _identity
    is_folded = True


_IDENTITIES = {normax.nnx.BatchNorm: Identity, nnx.BatchNorm: FlaxIdentity}


def fold_nnx(model: nnx.Module, *args: Any, **kwargs: Any) -> Folded:
    """Folds the batch norms of an nnx model into the Linear and Conv layers before or behind them.

    What `fold_linen` does, for nnx.

    Args:
      model: the model; it stays as it is.
      *args: what the model is called with at inference: arrays, and what is no array as it is.
      **kwargs: likewise.

    Returns:
      `Folded`: the new model, in evaluation, with an `Identity` in place of each norm; and what was
      folded and what was not.

    Raises:
      Whatever the model raises when it is called so.

    Example:
      >>> import jax, jax.numpy as jnp, normax.nnx
      >>> from flax import nnx
      >>> from normax import interop
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), normax.nnx.BatchNorm(4, rngs=rngs))
      >>> new, _, folded, left = interop.fold_nnx(model, jnp.ones((2, 3)))
      >>> folded, left, type(new.layers[1]).__name__
      ((('layers/1', 'layers/0'),), (), 'Identity')
    """
    new = nnx.clone(model)
    new.eval()
    _, baked, unbaked = bake_nnx(new, *args, **kwargs)
    copy = nnx.clone(new)
    modules, seen = _foldable(new, unbaked), {}
    for path, module in _foldable(copy, unbaked).items():
        module.__class__ = _marking(type(module), path, seen)
    graph, state = nnx.split(copy)

    def apply_marked(state, *args, **kwargs):
        return nnx.merge(graph, state)(*args, **kwargs)

    jaxpr, places = _graph(apply_marked, state, args, kwargs)
    own = {path: _places(places, path) for path in seen}
    for path, each in seen.items():
        # What several modules share is in the state once.
        if len(own[path]) < len(jax.tree.leaves(nnx.state(modules[path]))):
            each.why_not = each.why_not or "its variables are shared"
    sites, left = plan(jaxpr, seen, own)
    for site in sites:
        norm, layer = modules[site.norm], modules[site.layer]
        stats = norm.mean[...], norm.var[...]
        affine = (None if v is None else v[...] for v in (norm.scale, norm.bias))
        bias = None if layer.bias is None else layer.bias[...]
        folded = _fold((norm, *stats, *affine), (layer, layer.kernel[...], bias), site.is_behind)
        layer.kernel[...] = folded["kernel"]
        layer.bias, layer.use_bias = nnx.Param(folded["bias"]), True
        for name in list(vars(norm)):
            if not name.startswith("_"):
                delattr(norm, name)
        norm.__class__ = _IDENTITIES[type(norm)]
        norm.dtype = seen[site.norm].dtype
    folded = (*baked.items(), *((site.norm, site.layer) for site in sites))
    return Folded(new, None, folded, (*unbaked, *left))


def _foldable(model: nnx.Module, wrappers: Any) -> dict[str, Any]:
    """Returns the norms and layers of a model by their path, but for those within wrappers."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    around = tuple(f"{path}/" for path, _ in wrappers)
    return {
        path: module
        for path, module in found.items()
        if _is_known(module) and not path.startswith(around)
    }


def _marking(kind, path, seen):
    """Returns a class of nnx that marks in a graph what enters and leaves its only instance."""

    def call(self, *args, **kwargs):
        def itself(*args, **kwargs):
            return kind.__call__(self, *args, **kwargs)

        return _marked_call(itself, self, kind, path, seen, False, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _is_known(module) -> bool:
    """Returns whether a module is a norm or layer, or extends one."""
    kinds = LINEN_NORMS + LINEN_LAYERS + NNX_NORMS + NNX_LAYERS
    return isinstance(module, kinds) and not hasattr(module, "is_folded")


def _marked_call(call, module, kind, path, seen, stacked, args, kwargs):
    """Calls a norm or layer of a class with marks around it, and notes what it is."""
    is_norm = isinstance(module, LINEN_NORMS + NNX_NORMS)
    each = seen.setdefault(path, Seen(is_norm))
    x = _inputs(args, kwargs)
    if kind not in LINEN_NORMS + LINEN_LAYERS + NNX_NORMS + NNX_LAYERS:
        each.why_not = "it is of a class of its own"
    if any(getattr(module, name, None) not in _PRODUCTS for name in _PRODUCT_OPTIONS):
        each.why_not = "it multiplies in a way of its own"
    if stacked:
        each.why_not = "its variables are stacked"
    if is_norm:
        each.why_not = each.why_not or _why_not(module, x, args, kwargs)
        if each.why_not:
            return call(*args, **kwargs)
        each.dtype = jax.eval_shape(lambda: call(*args, **kwargs)).dtype
        return marked("norm", path, x).astype(each.dtype)
    each.pads_nothing = _pads_nothing(module)
    x = marked("enter", path, x)
    args, kwargs = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): x})
    return marked("leave", path, call(*args, **kwargs))


def _why_not(norm, x, args, kwargs) -> str:
    """Returns what keeps a norm, called so, from being one factor and offset for each feature."""
    mode = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    mode = norm.use_running_average if mode is None else mode
    axes = (norm.axis,) if isinstance(norm.axis, int) else tuple(norm.axis)
    if not isinstance(mode, bool) or not mode:
        return "it normalizes by the batch"
    if kwargs.get("mask") is not None:
        return "it is given a mask"
    if [axis % x.ndim for axis in axes] != [x.ndim - 1]:
        return "its features are not last"
    return ""


def _call_layer(call, args, kwargs, context):
    """Calls the layer of a wrapper of linen that has plain weights now."""
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
    return context.module.layer_instance(*args, **kwargs)


def _inputs(args, kwargs):
    """Returns what a layer or norm is called on: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def _pads_nothing(layer) -> bool:
    """Returns whether all that a layer sums up is of its input."""
    if isinstance(layer, linen.Dense | nnx.Linear):
        return True
    if isinstance(layer, linen.ConvTranspose | nnx.ConvTranspose) or layer.mask is not None:
        return False
    if layer.input_dilation not in (None, 1) and set(layer.input_dilation) != {1}:
        return False
    padding = layer.padding
    return (
        padding in _OF_THE_INPUT if isinstance(padding, str) else not any(jax.tree.leaves(padding))
    )


def _graph(apply, variables, args, kwargs):
    """Returns the graph of a model, and the paths of its variables in the order of the inputs."""
    traced, arrays = with_arrays(apply, args, kwargs)
    jaxpr = jax.make_jaxpr(traced)(variables, arrays)
    return jaxpr.jaxpr, [names_of(path) for path, _ in jax.tree.leaves_with_path(variables)]


def _places(places, path):
    """Returns which of the inputs are the variables of a module."""
    parts = path.split("/") if path else []
    found = []
    for place, names in enumerate(places):
        names = names[1:] if names[:1] in (["params"], ["batch_stats"]) else names
        if names[:-1] == parts:
            found.append(place)
    return found


def _fold(norm, layer, is_behind) -> dict[str, jax.Array]:
    """Returns the layer's new kernel and bias."""
    module, mean, var, scale, norm_bias = norm
    kind, kernel, bias = layer
    affine = affine_of(
        RunningStats.create(mean.shape)._replace(mean=mean, var=var),
        scale,
        norm_bias,
        epsilon=module.epsilon,
        epsilon_on=getattr(module, "epsilon_on", "variance"),
    )
    if is_behind:
        groups = getattr(kind, "feature_group_count", 1)
        kernel, bias = fold_into_next(kernel, bias, *affine, feature_group_count=groups)
    else:
        axis = -2 if getattr(kind, "transpose_kernel", False) else -1
        kernel, bias = fold_into_previous(kernel, bias, *affine, feature_axis=axis)
    return {"kernel": kernel, "bias": bias}
