"""Batches in parts: what is averaged, what is merged, and what moves once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax.linen
import normax.nnx
from normax import train

pytestmark = pytest.mark.usefixtures("optax_promotes")
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (48, 6)) * jnp.arange(1.0, 7)[None] + 5
MASK = jax.random.bernoulli(jax.random.key(1), 0.6, (48, 1))
SCHEDULE = optax.linear_schedule(0.5, 0.9, 4)


class Linen(nn.Module):
    """Batch norm of the input, which no other batch changes, and something to learn."""

    options: dict

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = normax.linen.BatchNorm(use_running_average=not train, **self.options)(x, mask=mask)
        return nn.Dense(1)(x)[:, 0]


class NNX(nnx.Module):
    """The same."""

    def __init__(self, options):
        rngs = nnx.Rngs(0)
        self.norm = normax.nnx.BatchNorm(6, rngs=rngs, **options)
        self.last = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.last(self.norm(x, mask=mask))[:, 0]


def linen_loss(model, batch, train):
    return optax.l2_loss(model(batch["x"], train=train, mask=batch.get("mask"))).mean()


def nnx_loss(model, batch, train):
    return optax.l2_loss(model(batch["x"], mask=batch.get("mask"))).mean()


def create(kind, **options):
    tx = optax.sgd(0.01)
    if kind == "linen":
        return train.TrainState.create(Linen(options), tx, KEY, X, train=False), linen_loss
    return train.TrainState.from_nnx(NNX(options), tx), nnx_loss


def statistics(state):
    """Returns what the batch norm remembers, by name."""
    if isinstance(state.model_state, dict):
        return dict(state.batch_stats["BatchNorm_0"])
    norm = state.model.norm
    there = {name: getattr(norm, name) for name in ("mean", "var", "count", "steps")}
    return {name: v[...] for name, v in there.items() if isinstance(v, nnx.Variable)}


KINDS = pytest.mark.parametrize("kind", ["linen", "nnx"])


@KINDS
@pytest.mark.parametrize("count", [2, 24])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": SCHEDULE}, {"unbiased": True, "momentum": 0.6}],
    ids=["plain", "merged", "scheduled", "unbiased"],
)
def test_running_statistics_move_once_by_those_of_the_whole(kind, count, masked, options):
    state, loss = create(kind, **options)
    step = train.train_step(loss, microbatches=count, donate=False)
    batch = {"x": X, **({"mask": MASK} if masked else {})}
    mean, var, seen = np.zeros(6), np.ones(6), 0
    valid = np.asarray(X, np.longdouble)[np.asarray(MASK)[:, 0] if masked else slice(None)]
    n = len(valid)
    for number in range(3):
        state, _ = step(state, batch)
        past = options.get("momentum", 0.99)
        past = float(past(number)) if callable(past) else past
        past = seen / (seen + n) if past is None else past
        seen += n
        bessel = n / (n - 1) if options.get("unbiased") else 1
        mean = past * mean + (1 - past) * valid.mean(0)
        var = past * var + (1 - past) * valid.var(0) * bessel
    found = statistics(state)
    np.testing.assert_allclose(found["mean"], mean.astype(float), rtol=2e-6)
    np.testing.assert_allclose(found["var"], var.astype(float), rtol=2e-6)
    if "momentum" in options and options["momentum"] is None:
        np.testing.assert_array_equal(found["count"], seen)
    if callable(options.get("momentum")):
        assert int(found["steps"]) == 3


@KINDS
def test_the_variance_is_right_at_a_large_mean(kind):
    state, loss = create(kind, momentum=0.0)
    x = X + 1e4
    state, _ = train.train_step(loss, microbatches=6)(state, {"x": x})
    right = np.asarray(x, np.longdouble).var(0)
    np.testing.assert_allclose(statistics(state)["var"], right.astype(float), rtol=2e-4)


def test_without_batch_statistics_it_is_the_step_by_the_whole():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(normax.linen.LayerNorm()(nn.Dense(8)(x)))
            return nn.Dense(1)(x)[:, 0]

    def loss(model, batch, train):
        out = model(batch["x"], train=train)
        return optax.l2_loss(out, batch["y"]).mean(), {"out": out.mean()}

    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    batch = {"x": X, "y": X[:, 0]}
    whole, expected = train.train_step(loss, donate=False)(state, batch)
    parts, metrics = train.train_step(loss, donate=False, microbatches=4)(state, batch)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (parts, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


@KINDS
def test_a_part_that_is_not_finite_makes_the_whole_so(kind):
    state, loss = create(kind)
    step = train.train_step(loss, microbatches=4, donate=False)
    bad = X.at[9, 2].set(jnp.nan)
    clean, moved = (statistics(step(state, {"x": x})[0])["mean"] for x in (X, bad))
    np.testing.assert_array_equal(np.delete(moved, 2), np.delete(clean, 2))
    assert moved[2] == 0


@KINDS
def test_frozen_statistics_stay(kind):
    state, loss = create(kind, freeze_stats=True)
    new, _ = train.train_step(loss, microbatches=4, donate=False)(state, {"x": X})
    np.testing.assert_array_equal(statistics(new)["mean"], np.zeros(6))
    np.testing.assert_array_equal(statistics(new)["var"], np.ones(6))


def test_a_normalizer_in_inference_uses_what_it_remembers():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            normax.linen.BatchNorm(use_running_average=not train, name="moves")(x)
            x = normax.linen.BatchNorm(use_running_average=True, name="rests")(x)
            return nn.Dense(1)(x)[:, 0]

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    stats = {"mean": jnp.full(6, 3.0), "var": jnp.full(6, 7.0)}
    stats = {**state.model_state["batch_stats"], "rests": stats}
    state = state.replace(model_state={"batch_stats": stats})
    whole, expected = train.train_step(loss, donate=False)(state, X)
    parts, metrics = train.train_step(loss, donate=False, microbatches=6)(state, X)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(s.model_state) for s in (parts, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("lift", ["scan", "remat", "vmap"])
def test_lifted_models(lift):
    """Layers that are stacked keep stacked statistics; those computed again move once."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return normax.linen.BatchNorm(use_running_average=False, momentum=0.5)(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            if lift == "scan":
                x, _ = nn.scan(Block, axes, split_rngs={"params": True}, length=3)()(x, None)
            elif lift == "vmap":
                two = jnp.stack([x, 2 * x])
                x, _ = nn.vmap(Block, axes, split_rngs={"params": True}, in_axes=(0, None))()(
                    two, None
                )
                x = x.sum(0)
            else:
                x, _ = nn.remat(Block)()(x, None)
            return nn.Dense(1)(x)[:, 0]

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    new, _ = train.train_step(loss, microbatches=4)(state, X)
    [found] = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(new.batch_stats)
        if jax.tree_util.keystr(path).endswith("['mean']")
    ]
    right = 0.5 * np.asarray(X).mean(0)
    if lift == "scan":
        found = found[0]
    elif lift == "vmap":
        right = np.stack([right, 2 * right])
    np.testing.assert_allclose(found, right, rtol=1e-5)


def test_what_does_not_merge_moves_with_each_part():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = normax.linen.BatchRenorm(use_running_average=not train, momentum=0.5)(x)
            return nn.Dense(1)(x)[:, 0]

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    new, _ = train.train_step(loss, microbatches=2)(state, X)
    means = np.asarray(X[::2]).mean(0), np.asarray(X[1::2]).mean(0)
    found = new.batch_stats["BatchRenorm_0"]["mean"]
    np.testing.assert_allclose(found, 0.25 * means[0] + 0.5 * means[1], rtol=1e-5)


def test_each_part_has_a_key_of_its_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(x)

    def loss(model, batch, train):
        out = model(batch, train=train)
        return out.mean(), {"out": out}

    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    _, metrics = train.train_step(loss, microbatches=2)(state, jnp.ones((48, 6)))
    # Averaged over two masks an entry is 0, 1 or 2; of one mask twice it would not be 1.
    assert set(np.unique(metrics["out"])) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_sharded_batch_stays_where_it_is(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    state, loss = create("linen")
    x = jnp.tile(X, (2, 1))
    step = train.train_step(loss, microbatches=4, donate=False)
    expected, _ = step(state, {"x": x})
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        given = place(state, P()), {"x": place(x, P("data"))}
        text = step.lower(*given).compile().as_text()
        found, _ = step(*given)
    for name, value in statistics(expected).items():
        np.testing.assert_allclose(statistics(found)[name], value, rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert "all-reduce" in text
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text


def test_gradients_of_half_precision_are_added_up_in_float32():
    """Of 1024 parts; in bfloat16 256 and 1 is 256."""
    x = jnp.ones((1024, 1), jnp.bfloat16)
    model = nn.Dense(1, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    state = train.TrainState.create(model, optax.sgd(1.0), KEY, x)
    before = state.params["bias"].astype(jnp.float32)
    step = train.train_step(lambda model, x, train: model(x).mean(), microbatches=1024)
    state, _ = step(state, x)
    np.testing.assert_array_equal(state.params["bias"].astype(jnp.float32), before - 1)


def test_it_compiles_once_and_the_state_is_donated():
    traced = []

    def loss(model, batch, train):
        traced.append(None)
        return linen_loss(model, batch, train)

    state, _ = create("linen")
    step = train.train_step(loss, microbatches=4)
    leaf = jax.tree.leaves(state.params)[0]
    state, _ = step(state, {"x": X})
    first = len(traced)
    for _ in range(3):
        state, _ = step(state, {"x": X})
    assert leaf.is_deleted()
    assert len(traced) == first


def test_a_line_search_is_given_the_loss_of_the_whole():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(x)[:, 0]

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train), batch[:, 0]).mean()
    state = train.TrainState.create(Model(), optax.lbfgs(), KEY, X, train=False)
    step = train.train_step(loss, microbatches=4, donate=False)
    first = step(state, X)[1]["loss"]
    for _ in range(20):
        state, metrics = step(state, X)
    assert metrics["loss"] < 1e-2 * first


@KINDS
def test_a_line_search_sees_the_same_dropout(kind):
    """What it is told of the present parameters is the loss that the step has."""
    from test_train import X as inputs
    from test_train import Y as labels
    from test_train import create as create_with_dropout

    def update(updates, state, params=None, *, value, value_fn, **_):
        seen = jnp.stack([value, value_fn(params)])
        return jax.tree.map(jnp.zeros_like, updates), seen

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
    state, loss = create_with_dropout(kind, tx, rate=0.5)
    state, metrics = train.train_step(loss, microbatches=2)(state, (inputs, labels))
    np.testing.assert_allclose(state.opt_state, [metrics["loss"]] * 2, rtol=1e-6)


@KINDS
def test_a_momentum_that_is_an_array(kind):
    state, loss = create(kind, momentum=jnp.float32(0.5))
    plain, _ = create(kind, momentum=0.5)
    step = train.train_step(loss, microbatches=4)
    (found, _), (expected, _) = step(state, {"x": X}), step(plain, {"x": X})
    for name, value in statistics(expected).items():
        np.testing.assert_allclose(statistics(found)[name], value, rtol=1e-6)


def test_a_momentum_that_the_model_computes_is_refused():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            options = {"momentum": jnp.clip(x.mean(), 0.0, 1.0)} if train else {}
            x = normax.linen.BatchNorm(use_running_average=not train, name="norm", **options)(x)
            return nn.Dense(1)(x)[:, 0]

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    state = train.TrainState.create(Model(), optax.sgd(0.1), KEY, X, train=False)
    train.train_step(loss, donate=False)(state, X)
    with pytest.raises(TypeError, match=r"the momentum of norm to be known"):
        train.train_step(loss, microbatches=2)(state, X)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_parts_that_is_none_is_refused(count):
    with pytest.raises((ValueError, TypeError), match="microbatches"):
        train.train_step(linen_loss, microbatches=count)


def test_a_batch_that_does_not_divide_is_refused():
    state, loss = create("linen")
    message = r"microbatches=5 to divide .*\['x'\], got shape \(48, 6\)"
    with pytest.raises(ValueError, match=message):
        train.train_step(loss, microbatches=5)(state, {"x": X})
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        train.train_step(loss, microbatches=2)(state, {"x": X, "n": jnp.float32(1)})


@KINDS
def test_a_normalizer_in_both_modes_is_refused(kind):
    """In inference it would see what is merged so far."""
    state, loss = create(kind)

    def both(model, batch, train):
        if kind == "nnx":
            x = model.norm(batch["x"], use_running_average=True)
            return loss(model, {"x": x}, train)
        return loss(model, batch, train) + loss(model, batch, False)

    train.train_step(both, donate=False)(state, {"x": X})
    with pytest.raises(ValueError, match="training or in inference, not both"):
        train.train_step(both, microbatches=2)(state, {"x": X})


@KINDS
def test_weights_that_add_up_to_little(kind):
    weights = jax.random.uniform(jax.random.key(2), (48, 1)) * 0.1
    state, loss = create(kind, momentum=0.0)
    new, _ = train.train_step(loss, microbatches=12)(state, {"x": X, "mask": weights})
    w, x = (np.asarray(v, np.longdouble) for v in (weights, X))
    mean = (w * x).sum(0) / w.sum()
    np.testing.assert_allclose(statistics(new)["mean"], mean.astype(float), rtol=1e-5)
    var = (w * (x - mean) ** 2).sum(0) / w.sum()
    np.testing.assert_allclose(statistics(new)["var"], var.astype(float), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.5, None])
def test_an_unbiased_variance_of_instances(momentum):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = normax.linen.RunningInstanceNorm(
                use_running_average=not train, momentum=momentum, unbiased=True
            )
            return nn.Dense(1)(norm(x))

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    x = X.reshape(8, 6, 6)
    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, x, train=False)
    whole, parts = (
        train.train_step(loss, donate=False, microbatches=n)(state, x)[0] for n in (1, 4)
    )
    for a, b in zip(*(jax.tree.leaves(s.batch_stats) for s in (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("boxed", [False, True])
def test_layers_with_a_schedule_that_are_stacked_or_boxed(boxed):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.zeros, (None,))
            options = {"mean_init": init} if boxed else {}
            norm = normax.linen.BatchNorm(momentum=SCHEDULE, **options)
            return norm(x, use_running_average=False), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            block = nn.scan(Block, axes, split_rngs={"params": True}, length=3)
            x, _ = (Block if boxed else block)()(x, None)
            return nn.Dense(1)(x)

    loss = lambda model, batch, train: optax.l2_loss(model(batch, train=train)).mean()
    state = train.TrainState.create(Model(), optax.sgd(0.01), KEY, X, train=False)
    whole, parts = (
        train.train_step(loss, donate=False, microbatches=n)(state, X)[0] for n in (1, 4)
    )
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    first = lambda s: jax.tree.leaves(s.batch_stats)[0].reshape(-1, 6)[0]
    np.testing.assert_allclose(first(whole), first(parts), rtol=1e-4, atol=1e-5)
