"""Pool statistics over devices: one exchange, exact for unequal counts, any groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def sum_over_devices(axis_name, groups, value):
    """Returns `value` summed over the devices of this device's group. Linear: it transposes."""
    if axis_name is None:
        return value
    if groups is None:
        return lax.psum(value, axis_name)
    # shard_map has no axis_index_groups: each group adds in a slot of its own instead.
    mine = _group_of_device(groups)[lax.axis_index(axis_name)]
    return lax.psum(_in_slot(value, mine, len(groups)), axis_name)[mine]


def devices(axis_name, groups):
    """Returns how many devices pool with this one, itself included: an int where all agree."""
    if axis_name is None:
        return 1
    if groups is None:
        return lax.axis_size(axis_name)
    sizes = {len(group) for group in groups}
    if len(sizes) == 1:
        return sizes.pop()
    return jnp.sum(members(axis_name, groups), dtype=jnp.int32)


def members(axis_name, groups):
    """Returns for each device whether it pools with this one."""
    if groups is None:
        return jnp.ones(lax.axis_size(axis_name), bool)
    group = _group_of_device(groups)
    return group == group[lax.axis_index(axis_name)]


def gather(axis_name, groups, *values):
    """Returns each value of every device, stacked along a new leading axis, in one all-reduce.

    Devices outside this device's group read as zeros. A psum of slots rather than an all_gather:
    its result is known to be the same on every device, so that what is computed from it may leave
    a shard_map as a replicated value.
    """
    index = lax.axis_index(axis_name)
    slots = lax.psum(_in_slot(jnp.stack(values), index, lax.axis_size(axis_name)), axis_name)
    if groups is not None:
        pooled = jnp.expand_dims(members(axis_name, groups), tuple(range(1, slots.ndim)))
        slots = jnp.where(pooled, slots, 0)
    return tuple(jnp.moveaxis(slots, 1, 0))


def lay_out(*values):
    """Returns each value for every device, of parts along the leading axis that are dealt out.

    A sum of slots here, too: a partitioner makes one all-reduce of it, for all values together.
    """
    stacked = jnp.stack(values, 1)
    index = jnp.expand_dims(jnp.arange(len(stacked)), (0, *range(2, stacked.ndim + 1)))
    return tuple(jnp.moveaxis(jnp.sum(_in_slot(stacked, index, len(stacked)), 1), 1, 0))


def placed_like(value, like):
    """Returns what broadcasts to `like` dealt out as that is, where layouts are part of types."""
    ours, theirs = jax.typeof(value).sharding, jax.typeof(like).sharding
    axes = zip(theirs.spec, value.shape, like.shape, strict=True)
    spec = jax.sharding.PartitionSpec(
        *(name if mine == size else None for name, mine, size in axes)
    )
    # What came from outside of a mesh is brought onto it.
    mesh = theirs.mesh if ours.mesh.empty else ours.mesh
    return value if (ours.mesh, ours.spec) == (mesh, spec) else place(value, mesh, spec)


def examples_together(value, count):
    """Returns `value` with all examples on each device, unless `count` parts of them are dealt out.

    Where layouts are no part of types that is the partitioner's to see to.
    """
    sharding = jax.typeof(value).sharding
    if count % dealt_out(sharding, 0) == 0:
        return value
    return place(value, sharding.mesh, (None, *sharding.spec[1:]))


def whole(value, *kept):
    """Returns `value` with all but `kept` axes whole on each device, where layouts are types.

    For what is no sum over an axis, such as the order of its entries.
    """
    mesh, spec = jax.typeof(value).sharding.mesh, jax.typeof(value).sharding.spec
    kept = {axis % value.ndim for axis in kept}
    return place(value, mesh, [name if i in kept else None for i, name in enumerate(spec)])


def place(value, mesh, spec):
    """Returns `value` dealt out by `spec` on a mesh, where layouts are types."""
    layout = _layout(mesh, spec)
    return value if layout is None else jax.sharding.reshard(value, layout)


def matmul(a, b, mesh, spec):
    """Returns a @ b, to all digits, laid out by `spec` on a mesh, likewise."""
    return jnp.matmul(a, b, precision="highest", out_sharding=_layout(mesh, spec))


def dealt_out(sharding, axis):
    """Returns among how many devices an axis is dealt out."""
    return math.prod(sharding.mesh.shape[name] for name in names_of(sharding.spec[axis]))


def names_of(entry):
    """Returns the names of mesh axes in what a spec has of an axis: a name, several, or none."""
    if entry is None or entry is jax.sharding.PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def reshape(value, shape, spec):
    """Returns `value` reshaped; `spec` is its new layout, where layouts are part of types."""
    layout = _layout(jax.typeof(value).sharding.mesh, spec)
    return (
        value.reshape(shape) if layout is None else lax.reshape(value, shape, out_sharding=layout)
    )


def _layout(mesh, spec):
    """Returns a spec on a mesh whose axes are parts of types; None of any other."""
    if mesh.empty or not mesh.explicit_axes:
        return None
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _group_of_device(groups):
    group = np.zeros(sum(map(len, groups)), np.int32)
    for index, devices in enumerate(groups):
        group[list(devices)] = index
    return jnp.asarray(group)


def _in_slot(value, index, size):
    slots = jnp.expand_dims(jnp.arange(size), tuple(range(1, value.ndim + 1)))
    return jnp.where(slots == index, value[None], jnp.zeros((), value.dtype))
