"""Trains until it is done, or killed, saving as it goes on: what `test_checkpoint.py` runs.

    python tests/interrupted.py FOLDER STEPS KILLED_AFTER

It prints the checksum of what it ends with. Some seconds after its first step, at any point of a
step or of what is written meanwhile, it kills itself; 0 is never.
"""

import os
import signal
import sys
import threading
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import normax.linen
from normax import train
from normax.checkpoint import Checkpoints


class Model(nn.Module):
    """Something of each that is kept: parameters, running statistics, random keys."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(normax.linen.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(1)(x)[:, 0]


def loss(model, batch, train):
    return optax.l2_loss(model(batch, train=train), batch[:, 0]).mean()


def main(folder, steps, seconds):
    x = np.random.default_rng(0).normal(size=(256, 3)).astype(np.float32)
    tx = optax.adam(0.01)
    state = train.TrainState.create(Model(), tx, jax.random.key(0), jnp.asarray(x), train=False)
    step = train.train_step(loss, nonfinite="skip")
    rng = np.random.default_rng(1)
    with Checkpoints(folder, every=5, keep=2, best="loss") as checkpoints:
        if checkpoints.steps():
            state, position = checkpoints.restore(state)
            rng.bit_generator.state = position["rng"]
        print("from", int(state.step), flush=True)
        timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
        while int(state.step) < steps:
            state, metrics = step(state, jnp.asarray(x[rng.integers(0, 256, 32)]))
            if seconds and not timer.is_alive():
                timer.start()
            position = {"rng": rng.bit_generator.state}
            checkpoints.save(int(state.step), state, position=position, metrics=metrics)
    leaves = [state.replace(key=jax.random.key_data(state.key))]
    whole = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(leaves))
    print("ends", int(state.step), zlib.crc32(whole), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
