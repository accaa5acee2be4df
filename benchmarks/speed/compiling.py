"""How long JAX takes before a deep model runs: to trace it, to lower it and to compile it.

Each time from the start: JAX's caches are emptied first, and nothing is kept on disk.
"""

import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.speed import models, timing

LAYERS = {"gpu": 100, "cpu": 100, "quick": 3}
REPEATS = {"gpu": 3, "cpu": 3, "quick": 1}
STAGES = ("trace", "lower", "compile")


class Deep(nn.Module):
    """Many small layers, each a matrix product, a norm and a ReLU.

    Attributes:
      norms: what has LayerNorm and BatchNorm.
      kind: "LayerNorm" or "BatchNorm".
      layers: how many.
    """

    norms: Any
    kind: str
    layers: int

    @nn.compact
    def __call__(self, x):
        """Returns an array of the shape of x."""
        options = {"use_running_average": False} if self.kind == "BatchNorm" else {}
        for _ in range(self.layers):
            x = nn.Dense(x.shape[-1])(x)
            x = nn.relu(getattr(self.norms, self.kind)(**options)(x))
        return x


def once(kind: str, norms: Any, layers: int) -> tuple[dict[str, float], int]:
    """Returns seconds by stage for a step of training, and the lines of the lowered program."""
    model = Deep(norms, kind, layers)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(models.train_step(model)).trace(variables, x)
    middle = time.perf_counter()
    lowered = traced.lower()
    late = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    seconds = {"trace": middle - start, "lower": late - middle, "compile": end - late}
    return seconds, lowered.as_text().count("\n")


def run(kind: str, size: str, check: models.Check) -> dict[str, Any]:
    """Measures each library's norms, in turn.

    Args:
      kind: "LayerNorm" or "BatchNorm".
      size: "gpu", "cpu" or "quick".
      check: raises KeyboardInterrupt if the run is to end.

    Returns:
      The record of the case.
    """
    found: dict[str, list[dict[str, float]]] = {}
    lines: dict[str, int] = {}
    for _ in range(REPEATS[size]):
        for name, norms in models.norm_modules().items():
            check()
            seconds, lines[name] = once(kind, norms, LAYERS[size])
            found.setdefault(name, []).append(seconds | {"all": sum(seconds.values())})
    records = {}
    for name, samples in found.items():
        record: dict[str, Any] = {"status": "right", "lines": lines[name]}
        for stage in (*STAGES, "all"):
            record[f"{stage}_s"] = timing.summary([sample[stage] for sample in samples])
        pairs = zip(found["normax"], samples, strict=True)
        record["normax_over"] = timing.summary(
            [ours["all"] / other["all"] for ours, other in pairs]
        )
        records[name] = record
    return {
        "name": f"{LAYERS[size]} layers of {kind}",
        "title": f"{LAYERS[size]} layers of {kind}, forward and backward, from empty caches",
        "contestants": records,
    }
