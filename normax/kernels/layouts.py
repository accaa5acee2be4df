"""How arrays lie on devices, in terms of a mesh whose axes nothing can be sharded along in part.

A reshape may leave an array sharded along a part of a mesh axis, which has no name in that mesh,
and which `custom_partitioning` cannot decode. In a mesh of the same devices, each axis of prime
size, every part is made of whole axes, if the primes are in the right order: of six devices, pairs
of neighbours are an axis of a mesh of 3 x 2, and of none of 2 x 3.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh, Sharding

Axes = tuple[str, ...]


def of(shardings: Sequence[Sharding], ranks: Sequence[int]) -> tuple[list[tuple[Axes, ...]], Mesh]:
    """Returns along which axes each axis of each array is sharded, and the mesh that has these.

    Args:
      shardings: of the arrays, of any kind, over the same devices.
      ranks: how many axes each array has.

    Returns:
      For each axis of each array names of axes of the mesh, the outermost first, and none if no
      axes have pieces in that order; and the mesh.
    """
    size = shardings[0].num_devices
    # What is sharded here has pieces of equal size, which the array itself may not.
    maps = [
        sharding.devices_indices_map((size,) * rank)
        for sharding, rank in zip(shardings, ranks, strict=True)
    ]
    starts = [
        np.array([[part.start or 0 for part in index] for index in indices.values()], int)
        for indices in maps
    ]
    least, best = math.inf, None
    for sizes in _orders(_primes(size)):
        found = [
            tuple(_axes(each[:, axis].reshape(sizes), size) for axis in range(rank))
            for each, rank in zip(starts, ranks, strict=True)
        ]
        lost = sum(axes is None for array in found for axes in array)
        if lost < least:
            least, best = lost, (found, sizes)
        if not lost:
            break
    assert best is not None  # there is an order at least
    found, sizes = best
    names = tuple(f"prime{i}" for i in range(len(sizes)))
    mesh = Mesh(np.array(list(maps[0])).reshape(sizes), names)
    return [tuple(tuple(names[i] for i in axes or ()) for axes in array) for array in found], mesh


def _primes(number: int) -> list[int]:
    least = next((n for n in range(2, math.isqrt(number) + 1) if number % n == 0), number)
    return [] if number == 1 else [least, *_primes(number // least)]


def _orders(sizes: list[int]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
    for first in sorted(set(sizes)):
        rest = sizes.copy()
        rest.remove(first)
        yield from ((first, *order) for order in _orders(rest))


def _axes(starts: np.ndarray, size: int) -> list[int] | None:
    """Returns the axes of the mesh, the outermost first, or None if they do not make it up."""
    steps = {}
    for i in range(starts.ndim):
        step = int(starts.take(1, i).flat[0] - starts.flat[0])
        steps |= {i: step} if step else {}
    axes = sorted(steps, key=lambda i: -steps[i])
    within = size
    for i in axes:
        # Each axis cuts what the ones before it have left into equal pieces.
        within, left = divmod(within, starts.shape[i])
        if left or steps[i] != within:
            return None
    places = np.indices(starts.shape)
    expected = sum((places[i] * steps[i] for i in axes), np.zeros_like(starts))
    return axes if np.array_equal(starts, expected) else None
