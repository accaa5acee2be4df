"""Running statistics: nothing spoils them, and a spoiled state is refused."""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normax.linen
import normax.nnx

KEY = jax.random.key(0)
STATS = normax.RunningStats(jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4]), jnp.array([5, 6]))
GOOD = 2 + jax.random.normal(KEY, (8, 2))
POISON = pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -jnp.inf])


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def train(x, stats=STATS, **options):
    return normax.batch_norm(x, stats, use_running_average=False, **options)


@POISON
@pytest.mark.parametrize("momentum", [0.9, None, 0.0])
def test_one_bad_number_is_skipped_in_its_feature_and_shows_in_the_output(momentum, poison):
    x = GOOD.at[3, 1].set(poison)
    y, new = jax.jit(lambda x: train(x, momentum=momentum))(x)
    _, clean = train(GOOD, momentum=momentum)
    for field, expected, old in zip(new, clean, STATS, strict=True):
        np.testing.assert_allclose(field[0], expected[0], rtol=1e-6)
        assert field[1] == old[1]
    assert np.isnan(np.asarray(y)[:, 1]).any()
    assert np.isfinite(np.asarray(y)[:, 0]).all()


@pytest.mark.parametrize("norm", [normax.layer_norm, normax.rms_norm])
def test_a_bad_number_shows_in_all_of_its_group(norm):
    y = np.asarray(norm(GOOD.at[3, 1].set(jnp.nan)))
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


def test_a_bad_state_shows_in_the_output():
    for bad in (jnp.nan, -1.0):
        stats = STATS._replace(var=STATS.var.at[1].set(bad))
        y, _ = normax.batch_norm(GOOD, stats, use_running_average=True)
        assert np.isnan(np.asarray(y)[:, 1]).all()
        assert np.isfinite(np.asarray(y)[:, 0]).all()


def test_a_batch_with_one_valid_entry_does_not_shrink_the_variance():
    mask = jnp.array([[True, True], [False, True]] + [[False, False]] * 6)
    _, new = train(GOOD, mask=mask)
    same(jax.tree.map(lambda leaf: leaf[0], new), jax.tree.map(lambda leaf: leaf[0], STATS))
    assert new.count[1] == 8
    # All data seen includes it.
    assert train(GOOD, mask=mask, momentum=None)[1].count.tolist() == [6, 8]


@POISON
def test_keep_lets_it_in(poison):
    _, new = train(GOOD.at[3, 1].set(poison), nonfinite="keep")
    assert not np.isfinite(new.mean[1])
    assert np.isfinite(new.mean[0])
    assert new.count.tolist() == [13, 14]


def test_what_a_state_cannot_hold_is_skipped_too():
    start = normax.RunningStats.create(())
    finite = lambda count, mean, var: normax.Moments(
        jnp.int32(count), jnp.float32(mean), jnp.float32(var)
    )
    same(normax.update(start, finite(2, 0, 3e38), 0.5, unbiased=True), start)
    seen = start._replace(count=jnp.int32(4))
    same(normax.update(seen, finite(4, 1e20, 0), None), seen)


def test_training_goes_on_after_a_bad_batch():
    batches = jnp.stack([GOOD, GOOD.at[0].set(jnp.nan), GOOD + 1])
    step = lambda stats, x: (train(x, stats)[1], None)
    after, _ = jax.lax.scan(step, STATS, batches)
    without, _ = jax.lax.scan(step, STATS, batches[jnp.array([0, 2])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, without)


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_every_device_does_the_same_when_one_has_a_bad_batch(nonfinite):
    x = jnp.stack([GOOD, GOOD + 1, GOOD.at[0, 1].set(jnp.nan), GOOD - 1])
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4])
    one = lambda x: jax.tree.map(
        lambda leaf: leaf[None], train(x[0], axis_name="i", nonfinite=nonfinite)[1]
    )
    mapped = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    for new in (
        mapped(jax.device_put(x, NamedSharding(mesh, P("i")))),
        jax.vmap(lambda x: train(x, axis_name="i", nonfinite=nonfinite)[1], axis_name="i")(x),
    ):
        for leaf, old in zip(map(np.asarray, new), STATS, strict=True):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
            assert (leaf[0, 1] == old[1]) == (nonfinite == "skip")
            assert leaf[0, 0] != old[0]


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_the_modules_pass_the_policy_on(nonfinite):
    x = GOOD.at[3, 1].set(jnp.nan)
    norm = normax.linen.BatchNorm(use_running_average=False, nonfinite=nonfinite)
    variables = norm.init(KEY, GOOD)
    _, new = norm.apply(variables, x, mutable=["batch_stats"])
    model = normax.nnx.BatchNorm(2, nonfinite=nonfinite, rngs=flax.nnx.Rngs(0))
    model(x)
    for mean in (new["batch_stats"]["mean"], model.mean[...]):
        assert np.isfinite(mean).tolist() == [True, nonfinite == "skip"]


def test_a_bfloat16_model_keeps_a_float32_average_that_moves():
    stats = normax.RunningStats.create(1)
    x = (2 + jax.random.normal(KEY, (64, 1))).astype(jnp.bfloat16)
    step = lambda stats, _: (train(x, stats, momentum=0.999)[1], None)
    stats, _ = jax.lax.scan(step, stats, None, length=2000)
    exact = np.asarray(x, np.float64)
    weight = 0.999**2000
    np.testing.assert_allclose(stats.mean, (1 - weight) * exact.mean(0), rtol=1e-3)
    np.testing.assert_allclose(stats.var, weight + (1 - weight) * exact.var(0), rtol=1e-3)


def test_microbatches_merged_are_one_update():
    parts = jnp.split(GOOD, 4)
    merged = normax.moments(parts[0], 0)
    for part in parts[1:]:
        merged = normax.merge(merged, normax.moments(part, 0))
    once = normax.update(STATS, merged, 0.9)
    same(once.count, jnp.array([13, 14]))
    for ours, whole in zip(once, normax.update(STATS, normax.moments(GOOD, 0), 0.9), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-6)


def test_a_layer_called_twice_moves_its_state_twice():
    model = normax.nnx.BatchNorm(2, momentum=0.5, rngs=flax.nnx.Rngs(0))
    model(GOOD)
    model(GOOD)
    np.testing.assert_allclose(model.mean[...], 0.75 * GOOD.mean(0), rtol=1e-6)


def test_an_epsilon_far_below_float16_is_added_all_the_same():
    x = jnp.array([[1.0, 1.0, 1.0, 1.0], [0.0, 6e-8, 0.0, 6e-8]], jnp.float16)
    for epsilon in (1e-8, 1e-12):
        y = np.asarray(normax.layer_norm(x, epsilon=epsilon), np.float64)
        np.testing.assert_array_equal(y[0], np.zeros(4))
        wide = np.asarray(x[1], np.longdouble)
        exact = (wide - wide.mean()) / np.sqrt(wide.var() + epsilon)
        np.testing.assert_allclose(y[1], exact.astype(np.float64), rtol=2e-3)


@pytest.mark.parametrize("mean", [0, 6e4])
@pytest.mark.parametrize("deviation", [1e-4, 1, 1e4])
def test_float16_gradients_are_numbers(mean, deviation):
    rng = np.random.default_rng(0)
    x = np.clip(rng.normal(size=(4, 256)) * deviation + mean, -65504, 65504)
    x = jnp.asarray(x, jnp.float16)
    ct = jnp.asarray(rng.normal(size=x.shape), jnp.float16)
    for norm in (normax.layer_norm, normax.rms_norm, lambda x: train(x.T, _stats(4))[0].T):
        dx = jax.vjp(norm, x)[1](ct)[0]
        assert not np.isnan(np.asarray(dx)).any()


def _stats(features):
    return normax.RunningStats.create(features)


def test_validate_takes_what_fits():
    assert normax.validate(STATS, _stats(2)) is STATS
    shapes = jax.eval_shape(lambda: STATS)
    assert normax.validate(STATS, shapes) is STATS
    assert normax.validate(shapes, STATS) is shapes
    tree = {"params": {"scale": GOOD}, "batch_stats": STATS, "key": jax.random.key(0), "n": 3}
    assert normax.validate(tree, tree) is tree
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), STATS)
    assert normax.validate(half, half) is half


@pytest.mark.parametrize(
    ("wrong", "exception", "message"),
    [
        ({"mean": jnp.ones(3)}, ValueError, r"bn/mean of shape \(2,\), got \(3,\)"),
        ({"mean": jnp.ones((1, 2))}, ValueError, r"bn/mean of shape \(2,\), got \(1, 2\)"),
        ({"var": jnp.ones(2, jnp.bfloat16)}, TypeError, r"bn/var of dtype float32, got bfloat16"),
        ({"mean": jnp.array([1, jnp.nan])}, ValueError, r"finite bn/mean, got 1 values"),
        ({"var": jnp.array([1, jnp.inf])}, ValueError, r"finite bn/var, got 1 values"),
        ({"var": jnp.array([1, -0.5])}, ValueError, r"bn/var of at least 0, got -0.5"),
        ({"other": jnp.ones(2)}, ValueError, r"missing are \[\], unknown are \['bn/other'\]"),
    ],
)
def test_validate_refuses_what_does_not(wrong, exception, message):
    like = {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(exception, match=message):
        normax.validate({"bn": {**like["bn"], **wrong}}, like)


def test_validate_refuses_a_missing_key_and_an_impossible_count():
    with pytest.raises(ValueError, match=r"missing are \['var'\]"):
        normax.validate({"mean": GOOD}, {"mean": GOOD, "var": GOOD})
    with pytest.raises(ValueError, match="count of at least 0, got -1"):
        normax.validate(STATS._replace(count=jnp.array([-1, 0])), STATS)
    normax.validate({"mean": -GOOD}, {"mean": GOOD})


def test_validate_reads_the_states_of_flax():
    model = normax.nnx.BatchNorm(2, rngs=flax.nnx.Rngs(0))
    state = flax.nnx.state(model)
    normax.validate(state, flax.nnx.eval_shape(lambda: flax.nnx.state(model)))
    model.var[...] = -jnp.ones(2)
    with pytest.raises(ValueError, match="var/value of at least 0"):
        normax.validate(flax.nnx.state(model), state)


def test_validate_checks_shapes_under_jit_too():
    with pytest.raises(ValueError, match=r"mean of shape \(3,\), got \(2,\)"):
        jax.jit(lambda stats: normax.validate(stats, _stats(3)))(STATS)
    bad = STATS._replace(mean=jnp.full(2, jnp.nan))
    same(jax.jit(lambda stats: normax.validate(stats, STATS))(bad), bad)


def test_statistics_may_be_plain_numbers():
    stats, m = normax.RunningStats(0.0, 1.0, 4), normax.Moments(3, 0.5, 2.0)
    new = normax.update(stats, m, momentum=0.5)
    assert (float(new.mean), float(new.var), int(new.count)) == (0.25, 1.5, 7)
    same(normax.merge(m, normax.Moments(1, 0.5, 2.0)), normax.Moments(4, 0.5, 2.0))
    prior = normax.kalman_prior(m, lambda x: 2 * x, KEY, shape=(50_000,), feature_axes=())
    np.testing.assert_allclose((prior.mean, prior.var), (1, 8), rtol=0.05)
