"""One of several processes that save or read an array of which each holds a part.

    python tests/dealt_out.py PORT PROCESSES NUMBER FOLDER save|restore|damage

For `test_processes.py`. It prints whether what came back is what was saved, or that it was refused;
after "damage", of each of some bits that it turns over in the largest files.
"""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from normax.checkpoint import Checkpoints

PLACES = 6  # in each of the two largest files


def read(folder, like, whole):
    try:
        with Checkpoints(folder) as checkpoints:
            array = checkpoints.restore({"w": like})[0]["w"]
    except ValueError as error:
        return f"refused: {error}"
    shards = array.addressable_shards
    return "same" if all((shard.data == whole[shard.index]).all() for shard in shards) else "other"


def damaged(folder):
    """Turns bits over, one after the other, and back."""
    files = sorted(pathlib.Path(folder).rglob("d/*"), key=lambda file: file.stat().st_size)
    for file in files[-2:]:
        sound = file.read_bytes()
        for i in range(PLACES):
            broken = bytearray(sound)
            broken[len(broken) * (i + 1) // (PLACES + 1)] ^= 16
            file.write_bytes(broken)
            yield
        file.write_bytes(sound)


def main(port, processes, number, folder, act):
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread = NamedSharding(mesh, P("data"))
    whole = np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32)
    put = lambda value: jax.make_array_from_callback(value.shape, spread, lambda at: value[at])
    if act == "save":
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, {"w": put(whole)})
        return
    like = put(np.zeros_like(whole))
    for _ in damaged(folder) if act == "damage" else [None]:
        print("found", read(folder, like, whole), flush=True)


if __name__ == "__main__":
    port, processes, number, folder, act = sys.argv[1:]
    main(int(port), int(processes), int(number), folder, act)
