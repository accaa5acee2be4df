"""Mosaic GPU kernels: what they compute, by the interpreter, and what they compile to for an H200.

Nothing here shows speed, or that a GPU agrees with the interpreter: that takes one.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_accuracy import GRID, LIMITS, stress, units

import normax
from normax.kernels import mosaic_gpu as kernels
from normax.kernels import mosaic_gpu_rows as rows
from normax.kernels import row_arithmetic as arithmetic

ROOT = pathlib.Path(__file__).parent.parent
DTYPES = ["float32", "bfloat16", "float16"]
# Interpreters before JAX 0.11 do not know that copies end at the end of an array.
ENDS = jax.__version_info__ >= (0, 11)
# Rows of a warp, of a warpgroup, of two; whole and not; fewer rows than programs and more.
WHOLE = [
    ((8, 64), "float32", True),
    ((8, 64), "float16", False),
    ((4, 512), "bfloat16", True),
    *(
        [
            ((3, 2048), "float32", True),
            ((3, 2048), "float32", False),
            ((3, 2048), "float16", True),
            ((2, 4352), "float32", True),
        ]
        if ENDS  # older interpreters see no races, and take long
        else []
    ),
]
RAGGED = [
    ((5, 64), "float32", True),
    ((1, 8), "bfloat16", True),
    ((6, 1000), "bfloat16", False),
    ((3, 1064), "float32", True),
    ((2, 5000), "float16", True),
]
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
for_h200 = pytest.mark.skipif(
    not (importlib.util.find_spec("jax_cuda12_plugin") and ENDS),
    reason="needs jax-cuda12-pjrt to compile with",
)


@pytest.fixture(autouse=True)
def races(monkeypatch):
    """Has the interpreter raise where a warpgroup or a copy reads or writes too early."""
    if ENDS:
        found = rows._interpreter()
        watchful = dataclasses.replace(found, detect_races=True)
        monkeypatch.setattr(rows, "_interpreter", lambda: watchful)


def data(shape, dtype, seed=0, mean=0.0, deviation=1.0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape) * deviation + mean, dtype)
    dy, other = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), "float32") for _ in range(2))
    return x, dy, other, scale, bias


def exact(x, centered, epsilon=1e-5):
    return Case("rows", None, x.shape, (x.ndim - 1,), epsilon=epsilon, centered=centered)


KERNELS = ("forward", "backward", "add_forward", "add_backward")


def check(shape, dtype, centered, interpret, which=KERNELS, **how):
    """Holds kernels to long double."""
    x, dy, other, scale, bias = data(shape, dtype, **how)
    options = {"centered": centered, "epsilon": 1e-5, "interpret": interpret}
    case = exact(x, centered)
    wide = [np.asarray(each).astype(np.longdouble) for each in (dy, other, scale, bias)]
    long_dy, long_other, long_scale, long_bias = wide
    y_limit, dx_limit = LIMITS[dtype]

    def run(function, *args):
        # One at a time: interpreted kernels that run at once wait for each other for ever.
        return jax.block_until_ready(jax.jit(functools.partial(function, **options))(*args))

    def check_gradients(found, right):
        dx, dscale, dbias = found
        over = tuple(range(x.ndim - 1))
        assert dx.dtype == x.dtype
        assert dscale.dtype == dbias.dtype == jnp.float32
        assert units(dx, right, dtype) <= dx_limit
        xhat = reference.forward(case, x)
        assert units(dscale, (long_dy * xhat).sum(over), "float32") <= 16
        assert units(dbias, long_dy.sum(over), "float32") <= 8

    if "forward" in which:
        y, mean, var = run(kernels.forward_with_statistics, x, scale, bias)
        assert y.dtype == x.dtype
        assert mean.shape == var.shape == x.shape[:-1]
        assert units(y, reference.forward(case, x, long_scale, long_bias), dtype) <= y_limit
        _, _, exact_var, _ = reference.statistics(case, x)
        long_x = np.asarray(x).astype(np.longdouble)
        off = np.abs(np.asarray(mean) - (long_x.mean(-1) if centered else 0))
        # Of the result, and of the deviations from the pivot that were summed.
        size = np.abs(long_x).max(-1) + np.ptp(long_x, -1)
        assert np.all(off <= np.finfo("float32").eps * size)
        assert units(var, exact_var[..., 0], "float32") <= 16
    exact_dx = reference.backward(case, x, long_dy * long_scale)
    if "backward" in which:
        check_gradients(run(kernels.backward, x, scale, dy), exact_dx)
    if "add_forward" in which:
        s, y = run(kernels.add_forward, x, other, scale, bias)
        sums = (x.astype("float32") + other.astype("float32")).astype(dtype)
        np.testing.assert_array_equal(s, sums)
        right = reference.forward(exact(s, centered), s, long_scale, long_bias)
        assert units(y, right, dtype) <= y_limit
    if "add_backward" in which:
        found = run(kernels.add_backward, x, scale, dy, other)
        check_gradients(found, exact_dx + long_other)


@pytest.mark.parametrize(("shape", "dtype", "centered"), WHOLE)
def test_whole_rows(shape, dtype, centered):
    check(shape, dtype, centered, True)


@pytest.mark.skipif(not ENDS, reason="JAX's interpreter before 0.11 refuses to read past an end")
@pytest.mark.parametrize(("shape", "dtype", "centered"), RAGGED)
def test_ragged_rows(shape, dtype, centered):
    check(shape, dtype, centered, True)


@pytest.mark.parametrize("mapped", ["rows", "parameters", "sums", "twice"])
def test_what_is_mapped_over(mapped):
    x, dy, other, scale, bias = data((4, 4, 4, 64), "float32")
    how = {"centered": True, "epsilon": 1e-5, "interpret": True}
    forward = lambda *args: kernels.forward_with_statistics(*args, **how)
    if mapped == "rows":
        f, args, dims = forward, (x, scale, bias), (1, None, None)
        found = jax.vmap(f, dims, 1)(*args)
        wanted = f(*args)
    elif mapped == "parameters":
        scales = jnp.stack([scale + i for i in range(4)])
        found = jax.vmap(forward, (0, 0, None))(x, scales, bias)
        each = [forward(*pair, bias) for pair in zip(x, scales, strict=True)]
        wanted = [jnp.stack(leaves) for leaves in zip(*each, strict=True)]
    elif mapped == "sums":
        found = jax.vmap(lambda x, dy: kernels.backward(x, scale, dy, **how))(x, dy)
        each = [kernels.backward(a, scale, b, **how) for a, b in zip(x, dy, strict=True)]
        wanted = [jnp.stack(leaves) for leaves in zip(*each, strict=True)]
    else:
        add = lambda x, other: kernels.add_forward(x, other, scale, bias, **how)
        found = jax.vmap(jax.vmap(add), (0, None))(x, other[0])
        wanted = add(x, jnp.broadcast_to(other[0], x.shape))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_more_is_mapped_over_than_a_grid_has_room_for():
    norm = lambda x: kernels.forward(x, centered=True, epsilon=1e-5)
    traced = str(jax.make_jaxpr(jax.vmap(norm))(jnp.zeros((70000, 2, 64))))
    assert "[140000,64]" in traced


@on_gpu
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length",
    [8, 512, 768, 1000, 1024, 2048, 4096, 5000, 5120, 8192, 3, 65, 1001, 8193, 16400, 40000],
)
def test_a_gpu(length, dtype, centered):
    check((1031, length), dtype, centered, False)


@pytest.mark.parametrize("length", [1064, 5000, 8184])
def test_what_leaves_for_memory_is_the_row_and_no_more(length, monkeypatch):
    """A GPU cuts a copy of a single run short where the array ends, not where the row does."""
    sizes = []
    copy = rows.plgpu.copy_smem_to_gmem

    def noted(source, target):
        sizes.append(target.shape[-1])
        copy(source, target)

    monkeypatch.setattr(rows.plgpu, "copy_smem_to_gmem", noted)
    x = jax.ShapeDtypeStruct((3, length), jnp.float32)
    jax.eval_shape(lambda x: kernels.forward(x, centered=True, epsilon=1e-5), x)
    assert sum(sizes) == length


def plain(op, pieces):
    """Returns the total of whole rows, by jax.numpy: what a kernel's warps do together."""
    function = {"add": jnp.sum, "max": jnp.max}[op]
    return function(arithmetic.combine(op, pieces), axis=-1, keepdims=True)


def total(wanted):
    return [plain(op, pieces) for op, pieces in wanted]


@functools.partial(jax.jit, static_argnums=(0, 1))
def arithmetic_of(centered, epsilon, x, dy):
    """Returns y and dx by the arithmetic that the kernels run, on whole rows."""
    units_matter = x.dtype != jnp.float16
    rule = arithmetic.Rule(x.shape[-1], centered, epsilon, units_matter, (None,))
    wide = [each.astype(jnp.float32) for each in (x, dy)]
    [y], _, _ = arithmetic.forward(rule, wide[:1], None, None, total)
    [dx], _ = arithmetic.backward(rule, wide[:1], None, wide[1:], total)
    return y.astype(x.dtype), dx.astype(x.dtype)


def by_kernel(centered, epsilon, x, dy):
    """Returns the same by the kernels, interpreted."""
    options = {"centered": centered, "epsilon": epsilon, "interpret": True}
    forward = jax.jit(lambda x: kernels.forward(x, **options))
    backward = jax.jit(lambda x, dy: kernels.backward(x, None, dy, **options)[0])
    return jax.block_until_ready(forward(x)), jax.block_until_ready(backward(x, dy))


def check_rows(function, x, dy, epsilon=1e-5, either=(True, False)):
    """Holds y and dx of each row to long double, by units of its own largest."""
    y_limit, dx_limit = LIMITS[str(x.dtype)]
    for centered in either:
        case = exact(x, centered, epsilon)
        pairs = zip(
            function(centered, epsilon, x, dy),
            (reference.forward(case, x), reference.backward(case, x, dy)),
            (y_limit, dx_limit),
            strict=True,
        )
        for found, right, limit in pairs:
            for row, (one, other) in enumerate(zip(found, right, strict=True)):
                assert units(one, other, str(x.dtype)) <= limit, (centered, row)


@pytest.mark.parametrize("n", [64, 1000, 8192])
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_the_grid(scale, dtype, n):
    x, dy, *_ = data((6, n), dtype, mean=scale[0], deviation=scale[1])
    check_rows(arithmetic_of, x, dy)


@pytest.mark.parametrize("n", [64, 1000, 8192])
def test_stress_rows(n):
    x = jnp.asarray(np.stack(list(stress(n).values())), "float32")
    check_rows(arithmetic_of, x, data(x.shape, "float32")[1])


def sized(n):
    """Returns rows of every size, of both signs, and some of one size in parts."""
    rng = np.random.default_rng(3)
    normal = rng.normal(size=n)
    rows_ = [normal / np.abs(normal).max() * size for size in (1e-30, 1e-20, 1e-6, 1e12, 1e20)]
    rows_ += [normal / np.abs(normal).max() * 3e38, normal * 1e24 + 1e30]
    return jnp.asarray(np.stack([*rows_, np.where(normal > 2, 1e30, normal)]), "float32")


@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 1e-12, 1e-5])
def test_entries_of_any_size(epsilon):
    x = sized(1000)
    y, dx = arithmetic_of(True, epsilon, x, data(x.shape, "float32")[1])
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    # Where epsilon is nothing beside the square of the smallest, or the square is nothing.
    x = x[3:] if epsilon else x
    either = (True, False)
    check_rows(arithmetic_of, x, data(x.shape, "float32")[1], epsilon, either)


@pytest.mark.parametrize("function", [arithmetic_of, by_kernel])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_rows_are_zero_with_the_right_gradient(dtype, function):
    values = [0.0, 1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, -1e30, 3e38]
    x = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (8, 256))
    dy = data(x.shape, dtype)[1]
    y, _ = function(True, 1e-5, x, dy)
    np.testing.assert_array_equal(y, jnp.zeros_like(y))
    check_rows(function, x, dy, either=(True,))


@pytest.mark.parametrize("n", [256, 2048])
def test_hard_rows_interpreted(n):
    hard = np.stack([*stress(n).values(), *np.asarray(sized(n))[-1:]])
    x = jnp.asarray(hard, "float32")
    check_rows(by_kernel, x, data(x.shape, "float32")[1], either=(True,))


def test_many_rows_of_a_program(monkeypatch):
    """A program goes round its stages of memory more than once."""
    monkeypatch.setattr(rows, "PROCESSORS", 1)
    task = kernels._backward_task(arithmetic.Rule(2048, True, 0.0, True), jnp.zeros(0), True, False)
    plan = rows.make_plan(task, 13, 2048, ["float32"] * 2, 1)
    assert plan.programs * plan.stages < 13
    check((13, 2048), "float32", True, True)


def test_nothing_and_any_leading_shape():
    check((2, 2, 64), "float32", True, True)
    x, _, _, scale, bias = data((0, 3, 64), "float32")
    options = {"centered": True, "epsilon": 1e-5}
    y, mean, var = kernels.forward_with_statistics(x, scale, bias, **options)
    assert (y.shape, mean.shape, var.shape) == ((0, 3, 64), (0, 3), (0, 3))
    dx, dscale, dbias = kernels.backward(x, scale, x, **options)
    assert dx.shape == x.shape
    np.testing.assert_array_equal((dscale, dbias), np.zeros((2, 64)))


def test_supports_says_why_not():
    def why(shape, dtype, **how):
        return kernels.supports(jax.ShapeDtypeStruct(shape, dtype), **how)

    for length in (3, 65, 1000, 1001, 4096, 8192, 8193, 16400, 40000):
        for dtype in DTYPES:
            assert why((4, length), dtype) is None
    assert "float64" in why((4, 64), "float64")
    assert "int32" in why((4, 64), "int32")
    assert why((0, 64), "float32") is None
    assert why((4, 0), "float32") == why((), "float32") == "there is no row"
    assert why((4, 1), "float32") == "a row is a single entry"


@functools.cache
def compiled(shape, *only):
    """Returns what the kernels compile to for an H200: program to row of the table of costs."""
    command = [sys.executable, str(ROOT / "benchmarks" / "costs_gpu.py"), "--json", shape]
    command += ["--only", *only] if only else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {row["program"]: row for row in json.loads(said.stdout.splitlines()[-1])}


@for_h200
@pytest.mark.parametrize("shape", ["32768x4096xbfloat16", "131072x1000xbfloat16"])
def test_an_h200_moves_each_array_once(shape):
    found = compiled(shape)
    assert len(found) == 8
    for name, row in found.items():
        assert row["mosaic_gpu"] == (2 if name == "layer both" else 1), name
        assert row["over floor"] <= (1.1 if "back" in name or "both" in name else 1.005), name


REGISTERS = [(512, "bfloat16"), (1000, "float16"), (4096, "bfloat16"), (8192, "float32")]
PASSES = [(3, "float32"), (1001, "bfloat16"), (40000, "float16")]


@pytest.mark.parametrize(("length", "dtype"), REGISTERS + PASSES)
def test_kernels_lower_for_cuda(length, dtype):
    """On every version of JAX: the API that they use is the same."""
    x, scale = jax.ShapeDtypeStruct((300, length), dtype), jax.ShapeDtypeStruct((length,), dtype)
    how = {"centered": True, "epsilon": 1e-5}

    def all_of(x, scale):
        y, *statistics = kernels.forward_with_statistics(x, scale, scale, **how)
        made = [y, statistics, kernels.backward(x, scale, y, **how)]
        made += [kernels.add_forward(x, y, scale, **how)]
        return [*made, kernels.add_backward(x, scale, y, y, **how)]

    text = jax.jit(all_of).trace(x, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 4


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_by_default(dtype):
    """On a Hopper GPU no name is asked for: plain, mapped, and differentiated twice."""
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("needs a Hopper GPU")
    x, dy, _, scale, bias = data((6, 40, 1024), dtype)

    def norm(x, by=None):
        return normax.layer_norm(x, scale, bias, epsilon=1e-5, implementation=by)

    text = jax.jit(norm).lower(x).compile().as_text()
    assert ("normax_forward" in text) == (dtype != "float16")
    y_limit, dx_limit = LIMITS[dtype]
    case = Case("rows", None, x.shape, (2,), epsilon=1e-5)
    long_scale, long_bias, long_dy = (
        np.asarray(each).astype(np.longdouble) for each in (scale, bias, dy)
    )
    exact_y = reference.forward(case, x, long_scale, long_bias)
    exact_dx = reference.backward(case, x, long_dy * long_scale)
    for f in (norm, jax.vmap(norm), jax.vmap(norm, 1, 1)):
        y, pull = jax.vjp(f, x)
        [dx] = jax.jit(pull)(dy)
        assert units(y, exact_y, dtype) <= y_limit
        assert units(dx, exact_dx, dtype) <= dx_limit
    if dtype == "float32":
        along = lambda by: lambda t: jnp.sum(jnp.sin(norm(x + t * jnp.cos(x), by)))
        found, wanted = (jax.hessian(along(by))(jnp.float32(0.3)) for by in (None, "xla"))
        np.testing.assert_allclose(found, wanted, rtol=1e-3)


@on_gpu
def test_many_gpus_in_one_program_are_partitioned():
    """Of one GPU a mesh can be made too, of any kind of axes."""
    x, _, _, scale, bias = data((64, 1024), "float32")
    wanted = jax.jit(normax.layer_norm)(x, scale, bias)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(v, NamedSharding(mesh, spec))
                for v, spec in ((x, P("data")), (scale, P()), (bias, P()))
            ]
            for by in (None, "mosaic_gpu"):
                found = jax.jit(functools.partial(normax.layer_norm, implementation=by))(*placed)
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
