"""Primitives made of functions: evaluated, typed and lowered by what a Python function does.

The functions are parameters of the primitive, so they are compared and hashed: equal ones share
what was traced and compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import AxisType

# Kinds of device that a function can be for, and their platforms. A kind is asked for only where no
# partitioner will see what is lowered: of one device, of axes that are explicit, or all manual.
KINDS = {"hopper": "cuda"}
EXPORTED = "exported_"  # before a platform: there, if the program is lowered to be exported


@dataclasses.dataclass(frozen=True)
class Where:
    """What a program is lowered for, as far as that is known.

    Attributes:
      platform: its name; None is any.
      kind: of `KINDS`, if it is of one.
      devices: over how many a partitioner may spread the program.
      exported: whether it is lowered to be exported.
    """

    platform: str | None = None
    kind: str | None = None
    devices: int = 1
    exported: bool = False

    def names(self) -> tuple[str | None, ...]:
        """Returns what a function for it may be named after, the closest first."""
        exported = f"{EXPORTED}{self.platform}" if self.exported else None
        return self.kind, exported, self.platform


ANYWHERE = Where()


@dataclasses.dataclass(frozen=True)
class Partial:
    """A `functools.partial` that equals another of the same function and arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args, **keywords):
        """Calls the function with its arguments and these."""
        return self.function(*self.args, *args, **{**dict(self.keywords), **keywords})


def frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function in a form that is compared by value; refuses what cannot be hashed."""
    if isinstance(function, functools.partial):
        args = tuple(frozen(arg) if callable(arg) else arg for arg in function.args)
        keywords = tuple(sorted(function.keywords.items()))
        function = Partial(frozen(function.func), args, keywords)
    try:
        hash(function)
    except TypeError as error:
        raise TypeError(
            f"expected static arguments that can be hashed, got one of {error}: "
            "arrays go in as operands"
        ) from error
    return function


_call = jax.jit(lambda function, *operands: function(*operands), static_argnums=0)


def traced(function: Callable[..., Any], *operands: Any) -> Any:
    """Returns what tracing the function gives, `jaxpr` and `out_info`; remembered."""
    return _call.trace(function, *operands)


def type_of(x: Any) -> tuple[Any, Any]:
    """Returns shape and dtype."""
    return jax.typeof(x).shape, jax.typeof(x).dtype


@functools.cache
def devices() -> Any:
    """Returns a jaxpr for a primitive to carry whose lowering may have to know the devices.

    JAX looks for `custom_partitioning` in a program to see whether it must say which they are.
    """
    function = custom_partitioning(lambda x: x)
    function.def_partition(None, sharding_rule="i -> i")
    return jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1,), jnp.float32)).jaxpr


def need_devices(jaxpr: Any) -> bool:
    """Returns whether a primitive within the jaxpr carries `devices()`."""
    return jaxpr is devices() or any(map(need_devices, core.subjaxprs(jaxpr)))


def define(name: str, body: Callable[..., Any], platforms: tuple[str, ...] = ()) -> core.Primitive:
    """Returns a primitive that does what `body(where, **params)`, a function of lists, does.

    Args:
      name: its name in a jaxpr.
      body: takes a `Where` and the parameters; returns a function that can be hashed. The one for
        `ANYWHERE` also gives the shapes.
      platforms: those to ask the body for, kinds of device, and names after `EXPORTED`; a
        platform's function is traced where it is lowered for that platform, and nowhere else.
    """
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    run = jax.jit(lambda params, *args: primitive.bind(*args, **dict(params)), static_argnums=0)

    def impl(*args, **params):
        with jax.disable_jit(False):
            return run(tuple(params.items()), *args)

    def abstract(*avals, **params):
        jaxpr = traced(body(ANYWHERE, **params), *avals).jaxpr
        return list(jaxpr.out_avals), jaxpr.effects

    def rule(platform, ctx, *args, **params):
        exported = ctx.module_context.lowering_parameters.for_export
        where = Where(platform, kind(platform, ctx), spread_over(ctx), exported)

        def function(*args):
            outputs = body(where, **params)(*args)
            return [sharded_as(out, aval) for out, aval in zip(outputs, ctx.avals_out, strict=True)]

        # What varies along manual axes was checked when traced; a kernel that is interpreted
        # loops over buffers that have no such type.
        plain = ctx.replace(avals_in=[_without_variation(aval) for aval in ctx.avals_in])
        return mlir.lower_fun(function, multiple_results=True)(plain, *args)

    primitive.def_impl(impl)
    primitive.def_effectful_abstract_eval(abstract)
    found = (KINDS.get(name, name.removeprefix(EXPORTED)) for name in platforms)
    for platform in dict.fromkeys([None, *found]):
        mlir.register_lowering(primitive, functools.partial(rule, platform), platform=platform)
    partial_eval.dce_rules[primitive] = _drop_unused
    return primitive


def kind(platform: str | None, ctx: Any) -> str | None:
    """Returns the kind of the devices that a program is lowered for, None if they are of none."""
    module = ctx.module_context
    backend = getattr(module, "backend", None)
    if platform != "cuda" or backend is None or module.lowering_parameters.for_export:
        return None
    found = {getattr(device, "compute_capability", None) for device in backend.local_devices()}
    return "hopper" if found == {"9.0"} and is_alone(ctx) else None


def spread_over(ctx: Any) -> int:
    """Returns over how many devices a partitioner may spread what is lowered."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        sizes = context.mesh.shape.items()
        return math.prod(size for name, size in sizes if name not in context.manual_axes)
    return getattr(context, "num_devices", None) or 1


def is_alone(ctx: Any) -> bool:
    """Returns whether no partitioner will see what is lowered."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return context.manual_axes == frozenset(context.mesh.axis_names)
    if getattr(context, "num_devices", None) == 1:
        return True
    meshes = [mesh for aval in ctx.avals_in if not (mesh := aval.sharding.mesh).empty]
    kinds = {type_ for mesh in meshes for type_ in mesh.axis_types}
    return kinds == {AxisType.Explicit}


def _drop_unused(used, *rest):
    """Binds again with the outputs that are used, where the primitive has a parameter `used`."""
    eqn = rest[-1]  # newer JAX says before it which inputs are live
    if not any(used):
        return [False] * len(eqn.invars), None
    if "used" in eqn.params and not all(used):
        params = eqn.params | {"used": narrowed(eqn.params["used"], used)}
        outvars = [var for var, keep in zip(eqn.outvars, used, strict=True) if keep]
        eqn = eqn.replace(params=params, outvars=outvars)
    return [True] * len(eqn.invars), eqn


def narrowed(mask: tuple[bool, ...], keep: Any) -> tuple[bool, ...]:
    """Returns the mask with those of its true entries that `keep`, one for each, keeps."""
    keep = iter(keep)
    return tuple(entry and bool(next(keep)) for entry in mask)


def without_dead_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of arrays, returning a list, less what its outputs do not need."""

    def run(*args):
        closed = jax.make_jaxpr(function)(*args)
        jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), True)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))(*args)

    return run


def _without_variation(aval):
    return ShapedArray(aval.shape, aval.dtype, aval.weak_type, sharding=aval.sharding)


def typed_as(x: jax.Array, aval: Any) -> jax.Array:
    """Returns `x` varying over the manual axes, and sharded over the explicit ones, of a type."""
    return sharded_as(varying(x, aval.manual_axis_type.varying), aval)


def in_front(size: int, mapped: Any, values: Any) -> Any:
    """Returns values with a mapped axis of that size in front, `mapped` telling which have it."""
    return jax.tree.map(
        lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)),
        values,
        mapped,
    )


def sharded_as(x: jax.Array, aval: Any) -> jax.Array:
    """Returns `x` sharded over the explicit axes of a type."""
    ours, theirs = jax.typeof(x).sharding, aval.sharding
    # What came from outside of a mesh has no layout there.
    return x if theirs.mesh.empty or ours.spec == theirs.spec else jax.reshard(x, theirs)


def varying(x: jax.Array, axes: Any) -> jax.Array:
    """Returns `x`, of a type that may differ along manual mesh axes."""
    more = tuple(sorted(set(axes) - set(axes_of(x))))
    return jax.lax.pcast(x, more, to="varying") if more else x


def spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `x` broadcast to the shape of another, varying along mesh axes as that does.

    It is made to vary while it is small: that transposes to a sum over devices. Where layouts are
    part of types it is laid out as the other is, or that would be gathered for the sum.
    """
    x, sharding = varying(x, axes_of(like)), jax.typeof(like).sharding
    placed = sharding if sharding.mesh.explicit_axes else None
    return jnp.broadcast_to(x, like.shape, out_sharding=placed)


def axes_of(x: Any) -> frozenset[str]:
    """Returns the manual mesh axes that `x` may differ along."""
    return jax.typeof(x).manual_axis_type.varying


def tangent_of_part(function: Callable[..., Any], primals: Any, tangents: Any) -> list[Any]:
    """Returns the tangents of the function's outputs; tangents may be symbolic zeros."""
    moved = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def partly(*some):
        some = iter(some)
        args = [next(some) if move else x for x, move in zip(primals, moved, strict=True)]
        return function(*args)

    pairs = [(x, t) for x, t, move in zip(primals, tangents, moved, strict=True) if move]
    _, moves = jax.jvp(partly, [x for x, _ in pairs], [t for _, t in pairs])
    return [
        ad.Zero(jax.typeof(move)) if move.dtype == jax.dtypes.float0 else move for move in moves
    ]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis that is mapped over, as `vmap` was told."""

    size: Any
    name: Any
    spmd_name: Any

    @classmethod
    def of(cls, data: Any) -> "Axis":
        """Returns the axis of a batching rule."""
        return cls(data.size, data.name, data.spmd_name)

    def map(self, function: Callable[..., Any], in_axes: Any, out_axes: Any = 0) -> Any:
        """Returns the function mapped over the axis."""
        return jax.vmap(
            function,
            in_axes,
            out_axes,
            axis_name=self.name,
            axis_size=self.size,
            spmd_axis_name=self.spmd_name,
        )


def on_batching(
    primitive: core.Primitive,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a batching rule `(axis, dims, **params) -> params`; all outputs lead with it.

    Where nothing is batched, and no collective names the axis, the primitive is bound as it was.
    """

    def register(batched):
        def rule(data, args, dims, **params):
            if all(dim is None for dim in dims):
                _, effects = primitive.abstract_eval(*map(jax.typeof, args), **params)
                if all(getattr(effect, "name", None) != data.name for effect in effects):
                    outputs = primitive.bind(*args, **params)
                    return outputs, [None] * len(outputs)
            outputs = primitive.bind(*args, **batched(Axis.of(data), dims, **params))
            return outputs, [0] * len(outputs)

        batching.fancy_primitive_batchers[primitive] = rule
        return batched

    return register
