"""The TPU kernels for rows too long for the chip, with limits shrunk to see them cheaply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from jax import export
from test_accuracy import LIMITS, SCALES, stress, units
from test_kernels_tpu import DTYPES, STRICT, check, drawn, everything, long, same
from test_kernels_tpu_sums import added, check_added, drawn_for_sum

from normax.kernels import mosaic_tpu as kernels
from normax.kernels import mosaic_tpu_long, mosaic_tpu_rows


@pytest.fixture(autouse=True, scope="module")
def nothing_fits():
    """Lets no row stay on chip, and takes them 256 entries at a time."""
    for function in (everything, added):
        function.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LONGEST", "LONGEST_OF_SUM", "LONGEST_WITH_GRADIENT"):
            patch.setattr(mosaic_tpu_rows, name, 0)
        patch.setattr(mosaic_tpu_long, "WIDEST", 256)
        yield
    for function in (everything, added):
        function.clear_cache()


@pytest.mark.parametrize(
    ("length", "dtype", "centered"),
    [
        (1, "float32", True),
        (200, "float32", False),
        (512, "bfloat16", True),
        (1000, "bfloat16", False),
        (1000, "float32", True),
    ],
)
def test_rows_in_chunks(length, dtype, centered):
    check(*drawn((20, length), dtype, 3.0, parameters=length != 200), centered=centered)


@pytest.mark.parametrize("shape", [(0, 300), (3, 197, 300), (2100, 300)])
def test_several_blocks_of_them(shape):
    check(*drawn(shape, "float32", 100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_in_chunks(dtype):
    for mean, deviation in SCALES:
        for centered in (True, False):
            check(*drawn((6, 1000), dtype, mean, deviation, parameters=False), centered=centered)


def test_stress_in_chunks():
    ct = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1000)), "float32")
    for row in stress(1000).values():
        for centered in (True, False):
            check(jnp.asarray(row, "float32")[None], None, None, ct, centered=centered)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-24, 0.0])
@pytest.mark.parametrize("centered", [True, False])
def test_entries_of_any_size_in_chunks(centered, epsilon):
    for size in (1e-30, 1e-19, 1e-10, 1.0, 1e15, 1e25, 1e37):
        x, _, _, dy = drawn((4, 600), "float32", 0.0, size, parameters=False)
        # Chunks of another size each: they are merged in the unit of the largest.
        x = x.at[:, 256:].multiply(2.0**-10).at[:, 512:].multiply(2.0**-50)
        check(x, None, None, dy, centered=centered, epsilon=epsilon)


def test_the_largest_entries_in_chunks():
    x, _, _, dy = drawn((4, 600), "float32", parameters=False)
    x = jnp.where(x > 0, jnp.float32(3e38), jnp.float32(-3e38))
    for size in (1e-20, 1e20):
        for centered in (True, False):
            check(x, None, None, dy * size, centered=centered)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-30, 0.0])
def test_constant_rows_in_chunks_are_exactly_the_bias(epsilon):
    values = np.asarray([1 / 3, 1.0, 1e6, 1e7 + 1, 3e9 / 7, 1e30, 3e38, 1e-30, 0.0], "float32")
    x = jnp.broadcast_to(jnp.asarray(values)[:, None], (9, 600))
    _, scale, bias, dy = drawn(x.shape, "float32")
    y, (_, mean, var), (dx, dscale, _) = everything(x, scale, bias, dy, epsilon=epsilon)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, y.shape))
    np.testing.assert_array_equal(mean, values)
    assert not var.any()
    assert not dscale.any()
    if not epsilon:
        assert not dx.any()
        return
    case = Case("rows", None, x.shape, (1,), epsilon=epsilon)
    exact = reference.backward(case, x, long(dy) * long(scale))
    assert units(dx, exact, "float32") <= LIMITS["float32"][1]


def test_a_long_row_that_is_no_number_leaves_the_others_alone():
    x, scale, bias, dy = drawn((20, 600), "float32")
    y, (_, mean, var), (dx, *_) = everything(x.at[3, 5].set(jnp.nan), scale, bias, dy)
    for value in (y, dx, mean[:, None], var[:, None]):
        bad = np.isnan(value)
        assert bad[3].all()
        assert not bad[np.arange(20) != 3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_to_long_rows(dtype):
    check_added(*drawn_for_sum((20, 600), dtype, 3.0), centered=dtype == "float32")


def test_the_output_of_long_rows_in_another_dtype():
    x, scale, bias, dy = drawn((20, 600), "bfloat16", 10.0)
    how = {"centered": True, "epsilon": 1e-5, "interpret": True}
    y = kernels.forward(x, scale, bias, dtype="float32", **how)
    exact = reference.forward(Case("rows", None, x.shape, (1,)), x, long(scale), long(bias))
    assert y.dtype == jnp.float32
    assert units(y, exact, "float32") <= 4
    dx, *_ = kernels.backward(x, scale.astype("float16"), dy.astype("float32"), **how)
    assert dx.dtype == jnp.bfloat16


def test_long_rows_with_races_and_uninitialized_memory_shown():
    check_added(*drawn_for_sum((36, 300), "float32", 3.0), interpret=STRICT, centered=False)
    check_added(*drawn_for_sum((36, 300), "bfloat16", 3.0), interpret=STRICT)


def test_vmap_of_long_rows_is_a_loop():
    x, scale, _, dy = drawn((2, 9, 300), "float32", 10.0)
    how = {"centered": True, "epsilon": 1e-5, "interpret": True}
    function = jax.jit(lambda x, dy: kernels.backward(x, scale, dy, **how))
    got = jax.vmap(function)(x, dy)
    for i in range(2):
        same(got, i, function(x[i], dy[i]))


@pytest.mark.parametrize("count", ["b", "b, 3"])
def test_export_of_long_rows_to_tpu(count):
    x = jax.ShapeDtypeStruct((*export.symbolic_shape(count), 600), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((600,), jnp.float32)
    how = {"centered": True, "epsilon": 1e-5}

    def function(x, scale, bias, dy):
        s, y = kernels.add_forward(x, dy, scale, bias, **how)
        return s, y, kernels.add_backward(s, scale, dy, dy, **how)

    exported = export.export(jax.jit(function), platforms=["tpu"])(x, row, row, x)
    assert exported.mlir_module().count("tpu_custom_call") >= 4
