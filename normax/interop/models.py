"""Whole models without their batch norms: found in the graph of the model, folded, left out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import normax.nnx
from normax import axes as ax
from normax.intercept import intercepted
from normax.interop.baking import (
    LINEN_WRAPPERS,
    NNX_WRAPPERS,
    SPECTRAL,
    Baked,
    at,
    bake_linen,
    bake_nnx,
    edited,
    is_within,
    with_arrays,
)
from normax.interop.folding import affine_of, fold_into_next, fold_into_previous
from normax.interop.graph import Seen, belongs, core, plan
from normax.interop.marking import (
    LINEN_NORMS,
    inputs,
    is_known,
    marked_call,
    marking,
    without_norm,
)
from normax.moments import RunningStats
from normax.regularize import names_of

OUT_OF_REACH = "its weights are out of reach"


class Looked(NamedTuple):
    """A model as it was seen.

    Attributes:
      baked: it without the wrappers of its weights.
      jaxpr: its graph, with marks.
      own: by path, at which place of the graph's inputs each variable of a norm or layer is.
      seen: its norms and layers by path.
      modules: these themselves.
      wrappers: paths of those wrappers of linen that were called.
    """

    baked: Baked
    jaxpr: core.Jaxpr
    own: dict[str, list[int]]
    seen: dict[str, Seen]
    modules: dict[str, Any]
    wrappers: set[str]


class Folded(NamedTuple):
    """A model without those batch norms that could be folded.

    Attributes:
      model: of linen, a function of (variables, ...) that applies the model at inference; of nnx,
        the new model.
      variables: of linen, what the function takes; of nnx, None.
      folded: pairs of the path of a batch norm, or of a wrapper that normalizes weights, and that
        of the layer that took it.
      left: paths of batch norms and wrappers that are left, each with the reason. Of the rarer
        normalizers, such as `BatchRenorm`, nothing is said: they stay.
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
    One with an activation goes into the layer before it alone, and the activation stays.

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
    plain = linen.meta.unbox(variables)

    def look(stay):
        baked = Baked(plain, {}, {})
        if stay is not None:
            baked = bake_linen(model, plain, stay, *args, **kwargs)
        return _look_linen(model, baked, args, kwargs)

    (variables, baked, _), jaxpr, own, seen, modules, wrappers = found = _sound(look)
    params, batch_stats = variables.get("params", {}), variables.get("batch_stats", {})
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
            return without_norm(module, inputs(args, kwargs)[1], seen[path].dtype)
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and path in without_bias:
            bias = module.get_variable("params", "bias").astype(out.dtype)
            out = out + ax.along(bias, out.ndim, (out.ndim - 1,))
        return out

    def apply(variables, *args, **kwargs):
        """Applies the model without the norms that are folded."""
        with intercepted(skip):
            return model.apply(variables, *args, **kwargs)

    # What Flax's transformations make of a method passes for the model itself.
    known = wrappers if isinstance(model, LINEN_WRAPPERS) else wrappers - {""}
    unbaked = dict.fromkeys(sorted(known - set(baked)), OUT_OF_REACH) | found.baked.left
    folded = (*baked.items(), *((site.norm, site.layer) for site in sites))
    return Folded(apply, new, folded, (*unbaked.items(), *left))


def _look_linen(model, baked, args, kwargs) -> Looked:
    """Returns the graph of a model without some wrappers, and its norms and layers."""
    params, batch_stats = (baked.variables.get(n, {}) for n in ("params", "batch_stats"))
    modules: dict[str, linen.Module] = {}
    seen: dict[str, Seen] = {}
    wrappers: set[str] = set()
    around: list[linen.Module] = []

    def mark(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if path in baked.layers:
            return _call_layer(call, args, kwargs, context)
        if isinstance(module, LINEN_WRAPPERS):
            wrappers.add(path)
            around.append(module)
            out = call(*args, **kwargs)
            around.pop()
            return out
        if context.method_name != "__call__" or around or not is_known(module):
            return call(*args, **kwargs)
        modules[path] = module.clone(parent=None)
        inside = jax.tree.map(jnp.shape, dict(module.variables))
        outside = {"params": at(params, path), "batch_stats": at(batch_stats, path)}
        outside = {name: part for name, part in outside.items() if part}
        stacked = inside != jax.tree.map(jnp.shape, outside)
        if isinstance(module, LINEN_NORMS) and not outside.get("batch_stats"):
            return call(*args, **kwargs)  # which says what is missing
        own = jax.tree.leaves(dict(module.variables))
        return marked_call(call, module, type(module), path, seen, own, stacked, args, kwargs)

    def apply_marked(variables, *args, **kwargs):
        with intercepted(mark):
            return model.apply(variables, *args, **kwargs)

    jaxpr, places = _graph(apply_marked, baked.variables, args, kwargs)
    own = {path: _places(places, path) for path in seen}
    return Looked(baked, jaxpr, own, seen, modules, wrappers)


def _sound(look) -> Looked:
    """Returns what is seen of a model without those wrappers that nothing is in need of.

    Args:
      look: function of the wrappers that are to stay, with the reasons; None is all.
    """
    stay: dict[str, str] = {}
    while True:
        try:
            found = look(stay)
        except Exception:  # a model that reads what is not there any more, or is traced in pieces
            return look(None)  # which raises what the model itself does
        wrong = [p for p, layer in found.baked.layers.items() if not _is_alone(found, layer)]
        if not wrong:
            return found
        stay |= dict.fromkeys(wrong, "its layer's variables are used elsewhere, or changed")


def _is_alone(found, layer):
    """Returns whether the variables of a layer are its own at each call, and read by it alone."""
    own = found.own.get(layer)
    return bool(own) and belongs(found.jaxpr, own, layer)


def _identity(self, x, *args, **kwargs):
    return without_norm(self, x, self.dtype)


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
      `Folded`: the new model, in evaluation, with an `Identity`, or the activation, in place of
      each norm; and what was folded and what was not.

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
    new = None

    def look(stay):
        nonlocal new
        new = nnx.clone(model)
        new.eval()
        baked = Baked(None, {}, {})
        if stay is not None:
            baked = bake_nnx(new, stay, *args, **kwargs)
        return _look_nnx(new, baked, args, kwargs)

    (_, baked, unbaked), jaxpr, own, seen, modules, _ = _sound(look)
    sites, left = plan(jaxpr, seen, own)
    for site in sites:
        norm, layer = modules[site.norm], modules[site.layer]
        stats = norm.mean[...], norm.var[...]
        affine = (None if v is None else v[...] for v in (norm.scale, norm.bias))
        bias = None if layer.bias is None else layer.bias[...]
        folded = _fold((norm, *stats, *affine), (layer, layer.kernel[...], bias), site.is_behind)
        layer.kernel[...] = folded["kernel"]
        layer.bias, layer.use_bias = nnx.Param(folded["bias"]), True
        for name, value in list(vars(norm).items()):
            if isinstance(value, nnx.Variable):
                setattr(norm, name, nnx.data(None))
        norm.__class__ = _IDENTITIES[type(norm)]
        norm.dtype = seen[site.norm].dtype
    folded = (*baked.items(), *((site.norm, site.layer) for site in sites))
    return Folded(new, None, folded, (*unbaked.items(), *left))


def _look_nnx(model, baked, args, kwargs) -> Looked:
    """Returns the graph of a model, and its norms and layers."""
    copy = nnx.clone(model)
    modules, seen = _foldable(model), {}
    for path, module in _foldable(copy).items():
        shapes = [value.shape for value in jax.tree.leaves(nnx.state(module))]
        module.__class__ = marking(type(module), path, seen, shapes)
    graph, state = nnx.split(copy)

    def apply_marked(state, *args, **kwargs):
        return nnx.merge(graph, state)(*args, **kwargs)

    jaxpr, places = _graph(apply_marked, state, args, kwargs)
    own = {path: _places(places, path) for path in seen}
    for path, each in seen.items():
        # What several modules share is in the state once.
        if len(own[path]) < len(jax.tree.leaves(nnx.state(modules[path]))):
            each.why_not = each.why_not or "its variables are shared"
    return Looked(baked, jaxpr, own, seen, modules, set())


def _foldable(model: nnx.Module) -> dict[str, Any]:
    """Returns the norms and layers of a model by their path, but for those within wrappers."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    wrappers = [
        path
        for path, module in found.items()
        if isinstance(module, NNX_WRAPPERS) and not getattr(module, "is_plain", False)
    ]
    return {
        path: module
        for path, module in found.items()
        if is_known(module) and not any(is_within(path, wrapper) for wrapper in wrappers)
    }


def _call_layer(call, args, kwargs, context):
    """Calls the layer of a wrapper of linen that has plain weights now."""
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(context.module, SPECTRAL):
        kwargs = {name: value for name, value in kwargs.items() if name != "update_stats"}
    return context.module.layer_instance(*args, **kwargs)


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
