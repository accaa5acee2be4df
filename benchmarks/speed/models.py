"""Whole models, of which only the import of the norms differs: one training step of each.

A transformer's blocks without attention (norm, two matrix products, residual sum) and a residual
network of bottlenecks. The step is forward, backward and SGD. A third contestant has no norms at
all: what is left of the time when it is taken off is what norms cost.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import normax.linen
from benchmarks.speed import measure, timing
from benchmarks.speed.contestant import Contestant, scratch
from benchmarks.speed.peers import KERNELS
from normax import kernels

Check = Callable[[], None]


RATE = 1e-2
# How far the first step in float32 may be from that with Flax's norms, as a part of its length. In
# bfloat16 it says nothing: that of a deep residual network with Flax's norms is further than its
# own length from the one in float32.
LIMIT = 0.05
HELD = 8  # of so many parts of a batch, one is enough to see that


class Size(NamedTuple):
    """How large the models are.

    Attributes:
      width: features of the transformer.
      tokens: rows that it is given.
      layers: its blocks.
      stages: bottlenecks in each stage of the residual network.
      filters: of its first stage.
      batch: images.
      pixels: height and width of an image.
    """

    width: int
    tokens: int
    layers: int
    stages: tuple[int, ...]
    filters: int
    batch: int
    pixels: int


SIZES = {
    "gpu": Size(4096, 16384, 8, (3, 4, 6, 3), 64, 256, 224),
    "cpu": Size(256, 2048, 4, (1, 1, 1), 16, 16, 32),
    "quick": Size(8, 16, 1, (1,), 4, 2, 8),
}


class _Nothing(nn.Module):
    """Stands where a norm would, and returns what it is given; takes and ignores all options."""

    use_running_average: bool | None = None
    epsilon: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return x


NOTHING = types.SimpleNamespace(LayerNorm=_Nothing, RMSNorm=_Nothing, BatchNorm=_Nothing)


class Transformer(nn.Module):
    """Blocks of a pre-norm transformer, without attention.

    Attributes:
      norms: what has LayerNorm.
      layers: number of blocks.
      dtype: of activations; parameters are float32.
    """

    norms: Any
    layers: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """Returns an array of the shape of x."""
        for _ in range(self.layers):
            h = self.norms.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x)
            h = nn.Dense(4 * x.shape[-1], dtype=self.dtype)(h)
            x = x + nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(h))
        return self.norms.RMSNorm(epsilon=1e-5, dtype=self.dtype)(x)


class ResNet(nn.Module):
    """A residual network of bottlenecks; (3, 4, 6, 3) and 64 filters are ResNet-50.

    Attributes:
      norms: what has BatchNorm.
      stages: bottlenecks in each stage.
      filters: of the first stage.
      dtype: of activations; parameters are float32.
    """

    norms: Any
    stages: tuple[int, ...]
    filters: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """Returns ten numbers for each image."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.norms.BatchNorm, use_running_average=False, epsilon=1e-5, dtype=self.dtype
        )
        x = nn.relu(norm()(conv(self.filters, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, number in enumerate(self.stages):
            filters = self.filters * 2**stage
            for block in range(number):
                strides = 2 if stage and not block else 1
                h = nn.relu(norm()(conv(filters, (1, 1))(x)))
                h = nn.relu(norm()(conv(filters, (3, 3), strides)(h)))
                h = norm()(conv(4 * filters, (1, 1))(h))
                if h.shape != x.shape:
                    x = norm()(conv(4 * filters, (1, 1), strides)(x))
                x = nn.relu(x + h)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


# The modules that a kernel is for, of those in the models.
OF = {"mosaic_gpu": ("LayerNorm", "RMSNorm")}


def norm_modules() -> dict[str, Any]:
    """Returns what has LayerNorm, RMSNorm and BatchNorm, by contestant."""
    found: dict[str, Any] = {"normax": normax.linen, "flax linen": nn, "no norms": NOTHING}
    for name in ("xla", *KERNELS.get(jax.default_backend(), [])):
        if kernels.available().get(name):  # says why not
            continue
        options = {"implementation": name}
        kinds = {
            kind: getattr(normax.linen, kind) for kind in ("LayerNorm", "RMSNorm", "BatchNorm")
        }
        found[f"normax {name}"] = types.SimpleNamespace(
            **{
                kind: functools.partial(module, **options)
                if kind in OF.get(name, kinds)
                else module
                for kind, module in kinds.items()
            }
        )
    return found


def make(kind: str, norms: Any, size: Size, dtype: str) -> tuple[nn.Module, jax.Array]:
    """Returns a model and its input."""
    key = jax.random.key(0)
    if kind == "transformer":
        x = jax.random.normal(key, (size.tokens, size.width), dtype)
        return Transformer(norms, size.layers, dtype), x
    x = jax.random.normal(key, (size.batch, size.pixels, size.pixels, 3), dtype)
    return ResNet(norms, size.stages, size.filters, dtype), x


def train_step(model: nn.Module) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """Returns forward, backward and SGD as a function of variables and input."""

    def step(variables, x):
        params = variables["params"]
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params):
            y, state = model.apply({"params": params, **rest}, x, mutable=list(rest))
            logits = y.astype(jnp.float32)
            label = jnp.arange(len(x)) % y.shape[-1]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], -1)
            return -jnp.mean(chosen), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return {"params": params, **state}, value

    return step


def start(kind: str, size: Size, dtype: str) -> Any:
    """Returns the variables that all begin with: normax's modules have the tree of Flax's."""
    model, x = make(kind, nn, size, dtype)
    return jax.jit(model.init)(jax.random.key(1), x)


def first_step(kind: str, norms: Any, size: Size, variables: Any) -> Any:
    """Returns the parameters after a step in float32, with a part of the batch."""
    size = size._replace(tokens=-(-size.tokens // HELD), batch=-(-size.batch // HELD))
    model, x = make(kind, norms, size, "float32")
    return jax.jit(train_step(model))(variables, x)[0]["params"]


def contestant(
    kind: str, norms: Any, size: Size, dtype: str, variables: Any
) -> tuple[Contestant, float]:
    """Returns a step of training as a contestant, and the loss of the first."""
    model, x = make(kind, norms, size, dtype)
    if norms is NOTHING:
        params = {k: v for k, v in variables["params"].items() if "Norm" not in k}
        variables = {"params": params}
    step = jax.jit(train_step(model), donate_argnums=0)
    compiled = step.lower(variables, x).compile()
    # A step writes over what it is given.
    state, loss = compiled(jax.tree.map(jnp.copy, variables), x)

    def call(_):
        nonlocal state
        state, loss = compiled(state, x)
        return loss

    made = Contestant(call, jax.block_until_ready, scratch=scratch(compiled))
    return made, float(loss)


@jax.jit
def apart(params: Any, others: Any, start: Any) -> jax.Array:
    """Returns the distance between two steps, as a part of the length of the second."""

    def length(a, b):
        squares = jax.tree.map(lambda u, v: jnp.sum(jnp.square(u - v)), a, b)
        return jnp.sqrt(sum(jax.tree.leaves(squares)))

    return length(params, others) / length(others, start)


def run(kind: str, size: str, effort: timing.Effort, check: Check) -> dict[str, Any]:
    """Measures a model with each library's norms.

    Args:
      kind: "transformer" or "resnet".
      size: "gpu", "cpu" or "quick".
      effort: how long to measure.
      check: raises KeyboardInterrupt if the run is to end.

    Returns:
      The record; a contestant is right if its first step in float32 is that with Flax's norms.
    """
    dtype = "bfloat16" if size == "gpu" else "float32"
    variables = start(kind, SIZES[size], dtype)
    # What the others are held to is made first.
    modules = norm_modules()
    ready, records = {}, {}
    theirs = None
    for name in sorted(modules, key=lambda name: name != "flax linen"):
        check()
        try:
            made, loss = contestant(kind, modules[name], SIZES[size], dtype, variables)
            right, record = True, {"loss": loss, "scratch": made.scratch}
            if modules[name] is not NOTHING:
                first = first_step(kind, modules[name], SIZES[size], variables)
                theirs = first if theirs is None else theirs
                record["apart"] = float(apart(first, theirs, variables["params"]))
                right = record["apart"] <= LIMIT
        except Exception as failure:
            records[name] = {"status": "failed", "why": measure.said(failure)}
            continue
        records[name] = {"status": "right" if right else "wrong", **record}
        if right:
            ready[name] = made
    records = {name: records[name] for name in modules}
    found = timing.rounds(ready, effort)
    for name in ready:
        records[name]["ms"] = timing.summary([times[name] for times in found])
        if "normax" in ready:
            records[name]["normax_over"] = timing.over(found, "normax", name)
        if "no norms" in ready:
            spent = [times[name] - times["no norms"] for times in found]
            records[name]["norms_ms"] = timing.summary(spent)
    return {
        "name": f"{kind} {dtype}",
        "title": f"{kind}, one step of training",
        "dtype": dtype,
        "size": SIZES[size]._asdict(),
        "contestants": records,
    }
