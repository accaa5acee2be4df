"""Models bound to their variables, which a loss calls: linen's and nnx's in one way."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core.tracers import current_trace
from jax.typing import DTypeLike

from normax.intercept import intercepted


class LinenBinding:
    """Binds variables to a linen model; equal where the model is the same one."""

    def __init__(self, model: linen.Module, rngs: tuple[str, ...]):
        self.model, self.rngs = model, rngs

    def __eq__(self, other):
        same = isinstance(other, LinenBinding) and self.model is other.model
        return same and self.rngs == other.rngs

    def __hash__(self):
        return hash((id(self.model), self.rngs))

    def __call__(self, params, model_state, key, *, train, dtype):
        """Returns the model with its variables."""
        return BoundLinen(self, params, model_state, key, train, dtype)


class BoundLinen:
    """A linen model with its variables: call it as the model; each call moves `model_state`."""

    def __init__(self, binding, params, model_state, key, train, dtype):
        self.binding, self.params, self.model_state = binding, params, model_state
        self.key, self.train, self.dtype = key, train, dtype
        self.calls, self.trace = 0, current_trace()
        self.interceptor: Any = None  # listens to the modules of this model, and to no other's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the model."""
        listening = contextlib.nullcontext()
        if self.interceptor is not None:
            listening = intercepted(self.interceptor)
        with listening:
            return self._call(*args, **kwargs)

    def _call(self, *args, **kwargs):
        args, kwargs = cast((args, kwargs), self.dtype)
        variables = {"params": cast(self.params, self.dtype), **self.model_state}
        if not self.train:
            return cast_back(self.binding.model.apply(variables, *args, **kwargs), self.dtype)
        told, asked = "mutable" in kwargs, kwargs.pop("mutable", [])
        if isinstance(asked, bool):
            raise TypeError(f"train_step: expected mutable to name collections, got {asked}")
        asked = [asked] if isinstance(asked, str) else list(asked)
        # A number that counts the calls, unlike a key that is split, leaves every transformation.
        keys = jax.random.split(jax.random.fold_in(self.key, self.calls), len(self.binding.rngs))
        self.calls += 1
        kwargs["rngs"] = dict(zip(self.binding.rngs, keys, strict=True))
        out, updates = self.binding.model.apply(
            variables, *args, mutable=[*self.model_state, *asked], **kwargs
        )
        new = {name: part for name, part in updates.items() if name in self.model_state}
        for name, part in new.items():
            check_structure(f"the collection {name!r}", self.model_state[name], part)
        if not self._has_moved(new):
            new = {}
        elif current_trace() != self.trace:
            raise ValueError(
                "train_step: expected the model to be called outside jax.checkpoint, jax.jit, "
                "jax.vmap, lax.scan and lax.cond, out of which its running statistics cannot come; "
                "use Flax's own nn.remat, nn.jit, nn.vmap, nn.scan and nn.cond in the model"
            )
        self.model_state = {**self.model_state, **new}
        out = cast_back(out, self.dtype)
        return (out, {name: updates[name] for name in asked if name in updates}) if told else out

    def _has_moved(self, new):
        old = {name: self.model_state[name] for name in new}
        return any(
            a is not b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        )


def check_structure(name, old, new):
    """Refuses state that grows, as what is sown into does: it cannot be handed on."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"train_step: expected {name} to keep its structure, got "
            f"{jax.tree.structure(new)} for {jax.tree.structure(old)}; sow what is no state into "
            "'intermediates'"
        )


@dataclasses.dataclass(frozen=True)
class NNXBinding:
    """Binds variables to an nnx model."""

    graph: Any

    def merge(self, params, model_state):
        """Returns a model with these variables."""
        return nnx.merge(self.graph, params, model_state, copy=True)

    def __call__(self, params, model_state, key, *, train, dtype):
        """Returns the model with its variables, in training or inference."""
        model = self.merge(cast(params, dtype), model_state)
        # Of the class, for a model may have something else in an attribute called so.
        (type(model).train if train else type(model).eval)(model)
        return BoundNNX(model, dtype)


class BoundNNX:
    """An nnx model with its variables: call it, or use its attributes, as the model."""

    def __init__(self, model, dtype):
        self.nnx_model, self._dtype = model, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the model."""
        args, kwargs = cast((args, kwargs), self._dtype)
        return cast_back(self.nnx_model(*args, **kwargs), self._dtype)

    def __getattr__(self, name):
        return getattr(self.nnx_model, name)

    @property
    def model_state(self):
        """What the calls so far have left of the state that is not `nnx.Param`, nor sown."""
        nnx.pop(self.nnx_model, nnx.Intermediate)
        return nnx.split(self.nnx_model, nnx.Param, ...)[2]


def cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """Returns a pytree with its real floating-point arrays in `dtype`; None leaves them."""

    def leaf(value):
        real = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
        return value.astype(dtype) if real else value

    return tree if dtype is None else jax.tree.map(leaf, tree)


def cast_back(tree: Any, dtype: DTypeLike | None) -> Any:
    """Returns what a model gave in `dtype` in float32, for the loss."""
    return tree if dtype is None else cast(tree, jnp.float32)
