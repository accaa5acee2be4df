"""Keeps the operands of a kernel sharded, which the compiler cannot look into.

A partitioner that meets an opaque call gathers its operands. Here a rule names the axes of operands
and outputs, each device runs the kernel on its part, and outputs that are sums are added up.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normax import pool
from normax.kernels import layouts
from normax.kernels import primitive as pr

Names = tuple[str, ...]


def sharded(
    kernel: Callable[..., Any],
    rule: str,
    whole: str = "",
    together: Callable[[tuple[str, ...], list[jax.Array]], list[jax.Array]] | None = None,
    alone: bool = False,
) -> Callable[..., jax.Array | tuple[jax.Array, ...]]:
    """Returns a kernel that runs on each device's part of its operands.

    Under jit with automatic axes it is partitioned by the rule, with explicit axes by a `shard_map`
    over their mesh, and within a `shard_map` it runs as it is, on what the device has: sums are
    then those of the device. It has no derivative: call it in a branch of `by_platform`.

    Args:
      kernel: function of arrays to an array or a tuple of them, of any sizes along the axes that
        may be sharded, without collectives. As in `by_platform`, it must not close over traced
        arrays.
      rule: names of the axes of each operand and each output, such as "... d, d -> ... d, d". Axes
        of one name are sharded alike; "..." are any number of axes, the same in each. An output
        that lacks an axis is a sum over it.
      whole: names of axes that the kernel needs whole: they are gathered.
      together: what outputs of several devices, none of which has the axes that were sharded, are
        taken together, if they are no sums: function of the mesh's axes and the outputs.
      alone: whether it is known that no partitioner will see it.

    Raises:
      ValueError: when called, operands or outputs that the rule does not fit.
    """
    together = together if together is None else pr.frozen(together)
    return Sharded(pr.frozen(kernel), rule, frozenset(whole.split()), together, alone)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A kernel with the rule by which its operands are sharded."""

    kernel: Callable[..., Any]
    rule: str
    whole: frozenset[str]
    together: Callable[..., Any] | None = None
    alone: bool = False

    def __call__(self, *operands):
        """Calls the kernel, placed as its operands are."""
        inputs, outputs = (
            [tuple(axes.split()) for axes in side.split(",")] for side in self.rule.split("->")
        )
        if len(inputs) != len(operands):
            raise ValueError(f"sharded: expected operands {self.rule}, got {len(operands)}")
        rows = {
            x.ndim + 1 - len(names)
            for names, x in zip(inputs, operands, strict=True)
            if "..." in names
        }
        rows = rows.pop() if len(rows) == 1 else -1
        placed = [_expanded(names, rows) for names in inputs]
        for names, x in zip(placed, operands, strict=True):
            if len(names) != x.ndim:
                shapes = [x.shape for x in operands]
                raise ValueError(f"sharded: expected operands {self.rule}, got shapes {shapes}")
        results = [_expanded(names, rows) for names in outputs]
        results = sharded_p.bind(
            *operands,
            kernel=_Listed(self.kernel, self.rule, tuple(map(len, results))),
            placement=Placement(
                tuple(placed), tuple(results), self.whole, self.together, self.alone
            ),
            devices=pr.devices(),
        )
        return results[0] if len(results) == 1 else tuple(results)


def _expanded(names, rows):
    every = (tuple(f"row{i}" for i in range(rows)) if name == "..." else (name,) for name in names)
    return tuple(itertools.chain(*every))


@dataclasses.dataclass(frozen=True)
class _Listed:
    kernel: Callable[..., Any]
    rule: str
    ranks: tuple[int, ...]

    def __call__(self, *operands):
        outputs = jax.tree.leaves(self.kernel(*operands))
        if tuple(out.ndim for out in outputs) != self.ranks:
            shapes = [out.shape for out in outputs]
            raise ValueError(f"sharded: expected outputs {self.rule}, got shapes {shapes}")
        return outputs


@dataclasses.dataclass(frozen=True)
class Placement:
    """The names of all axes of operands and outputs, and those that must be whole."""

    inputs: tuple[Names, ...]
    outputs: tuple[Names, ...]
    whole: frozenset[str]
    together: Callable[..., Any] | None = None
    alone: bool = False

    def joined(self, kernel, sums, *operands):
        """Returns the outputs of a kernel, those of all devices together."""
        outputs = kernel(*operands)
        if self.together is not None and any(sums):
            return self.together(sums[0], list(outputs))
        return [
            jax.lax.psum(out, axes) if axes else out
            for out, axes in zip(outputs, sums, strict=True)
        ]

    def batched(self, dims):
        """Returns the placement with an axis more, at `dims` of the operands, leading outputs."""
        new = f"batch{sum(name.startswith('batch') for name in self.outputs[0])}"
        inputs = (
            names if dim is None else (*names[:dim], new, *names[dim:])
            for names, dim in zip(self.inputs, dims, strict=True)
        )
        outputs = tuple((new, *names) for names in self.outputs)
        return dataclasses.replace(self, inputs=tuple(inputs), outputs=outputs)

    def rule(self):
        """Returns the names in the notation of `custom_partitioning`."""
        sides = (", ".join(map(" ".join, side)) for side in (self.inputs, self.outputs))
        return " -> ".join(sides)

    def mesh_axes(self, mesh, shapes, specs):
        """Returns the mesh axes along which each named axis is sharded."""
        chosen = {}
        for names, shape, spec in zip(self.inputs, shapes, specs, strict=True):
            for name, size, axes in zip(names, shape, spec, strict=False):
                axes = pool.names_of(axes)
                taken = set(itertools.chain(*chosen.values()))
                # A part that is padded would be summed, too.
                even = size % math.prod(mesh.shape[axis] for axis in axes) == 0
                if even and name not in self.whole | chosen.keys() and not taken & set(axes):
                    chosen |= {name: axes} if axes else {}
        return chosen

    def specs(self, chosen):
        """Returns specs of operands and outputs, and the mesh axes to sum each output over."""
        inputs, outputs = (
            [PartitionSpec(*(chosen.get(name) for name in names)) for names in side]
            for side in (self.inputs, self.outputs)
        )
        sums = [
            tuple(axis for name in chosen if name not in names for axis in chosen[name])
            for names in self.outputs
        ]
        return inputs, outputs, sums


@dataclasses.dataclass(frozen=True)
class _Placed:
    kernel: Callable[..., Any]
    placement: Placement

    def __call__(self, *operands):
        types = [jax.typeof(x).sharding for x in operands]
        meshes = [type_.mesh for type_ in types if AxisType.Explicit in type_.mesh.axis_types]
        mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        free = {axis for axis, kind in kinds.items() if kind != AxisType.Manual}
        if kinds and not free:
            # A kernel's operands, and so its outputs, vary along the same axes.
            axes = frozenset[str]().union(*map(pr.axes_of, operands))
            outputs = self.kernel(*(pr.varying(x, axes) for x in operands))
            return [pr.varying(out, axes) for out in outputs]
        if not meshes and len(free) == len(kinds):
            if self.placement.alone:
                return self.kernel(*operands)
            return _partitioned(self.kernel, self.placement)(*operands)
        # Explicit axes have a type that says how they are sharded. Automatic ones beside manual
        # ones have none, and here no partitioner to ask: along these all is gathered.
        chosen = self.placement.mesh_axes(
            mesh, [x.shape for x in operands], [type_.spec for type_ in types]
        )
        inputs, outputs, sums = self.placement.specs(chosen)
        if meshes:
            operands = [
                x if type_.spec == spec else jax.reshard(x, NamedSharding(mesh, spec))
                for x, type_, spec in zip(operands, types, inputs, strict=True)
            ]
        # The kernel's outputs have no type that says along which axes they vary.
        return jax.shard_map(
            functools.partial(self.placement.joined, self.kernel, sums),
            mesh=mesh,
            in_specs=tuple(inputs),
            out_specs=outputs,
            axis_names=free,
            check_vma=False,
        )(*operands)


@functools.cache
def _partitioned(kernel, placement):
    def specs(operands):
        shapes = [x.shape for x in operands]
        given, mesh = layouts.of([x.sharding for x in operands], [x.ndim for x in operands])
        return mesh, *placement.specs(placement.mesh_axes(mesh, shapes, given))

    def shardings(mesh, specs):
        return [NamedSharding(mesh, spec) for spec in specs]

    def partition(mesh, operands, results):
        del mesh, results
        mesh, inputs, outputs, sums = specs(operands)
        local = functools.partial(placement.joined, kernel, sums)
        return mesh, local, shardings(mesh, outputs), tuple(shardings(mesh, inputs))

    def infer(mesh, operands, results):
        del mesh, results
        mesh, _, outputs, _ = specs(operands)
        return shardings(mesh, outputs)

    function = custom_partitioning(lambda *operands: kernel(*operands))
    function.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        decode_shardings=False,
        sharding_rule=placement.rule(),
        # In the order of the rule, or it is refused.
        need_replication_factors=tuple(
            name
            for name in dict.fromkeys(itertools.chain(*placement.inputs))
            if name in placement.whole
        ),
    )
    return function


def _body(where, kernel, placement, devices):
    del where, devices
    return _Placed(kernel, placement)


sharded_p = pr.define("sharded", _body)


@dataclasses.dataclass(frozen=True)
class _Mapped:
    kernel: Callable[..., Any]
    dims: tuple[int | None, ...]

    def __call__(self, *operands):
        # Of a device's part the size is its own, and the axis is sharded by the rule already.
        return jax.vmap(self.kernel, self.dims)(*operands)


@pr.on_batching(sharded_p)
def _batched(axis, dims, kernel, placement, devices):
    del axis
    return {
        "kernel": _Mapped(kernel, tuple(dims)),
        "placement": placement.batched(dims),
        "devices": devices,
    }
