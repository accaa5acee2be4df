"""What a training step of batch norm sends between devices: a model, and programs to hold it to.

    python benchmarks/scaling.py            # the table of docs/scaling.md
    python benchmarks/scaling.py --check    # and hold it to programs for TPU v5e slices: 4 to 256
    python benchmarks/scaling.py --check --target h200    # for 8 GPUs of a machine

The programs are compiled by libtpu, or by jax-cuda12-pjrt and its plugin, of JAX's own version; no
device is needed, and nothing runs.
"""

import argparse
import itertools
import math
import os
import pathlib
import sys
from typing import NamedTuple

import traffic
import traffic_hlo

SLICES = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
LARGEST = max(SLICES)  # of more chips there are several, each of so many
MOST = 256  # as normax.parts has it, which imports JAX before it is told of its platform
TPU, GPU = TARGETS = "v5e", "h200"
JIT, SHARD_MAP = "jit", "shard_map"
ROUTES = JIT, SHARD_MAP
FLOAT = 4
COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"

# Of a v5e, by J. Austin et al., "How to Scale Your Model", 2025: bytes a second of one link in one
# direction, seconds of a hop, and bytes a second of a chip's memory.
LINK, HOP, MEMORY = 4.5e10, 1e-6, 8.1e11
# Of the network between slices, bytes a second of one chip: 6.4 Tbit/s of a slice of 256, by Google
# Cloud's page on the v5e. What it takes to begin is not said there.
NETWORK = 6.4e12 / 8 / 256
WRAPPED = 16  # chips along an axis from which on the last is a neighbour of the first
EXAMPLES, PIXELS, ITEMSIZE = 32, 56 * 56, 2  # of a chip, for the time that the norm itself takes
# Examples of a chip, and their sides, of what is compiled: few entries GPUs sum in parts, if alone.
IMAGES = {TPU: ((8, 32),), GPU: ((8, 32), (3, 8))}
PASSES = 8  # arrays of the size of x that it reads or writes, forward and backward


class Step(NamedTuple):
    """What all devices reduce together in a step: bytes of each all-reduce, in their order.

    Attributes:
      always: forward, then backward.
      again: in a branch that measures once more, where the first measurement was not enough.
    """

    always: tuple[int, ...]
    again: tuple[int, ...] = ()


def step(route: str, devices: int, features: int, target: str = TPU) -> Step:
    """Returns what a step of batch norm sends, of `features` and a batch over `devices`.

    Under plain jit the partitioner adds up each sum: forward those of the entries and of their
    squares, backward those of dy and of dy xhat. Where a mean is far above a deviation that loses
    digits, and devices lay what they measure about their own means side by side, four numbers of a
    feature; of more than 256 the unit and three sums are taken of all, one after the other. On
    GPUs, and with an `axis_name`, they do so at once, which is always enough; backward go the sums
    for x, and with an `axis_name` those for the parameters beside them.
    """
    line = FLOAT * features
    if devices == 1:
        return Step(())
    if route == JIT and target == GPU:
        return Step((4 * line * devices, 2 * line))
    if route == JIT and devices > MOST:
        return Step((2 * line, 2 * line), (line,) * 4)
    if route == JIT:
        return Step((2 * line, 2 * line), (4 * line * devices,))
    return Step((4 * line * devices, 4 * line))


def hops(devices: int) -> int:
    """Returns how many links an all-reduce has to cross one after the other, on a square slice."""
    side = math.isqrt(devices)
    along = side if side >= WRAPPED else 2 * (side - 1)
    return 2 * along


def seconds(sent: tuple[int, ...], devices: int) -> float:
    """Returns the least that all-reduces take on slices, as if nothing else ran."""
    # A ring sends all but its own part, twice; two axes and two directions share it. Between slices
    # each chip sends its share of what its slice has reduced.
    within = min(devices, LARGEST)
    moved = 2 * sum(sent) * (within - 1) / within
    slices = devices // within
    between = 2 * sum(sent) / within * (slices - 1) / slices
    return len(sent) * hops(within) * HOP + moved / (4 * LINK) + between / NETWORK


def own_seconds(features: int) -> float:
    """Returns the least that a device's own share of the norm takes."""
    return PASSES * EXAMPLES * PIXELS * features * ITEMSIZE / MEMORY


def table() -> str:
    """Returns the model as a table of Markdown."""
    head = "features", "devices", "by", "all-reduces", "KiB", "at least, µs", "own part, µs"
    rows = [head, ("---",) * len(head)]
    for features in (64, 256, 2048):
        for devices in (1, *SLICES, 2 * LARGEST, 4 * LARGEST):
            for route in ROUTES:
                if devices == 1 and route != JIT:
                    continue
                sent, again = step(route, devices, features)
                name = {JIT: "plain jit", SHARD_MAP: "`axis_name`"}[route] if devices > 1 else ""
                more = f" (+ {len(again)})" if again else ""
                later = f" (+ {1e6 * seconds(again, devices):.0f})" if again else ""
                row = features, devices, name, f"{len(sent)}{more}", f"{sum(sent) / 1024:.5g}"
                times = (
                    f"{1e6 * seconds(sent, devices):.0f}{later}",
                    f"{1e6 * own_seconds(features):.0f}",
                )
                rows.append(tuple(map(str, (*row, *times))))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compiled(
    route: str,
    devices: int,
    features: int,
    target: str = TPU,
    image: tuple[int, int] = (8, 32),
    beside: int = 1,
) -> Step:
    """Returns what the program of a step sends, compiled for a slice of a TPU v5e, or for GPUs.

    Args:
      route: how a batch is spread over the devices.
      devices: how many there are.
      features: of an image.
      target: of which kind they are.
      image: how many one device has, and their sides.
      beside: how many devices have the same images, as those that share a model do.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import normax

    jax.devices()  # The plugins are known only after it.
    if target == GPU:
        config = (pathlib.Path(__file__).parent / "targets" / f"{target}.txtpb").read_text()
        options = {"target_config": config, "topology": f"1x1x{devices}"}
        described = topologies.get_topology_desc(target, "cuda", **options)
    else:
        described = topologies.get_topology_desc(f"{target}:{SLICES[devices]}", "tpu")
    grid = np.array(described.devices).reshape(-1, beside)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def train(x, dy, scale, bias, stats):
        name = "data" if route == SHARD_MAP else None

        def norm(*args):
            x, scale, bias = args
            return normax.batch_norm(
                x, stats, scale, bias, use_running_average=False, axis_name=name
            )

        y, pull, stats = jax.vjp(norm, x, scale, bias, has_aux=True)
        return y, stats, pull(dy)

    def given(shape, spec, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    data, whole = P("data"), P()
    if route == SHARD_MAP:
        train = jax.shard_map(
            train,
            mesh=mesh,
            in_specs=(data, data, whole, whole, whole),
            out_specs=(data, whole, (data, whole, whole)),
        )
    examples, side = image
    x = given((examples * len(grid), side, side, features), data, jnp.bfloat16)
    line = given((features,), whole, jnp.float32)
    stats = jax.tree.map(
        lambda v: given(v.shape, whole, v.dtype), normax.RunningStats.create(features)
    )
    text = jax.jit(train).lower(x, x, line, line, stats).compile().as_text()
    return reduced(str(text))


def reduced(text: str) -> Step:
    """Returns what a program sends, whatever the kind of collective."""
    computations, entry = traffic_hlo.parse(text)

    def sizes(name):
        for one in computations[name].values():
            if one.opcode.removesuffix("-start") in COLLECTIVES:
                yield sum(array.size * array.bits // 8 for array in traffic_hlo.arrays(one.type))

    others = [name for name in computations if name != entry]
    return Step(tuple(sizes(entry)), tuple(size for name in others for size in sizes(name)))


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns an exit status, 1 where a program sends something else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile for many devices")
    parser.add_argument("--target", choices=TARGETS, default=TPU)
    parser.add_argument("--devices", type=int, nargs="+", help="of those")
    options = parser.parse_args(arguments)
    print(table())
    if not options.check:
        return 0
    os.environ.update(traffic.ENVIRONMENT)
    wrong = 0
    counts = options.devices or {TPU: [*SLICES], GPU: [8]}[options.target]
    for devices, route, features, image in itertools.product(
        counts, ROUTES, (64, 256), IMAGES[options.target]
    ):
        found = compiled(route, devices, features, options.target, image)
        wanted = step(route, devices, features, options.target)
        same = [*map(sorted, found)] == [*map(sorted, wanted)]
        wrong += not same
        said = "as the model says" if same else f"expected {wanted}"
        print(f"{devices} devices, {route}, {features} features, {image}: {found}: {said}")
    if options.target == GPU:
        # A batch that not all devices could share, in a mesh of two axes: parts are not theirs.
        largest = max(compiled(JIT, 8, 256, GPU, (255, 1), beside=2).always)
        whole = 255 * 256 * ITEMSIZE
        wrong += largest > whole // 4
        print(f"4 x 2 devices, 255 examples each: at most {largest} of {whole} bytes at once")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
