"""Variables of Flax models from the weights of Keras models, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normax.interop.pairing import (
    Leaf,
    Pair,
    Renaming,
    Report,
    check_names,
    fill_entries,
    fill_flax,
    join,
    renamed,
    to_paths,
)

_NAMES = {"kernel": ("kernel",), "bias": ("bias", "beta"), "scale": ("gamma", "scale")}
_NAMES |= {"mean": ("moving_mean",), "var": ("moving_variance",), "embedding": ("embeddings",)}


def from_keras(
    weights: Any,
    like: Any,
    *,
    names: Renaming = None,
    transposed: Iterable[str] = (),
    strict: bool = True,
) -> tuple[Any, Report]:
    """Returns the variables of a Flax model, taken from the weights of a Keras model.

    Weights of Dense, Conv, DepthwiseConv, ConvTranspose, Embedding, MultiHeadAttention and the
    normalizations. A momentum or an epsilon is no variable: `options_of` translates those. Values
    take the dtype of the variables.

    Args:
      weights: a Keras model or layer, or its weights by their paths, `{w.path: w for w in ...}`.
      like: variables of the model: `model.init(...)` of linen, `nnx.state(model)` of nnx.
      names: what modules are called in Keras: a dict of paths in Flax to those in Keras; the
        longest path that begins a module's path is exchanged, and "" begins all. Or a function of
        a module's path. By default the names are the same.
      transposed: paths in Flax of ConvTranspose layers, those without `transpose_kernel`.
      strict: refuse where any entry of either side is left over; otherwise it is only reported, and
        variables that are not filled stay as they are.

    Returns:
      Variables like those given, and a `Report`.

    Raises:
      ValueError: an entry is left over, or has another shape, and `strict`; two weights of
        one path.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, normax.interop, normax.linen as nn
      >>> variables = nn.LayerNorm(epsilon=1e-3).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> weights = {"norm/gamma": np.full(3, 2.0), "norm/beta": np.zeros(3)}
      >>> new, report = normax.interop.from_keras(weights, variables, names={"": "norm"})
      >>> print(report, new["params"]["scale"])
      2 matched [2. 2. 2.]
    """
    source = _read("from_keras", weights)
    check_names("from_keras", names)
    transposed = to_paths("from_keras", "transposed", transposed, like)
    pairing = _pairing(source, names, transposed)
    return fill_flax("from_keras", source, like, pairing, strict)


def to_keras(
    variables: Any,
    like: Any,
    *,
    names: Renaming = None,
    transposed: Iterable[str] = (),
    strict: bool = True,
) -> tuple[dict[str, np.ndarray], Report]:
    """Returns weights of a Keras model by their paths, taken from the variables of a Flax model.

    What `from_keras` does, the other way. Keras takes them by
    `for w in model.weights: w.assign(new[w.path])`.

    Args:
      variables: of the model: a dict of linen, `nnx.state(model)` of nnx.
      like: the Keras model or layer, or its weights by their paths; it says names and shapes.
      names: as in `from_keras`: of paths in Flax to those in Keras.
      transposed: as in `from_keras`.
      strict: as in `from_keras`.

    Returns:
      NumPy arrays by path, and a `Report`.

    Raises:
      ValueError: an entry is left over, or has another shape, and `strict`; two weights of
        one path.

    Example:
      >>> import jax.numpy as jnp, numpy as np, normax.interop
      >>> variables = {"params": {"norm": {"scale": jnp.full(3, 2.0)}}}
      >>> new, _ = normax.interop.to_keras(variables, {"norm/gamma": np.ones(3)})
      >>> print(new["norm/gamma"])
      [2. 2. 2.]
    """
    entries = _read("to_keras", like)
    check_names("to_keras", names)
    transposed = to_paths("to_keras", "transposed", transposed, variables)
    pairing = _pairing(entries, names, transposed)
    return fill_entries("to_keras", variables, entries, pairing, strict)


def _read(name, weights):
    """Returns weights by their paths."""
    if isinstance(weights, Mapping):
        return weights
    if not hasattr(weights, "weights"):
        raise TypeError(
            f"{name}: expected a Keras model, or arrays by their paths, got {weights!r}"
        )
    entries = {weight.path: np.asarray(weight.value) for weight in weights.weights}
    if len(entries) < len(weights.weights):
        raise ValueError(
            f"{name}: expected each weight to have a path of its own, got "
            f"{sorted(weight.path for weight in weights.weights)}; name the layers"
        )
    return entries


def _pairing(entries, names, transposed):
    """Returns the function from a variable to its entry."""

    def pairing(leaf: Leaf) -> Pair | None:
        modules = [renamed(leaf.module, names, "/")]
        parent, _, last = leaf.module.rpartition("/")
        if last == "out":
            modules.append(join("/", renamed(parent, names, "/"), "attention_output"))
        for module in modules:
            for word in _NAMES.get(leaf.role, ()):
                key = join("/", module, word)
                if key in entries:
                    shape = np.shape(entries[key])
                    return Pair(key, *_ways(leaf, shape, leaf.module in transposed))
        return None

    return pairing


def _ways(leaf, shape, transposed):
    """Returns the ways of an entry: one layout in both, but for two kinds of convolution."""
    if leaf.role == "kernel" and transposed:
        turned = tuple(range(len(shape) - 2))
        way = lambda a: np.flip(a, turned).swapaxes(-1, -2)  # noqa: E731
        return way, way
    depthwise = leaf.role == "kernel" and len(shape) > 2 and leaf.shape[-2:-1] == (1,)
    if depthwise and leaf.shape[-1] == shape[-2] * shape[-1]:
        return (lambda a: a.reshape(leaf.shape)), (lambda a: a.reshape(shape))
    return (lambda a: a), (lambda a: a)
