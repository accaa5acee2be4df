"""Linear functions whose transpose is written by hand.

The transpose of a program that a compiler fuses well may be one that it does not, and a kernel has
none. `jax.custom_derivatives.linear_call` does the same, but cannot be batched.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from normax.kernels import primitive as pr


def linear(
    function: Callable[..., Any],
    transposed: Callable[..., Any],
    residuals: Any,
    operands: tuple[Any, ...],
) -> Any:
    """Returns `function(residuals, *operands)`, linear in the operands, with its transpose.

    In reverse mode the residuals are what is kept. The transpose is linear in turn, with `function`
    as its transpose. In the residuals both are differentiated as any other function.

    Args:
      function: takes the residuals and the operands; returns a pytree of arrays. An operand, or an
        array of it, that is None stands for zero. As in `by_platform`, neither function may close
        over traced arrays, and static arguments go in by `functools.partial`.
      transposed: takes the residuals and a cotangent, of the tree that `function` returns, where
        None stands for zero; returns a tuple of cotangents, one for each operand, None for zero.
        Those of operands that are None are not looked at. On several devices it returns what its
        own device adds, as if all operands differed among them.
      residuals: pytree of arrays.
      operands: tuple of pytrees of arrays.

    Raises:
      ValueError: no operand but None.
      TypeError: a function that cannot be hashed; a cotangent that is not of its operand's tree,
        shape and dtype.
    """
    known, known_tree = jax.tree.flatten(residuals)
    leaves, tree = jax.tree.flatten(operands, is_leaf=_is_none)
    present = tuple(leaf is not None for leaf in leaves)
    leaves = [leaf for leaf in leaves if leaf is not None]
    if not leaves:
        raise ValueError(f"linear: expected an operand that is not None, got {operands}")
    forward = Half("function", pr.frozen(function), known_tree, tree)
    shapes = pr.traced(_Whole(forward, len(known), present), *known, *leaves).out_info
    outputs, out_tree = jax.tree.flatten(shapes)
    given = iter(leaves)
    types = tuple(pr.type_of(next(given)) if there else None for there in present)
    results = _bind(
        known,
        leaves,
        function=dataclasses.replace(
            forward, out_tree=out_tree, types=tuple((out.shape, out.dtype) for out in outputs)
        ),
        transposed=Half(
            "transposed",
            pr.frozen(transposed),
            known_tree,
            jax.tree.structure((out_tree.unflatten(outputs),)),
            tree,
            types,
        ),
        count=len(known),
        present=present,
        used=(True,) * len(outputs),
    )
    return out_tree.unflatten(results)


def _is_none(leaf):
    return leaf is None


@dataclasses.dataclass(frozen=True)
class Half:
    """A linear function or its transpose, as one from arrays to arrays; None is zero."""

    name: str
    function: Callable[..., Any]
    known_tree: Any
    tree: Any
    out_tree: Any = None
    types: tuple[Any, ...] = ()

    def whole(self, known, leaves):
        """Returns what the function returns."""
        return self.function(self.known_tree.unflatten(known), *self.tree.unflatten(leaves))

    def __call__(self, known, leaves, wanted):
        """Returns the arrays that are wanted of the function's outputs."""
        outputs = self.whole(known, leaves)
        try:
            found = self.out_tree.flatten_up_to(outputs)
        except ValueError as error:
            raise self._refusal(self.out_tree, jax.tree.structure(outputs)) from error
        kept = []
        for leaf, type_, keep in zip(found, self.types, wanted, strict=True):
            if not keep:
                continue
            leaf = jnp.zeros(*type_) if leaf is None else leaf
            if not jax.tree_util.all_leaves([leaf]):
                raise self._refusal(self.out_tree, jax.tree.structure(outputs))
            if pr.type_of(leaf) != type_:
                raise self._refusal(type_, pr.type_of(leaf))
            kept.append(leaf)
        return kept

    def _refusal(self, expected, got):
        return TypeError(f"linear: expected `{self.name}` to return {expected}, got {got}")


@dataclasses.dataclass(frozen=True)
class MappedHalf:
    """A half that is mapped over an axis; outputs whose dim is None are summed over it."""

    half: Any
    axis: pr.Axis
    known_dims: tuple[int | None, ...]
    dims: tuple[int | None, ...]
    out_dims: tuple[int | None, ...]

    def __call__(self, known, leaves, wanted):
        """Returns the arrays that are wanted of the outputs."""
        dims = [dim for dim, keep in zip(self.out_dims, wanted, strict=True) if keep]
        outputs = self.axis.map(
            lambda known, leaves: self.half(known, leaves, wanted),
            (list(self.known_dims), list(self.dims)),
            [dim or 0 for dim in dims],
        )(list(known), list(leaves))
        return [
            jnp.sum(out, 0) if dim is None else out for out, dim in zip(outputs, dims, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _Whole:
    half: Half
    count: int
    present: tuple[bool, ...]

    def __call__(self, *args):
        return self.half.whole(args[: self.count], _filled(self.present, args[self.count :]))


@dataclasses.dataclass(frozen=True)
class Applied:
    """A half, as a function of the arrays that are there to those that are used."""

    half: Any
    count: int
    present: tuple[bool, ...]
    used: tuple[bool, ...]

    def __call__(self, *args):
        """Returns the outputs that are used."""

        def function(*args):
            leaves = _filled(self.present, args[self.count :])
            return self.half(args[: self.count], leaves, self.used)

        # What is not used is left out of the program.
        return (function if all(self.used) else pr.without_dead_code(function))(*args)


def _filled(present, leaves):
    leaves = iter(leaves)
    return [next(leaves) if there else None for there in present]


def _body(where, function, transposed, count, present, used, devices):
    del where, transposed, devices
    return Applied(function, count, present, used)


linear_p = pr.define("linear", _body)


def _bind(known, leaves, **params):
    # As if all differed among devices: then JAX sums the cotangents of those that do not.
    axes = frozenset[str]().union(*map(pr.axes_of, [*known, *leaves]))
    args = [*known, *(pr.varying(leaf, axes) for leaf in leaves)]
    jaxpr = pr.traced(_body(pr.ANYWHERE, **params, devices=None), *args).jaxpr
    return linear_p.bind(*args, **params, devices=pr.devices() if pr.need_devices(jaxpr) else None)


def _jvp(primals, tangents, *, count, present, devices, **params):
    outputs = linear_p.bind(*primals, count=count, present=present, devices=devices, **params)
    known, leaves = primals[:count], primals[count:]
    moves = []
    there = [not isinstance(tangent, ad.Zero) for tangent in tangents[count:]]
    if any(there):
        moving = [tangent for tangent, move in zip(tangents[count:], there, strict=True) if move]
        left = pr.narrowed(present, there)
        moves.append(_bind(known, moving, count=count, present=left, **params))
    if not all(isinstance(tangent, ad.Zero) for tangent in tangents[:count]):
        applied = _body(pr.ANYWHERE, count=count, present=present, devices=devices, **params)
        moves.append(
            pr.tangent_of_part(lambda *known: applied(*known, *leaves), known, tangents[:count])
        )
    return outputs, [functools.reduce(ad.add_tangents, pair) for pair in zip(*moves, strict=True)]


def _transpose(cotangents, *args, function, transposed, count, present, used, devices):
    del devices
    known, leaves = args[:count], args[count:]
    there = [not isinstance(cotangent, ad.Zero) for cotangent in cotangents]
    if not any(there):
        return [None] * len(args)
    results = _bind(
        known,
        [cotangent for cotangent, keep in zip(cotangents, there, strict=True) if keep],
        function=transposed,
        transposed=function,
        count=count,
        present=pr.narrowed(used, there),
        used=present,
    )
    moved = [pr.typed_as(ct, leaf.aval) for ct, leaf in zip(results, leaves, strict=True)]
    return [None] * count + moved


ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose


@pr.on_batching(linear_p)
def _batched(axis, dims, *, function, transposed, count, present, used, devices):
    known, dims = tuple(dims[:count]), tuple(_filled(present, dims[count:]))
    # All outputs lead with the axis, those too that `used` leaves out.
    leading = (0,) * len(used)
    return {
        "function": MappedHalf(function, axis, known, dims, leading),
        "transposed": MappedHalf(transposed, axis, known, leading, dims),
        "count": count,
        "present": present,
        "used": used,
        "devices": devices,
    }
