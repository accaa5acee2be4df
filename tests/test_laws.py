"""What normalization means: invariances, the family's equivalences, transformations."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, MEASURED

import normax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6, 8))
STATS = normax.RunningStats.create(8)
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(case, dtype=jnp.float32):
    x = (1 + 2 * jax.random.normal(KEY, case.shape)).astype(dtype)
    scale = jnp.linspace(0.5, 2, np.prod(case.parameter_shape(), dtype=int))
    scale = scale.reshape(case.parameter_shape())
    return x, scale, scale - 1


def train(x, **options):
    return normax.batch_norm(x, STATS, use_running_average=False, **options)[0]


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(st.floats(0.125, 100, width=32), st.floats(-100, 100, width=32))
def test_layer_norm_forgets_shift_and_positive_scale(a, b):
    y = normax.layer_norm(jnp.float32(a) * X + jnp.float32(b), epsilon=0.0)
    np.testing.assert_allclose(y, normax.layer_norm(X, epsilon=0.0), atol=2e-4 * (1 + abs(b) / a))


@pytest.mark.parametrize("k", [-20, -3, 1, 30])
def test_powers_of_two_change_nothing_at_all(k):
    x = X * 2.0**k
    for norm in (normax.layer_norm, normax.rms_norm):
        np.testing.assert_array_equal(norm(x, epsilon=0.0), norm(X, epsilon=0.0))
    np.testing.assert_array_equal(normax.weight_norm(x), normax.weight_norm(X))


def test_the_family_is_one():
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    eps = {"epsilon": 1e-5}
    layer, group = normax.layer_norm, normax.group_norm
    same(group(X, num_groups=1, **eps), layer(X, reduction_axes=(1, 2), **eps))
    same(group(X, num_groups=8, **eps), normax.instance_norm(X, **eps))
    same(group(X, group_size=1, **eps), normax.instance_norm(X, **eps))
    same(normax.instance_norm(X, **eps), layer(X, reduction_axes=1, **eps))
    same(train(X, **eps), layer(X, reduction_axes=(0, 1), **eps))
    centred = X - X.mean(-1, keepdims=True)
    same(layer(X, **eps), normax.rms_norm(centred, **eps))


def test_an_instance_without_pixels_comes_out_as_bias():
    y = normax.instance_norm(X[0], jnp.ones(8), jnp.arange(8.0))
    np.testing.assert_array_equal(y, jnp.broadcast_to(jnp.arange(8.0)[None], (6, 8)))


@EVERY
def test_the_output_has_the_input_s_shape_and_dtype_and_is_rounded_once(case):
    for dtype in (jnp.bfloat16, jnp.float16):
        x, scale, bias = inputs(case, dtype)
        y = case.apply(x, scale, bias, None)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        wide = case.apply(x.astype(jnp.float32), scale, bias, None)
        np.testing.assert_array_equal(y, wide.astype(dtype))


@EVERY
def test_parameters_may_have_another_dtype_than_the_input(case):
    x, scale, bias = inputs(case)
    half = case.apply(x, scale.astype(jnp.bfloat16), bias.astype(jnp.float16), None)
    rounded = (p.astype(d).astype(jnp.float32) for p, d in ((scale, "bfloat16"), (bias, "float16")))
    np.testing.assert_array_equal(half, case.apply(x, *rounded, None))


@EVERY
def test_vmap_is_the_loop(case):
    x, scale, bias = inputs(case)
    many = jnp.stack([x, -x, 3 * x])
    f = lambda x: case.apply(x, scale, bias, None)
    expected = jnp.stack([f(one) for one in many])
    np.testing.assert_allclose(jax.vmap(f)(many), expected, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_second_call_compiles_nothing(case):
    traced = []

    @jax.jit
    def f(*args):
        traced.append(args)
        return case.apply(*args, None)

    for _ in range(3):
        f(*inputs(case))
    assert len(traced) == 1


@EVERY
def test_no_values_are_moved_in_place(case):
    x, scale, bias = inputs(case)
    before = [np.array(value) for value in (x, scale, bias)]
    case.apply(x, scale, bias, None)
    for old, new in zip(before, (x, scale, bias), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_numpy_arrays_are_taken(case):
    x, scale, bias = map(np.asarray, inputs(case))
    np.testing.assert_array_equal(
        case.apply(x, scale, bias, None), case.apply(*map(jnp.asarray, (x, scale, bias)), None)
    )


def test_the_batch_may_be_permuted():
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(train(X[order]), train(X)[order], rtol=1e-5, atol=1e-6)


def test_complex_input_has_a_complex_mean_and_a_real_variance():
    x = jax.random.normal(KEY, (64, 3), jnp.complex64) + (2 + 1j)
    stats = normax.RunningStats.create(3, jnp.complex64)
    y, new = normax.batch_norm(x, stats, use_running_average=False, momentum=0.0)
    exact = np.asarray(x, np.complex128)
    np.testing.assert_allclose(new.mean, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new.var, exact.var(0), rtol=1e-5)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert y.dtype == jnp.complex64
    assert new.var.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_arrays(shape):
    x = jnp.zeros(shape)
    for norm in (normax.layer_norm, normax.rms_norm):
        assert norm(x).shape == shape
        assert jax.grad(lambda x, norm=norm: norm(x).sum())(x).shape == shape


@EVERY
def test_no_nan_on_the_way(case):
    x, scale, bias = inputs(case)
    with jax.debug_nans(True):
        for size in (1.0, 1e30, 1e-30):
            y, vjp = jax.vjp(lambda x: case.apply(x, scale, bias, None), jnp.float32(size) * x)
            vjp(y)
