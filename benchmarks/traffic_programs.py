"""The programs whose traffic is counted: a norm of normax or of Flax, in a context."""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import traffic_hlo
from jax import lax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

import normax

ROWS = ((8192, 4096), (65536, 64), (8192, 768), (8192, 5120), (2048, 16384))
IMAGES = ((64, 56, 56, 64), (64, 28, 28, 256))
SLABS = ((16, 64, 64, 320), (8, 32, 32, 256))
# Of arrays that a GPU's cache holds XLA thinks otherwise about what it writes down.
FEW_ROWS, FEW_IMAGES = ((128, 4096), (33, 4096), (100, 1024)), ((1024, 1024), (16, 16, 16, 128))
GROUPS = 32
FORWARD, BOTH, BETWEEN = CONTEXTS = "forward", "forward + backward", "between products"
LIBRARIES = "normax", "flax"
# Features before and after a norm of matrices that stands between two products; of short rows so
# many times their own, or a TPU would have no room for them.
WIDTH, TIMES = 1024, 4
# Two forward, and two for each of them backward.
PRODUCTS = 6
# Bytes from which on an array cannot stay in a TPU's own memory from one kernel to the next.
LARGE = 2**28


class Norm(NamedTuple):
    """A norm, perhaps with what follows it.

    Attributes:
      shapes: those it is counted at.
      floors: the least it must move, over the bytes of x, forward and forward + backward. What is
        summarised over more than a row is read twice: to measure it, and to standardize it.
      normax: function of (x, scale, bias, stats) that returns the output and the new statistics.
      flax: Flax's module of the same, of a dtype.
      after: function of the output and of a second input of its shape.
      residual: whether there is a second input.
      activated: whether normax's function does what comes after by itself. That is for GPUs: on
        TPU, XLA fuses into the products what stands alone.
      target: the only one it is counted for, if not all.
      contexts: those it is counted in.
    """

    shapes: tuple[tuple[int, ...], ...]
    floors: tuple[int, int]
    normax: Callable[..., Any]
    flax: Callable[[Any], nn.Module]
    after: Callable[..., jax.Array] = lambda y, residual: y
    residual: bool = False
    activated: bool = False
    target: str = ""
    contexts: tuple[str, ...] = CONTEXTS


class Case(NamedTuple):
    """One program of each library: a norm, its context, and the norm's input."""

    norm: str
    context: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def floor(self) -> int:
        """The least it must move, over the bytes of x."""
        return NORMS[self.norm].floors[self.context != FORWARD]

    @property
    def itemsize(self) -> int:
        """Bytes of an entry of x."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def x_bytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * self.itemsize

    @property
    def size(self) -> str:
        """The shape, for people."""
        return " x ".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.norm}, {self.context}, {self.dtype}, {self.size}"

    def larger(self) -> "Case":
        """Returns the same with a longer first axis, so that x does not fit on a TPU's chip."""
        times = 2 ** max(0, math.ceil(math.log2(LARGE / self.x_bytes)))
        return self._replace(shape=(self.shape[0] * times, *self.shape[1:]))


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
      sharding: where the arguments are.
      device: what Pallas asks about it.
      on_chip: how a layout says that an array is not in the memory whose traffic is counted.
      windows: whether the products beside images are convolutions of 3 x 3, which take XLA for TPU
        half a minute, or of 1 x 1.
    """

    sharding: Any
    device: Any = None
    on_chip: str = ""
    windows: bool = True


class Compiled(NamedTuple):
    """What a program launches, one by one and in sum, and the bytes that it keeps meanwhile."""

    kernels: list[tuple[traffic_hlo.Kernel, bool]]
    traffic: traffic_hlo.Traffic
    temp_bytes: int

    def listing(self, case: Case) -> str:
        """Returns what is launched, a line each, with the bytes over those of x."""
        return "\n".join(
            f"    {kernel.bytes / case.x_bytes:7.3f}  {kernel.opcode:12} {kernel.name}"
            f"{', a product' * (kernel.products > 0)}{', perhaps' * maybe}"
            for kernel, maybe in self.kernels
        )


def target(name: str) -> Target:
    """Returns a target by name, "h200" or "v5e"; neither machine needs to be there."""
    jax.devices()  # The plugins are known only after it.
    if name == "v5e":
        device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
        sharding, described = SingleDeviceSharding(device), ("TPU v5 lite", 1, "tpu")
        return Target(sharding, AbstractDevice(*described), "S(1)", windows=False)
    config = (pathlib.Path(__file__).parent / "targets" / "h200.txtpb").read_text()
    described = topologies.get_topology_desc(name, "cuda", target_config=config, topology="1x1x1")
    sharding = SingleDeviceSharding(described.devices[0])
    return Target(sharding, AbstractDevice("NVIDIA H200", 132, "gpu"))


def cases(name: str) -> Iterator[Case]:
    """Yields all that is counted for a target."""
    for norm, about in NORMS.items():
        if about.target not in ("", name):
            continue
        for context in about.contexts:
            for dtype in ("bfloat16", "float32"):
                for shape in about.shapes:
                    case = Case(norm, context, dtype, shape)
                    yield case.larger() if name == "v5e" else case


def is_quick(name: str, case: Case) -> bool:
    """Returns whether a program is counted by default: those that say most for their time."""
    first = case.shape[1:] == NORMS[case.norm].shapes[0][1:]
    if case.dtype == "float32":
        limited = case.norm in ("layer_norm", "batch_norm") and case.context == BOTH
        return first and limited and name == "h200"
    other_rows = case.norm == "layer_norm" and case.context == FORWARD and name == "h200"
    return (first and case.context in QUICK[name].get(case.norm, ())) or other_rows


def _alone(function):
    return lambda x, scale, bias, stats: (function(x, scale, bias), stats)


def _batch(x, scale, bias, stats, **options):
    return normax.batch_norm(x, stats, scale, bias, use_running_average=False, **options)


def _batch_of_flax(dtype):
    return nn.BatchNorm(use_running_average=False, dtype=dtype)


def _group(x, scale, bias, **options):
    return normax.group_norm(x, scale, bias, num_groups=GROUPS, **options)


def _by_kernel(function, implementation):
    return _alone(functools.partial(function, implementation=implementation))


def _rms(x, scale, bias, **options):
    return normax.rms_norm(x, scale, **options)


def _group_of_flax(dtype):
    return nn.GroupNorm(num_groups=GROUPS, dtype=dtype)


_LAYER = Norm(ROWS, (2, 5), _alone(normax.layer_norm), lambda dtype: nn.LayerNorm(dtype=dtype))
_RMS = _LAYER._replace(normax=_alone(_rms), flax=lambda dtype: nn.RMSNorm(dtype=dtype))
_BATCH = Norm(IMAGES, (3, 8), _batch, _batch_of_flax)
_GROUP = Norm(SLABS, (3, 8), _alone(_group), _group_of_flax)
NORMS = {
    "layer_norm": _LAYER,
    "layer_norm + gelu": _LAYER._replace(
        shapes=((8192, 4096), (8192, 768)),
        normax=_alone(functools.partial(normax.layer_norm, activation=jax.nn.gelu)),
        after=lambda y, residual: jax.nn.gelu(y),
        activated=True,
    ),
    "layer_norm, then gelu": _LAYER._replace(
        shapes=((8192, 4096), (8192, 768)), after=lambda y, residual: jax.nn.gelu(y)
    ),
    "rms_norm": _RMS,
    "rms_norm + gelu": _RMS._replace(
        shapes=((8192, 4096), (8192, 768)),
        normax=_alone(functools.partial(_rms, activation=jax.nn.gelu)),
        after=lambda y, residual: jax.nn.gelu(y),
        activated=True,
    ),
    "batch_norm": _BATCH,
    "batch_norm + relu": _BATCH._replace(
        normax=functools.partial(_batch, activation=jax.nn.relu),
        after=lambda y, residual: jax.nn.relu(y),
        activated=True,
    ),
    "batch_norm, then relu": _BATCH._replace(after=lambda y, residual: jax.nn.relu(y)),
    "batch_norm + add + relu": _BATCH._replace(
        floors=(4, 10), after=lambda y, residual: jax.nn.relu(y + residual), residual=True
    ),
    "group_norm": _GROUP,
    "group_norm + silu": _GROUP._replace(
        normax=_alone(functools.partial(_group, activation=jax.nn.silu)),
        after=lambda y, residual: jax.nn.silu(y),
        activated=True,
    ),
    "group_norm, then silu": _GROUP._replace(
        after=lambda y, residual: jax.nn.silu(y), target="h200"
    ),
    "instance_norm": _GROUP._replace(
        normax=_alone(normax.instance_norm), flax=lambda dtype: nn.InstanceNorm(dtype=dtype)
    ),
}

# XLA splits products of few rows, and moves more for that than a norm does.
for norm in ("layer_norm", "rms_norm", "batch_norm"):
    NORMS[f"{norm} of little"] = NORMS[norm]._replace(
        shapes=FEW_IMAGES if norm == "batch_norm" else FEW_ROWS,
        target="h200",
        contexts=CONTEXTS[:2],
    )

# A kernel that is asked for cannot be fused into a product, as XLA's form can.
for name, kernel in (("h200", "mosaic_gpu"), ("v5e", "mosaic_tpu")):
    for norm, function in (("layer_norm", normax.layer_norm), ("rms_norm", _rms)):
        NORMS[f"{norm} by {kernel}"] = NORMS[norm]._replace(
            normax=_by_kernel(function, kernel), target=name, contexts=CONTEXTS[:2]
        )

# Slabs that a processor of an H200 holds, which are then read once.
for norm in ("group_norm", "group_norm + silu"):
    NORMS[f"{norm} by mosaic_gpu"] = NORMS[norm]._replace(
        shapes=SLABS[1:],
        floors=(2, 5),
        normax=_by_kernel(
            functools.partial(_group, activation=jax.nn.silu if "silu" in norm else None),
            "mosaic_gpu",
        ),
        target="h200",
        contexts=CONTEXTS[:2],
    )
# Images would be laid out anew for it, which costs more than it saves.
NORMS["batch_norm by mosaic_tpu"] = _BATCH._replace(
    shapes=((2**18, 512),),
    normax=functools.partial(_batch, implementation="mosaic_tpu"),
    target="v5e",
    contexts=CONTEXTS[:2],
)

QUICK = {
    "h200": {
        "layer_norm": CONTEXTS,
        "rms_norm": CONTEXTS,
        "rms_norm + gelu": (BOTH,),
        "batch_norm": (FORWARD, BOTH),
        "batch_norm + relu": CONTEXTS,
        "batch_norm, then relu": (BOTH,),
        "batch_norm + add + relu": (BOTH,),
        "group_norm + silu": CONTEXTS,
        "group_norm, then silu": (FORWARD, BOTH),
        "instance_norm": (BOTH,),
        "layer_norm of little": (BOTH,),
        "batch_norm of little": (BOTH,),
        "layer_norm by mosaic_gpu": (FORWARD, BOTH),
        "group_norm + silu by mosaic_gpu": (FORWARD, BOTH),
    },
    "v5e": {
        "layer_norm": CONTEXTS,
        "rms_norm": (FORWARD, BOTH),
        "batch_norm, then relu": CONTEXTS,
        "layer_norm by mosaic_tpu": (FORWARD, BOTH),
        "batch_norm by mosaic_tpu": (BOTH,),
    },
}


def compiled(case: Case, library: str, goal: Target) -> Compiled:
    """Compiles a program of a library and counts it."""
    function = jax.jit(program(case, library))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=goal.device)):
        made = function.lower(*arguments(case, library, goal)).compile()
    text, memory = made.as_text(), made.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError(f"{case}: the compiler shows no text, or no memory")
    read = traffic_hlo.Program(text, goal.on_chip)
    itemsize = case.itemsize if case.context == BETWEEN else 0
    kernels = list(read.kernels(itemsize))
    products = sum(kernel.products for kernel, _ in kernels)
    if itemsize and products != PRODUCTS:
        # What is subtracted for a product must be a product of the program's.
        raise RuntimeError(f"{case} of {library}: {products} products, where {PRODUCTS} are asked")
    return Compiled(kernels, read.traffic(itemsize), memory.temp_size_in_bytes)


def program(case: Case, library: str) -> Callable[..., Any]:
    """Returns the function to compile, of a dict of what has a gradient, statistics, and dy."""
    layer = _layer(case, library)

    def between(given, stats):
        h, new = layer({**given, "x": _product(given["x"], given["w1"])}, stats)
        return _product(h, given["w2"]), new

    def forward(given, stats, dy):
        return layer(given, stats)

    def both(given, stats, dy):
        function = between if case.context == BETWEEN else layer
        y, backward, new = jax.vjp(lambda g: function(g, stats), given, has_aux=True)
        # In a model dy comes after y, and no kernel sees both.
        y, dy = lax.optimization_barrier((y, dy))
        return y, new, backward(dy)

    return forward if case.context == FORWARD else both


def _layer(case, library):
    norm = NORMS[case.norm]
    module = norm.flax(jnp.dtype(case.dtype))

    def layer(given, stats):
        x, scale, bias = given["x"], given["scale"], given["bias"]
        if library == "normax":
            y, stats = norm.normax(x, scale, bias, stats)
            if norm.activated:
                return y, stats
        else:
            params = (
                {"scale": scale}
                if case.norm.startswith("rms_norm")
                else {"scale": scale, "bias": bias}
            )
            variables = {"params": params, "batch_stats": stats}
            y, stats = module.apply(variables, x, mutable=["batch_stats"])
        return norm.after(y, given.get("residual")), stats

    return layer


def _product(x, w):
    if w.ndim == 2:
        return x @ w
    # As cuDNN wants the weights: others would be transposed, which is not the norm's doing.
    names = ("NHWC", "OHWI", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names)


def arguments(case: Case, library: str, goal: Target) -> tuple[Any, Any, Any]:
    """Returns shapes and dtypes of what `program` is given."""
    features = case.shape[-1:]

    def of(shape, dtype=case.dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=goal.sharding)

    given = {"x": of(case.shape)}
    given |= {name: of(features, "float32") for name in ("scale", "bias")}
    if NORMS[case.norm].residual:
        given["residual"] = of(case.shape)
    if case.context == BETWEEN:
        image = len(case.shape) == 4
        outside = features if image else (min(WIDTH, TIMES * features[0]),)
        given["x"] = of((*case.shape[:-1], *outside))
        given["w1"], given["w2"] = of(outside + features), of(features + outside)
        if image and goal.windows:
            given["w1"] = given["w2"] = of((*features, 3, 3, *features))
    stats = {}
    if case.norm.startswith("batch_norm"):
        stats = jax.eval_shape(lambda: normax.RunningStats.create(features))
        if library == "flax":
            stats = {"mean": stats.mean, "var": stats.var}
    stats = jax.tree.map(lambda leaf: of(leaf.shape, leaf.dtype), stats)
    return given, stats, of(given["x"].shape)
