"""Population statistics of a trained model: measured over a stream, merged, put in their place."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from normax import axes as ax
from normax.bind import NNXBinding
from normax.intercept import as_if, intercepted
from normax.merging import noting, weighs
from normax.moments import count_like
from normax.nnx.activations import Running
from normax.options.running import Remembering, RunningNormalizer


def recalibrate(
    apply: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable,
    *,
    progress: bool = False,
) -> Any:
    r"""Replaces a linen model's running statistics by those of all the data of a stream.

    .. math:: \mu = \frac1n \sum_b n_b \mu_b, \qquad
              \sigma^2 = \frac1n \sum_b n_b (\sigma_b^2 + |\mu_b - \mu|^2)

    With the parameters as they are, after training, after averaging of weights, or for data of
    another kind; each layer sees what it sees in training. Batches may differ in size, but each has
    more than one value of every feature. Memory does not grow with the stream.

    Args:
      apply: function of (variables, batch) that applies the model in training and returns the
        updated collections: `model.apply(variables, batch, ..., mutable=["batch_stats"])[1]`.
      variables: of the model, `batch_stats` among them; they stay as they are.
      batches: the stream, of any pytree that `apply` takes.
      progress: show a progress bar; needs rich.

    Returns:
      Variables of the same structure, with new running statistics in every `normax.linen` module
      that merges (`BatchRenorm` does not: it averages deviations). Those of features that saw no
      entry stay: of frozen layers, of layers that are not called, and of Flax's own.

    Raises:
      ValueError: a stream without a batch; a model without running statistics, or one that `apply`
        does not apply in training.
      TypeError: a `BatchRenorm` in the model.

    Where others differ: PyTorch's `update_bn` and fvcore average the variances of batches, without
    the variance of their means, and weigh a short last batch like a full one.

    Example:
      >>> import jax, jax.numpy as jnp, normax.linen as nn
      >>> from normax.recalibrate import recalibrate
      >>> model = nn.BatchNorm()
      >>> x = jax.random.normal(jax.random.key(0), (10, 2)) + 3
      >>> variables = model.init(jax.random.key(1), x, use_running_average=True)
      >>> apply = lambda variables, x: model.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"]
      ... )[1]
      >>> new = recalibrate(apply, variables, [x[:7], x[7:]])
      >>> bool(jnp.allclose(new["batch_stats"]["var"], x.var(0)))
      True

    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576.
    """
    stats = variables.get("batch_stats", {})
    ax.check_found("recalibrate", "variables with running statistics", bool(stats))

    @jax.jit
    def measure(variables, stats, batch):  # what is closed over is copied into the program
        with intercepted(as_if(_merging)):
            updates = apply({**variables, "batch_stats": stats}, batch)
        ax.check_collections("recalibrate", "what apply returns", updates)
        return updates["batch_stats"]

    fresh, kinds = None, set()
    for batch in _shown(batches, progress):
        if (kind := _kind(batch)) not in kinds:
            called = _moving(apply, variables, batch)
            fresh = _edited(stats, called, _restarted) if fresh is None else fresh
            weighed = {path for path, weighs in called.items() if weighs}
            fresh = _edited(fresh, weighed, _with_a_real_count)
            kinds.add(kind)
        fresh = measure(variables, fresh, batch)
    ax.check_found("recalibrate", "a batch", fresh is not None)
    trained = any(count.any() for count in _counts(fresh))
    ax.check_found("recalibrate", "an entry, by a model applied in training", trained)
    return _in_kind({**variables, "batch_stats": _like(fresh, stats)}, variables)


def recalibrate_nnx(
    model: nnx.Module,
    batches: Iterable,
    *,
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    progress: bool = False,
) -> nnx.Module:
    """Returns an nnx model with the running statistics of all the data of a stream.

    `recalibrate` for nnx: a copy of the model is called batch by batch, in training, as
    `model.train()` puts it: all of it, so what is to stay in inference there needs `freeze_stats`,
    or its mode in `call`.

    Args:
      model: the model; it stays as it is.
      batches: the stream.
      call: function of (model, batch) that calls the model.
      progress: show a progress bar; needs rich.

    Returns:
      A copy of the model as it was, other variables too, with new running statistics.

    Raises:
      ValueError: a stream without a batch; a model without running statistics.
      TypeError: a `BatchRenorm` in the model.

    Example:
      >>> import jax, jax.numpy as jnp, normax.nnx as nn
      >>> from flax import nnx
      >>> from normax.recalibrate import recalibrate_nnx
      >>> model = nn.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (10, 2)) + 3
      >>> new = recalibrate_nnx(model, [x[:7], x[7:]])
      >>> bool(jnp.allclose(new.mean[...], x.mean(0)))
      True

    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576.
    """
    working = nnx.clone(model)
    moving: dict[Any, Any] = {p: m for p, m in nnx.iter_modules(working) if _moves(m)}
    layers: dict[Any, Any] = {p: m for p, m in moving.items() if isinstance(m, RunningNormalizer)}
    ax.check_found("recalibrate_nnx", "a model with running statistics that move", bool(layers))
    for path, layer in moving.items():  # a power norm remembers no moments of its input
        layer.freeze_stats = path not in layers

    _restart(layers)
    bind = NNXBinding(nnx.split(working, nnx.Param, ...)[0])

    @jax.jit  # `nnx.jit` would return the parameters, too, as a copy
    def measure(params, state, batch):
        bound = bind(params, state, None, train=True, dtype=None)
        call(bound.nnx_model, batch)
        return bound.model_state

    def variables():
        return nnx.split(working, nnx.Param, ...)[1:]

    kinds = set()
    for batch in _shown(batches, progress):
        if (kind := _kind(batch)) not in kinds:
            for path in _weighing(bind, call, batch, *variables()):
                layers[path].count = nnx.BatchStat(layers[path].count[...].astype(jnp.float32))
            kinds.add(kind)
        nnx.update(working, measure(*variables(), batch))
    ax.check_found("recalibrate_nnx", "a batch", bool(kinds))
    copy = nnx.clone(model)
    modules: dict[Any, Any] = dict(nnx.iter_modules(copy))
    for path, new in layers.items():
        own, seen = modules[path], new.count[...] > 0
        own.mean[...] = jnp.where(seen, new.mean[...], own.mean[...])
        own.var[...] = jnp.where(seen, new.var[...], own.var[...])
        if own.count is not None:
            own.count[...] = _kept_count(new.count[...], own.count[...])
    return copy


def _moves(layer):
    """Returns whether a module of nnx moves running statistics when it is called in training."""
    return isinstance(layer, Running) and not layer.freeze_stats


def _weighing(bind, call, batch, params, state):
    """Returns the paths of the normalizers of an nnx model that are called with weights."""
    seen: dict[Any, list] = {}

    def traced(params, state, batch):
        model = bind(params, state, None, train=True, dtype=None).nnx_model
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, RunningNormalizer):
                noted = noting(layer._normalize_and_remember, seen.setdefault(path, []))
                layer._normalize_and_remember = noted
        call(model, batch)

    jax.eval_shape(traced, params, state, batch)
    return {path for path, calls in seen.items() if any(weighed for _, weighed in calls)}


def _restart(layers):
    """Lets normalizers of nnx merge what they see, from nothing on."""
    for layer in layers.values():
        layer.momentum = None
        layer.mean[...] = jnp.zeros_like(layer.mean[...])
        layer.var[...] = jnp.ones_like(layer.var[...])
        layer.count = nnx.BatchStat(jnp.zeros(layer.mean[...].shape, jnp.int32))


def _kept_count(new, old):
    """Returns a new count in the dtype of the old one, which stays where nothing was seen."""
    # An int of weights that add up to little: 0 would be nothing seen.
    return jnp.where(new > 0, jnp.maximum(count_like(new, old), jnp.ones((), old.dtype)), old)


def _merging(module) -> dict[str, Any]:
    """Returns the options of a module that merges: no momentum, where it keeps running statistics.

    One that remembers no moments of its input, such as a power norm, is called as if frozen.
    """
    if not isinstance(module, Remembering) or module.freeze_stats:
        return {}
    return {"momentum": None} if isinstance(module, RunningNormalizer) else {"freeze_stats": True}


def _kind(batch):
    """Returns what two batches have in common that a model is compiled once for."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(map(jax.typeof, leaves))


def _moving(apply, variables, batch):
    """Returns the modules that are called and not frozen, by path, and whether entries weigh."""
    paths: dict[Any, bool] = {}

    def note(call, args, kwargs, context):
        module, path = context.module, context.module.path
        if isinstance(module, RunningNormalizer) and not module.freeze_stats:
            paths[path] = paths.get(path, False) or weighs(kwargs)
        return call(*args, **kwargs)

    def traced(variables, batch):
        with intercepted(note):
            return apply(variables, batch)

    jax.eval_shape(traced, variables, batch)
    ax.check_found("recalibrate", "a model with running statistics that move", bool(paths))
    return paths


def _edited(stats, paths, edit, path=()):
    """Returns statistics with those of the modules at the paths edited."""
    if not isinstance(stats, Mapping):
        return stats
    if path in paths:
        return edit(stats)
    return {name: _edited(part, paths, edit, (*path, name)) for name, part in stats.items()}


def _restarted(own):
    """Returns a module's statistics before any data, with a count."""
    zero, one = jnp.zeros_like(own["mean"]), jnp.ones_like(own["var"])
    return {**own, "mean": zero, "var": one, "count": jnp.zeros(zero.shape, jnp.int32)}


def _with_a_real_count(own):
    """Returns the same for entries that weigh, if it was restarted."""
    return {**own, "count": own["count"].astype(jnp.float32)} if "count" in own else own


def _like(new, old):
    """Returns the new statistics where there are any, without what the old ones have not."""
    if not isinstance(old, Mapping):
        return old
    if {"mean", "var"} <= set(old):
        seen = new["count"] > 0 if "count" in new else False
        kept = {name: jnp.where(seen, new[name], old[name]) for name in ("mean", "var")}
        if "count" in old:
            kept["count"] = _kept_count(new["count"], old["count"])
        return _in_kind({name: kept.get(name, part) for name, part in old.items()}, old)
    return _in_kind({name: _like(new[name], part) for name, part in old.items()}, old)


def _in_kind(new, old):
    """Returns a dict as a `FrozenDict` where the old one is."""
    return FrozenDict(new) if isinstance(old, FrozenDict) else new


def _counts(stats):
    """Yields the counts of the statistics."""
    for name, part in stats.items():
        if isinstance(part, Mapping):
            yield from _counts(part)
        elif name == "count":
            yield part


def _shown(batches, progress):
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, description="recalibrating")
