"""Forward and backward of every normalizer in the tests' table, against the naive formula and Flax.

    python benchmarks/layers.py [--times 100] [--rounds 30] [--dtype float32]

Each axis of a case is lengthened by --times. The three run in turn, round after round, in one
process; shown is the median time and the median of the ratios of a round. On CPU set
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ high (say 4294967296): page faults rule otherwise.
"""

import argparse
import pathlib
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import reference
from cases import CASES


def flax_layer(case):
    """Returns Flax's module for a case, or None where it has none."""
    if case.name.startswith("batch"):
        axis = case.features if len(case.features) > 1 else case.features[0]
        return nn.BatchNorm(use_running_average=case.fixed, axis=axis)
    if case.name.startswith("group"):
        last = case.features == (-1,)
        return nn.GroupNorm(num_groups=case.groups, epsilon=case.epsilon) if last else None
    if case.name.startswith("instance"):
        return nn.InstanceNorm(feature_axes=case.features, epsilon=case.epsilon)
    kind = nn.LayerNorm if case.centered else nn.RMSNorm
    return kind(reduction_axes=case.reduced, epsilon=case.epsilon)


def step(function, ct):
    """Returns the jitted output and gradients of a function of (x, scale, bias)."""

    def run(x, scale, bias):
        y, vjp = jax.vjp(function, x, scale, bias)
        return y, vjp(ct.astype(y.dtype))

    return jax.jit(run)


def contestants(case, ct):
    """Returns the functions to time, by name."""
    found = {
        "normax": step(lambda *args: case.apply(*args, None), ct),
        "naive": step(reference.naive(case), ct),
    }
    layer = flax_layer(case)
    if layer is not None:

        def theirs(x, scale, bias):
            params = {"scale": scale, "bias": bias} if case.bias else {"scale": scale}
            stats = {"mean": jnp.zeros(scale.shape), "var": jnp.ones(scale.shape)}
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

        found["flax"] = step(theirs, ct)
    return found


def milliseconds(function, args):
    """Returns how long one call takes."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return 1e3 * (time.perf_counter() - start)


def ratio(rounds, name):
    """Returns the median ratio of normax to another, round by round, as text."""
    ratios = [times["normax"] / times[name] for times in rounds if name in times]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def main() -> None:
    """Times the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    table = Table(title=f"forward + backward, {options.dtype}, {jax.devices()[0].device_kind}")
    for heading in ("case", "shape", "normax, ms", "normax / naive", "normax / flax"):
        table.add_column(heading, justify="left" if heading in ("case", "shape") else "right")
    for case in CASES:
        # Rank 3 is lengthened less, so that all have some hundreds of thousands of entries.
        factor = max(2, round(options.times ** (2 / len(case.shape))))
        large = case._replace(shape=tuple(factor * size for size in case.shape))
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], large.shape).astype(options.dtype)
        ct = jax.random.normal(keys[1], large.shape).astype(options.dtype)
        args = x, jnp.ones(large.parameter_shape()), jnp.zeros(large.parameter_shape())
        functions = contestants(large, ct)
        for function in functions.values():
            milliseconds(function, args)
        rounds = [
            {name: milliseconds(function, args) for name, function in functions.items()}
            for _ in range(options.rounds)
        ]
        table.add_row(
            case.name,
            "x".join(map(str, large.shape)),
            f"{statistics.median(r['normax'] for r in rounds):.2f}",
            ratio(rounds, "naive"),
            ratio(rounds, "flax"),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
