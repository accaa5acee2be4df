"""Whole models without their batch norms: found in the graph of the model, folded, left out."""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

import normax.linen
import normax.nnx
from normax import axes as ax
from normax.interop.folding import affine_of, fold_into_next, fold_into_previous
from normax.moments import RunningStats

LINEN_NORMS = (linen.BatchNorm, normax.linen.BatchNorm)
LINEN_LAYERS = (linen.Dense, linen.Conv, linen.ConvTranspose)
NNX_NORMS = (nnx.BatchNorm, normax.nnx.BatchNorm)
NNX_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
# Around a layer whose parameters are not what it computes with.
LINEN_WEIGHTS = (linen.WeightNorm, linen.SpectralNorm, normax.linen.WeightNorm)
LINEN_WEIGHTS += (normax.linen.SpectralNorm, normax.linen.CenteredWeightNorm)
LINEN_WEIGHTS += (normax.linen.WeightStandardization, normax.linen.ScaledWeightStandardization)
NNX_WEIGHTS = (nnx.WeightNorm, nnx.SpectralNorm, normax.nnx.WeightNorm, normax.nnx.SpectralNorm)
NNX_WEIGHTS += (normax.nnx.CenteredWeightNorm, normax.nnx.WeightStandardization)
NNX_WEIGHTS += (normax.nnx.ScaledWeightStandardization,)
# Paddings that bring in no zeros.
_OF_THE_INPUT = ("VALID", "CIRCULAR", "REFLECT")
_MARKS = ("enter", "leave", "norm")


class Folded(NamedTuple):
    """A model without those batch norms that could be folded.

    Attributes:
      model: of linen, a function of (variables, ...) that applies the model at inference; of nnx,
        the new model.
      variables: of linen, what the function takes; of nnx, None.
      folded: pairs of the path of a batch norm and that of the layer that took it.
      left: paths of batch norms that are left, each with the reason.
    """

    model: Any
    variables: Any
    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]


class _Site(NamedTuple):
    """A batch norm beside the layer that is to take it."""

    norm: str
    layer: str
    before: bool


def fold_linen(model: linen.Module, variables: Any, *args: Any, **kwargs: Any) -> Folded:
    """Folds the batch norms of a linen model into the Dense and Conv layers before or behind them.

    A batch norm is folded into the layer whose output it alone normalizes, or else into the one
    layer that alone takes its output and pads it with no zeros. The computation is what is looked
    at, not the names. Flax's batch norms are folded like those of `normax`.

    Args:
      model: the model.
      variables: its variables; they stay as they are.
      *args: what the model is called with at inference, such as `x, train=False`: arrays or
        `jax.ShapeDtypeStruct`.
      **kwargs: likewise; options that are no arrays are taken as they are.

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
    modules: dict[str, linen.Module] = {}
    shapes: dict[str, tuple] = {}
    around: list[str] = []

    def mark(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, LINEN_WEIGHTS):
            around.append(path)
            out = call(*args, **kwargs)
            around.pop()
            return out
        known = isinstance(module, LINEN_NORMS + LINEN_LAYERS) and not around
        if context.method_name != "__call__" or not known:
            return call(*args, **kwargs)
        modules[path] = module.clone(parent=None)
        shapes[path] = _inputs(args, kwargs).shape
        if isinstance(module, LINEN_NORMS):
            stacked = jax.tree.map(jax.numpy.shape, module.variables.get("batch_stats", {}))
            shapes[f"{path}/mean"] = stacked.get("mean")
            return _marked("norm", path, _inputs(args, kwargs))
        args, kwargs = _with_inputs(args, kwargs, _marked("enter", path, _inputs(args, kwargs)))
        return _marked("leave", path, call(*args, **kwargs))

    def traced(variables, arrays):
        with linen.intercept_methods(mark):
            return model.apply(variables, *arrays[0], **{**kwargs, **arrays[1]})

    dynamic = {key: value for key, value in kwargs.items() if hasattr(value, "shape")}
    jaxpr = jax.make_jaxpr(traced)(variables, (args, dynamic))
    stats = {
        path: _at(variables.get("batch_stats", {}), path) for path in _norms(modules, LINEN_NORMS)
    }
    stacked = {path for path in stats if shapes[f"{path}/mean"] != stats[path]["mean"].shape}
    sites, left = _plan(jaxpr.jaxpr, modules, shapes, LINEN_NORMS, stacked)

    params, batch_stats = variables.get("params", {}), variables.get("batch_stats", {})
    for site in sites:
        norm, own = modules[site.norm], _at(params, site.norm) or {}
        kernel, bias = _fold(
            norm,
            (stats[site.norm]["mean"], stats[site.norm]["var"]),
            own.get("scale"),
            own.get("bias"),
            modules[site.layer],
            _at(params, site.layer)["kernel"],
            _at(params, site.layer).get("bias"),
            site.before,
        )
        params = _replaced(params, site.layer.split("/"), {"kernel": kernel, "bias": bias})
        params = _replaced(params, site.norm.split("/"), None)
        batch_stats = _replaced(batch_stats, site.norm.split("/"), None)
    new = {**variables, "params": params, "batch_stats": batch_stats}
    new = {name: part for name, part in new.items() if part or not variables.get(name)}
    gone = {site.norm for site in sites}
    without_bias = {site.layer for site in sites if not modules[site.layer].use_bias}

    def skip(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and path in gone:
            return _inputs(args, kwargs)
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and path in without_bias:
            bias = module.get_variable("params", "bias").astype(out.dtype)
            out = out + ax.along(bias, out.ndim, (out.ndim - 1,))
        return out

    def apply(variables, *args, **kwargs):
        """Applies the model without the norms that are folded."""
        with linen.intercept_methods(skip):
            return model.apply(variables, *args, **kwargs)

    return Folded(apply, new, tuple((s.norm, s.layer) for s in sites), left)


def fold_nnx(model: nnx.Module, *args: Any, **kwargs: Any) -> Folded:
    """Folds the batch norms of an nnx model into the Linear and Conv layers before or behind them.

    What `fold_linen` does, for nnx.

    Args:
      model: the model; it stays as it is.
      *args: what the model is called with at inference.
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
    marked, new = nnx.clone(model), nnx.clone(model)
    marked.eval()
    new.eval()
    modules, shapes = _foldable(new), {}
    for path, module in _foldable(marked).items():
        module.__class__ = _marking(type(module), path, shapes)
    jaxpr = jax.make_jaxpr(lambda *args: marked(*args, **kwargs))(*args)
    sites, left = _plan(jaxpr.jaxpr, modules, shapes, NNX_NORMS, set())
    for site in sites:
        norm, layer = modules[site.norm], modules[site.layer]
        kernel, bias = _fold(
            norm,
            (norm.mean[...], norm.var[...]),
            None if norm.scale is None else norm.scale[...],
            None if norm.bias is None else norm.bias[...],
            layer,
            layer.kernel[...],
            None if layer.bias is None else layer.bias[...],
            site.before,
        )
        layer.kernel[...] = kernel
        layer.bias, layer.use_bias = nnx.Param(bias), True
        for name in list(vars(norm)):
            if not name.startswith("_"):
                delattr(norm, name)
        norm.__class__ = _identity(type(norm))
    return Folded(new, None, tuple((s.norm, s.layer) for s in sites), left)


def _foldable(model: nnx.Module) -> dict[str, Any]:
    """Returns the norms and layers of a model by their path."""
    found = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    around = tuple(f"{path}/" for path, module in found.items() if isinstance(module, NNX_WEIGHTS))
    return {
        path: module
        for path, module in found.items()
        if isinstance(module, NNX_NORMS + NNX_LAYERS) and not path.startswith(around)
    }


@functools.cache
def _identity(kind):
    """Returns what is left of a folded norm, of a class laid out in memory like its own."""
    return type("Identity", (kind,), {"__call__": lambda self, x, *args, **kwargs: x})


def _marking(kind, path, shapes):
    """Returns a class of nnx that marks in a graph what enters and leaves its only instance."""

    def call(self, *args, **kwargs):
        shapes[path] = _inputs(args, kwargs).shape
        if issubclass(kind, NNX_NORMS):
            return _marked("norm", path, _inputs(args, kwargs))
        args, kwargs = _with_inputs(args, kwargs, _marked("enter", path, _inputs(args, kwargs)))
        return _marked("leave", path, kind.__call__(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})


def _marked(word, path, x):
    return checkpoint_name(x, f"{word} {path}")


def _inputs(args, kwargs):
    """Returns what a layer or norm is called on: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_inputs(args, kwargs, x):
    """Returns the arguments with another first one."""
    if args:
        return (x, *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: x}


def _norms(modules, kinds) -> list[str]:
    return [path for path, module in modules.items() if isinstance(module, kinds)]


def _plan(jaxpr, modules, shapes, norms, stacked) -> tuple[list[_Site], tuple]:
    """Returns which batch norm goes into which layer, and why others stay."""
    marks = list(_marks(jaxpr))
    times = Counter(mark for mark, *_ in marks)
    # Of each norm: the one mark before it, and the one behind, if nothing else is there.
    previous = {path: mark for (word, path), mark, _ in marks if word == "norm"}
    behind = {path: mark for (word, path), _, mark in marks if word == "norm"}
    sites, left, taken = [], [], set()
    for path in _norms(modules, norms):
        norm, shape = modules[path], shapes[path]
        word, layer = previous.get(path) or ("", "")
        next_word, follower = behind.get(path) or ("", "")
        if times["norm", path] != 1 or path in stacked:
            left.append((path, "it is called more than once, or its variables are stacked"))
        elif not _features_are_last(norm.axis, len(shape)):
            left.append((path, "its features are not last"))
        elif word == "leave" and times["leave", layer] == 1:
            sites.append(_Site(path, layer, before=False))
        elif (
            next_word == "enter"
            and times["enter", follower] == 1
            and follower not in taken
            and _pads_nothing(modules[follower])
        ):
            sites.append(_Site(path, follower, before=True))
            taken.add(follower)
        else:
            left.append(
                (path, "no layer is alone with it, or only one behind that pads with zeros")
            )
    # A layer that takes one norm on either side: first what it is given, then what it gives.
    return sorted(sites, key=lambda site: not site.before), tuple(left)


def _marks(jaxpr: core.Jaxpr) -> Iterator[tuple]:
    """Yields each mark of a graph, the mark its input comes from, and the one its output goes to.

    None stands for another operation, and for an output that goes to more than one place.
    """
    made: dict[Any, tuple] = {}
    taken: dict[Any, tuple] = {}
    used: Counter[Any] = Counter(
        v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, core.Var)
    )
    used.update(v for v in jaxpr.outvars if isinstance(v, core.Var))
    found = [(mark, eqn) for eqn in jaxpr.eqns if (mark := _mark(eqn))]
    for mark, eqn in found:
        made[eqn.outvars[0]] = mark
        (source,) = eqn.invars
        taken[source] = mark
    for mark, eqn in found:
        (source,), (out,) = eqn.invars, eqn.outvars
        yield (
            mark,
            made.get(source) if used[source] == 1 else None,
            taken.get(out) if used[out] == 1 else None,
        )
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _marks(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _mark(eqn) -> tuple[str, str] | None:
    """Returns the word and path of an operation that is a mark."""
    word, _, path = str(eqn.params.get("name", "")).partition(" ")
    return (word, path) if eqn.primitive.name == "name" and word in _MARKS else None


def _pads_nothing(layer) -> bool:
    """Returns whether all that a layer sums up is of its input."""
    if isinstance(layer, linen.ConvTranspose | nnx.ConvTranspose):
        return False
    if isinstance(layer, linen.Dense | nnx.Linear):
        return True
    dilated = layer.input_dilation not in (None, 1) and set(layer.input_dilation) != {1}
    padding = layer.padding
    if isinstance(padding, str):
        return padding in _OF_THE_INPUT and not dilated
    return not any(jax.tree.leaves(padding)) and not dilated


def _features_are_last(axis, rank) -> bool:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return [a % rank for a in axes] == [rank - 1]


def _fold(norm, stats, scale, bias, layer, kernel, layer_bias, before):
    """Returns the layer's new kernel and bias."""
    mean, var = stats
    affine = affine_of(
        RunningStats.create(mean.shape)._replace(mean=mean, var=var),
        scale,
        bias,
        epsilon=norm.epsilon,
        epsilon_on=getattr(norm, "epsilon_on", "variance"),
    )
    if before:
        groups = getattr(layer, "feature_group_count", 1)
        return fold_into_next(kernel, layer_bias, *affine, feature_group_count=groups)
    axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    return fold_into_previous(kernel, layer_bias, *affine, feature_axis=axis)


def _at(tree: Any, path: str) -> Any:
    """Returns the part of nested dicts at a path; None where there is none."""
    for name in filter(None, path.split("/")):
        tree = tree.get(name) if tree is not None else None
    return tree


def _replaced(tree, path, new):
    """Returns nested dicts with entries at a path replaced; with None, without what is there."""
    if not path or path == [""]:
        return {} if new is None else {**tree, **new}
    if path[0] not in tree:
        return tree
    part = _replaced(tree[path[0]], path[1:], new)
    rest = {name: value for name, value in tree.items() if name != path[0]}
    return {**tree, path[0]: part} if part else rest
