"""Train steps: what moves, what is donated, what is computed in which dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax.linen
import normax.nnx
from normax import train

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("optax_promotes")
X = jax.random.normal(KEY, (64, 3))
Y = jnp.sin(X[:, 0])


class Linen(nn.Module):
    """A small network with running statistics and dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(normax.linen.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return normax.linen.WeightNorm(nn.Dense(1))(x)[:, 0]


class NNX(nnx.Module):
    """The same."""

    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.norm = normax.nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = normax.nnx.WeightNorm(nnx.Linear(16, 1, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))[:, 0]


def linen_loss(model, batch, train):
    x, y = batch
    return optax.l2_loss(model(x, train=train), y).mean()


def nnx_loss(model, batch, train):
    x, y = batch
    return optax.l2_loss(model(x), y).mean()


def create(kind, tx=None, rate=0.0):
    tx = tx or optax.adam(0.03)
    if kind == "linen":
        return train.TrainState.create(Linen(rate), tx, KEY, X, train=False), linen_loss
    return train.TrainState.from_nnx(NNX(nnx.Rngs(0), rate), tx), nnx_loss


KINDS = pytest.mark.parametrize("kind", ["linen", "nnx"])


@KINDS
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_it_learns(kind, dtype):
    state, loss = create(kind)
    scale = 1024.0 if dtype == jnp.float16 else 1.0
    traced = []

    def counted(*args):
        traced.append(args)
        return loss(*args)

    step = train.train_step(counted, dtype=dtype, loss_scale=scale)
    evaluate = train.eval_step(loss, dtype=dtype)
    first = evaluate(state, (X, Y))["loss"]
    for _ in range(150):
        state, metrics = step(state, (X, Y))
    last = evaluate(state, (X, Y))["loss"]
    assert last < 0.1 * first
    assert metrics["loss"].dtype == last.dtype == jnp.float32
    assert int(state.step) == 150
    assert len(traced) == 1  # one compilation for all the steps
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


def test_one_step_is_the_step_written_out():
    state, loss = create("linen", optax.sgd(0.1, momentum=0.9))
    variables = jax.tree.map(jnp.array, state.variables)

    def objective(params):
        y, new = Linen().apply({**variables, "params": params}, X, True, mutable=["batch_stats"])
        return optax.l2_loss(y, Y).mean(), new

    (value, updates), grads = jax.value_and_grad(objective, has_aux=True)(variables["params"])
    state, metrics = train.train_step(loss)(state, (X, Y))
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.params, params)
    jax.tree.map(close, state.batch_stats, updates["batch_stats"])
    close(metrics["loss"], value)


@KINDS
def test_the_state_is_donated_unless_told_otherwise(kind):
    state, loss = create(kind)
    leaf = jax.tree.leaves(state.params)[0]
    train.train_step(loss, donate=False)(state, (X, Y))
    assert not leaf.is_deleted()
    train.train_step(loss)(state, (X, Y))
    assert leaf.is_deleted()


def test_the_nnx_model_survives_and_comes_back():
    model = NNX(nnx.Rngs(0))
    before = np.asarray(model.first.kernel[...])
    state = train.TrainState.from_nnx(model, optax.adam(0.03))
    state, _ = train.train_step(nnx_loss)(state, (X, Y))
    np.testing.assert_array_equal(model.first.kernel[...], before)
    trained = state.model
    assert not np.array_equal(trained.first.kernel[...], before)
    assert not np.array_equal(trained.norm.mean[...], np.zeros(16))
    trained.eval()
    loss = optax.l2_loss(trained(X), Y).mean()
    np.testing.assert_allclose(loss, train.eval_step(nnx_loss)(state, (X, Y))["loss"], rtol=1e-5)


@KINDS
def test_evaluation_changes_nothing_and_each_call_moves_the_statistics_once(kind):
    state, loss = create(kind)
    before = jax.tree.map(jnp.array, state)
    train.eval_step(loss)(state, (X, Y))
    for old, new in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        assert bool((old == new).all())

    def twice(model, batch, train):
        return loss(model, batch, train) + loss(model, batch, train)

    once, _ = train.train_step(loss, donate=False)(state, (X, Y))
    two, _ = train.train_step(twice, donate=False)(state, (X, Y))
    mean = lambda s: (
        s.batch_stats["BatchNorm_0"]["mean"] if kind == "linen" else s.model.norm.mean[...]
    )
    np.testing.assert_allclose(mean(two), mean(once) * 1.99, rtol=1e-4)


@KINDS
def test_dropout_draws_anew_at_each_step(kind):
    state, loss = create(kind, optax.sgd(0.0), rate=0.5)
    step = train.train_step(loss)
    losses = set()
    for _ in range(4):
        state, metrics = step(state, (X, Y))
        losses.add(float(metrics["loss"]))
    assert len(losses) == 4


def test_metrics_come_with_the_loss():
    state, _ = create("linen")

    def loss(model, batch, train):
        value = linen_loss(model, batch, train)
        return value, {"double": 2 * value}

    _, metrics = train.train_step(loss)(state, (X, Y))
    np.testing.assert_allclose(metrics["double"], 2 * metrics["loss"])


def test_a_loss_that_is_no_scalar_is_refused():
    state, _ = create("linen")
    step = train.train_step(lambda model, batch, train: model(batch[0], train=train))
    with pytest.raises(ValueError, match=r"expected a scalar, got shape \(64,\)"):
        step(state, (X, Y))


def test_mixed_precision_computes_in_half_and_gives_back_float32():
    seen = []

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(2)(x)
            seen.append((x.dtype, y.dtype))
            return y

    state = train.TrainState.create(Spy(), optax.sgd(0.1), KEY, X)
    seen.clear()

    def loss(model, batch, train):
        y = model(batch)
        assert y.dtype == jnp.float32
        return (y**2).mean()

    train.train_step(loss, dtype=jnp.bfloat16)(state, X)
    assert seen == [(jnp.bfloat16, jnp.bfloat16)]
