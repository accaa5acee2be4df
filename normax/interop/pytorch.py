"""Variables of Flax models from PyTorch's state dicts, and back."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normax import axes as ax
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

_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_NAMES |= {"mean": "running_mean", "var": "running_var"}
_HEADS = ("query", "key", "value")


def from_torch(
    state_dict: Mapping[str, Any] | str | os.PathLike,
    like: Any,
    *,
    names: Renaming = None,
    transposed: Iterable[str] = (),
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    strict: bool = True,
) -> tuple[Any, Report]:
    """Returns the variables of a Flax model, taken from a PyTorch state dict.

    Weights of Linear, Conv (grouped or not), ConvTranspose (not grouped: Flax has none) and
    Embedding change their layout; those of MultiheadAttention are split into heads; normalizers
    keep theirs. A momentum or an epsilon is no variable: `options_of` translates those. Values take
    the dtype of the variables.

    Args:
      state_dict: of arrays or tensors by name, or the path of a safetensors file.
      like: variables of the model: `model.init(...)` of linen, `nnx.state(model)` of nnx.
      names: what modules are called in PyTorch: a dict of paths in Flax, "block/norm", to those in
        PyTorch, "layer1.0.bn1"; the longest path that begins a module's path is exchanged, and ""
        begins all. Or a function of a module's path. By default the names are the same.
      transposed: paths in Flax of ConvTranspose layers, those without `transpose_kernel`.
      flattened: of a Dense that follows a flattened image: its path in Flax to the image's shape in
        PyTorch, channels first. PyTorch flattens channels first, Flax last.
      strict: refuse where any entry of either side is left over; otherwise it is only reported, and
        variables that are not filled stay as they are. `num_batches_tracked` never counts.

    Returns:
      Variables like those given, and a `Report`.

    Raises:
      ValueError: an entry is left over, or has another shape, and `strict`; a path that is none.
      TypeError: a state dict that is none, or variables that are a module.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, normax.interop
      >>> model = nn.Dense(2)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> state_dict = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
      >>> new, report = normax.interop.from_torch(state_dict, variables, names={"": "fc"})
      >>> print(report)
      2 matched
      >>> print(model.apply(new, jnp.ones((1, 3))))
      [[3. 3.]]
    """
    source = {k: v for k, v in _read("from_torch", state_dict).items() if not _is_step_counter(k)}
    pairing = _pairing("from_torch", source, like, names, transposed, flattened)
    return fill_flax("from_torch", source, like, pairing, strict)


def to_torch(
    variables: Any,
    like: Mapping[str, Any] | str | os.PathLike,
    *,
    names: Renaming = None,
    transposed: Iterable[str] = (),
    flattened: Mapping[str, tuple[int, ...]] | None = None,
    strict: bool = True,
) -> tuple[dict[str, np.ndarray], Report]:
    """Returns a PyTorch state dict, taken from the variables of a Flax model.

    What `from_torch` does, the other way. `safetensors.numpy.save_file` writes the result; PyTorch
    loads it by `model.load_state_dict({k: torch.tensor(v) for k, v in new.items()})`.

    Args:
      variables: of the model: a dict of linen, `nnx.state(model)` of nnx.
      like: a state dict of the PyTorch model, `model.state_dict()`, or a path of a safetensors
        file; it says names, shapes and dtypes, but bfloat16, which NumPy has not, is float32.
      names: as in `from_torch`: of paths in Flax to those in PyTorch.
      transposed: as in `from_torch`.
      flattened: as in `from_torch`.
      strict: as in `from_torch`. `num_batches_tracked` stays as it is.

    Returns:
      NumPy arrays by name, and a `Report`.

    Raises:
      ValueError: an entry is left over, or has another shape, and `strict`; a path that is none.
      TypeError: a state dict that is none, or variables that are a module.

    Example:
      >>> import jax.numpy as jnp, numpy as np, normax.interop
      >>> variables = {"params": {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
      >>> like = {"fc.weight": np.zeros((2, 3)), "fc.bias": np.zeros(2)}
      >>> new, _ = normax.interop.to_torch(variables, like)
      >>> new["fc.weight"].shape
      (2, 3)
    """
    entries = _read("to_torch", like)
    pairing = _pairing("to_torch", entries, variables, names, transposed, flattened)
    kept = filter(_is_step_counter, entries)
    return fill_entries("to_torch", variables, entries, pairing, strict, kept)


def _read(name, state_dict):
    """Returns a state dict, from a file where it is a path."""
    if isinstance(state_dict, Mapping):
        return state_dict
    if not isinstance(state_dict, str | os.PathLike):
        raise TypeError(
            f"{name}: expected a state dict or the path of a safetensors file, got "
            f"{type(state_dict).__name__}; a module's is module.state_dict()"
        )
    import safetensors.numpy  # an optional dependency

    try:
        return safetensors.numpy.load_file(state_dict)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{name}: expected the path of a safetensors file, got {os.fspath(state_dict)!r} "
            f"({error}); of PyTorch's own give torch.load(path, weights_only=True)"
        ) from None


def _to_images(name, flattened, variables):
    """Returns the shapes of images by the paths of the layers that they are flattened for."""
    if flattened is None:
        return {}
    if not isinstance(flattened, Mapping):
        raise TypeError(f"{name}: expected flattened to be a dict of shapes, got {flattened!r}")
    paths = to_paths(name, "flattened", flattened, variables)
    return {p: ax.to_positive_ints(name, f"flattened[{p!r}]", flattened[p]) for p in paths}


def _is_step_counter(key):
    """Returns whether a key is PyTorch's own, without a counterpart whatever the model."""
    return key.rsplit(".", 1)[-1] == "num_batches_tracked"


def _pairing(name, entries, variables, names, transposed, flattened):
    """Returns the function from a variable to its entry."""
    check_names(name, names)
    transposed = to_paths(name, "transposed", transposed, variables)
    images = _to_images(name, flattened, variables)

    def pairing(leaf: Leaf) -> Pair | None:
        if leaf.role not in _NAMES:
            return None
        key, part = _key(leaf, names, entries)
        if key not in entries:
            return None
        rank = np.ndim(entries[key])
        if leaf.role != "kernel":
            return Pair(key, *_vector(leaf.shape, rank), part)
        if rank == 2:
            rows = np.shape(entries[key])[0] // part[1], np.shape(entries[key])[1]
            return Pair(key, *_matrix(leaf.shape, rows, images.get(leaf.module)), part)
        return Pair(key, *_convolution(rank, leaf.module in transposed), part)

    return pairing


def _key(leaf, names, entries):
    """Returns the name of a variable's entry, and which part of it is meant."""
    module, word = renamed(leaf.module, names, "."), _NAMES[leaf.role]
    key = join(".", module, word)
    if key in entries:
        return key, (0, 1)
    parent, _, last = leaf.module.rpartition("/")
    parent = renamed(parent, names, ".")
    if last in _HEADS:
        separate = join(".", parent, f"{last[0]}_proj_weight")
        if leaf.role == "kernel" and separate in entries:
            return separate, (0, 1)
        return join(".", parent, f"in_proj_{word}"), (_HEADS.index(last), 3)
    if last == "out":
        return join(".", parent, "out_proj", word), (0, 1)
    return key, (0, 1)


def _vector(shape, rank):
    """Returns the ways of what has one layout in both; the biases of heads are one row there."""
    if rank != 1:
        return (lambda a: a), (lambda a: a)
    return (lambda a: a.reshape(shape)), (lambda a: a.reshape(-1))


def _matrix(shape, rows, image):
    """Returns the ways of a dense kernel: (out, in) there, (in, out) in some axes here."""
    image = None if image is None else (rows[0], *image)

    def inward(a):
        a = a if image is None else np.moveaxis(a.reshape(image), 1, -1).reshape(a.shape)
        return a.T if len(shape) == 2 else a.T.reshape(shape)

    def outward(a):
        a = (a if a.ndim == 2 else a.reshape(rows[::-1])).T
        if image is None:
            return a
        return np.moveaxis(a.reshape(image[0], *image[2:], image[1]), -1, 1).reshape(rows)

    return inward, outward


def _convolution(rank, transposed):
    """Returns the ways of a kernel: (out, in, *window) there, (*window, in, out) here.

    That of a ConvTranspose is (in, out, *window), and the window the other way round.
    """
    window = tuple(range(2, rank))
    order = (*window, 0, 1) if transposed else (*window, 1, 0)
    turned = tuple(range(rank - 2)) if transposed else ()
    inward = lambda a: np.flip(a.transpose(order), turned)  # noqa: E731
    outward = lambda a: np.flip(a, turned).transpose(np.argsort(order))  # noqa: E731
    return inward, outward
