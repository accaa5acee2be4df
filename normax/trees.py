"""Weights of a whole model, chosen by their path, normalized in a copy of its parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from normax import axes as ax
from normax.regularize import names_of

Where = str | Iterable[str] | Callable[[tuple[str, ...], jax.Array], bool]


def transform_weights(
    params: Any, function: Callable[[jax.Array], jax.Array], *, where: Where = "kernel"
) -> Any:
    r"""Applies a function to the weights of a model that are chosen by their path.

    .. math:: w \leftarrow f(w)

    The parameters themselves stay: give the model what this returns. Gradients flow through. For
    stacked kernels, as those of scanned layers, let the function keep the leading axis:
    `partial(weight_standardization, feature_axes=(0, -1))`.

    Args:
      params: parameters of a linen or nnx model, any pytree.
      function: of a weight, such as `weight_standardization`.
      where: the last name of the paths to choose, or several; or a function of the path, a tuple of
        names, and the leaf.

    Returns:
      A pytree of the structure of `params`.

    Raises:
      ValueError: nothing is chosen.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> params = {"Dense_0": {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.ones(1)}}
      >>> new = normax.transform_weights(params, normax.weight_norm)
      >>> print(new["Dense_0"]["kernel"].ravel(), new["Dense_0"]["bias"])
      [0.6 0.8] [1.]
    """
    chosen = _chosen("transform_weights", params, where)
    return jax.tree.map(lambda pick, leaf: function(leaf) if pick else leaf, chosen, params)


def weight_constraint(
    function: Callable[[jax.Array], jax.Array], *, where: Where = "kernel"
) -> optax.GradientTransformation:
    r"""Projects the weights of a model after each optimizer step.

    .. math:: w \leftarrow f(w + u)

    Where a reparametrization normalizes weights at each call, this normalizes what is kept.

    Args:
      function: of a weight, such as `weight_standardization`, or a projection of optax.
      where: as in `transform_weights`.

    Returns:
      An optax transformation, to be chained last.

    Raises:
      ValueError: by its update, without `params`, or where nothing is chosen.

    Example:
      >>> import jax.numpy as jnp, normax, optax
      >>> tx = optax.chain(optax.sgd(1.0), normax.weight_constraint(normax.l2_norm))
      >>> params = {"kernel": jnp.array([3.0, 0.0])}
      >>> updates, _ = tx.update({"kernel": jnp.array([0.0, -4.0])}, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(3))
      [0.6 0.8]
    """

    def update(updates, state, params: Any = None):
        ax.check_params("weight_constraint", params)
        moved = optax.apply_updates(params, updates)

        def project(pick, step, old, new):
            return function(new) - old if pick else step

        chosen = _chosen("weight_constraint", params, where)
        return jax.tree.map(project, chosen, updates, params, moved), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _chosen(name, params, where):
    """Returns a tree of booleans: which leaves are chosen."""
    names = {where} if isinstance(where, str) else where

    def pick(path, leaf):
        path = tuple(names_of(path))
        return (
            bool(names(path, leaf)) if callable(names) else any(last in names for last in path[-1:])
        )

    names = names if callable(names) else set(names)
    chosen = jax.tree.map_with_path(pick, params)
    if not any(jax.tree.leaves(chosen)):
        raise ValueError(f"{name}: expected where to choose a weight, got {where!r}")
    return chosen
