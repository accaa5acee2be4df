"""Microbatches: gradients averaged, and statistics merged into one update of the running ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normax import axes as ax
from normax.merging import merging, moving, nothing, updated


def split(name: str, batch: Any, count: int) -> Any:
    """Returns a batch with an axis of microbatches in front.

    Args:
      name: of the function that is called.
      batch: a pytree of arrays whose leading axis is of examples.
      count: how many microbatches; each takes every so-manieth example, for neighbours are on one
        device.

    Raises:
      ValueError: a leading axis that the count does not divide.
    """

    def leaf(path, x):
        shape = jnp.shape(x)
        if not shape or shape[0] % count:
            raise ValueError(
                f"{name}: expected microbatches={count} to divide the leading axis of batch"
                f"{jax.tree_util.keystr(path)}, got shape {shape}"
            )
        return jnp.swapaxes(jnp.reshape(x, (shape[0] // count, count, *shape[1:])), 0, 1)

    return jax.tree_util.tree_map_with_path(leaf, batch)


def accumulate(
    bind: Callable[[Any, Any, jax.Array], Any],
    call: Callable[[Any, Any], Any],
    params: Any,
    model_state: Any,
    parts: Any,
    key: jax.Array,
) -> tuple[Any, Any]:
    """Differentiates a loss over microbatches, one after the other.

    Args:
      bind: function of parameters, the model's other state and a random key that returns the bound
        model.
      call: function of that and a microbatch that returns what is differentiated, and more.
      params: the parameters.
      model_state: the model's other state.
      parts: what `split` returned.
      key: random key; each microbatch folds its number in.

    Returns:
      The gradients, averaged; and what else the calls returned, averaged, with the model's state
      after the whole.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    layers = []

    def find(params, model_state, part, key):
        layers.extend(moving(bind(params, model_state, key), lambda model: call(model, part)))

    jax.eval_shape(find, params, model_state, first, key)

    def objective(params, model_state, merged, part, key):
        model = bind(params, model_state, key)
        close = merging(model, layers, merged)
        value, more = call(model, part)
        return value, (more, *close())

    def one(carry, part):
        sums, model_state, merged, i = carry
        grads, (more, model_state, merged) = jax.grad(objective, has_aux=True)(
            params, model_state, merged, part, jax.random.fold_in(key, i)
        )
        sums = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads)
        return (sums, model_state, merged, i + 1), more

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, ax.compute_dtype(p.dtype)), params)
    unseen = nothing(bind(params, model_state, key), layers)
    start = zeros, model_state, unseen, jnp.zeros((), jnp.int32)
    (sums, model_state, merged, _), more = lax.scan(one, start, parts)
    count = jax.tree.leaves(parts)[0].shape[0]
    grads = jax.tree.map(lambda total, p: (total / count).astype(p.dtype), sums, params)
    state = updated(bind(params, model_state, key), layers, merged)
    return grads, (jax.tree.map(lambda v: v.mean(0), more), state)


def averaged(
    bind: Callable[[Any, Any, jax.Array], Any],
    call: Callable[[Any, Any], Any],
    params: Any,
    model_state: Any,
    parts: Any,
    key: jax.Array,
) -> Any:
    """Returns what else than a value `accumulate` would return for other parameters, averaged.

    Args:
      bind: as for `accumulate`, and so are the others.
      call: likewise.
      params: the parameters.
      model_state: the model's other state, which each microbatch moves for the next.
      parts: what `split` returned.
      key: random key; each microbatch folds its number in.
    """

    def one(carry, part):
        model_state, i = carry
        model = bind(params, model_state, jax.random.fold_in(key, i))
        _, more = call(model, part)
        return (model.model_state, i + 1), more

    _, more = lax.scan(one, (model_state, jnp.zeros((), jnp.int32)), parts)
    return jax.tree.map(lambda v: v.mean(0), more)
