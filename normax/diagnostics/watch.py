"""Looks at what the layers of a model are given and give, without a change of its code."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from flax.core.scope import union_filters
from flax.core.tracers import current_trace
from flax.traverse_util import flatten_dict

from normax import axes as ax
from normax.bind import BoundLinen, BoundNNX
from normax.intercept import having
from normax.train import TrainState, value_and_metrics

# The collection that brings what was noted out of a model, out of what it compiles or remats too.
_NOTES = "notes of normax"
_NOTE = "note"


class _Note(nnx.Variable):
    """The same for nnx."""


class Call(NamedTuple):
    """A call of a layer.

    Attributes:
      path: where the layer is in the model, such as "block/conv1".
      module: the layer, of linen or nnx.
      args: what it was called with.
      kwargs: likewise.
      output: what it returned.
    """

    path: str
    module: Any
    args: tuple
    kwargs: dict
    output: Any

    @property
    def input(self) -> Any:
        """What it was called on; None where that cannot be told."""
        name = next((name for name in ("x", "inputs") if name in self.kwargs), None)
        if name is not None:
            return self.kwargs[name]
        return self.args[0] if self.args else None


def watched(
    loss: Callable[[Any, Any, bool], Any],
    state: TrainState,
    batch: Any,
    *,
    train: bool,
    note: Callable[[Call], Any] | None = None,
    change: Callable[[Call], Any] | None = None,
    options: Callable[[str, Any], dict[str, Any]] = lambda path, module: {},
) -> tuple[jax.Array, dict[str, tuple]]:
    """Evaluates a loss and notes something of each call of a layer: what holds variables itself.

    Args:
      loss: as in `normax.train.train_step`.
      state: parameters and the rest; nothing of it moves.
      batch: what the loss takes.
      train: the mode.
      note: returns what to keep of a call, a pytree of arrays, or None. What is noted within
        `nn.scan`, `nn.vmap` and their like stays there.
      change: returns what a layer gives in place of its output.
      options: returns, of a path and the layer there, the other options that it is called with.

    Returns:
      The loss, and by the path of each layer, in the order of their calls, what was kept of each.

    Raises:
      ValueError: a model without layers, or one that notes are to come out of inside a
        transformation of JAX.
    """
    model = state.bind(state.params, state.model_state, state.key, train=train, dtype=None)
    watch = _watched_nnx if isinstance(model, BoundNNX) else _watched_linen
    value, notes = watch(loss, model, batch, train, note, change, options)
    ax.check_found("diagnostics", "a layer with variables of its own", bool(notes))
    return value, {path: kept for path, kept in notes.items() if kept}


def _watched_linen(loss, model, batch, train, note, change, options):
    order: dict[str, None] = {}

    def look(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        is_call = context.method_name == "__call__"
        with having(module, options(path, module) if is_call else {}):
            output = call(*args, **kwargs)
        if not is_call or not _holds_variables(module):
            return output
        seen = Call(path, module, args, kwargs, output)
        order[seen.path] = None
        kept = None if note is None else note(seen)
        # A collection that a lifted transformation was not told of does not get out of it.
        if kept is not None and module.is_mutable_collection(_NOTES):
            before = module.get_variable(_NOTES, _NOTE, default=())
            module.put_variable(_NOTES, _NOTE, (*before, kept))
        return output if change is None else change(seen)

    watching = _Watching.of(model)
    watching.interceptor = look
    value, _ = value_and_metrics(loss(watching, batch, train))
    found = {"/".join(map(str, path[:-1])): kept for path, kept in watching.notes.items()}
    return value, {path: found.get(path, ()) for path in order}


class _Watching(BoundLinen):
    """A bound linen model that keeps what was noted of its calls."""

    notes: dict[tuple, Any]

    @classmethod
    def of(cls, model: BoundLinen) -> "_Watching":
        """Returns another of a bound model, which watches."""
        new = object.__new__(cls)
        new.__dict__ = {**vars(model), "notes": {}}
        return new

    def __call__(self, *args, **kwargs):
        told, asked = "mutable" in kwargs, kwargs.pop("mutable", [])
        out, extra = super().__call__(*args, mutable=union_filters(asked, [_NOTES]), **kwargs)
        notes: dict[tuple, Any] = dict(flatten_dict(extra.pop(_NOTES, {})))
        within = bool(notes) and current_trace() != self.trace
        ax.check_found("diagnostics", "a model called outside transformations of JAX", not within)
        for path, kept in notes.items():
            self.notes[path] = (*self.notes.get(path, ()), *kept)
        return (out, extra) if told else out


def _holds_variables(module: linen.Module) -> bool:
    return any(
        not isinstance(value, Mapping)
        for name, collection in module.variables.items()
        if name != _NOTES
        for value in collection.values()
    )


def _watched_nnx(loss, model, batch, train, note, change, options):
    found = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model.nnx_model)}
    layers: dict[str, Any] = {path: layer for path, layer in found.items() if _is_layer(layer)}
    order: dict[str, None] = {}
    for path, layer in layers.items():
        layer.watcher = functools.partial(_watch, path, order, note, change, options)
        layer.__class__ = _watched_kind(type(layer))
        if note is not None:
            setattr(layer, _NOTE, _Note(()))
    value, _ = value_and_metrics(loss(model, batch, train))
    if note is None:
        return value, dict.fromkeys(order, ())
    return value, {path: getattr(layers[path], _NOTE).get_value() for path in order}


def _is_layer(module):
    held = (nnx.Param, nnx.BatchStat)
    return callable(module) and any(isinstance(v, held) for v in vars(module).values())


@functools.cache  # JAX keeps every class that it has seen
def _watched_kind(kind):
    """Returns the class of the layers of a class that are watched."""

    def call(self, *args, **kwargs):
        return self.watcher(self, kind.__call__, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _watch(path, order, note, change, options, layer, call, args, kwargs):
    """Calls a layer of nnx, notes and changes what it gave."""
    with having(layer, options(path, layer)):
        output = call(layer, *args, **kwargs)
    seen = Call(path, layer, args, kwargs, output)
    order[path] = None
    if note is not None and (kept := note(seen)) is not None:
        variable = getattr(layer, _NOTE)
        variable.set_value((*variable.get_value(), kept))
    return output if change is None else change(seen)
