"""The TPU kernels that take more than one array: a residual added, and columns' gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from test_accuracy import LIMITS, units
from test_kernels_tpu import DTYPES, STRICT, drawn, long

from normax.kernels import mosaic_tpu as kernels

ONE_ULP = float(jnp.finfo(jnp.float32).eps)


@functools.partial(jax.jit, static_argnames=("centered", "interpret"))
def added(x, residual, scale, bias, dy, ds, *, centered=True, interpret: object = True):
    """Returns what the two functions of a sum return."""
    how = {"centered": centered, "epsilon": 1e-5, "interpret": interpret}
    s, y = kernels.add_forward(x, residual, scale, bias, **how)
    return s, y, kernels.add_backward(s, scale, dy, ds, **how)


def check_added(x, residual, scale, bias, dy, ds, **how):
    """Holds them to the norm of the rounded sum, in long double."""
    s, y, (dx, dscale, dbias) = added(x, residual, scale, bias, dy, ds, **how)
    assert s.dtype == dx.dtype == x.dtype
    assert s.shape == y.shape == dx.shape == x.shape
    assert dscale.shape == dbias.shape == x.shape[-1:]
    np.testing.assert_array_equal(
        s, (x.astype("float32") + residual.astype("float32")).astype(x.dtype)
    )
    if x.size == 0:
        assert not dscale.any()
        return
    name, rows = str(x.dtype), tuple(range(x.ndim - 1))
    case = Case("rows", None, x.shape, (x.ndim - 1,), centered=how.get("centered", True))
    gamma, beta = (1 if scale is None else long(scale)), (0 if bias is None else long(bias))
    xhat = reference.forward(case, s)
    y_limit, dx_limit = LIMITS[name]
    assert units(y, xhat * gamma + beta, name) <= y_limit
    assert units(dx, reference.backward(case, s, long(dy) * gamma) + long(ds), name) <= dx_limit
    size = np.abs(long(dy)) * np.maximum(np.abs(xhat).max(-1, keepdims=True), 1)
    allowed = 4 * ONE_ULP * size.sum(rows)
    assert (np.abs(long(dscale) - (long(dy) * xhat).sum(rows)) <= allowed).all()
    assert (np.abs(long(dbias) - long(dy).sum(rows)) <= allowed).all()


def drawn_for_sum(shape, dtype, mean=0.0, residual_dtype=None, **how):
    x, scale, bias, dy = drawn(shape, dtype, mean, **how)
    residual, _, _, ds = drawn(shape, residual_dtype or dtype, mean / 2, seed=1)
    return x, residual, scale, bias, dy, ds


@pytest.mark.parametrize(("dtype", "centered"), [("float32", True), ("bfloat16", False)])
def test_a_residual_is_added_first(dtype, centered):
    for shape in ((0, 7), (3, 5, 130), (500, 1000), (3, 150, 5, 40)):
        check_added(*drawn_for_sum(shape, dtype, 3.0), centered=centered)


def test_what_is_normalized_is_the_rounded_sum():
    check_added(*drawn_for_sum((40, 200), "bfloat16", 100.0, parameters=False))
    check_added(*drawn_for_sum((40, 200), "bfloat16", 100.0, residual_dtype="float32"))
    check_added(*drawn_for_sum((40, 200), "float32", 1e6, residual_dtype="bfloat16"))


def test_a_sum_of_equal_entries_is_exactly_the_bias():
    _, _, scale, bias, dy, ds = drawn_for_sum((4, 200), "float32")
    x = jnp.full((4, 200), 1e30, "float32")
    s, y, (dx, *_) = added(x, -x / 3, scale, bias, dy, ds)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, s.shape))
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_with_races_and_uninitialized_memory_shown(dtype):
    check_added(*drawn_for_sum((76, 200), dtype, 3.0), interpret=STRICT)


# Columns.


@functools.partial(jax.jit, static_argnames=("centered", "epsilon", "interpret"))
def gradients(x, dy, *, centered=True, epsilon=1e-5, interpret: object = True):
    """Returns the gradients of columns whose moments are measured as batch norm does."""
    unit, mean, rest, var = kernels.column_moments_in_units(x, interpret=interpret)
    if not centered:
        entries = x.astype(jnp.float32).reshape(-1, x.shape[-1]) / unit[None]
        mean, rest, var = None, None, jnp.square(entries).mean(0)
    return kernels.column_gradients(
        x, dy, unit, mean, rest, var, epsilon=epsilon, interpret=interpret
    )


def check_gradients(x, dy, **how):
    """Holds them to long double: off by an ulp of the largest xhat for each entry, at most."""
    length = x.shape[-1]
    found = gradients(x, dy, **how)
    assert [v.shape for v in found] == [(length,)] * 2
    assert [v.dtype.name for v in found] == ["float32"] * 2
    if x.size == 0:
        assert not any(v.any() for v in found)
        return
    x, dy = (long(v).reshape(-1, length) for v in (x, dy))
    d = x - x.mean(0) if how.get("centered", True) else x
    squared = (d * d).mean(0) + np.longdouble(how.get("epsilon", 1e-5))
    xhat = d / np.sqrt(np.where(squared == 0, 1, squared))
    dscale, dbias = map(long, found)
    allowed = 4 * ONE_ULP * (np.abs(dy) * np.maximum(np.abs(xhat), 1)).sum(0)
    assert (np.abs(dscale - (dy * xhat).sum(0)) <= allowed).all()
    assert (np.abs(dbias - dy.sum(0)) <= allowed / 4).all()


def test_gradients_of_columns():
    for shape in ((0, 7), (9,), (5, 197, 130), (70, 1500)):
        x, *_, dy = drawn(shape, "bfloat16", 3.0)
        check_gradients(x, dy)
    check_gradients(x, dy.astype("float32"))
    check_gradients(x, dy, centered=False)


@pytest.mark.parametrize(("mean", "deviation"), [(1e6, 1), (1e30, 1e30), (0, 1e37), (0, 1e-4)])
def test_gradients_of_columns_of_any_size(mean, deviation):
    x, *_, dy = drawn((20011, 8), "float32", mean, deviation)
    for size in (1e-30, 1.0, 1e30):
        check_gradients(x, dy * size)
        check_gradients(x, dy * size, centered=False)


def test_gradients_of_equal_columns_are_exactly_zero():
    values = jnp.asarray([1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, 3e38, 0.0], "float32")
    x, dy = jnp.broadcast_to(values, (20000, 7)), drawn((20000, 7), "float32")[3]
    for epsilon in (1e-5, 0.0):
        check_gradients(x, dy, epsilon=epsilon)
        assert not gradients(x, dy, epsilon=epsilon)[0].any()


def test_gradients_over_many_rows_keep_their_digits():
    x, *_, dy = drawn((40000, 8), "float32", 100.0)
    dscale, dbias = gradients(x, dy + 1000)
    xhat = reference.forward(Case("columns", None, x.shape, (0,)), x)
    shares = long(dy + 1000) * xhat
    assert (np.abs(long(dscale) - shares.sum(0)) <= 2.0**-27 * np.abs(shares).sum(0)).all()
    assert units(dbias, long(dy + 1000).sum(0), "float32") <= 2


def test_a_column_that_is_no_number_leaves_the_gradients_of_others_alone():
    x, *_, dy = drawn((9000, 130), "float32")
    dscale, dbias = gradients(x.at[4, 5].set(jnp.nan), dy)
    np.testing.assert_array_equal(np.isnan(dscale), np.arange(130) == 5)
    assert np.isfinite(dbias).all()


def test_gradients_of_columns_with_races_and_uninitialized_memory_shown():
    x, *_, dy = drawn((300, 200), "float32", 3.0)
    check_gradients(x, dy, interpret=STRICT)
