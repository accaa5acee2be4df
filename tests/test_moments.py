"""Statistics as values: measured, merged, remembered."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax
from normax import measure

KEY = jax.random.key(0)
FLOATS = st.floats(-1e3, 1e3, width=32)
ARRAYS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=FLOATS)


def close(a, b, scale=1e3):
    np.testing.assert_array_equal(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(a.var, b.var, rtol=1e-4, atol=1e-4 * scale)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(ARRAYS, ARRAYS, ARRAYS)
def test_merge_is_measuring_the_concatenation(x, y, z):
    x, y, z = (array[:, :1] for array in (x, y, z))
    a, b, c = (normax.moments(array, 0) for array in (x, y, z))
    everything = normax.moments(np.concatenate([x, y, z]), 0)
    close(normax.merge(normax.merge(a, b), c), everything)
    close(normax.merge(a, normax.merge(b, c)), everything)
    close(normax.merge(c, normax.merge(b, a)), everything)


def test_the_identity_of_merge():
    m = normax.moments(jax.random.normal(KEY, (5, 3)), 0)
    zero = normax.Moments(jnp.zeros(3, jnp.int32), jnp.zeros(3), jnp.zeros(3))
    for merged in (normax.merge(zero, m), normax.merge(m, zero)):
        jax.tree.map(np.testing.assert_array_equal, merged, m)
    one = normax.moments(jnp.arange(4.0), 0)
    jax.tree.map(np.testing.assert_array_equal, normax.merge(normax.Moments(0, 0.0, 0.0), one), one)


def test_merge_is_the_monoid_of_a_reduction():
    x = 10 + jax.random.normal(KEY, (7, 4))
    parts = normax.Moments(jnp.ones(x.shape, jnp.int32), x, jnp.zeros(x.shape))
    zero = normax.Moments(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))
    close(jax.lax.reduce(parts, zero, normax.merge, (0,)), normax.moments(x, 0), 1)


@pytest.mark.parametrize("axes", [0, -1, (0, 2), [1], (0, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_against_numpy(axes, masked):
    x = np.asarray(5 + jax.random.normal(KEY, (4, 5, 6)))
    mask = np.asarray(jax.random.bernoulli(KEY, 0.6, x.shape)) if masked else np.ones(x.shape, bool)
    count, mean, var = normax.moments(x, axes, mask=mask if masked else None)
    exact = np.ma.array(x.astype(np.float64), mask=~mask)
    axes = tuple(axes) if isinstance(axes, list) else axes
    np.testing.assert_array_equal(count, mask.sum(axes))
    np.testing.assert_allclose(mean, exact.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var(axes), rtol=1e-5, atol=1e-6)
    assert count.dtype == jnp.int32
    assert count.shape == mean.shape == var.shape


def test_counts_are_exact_and_never_wrap():
    one = normax.Moments(jnp.int32(1), jnp.float32(0), jnp.float32(0))
    many = one._replace(count=jnp.int32(2**24))
    assert int(normax.merge(many, one).count) == 2**24 + 1
    full = one._replace(count=jnp.int32(2**31 - 10))
    merged = normax.merge(full, one._replace(count=jnp.int32(100), mean=jnp.float32(1)))
    assert int(merged.count) == 2**31 - 1
    assert 0 < float(merged.mean) < 1e-6
    # A mask over more entries than float32 can count one by one.
    mask = jnp.ones(2**24 + 3, bool)
    assert int(normax.moments(jnp.ones(2**24 + 3), 0, mask=mask).count) == 2**24 + 3


def test_a_count_over_devices_stops_at_the_largest_int32():
    digits = lambda count: divmod(jnp.float32(count), jnp.float32(measure.DIGIT))
    assert int(measure._number(digits(2**31 - 2**8))) == 2**31 - 2**8
    assert int(measure._number(digits(2**33))) == 2**31 - 1


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_exponential_average(unbiased):
    xs = np.asarray(3 + jax.random.normal(KEY, (5, 8, 2)))
    stats, mean, var = normax.RunningStats.create(2), np.zeros(2), np.ones(2)
    for x in xs:
        stats = normax.update(stats, normax.moments(x, 0), 0.9, unbiased=unbiased)
        mean = 0.9 * mean + 0.1 * x.mean(0)
        var = 0.9 * var + 0.1 * x.var(0, ddof=int(unbiased))
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)
    assert stats.count.tolist() == [40, 40]


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_cumulative_average_is_of_all_data_seen(unbiased):
    x = np.asarray(1e3 + jax.random.normal(KEY, (100, 2)))
    stats = normax.RunningStats.create(2)
    for part in np.split(x, [1, 30, 37, 90]):
        stats = normax.update(stats, normax.moments(part, 0), None, unbiased=unbiased)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, exact.var(0, ddof=int(unbiased)), rtol=1e-5)


def test_momentum_may_be_traced():
    stats, m = normax.RunningStats.create(2), normax.moments(jnp.ones((3, 2)), 0)
    ours = jax.jit(normax.update)(stats, m, jnp.float32(0.25))
    np.testing.assert_allclose(ours.mean, [0.75, 0.75])


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_the_state_keeps_its_dtypes(dtype, momentum):
    xs = jax.random.normal(KEY, (3, 8, 2)).astype(dtype)
    start = normax.RunningStats.create(2, dtype)
    assert start.mean.dtype == (jnp.complex64 if dtype == "complex64" else jnp.float32)

    def step(stats, x):
        y, new = normax.batch_norm(x, stats, use_running_average=False, momentum=momentum)
        return new, y

    stats, ys = jax.lax.scan(step, start, xs)
    assert ys.dtype == xs.dtype
    for old, new in zip(start, stats, strict=True):
        assert old.dtype == new.dtype


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_float64_is_not_lost(state):
    x = np.asarray(jax.random.normal(KEY, (100, 2), "float64")) + 1e8
    m = normax.moments(x, 0)
    assert m.mean.dtype == m.var.dtype == jnp.float64
    np.testing.assert_allclose(m.var, x.var(0), rtol=1e-12)
    new = normax.update(normax.RunningStats.create(2, state), m, None)
    assert new.mean.dtype == state


def test_n_steps_then_inference_gives_deviation_one():
    xs = 7 + 3 * jax.random.normal(KEY, (10, 64, 2))
    stats = normax.RunningStats.create(2)
    for x in xs:
        _, stats = normax.batch_norm(x, stats, use_running_average=False, momentum=None)
    y, same = normax.batch_norm(xs.reshape(-1, 2), stats, use_running_average=True)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    assert same is stats


def test_evaluation_before_training_is_the_identity_but_for_epsilon():
    x = jax.random.normal(KEY, (4, 2))
    y, _ = normax.batch_norm(x, normax.RunningStats.create(2), use_running_average=True)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_merge_takes_nothing_as_it_is_whatever_the_size():
    nothing = normax.Moments(jnp.int32(0), jnp.float32(0), jnp.float32(0))
    large = normax.Moments(jnp.int32(4), jnp.float32(1e20), jnp.float32(1))
    spoiled = nothing._replace(mean=jnp.float32(jnp.nan), var=jnp.float32(jnp.nan))
    for empty in (nothing, spoiled):
        for merged in (normax.merge(empty, large), normax.merge(large, empty)):
            assert [float(leaf) for leaf in merged] == [4, np.float32(1e20), 1]


def test_merge_is_commutative_for_counts_far_apart():
    few = normax.Moments(jnp.int32(1), jnp.float32(1000), jnp.float32(0))
    many = normax.Moments(jnp.int32(10**7), jnp.float32(0), jnp.float32(0))
    for merged in (normax.merge(few, many), normax.merge(many, few)):
        np.testing.assert_allclose(merged.var, 1e6 * 1e7 / (1e7 + 1) ** 2, rtol=1e-5)
        np.testing.assert_allclose(merged.mean, 1e3 / (1e7 + 1), rtol=1e-6)
