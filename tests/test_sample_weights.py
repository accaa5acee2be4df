"""Weights in place of a mask: how often an entry counts, in every norm that takes a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MEASURED
from differences import check_derivatives
from family import FAMILY
from sklearn.preprocessing import StandardScaler

import normax

TIMES = np.array([2, 0, 1, 3, 1, 2, 1, 1])
NAMED = {"ids": lambda member: member.name}


def repeated(array, axis):
    """Returns an array whose entries along an axis are there as often as they count."""
    times = TIMES[: array.shape[axis]]
    return np.repeat(np.asarray(array), times, axis), np.repeat(np.arange(len(times)), times)


def laid_along(x, axis, dtype=jnp.float32):
    times = jnp.asarray(TIMES[: x.shape[axis]], dtype)
    return jnp.expand_dims(times, tuple(i for i in range(x.ndim) if i != axis))


# A ghost has room for so many entries: test_a_ghost_is_measured_by_its_weights.
REPEATABLE = [m for m in FAMILY if m.removable is not None and "ghost" not in m.name]


@pytest.mark.parametrize("member", REPEATABLE, **NAMED)
def test_an_entry_of_weight_two_is_two_entries_to_the_family(member, x64):
    x, parameters = member.inputs(jnp.float64)
    axis = member.removable
    mask = laid_along(x, axis, jnp.float64)
    poisoned = jnp.where(mask > 0, x, jnp.nan)
    more, origin = repeated(x, axis)
    y, vjp = jax.vjp(jax.jit(lambda x: member.call(x, parameters, mask=mask)), poisoned)
    expected = member.expected(more, parameters)
    np.testing.assert_allclose(
        np.take(np.asarray(y), origin, axis), expected, rtol=1e-9, atol=1e-10
    )
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(vjp(jnp.ones_like(y))[0]).all()


@pytest.mark.parametrize("case", MEASURED, **NAMED)
def test_an_entry_of_weight_two_is_two_entries(case):
    x = jax.random.normal(jax.random.key(0), case.shape) + 3
    scale, bias = jnp.full(case.parameter_shape(), 2.0), jnp.ones(case.parameter_shape())
    axis = case.reduced[0] % x.ndim if case.groups is None else 1 if case.features == (-1,) else 2
    mask = laid_along(x, axis)
    more, origin = repeated(x, axis)
    ct = jax.random.normal(jax.random.key(1), case.shape)
    f = lambda x, mask: case.apply(x, scale, bias, mask)
    # Copies share what the entry passes on: the gradient of one is that of all.
    times = np.maximum(np.asarray(mask), 1)
    y, vjp = jax.vjp(jax.jit(lambda x: f(x, mask)), jnp.where(mask > 0, x, jnp.inf))
    if axis in [a % x.ndim for a in case.features]:
        scale, bias = scale[origin], bias[origin]
    expected, expected_vjp = jax.vjp(jax.jit(lambda x: f(x, None)), jnp.asarray(more))
    np.testing.assert_allclose(np.take(np.asarray(y), origin, axis), expected, rtol=2e-5, atol=1e-6)
    (copies,) = expected_vjp(jnp.asarray(np.take(np.asarray(ct) / times, origin, axis)))
    summed = np.zeros(x.shape)
    np.add.at(np.moveaxis(summed, axis, 0), origin, np.moveaxis(np.asarray(copies), axis, 0))
    np.testing.assert_allclose(vjp(ct)[0], summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_real_weights_by_numpy_s_average(size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1e4, 1, (64, 3)), jnp.float32)
    w = jnp.asarray(size * rng.uniform(0.1, 2, (64, 1)), jnp.float32)
    m = normax.moments(x, 0, mask=w)
    wide, each = np.asarray(x, np.longdouble), np.broadcast_to(w, x.shape).astype(np.longdouble)
    mean = np.average(wide, 0, each)
    np.testing.assert_allclose(m.mean, mean.astype(float), rtol=2e-7)
    var = np.average((wide - mean) ** 2, 0, each)
    np.testing.assert_allclose(m.var, var.astype(float), rtol=4e-6)
    np.testing.assert_allclose(m.count, each.sum(0).astype(float), rtol=1e-6)
    assert m.count.dtype == jnp.float32


@pytest.mark.parametrize("epsilon_on", ["variance", "deviation"])
@pytest.mark.parametrize("centered", [True, False])
def test_derivatives_with_respect_to_weights(epsilon_on, centered, x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(3, 2, (4, 3))), jnp.asarray(rng.uniform(0.2, 2, (4, 3)))
    f = lambda x, w: normax.standardize(
        x, reduction_axes=0, mask=w, epsilon_on=epsilon_on, centered=centered, epsilon=0.1
    )
    check_derivatives(f, (x, w))


def test_derivatives_of_moments_with_respect_to_weights_of_any_shape(x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(3, 2, (4, 3))), jnp.asarray(rng.uniform(0.2, 2, (4, 1)))
    check_derivatives(lambda x, w: normax.moments(x, 0, mask=w), (x, w))
    c = jax.lax.complex(x, x[::-1])
    check_derivatives(lambda w: normax.moments(c, 0, mask=w).var, (w,))


def test_the_derivative_with_respect_to_weights_knows_no_size():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    w = jnp.linspace(0.5, 2.0, 8)
    g = jax.grad(lambda w, x: jnp.sum(normax.layer_norm(x, mask=w[None], epsilon=0.0) ** 3))
    np.testing.assert_allclose(g(w, x * 2.0**100), g(w, x), rtol=1e-5)


def test_weights_of_zero_below_zero_and_nan_are_none():
    x = jnp.asarray([1.0, 3.0, jnp.nan, jnp.inf, jnp.nan])
    w = jnp.asarray([1.0, 1.0, 0.0, -2.0, jnp.nan])
    m = normax.moments(x, 0, mask=w)
    np.testing.assert_array_equal(jnp.stack(m), jnp.asarray([2.0, 2.0, 1.0]))
    y, vjp = jax.vjp(lambda x, w: normax.layer_norm(x, None, jnp.full(5, 7.0), mask=w), x, w)
    np.testing.assert_allclose(y, [6, 8, 7, 7, 7], rtol=1e-5)
    for gradient in vjp(jnp.arange(5.0)):
        assert jnp.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[2:], jnp.zeros(3))


def test_devices_with_unequal_weights_are_the_whole_batch():
    x = jax.random.normal(jax.random.key(0), (4, 6, 3)) + 100
    w = jax.random.uniform(jax.random.key(1), (4, 6, 1)).at[2].set(0)
    stats = normax.RunningStats.create(3)
    f = lambda x, w, name: normax.batch_norm(
        x, stats, use_running_average=False, mask=w, axis_name=name, momentum=0.5
    )
    pooled, new = jax.vmap(lambda x, w: f(x, w, "i"), axis_name="i")(x, w)
    whole, expected = f(x.reshape(24, 3), w.reshape(24, 1), None)
    np.testing.assert_allclose(pooled.reshape(24, 3), whole, rtol=1e-4, atol=1e-5)
    for leaf, other in zip(new, expected, strict=True):
        np.testing.assert_allclose(leaf[0], other, rtol=1e-5)
    pooled_loss = lambda w: jnp.sum(
        jax.vmap(lambda x, w: f(x, w, "i")[0], axis_name="i")(x, w) ** 3
    )
    whole_loss = lambda w: jnp.sum(f(x.reshape(24, 3), w.reshape(24, 1), None)[0] ** 3)
    by_device, at_once = jax.jit(lambda w: (jax.grad(pooled_loss)(w), jax.grad(whole_loss)(w)))(w)
    np.testing.assert_allclose(by_device, at_once, rtol=1e-2, atol=1e-3)


def test_parts_of_weighted_entries_merge():
    rng = np.random.default_rng(0)
    x, w = rng.normal(5, 2, 12), rng.uniform(0, 2, 12)
    part = lambda s: normax.moments(jnp.float32(x[s]), 0, mask=jnp.float32(w[s]))
    _, mean, var = normax.merge(part(slice(5)), part(slice(5, 12)))
    np.testing.assert_allclose(mean, np.average(x, weights=w), rtol=1e-6)
    np.testing.assert_allclose(var, np.cov(x, aweights=w, ddof=0), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1e-30, 1e30])
def test_parts_of_any_total_merge(size):
    x, w = jnp.asarray([1.0, 3.0, 5.0, 2.0]), jnp.asarray([1.0, 1.0, 2.0, 3.0]) * size
    parts = [normax.moments(x[s], 0, mask=w[s]) for s in (slice(2), slice(2, 4))]
    _, mean, var = normax.merge(*parts)
    exact = np.average(np.asarray(x), weights=[1, 1, 2, 3])
    np.testing.assert_allclose(mean, exact, rtol=1e-6)
    expected = np.average((np.asarray(x) - exact) ** 2, weights=[1, 1, 2, 3])
    np.testing.assert_allclose(var, expected, rtol=1e-5)
    whole, zero = normax.moments(x, 0, mask=w), normax.Moments(*[jnp.zeros(())] * 3)
    for leaf, same in zip(normax.merge(whole, zero), whole, strict=True):
        np.testing.assert_allclose(leaf, same, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e30])
def test_weights_of_any_size_are_as_good_as_others(size):
    x = 1 + 0.01 * jax.random.normal(jax.random.key(0), (3, 8))
    w = jnp.linspace(0.5, 2.0, 8)[None]
    f = jax.jit(lambda x, w: jax.vjp(lambda x: normax.layer_norm(x, mask=w), x)[1](x**2))
    np.testing.assert_allclose(f(x, w * size)[0], f(x, w)[0], rtol=1e-4, atol=1e-4)
    g = jax.jit(lambda x, w: jnp.stack(normax.moments(x, 1, mask=w)[1:]))
    np.testing.assert_allclose(g(x, w * size), g(x, w), rtol=1e-5)
    ids = jnp.asarray([0, 1, 0])
    h = lambda w: jnp.stack(normax.segment_moments(x, ids, 2, weights=w)[1:])
    each = jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_allclose(h(each * size), h(each), rtol=1e-5)


def test_ints_are_weights_too():
    m = normax.moments(jnp.asarray([1.0, 3.0, 5.0]), 0, mask=jnp.asarray([3, 0, -2]))
    np.testing.assert_array_equal(jnp.stack(m), jnp.asarray([3.0, 1.0, 0.0]))


def test_the_running_count_stays_an_int():
    stats = normax.RunningStats.create(())
    m = normax.moments(jnp.asarray([1.0, 3.0]), 0, mask=jnp.asarray([0.75, 1.0]))
    new = jax.jit(lambda s: normax.update(s, m, momentum=None))(stats)
    assert new.count.dtype == jnp.int32
    assert new.count == 2
    np.testing.assert_allclose(new.mean, 3.75 / 1.75, rtol=1e-6)
    real = stats._replace(count=jnp.zeros(()))
    assert normax.update(real, m, momentum=None).count == 1.75
    huge = m._replace(count=jnp.float32(1e20))
    assert normax.update(stats, huge, momentum=None).count == 2**31 - 1
    many = stats._replace(count=jnp.asarray(2**25 + 1, jnp.int32))
    assert normax.update(many, m, momentum=0.5).count == 2**25 + 3
    # What counts once or less has no variance to remember.
    light = normax.moments(jnp.asarray([1.0, 3.0]), 0, mask=jnp.asarray([0.25, 0.5]))
    jax.tree.map(np.testing.assert_array_equal, normax.update(stats, light), stats)


def test_features_by_sample_weight_as_scikit_learn_s():
    rng = np.random.default_rng(0)
    x, w = rng.normal(3, 2, (40, 3)).astype("f4"), rng.uniform(0, 2, 40).astype("f4")
    scaling = normax.standardize_features(jnp.asarray(x), mask=jnp.asarray(w)[:, None])
    theirs = StandardScaler().fit(x, sample_weight=w)
    np.testing.assert_allclose(scaling.offset, theirs.mean_, rtol=1e-5)
    np.testing.assert_allclose(scaling.factor, theirs.scale_, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("centered", [True, False])
def test_segments_in_groups_of_features(groups, centered):
    rng = np.random.default_rng(0)
    x, ids = rng.normal(2, 3, (7, 4)).astype("f4"), np.array([1, 0, -1, 1, 0, 1, 1])
    w = rng.uniform(0.5, 2, 7).astype("f4")
    given = np.where(ids[:, None] < 0, np.nan, x)
    y = normax.segment_norm(
        jnp.asarray(given),
        jnp.asarray(ids),
        2,
        bias=jnp.full(4, 0.5),
        weights=jnp.asarray(w),
        num_groups=groups,
        centered=centered,
    )
    expected = np.full(x.shape, 0.5)
    for segment in range(2):
        for group in np.split(np.arange(4), groups):
            at = np.ix_(ids == segment, group)
            part, each = x[at].astype(float), np.repeat(w[ids == segment, None], len(group), 1)
            d = part - (np.average(part, weights=each) if centered else 0)
            expected[at] += d / np.sqrt(np.average(d**2, weights=each) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_segment_counts_are_the_weights_and_merge():
    x, ids = jnp.arange(6.0), jnp.asarray([0, 1, 0, 1, 0, 0])
    w = jnp.asarray([1.0, 2.0, 0.5, 0.0, 1.5, 1.0])
    m = normax.segment_moments(x, ids, 2, weights=w)
    np.testing.assert_array_equal(m.count, jnp.asarray([4.0, 2.0]))
    parts = [normax.segment_moments(x[s], ids[s], 2, weights=w[s]) for s in (slice(3), slice(3, 6))]
    merged = normax.merge(*parts)
    for leaf, whole in zip(merged, m, strict=True):
        np.testing.assert_allclose(leaf, whole, rtol=1e-6)


def test_a_ghost_is_measured_by_its_weights():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    w = jnp.asarray([1.0, 2.0, 0.5, 3.0, 1.0, 1.0])[:, None]
    stats = normax.RunningStats.create(4)
    y, _ = normax.ghost_batch_norm(x, stats, ghost_size=3, use_running_average=False, mask=w)
    for part in (slice(3), slice(3, 6)):
        wide = np.asarray(x[part], float)
        each = np.broadcast_to(w[part], wide.shape)
        d = wide - np.average(wide, 0, each)
        expected = d / np.sqrt(np.average(d**2, 0, each) + 1e-5)
        np.testing.assert_allclose(y[part], expected, rtol=1e-4, atol=1e-5)


def test_power_norm_counts_an_entry_of_weight_two_twice():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    more, origin = repeated(x, 0)
    state = normax.PowerState.create(3)._replace(drift=jnp.full(3, 0.25))
    ct = jax.random.normal(jax.random.key(1), (4, 3))
    mask = laid_along(x, 0)

    def run(x, mask):
        f = lambda x, drift: normax.power_norm(
            x, state._replace(drift=drift), use_running_average=False, mask=mask
        )
        return jax.vjp(f, x, state.drift, has_aux=True)

    y, vjp, new = run(x, mask)
    expected, expected_vjp, expected_new = run(jnp.asarray(more), None)
    np.testing.assert_allclose(y[origin], expected, rtol=1e-5)
    np.testing.assert_allclose(new.square, expected_new.square, rtol=1e-5)
    dx, drift = vjp(ct)
    copies, expected_drift = expected_vjp((ct / jnp.maximum(mask, 1))[origin])
    np.testing.assert_allclose(drift, expected_drift, rtol=1e-4)
    summed = jnp.zeros((4, 3)).at[origin].add(copies)
    np.testing.assert_allclose(dx, summed, rtol=1e-4, atol=1e-6)
