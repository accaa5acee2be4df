"""A long training that is killed again and again, on batches that are bad, masked and of any size.

    python tests/soak.py --steps 10000 --kills 50

It holds what comes of it to what has to: every bad batch skipped and no other, all of the state
finite, each shape compiled once in a process, memory flat, and the same bits as without a kill. The
last line says so. `test_soak.py` runs a short form.
"""

import argparse
import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

SIZES = (16, 24, 40)
BAD = 0.02
EVERY = 10
TOLD = 20  # steps from one line to the next
# Megabytes: 4000 steps that are not saved take 0.2 more, but TensorStore keeps some of each save.
GROWTH, OF_A_SAVE = 16, 0.048


def batch_of(step, seed):
    """Returns the batch of a step, the same whenever it is asked for: x, mask, and if it is bad."""
    rng = np.random.default_rng([seed, step])
    size = int(rng.choice(SIZES))
    x = rng.normal(size=(size, 6)).astype(np.float32) * 3 + 1
    mask = rng.random((size, 1)) < rng.choice([1.0, 0.7, 0.1])
    x[~mask[:, 0]] = rng.choice([0.0, np.nan, 1e30])  # padding may hold anything
    bad = rng.random() < BAD
    if bad:
        mask[0], x[0, 0] = True, np.nan
    return x, mask, bad


def work(folder, steps, seed):
    """Trains from the last checkpoint to the end, and prints what it saw."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    import normax.linen
    from normax import train
    from normax.checkpoint import Checkpoints

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            norm = normax.linen.BatchNorm(use_running_average=not train, momentum=0.9)
            x = jnp.where(mask, norm(x, mask=mask), 0.0)
            x = nn.relu(nn.Dense(16)(x))
            return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(x))

    compiled = collections.Counter()

    def loss(model, batch, train):
        x, mask = batch
        compiled[len(x)] += 1
        y = model(x, mask, train=train)
        wanted = jnp.where(mask, jnp.sin(x[:, :1]), 0.0)
        return ((y - wanted) ** 2 * mask).sum() / jnp.maximum(mask.sum(), 1)

    x, mask, _ = batch_of(0, seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = train.TrainState.create(Model(), tx, jax.random.key(seed), x, mask, train=False)
    step = train.train_step(loss, nonfinite="skip")
    memory, alive = [], []
    with Checkpoints(folder, every=EVERY, keep=2) as checkpoints:
        if checkpoints.steps():
            state, _ = checkpoints.restore(state)
        print("from", int(state.step), flush=True)
        for i in range(int(state.step), steps):
            x, mask, _ = batch_of(i, seed)
            state, _ = step(state, (jnp.asarray(x), jnp.asarray(mask)))
            if i % TOLD == 0:
                print("at", i, flush=True)
            checkpoints.save(i + 1, state)
            if i % 100 == 0 or not memory:
                checkpoints.wait()  # which holds arrays until it has written them
                memory.append(resident())
                alive.append(len(jax.live_arrays()))
    floats = [v for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating)]
    plain = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
    found = {
        "skipped": int(state.skipped),
        "finite": all(bool(jnp.isfinite(v).all()) for v in floats),
        "compiled": list(compiled.values()),
        "memory": memory,
        "alive": alive,
        "bits": zlib.crc32(b"".join(np.asarray(v).tobytes() for v in plain)),
    }
    print(json.dumps(found), flush=True)


def resident():
    """Returns the megabytes of memory that this process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def begin(folder, steps, seed):
    command = [sys.executable, __file__, "--worker", str(folder), "--steps", str(steps)]
    return subprocess.Popen(
        [*command, "--seed", str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def soak(steps, kills, seed):
    """Trains with and without kills; returns what both came to, and where it went on from."""
    rng, starts = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = begin(f"{folder}/whole", steps, seed).communicate()
        for _ in range(kills):
            process = begin(f"{folder}/killed", steps, seed)
            starts.append(int(process.stdout.readline().split()[1]))
            for _ in range(rng.integers(2, 2 + steps // TOLD // kills)):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        killed, _ = begin(f"{folder}/killed", steps, seed).communicate()
    return [json.loads(text.splitlines()[-1]) for text in (whole, killed)], starts


def hold(found, steps, seed):
    """Holds what was found to what has to be."""
    whole, killed = found
    bad = sum(batch_of(i, seed)[2] for i in range(steps))
    for one in found:
        assert one["skipped"] == bad, (one["skipped"], bad)
        assert one["finite"]
        assert set(one["compiled"]) <= {1}, one["compiled"]
    assert whole["bits"] == killed["bits"]
    assert len(set(whole["alive"][1:])) <= 1, whole["alive"]
    memory = whole["memory"][2:]  # all shapes are compiled by then
    allowed = GROWTH + OF_A_SAVE * steps / EVERY
    assert not memory or memory[-1] - memory[0] < allowed, (allowed, memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.steps, options.seed)
        return
    found, starts = soak(options.steps, options.kills, options.seed)
    hold(found, options.steps, options.seed)
    memory = found[0]["memory"]
    print(
        f"{options.steps} steps held: {found[0]['skipped']} bad batches skipped, "
        f"{options.kills} kills, went on from {starts}, {memory[-1] - memory[2]:.0f} MB grown"
    )


if __name__ == "__main__":
    main()
