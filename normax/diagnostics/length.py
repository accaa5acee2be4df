"""How long gradients are, which may be far from 1 in a deep network."""

from typing import Any

import jax
import jax.numpy as jnp

from normax import axes as ax


def length(tree: Any) -> jax.Array:
    """Returns the length of all leaves together, float32 at least; none are 0 long."""
    leaves = jax.tree.leaves(tree)
    dtype = ax.real_dtype(ax.promote(jnp.float32, *leaves))
    leaves, zero = [jnp.abs(leaf).astype(dtype) for leaf in leaves], jnp.zeros((), dtype)
    largest = jnp.max(jnp.stack([zero, *(jnp.max(leaf, initial=0) for leaf in leaves)]))
    unit = jnp.where(largest > 0, largest, 1)
    squares = [jnp.sum(jnp.square(leaf / unit)) for leaf in leaves]
    return jnp.where(jnp.isinf(largest), largest, unit * jnp.sqrt(sum(squares, start=zero)))
