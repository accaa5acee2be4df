"""Bound models whose normalizers merge what they measure, for one update at the end.

A normalizer that moves is called as if it had no momentum: then it remembers the statistics of all
that it has seen since it was told to start anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.core import meta

from normax import axes as ax
from normax.bind import BoundLinen, BoundNNX
from normax.intercept import as_if
from normax.moments import Moments, RunningStats, update
from normax.options import BatchRenormOptions, RunningInstanceNormOptions
from normax.options.running import RunningNormalizer

Bound = BoundLinen | BoundNNX
# Batches that are not finite are for the one update to judge, which sees them all.
MERGING = {"momentum": None, "nonfinite": "keep", "unbiased": False}
NAMES = "mean", "var", "count", "steps"


class Layer(NamedTuple):
    """A normalizer that moves: where it is, and how it updates what it remembers."""

    path: tuple[Any, ...]
    module: Any  # as it was first called
    unbiased: bool
    nonfinite: str
    weighs: bool  # whether entries have weights, so that what it counts is no whole number

    @classmethod
    def of(cls, path: tuple[Any, ...], module: Any, weighs: bool) -> "Layer":
        """Returns that of a module."""
        unbiased = _options(module).get("unbiased") is False and module.unbiased
        return cls(path, module, unbiased, module.nonfinite, weighs)


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
        momentum: Any = there.at(layer, steps)["momentum"]
        if momentum is not None and jnp.ndim(momentum):
            # Of stacked layers, each with steps of its own.
            missing = jnp.ndim(old["mean"]) - jnp.ndim(momentum)
            momentum = jnp.reshape(momentum, jnp.shape(momentum) + (1,) * missing)
        stats = update(
            RunningStats(old["mean"], old["var"], count),
            Moments(seen.count, seen.mean, seen.var),
            momentum,
            unbiased=layer.unbiased,
            nonfinite=layer.nonfinite,
        )
        moved = {**stats._asdict(), "steps": steps + 1}
        new.append({name: moved[name] for name in old})
    there.put(layers, new)
    return model.model_state


def nothing(model: Bound, layers: list[Layer]) -> list[RunningStats]:
    """Returns what layers of a model have seen before they see anything."""
    found = []
    for layer in layers:
        mean = _layers_of(model).remembered(layer)["mean"]
        stats = RunningStats.create(mean.shape, mean.dtype)
        count = stats.count.astype(jnp.float32 if layer.weighs else jnp.int32)
        found.append(stats._replace(count=count))
    return found


def _layers_of(model):
    return _Linen(model) if isinstance(model, BoundLinen) else _NNX(model)


class _Linen:
    """The normalizers of a linen model, whose state is a dict."""

    def __init__(self, model):
        self.model = model

    def moving(self, call):
        layers, resting = {}, set()

        def note(call, args, kwargs, context):
            module = context.module
            if not _merges(module) or context.method_name != "__call__":
                return call(*args, **kwargs)
            before = module.get_variable("batch_stats", "mean")
            out = call(*args, **kwargs)
            if module.get_variable("batch_stats", "mean") is before:
                resting.add(module.path)
            else:
                where = "/".join(module.path)
                ax.check_known("train_step", f"the momentum of {where}", module.momentum)
                weighed = weighs(kwargs) or getattr(layers.get(module.path), "weighs", False)
                layers[module.path] = Layer.of(module.path, module, weighed)
            return out

        self.model.interceptor = note
        call(self.model)
        _check_one_mode(layers.keys() & resting)
        return list(layers.values())

    def at(self, layer, steps):
        """Returns the options that may follow a schedule, by name, at a number of steps."""
        return layer.module._at(steps)

    def remembered(self, layer):
        stats = self.model.model_state["batch_stats"]
        for name in layer.path:
            stats = stats[name]
        return {name: meta.unbox(stats[name]) for name in NAMES if name in stats}

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
        seen = {path: [] for path in modules}
        for path, module in modules.items():
            module._normalize_and_remember = noting(module._normalize_and_remember, seen[path])
        call(self.model)
        moved = [path for path, module in modules.items() if module.mean[...] is not before[path]]
        _check_one_mode({path for path in moved if any(rests for rests, _ in seen[path])})
        return [Layer.of(path, modules[path], any(w for _, w in seen[path])) for path in moved]

    def at(self, layer, steps):
        """Returns the same, of the module as it is now: its options may be arrays of its state."""
        return self.modules[layer.path]._at(steps)

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


def noting(normalize: Callable[..., Any], seen: list) -> Callable[..., Any]:
    """Returns a method that notes whether it is called in inference, and with weights."""

    def noting(*args, use_running_average, **kwargs):
        seen.append((use_running_average, weighs(kwargs)))
        return normalize(*args, use_running_average=use_running_average, **kwargs)

    return noting


def weighs(kwargs: dict[str, Any]) -> bool:
    """Returns whether a normalizer is called with entries that weigh."""
    mask = kwargs.get("mask")
    return mask is not None and jnp.issubdtype(jnp.result_type(mask), jnp.floating)


def _check_one_mode(paths):
    for path in paths:
        raise ValueError(
            "train_step: expected each normalizer to be called in training or in inference, not "
            f"both, where a batch is taken in microbatches, got both for {'/'.join(map(str, path))}"
        )


def _merges(module: Any) -> bool:
    # What a batch renormalization does depends on what it remembers.
    return isinstance(module, RunningNormalizer) and not isinstance(module, BatchRenormOptions)


def _options(module):
    # Of an instance the variance is corrected by its own count, before it is merged.
    kept = ("unbiased",) if isinstance(module, RunningInstanceNormOptions) else ()
    options = {name: value for name, value in MERGING.items() if hasattr(module, name)}
    return {name: value for name, value in options.items() if name not in kept}


def _replaced(stats, path, new):
    """Returns statistics with others at a path, and what else is there."""
    if path:
        return {**stats, path[0]: _replaced(stats[path[0]], path[1:], new)}
    others = {name: value for name, value in stats.items() if name not in NAMES}
    boxed = {
        name: meta.replace_boxed(stats[name], v) if name in stats else v for name, v in new.items()
    }
    return {**others, **boxed}
