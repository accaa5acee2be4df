"""What a contestant is, and those that run in JAX: one program for each of a case's modes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.speed import exact
from benchmarks.speed.cases import ACTIVATIONS, Case
from benchmarks.speed.peers import Fused, Norm

SETS = 3


@dataclasses.dataclass
class Contestant:
    """Something to be timed.

    Attributes:
      call: runs once on the input set of that number, without waiting.
      wait: waits for what `call` returned.
      check: returns results by name, cut to the slice of `exact`; None for what is not checked.
      kernel: returns milliseconds that the device was busy, for each of a number of calls, or None
        where that cannot be had.
      kept: bytes that the forward pass keeps for the backward pass, or None.
      scratch: bytes that a call takes beside its inputs, outputs included, or None.
    """

    call: Callable[[int], Any]
    wait: Callable[[Any], Any]
    check: Callable[[], dict[str, np.ndarray]] | None = None
    kernel: Callable[[int], list[float] | None] | None = None
    kept: int | None = None
    scratch: int | None = None


@dataclasses.dataclass
class Inputs:
    """The arrays of a case.

    Attributes:
      sets: x, second where there is one, dy, and dsum for "add": several, taken in turn, so that
        nothing is found in a cache that would not be there in a model.
      scale: float32, of values that are exact in bfloat16.
      bias: likewise.
      check: the first set, with cotangents that are zero outside of the slice.
    """

    sets: list[dict[str, jax.Array]]
    scale: jax.Array
    bias: jax.Array
    check: dict[str, jax.Array]


def make_inputs(case: Case) -> Inputs:
    """Returns normal numbers, x of mean 0.5, for a case."""
    names = ["x", "dy"] + ["second"] * case.second + ["dsum"] * (case.wrap == "add")
    normal = jax.jit(lambda key, mean: mean + jax.random.normal(key, case.shape, case.dtype))

    def make(first):
        return {
            name: normal(jax.random.key(first + i), jnp.asarray(0.5 * (name == "x"), case.dtype))
            for i, name in enumerate(names)
        }

    rng = np.random.default_rng(0)
    scale, bias = (
        jnp.asarray(mean + 0.25 * rng.standard_normal(case.shape[-1]), "bfloat16").astype("float32")
        for mean in (1, 0)
    )
    sets = [make(number * len(names)) for number in range(SETS)]
    axis = exact.axis(case) % len(case.shape)
    inside = np.zeros([n if i == axis else 1 for i, n in enumerate(case.shape)], bool)
    inside[(slice(None),) * axis + (exact.indices(case),)] = True
    masked = jax.jit(lambda v: jnp.where(inside, v, jnp.zeros((), v.dtype)))
    check = {n: masked(v) if n in ("dy", "dsum") else v for n, v in sets[0].items()}
    return Inputs(sets, scale, bias, check)


def expected(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns the exact results of the slice."""
    cut = {name: take(case, value) for name, value in inputs.check.items()}
    batch = case.norm == "batch"
    where = exact.indices(case)
    for name, value in (("scale", inputs.scale), ("bias", inputs.bias)):
        cut[name] = np.asarray(value)[where] if batch else np.asarray(value)
    return exact.answer(case, cut)


def take(case: Case, value: jax.Array) -> np.ndarray:
    """Returns the slice of an array of the shape of x, or of its features."""
    if value.ndim == 1 and case.norm != "batch":
        return np.asarray(value)
    axis = exact.axis(case) if value.ndim > 1 else 0
    return np.asarray(jnp.take(value, exact.indices(case), axis))


def composed(case: Case, norm: Norm | Fused) -> Callable[[dict, dict], Any]:
    """Returns a function of two dicts, what is differentiated and the rest: (outputs, state)."""

    def run(wanted, rest):
        given = wanted | rest
        x, second, state = given["x"], given.get("second"), ()
        if isinstance(norm, Fused):
            return norm.function(x, second, given["scale"], given["bias"])
        if case.wrap == "add":
            x = x + second
        y = norm(x, given["scale"], given["bias"])
        if case.norm == "batch":
            y, state = y
        y = y.astype(x.dtype)
        outputs = {"sum": x} if case.wrap == "add" else {}
        if case.wrap == "gate":
            y = y * jax.nn.silu(second)
        elif case.wrap == "add_relu":
            y = jax.nn.relu(y + second)
        elif case.wrap in ACTIVATIONS:
            y = ACTIVATIONS[case.wrap](y)
        return outputs | {"y": y}, state

    return run


def differentiated(case: Case) -> list[str]:
    """Returns the inputs whose gradients are wanted: of x + r one gradient serves both."""
    names = ["x", "scale"] + ["bias"] * case.centered
    return names + ["second"] * (case.second and case.wrap != "add")


def in_jax(case: Case, norm: Norm | Fused, inputs: Inputs) -> Contestant:
    """Returns a norm as a contestant, compiled.

    Args:
      case: operation, shape and mode.
      norm: what `peers.norms` makes.
      inputs: of the case.

    Returns:
      The contestant; its backward pass begins with what the forward pass kept.
    """
    function = composed(case, norm)
    wanted_names = differentiated(case)

    def split(given):
        given = given | {"scale": inputs.scale, "bias": inputs.bias}
        wanted = {name: given[name] for name in wanted_names}
        rest = {n: v for n, v in given.items() if n not in wanted and n not in ("dy", "dsum")}
        cotangents = {"y": given["dy"]}
        if case.wrap == "add":
            cotangents["sum"] = given["dsum"]
        return wanted, rest, cotangents

    sets, kept = [split(given) for given in inputs.sets], None
    checked = split(inputs.check)

    def forward(wanted, rest, _):
        return function(wanted, rest)

    def both(wanted, rest, cotangents):
        outputs, pull, state = jax.vjp(lambda w: function(w, rest), wanted, has_aux=True)
        # A model computes what is between: its backward pass cannot begin with the forward one.
        outputs, cotangents = lax.optimization_barrier((outputs, cotangents))
        return outputs | {f"d{name}": v for name, v in pull(cotangents)[0].items()}, state

    if case.mode == "backward":
        keep = jax.jit(lambda w, r: jax.vjp(lambda w: function(w, r), w, has_aux=True)[1])
        pulls = [keep(wanted, rest) for wanted, rest, _ in sets]
        tree = jax.tree.structure(pulls[0])
        leaves = [jax.tree.leaves(pull) for pull in pulls]
        kept = sum(leaf.nbytes for leaf in leaves[0])

        def backward(leaves, cotangents):
            found = jax.tree.unflatten(tree, leaves)(cotangents)[0]
            return {f"d{name}": v for name, v in found.items()}, ()

        program, arguments = backward, [(x, s[2]) for x, s in zip(leaves, sets, strict=True)]
        check_arguments: tuple = (leaves[0], checked[2])
    else:
        program: Any = forward if case.mode == "forward" else both
        arguments, check_arguments = sets, checked
    compiled = jax.jit(program).lower(*arguments[0]).compile()

    def check():
        return {name: take(case, v) for name, v in compiled(*check_arguments)[0].items()}

    return Contestant(
        lambda i: compiled(*arguments[i % len(arguments)]),
        jax.block_until_ready,
        check,
        device_times(compiled, arguments[0]),
        kept,
        scratch(compiled),
    )


def device_times(compiled: Any, arguments: Any) -> Callable[[int], list[float] | None] | None:
    """Returns a function that times a number of calls by the device's own clock, on a GPU."""
    if jax.default_backend() != "gpu":
        return None

    def kernel(iterations):
        from jax.experimental.mosaic.gpu import profiler

        found = profiler.measure(compiled, iterations=iterations)(*arguments)[1]
        return [found] if isinstance(found, float) else found

    return kernel


def scratch(compiled: Any) -> int | None:
    """Returns the bytes of outputs and of what is in between, as the compiler says."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
