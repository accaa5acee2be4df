"""Laws over any shape, axes, dtype and mask, with examples that hypothesis draws."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

import normax

FEW = hypothesis.settings(deadline=None, max_examples=12, derandomize=True)
SHAPES = st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def arrays(draw):
    """Draws an array, a mask that broadcasts to it, and axes of it, at least one."""
    shape = draw(SHAPES)
    rng = np.random.default_rng(draw(SEEDS))
    x = jnp.asarray(rng.normal(3, 2, shape), draw(DTYPES))
    mask = rng.random([draw(st.sampled_from([1, n])) for n in shape]) < 0.7
    axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    return x, jnp.asarray(mask), tuple(sorted(axes))


def exact(x, axes, mask, epsilon=1e-3):
    """Returns y, count, mean and variance in long double."""
    wide = np.asarray(x).astype(np.clongdouble)
    valid = np.broadcast_to(np.asarray(mask), wide.shape)
    wide = np.where(valid, wide, 0)
    n = valid.sum(axes, keepdims=True)
    mean = wide.sum(axes, keepdims=True) / np.maximum(n, 1)
    d = np.where(valid, wide - mean, 0)
    var = (np.abs(d) ** 2).sum(axes, keepdims=True) / np.maximum(n, 1)
    return d / np.sqrt(var + epsilon), n, mean, var


def close(ours, theirs, dtype):
    ours = np.asarray(ours).astype(np.clongdouble)
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(ours - theirs).max() <= 8 * eps * max(1, np.abs(theirs).max())


@FEW
@hypothesis.given(arrays())
def test_any_axes_and_mask_are_the_formula(drawn):
    x, mask, axes = drawn
    y, n, mean, var = exact(x, axes, mask)
    close(normax.layer_norm(x, reduction_axes=axes, mask=mask, epsilon=1e-3), y, x.dtype)
    m = normax.moments(x, axes, mask=mask)
    np.testing.assert_array_equal(m.count, n.squeeze(axes))
    close(m.mean, mean.squeeze(axes), m.mean.dtype)
    close(m.var, var.squeeze(axes), m.var.dtype)


@FEW
@hypothesis.given(arrays(), st.randoms(use_true_random=False))
def test_axes_count_from_either_end_in_any_order(drawn, random):
    x, mask, axes = drawn
    other = [axis - x.ndim if random.random() < 0.5 else axis for axis in axes]
    random.shuffle(other)
    expected = normax.layer_norm(x, reduction_axes=axes, mask=mask)
    np.testing.assert_array_equal(normax.layer_norm(x, reduction_axes=other, mask=mask), expected)


@FEW
@hypothesis.given(arrays(), st.permutations(range(4)))
def test_moved_axes_are_moved_axes(drawn, order):
    x, mask, axes = drawn
    order = [axis for axis in order if axis < x.ndim]
    y = normax.layer_norm(
        x.transpose(order),
        reduction_axes=[order.index(axis) for axis in axes],
        mask=mask.transpose(order),
    )
    expected = normax.layer_norm(x, reduction_axes=axes, mask=mask).transpose(order)
    close(y, np.asarray(expected).astype(np.clongdouble), x.dtype)


@FEW
@hypothesis.given(arrays(), st.integers(-9, 9), st.booleans())
def test_illegal_axes_are_refused(drawn, axis, repeat):
    x, _, axes = drawn
    wrong = (*axes, axes[0] - x.ndim) if repeat else (axis,)
    hypothesis.assume(repeat or not -x.ndim <= axis < x.ndim)
    for call in (
        lambda: normax.layer_norm(x, reduction_axes=wrong),
        lambda: normax.rms_norm(x, feature_axes=wrong),
        lambda: normax.moments(x, wrong),
        lambda: normax.weight_norm(x, feature_axes=wrong),
        lambda: normax.normalize_batch(x, feature_axes=wrong),
    ):
        with pytest.raises(ValueError, match="axes"):
            call()


@FEW
@hypothesis.given(SEEDS, st.integers(-120, 120), st.sampled_from([None, 0.5]))
def test_a_power_of_two_changes_no_bit(seed, power, valid):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 1, (3, 8)).astype(np.float32) * rng.choice([-1, 1], (3, 8)).astype("f4")
    mask = None if valid is None else jnp.asarray(rng.random((3, 8)) < valid)
    scaled = jnp.asarray(np.ldexp(x, power))
    for norm in (normax.layer_norm, normax.rms_norm):
        expected = norm(jnp.asarray(x), mask=mask, epsilon=0.0)
        np.testing.assert_array_equal(norm(scaled, mask=mask, epsilon=0.0), expected)


@FEW
@hypothesis.given(arrays())
def test_what_is_masked_may_be_anything(drawn):
    x, mask, axes = drawn
    poisoned = jnp.where(mask, x, jnp.asarray(jnp.nan, x.dtype))
    expected = normax.layer_norm(x, reduction_axes=axes, mask=mask)
    y = normax.layer_norm(poisoned, reduction_axes=axes, mask=mask)
    np.testing.assert_array_equal(y, expected)


@FEW
@hypothesis.given(arrays(), SEEDS)
def test_batch_norm_has_a_state_of_its_own_for_every_feature(drawn, seed):
    x, mask, axes = drawn
    features = tuple(axis for axis in range(x.ndim) if axis not in axes)
    hypothesis.assume(np.prod([x.shape[axis] for axis in axes]) > 1)
    stats = normax.RunningStats.create(tuple(x.shape[axis] for axis in features), x.dtype)
    _, new = normax.batch_norm(
        x, stats, use_running_average=False, feature_axes=features, momentum=None, mask=mask
    )
    _, n, mean, var = exact(x, axes, mask)
    some = n.squeeze(axes) > 0
    np.testing.assert_array_equal(new.count, n.squeeze(axes))
    close(new.mean, np.where(some, mean.squeeze(axes), 0), new.mean.dtype)
    close(new.var, np.where(some, var.squeeze(axes), 1), new.var.dtype)
