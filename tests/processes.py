"""One of several processes that train the main job's network together: for `test_processes.py`.

    python tests/processes.py PORT PROCESSES NUMBER FOLDER STEPS ENDED_AT ENDED killed|raises

It saves as it goes on, begins with what is saved, and kills itself at a step, or raises an error,
if it is the one of that number; 0 is none. The first process prints what it ends with. A batch that
is bad for one of them is skipped by all.
"""

import json
import os
import signal
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from normax import train
from normax.checkpoint import Checkpoints
from normax.experiments import compare, data
from normax.experiments.network import Network

SIZE = 64
BAD_AT = 3  # a step of which the last process has an image that is no number


def end(how):
    if how == "raises":
        raise RuntimeError("this process alone")
    os.kill(os.getpid(), signal.SIGKILL)


def main(port, processes, number, folder, steps, ended_at, ended, how):
    if processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            processes,
            number,
            initialization_timeout=120,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=5,
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    images, _ = data.load("digits", 0)
    # Not Adam: of a bias before batch norm the gradient is rounding, which it would make large.
    example, tx = images.image[:2], optax.sgd(0.05, momentum=0.9)

    def create():
        key = jax.random.key(0)
        return train.TrainState.create(Network("batch"), tx, key, example, train=False)

    state = jax.jit(create, out_shardings=NamedSharding(mesh, P()))()
    # Each process has the images that its devices see, and no others.
    spread = NamedSharding(mesh, P("data"))
    share = SIZE // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    step = train.train_step(compare.loss, nonfinite="skip")
    losses = []
    with Checkpoints(folder, every=2, keep=2) as checkpoints:
        if checkpoints.steps():
            state, _ = checkpoints.restore(state)
        print("from", int(state.step), flush=True)
        for i in range(int(state.step), steps):
            if ended_at and i == ended_at and number == ended:
                end(how)
            index = np.arange(SIZE) + i * SIZE
            pixels = images.image[index]
            if i == BAD_AT:
                pixels[-1] = np.nan
            batch = {
                "image": pixels[mine],
                "label": images.label[index][mine],
                "weight": np.ones(share, np.float32),
            }
            batch = {
                name: jax.make_array_from_process_local_data(spread, value)
                for name, value in batch.items()
            }
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            checkpoints.save(i + 1, state)
    if number == 0:
        leaves = jax.tree.leaves((state.params, state.model_state))
        ends = [np.asarray(leaf, np.float64).ravel().tolist() for leaf in leaves]
        found = {"losses": losses, "leaves": ends, "skipped": int(state.skipped)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    port, processes, number, folder, *rest, how = sys.argv[1:]
    main(int(port), int(processes), int(number), folder, *map(int, rest), how)
