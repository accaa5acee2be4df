"""How arrays lie on devices, in terms of a mesh whose axes nothing can be sharded along in part.

A reshape may leave an array sharded along a part of a mesh axis, which has no name in that mesh,
and which `custom_partitioning` cannot decode. In a mesh of the same devices, each axis of prime
size, every part is made of whole axes.
"""

import math

import numpy as np
from jax.sharding import Mesh, Sharding

Axes = tuple[str, ...]


def of(sharding: Sharding, ndim: int) -> tuple[tuple[Axes, ...], Mesh]:
    """Returns along which axes each axis of an array is sharded, and the mesh that has these.

    Args:
      sharding: of the array, of any kind.
      ndim: how many axes the array has.

    Returns:
      For each axis of the array names of axes of the mesh, the outermost first, and none if no
      axes have pieces in that order; and the mesh.
    """
    # What is sharded here has pieces of equal size, which the array itself may not.
    size = sharding.num_devices
    indices = sharding.devices_indices_map((size,) * ndim)
    sizes = _primes(size)
    names = tuple(f"prime{i}" for i in range(len(sizes)))
    mesh = Mesh(np.array(list(indices)).reshape(sizes), names)
    starts = np.array([[part.start or 0 for part in index] for index in indices.values()], int)
    starts = starts.reshape(*sizes, ndim)
    return tuple(_axes(starts[..., axis], size, mesh) for axis in range(ndim)), mesh


def _primes(number):
    least = next((n for n in range(2, math.isqrt(number) + 1) if number % n == 0), number)
    return [] if number == 1 else [least, *_primes(number // least)]


def _axes(starts, size, mesh):
    steps = {}
    for i, name in enumerate(mesh.axis_names):
        step = int(starts.take(1, i).flat[0] - starts.flat[0])
        steps |= {name: step} if step else {}
    names = sorted(steps, key=lambda name: -steps[name])
    within = size
    for name in names:
        # Each axis cuts what the ones before it have left into equal pieces.
        within, left = divmod(within, mesh.shape[name])
        if left or steps[name] != within:
            return ()
    places = np.indices(starts.shape)
    expected = sum(places[mesh.axis_names.index(name)] * steps[name] for name in names)
    return tuple(names) if np.array_equal(starts, expected + np.zeros_like(starts)) else ()
