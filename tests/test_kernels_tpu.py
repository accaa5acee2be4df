"""The TPU kernels: in Pallas' interpreter against long double, and compiled by Mosaic itself."""

import functools
import importlib.util
import itertools
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
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from test_accuracy import LIMITS, SCALES, stress, units

import normax
from normax.kernels import mosaic_tpu as kernels
from normax.kernels import mosaic_tpu_rows

DTYPES = ["float32", "bfloat16"]
LONG = np.longdouble
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)


@functools.partial(jax.jit, static_argnames=("centered", "epsilon", "interpret"))
def everything(x, scale, bias, dy, *, centered=True, epsilon=1e-5, interpret: object = True):
    """Returns what the three functions over rows return."""
    how = {"centered": centered, "epsilon": epsilon, "interpret": interpret}
    y = kernels.forward(x, scale, bias, **how)
    with_statistics = kernels.forward_with_statistics(x, scale, bias, **how)
    return y, with_statistics, kernels.backward(x, scale, dy, **how)


def long(value):
    return np.asarray(value).astype(LONG)


def check(x, scale, bias, dy, limits=None, **how):
    """Holds everything to the long double formulas."""
    (y, (y_too, mean, var), (dx, dscale, dbias)) = everything(x, scale, bias, dy, **how)
    name, length = str(x.dtype), x.shape[-1]
    y_limit, dx_limit = limits or LIMITS[name]
    centered, epsilon = how.get("centered", True), how.get("epsilon", 1e-5)
    assert y.shape == dx.shape == x.shape
    assert y.dtype == dx.dtype == x.dtype
    assert mean.shape == var.shape == x.shape[:-1]
    assert dscale.shape == dbias.shape == (length,)
    assert {v.dtype.name for v in (mean, var, dscale, dbias)} == {"float32"}
    assert y.dtype == y_too.dtype
    if x.size == 0:
        assert not dscale.any()
        assert not dbias.any()
        return
    case = Case("rows", None, x.shape, (x.ndim - 1,), epsilon=epsilon, centered=centered)
    gamma, beta = (1 if scale is None else long(scale)), (0 if bias is None else long(bias))
    _, _, exact_var, _ = reference.statistics(case, x)
    xhat, t = reference.forward(case, x), long(dy) * gamma
    rows = tuple(range(x.ndim - 1))
    for output in (y, y_too):
        assert units(output, xhat * gamma + beta, name) <= y_limit
    exact_dx = reference.backward(case, x, t)
    # Where nearly all of it cancels, as for one entry, what is left is measured by the terms.
    terms = np.abs(t).max(-1, keepdims=True) / np.sqrt(exact_var + LONG(epsilon))
    error = np.abs(long(dx) - exact_dx).max()
    ulp = float(jnp.finfo(x.dtype).eps)
    assert error <= dx_limit * ulp * max(np.abs(exact_dx).max(), terms.max(), LONG(1e-30))
    # xhat is as near as the largest of its row lets it be.
    size = np.abs(long(dy)) * np.maximum(np.abs(xhat).max(-1, keepdims=True), 1)
    allowed = 4 * float(jnp.finfo(jnp.float32).eps) * size.sum(rows)
    assert (np.abs(long(dscale) - (long(dy) * xhat).sum(rows)) <= allowed).all()
    assert (np.abs(long(dbias) - long(dy).sum(rows)) <= allowed).all()
    exact_mean = long(x).mean(-1) if centered else np.zeros(x.shape[:-1], LONG)
    assert (np.abs(long(mean) - exact_mean) <= 4e-6 * np.abs(long(x)).max(-1)).all()
    if exact_var.max() < 1e38:
        np.testing.assert_allclose(long(var), exact_var[..., 0], rtol=4e-6, atol=1e-36)


def drawn(shape, dtype, mean=0.0, deviation=1.0, seed=0, parameters=True):
    """Returns x, scale, bias and dy."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=shape) * deviation + mean, rng.normal(size=shape)
    scale, bias = (rng.normal(size=shape[-1]) if parameters else None for _ in range(2))
    as_parameter = lambda v: None if v is None else jnp.asarray(v, "float32")
    return jnp.asarray(x, dtype), as_parameter(scale), as_parameter(bias), jnp.asarray(dy, dtype)


LENGTHS = [1, 7, 64, 128, 1000, 1024, 4096]
EACH = list(itertools.product(LENGTHS, DTYPES))


@pytest.mark.parametrize(
    ("length", "dtype", "centered"),
    [(*each, index % 4 in (0, 3)) for index, each in enumerate(EACH)],
)
def test_rows_of_any_length(length, dtype, centered):
    for count, parameters in ((0, True), (1, False), (5, True), (500, length != 7)):
        check(*drawn((count, length), dtype, 3.0, parameters=parameters), centered=centered)


@pytest.mark.parametrize(
    "shape",
    [
        (5000, 128),
        (1100, 1000),
        (300, 4096),
        (70, 16384),
        (9,),
        (2, 3, 5, 40),
        (5, 197, 130),
        (67, 3, 7, 1024),
        (3, 150, 4096),
        # Rows that lie across.
        (70000, 8),
        (130, 127),
        (1000, 1),
        (3, 200, 5, 40),
        (2, 130, 257, 16),
        (9000, 3, 5),
    ],
)
def test_several_blocks_and_a_ragged_last_one(shape):
    check(*drawn(shape, "float32", 100.0))


def test_rows_too_long_for_the_chip():
    x, scale, bias, dy = drawn((9, 70001), "float32", 1e4)
    assert kernels.supports(x) is None
    check(x, scale, bias, dy)
    forward = jax.jit(functools.partial(kernels.forward, centered=True, epsilon=1e-5))
    text = forward.trace(x, scale, bias).lower(lowering_platforms=("tpu",)).as_text()
    assert "normax_long_measure" in text


def test_one_parameter_alone_and_in_any_dtype():
    x, scale, bias, dy = drawn((20, 96), "bfloat16")
    check(x, scale, None, dy)
    check(x, None, bias, dy)
    for dtype in ("bfloat16", "float16"):
        check(x, scale.astype(dtype), bias.astype(dtype), dy)


def test_the_output_in_another_dtype():
    x, scale, bias, dy = drawn((20, 96), "bfloat16", 10.0)
    y = kernels.forward(
        x, scale, bias, centered=True, epsilon=1e-5, dtype="float32", interpret=True
    )
    exact = reference.forward(Case("rows", None, x.shape, (1,)), x, long(scale), long(bias))
    assert y.dtype == jnp.float32
    assert units(y, exact, "float32") <= 4
    dx, *_ = kernels.backward(
        x, scale, dy.astype("float32"), centered=True, epsilon=1e-5, interpret=True
    )
    assert dx.dtype == jnp.bfloat16


@pytest.mark.parametrize("length", [64, 1000, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
def test_accuracy_grid(length, dtype, centered):
    for mean, deviation in SCALES:
        shape = (130 if length == 64 else 6, length)  # short rows lie across if there are many
        check(*drawn(shape, dtype, mean, deviation, parameters=False), centered=centered)


@pytest.mark.parametrize("length", [64, 1000, 4097])
def test_stress_rows(length):
    rows = stress(length)
    ct = jnp.asarray(np.random.default_rng(2).normal(size=(1, length)), "float32")
    for row in rows.values():
        x = jnp.asarray(row, "float32")[None]
        for count in (1, 130) if length == 64 else (1,):
            x, ct = (jnp.broadcast_to(v[:1], (count, length)) for v in (x, ct))
            check(x, None, None, ct)
            check(x, None, None, ct, centered=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-24, 1e-30, 0.0])
def test_entries_of_any_size(dtype, epsilon):
    for centered in (True, False):
        for size in (1e-30, 1e-19, 1e-10, 1.0, 1e15, 1e18, 1e25, 1e37):
            for shape in ((4, 200), (200, 4)):
                x, _, _, dy = drawn(shape, dtype, 0.0, size, parameters=False)
                check(x, None, None, dy, centered=centered, epsilon=epsilon)


def test_the_largest_entries():
    x, _, _, dy = drawn((4, 200), "float32", parameters=False)
    x = jnp.where(x > 0, jnp.float32(3e38), jnp.float32(-3e38))
    check(x, None, None, dy * 1e20)
    check(x, None, None, dy * 1e20, centered=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1 / 3, 1.0, 1e6, 1e7 + 1, 3e9 / 7, 1e30])
def test_constant_rows_are_exactly_the_bias(value, dtype):
    for count, length in ((2, 3), (2, 64), (2, 1000), (130, 3), (130, 64)):
        _, scale, bias, dy = drawn((count, length), dtype)
        x = jnp.full((count, length), value, dtype)
        for epsilon in (1e-5, 1e-30):
            y, (_, mean, var), (dx, dscale, _) = everything(x, scale, bias, dy, epsilon=epsilon)
            np.testing.assert_array_equal(y, jnp.broadcast_to(bias.astype(dtype), y.shape))
            np.testing.assert_array_equal(mean, x[:, 0].astype("float32"))
            assert not var.any()
            assert not dscale.any()
            case = Case("rows", None, x.shape, (1,), epsilon=epsilon)
            exact = reference.backward(case, x, long(dy) * long(scale))
            assert units(dx, exact, dtype) <= LIMITS[dtype][1]
    y, _, (dx, *_) = everything(x, scale, bias, dy, epsilon=0.0)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias.astype(dtype), y.shape))
    assert not dx.any()


@pytest.mark.parametrize("shape", [(20, 130), (130, 20)])
def test_a_row_that_is_no_number_leaves_the_others_alone(shape):
    x, scale, bias, dy = drawn(shape, "float32")
    y, (_, mean, var), (dx, *_) = everything(x.at[3, 5].set(jnp.nan), scale, bias, dy)
    for value in (y, dx, mean[:, None], var[:, None]):
        bad = np.isnan(value)
        assert bad[3].all()
        assert not bad[np.arange(len(x)) != 3].any()


def test_sums_over_many_rows_keep_their_digits():
    x, scale, _, dy = drawn((40000, 8), "float32", seed=5)
    dy = dy + 1000
    _, dscale, dbias = kernels.backward(x, scale, dy, centered=True, epsilon=1e-5, interpret=True)
    xhat = reference.forward(Case("rows", None, x.shape, (1,)), x)
    assert units(dscale, (long(dy) * xhat).sum(0), "float32") <= 64
    assert units(dbias, long(dy).sum(0), "float32") <= 2


@pytest.mark.parametrize("shape", [(76, 200), (300, 40), (3, 200, 5, 12)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_races_and_uninitialized_memory_shown(dtype, shape):
    check(*drawn(shape, dtype, 3.0), interpret=STRICT)


def test_short_rows_lie_across_where_that_fills_the_lanes():
    for shape, axis in {
        (2**21, 64): 0,
        (8, 2048, 16, 64): 1,
        (1024, 197, 64): 0,
        (64, 2048, 96): 1,
        (130, 200, 5): 1,
        (127, 64): None,
        (4096, 128): None,
        (64,): None,
    }.items():
        assert mosaic_tpu_rows.lanes_of(shape) == axis, shape
    assert mosaic_tpu_rows.lanes_of((*export.symbolic_shape("b"), 64)) is None


# Columns.


def check_columns(x, interpret: object = True):
    """Holds the moments of columns to those in long double."""
    found = jax.jit(functools.partial(kernels.column_moments_in_units, interpret=interpret))(x)
    assert {v.shape for v in found} == {x.shape[-1:]}
    assert {v.dtype.name for v in found} == {"float32"}
    unit, mean, rest, var = map(long, found)
    entries = long(x).reshape(-1, x.shape[-1])
    if not entries.size:
        assert not mean.any()
        assert not var.any()
        return
    exact, exact_var = entries.mean(0), entries.var(0)
    # Twice the precision: the error is an ulp of the deviation, however large the mean.
    error = np.abs((mean + rest) * unit - exact)
    assert (error <= 2.0**-22 * np.sqrt(exact_var) + 2.0**-44 * np.abs(exact)).all()
    assert (np.abs(rest) <= 2.0**-23 * np.abs(mean)).all()
    np.testing.assert_allclose(var * unit**2, exact_var, rtol=4e-6, atol=1e-36)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 64, 128, 1000, 1024, 1500])
def test_columns_of_any_number(length, dtype):
    for count in (0, 1, 5, 500) if length in (7, 128) else (500,):
        check_columns(drawn((count, length), dtype, 3.0)[0])


@pytest.mark.parametrize("shape", [(20011, 64), (3000, 1024), (9,), (5, 197, 130), (3, 1100, 1500)])
def test_columns_in_several_blocks(shape):
    check_columns(drawn(shape, "float32", 1e6)[0])


@pytest.mark.parametrize("count", [3, 64, 20000])
def test_columns_under_stress(count):
    rows = [*stress(count).values(), np.full(count, 1 / 3), np.full(count, 1e30 / 7)]
    rows += [np.linspace(-1, 1, count) * size for size in (1e-15, 1e15, 1e25, 3e38)]
    rows += [
        np.where(np.arange(count) == count // 2, size, row)
        for size in (1e20, 1e38)
        for row in rows[:3]
    ]
    check_columns(jnp.asarray(np.stack(rows, 1), "float32"))


def test_equal_columns_have_no_variance():
    values = np.asarray([1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, 0.0], "float32")
    x = jnp.broadcast_to(jnp.asarray(values), (20000, 6))
    unit, mean, rest, var = kernels.column_moments_in_units(x, interpret=True)
    np.testing.assert_array_equal(np.asarray(mean, "float64") * unit, values)
    assert not rest.any()
    assert not var.any()


def test_a_column_that_is_no_number_leaves_the_others_alone():
    x = drawn((9000, 130), "float32")[0].at[4, 5].set(jnp.nan)
    _, *moments = kernels.column_moments_in_units(x, interpret=True)
    for value in moments:
        np.testing.assert_array_equal(np.isnan(value), np.arange(130) == 5)


def test_columns_with_races_and_uninitialized_memory_shown():
    check_columns(drawn((300, 200), "float32", 3.0)[0], interpret=STRICT)


# Refusals.


def test_what_is_not_supported_is_named():
    half = jnp.ones((4, 8), "float16")
    assert "float16" in kernels.supports(half)
    assert "bfloat16 and float32" in kernels.supports(half)
    assert "float16" in kernels.supports(jnp.ones((4, 8)), dtype="float16")
    assert "float16" in kernels.supports_columns(half)
    assert "row length 0" in kernels.supports(jnp.ones((4, 0)))
    assert "shape ()" in kernels.supports(jnp.ones(()))
    assert kernels.supports(jnp.ones((4, 8)), dtype="bfloat16") is None
    for length in (1, 24577, 10**7 + 1):
        row = jax.ShapeDtypeStruct((4, length), jnp.float32)
        assert kernels.supports(row) is None
    assert kernels.supports_columns(jnp.ones((4, 8), "bfloat16")) is None
    how = {"centered": True, "epsilon": 1e-5}
    for refused in (
        lambda: kernels.forward(half, None, None, **how),
        lambda: kernels.forward_with_statistics(half, None, None, **how),
        lambda: kernels.backward(half, None, half, **how),
        lambda: kernels.backward(jnp.ones((4, 8)), None, half, **how),
        lambda: kernels.add_forward(jnp.ones((4, 8)), half, None, None, **how),
        lambda: kernels.add_backward(half, None, half, half, **how),
        lambda: kernels.column_moments_in_units(half),
        lambda: kernels.column_gradients(half, half, *[jnp.ones(8)] * 4, epsilon=1e-5),
    ):
        with pytest.raises(ValueError, match="float16"):
            refused()
    x, short = jnp.ones((4, 8)), jnp.ones((3, 8))
    for refused in (
        lambda: kernels.backward(x, None, short, **how),
        lambda: kernels.add_forward(x, short, None, None, **how),
        lambda: kernels.add_backward(x, None, x, short, **how),
        lambda: kernels.column_gradients(x, short, *[jnp.ones(8)] * 4, epsilon=1e-5),
    ):
        with pytest.raises(ValueError, match=r"\(4, 8\).*got \(3, 8\)"):
            refused()


# Transformations.


def same(got, i, expected):
    close = lambda a, b: np.testing.assert_allclose(a[i], b, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, got, expected)


@pytest.mark.parametrize("shape", [(20, 130), (130, 20)])
@pytest.mark.parametrize("batched", [(0, None, None, 0), (0, 0, 0, 0), (1, None, 0, 1)])
def test_vmap_is_a_loop(batched, shape):
    x, scale, bias, dy = drawn((3, 3, *shape), "float32", 10.0)
    x, dy = x[0], dy[0]
    scale, bias = (
        v if axis is None else jnp.stack([v, v + 1, v * 2][: x.shape[0]])
        for v, axis in ((scale, batched[1]), (bias, batched[2]))
    )
    if batched[0] == 1:
        x, dy = (jnp.moveaxis(v, 0, 1) for v in (x, dy))
    got = jax.vmap(everything, batched)(x, scale, bias, dy)
    take = lambda v, axis, i: v if axis is None else jnp.take(v, i, axis)
    for i in range(3):
        args = [take(v, a, i) for v, a in zip((x, scale, bias, dy), batched, strict=True)]
        same(got, i, everything(*args))


def test_vmap_of_columns_is_a_loop():
    x = drawn((3, 700, 130), "float32", 10.0)[0]
    function = functools.partial(kernels.column_moments_in_units, interpret=True)
    got = jax.vmap(function)(x)
    for i in range(3):
        same(got, i, function(x[i]))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_rows(check_vma):
    x, scale, bias, dy = drawn((32, 24), "float32", 3.0)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    how = {"centered": True, "epsilon": 1e-5}

    def local(x, scale, bias, dy):
        y, mean, var = kernels.forward_with_statistics(x, scale, bias, **how)
        dx, dscale, dbias = kernels.backward(x, scale, dy, **how)
        moments = kernels.column_moments_in_units(x)
        sums = kernels.column_gradients(x, dy, *moments, epsilon=1e-5)
        s, y_of_s = kernels.add_forward(x, dy, scale, bias, **how)
        ds, *both = kernels.add_backward(s, scale, dy, y_of_s, **how)
        summed = jax.lax.psum((dscale, dbias, *both, *sums), "rows")
        return y, mean, var, dx, ds, summed, moments

    rows = P("rows")
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, P(), P(), rows),
        out_specs=(rows, rows, rows, rows, rows, P(), rows),
        check_vma=check_vma,
    )
    lowered = jax.jit(sharded).trace(x, scale, bias, dy).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    for name in ("rows_forward", "rows_backward", "column_moments", "column_gradients"):
        assert f"normax_{name}" in text
    for name in ("rows_add_forward", "rows_add_backward"):
        assert f"normax_{name}" in text


@pytest.mark.parametrize("count", [64, "b", "b, 3"])
def test_export_to_tpu(count):
    leading = export.symbolic_shape(count) if isinstance(count, str) else (count,)
    x = jax.ShapeDtypeStruct((*leading, 130), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((130,), jnp.float32)
    how = {"centered": True, "epsilon": 1e-5}

    def function(x, scale, bias, dy):
        moments = kernels.column_moments_in_units(x)
        return (
            kernels.forward(x, scale, bias, **how),
            kernels.forward_with_statistics(x, scale, bias, **how),
            kernels.backward(x, scale, dy, **how),
            kernels.add_forward(x, dy, scale, bias, **how),
            kernels.add_backward(x, scale, dy, dy, **how),
            moments,
            kernels.column_gradients(x, dy, *moments, epsilon=1e-5),
        )

    exported = export.export(jax.jit(function), platforms=["tpu"])(x, row, row, x)
    assert exported.mlir_module().count("tpu_custom_call") >= 7
    again = export.deserialize(exported.serialize())
    assert [str(v.shape) for v in again.out_avals] == [str(v.shape) for v in exported.out_avals]


# Compiled.


@has_compiler
def test_compiled_for_a_tpu_nothing_is_read_or_written_twice():
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "costs_tpu.py", "--bytes-only"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    operations = {"forward", "statistics", "backward", "add", "add backward", "columns"}
    operations |= {"column gradients", "long forward", "long backward"}
    assert {row["operation"] for row in rows} >= operations
    for row in rows:
        # Rows that are too long for the chip are measured by a kernel of their own.
        assert row["kernels"] == 1 + row["operation"].startswith("long"), row
        assert row["bytes"] <= 1.1 * row["floor"], row
        # Beside the kernel there is only what is done to numbers of a row or a column: to bring two
        # of each row into their order is to move 16 bytes.
        row_bytes = row["shape"][-1] * jnp.dtype(row["dtype"]).itemsize
        assert row["beside"] <= max(0.1, 16.01 / row_bytes), row


@pytest.mark.parametrize("shape", [(32, 1024), (32, 65536), (32, 64)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm"])
def test_kernels_where_python_has_wide_numbers(name, shape, x64):
    by = {"implementation": "mosaic_tpu"}

    def norm(x):
        if name == "layer_norm":
            return normax.layer_norm(x, **by)
        return normax.normalize_batch(x, **by)[0]

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    for f in (norm, jax.grad(lambda x: jnp.sum(norm(x) ** 2))):
        lowered = jax.jit(f).trace(x).lower(lowering_platforms=("tpu",))
        assert "@tpu_custom_call" in lowered.as_text()
