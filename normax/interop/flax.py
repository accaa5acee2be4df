"""Variables of linen and nnx models: from one to the other."""

from typing import Any

from normax.interop.pairing import (
    Leaf,
    Pair,
    Renaming,
    Report,
    check_names,
    fill_flax,
    join,
    leaves_of,
    renamed,
)


def from_flax(
    variables: Any, like: Any, *, names: Renaming = None, strict: bool = True
) -> tuple[Any, Report]:
    """Returns the variables of a linen or nnx model, taken from those of another.

    From linen to nnx, from nnx to linen, or between two models that name their modules in other
    ways; Flax's own modules and those of normax have the same variables.

    Args:
      variables: a dict of linen, or `nnx.state(model)` of nnx.
      like: variables of the model to fill, of either kind.
      names: what modules of `like` are called in `variables`: a dict of paths; the longest path
        that begins a module's path is exchanged, and "" begins all. Or a function of a module's
        path. By default the names are the same.
      strict: refuse where any entry of either side is left over; otherwise it is only reported, and
        variables that are not filled stay as they are.

    Returns:
      Variables like those given, and a `Report`.

    Raises:
      ValueError: an entry is left over, or has another shape, and `strict`; two collections have a
        variable at one path.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, normax.interop, normax.nnx
      >>> from flax import nnx
      >>> variables = nn.BatchNorm(False).init(jax.random.key(0), jnp.ones((2, 3)))
      >>> model = normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> state, report = normax.interop.from_flax(variables, nnx.state(model))
      >>> nnx.update(model, state)
      >>> print(report)
      4 matched
    """
    check_names("from_flax", names)
    leaves = leaves_of(variables)
    source = {leaf.name: value for leaf, value in leaves}
    if len(source) < len(leaves):
        names_given = [leaf.name for leaf, _ in leaves]
        twice = sorted({name for name in names_given if names_given.count(name) > 1})
        raise ValueError(f"from_flax: expected variables of one name each, got several at {twice}")

    def pairing(leaf: Leaf) -> Pair:
        key = join("/", renamed(leaf.module, names, "/"), leaf.role)
        return Pair(key, lambda a: a, lambda a: a)

    return fill_flax("from_flax", source, like, pairing, strict)
