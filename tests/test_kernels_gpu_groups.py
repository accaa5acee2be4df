"""Mosaic GPU kernels of groups: what they compute, interpreted, and compile to for an H200.

As for rows, nothing here shows speed, or that a GPU agrees with the interpreter.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import group_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from test_accuracy import GRID, LIMITS, stress, units
from test_kernels_gpu import DTYPES, ENDS, ROOT, for_h200, on_gpu

from normax.kernels import entrywise
from normax.kernels import mosaic_gpu_groups as kernels
from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import mosaic_gpu_slab_plans as plans


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


# Each with itself and its derivative in long double.
ACTIVATIONS = {
    "silu": (jax.nn.silu, lambda y: y * sigmoid(y), lambda y: sigmoid(y) * (1 + y * sigmoid(-y))),
    "relu": (jax.nn.relu, lambda y: np.maximum(y, 0), lambda y: np.where(y > 0, 1, 0)),
    "tanh": (jnp.tanh, np.tanh, lambda y: 1 - np.tanh(y) ** 2),
    None: (None, lambda y: y, np.ones_like),
}
HELD, LOOPS = plans.WAYS[:1], ((False, 2),)
# Groups of a few features and of one, a group to a block; in registers and by two warpgroups'
# loops; as many bytes as copies are of, or fewer.
WHOLE = [
    ((2, 32, 2, 8), "float32", True, None, HELD),
    ((1, 64, 8, 1), "bfloat16", True, "silu", HELD),
    ((2, 16, 1, 32), "float16", False, "relu", HELD),
]
RAGGED = [
    ((1, 150, 2, 12), "float32", True, "silu", LOOPS),
    ((1, 49, 4, 10), "bfloat16", True, None, HELD),
]


@pytest.fixture(autouse=True)
def races(monkeypatch):
    """Has the interpreter raise where a warpgroup or a copy reads or writes too early."""
    if ENDS:
        watchful = dataclasses.replace(rows._interpreter(), detect_races=True)
        monkeypatch.setattr(rows, "_interpreter", lambda: watchful)


def data(shape, dtype, seed=0, mean=0.0, deviation=1.0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape) * deviation + mean, dtype)
    dy = jnp.asarray(rng.normal(size=shape), dtype)
    scale, bias = (jnp.asarray(rng.normal(size=shape[2:]), "float32") for _ in range(2))
    return x, dy, scale, bias


def flat(x):
    """Returns an array with its groups in one axis, as the reference takes it."""
    return np.asarray(x).reshape(*x.shape[:-2], -1)


def exact(x, centered, epsilon=1e-5):
    shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    case = Case("groups", None, shape, (1, 3), groups=x.shape[2], epsilon=epsilon)
    return case._replace(centered=centered)


def entering(x, scale, bias, centered):
    """Returns what goes into an activation, in long double."""
    xhat = reference.forward(exact(x, centered), flat(x))
    scale, bias = (flat(each).astype(np.longdouble) for each in (scale, bias))
    return (xhat * scale + bias).reshape(x.shape)


def right(x, scale, bias, dy, centered, name, epsilon=1e-5):
    """Returns y, dx, dscale and dbias in long double."""
    _, function, derivative = ACTIVATIONS[name]
    case = exact(x, centered, epsilon)
    dy, scale, bias = (flat(each).astype(np.longdouble) for each in (dy, scale, bias))
    xhat = reference.forward(case, flat(x))
    pre = xhat * scale + bias
    dy = dy * derivative(pre)
    dx = reference.backward(case, flat(x), dy * scale)
    found = function(pre), dx, (dy * xhat).sum((0, 1)), dy.sum((0, 1))
    shapes = x.shape, x.shape, x.shape[2:], x.shape[2:]
    return [each.reshape(shape) for each, shape in zip(found, shapes, strict=True)]


@functools.cache
def jitted(module, centered, name, interpret, epsilon):
    options = {"centered": centered, "epsilon": epsilon, "interpret": interpret}
    options["activation"] = ACTIVATIONS[name][0]
    functions = module.forward_groups, module.backward_groups
    return [jax.jit(functools.partial(function, **options)) for function in functions]


def both(module, x, scale, bias, dy, centered, name, interpret=True, epsilon=1e-5):
    """Returns the same by the kernels."""
    forward, backward = jitted(module, centered, name, interpret, epsilon)
    # One at a time: interpreted kernels that run at once wait for each other for ever.
    y = jax.block_until_ready(forward(x, scale, bias))
    return y, *jax.block_until_ready(backward(x, scale, bias, dy))


def check(shape, dtype, centered, name, interpret=True, module=kernels, **how):
    """Holds both passes to long double."""
    x, dy, scale, bias = data(shape, dtype, **how)
    before = entering(x, scale, bias, centered)
    # A rounding decides on which side of zero an entry is, and so what relu's derivative is.
    dy = jnp.where(np.abs(before) < 1e-3, jnp.zeros_like(dy), dy)
    found = both(module, x, scale, bias, dy, centered, name, interpret)
    assert [each.dtype for each in found] == [x.dtype, x.dtype, jnp.float32, jnp.float32]
    wanted = right(x, scale, bias, dy, centered, name)
    # In units of the largest of what goes in, where tanh is given that and returns one at most.
    larger = max(1.0, np.abs(before).max() / np.abs(wanted[0]).max())
    y_limit, dx_limit = (limit * larger for limit in LIMITS[dtype])
    dtypes = dtype, dtype, "float32", "float32"
    off = [units(*each) for each in zip(found, wanted, dtypes, strict=True)]
    assert np.all(np.array(off) <= [y_limit, dx_limit, 16, 16]), off


@pytest.mark.parametrize(("shape", "dtype", "centered", "name", "ways"), WHOLE)
def test_whole_copies(shape, dtype, centered, name, ways, monkeypatch):
    monkeypatch.setattr(plans, "WAYS", ways)
    check(shape, dtype, centered, name)


@pytest.mark.skipif(not ENDS, reason="JAX's interpreter before 0.11 refuses to read past an end")
@pytest.mark.parametrize(("shape", "dtype", "centered", "name", "ways"), RAGGED)
def test_ragged_copies(shape, dtype, centered, name, ways, monkeypatch):
    monkeypatch.setattr(plans, "WAYS", ways)
    plan = plans.make_plan(shape, [dtype] * 2, dtype)
    assert plan.room > shape[1]
    assert (plan.iterations > 1) == (ways is LOOPS)
    check(shape, dtype, centered, name)


@on_gpu
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(49, 32, 16), (196, 32, 10), (1024, 32, 10), (1024, 64, 1)])
def test_a_gpu(size, dtype, name):
    check((7, *size), dtype, True, name, False)


def check_groups(module, x, dy, epsilon=1e-5, names=(None, "silu"), either=(True, False)):
    """Holds y and dx of each group to long double, by units of its own largest."""
    one, zero = jnp.ones(x.shape[2:]), jnp.zeros(x.shape[2:])
    for centered in either:
        for name in names:
            found = both(module, x, one, zero, dy, centered, name, epsilon=epsilon)[:2]
            wanted = right(x, one, zero, dy, centered, name, epsilon)[:2]
            for a, b, limit in zip(found, wanted, LIMITS[str(x.dtype)], strict=True):
                for group in range(x.shape[2]):
                    off = units(a[:, :, group], b[:, :, group], str(x.dtype))
                    assert off <= limit, (centered, name, group)


@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_the_grid(scale, dtype):
    x, dy, *_ = data((2, 250, 3, 4), dtype, mean=scale[0], deviation=scale[1])
    check_groups(group_stand_in, x, dy)


def hard():
    """Returns groups that are hard, eight of them, four features each."""
    rng = np.random.default_rng(3)
    normal = rng.normal(size=256)
    groups = [*stress(256).values(), normal * 1e24 + 1e30]
    return jnp.asarray(np.stack(groups).reshape(8, 64, 4).transpose(1, 0, 2)[None], "float32")


def constant(dtype):
    values = [0.0, 1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, -1e30, 3e38]
    return jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (1, 32, 8, 4))


def test_hard_groups():
    x = hard()
    check_groups(group_stand_in, x, data(x.shape, "float32")[1])


def test_hard_groups_interpreted():
    x = hard()
    check_groups(kernels, x, data(x.shape, "float32")[1], names=[None], either=[True])


@pytest.mark.parametrize(("module", "dtype"), [(group_stand_in, "float32"), (kernels, "bfloat16")])
def test_constant_groups_are_zero_with_the_right_gradient(module, dtype):
    x = constant(dtype)
    dy = data(x.shape, dtype)[1]
    options = {"centered": True, "epsilon": 1e-5, "interpret": True}
    y = jax.jit(functools.partial(module.forward_groups, dtype="float32", **options))(x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, jnp.zeros_like(y))
    if module is group_stand_in:
        check_groups(module, x, dy, either=[True])


def test_no_examples():
    x, _, scale, bias = data((0, 8, 2, 8), "float32")
    options = {"centered": True, "epsilon": 1e-5}
    y = kernels.forward_groups(x, scale, bias, dtype="bfloat16", **options)
    assert (y.shape, y.dtype) == (x.shape, jnp.bfloat16)
    dx, dscale, dbias = kernels.backward_groups(x, scale, bias, x, **options)
    assert dx.shape == x.shape
    np.testing.assert_array_equal((dscale, dbias), np.zeros((2, 2, 8)))


def test_supports_says_why_not():
    def why(shape, dtype="bfloat16", **how):
        return kernels.supports_groups(jax.ShapeDtypeStruct(shape, dtype), **how)

    for size in (16, 24, 32, 40, 64):
        assert why((8, 49, 32, size)) is None
    for size in (10, 16, 20, 30, 40):
        assert why((8, 196, 32, size)) is None
        assert why((8, 256, 32, size)) is None
    for size in (10, 20):
        assert why((8, 1024, 32, size)) is None
        assert why((8, 1024, 32, size), "float32") is None
    for features in (64, 96, 128, 256):
        assert why((8, 1024, features, 1)) is None
    assert why((0, 49, 32, 16)) is None
    assert "4096 positions of a block of groups need" in why((16, 4096, 32, 10))
    assert why((16, 1100, 32, 10), backward=False) is None
    assert "need" in why((16, 1400, 32, 10))
    assert "6 bytes is no multiple of 16" in why((8, 49, 3, 1))
    assert "at most 256 wide" in why((8, 49, 2, 512))
    assert "rank 3" in why((8, 49, 32))
    assert why((8, 0, 32, 4)) == why((8, 4, 0, 4)) == "there is no group"
    assert "float64" in why((8, 49, 32, 16), "float64")
    assert "int32" in why((8, 49, 32, 16), dtype="int32")
    assert why((8, 49, 32, 16), activation=jax.nn.gelu) is None
    assert why((8, 49, 32, 16), activation=jax.nn.softplus) == "the activation takes log1p"
    looped = lambda y: jax.lax.fori_loop(0, 2, lambda _, y: y * y, y)
    assert "scan" in why((8, 49, 32, 16), activation=looped)
    assert "holds arrays" in why((8, 49, 32, 16), activation=lambda y: y * np.ones((1, 1), "f4"))


WRITTEN_OUT = [f for f, _, _ in ACTIVATIONS.values() if f]
WRITTEN_OUT += [jax.nn.gelu, jax.nn.leaky_relu, jax.checkpoint(jax.nn.silu)]


@pytest.mark.parametrize("function", WRITTEN_OUT)
def test_activations_written_out(function):
    y = jnp.linspace(-4, 4, 64).reshape(8, 8)
    np.testing.assert_allclose(entrywise.apply(function, y), function(y), rtol=1e-6, atol=1e-7)
    [wanted] = jax.vjp(function, y)[1](y)
    np.testing.assert_allclose(entrywise.pull(function, y, y), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((49, 32, 16), "float16"), ((256, 32, 10), "float32"), ((1024, 64, 1), "bfloat16")],
)
def test_kernels_lower_for_cuda(size, dtype):
    """On every version of JAX: the API that they use is the same."""
    x, scale = jax.ShapeDtypeStruct((3, *size), dtype), jax.ShapeDtypeStruct(size[1:], dtype)
    how = {"centered": True, "epsilon": 1e-5, "activation": jax.nn.silu}

    def passes(x, scale):
        y = kernels.forward_groups(x, scale, scale, **how)
        return y, kernels.backward_groups(x, scale, scale, y, **how)

    text = jax.jit(passes).trace(x, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2


@for_h200
@pytest.mark.parametrize("shape", ["256x49x32x10xbfloat16"])
def test_an_h200_moves_each_array_once(shape):
    command = [sys.executable, str(ROOT / "benchmarks" / "costs_gpu.py"), "--json", shape]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = {row["program"]: row for row in json.loads(said.stdout.splitlines()[-1])}
    assert len(found) == 4
    for name, row in found.items():
        assert row["mosaic_gpu"] == 1, name
        assert row["over floor"] <= (1.1 if "backward" in name else 1.02), name
        assert not row.get("spilled"), name
