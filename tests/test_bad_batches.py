"""A loss or gradient that is not finite: what is skipped, what is counted, and by whom."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_train import KINDS, X, Y, create

from normax import train

pytestmark = pytest.mark.usefixtures("optax_promotes")


def same(a, b):
    """Holds two states to the same bits, but for the step and what was skipped."""
    a, b = (s.replace(step=s.key, skipped=s.key) for s in (a, b))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert bool((x == y).all())


@KINDS
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_bad_batch_changes_nothing(kind, value, microbatches):
    state, loss = create(kind)
    options = {"microbatches": microbatches, "donate": False}
    step = train.train_step(loss, nonfinite="skip", **options)
    state, metrics = step(state, (X, Y))
    assert int(metrics["skipped"]) == int(state.skipped) == 0
    bad, metrics = step(state, (X.at[7, 1].set(value), Y))
    same(bad, state)
    assert (int(bad.step), int(bad.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"])
    after, metrics = step(bad, (X, Y))
    assert np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.skipped), int(metrics["skipped"])) == (3, 1, 0)
    kept, _ = train.train_step(loss, **options)(state, (X.at[7, 1].set(value), Y))
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))


def test_a_gradient_alone_may_be_bad():
    state, _ = create("linen")
    loss = lambda model, batch, train: jnp.sqrt(jnp.abs(model(batch[0], train=train) * 0).sum())
    new, metrics = train.train_step(loss, nonfinite="skip", donate=False)(state, (X, Y))
    assert float(metrics["loss"]) == 0
    assert int(new.skipped) == 1
    same(new, state)


@pytest.mark.parametrize("rate", [0.1, 1e38])
def test_a_statistic_or_parameter_that_would_leave_the_range_is_skipped(rate):
    """The loss and its gradients are finite."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            largest = self.variable("batch_stats", "largest", jnp.zeros, ())
            unused = self.variable("batch_stats", "unused", jnp.full, (), jnp.inf)
            if train:
                largest.value, unused.value = 1e30 * x.max(), unused.value + 1
            return nn.Dense(1)(x)

    state = train.TrainState.create(Model(), optax.sgd(rate), jax.random.key(0), X, train=False)
    loss = lambda model, batch, train: (model(batch, train=train) ** 2).mean()
    step = train.train_step(loss, nonfinite="skip", donate=False)
    x = jnp.full_like(X, 1e10 if rate < 1 else 1e3)
    new, metrics = step(state, x)
    assert np.isfinite(metrics["loss"])
    assert int(new.skipped) == 1
    same(new, state)
    new, _ = step(state, X * 1e-3)
    assert int(new.skipped) == 0


def test_an_optimizer_that_would_leave_the_range_is_skipped():
    """Adam keeps squares of gradients: where one is infinite, the parameter rests for good."""
    state, _ = create("linen", optax.adam(0.1))
    scaled = lambda model, batch, train: model(batch[0], train=train).sum() * batch[1]
    step = train.train_step(scaled, nonfinite="skip", donate=False)
    new, metrics = step(state, (X, jnp.float32(1e25)))
    assert np.isfinite(metrics["loss"])
    assert int(new.skipped) == 1
    same(new, state)
    assert int(step(state, (X, jnp.float32(1)))[0].skipped) == 0


def test_it_is_looked_at_before_the_optimizer():
    """Which might hide it."""
    tx = optax.chain(optax.zero_nans(), optax.clip(1.0), optax.sgd(0.1))
    state, _ = create("linen", tx)
    loss = lambda model, batch, train: jnp.sqrt(jnp.abs(model(batch[0], train=train) * 0).sum())
    _, metrics = train.train_step(loss, nonfinite="skip", donate=False)(state, (X, Y))
    assert int(metrics["skipped"]) == 1


def test_gradients_are_those_of_a_loss_that_is_not_scaled():
    state, loss = create("linen", optax.sgd(0.1))
    whole, scaled = (
        train.train_step(loss, loss_scale=scale, donate=False)(state, (X, Y))[0].params
        for scale in (1.0, 1024.0)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, scaled)


def test_clipping_and_a_scaled_loss_compose_with_it():
    """A loss scaled beyond float16 gives gradients that are inf, which clipping would hide."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.03))
    state, loss = create("linen", tx)
    step = lambda scale: train.train_step(
        loss, dtype=jnp.float16, loss_scale=scale, nonfinite="skip", donate=False
    )
    new, metrics = step(1e9)(state, (X, Y))
    assert int(metrics["skipped"]) == 1
    assert np.isfinite(metrics["loss"])
    same(new, state)
    new, metrics = step(128.0)(state, (X, Y))
    assert int(metrics["skipped"]) == 0
    assert not bool((jax.tree.leaves(new.params)[0] == jax.tree.leaves(state.params)[0]).all())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_all_devices_skip_where_one_saw_it(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    state, loss = create("linen")
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    step = train.train_step(loss, nonfinite="skip", donate=False)
    with jax.set_mesh(mesh):
        state = place(state, P())
        new, metrics = step(state, place((X.at[60, 0].set(jnp.nan), Y), P("data")))
    same(new, state)
    for leaf in (new.skipped, metrics["skipped"]):
        assert [int(shard.data) for shard in leaf.addressable_shards] == [1] * 8


def test_a_line_of_bad_batches_is_counted_and_costs_one_compilation():
    traced = []
    state, loss = create("linen")

    def counted(*args):
        traced.append(None)
        return loss(*args)

    step = train.train_step(counted, nonfinite="skip")
    for i in range(6):
        state, _ = step(state, (X.at[0, 0].set(jnp.nan) if i % 2 else X, Y))
    assert (int(state.skipped), int(state.step), len(traced)) == (3, 6, 1)


def test_what_is_no_policy_and_a_metric_of_that_name_are_refused():
    state, loss = create("linen")
    with pytest.raises(ValueError, match="nonfinite to be one of"):
        train.train_step(loss, nonfinite="drop")
    with_metric = lambda *args: (loss(*args), {"skipped": 1.0})
    with pytest.raises(ValueError, match="'skipped'"):
        train.train_step(with_metric, nonfinite="skip", donate=False)(state, (X, Y))
    _, metrics = train.train_step(with_metric)(state, (X, Y))
    assert float(metrics["skipped"]) == 1
