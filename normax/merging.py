"""Bound models whose normalizers merge what they measure, for one update at the end.

A normalizer that moves is called as if it had no momentum: then it remembers the statistics of all
that it has seen since it was told to start anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from normax.bind import BoundLinen, BoundNNX
from normax.intercept import as_if
from normax.moments import Moments, RunningStats, update
from normax.options import BatchRenormOptions
from normax.options.running import RunningNormalizer

Bound = BoundLinen | BoundNNX
# Batches that are not finite are for the one update to judge, which sees them all.
MERGING = {"momentum": None, "nonfinite": "keep", "unbiased": False}
NAMES = "mean", "var", "count", "steps"


class Layer(NamedTuple):
    """A normalizer that moves: where it is, and how it updates what it remembers."""

    path: tuple[Any, ...]
    at: Callable[[Any], dict[str, Any]]  # options that may follow a schedule, at a number of steps
    unbiased: bool
    nonfinite: str

    @classmethod
    def of(cls, path: tuple[Any, ...], module: Any) -> "Layer":
        """Returns that of a module."""
        return cls(path, module._at, getattr(module, "unbiased", False), module.nonfinite)


def moving(model: Bound, call: Callable[[Bound], Any]) -> list[Layer]:
    """Returns the normalizers of a model that move when it is called, if they can merge."""
    return _layers_of(model).moving(call)


def merging(
    model: Bound, layers: list[Layer], merged: list[RunningStats]
) -> Callable[[], tuple[Any, list[RunningStats]]]:
    """Lets the layers of a model go on merging.

    Args:
      model: the model, about to be called.
      layers: those that are to merge.
      merged: what each of them has seen, `RunningStats.create` being nothing.

    Returns:
      A function to be called after the model: it returns the model's state, in which these layers
      are as they were, and what they have seen now.
    """
    there = _layers_of(model)
    kept = [there.remembered(layer) for layer in layers]
    values = [{**own, **new._asdict()} for own, new in zip(kept, merged, strict=True)]
    undo = there.merge(layers, values)

    def close():
        seen = [there.remembered(layer) for layer in layers]
        undo()
        there.put(layers, kept)
        return model.model_state, [RunningStats(s["mean"], s["var"], s["count"]) for s in seen]

    return close


def updated(model: Bound, layers: list[Layer], merged: list[RunningStats]) -> Any:
    """Returns the model's state after one update of each layer by all that it has seen."""
    there, new = _layers_of(model), []
    for layer, seen in zip(layers, merged, strict=True):
        old = there.remembered(layer)
        steps = old.get("steps", 0)
        count = old.get("count", jnp.zeros(jnp.shape(old["mean"]), jnp.int32))
        stats = update(
            RunningStats(old["mean"], old["var"], count),
            Moments(seen.count, seen.mean, seen.var),
            layer.at(steps)["momentum"],
            unbiased=layer.unbiased,
            nonfinite=layer.nonfinite,
        )
        moved = {**stats._asdict(), "steps": steps + 1}
        new.append({name: moved[name] for name in old})
    there.put(layers, new)
    return model.model_state


def nothing(model: Bound, layers: list[Layer]) -> list[RunningStats]:
    """Returns what layers of a model have seen before they see anything."""
    means = [_layers_of(model).remembered(layer)["mean"] for layer in layers]
    return [RunningStats.create(mean.shape, mean.dtype) for mean in means]


def _layers_of(model):
    return _Linen(model) if isinstance(model, BoundLinen) else _NNX(model)


class _Linen:
    """The normalizers of a linen model, whose state is a dict."""

    def __init__(self, model):
        self.model = model

    def moving(self, call):
        layers = {}

        def note(call, args, kwargs, context):
            module = context.module
            if not _merges(module):
                return call(*args, **kwargs)
            before = module.get_variable("batch_stats", "mean")
            out = call(*args, **kwargs)
            if module.get_variable("batch_stats", "mean") is not before:
                layers[module.path] = Layer.of(module.path, module)
            return out

        self.model.interceptor = note
        call(self.model)
        return list(layers.values())

    def remembered(self, layer):
        stats = self.model.model_state["batch_stats"]
        for name in layer.path:
            stats = stats[name]
        return {name: stats[name] for name in NAMES if name in stats}

    def put(self, layers, values):
        for layer, new in zip(layers, values, strict=True):
            state = self.model.model_state
            stats = _replaced(state["batch_stats"], layer.path, new)
            self.model.model_state = {**state, "batch_stats": stats}

    def merge(self, layers, values):
        paths = {layer.path for layer in layers}
        self.model.interceptor = as_if(
            lambda module: _options(module) if module.path in paths else {}
        )
        self.put(layers, values)
        return lambda: None


class _NNX:
    """The normalizers of an nnx model, whose state is in its modules."""

    def __init__(self, model):
        self.model = model
        self.modules: dict[Any, Any] = dict(nnx.iter_modules(model.nnx_model))

    def moving(self, call):
        modules = {path: m for path, m in self.modules.items() if _merges(m)}
        before = {path: module.mean[...] for path, module in modules.items()}
        call(self.model)
        return [
            Layer.of(path, module)
            for path, module in modules.items()
            if module.mean[...] is not before[path]
        ]

    def remembered(self, layer):
        there = {name: getattr(self.modules[layer.path], name) for name in NAMES}
        return {name: v[...] for name, v in there.items() if isinstance(v, nnx.Variable)}

    def put(self, layers, values):
        for layer, new in zip(layers, values, strict=True):
            module = self.modules[layer.path]
            for name in NAMES:
                if name not in new:
                    setattr(module, name, nnx.data(None))
                elif isinstance(getattr(module, name), nnx.Variable):
                    getattr(module, name)[...] = new[name]
                else:
                    setattr(module, name, nnx.BatchStat(new[name]))

    def merge(self, layers, values):
        kept = []
        for layer in layers:
            module = self.modules[layer.path]
            for name, value in _options(module).items():
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        self.put(layers, values)

        def undo():
            for module, name, value in kept:
                setattr(module, name, value)

        return undo


def _merges(module: Any) -> bool:
    # What a batch renormalization does depends on what it remembers.
    return isinstance(module, RunningNormalizer) and not isinstance(module, BatchRenormOptions)


def _options(module):
    return {name: value for name, value in MERGING.items() if hasattr(module, name)}


def _replaced(stats, path, new):
    """Returns statistics with others at a path, and what else is there."""
    if path:
        return {**stats, path[0]: _replaced(stats[path[0]], path[1:], new)}
    others = {name: value for name, value in stats.items() if name not in NAMES}
    return {**others, **new}
