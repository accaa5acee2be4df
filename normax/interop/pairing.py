"""Each variable of a Flax model beside its entry elsewhere, and what is left over."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from normax.regularize import names_of

COLLECTIONS = ("params", "batch_stats")
Renaming = Mapping[str, str] | Callable[[str], str] | None
Array = np.ndarray


class Report(NamedTuple):
    """What a conversion did with every entry of either side.

    Attributes:
      matched: pairs of an entry that was filled and the one it was filled from.
      missing: entries to fill that have no counterpart; they keep what they were.
      unused: entries that nothing was filled from.
      mismatched: pairs whose shapes do not belong together, as text; they keep what they were.
    """

    matched: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        """Returns what did not match, a line each."""
        lines = [f"{len(self.matched)} matched"]
        for word, entries in (("missing", self.missing), ("unused", self.unused)):
            lines += [f"{word}: {entry}" for entry in entries]
        return "\n".join([*lines, *(f"mismatched: {text}" for text in self.mismatched)])


class Leaf(NamedTuple):
    """A variable of a Flax model."""

    module: str
    role: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The variable's path."""
        return join("/", self.module, self.role)


class Pair(NamedTuple):
    """A variable and the entry it belongs to: the entry's key, and how one becomes the other.

    `inward` makes the variable of its part of the entry, `outward` that part of the variable;
    `part` is which of how many equal parts along the entry's first axis.
    """

    key: str
    inward: Callable[[Array], Array]
    outward: Callable[[Array], Array]
    part: tuple[int, int] = (0, 1)


Pairing = Callable[[Leaf], Pair | None]


def join(separator: str, *names: str) -> str:
    """Returns the names that are not empty, joined."""
    return separator.join(name for name in names if name)


def renamed(module: str, names: Renaming, separator: str) -> str:
    """Returns what a module is called elsewhere: by a function, or by its longest known prefix."""
    if callable(names):
        return names(module)
    parts = module.split("/") if module else []
    for length in range(len(parts), -1, -1):
        prefix = "/".join(parts[:length])
        if names is not None and prefix in names:
            return join(separator, names[prefix], *parts[length:])
    return join(separator, *parts)


def leaves_of(variables: Any) -> list[tuple[Leaf, Any]]:
    """Returns the variables of a linen or nnx model; random keys of nnx are none."""
    if isinstance(variables, nnx.Module | linen.Module):
        raise TypeError(
            f"expected the variables of a model, got the {type(variables).__name__} itself; they "
            "are nnx.state(model), or what model.init(...) of linen gave"
        )
    found = []
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    for path, value in jax.tree.leaves_with_path(variables, is_leaf=is_variable):
        if not isinstance(value, nnx.RngState):
            value = value.get_value() if isinstance(value, nnx.Variable) else value
            names = names_of(path)
            *module, role = names[1:] if names[0] in COLLECTIONS and len(names) > 1 else names
            found.append((Leaf("/".join(module), role, np.shape(value)), value))
    return found


def fill_flax(
    name: str, source: Mapping[str, Any], like: Any, pairing: Pairing, strict: bool
) -> tuple[Any, Report]:
    """Returns variables like those of a model, filled from the entries; and the report."""
    values, matched, missing, mismatched, used = {}, [], [], [], set()
    for leaf, old in leaves_of(like):
        pair = pairing(leaf)
        if pair is None or pair.key not in source:
            missing.append(leaf.name)
            continue
        used.add(pair.key)
        entry = to_numpy(source[pair.key])
        dtype = jnp.result_type(old)
        new = _converted(pair.inward, _part(entry, pair.part), leaf.shape, dtype)
        if new is None:
            mismatched.append(f"{leaf.name} of {leaf.shape}, {pair.key} of {entry.shape}")
            continue
        values[leaf.name] = jnp.asarray(new).astype(dtype)
        matched.append((leaf.name, pair.key))
    unused = tuple(key for key in source if key not in used)
    report = Report(tuple(matched), tuple(missing), unused, tuple(mismatched))
    _check(name, report, strict)
    return _rebuilt(like, values), report


def fill_entries(
    name: str,
    variables: Any,
    like: Mapping[str, Any],
    pairing: Pairing,
    strict: bool,
    kept: Iterable[str] = (),
) -> tuple[dict[str, Array], Report]:
    """Returns entries like those given, filled from the variables, and `kept`; and the report."""
    new = {key: to_numpy(value).copy() for key, value in like.items()}
    filled: dict[str, set] = {key: set() for key in kept}
    matched, unused, mismatched = [], [], []
    for leaf, value in leaves_of(variables):
        pair = pairing(leaf)
        if pair is None or pair.key not in new:
            unused.append(leaf.name)
            continue
        place = _part(new[pair.key], pair.part)
        part = _converted(pair.outward, to_numpy(value), place.shape, place.dtype)
        # Two variables of one entry, as tied weights are, must be one.
        again = pair.part in filled.setdefault(pair.key, set())
        filled[pair.key].add(pair.part)
        if part is None or (again and not np.array_equal(place, part.astype(place.dtype))):
            mismatched.append(f"{pair.key} of {new[pair.key].shape}, {leaf.name} of {leaf.shape}")
            continue
        place[...] = part
        matched.append((pair.key, leaf.name))
    missing = [key for key in new if key not in filled]
    missing += [
        f"{key}, {parts - len(found)} of its {parts} parts"
        for key, found in filled.items()
        for parts in {parts for _, parts in found}
        if len(found) < parts
    ]
    report = Report(tuple(matched), tuple(missing), tuple(unused), tuple(mismatched))
    _check(name, report, strict)
    return new, report


def check_names(name: str, names: Renaming) -> None:
    """Refuses what says no names of modules."""
    if names is None or callable(names):
        return
    if not isinstance(names, Mapping) or not all(isinstance(new, str) for new in names.values()):
        raise TypeError(
            f"{name}: expected names to be a dict of strings, a function or None, got {names!r}"
        )


def to_paths(name: str, label: str, paths: Iterable[str], variables: Any) -> tuple[str, ...]:
    """Returns the paths of several modules that the model has."""
    modules = {leaf.module for leaf, _ in leaves_of(variables)}
    several = isinstance(paths, Iterable) and not isinstance(paths, str)
    found: tuple[Any, ...] = tuple(paths) if several else (paths,)
    unknown = [path for path in found if not (several and path in modules)]
    if unknown:
        raise ValueError(
            f"{name}: expected {label} to be paths of modules, such as {sorted(modules)[:3]}, "
            f"got {unknown}"
        )
    return found


def to_numpy(value: Any) -> Array:
    """Returns an array or tensor as a NumPy array; bfloat16 tensors as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def _part(entry, part):
    """Returns a view of one of several equal parts along the first axis."""
    index, parts = part
    if parts == 1:
        return entry
    size = entry.shape[0] // parts
    return entry[index * size : (index + 1) * size]


def _converted(way, array, shape, dtype):
    """Returns what a conversion gives; None of another shape, or complex where dtype is real."""
    try:
        new = way(array)
    except ValueError:  # NumPy's, of a reshape or transpose
        return None
    fits = not np.iscomplexobj(new) or jnp.issubdtype(dtype, jnp.complexfloating)
    return new if fits and new.shape == shape else None


def _check(name, report, strict):
    """Refuses a conversion that left anything over."""
    if strict and (report.missing or report.unused or report.mismatched):
        raise ValueError(
            f"{name}: expected every entry to have its counterpart, got the following; name those "
            f"that differ with names, or pass strict=False\n{report}"
        )


def _rebuilt(like, values):
    """Returns the variables with new values where there are any."""
    queue = [values.get(leaf.name) for leaf, _ in leaves_of(like)][::-1]
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731

    def new(old):
        if isinstance(old, nnx.RngState):
            return old
        value = queue.pop()
        if value is None:
            return old
        return old.replace(value) if isinstance(old, nnx.Variable) else value

    return jax.tree.map(new, like, is_leaf=is_variable)
