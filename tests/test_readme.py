"""The README's code runs: the first block on inputs of these names, the others as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax

README = (pathlib.Path(normax.__file__).parents[1] / "README.md").read_text()
FUNCTIONS, TRAINING, LOOKING = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_functions():
    def run(x):
        names = {
            "x": x,
            "axes": 0,
            "mask": jnp.ones(x.shape, bool),
            "stats": normax.RunningStats.create(8),
            "scale": jnp.ones(8),
            "bias": jnp.zeros(8),
            "v": x,
            "g": jnp.ones(8),
            "another": normax.moments(x, 0),
        }
        exec(FUNCTIONS, names)
        return names["y"], names["w"], names["stats"]

    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    y, w, stats = jax.vmap(run, axis_name="device")(x)
    assert y.shape == w.shape == x.shape
    assert stats.count.tolist() == [[4 + 8 + 4] * 8] * 2


@pytest.mark.usefixtures("optax_promotes")
def test_the_training_loop_of_25_lines():
    lines = [line for line in TRAINING.splitlines() if line.strip()]
    assert len(lines) <= 25
    names = {}
    exec(TRAINING, names)
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.normal(size=(8, 6, 6, 1)).astype(np.float32), "label": rng.integers(0, 10, 8)}
        for _ in range(3)
    ]
    state, metrics = names["fit"](batches, batches[0])
    assert int(state.step) == 3
    assert np.isfinite(metrics["loss"])
    names |= {"state": state, "batch": batches[0]}
    exec(LOOKING, names)
    assert set(names["norms"]) == {"Conv_0", "BatchNorm_0", "Dense_0"}
    for layer in names["norms"].values():
        assert layer.weights > 0
        assert layer.output > 0
