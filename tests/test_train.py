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


OPTIMIZERS = {
    "multi_steps": optax.MultiSteps(optax.sgd(0.1), 2),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
    # These ask for the value of the loss, or for the loss itself.
    "lbfgs": optax.lbfgs(),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "polyak": optax.polyak_sgd(),
    # These keep the parameters they started from.
    "prodigy": optax.contrib.prodigy(),
    "dog": optax.contrib.dog(),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
}


@KINDS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(kind, name):
    state, loss = create(kind, OPTIMIZERS[name])
    step = train.train_step(loss)
    before = jax.tree.map(np.array, state.params)
    for _ in range(3):
        state, metrics = step(state, (X, Y))
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state.params)
    assert any(jax.tree.leaves(moved))


def test_an_optimizer_is_given_the_loss_and_not_its_scaled_value():
    given = []

    def update(updates, state, params=None, *, value, value_fn, **_):
        given.append(jax.numpy.stack([value, value_fn(params)]))
        return jax.tree.map(jnp.zeros_like, updates), given[-1]

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
    state, loss = create("linen", tx)
    state, metrics = train.train_step(loss, loss_scale=1024.0)(state, (X, Y))
    np.testing.assert_allclose(state.opt_state, [metrics["loss"]] * 2, rtol=1e-6)


@KINDS
def test_the_caller_s_key_and_model_are_left(kind):
    key = jax.random.key(3)
    if kind == "linen":
        state, loss = (
            train.TrainState.create(Linen(), optax.sgd(0.1), key, X, train=False),
            linen_loss,
        )
    else:
        state, loss = train.TrainState.from_nnx(NNX(nnx.Rngs(0)), optax.sgd(0.1), key), nnx_loss
    train.train_step(loss)(state, (X, Y))
    jax.random.normal(key, ())


def test_states_of_one_model_are_one_kind_of_tree():
    model, tx = Linen(), optax.sgd(0.1)
    a, b = (train.TrainState.create(model, tx, jax.random.key(i), X, train=False) for i in (0, 1))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
    _, metrics = jax.vmap(train.train_step(linen_loss, donate=False), (0, None))(both, (X, Y))
    assert metrics["loss"].shape == (2,)
    a, b = (train.TrainState.from_nnx(NNX(nnx.Rngs(i)), tx) for i in (0, 1))
    jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)
    assert jax.tree.structure(a) != jax.tree.structure(both)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_is_sown_is_no_state():
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            self.sow(nnx.Intermediate, "hidden", x)
            return self.linear(x)[:, 0]

    state = train.TrainState.from_nnx(Sows(nnx.Rngs(0)), optax.sgd(0.1))
    step = train.train_step(nnx_loss)
    for _ in range(3):
        state, metrics = step(state, (X, Y))
    assert np.isfinite(metrics["loss"])

    class SowsInState(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.sow("losses", "hidden", x.sum())
            return nn.Dense(1)(x)[:, 0]

    state = train.TrainState.create(SowsInState(), optax.sgd(0.1), KEY, X, train=False)
    with pytest.raises(ValueError, match="collection 'losses' to keep its structure"):
        train.train_step(linen_loss)(state, (X, Y))


@pytest.mark.parametrize("metrics", [3.0, {"loss": 1.0}])
def test_metrics_that_are_none_are_refused(metrics):
    state, loss = create("linen")
    step = train.train_step(lambda model, batch, train: (loss(model, batch, train), metrics))
    with pytest.raises(ValueError, match="expected a dict of metrics without 'loss'"):
        step(state, (X, Y))


def test_a_state_of_the_other_library_says_so():
    linen, _ = create("linen")
    other, _ = create("nnx")
    with pytest.raises(AttributeError, match=r"made by TrainState\.from_nnx"):
        _ = linen.model
    for name in ("variables", "batch_stats"):
        with pytest.raises(AttributeError, match=r"made by TrainState\.create"):
            getattr(other, name)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = normax.linen.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(1)(x)


def small(loss, **options):
    x = jax.random.normal(jax.random.key(0), (8, 4))
    state = train.TrainState.create(Small(), optax.sgd(0.1), jax.random.key(1), x, train=False)
    return train.train_step(loss, **options)(state, x)


def test_a_loss_may_ask_for_intermediates():
    def loss(model, batch, train):
        y, kept = model(batch, train=train, mutable=["intermediates"])
        (hidden,) = kept["intermediates"]["hidden"]
        return (y**2).mean() + 0.1 * (hidden**2).mean()

    state, metrics = small(loss)
    assert np.isfinite(metrics["loss"])
    assert np.asarray(state.batch_stats["BatchNorm_0"]["mean"]).any()


@pytest.mark.parametrize("transform", [jax.checkpoint, lambda f: lambda x: jax.vmap(f)(x[None])[0]])
def test_a_model_inside_a_transformation_of_jax_is_refused(transform):
    def loss(model, batch, train):
        return (transform(lambda x: model(x, train=train))(batch) ** 2).mean()

    with pytest.raises(ValueError, match=r"outside jax.checkpoint, .* use Flax's own nn.remat"):
        small(loss)


def test_a_model_without_moving_state_may_be_called_inside_a_transformation():
    def penalty(model, batch, train):
        slope = jax.grad(lambda x: jax.checkpoint(lambda x: model(x, train=False))(x).sum())(batch)
        return ((jnp.linalg.norm(slope, axis=-1) - 1) ** 2).mean()

    state, metrics = small(penalty)
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(np.asarray(state.params["Dense_0"]["kernel"])).all()


def test_the_model_given_back_outlives_the_next_step():
    model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    state = train.TrainState.from_nnx(model, optax.sgd(0.1))
    step = train.train_step(lambda model, batch, train: (model(batch) ** 2).mean())
    x = jax.random.normal(jax.random.key(0), (8, 4))
    kept = state.model
    state, _ = step(state, x)
    assert np.isfinite(kept(x)).all()


@pytest.mark.usefixtures("optax_promotes")
def test_every_optimizer_compiles_once():
    traced = []

    def loss(model, batch, train):
        traced.append(None)
        return (model(batch, train=train) ** 2).mean()

    x = jax.random.normal(jax.random.key(0), (8, 4))
    for tx in (optax.adam(0.1), optax.contrib.reduce_on_plateau()):
        state = train.TrainState.create(Small(), tx, jax.random.key(1), x, train=False)
        normax.validate(state, state)
        step = train.train_step(loss)
        state, _ = step(state, x)
        before = len(traced)
        step(state, x)
        assert len(traced) == before
