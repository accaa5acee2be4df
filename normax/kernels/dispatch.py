"""One function on one platform, another on another, decided where the program is lowered.

`jax.lax.platform_dependent` does this by a conditional, all of whose branches are lowered for all
platforms that a program is exported for. Here a branch is lowered for its own platform alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad

from normax.kernels import primitive as pr

DEFAULT = "default"


def by_platform(
    default: Callable[..., Any],
    *,
    tell_devices: bool = False,
    sharded: bool = False,
    **others: Callable[..., Any],
) -> Callable[..., Any]:
    """Returns a function that is `default`, or another one on the platforms that are named.

    It can be traced, batched, exported and differentiated. Its derivatives are those of `default`
    on every platform: for a kernel's own derivative, call this inside the rules of a `custom_jvp`.
    Outputs that nobody uses are dropped from a program.

    Args:
      default: function of arrays, in pytrees, that any platform can run. It and the others must
        not close over traced arrays. Static arguments go in by `functools.partial`, and can be
        hashed; partials of the same function and arguments are compiled once.
      tell_devices: where a partitioner spreads the program over several devices, call the functions
        with a keyword `devices`, their number.
      sharded: whether one of the functions calls a kernel that is `sharded`. The program is then
        lowered for devices that are known: not for an `AbstractMesh` alone, and for one mesh.
      **others: functions by platform: "cpu", "cuda", "rocm" or "tpu"; or by a kind of device, where
        it is known when lowered, no partitioner will see the program, and nothing is mapped:
        "hopper", of "cuda"; or by "exported_cuda" and its like, for a program that is exported.
        Each returns what `default` returns: the same tree, shapes and dtypes.

    Returns:
      A function of the same operands.

    Raises:
      TypeError: a function that cannot be hashed; when it is lowered, a function that returns
        another tree, shape or dtype than `default`.
    """
    default = pr.frozen(default)
    names = tuple(sorted(others))
    if not names:
        return default
    functions = {DEFAULT: default} | {name: pr.frozen(others[name]) for name in names}

    def chosen(*operands):
        leaves, tree = jax.tree.flatten(operands)
        shapes = pr.traced(_OfLeaves(default, tree), *leaves).out_info
        outputs, out_tree = jax.tree.flatten(shapes)
        types = tuple((out.shape, out.dtype) for out in outputs)
        branches = tuple(
            (name, Branch(name, function, tree, out_tree, types, tell_devices))
            for name, function in functions.items()
        )
        used = (True,) * len(outputs)
        devices = pr.devices() if sharded else None
        results = _primitive(names).bind(*leaves, branches=branches, used=used, devices=devices)
        return out_tree.unflatten(results)

    return chosen


@dataclasses.dataclass(frozen=True)
class _OfLeaves:
    function: Callable[..., Any]
    tree: Any

    def __call__(self, *leaves):
        return self.function(*self.tree.unflatten(leaves))


@dataclasses.dataclass(frozen=True)
class Branch:
    """The function of one platform, as one from arrays to those of its outputs that are used."""

    name: str
    function: Callable[..., Any]
    tree: Any
    out_tree: Any
    types: tuple[tuple[Any, Any], ...]
    tell_devices: bool

    def __call__(self, used, devices, *leaves):
        """Returns the outputs that are used."""
        told = {"devices": devices} if self.tell_devices and devices > 1 else {}
        outputs, tree = jax.tree.flatten(self.function(*self.tree.unflatten(leaves), **told))
        if tree != self.out_tree:
            raise self._refusal(self.out_tree, tree)
        for out, type_ in zip(outputs, self.types, strict=True):
            if pr.type_of(out) != type_:
                raise self._refusal(type_, pr.type_of(out))
        return [out for out, keep in zip(outputs, used, strict=True) if keep]

    def _refusal(self, expected, got):
        return TypeError(
            f"by_platform: expected the function for {self.name} to return what the default "
            f"returns, {expected}, got {got}"
        )


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A branch that is mapped over an axis."""

    branch: Any
    axis: pr.Axis
    dims: tuple[int | None, ...]

    def __call__(self, used, devices, *leaves):
        """Returns the outputs that are used, each led by the axis."""
        return self.axis.map(functools.partial(self.branch, used, devices), self.dims)(*leaves)


def _body(where, branches, used, devices):
    del devices
    branches = dict(branches)
    names = (name for name in where.names() if name in branches)
    return pr.Partial(branches[next(names, DEFAULT)], (used, where.devices), ())


@functools.cache
def _primitive(names: tuple[str, ...]) -> core.Primitive:
    """Returns the primitive whose lowering tells the named platforms apart, and no others."""
    primitive = pr.define("by_platform", _body, names)

    def jvp(primals, tangents, **params):
        outputs = primitive.bind(*primals, **params)
        return outputs, pr.tangent_of_part(_body(pr.ANYWHERE, **params), primals, tangents)

    def transpose(cotangents, *args, **params):
        linear = [ad.is_undefined_primal(arg) for arg in args]

        def function(*operands):
            operands = iter(operands)
            filled = (next(operands) if move else x for move, x in zip(linear, args, strict=True))
            return _body(pr.ANYWHERE, **params)(*filled)

        avals = [arg.aval for arg, move in zip(args, linear, strict=True) if move]
        moved = iter(
            jax.linear_transpose(function, *avals)([*map(ad.instantiate_zeros, cotangents)])
        )
        return [next(moved) if move else None for move in linear]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose

    @pr.on_batching(primitive)
    def batched(axis, dims, branches, **params):
        # What is for a kind of device was measured as it is, and not mapped.
        branches = tuple(
            (name, Mapped(branch, axis, tuple(dims)))
            for name, branch in branches
            if name not in pr.KINDS
        )
        return {"branches": branches, **params}

    return primitive
