"""Which batch norm of a model stands alone with which layer, by the graph of the computation."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_MARKS = ("enter", "leave", "norm", "own")
_NO_LAYER = (
    "no layer is alone with it, or only one of weights that would lose digits, or one behind that "
    "pads or computes in 16 bits, or behind an activation"
)


@dataclasses.dataclass
class Seen:
    """A norm or layer as it was called.

    Attributes:
      is_norm: whether it is a norm, or else a layer.
      why_not: why it cannot take part, or nothing.
      takes_any_input: of a layer: whether what it sums up is all of its input, and in 32 bits.
      dtype: of a norm: that of its output.
    """

    is_norm: bool
    why_not: str = ""
    takes_any_input: bool = False
    dtype: Any = None


class Site(NamedTuple):
    """A batch norm beside the layer that is to take it, which is behind it or before."""

    norm: str
    layer: str
    is_behind: bool


def marked(word: str, path: str, x: jax.Array) -> jax.Array:
    """Returns `x`, marked in the graph.

    Args:
      word: "enter" or "leave" a layer, go through a "norm"; or be a module's "own", where what is
        returned need not be used.
      path: of the module.
      x: what is marked.
    """
    return checkpoint_name(x, f"{word} {path}")


def plan(
    jaxpr: core.Jaxpr, seen: Mapping[str, Seen], own: Mapping[str, list[int]]
) -> tuple[list[Site], tuple[tuple[str, str], ...]]:
    """Returns which batch norm goes into which layer, and why others stay.

    Args:
      jaxpr: graph of the model, with the marks.
      seen: each norm and layer by its path.
      own: by its path, at which place of the graph's inputs each of its variables is.
    """
    marks = list(_marks(jaxpr))
    times = Counter(mark for mark, *_ in marks)
    before = {path: mark or ("", "") for (_, path), mark, _ in marks}
    behind = {path: mark or ("", "") for (_, path), _, mark in marks}

    def is_free(path):
        """Returns whether a layer is called once, and alone has its variables."""
        return (
            path in seen
            and not seen[path].why_not
            and times["enter", path] == times["leave", path] == 1
            and belongs(jaxpr, own[path], path, times=1)
        )

    sites, left, taken = [], [], set()
    for path in (path for path, each in seen.items() if each.is_norm):
        word, layer = before.get(path, ("", ""))
        next_word, follower = behind.get(path, ("", ""))
        if seen[path].why_not:
            left.append((path, seen[path].why_not))
        elif times["norm", path] != 1:
            left.append((path, "it is called more than once"))
        elif not belongs(jaxpr, own[path], path, times=0):
            left.append((path, "its variables are used elsewhere"))
        elif word == "leave" and is_free(layer):
            sites.append(Site(path, layer, is_behind=False))
        elif (
            next_word == "enter"
            and is_free(follower)
            and follower not in taken
            and seen[follower].takes_any_input
        ):
            sites.append(Site(path, follower, is_behind=True))
            taken.add(follower)
        else:
            left.append((path, _NO_LAYER))
    # A layer with a norm on either side: first what it is given, then what it gives.
    return sorted(sites, key=lambda site: not site.is_behind), tuple(left)


def belongs(
    jaxpr: core.Jaxpr, places: Sequence[int], path: str, times: float | None = None
) -> bool:
    """Returns whether some inputs are a module's own, unchanged, and read so often at most.

    None is as often as the module is called.
    """
    found = [readers(jaxpr, jaxpr.invars[place]) for place in places]
    return all(
        set(owners) == {path} and number <= (owners[path] if times is None else times)
        for number, owners in found
    )


def readers(
    jaxpr: core.Jaxpr, variable: core.Var, outputs: Sequence[float] | None = None
) -> tuple[float, Counter[str]]:
    """Returns how often a graph reads a variable, and how often which module has it as its own.

    Args:
      jaxpr: the graph.
      variable: one of its variables.
      outputs: how often each of its outputs is read; None is once.

    Returns:
      The number of times it is read, inf where that cannot be told, other than by marks; and how
      often it is marked as a module's own, unchanged.
    """
    outputs = [1.0] * len(jaxpr.outvars) if outputs is None else outputs
    number = sum(n for out, n in zip(jaxpr.outvars, outputs, strict=True) if out is variable)
    owners: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        places = [i for i, v in enumerate(eqn.invars) if v is variable]
        inner, mark = list(_inner(eqn)), _mark(eqn)
        if places and mark and mark[0] == "own":
            owners[mark[1]] += 1
        elif not places or not inner:
            number += len(places)
        elif len(inner) == 1 and _fits(inner[0], eqn):
            # nnx gives back the state of a compiled part, whether it changed or not.
            read = [readers(jaxpr, out, outputs)[0] for out in eqn.outvars]
            for i in places:
                times, marks = readers(inner[0], inner[0].invars[i], read)
                number += times
                owners += marks
        else:
            number = math.inf
    return number, owners


def _fits(inner, eqn):
    """Returns whether the inputs and outputs of an operation are those of the graph within it."""
    return (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars))


def _marks(jaxpr: core.Jaxpr) -> Iterator[tuple]:
    """Yields each mark of a graph, the mark its input comes from, and the one its output goes to.

    None stands for another operation, and for an output that goes to more than one place.
    """
    made: dict[Any, tuple] = {}
    taken: dict[Any, tuple] = {}
    used: Counter[Any] = Counter(
        v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, core.Var)
    )
    used.update(v for v in jaxpr.outvars if isinstance(v, core.Var))
    found = [(mark, eqn) for eqn in jaxpr.eqns if (mark := _mark(eqn)) and mark[0] != "own"]
    for mark, eqn in found:
        made[eqn.outvars[0]] = mark
        taken[eqn.invars[0]] = mark
    for mark, eqn in found:
        (source,), (out,) = eqn.invars, eqn.outvars
        yield (
            mark,
            made.get(source) if used[source] == 1 else None,
            taken.get(out) if used[out] == 1 else None,
        )
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            yield from _marks(inner)


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
    """Yields the graphs within an operation."""
    kinds = core.Jaxpr | core.ClosedJaxpr
    parts = list(eqn.params.values())
    for part in jax.tree.leaves(parts, is_leaf=lambda value: isinstance(value, kinds)):
        if isinstance(part, kinds):
            yield getattr(part, "jaxpr", part)


def _mark(eqn: Any) -> tuple[str, str] | None:
    """Returns the word and path of an operation that is a mark."""
    word, _, path = str(eqn.params.get("name", "")).partition(" ")
    return (word, path) if eqn.primitive.name == "name" and word in _MARKS else None
