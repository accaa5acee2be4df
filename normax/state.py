"""Is this state what it should be? For checkpoints, before they are trusted."""

from typing import Any

import jax
import numpy as np
from jax import core, tree_util

from normax import axes as ax


def validate(state: Any, like: Any) -> Any:
    """Returns `state`, and refuses it unless it could stand where `like` stands.

    Checked are the keys, each leaf's shape and dtype, and, where the values are at hand, that each
    is finite, unless it is not in `like`, and no variance or count is negative: leaves named `var`
    and `count`. What libraries otherwise restore in silence: a transposed layer, float32 as
    bfloat16, NaN, a dict for a `RunningStats`.

    Args:
      state: any pytree of arrays: `RunningStats`, Flax variables, an `nnx.State`, a `TrainState`.
      like: a pytree to compare with, of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      `state` itself.

    Raises:
      ValueError: a missing or additional key; another shape; values that are not finite; a negative
        variance or count.
      TypeError: another dtype; a container of another type.

    Under `jit`, or spread over several processes, the values are not at hand and only keys, shapes
    and dtypes are checked.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> like = normax.RunningStats.create(3)
      >>> stats = normax.validate(like._replace(mean=jnp.ones(3)), like)
      >>> normax.validate(like._replace(var=-jnp.ones(3)), like)
      Traceback (most recent call last):
        ...
      ValueError: validate: expected var of at least 0, got -1.0
    """
    ours, expected = leaves_by_path(state), leaves_by_path(like)
    ax.check_keys("validate", "state", ours, expected)
    ax.check_structure("validate", "state", state, like)
    for path, leaf in ours.items():
        ax.check_like("validate", path, leaf, expected[path])
        if _is_at_hand(leaf) and not _is_never_finite(expected[path]):
            names = [name for name in path.split("/") if name != "value"]
            ax.check_values("validate", path, leaf, not_negative=names[-1:] in (["var"], ["count"]))
    return state


def _is_at_hand(leaf):
    if isinstance(leaf, core.Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _is_never_finite(leaf):
    """Returns whether `like` itself holds inf there, as some optimizers begin with."""
    real = _is_at_hand(leaf) and jax.numpy.issubdtype(jax.numpy.result_type(leaf), np.inexact)
    return bool(real and not np.isfinite(np.asarray(leaf).astype(complex)).all())


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their path; `value` is where nnx keeps that of a variable."""
    leaves = tree_util.tree_leaves_with_path(tree)
    return {tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
