"""A masked entry reads as absent, whatever it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import CASES, MEASURED

import normax

KEY = jax.random.key(0)


def inputs(case, probability=0.7):
    keys = jax.random.split(KEY, 4)
    x = 2 + 3 * jax.random.normal(keys[0], case.shape)
    scale = 1 + jax.random.uniform(keys[1], case.parameter_shape())
    bias = jax.random.normal(keys[2], case.parameter_shape())
    return x, scale, bias, jax.random.bernoulli(keys[3], probability, case.shape)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_masked_is_the_formula_over_what_is_there(case):
    x, scale, bias, mask = inputs(case)
    y = case.apply(x, scale, bias, mask)
    laid = [reference.laid_out(case, np.asarray(p)) for p in (scale, bias)]
    exact = reference.forward(case, x, laid[0], laid[1] if case.bias else 0, np.asarray(mask))
    np.testing.assert_allclose(np.asarray(y), exact.astype(np.float64), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_masked_moves_nothing(case):
    x, scale, bias, mask = inputs(case)

    def energy(x, scale, bias):
        y = case.apply(x, scale, bias, mask)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.value_and_grad(energy, (0, 1, 2), has_aux=True))
    (_, y), expected = run(x, scale, bias)
    for poison in (jnp.nan, jnp.inf, 3e38):
        (_, other), grads = run(jnp.where(mask, x, poison), scale, bias)
        jax.tree.map(np.testing.assert_array_equal, (other, grads), (y, expected))
    np.testing.assert_array_equal(jnp.where(mask, 0, expected[0]), jnp.zeros_like(x))
    shown = jnp.broadcast_to(reference.laid_out(case, bias, jnp), x.shape)
    shown = shown if case.bias else jnp.zeros_like(x)
    np.testing.assert_array_equal(jnp.where(mask, 0, y), jnp.where(mask, 0, shown))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_group_with_nothing_valid(case):
    x, scale, bias, _ = inputs(case)
    mask = jnp.zeros(case.shape, bool)
    x = jnp.full_like(x, jnp.nan)

    def energy(x, scale):
        y = case.apply(x, scale, bias, mask)
        return jnp.sum(y**2), y

    (_, y), (dx, dscale) = jax.jit(jax.value_and_grad(energy, (0, 1), has_aux=True))(x, scale)
    shown = jnp.broadcast_to(reference.laid_out(case, bias, jnp), x.shape)
    np.testing.assert_array_equal(y, shown if case.bias else jnp.zeros_like(x))
    np.testing.assert_array_equal(dx, jnp.zeros_like(dx))
    np.testing.assert_array_equal(dscale, jnp.zeros_like(dscale))


def test_the_state_stays_bit_for_bit_where_nothing_is_valid():
    stats = normax.RunningStats(jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4]), jnp.array([5, 6]))
    mask = jnp.array([[True, False]] * 4)
    for momentum in (0.9, None, 1 / 3):
        _, new = normax.batch_norm(
            jnp.ones((4, 2)), stats, use_running_average=False, mask=mask, momentum=momentum
        )
        assert all(old[1] == fresh[1] for old, fresh in zip(stats, new, strict=True))
        assert new.mean[0] != stats.mean[0]
        assert new.count.tolist() == [9, 6]


def test_an_empty_batch_leaves_the_state():
    stats = normax.RunningStats.create(3)
    y, new = normax.batch_norm(jnp.zeros((0, 3)), stats, use_running_average=False)
    assert y.shape == (0, 3)
    for old, fresh in zip(stats, new, strict=True):
        np.testing.assert_array_equal(old, fresh)


@pytest.mark.parametrize("shape", [(4, 5, 5, 1), (5, 5, 6), (5, 1), (6,), (1, 1, 1, 1), ()])
def test_any_mask_that_broadcasts(shape):
    x = jax.random.normal(KEY, (4, 5, 5, 6))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, shape)
    full = jnp.broadcast_to(mask, x.shape) if shape else jnp.full(x.shape, mask)
    stats = normax.RunningStats.create(6)
    for norm in (
        normax.layer_norm,
        normax.instance_norm,
        lambda x, mask: normax.group_norm(x, num_groups=3, mask=mask),
        lambda x, mask: normax.batch_norm(x, stats, use_running_average=False, mask=mask)[0],
    ):
        both = jax.jit(lambda x, norm=norm: (norm(x, mask=mask), norm(x, mask=full)))
        np.testing.assert_allclose(*both(x), rtol=1e-6, atol=1e-6)


def test_a_mask_of_ints_is_one_of_booleans():
    x = jax.random.normal(KEY, (4, 5))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, (4, 5))
    number = normax.layer_norm(x, mask=mask.astype(jnp.int32))
    np.testing.assert_array_equal(number, normax.layer_norm(x, mask=mask))


def test_counts_of_a_mask_that_broadcasts():
    mask = jnp.array([True, False, True])[:, None]
    m = normax.moments(jnp.ones((3, 5)), (0, 1), mask=mask)
    assert int(m.count) == 10


def test_moments_of_nothing_are_zero():
    mask = jnp.array([[True, False]] * 4)
    m = normax.moments(jnp.full((4, 2), 3.0), 0, mask=mask)
    np.testing.assert_array_equal(m.count, [4, 0])
    np.testing.assert_array_equal(m.mean, [3, 0])
    np.testing.assert_array_equal(m.var, [0, 0])


def test_masked_entries_are_bias_at_inference_whatever_the_running_mean():
    stats = normax.RunningStats(jnp.array([5.0, -3.0]), jnp.array([2.0, 0.5]), jnp.array([9, 9]))
    x, bias = jax.random.normal(KEY, (4, 2)), jnp.array([0.25, -0.5])
    mask = jnp.array([[True], [False], [True], [False]])
    poisoned = jnp.where(mask, x, jnp.nan)

    def infer(x):
        return normax.batch_norm(x, stats, None, bias, use_running_average=True, mask=mask)[0]

    y, vjp = jax.vjp(infer, poisoned)
    np.testing.assert_array_equal(y[1], bias)
    exact = (np.asarray(x) - np.array([5.0, -3.0])) / np.sqrt(np.array([2.0, 0.5]) + 1e-5)
    np.testing.assert_allclose(y[::2], (exact + np.asarray(bias))[::2], rtol=1e-5)
    (dx,) = vjp(jnp.ones_like(y))
    np.testing.assert_array_equal(dx[1::2], jnp.zeros((2, 2)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_parameters_are_not_added_up_in_their_dtype(dtype):
    """One rounding, at the end; of each entry it would be a tenth of these sums."""
    x, ct = (jax.random.normal(jax.random.key(i), (16384, 4)) for i in range(2))
    scale, bias = jnp.ones(4, dtype), jnp.zeros(4, dtype)
    mask = jnp.ones((16384, 1), bool)
    norm = lambda *given: normax.standardize(*given, reduction_axes=0, mask=mask)[0]
    dscale, dbias = jax.vjp(lambda *lines: norm(x, *lines), scale, bias)[1](ct)
    entries, ct = (np.asarray(v, np.longdouble) for v in (x, ct))
    xhat = (entries - entries.mean(0)) / np.sqrt(entries.var(0) + 1e-5)
    for found, exact in ((dscale, (ct * xhat).sum(0)), (dbias, ct.sum(0))):
        assert found.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(found, np.longdouble), exact, rtol=eps, atol=1e-3)
