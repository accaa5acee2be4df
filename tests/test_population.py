"""Statistics that are given: populations, mixtures, averages without their start, recalibration."""

import functools
import inspect

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from differences import check_derivatives
from flax import nnx

import normax
import normax.linen
import normax.nnx
from normax.recalibrate import recalibrate, recalibrate_nnx

KEY = jax.random.key(0)
X = 3 + 2 * jax.random.normal(KEY, (32, 4))
STATS = normax.RunningStats.create(4)._replace(mean=jnp.arange(4.0), var=jnp.arange(1.0, 5.0))


def test_a_population_s_statistics_have_no_gradient(x64):
    x, scale = jnp.asarray(X, jnp.float64), jnp.linspace(0.5, 2, 4)
    m = normax.moments(x, 0)
    y = normax.population_norm(x, m, scale)
    xs = np.asarray(x)
    expected = (xs - xs.mean(0)) / np.sqrt(xs.var(0) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    loss = lambda x: (normax.population_norm(x, normax.moments(x, 0), scale) ** 3).sum()
    frozen = np.asarray(scale) / np.sqrt(xs.var(0) + 1e-5)
    np.testing.assert_allclose(jax.grad(loss)(x), 3 * expected**2 * frozen, rtol=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixture_of_running_and_batch_statistics(weight, x64):
    x = jnp.asarray(X, jnp.float64)
    f = lambda x: normax.mixed_batch_norm(x, STATS, running_weight=weight)
    xs = np.asarray(x)
    mean = weight * np.asarray(STATS.mean, np.float64) + (1 - weight) * xs.mean(0)
    var = weight * np.asarray(STATS.var, np.float64) + (1 - weight) * xs.var(0)
    np.testing.assert_allclose(f(x), (xs - mean) / np.sqrt(var + 1e-5), rtol=1e-7)
    check_derivatives(f, (x,))
    traced = jax.jit(lambda w: normax.mixed_batch_norm(x, STATS, running_weight=w))
    np.testing.assert_allclose(traced(weight), f(x), rtol=1e-9)


def test_a_mixture_with_nothing_valid_is_inference():
    mask = jnp.zeros((32, 1), bool)
    y = normax.mixed_batch_norm(X * jnp.nan, STATS, running_weight=0.1, mask=mask)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("start", [0.0, 1.0, 7.0])
def test_the_start_is_taken_out_of_an_average(start):
    batches = 5 + 3 * jax.random.normal(KEY, (20, 64, 4))
    first = normax.RunningStats.create(4)
    first = first._replace(mean=first.mean + start, var=first.var * start)
    stats, weights = first, []
    for batch in batches:
        stats = normax.update(stats, normax.moments(batch, 0), momentum=0.9)
        weights = [0.9 * w for w in weights] + [0.1]
    plain = normax.debias(stats, first, 0.9**20)
    xs = np.asarray(batches, np.float64)
    average = lambda v: np.average(v, axis=0, weights=weights)
    np.testing.assert_allclose(plain.mean, average(xs.mean(1)), rtol=1e-5)
    np.testing.assert_allclose(plain.var, average(xs.var(1)), rtol=1e-4)
    again = normax.debias(first, first, 1.0)
    chex.assert_trees_all_equal(again, first)


def test_a_batch_in_two_halves_moves_the_average_as_far():
    m = normax.moments(X[:16], 0)
    half = normax.momentum_per_entry(0.9, m, reference=32)
    twice = normax.update(normax.update(STATS, m, momentum=half), m, momentum=half)
    once = normax.update(STATS, m, momentum=0.9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), twice[:2], once[:2])


@pytest.mark.usefixtures("x64")
def test_the_momentum_has_the_digits_of_the_moments():
    m = normax.moments(np.ones((3, 4)), 0)
    momentum = normax.momentum_per_entry(0.99, m, reference=7)
    np.testing.assert_allclose(momentum, 0.99 ** (3 / 7), rtol=1e-15)
    assert normax.momentum_per_entry(0.99, normax.moments(np.ones((3, 0)), 0), reference=7) == 1


def default(function, name):
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "rms_norm", "group_norm"])
def test_flax_s_convention_is_flax_s_default(name):
    module = {"batch": "BatchNorm", "layer": "LayerNorm", "rms": "RMSNorm", "group": "GroupNorm"}
    module = getattr(flax.linen, module[name.removesuffix("_norm")])
    for option, value in normax.convention("flax", name).items():
        if option != "unbiased":
            assert default(module, option) == value


def test_torch_s_convention_is_torch_s_default():
    nn = pytest.importorskip("torch").nn
    modules = {
        "batch_norm": nn.BatchNorm1d,
        "layer_norm": nn.LayerNorm,
        "group_norm": nn.GroupNorm,
        "instance_norm": nn.InstanceNorm1d,
    }
    for name, module in modules.items():
        assert default(module, "eps") == normax.convention("torch", name)["epsilon"]
    options = normax.convention("torch", "batch_norm")
    assert 1 - default(nn.BatchNorm1d, "momentum") == options["momentum"]


def test_conventions_are_fresh_dicts_for_functions_and_modules():
    options = normax.convention("torch", "batch_norm")
    options["epsilon"] = 7
    assert normax.convention("torch", "batch_norm")["epsilon"] == 1e-5
    y, _ = normax.batch_norm(
        X, STATS, use_running_average=False, **normax.convention("keras", "batch_norm")
    )
    xs = np.asarray(X, np.float64)
    np.testing.assert_allclose(y, (xs - xs.mean(0)) / np.sqrt(xs.var(0) + 1e-3), atol=1e-5)
    normax.linen.BatchNorm(**normax.convention("torch", "batch_norm"))
    with pytest.raises(
        ValueError, match=r"convention: expected library to be one of .* got 'mxnet'"
    ):
        normax.convention("mxnet", "batch_norm")


class Model(flax.linen.Module):
    norm: type = normax.linen.BatchNorm

    @flax.linen.compact
    def __call__(self, x, train):
        x = flax.linen.Dense(5)(x)
        x = self.norm(momentum=0.9, name="first")(x, use_running_average=not train)
        x = flax.linen.Dense(3)(jax.nn.relu(x))
        return self.norm(momentum=None, name="second")(x, use_running_average=not train)


def batches():
    yield from (X[:7], X[7:20] * 3, X[20:])


def test_recalibration_gives_the_statistics_of_all_the_data():
    model = Model()
    variables = model.init(KEY, X, train=False)
    before = jax.tree.map(np.array, variables)
    apply = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]
    new = recalibrate(apply, variables, batches())
    chex.assert_trees_all_equal(variables, before)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    seen, seen_later = [], []
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    for x in batches():
        h = np.asarray(x, np.float64) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        seen.append(h)
        h = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5), 0)
        seen_later.append(h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
    for name, entries in (("first", seen), ("second", seen_later)):
        entries = np.concatenate(entries)
        stats = new["batch_stats"][name]
        np.testing.assert_allclose(stats["mean"], entries.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats["var"], entries.var(0), rtol=1e-4)
    assert int(new["batch_stats"]["second"]["count"][0]) == 32
    assert "count" not in new["batch_stats"]["first"]


def test_recalibration_reaches_scanned_layers():
    class Stack(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            def layer(module, x, _):
                x = flax.linen.Dense(4)(x)
                return normax.linen.BatchNorm(use_running_average=not train)(x), None

            axes = {"params": 0, "batch_stats": 0}
            scan = flax.linen.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(self, x, None)[0]

    model = Stack()
    variables = model.init(KEY, X, train=False)
    apply = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]
    new = recalibrate(apply, variables, [X[:16], X[16:]])
    once = apply(variables, X)  # momentum 0.99, from 0
    (mean,) = {leaf.shape for leaf in jax.tree.leaves(new["batch_stats"])}
    assert mean == (3, 4)
    (name,) = new["batch_stats"]
    np.testing.assert_allclose(
        new["batch_stats"][name]["mean"][0], once["batch_stats"][name]["mean"][0] / 0.01, rtol=1e-3
    )


def test_nnx_recalibration_agrees_and_leaves_the_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.norm = normax.nnx.BatchNorm(5, momentum=0.9, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.first(x))

    model = Net(nnx.Rngs(0))
    model.eval()
    before = jax.tree.map(np.array, nnx.state(model))
    new = recalibrate_nnx(model, batches())
    chex.assert_trees_all_equal(nnx.state(model), before)
    h = np.concatenate([np.asarray(model.first(x)) for x in batches()])
    np.testing.assert_allclose(new.norm.mean[...], h.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.norm.var[...], h.var(0), rtol=1e-5)
    assert (new.norm.momentum, new.norm.use_running_average) == (0.9, True)
    assert jax.tree.structure(nnx.state(new)) == jax.tree.structure(nnx.state(model))


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_of_nnx_sees_what_training_does(training):
    class Net(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.flax = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.norm = normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.flax(self.norm(self.drop(x)))

    model = Net()
    model.train() if training else model.eval()
    x = np.random.default_rng(0).normal(3, 1, (4000, 3)).astype(np.float32)
    new = recalibrate_nnx(model, [x, x])
    # Half of the entries are zero, the others twice as large: 2 (3**2 + 1) - 3**2.
    np.testing.assert_allclose(new.norm.var[...], 11, rtol=0.05)
    assert new.norm.use_running_average == new.drop.deterministic == (not training)
    chex.assert_trees_all_equal(new.flax.mean[...], model.flax.mean[...])


def test_recalibration_of_nnx_holds_no_second_copy_of_the_parameters():
    model = nnx.Sequential(
        nnx.Linear(4, 4321, rngs=nnx.Rngs(0)), normax.nnx.BatchNorm(4321, rngs=nnx.Rngs(0))
    )
    held = []

    def stream():
        for _ in range(3):
            yield X
            held.append(sum(leaf.shape == (4, 4321) for leaf in jax.live_arrays()))

    recalibrate_nnx(model, stream())
    assert held == [1, 1, 1]


def test_a_model_may_call_something_else_train_and_keep_a_layer_in_inference():
    class Net(nnx.Module):
        def __init__(self):
            self.train = "data"
            self.norm = normax.nnx.BatchNorm(3, freeze_stats=True, rngs=nnx.Rngs(0))
            self.second = normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(self.norm(x))

    x = np.random.default_rng(0).normal(3, 1, (64, 3)).astype(np.float32)
    new = recalibrate_nnx(Net(), [x])
    np.testing.assert_allclose(new.second.mean[...], x.mean(0), rtol=1e-4)


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("size", [0.1, 0.003])
@pytest.mark.parametrize("first", ["weighed", "plain"])
def test_recalibration_counts_weights_as_they_are(library, momentum, size, first):
    x = np.random.default_rng(0).normal(size=(4, 1)).astype(np.float32)
    w = np.full((4, 1), size, np.float32)
    plain = [(x, np.ones((4, 1), bool))] if first == "plain" else []
    rows = [*plain, (x + 5, w), (x - 5, 2 * w), (x, w)]
    if library == "nnx":
        model = normax.nnx.BatchNorm(1, momentum=momentum, rngs=nnx.Rngs(0))
        new = recalibrate_nnx(model, rows, call=lambda model, b: model(b[0], mask=b[1]))
        mean, var, count = new.mean[...], new.var[...], new.count
    else:
        model = normax.linen.BatchNorm(False, momentum=momentum)
        variables = model.init(KEY, x)
        variables = {**variables, "batch_stats": flax.core.freeze(variables["batch_stats"])}
        apply = lambda v, b: model.apply(v, b[0], mask=b[1], mutable=["batch_stats"])[1]
        new = recalibrate(apply, variables, rows)
        assert jax.tree.structure(new) == jax.tree.structure(variables)
        mean, var = new["batch_stats"]["mean"], new["batch_stats"]["var"]
        count = new["batch_stats"].get("count")
    entries, weights = (np.concatenate([row[i] for row in rows])[:, 0] for i in range(2))
    expected = np.average(entries, weights=weights)
    np.testing.assert_allclose(mean[0], expected, rtol=1e-5)
    spread = np.average((entries - expected) ** 2, weights=weights)
    np.testing.assert_allclose(var[0], spread, rtol=1e-5)
    if momentum is None:
        assert count[0] == max(round(float(weights.sum())), 1)


def test_recalibration_refuses_what_it_cannot_do():
    model = Model()
    variables = model.init(KEY, X, train=False)
    apply = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]
    inference = lambda v, x: model.apply(v, x, train=False, mutable=["batch_stats"])[1]
    with_output = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    with pytest.raises(TypeError, match=r"the second part of what .* returns, got tuple"):
        recalibrate(with_output, variables, [X])
    with pytest.raises(ValueError, match="an entry, by a model applied in training, got none"):
        recalibrate(inference, variables, [X])
    with pytest.raises(ValueError, match="recalibrate: expected a batch, got none"):
        recalibrate(apply, variables, [])
    with pytest.raises(ValueError, match="expected variables with running statistics, got none"):
        recalibrate(apply, {"params": variables["params"]}, [X])
    with pytest.raises(ValueError, match="a model with running statistics that move, got none"):
        recalibrate_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), [X])
    renorm = normax.nnx.BatchRenorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="batch_renorm: expected a momentum, got None"):
        recalibrate_nnx(renorm, [X])


def test_recalibration_shows_its_progress(capsys):
    model = normax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    recalibrate_nnx(model, [X, X], progress=True)
    assert "recalibrating" in capsys.readouterr().out


def test_two_sets_of_statistics_share_parameters():
    model = Model()
    variables = model.init(KEY, X, train=False)
    params, clean, adversarial = (
        variables["params"],
        variables["batch_stats"],
        variables["batch_stats"],
    )
    apply = lambda stats, x: model.apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )[1]["batch_stats"]
    for _ in range(3):
        clean, adversarial = apply(clean, X), apply(adversarial, 10 * X)
    ratio = adversarial["first"]["mean"] / clean["first"]["mean"]
    np.testing.assert_allclose(ratio, 10, rtol=1e-3)


@pytest.mark.usefixtures("optax_promotes")
def test_affine_parameters_can_be_frozen_by_label():
    model = Model()
    variables = model.init(KEY, X, train=False)
    params = variables["params"]
    tx = optax.multi_transform(
        {"other": optax.adam(0.1), "scale": optax.set_to_zero(), "bias": optax.set_to_zero()},
        normax.norm_labels,
    )
    loss = lambda p: model.apply({**variables, "params": p}, X, train=False).sum()
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for name in ("first", "second"):
        chex.assert_trees_all_equal(new[name], params[name])
    assert not np.array_equal(new["Dense_0"]["kernel"], params["Dense_0"]["kernel"])


def test_a_mixture_without_the_batch_is_inference_however_large():
    x = jnp.array([[1e25], [-3e25]])
    stats = normax.RunningStats.create(1)
    f = lambda x: normax.mixed_batch_norm(x, stats, running_weight=1.0)
    y = f(x)
    expected, _ = normax.batch_norm(x, stats, use_running_average=True)
    np.testing.assert_array_equal(y, expected)
    assert jnp.isfinite(
        jax.grad(lambda x: normax.mixed_batch_norm(x, stats, running_weight=1.0).sum())(x)
    ).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_recalibration_leaves_what_is_frozen_and_what_is_flax_s(frozen):
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            x = normax.linen.BatchNorm(not train, freeze_stats=frozen, epsilon=0.0, name="first")(x)
            x = flax.linen.BatchNorm(True, epsilon=0.0, name="theirs")(x)
            return normax.linen.BatchNorm(not train, name="last")(x)

    variables = Net().init(KEY, X, train=False)
    variables = jax.tree.map(lambda leaf: leaf + 3, variables)
    apply = lambda variables, x: Net().apply(variables, x, train=True, mutable=["batch_stats"])[1]
    new = recalibrate(apply, flax.core.freeze(variables), [X])["batch_stats"]
    mean = np.asarray(X).mean(0)
    np.testing.assert_allclose(new["first"]["mean"], 3 if frozen else mean, rtol=1e-5)
    np.testing.assert_array_equal(new["theirs"]["mean"], 3)
    assert set(new["last"]) == {"mean", "var"}
    # Scale 4 and bias 3 of a variance of 4, twice.
    seen = 2 * (mean - 3) + 3 if frozen else np.full(4, 3.0)
    np.testing.assert_allclose(new["last"]["mean"], 2 * (seen - 3) + 3, rtol=1e-4, atol=1e-4)

    first = normax.nnx.BatchNorm(4, freeze_stats=frozen, rngs=nnx.Rngs(0))
    first.mean[...] += 3
    model = nnx.Sequential(first, normax.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    new = recalibrate_nnx(model, [X])
    np.testing.assert_allclose(new.layers[0].mean[...], 3 if frozen else mean, rtol=1e-5)
    second = (mean - 3) / np.sqrt(1 + 1e-5) if frozen else np.zeros(4)
    np.testing.assert_allclose(new.layers[1].mean[...], second, atol=1e-4)


def test_frozen_statistics_need_not_be_mutable():
    norm = normax.linen.BatchNorm(False, freeze_stats=True)
    variables = norm.init(KEY, X)
    np.testing.assert_allclose(norm.apply(variables, X), X / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64")])
def test_statistics_of_another_precision_under_strict_promotion(dtypes, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 3)), dtypes[0])
    stats = normax.RunningStats.create(3, dtypes[1])
    power = normax.PowerState.create(3, dtype=dtypes[1])
    for function, state in ((normax.batch_renorm, stats), (normax.power_norm, power)):
        call = functools.partial(function, x, state, use_running_average=False)
        with jax.numpy_dtype_promotion("strict"):
            y, new = call()
        expected, state = call()
        chex.assert_trees_all_equal((y, new), (expected, state))
        assert y.dtype == x.dtype
        assert {leaf.dtype for leaf in new[:2]} == {jnp.dtype(dtypes[1])}


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64")])
def test_inference_by_statistics_of_another_precision_under_strict_promotion(dtypes, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 5, 3)), dtypes[0])
    stats = normax.RunningStats.create(3, dtypes[1])
    logits = jnp.zeros(3, dtypes[1])
    for call in (
        lambda: normax.evonorm_b0(x, stats, use_running_average=True),
        lambda: normax.switchable_norm(x, stats, logits, logits, use_running_average=True),
        lambda: (normax.film(x, x[:, 0], scale_offset=np.dtype(dtypes[1]).type(1)), None),
        lambda: (normax.local_response_norm(x, k=np.dtype(dtypes[1]).type(2)), None),
    ):
        with jax.numpy_dtype_promotion("strict"):
            y, _ = call()
        with jax.numpy_dtype_promotion("standard"):
            expected, _ = call()
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == x.dtype


def test_statistics_without_weight_may_be_no_numbers():
    x = jnp.array([[1.0], [3.0]])
    bad = jnp.array([jnp.nan])
    stats = normax.RunningStats(bad, bad, jnp.array([0]))
    y = normax.mixed_batch_norm(x, stats, running_weight=0.0, epsilon=0.0)
    np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-6)
    # A derivative by the weight is that of the formula at its ends, too: here of (x - w) / 1.
    stats = normax.RunningStats(jnp.array([3.0]), jnp.array([1.0]), jnp.array([1]))

    def first(weight):
        return normax.mixed_batch_norm(x, stats, running_weight=weight, epsilon=0.0)[0, 0]

    for end in (0.0, 1.0):
        np.testing.assert_allclose(jax.grad(first)(end), -1, rtol=1e-6)
