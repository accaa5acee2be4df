"""What is measured in a model, against models written out by hand, NumPy and simulation."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import integrate, stats

import normax
import normax.linen
import normax.nnx
from normax import diagnostics, theory, train
from normax.population_training import population_step

KEY = jax.random.key(0)


class Linen(nn.Module):
    lift: object = staticmethod(lambda module: module)

    @nn.compact
    def __call__(self, x, train):
        x = self.lift(nn.Dense)(6, name="first")(x)
        norm = self.lift(normax.linen.BatchNorm)(use_running_average=not train, name="norm")
        x = nn.softplus(norm(x))
        return nn.Dense(1, name="last")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = normax.nnx.BatchNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x, train):
        return self.last(nn.softplus(self.norm(self.first(x))))


def loss(model, batch, train):
    x, y = batch
    return jnp.mean((model(x, train=train)[:, 0] - y) ** 2)


def states(tx=None):
    """Returns one model in linen and in nnx, with the same numbers."""
    tx = optax.sgd(0.1) if tx is None else tx
    x = jnp.ones((2, 4))
    linen = train.TrainState.create(Linen(), tx, KEY, x, train=False)
    model = NNX(nnx.Rngs(0))
    for name in ("first", "last"):
        getattr(model, name).kernel[...] = linen.params[name]["kernel"]
    return {"linen": linen, "nnx": train.TrainState.from_nnx(model, tx)}


def data(number, seed=1):
    x = 2 * jax.random.normal(jax.random.key(seed), (number, 4)) + 1
    return x, jnp.sin(x.sum(1))


def by_hand(params, x, mean=None, var=None):
    """Returns what the layers give, in NumPy where the arrays are NumPy's."""
    h = x @ params["first"]["kernel"] + params["first"]["bias"]
    mean = h.mean(0, keepdims=True) if mean is None else mean
    var = ((h - mean) ** 2).mean(0, keepdims=True) if var is None else var
    n = (h - mean) / (var + 1e-5) ** 0.5 * params["norm"]["scale"][None]
    n = n + params["norm"]["bias"][None]
    softplus = jax.nn.softplus(n) if isinstance(n, jax.Array) else np.logaddexp(n, 0)
    return h, n, softplus, softplus @ params["last"]["kernel"] + params["last"]["bias"]


def to_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_statistics_of_each_layer(framework):
    state, batch = states()[framework], data(64)
    found = jax.jit(functools.partial(diagnostics.layer_statistics, loss))(state, batch)
    assert set(found) == {"first", "norm", "last"}
    params = to_float64(states()["linen"].params)
    x = np.asarray(batch[0], np.float64)
    h, n, a, y = by_hand(params, x)
    expected = {"first": (x, h), "norm": (h, n), "last": (a, y)}
    for path, arrays in expected.items():
        for measured, array in zip(found[path], arrays, strict=True):
            np.testing.assert_array_equal(measured.count, 64)
            np.testing.assert_allclose(measured.mean, array.mean(0), rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(measured.var, array.var(0), rtol=1e-4, atol=1e-6)


def test_layers_come_in_the_order_of_their_calls():
    for state in states().values():
        assert list(diagnostics.layer_statistics(loss, state, data(8))) == ["first", "norm", "last"]


def test_looking_changes_nothing():
    framework = "nnx"  # in linen nothing can change
    state, batch = states()[framework], data(64)
    before = jax.tree.map(np.asarray, (state.params, state.model_state))
    diagnostics.layer_statistics(loss, state, batch)
    diagnostics.gradient_norms(loss, state, batch)
    after = jax.tree.map(np.asarray, (state.params, state.model_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    step = train.train_step(loss, donate=False)
    plain, _ = step(states()[framework], batch)
    jax.tree.map(np.testing.assert_array_equal, plain.params, step(state, batch)[0].params)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_within_lifted_transformations_of_linen(lift):
    batch = data(64)
    plain = states()["linen"]
    state = train.TrainState.create(Linen(lift=lift), optax.sgd(0.1), KEY, batch[0], train=False)
    state = state.replace(params=plain.params)
    for measure in (diagnostics.layer_statistics, diagnostics.gradient_norms):
        measure = jax.jit(functools.partial(measure, loss))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
            measure(state, batch),
            measure(plain, batch),
        )


def test_within_a_transformation_of_nnx():
    class Rematted(NNX):
        def __call__(self, x, train):
            return nnx.remat(NNX.__call__, static_argnums=(2,))(self, x, train)

    batch = data(64)
    model, plain = Rematted(nnx.Rngs(0)), NNX(nnx.Rngs(0))
    results = [
        (
            diagnostics.layer_statistics(loss, state, batch),
            diagnostics.gradient_norms(loss, state, batch),
        )
        for state in (train.TrainState.from_nnx(m, optax.sgd(0.1)) for m in (model, plain))
    ]
    assert set(results[0][0]) == {"first", "norm", "last"}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *results)


def test_a_layer_called_twice_and_one_of_integers():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, ids, train):
            x = nn.Embed(5, 3, name="embed")(ids)
            layer = nn.Dense(3, name="dense")
            return layer(layer(x)), x

    def sums(model, ids, train):
        y, x = model(ids, train=train)
        return jnp.sum(y**2) + 0.0 * jnp.sum(x)

    ids = jnp.arange(5)
    state = train.TrainState.create(Twice(), optax.sgd(0.1), KEY, ids, train=False)
    found = diagnostics.layer_statistics(sums, state, ids)
    assert list(found) == ["dense"]
    kernel = np.asarray(state.params["dense"]["kernel"], np.float64)
    x = np.asarray(state.params["embed"]["embedding"], np.float64)
    both = np.concatenate([x @ kernel, x @ kernel @ kernel])
    np.testing.assert_array_equal(found["dense"].output.count, 10)
    np.testing.assert_allclose(found["dense"].output.var, both.var(0), rtol=1e-5)
    norms = diagnostics.gradient_norms(sums, state, ids)
    y = x @ kernel @ kernel
    lengths = np.linalg.norm(2 * y) + np.linalg.norm(2 * y @ kernel.T)
    np.testing.assert_allclose(norms["dense"].output, lengths, rtol=1e-5)
    assert set(norms) == {"embed", "dense"}


def test_gradient_norms_are_those_of_the_model_written_out():
    batch = data(64)
    found = {name: diagnostics.gradient_norms(loss, s, batch) for name, s in states().items()}
    params = states()["linen"].params

    def of_shifts(params, shifts):
        h = batch[0] @ params["first"]["kernel"] + params["first"]["bias"][None] + shifts["first"]
        n = normax.normalize_batch(h, params["norm"]["scale"], params["norm"]["bias"])[0]
        a = nn.softplus(n + shifts["norm"])
        y = a @ params["last"]["kernel"] + params["last"]["bias"][None] + shifts["last"]
        return jnp.mean((y[:, 0] - batch[1]) ** 2)

    shifts = {"first": jnp.zeros((64, 6)), "norm": jnp.zeros((64, 6)), "last": jnp.zeros((64, 1))}
    of_params, of_outputs = jax.jit(jax.grad(of_shifts, (0, 1)))(params, shifts)
    for norms in found.values():
        assert set(norms) == set(params)
        for path, norm in norms.items():
            weights = np.linalg.norm(
                np.concatenate([np.ravel(g) for g in of_params[path].values()])
            )
            # What batch norm gets of a shift of its input is rounding.
            np.testing.assert_allclose(norm.weights, weights, rtol=1e-4)
            np.testing.assert_allclose(norm.output, np.linalg.norm(of_outputs[path]), rtol=1e-4)


def test_another_model_in_the_loss_is_none_of_this_one_s():
    state, batch = states()["linen"], data(16)
    variables = {"params": jax.tree.map(lambda leaf: leaf + 1, state.params), **state.model_state}

    def distilled(model, batch, train):
        teacher = Linen().apply(variables, batch[0], train=False)
        return jnp.mean((model(batch[0], train=train) - teacher) ** 2)

    target = Linen().apply(variables, batch[0], train=False)
    plain = lambda model, batch, train: jnp.mean((model(batch[0], train=train) - target) ** 2)
    for measure in (diagnostics.gradient_norms, diagnostics.layer_statistics):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, measure(distilled, state, batch), measure(plain, state, batch))


def test_layers_of_many_kinds():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            def token():
                return self.param("token", nn.initializers.ones, (4,))

            class Pair(nn.Module):
                @nn.compact
                def __call__(self, *, value):
                    return value * self.param("factor", nn.initializers.ones, (4,))[None], 1.0

            return Pair(name="pair")(value=x + token()[None])[0]

    x = data(8)[0]
    weigh = lambda model, x, train: jnp.sum(model(x)) + 0.5 * jnp.sum(model.params["token"] ** 2)
    state = train.TrainState.create(Odd(), optax.sgd(0.1), KEY, x)
    norms = diagnostics.gradient_norms(weigh, state, x)
    assert set(norms) == {"", "pair"}
    np.testing.assert_allclose(norms[""].weights, np.linalg.norm([8 + 1.0] * 4), rtol=1e-6)
    np.testing.assert_allclose(norms["pair"].weights, np.linalg.norm((x + 1).sum(0)), rtol=1e-5)
    assert norms["pair"].output == 0
    assert set(diagnostics.layer_statistics(weigh, state, x)) == {""}
    outside = lambda model, x, train: jnp.sum(jax.checkpoint(lambda x: model(x))(x))
    with pytest.raises(ValueError, match="outside transformations of JAX"):
        diagnostics.layer_statistics(outside, state, x)
    assert set(diagnostics.gradient_norms(outside, state, x)) == {"", "pair"}


@pytest.mark.parametrize("wrapper", ["WeightNorm", "SpectralNorm", "WeightStandardization"])
def test_normalized_weights_of_nnx(wrapper):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = getattr(normax.nnx, wrapper)(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)

        def __call__(self, x, train):
            return self.layer(x)

    state = train.TrainState.from_nnx(Model(nnx.Rngs(0)), optax.sgd(0.1))
    found = diagnostics.layer_statistics(loss, state, data(8))
    assert "layer/layer_instance" in found
    norms = diagnostics.gradient_norms(loss, state, data(8))
    assert norms["layer/layer_instance"].weights > 0


def test_watching_makes_one_class_for_all():
    measure = lambda: diagnostics.gradient_norms(loss, states()["nnx"], data(8))
    measure()
    before = len(nnx.Linear.__subclasses__())
    measure()
    assert len(nnx.Linear.__subclasses__()) == before


def test_a_recurrent_network_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs))

        def __call__(self, x, train):
            return self.rnn(x[None])[0]

    state = train.TrainState.from_nnx(Model(nnx.Rngs(0)), optax.sgd(0.1))
    norms = diagnostics.gradient_norms(loss, state, data(6))
    assert any(layer.weights > 0 for layer in norms.values())


def test_gradients_far_from_one_keep_their_length():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.Dense(3, kernel_init=nn.initializers.constant(1e-9), use_bias=False)(x)
            return x

    x = jnp.ones((2, 3))
    state = train.TrainState.create(Deep(), optax.sgd(0.1), KEY, x)
    found = diagnostics.gradient_norms(lambda model, x, train: jnp.sum(model(x)), state, x)
    np.testing.assert_allclose(found["Dense_0"].output, math.sqrt(6) * 27e-27, rtol=1e-5)


def test_the_shift_of_activations():
    layer = lambda mean, var: diagnostics.LayerStatistics(
        *2 * [normax.Moments(jnp.array(9), jnp.array(mean), jnp.array(var))]
    )
    before, after = layer([1.0, 0.0, 5.0], [4.0, 1.0, 0.0]), layer([2.0, 3.0, 7.0], [1.0, 9.0, 1.0])
    found = diagnostics.activation_shift({"a": before, "b": before}, {"a": after})
    assert list(found) == ["a"]
    np.testing.assert_allclose(found["a"].mean, math.sqrt((0.5**2 + 3**2) / 2), rtol=1e-6)
    logs = [math.log(1 / 2), math.log(3)]  # the feature that did not vary counts for nothing
    np.testing.assert_allclose(found["a"].deviation, np.sqrt(np.mean(np.square(logs))), rtol=1e-6)

    def divergence(new, old):
        integrand = lambda t: new.pdf(t) * (new.logpdf(t) - old.logpdf(t))
        return integrate.quad(integrand, new.mean() - 30, new.mean() + 30)[0]

    expected = divergence(stats.norm(2, 1), stats.norm(1, 2))
    expected += divergence(stats.norm(3, 3), stats.norm(0, 1))
    np.testing.assert_allclose(found["a"].divergence, expected / 2, rtol=1e-5)
    same = diagnostics.activation_shift({"a": before}, {"a": before}, of="output")["a"]
    assert [float(part) for part in same] == [0, 0, 0]
    with pytest.raises(ValueError, match="activation_shift: expected of to be one of"):
        diagnostics.activation_shift({}, {}, of="middle")


@pytest.mark.usefixtures("x64")
def test_the_spectrum_of_a_hessian():
    x = jax.random.normal(KEY, (40, 6), jnp.float64) * jnp.arange(1.0, 7.0)[None]
    y = jnp.sign(x[:, 0])

    def logistic(params):
        return jnp.mean(jax.nn.softplus(-y * (x @ params["w"] + params["b"])))

    params = {"w": jnp.linspace(-0.1, 0.1, 6), "b": jnp.ones(())}
    flat, back = jax.flatten_util.ravel_pytree(params)
    exact = np.linalg.eigvalsh(jax.hessian(lambda flat: logistic(back(flat)))(flat))
    spectrum = jax.jit(
        functools.partial(diagnostics.hessian_spectrum, logistic, key=KEY), static_argnames="steps"
    )
    whole = spectrum(params, steps=50)  # of which there are seven
    np.testing.assert_allclose(whole.values, exact, rtol=1e-9)
    np.testing.assert_allclose(whole.condition_number, exact[-1] / exact[0], rtol=1e-9)
    np.testing.assert_allclose(whole.stable_rate, 2 / exact[-1], rtol=1e-9)
    assert float(whole.weights.sum()) == pytest.approx(1)
    part = spectrum(params, steps=5)
    for value, error in zip(part.values, part.errors, strict=True):
        assert np.abs(exact - value).min() <= error + 1e-12
    np.testing.assert_allclose(part.values[-1], exact[-1], rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_the_spectrum_of_eigenvalues_that_repeat():
    bowl = lambda x: jnp.sum(jnp.array([1.0, 1.0, 1.0, 5.0, 5.0, -2.0]) * x**2) / 2
    found = diagnostics.hessian_spectrum(bowl, jnp.ones(6), key=KEY, steps=6)
    np.testing.assert_allclose(found.values, [-2, 1, 1, 1, 5, 5], rtol=1e-10)
    assert float(found.condition_number) == pytest.approx(5)


@pytest.mark.usefixtures("x64")
def test_the_spectrum_of_many_decades():
    # Without care vectors come again once the largest values are found.
    values = jnp.logspace(0, 4, 40)
    valley = lambda x: jnp.sum(values * x**2) / 2
    found = diagnostics.hessian_spectrum(valley, jnp.ones(40), key=KEY, steps=40)
    np.testing.assert_allclose(found.values, values, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_losses_of_any_size_have_a_spectrum_and_a_smoothness(size):
    bowl = lambda p: 0.5 * size * jnp.sum(jnp.arange(1.0, 5) * p**2)
    found = diagnostics.hessian_spectrum(bowl, jnp.ones(4), key=jax.random.key(0), steps=4)
    np.testing.assert_allclose(found.values / size, [1, 2, 3, 4], rtol=1e-4)
    smooth = diagnostics.gradient_smoothness(bowl, jnp.full(4, 1e-3), jnp.array([0.1 / size]))
    slopes = np.arange(1.0, 5)
    expected = np.linalg.norm(slopes**2) / np.linalg.norm(slopes)
    np.testing.assert_allclose(smooth.smoothness / size, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="hessian_spectrum: expected a parameter, got none"):
        diagnostics.hessian_spectrum(lambda p: 0.0, {}, key=jax.random.key(0))


def test_the_length_of_complex_gradients():
    z = jnp.array([1 + 1j, 2 - 1j], jnp.complex64)
    quartic = lambda w: jnp.sum(jnp.abs(w) ** 4)
    found = diagnostics.gradient_smoothness(quartic, z, jnp.array([1e-2]))
    slope = lambda w: 4 * np.abs(w) ** 2 * np.conj(w)  # JAX's gradient is the conjugate
    before = np.asarray(z, np.complex128)
    change = slope(before - 1e-2 * slope(before)) - slope(before)
    expected = np.linalg.norm(change) / np.linalg.norm(slope(before))
    assert found.gradient_change.dtype == jnp.float32
    np.testing.assert_allclose(found.gradient_change[0], expected, rtol=1e-4)


def test_the_largest_learning_rate_and_smoothness():
    curvature = jnp.array([1.0, 4.0])
    bowl = lambda x: jnp.sum(curvature * x**2) / 2
    at = jnp.array([2.0, 1.0])
    slope = np.array([2.0, 4.0])
    expected = 2 * (slope @ slope) / (slope @ (np.asarray(curvature) * slope))
    for start in (1e-6, 1.0, 1e6):
        rate = diagnostics.largest_learning_rate(bowl, at, start=start, digits=12)
        np.testing.assert_allclose(rate, expected, rtol=1e-3)
    assert diagnostics.largest_learning_rate(bowl, at, digits=1) <= expected
    line = diagnostics.largest_learning_rate(jnp.sum, at)
    assert line == 2.0**40
    pit = lambda x: jnp.sum(x) + jnp.where(jnp.all(x == 0), 0.0, 10.0)
    assert diagnostics.largest_learning_rate(pit, jnp.zeros(2)) == 0
    found = diagnostics.gradient_smoothness(bowl, at, jnp.array([0.1, 0.5]))
    change = np.asarray(curvature) * slope
    ratio = np.linalg.norm(change) / np.linalg.norm(slope)
    np.testing.assert_allclose(found.smoothness, [ratio, ratio], rtol=1e-5)
    np.testing.assert_allclose(found.gradient_change, [0.1 * ratio, 0.5 * ratio], rtol=1e-5)
    np.testing.assert_allclose(
        found.loss[0], bowl(at - 0.1 * jnp.asarray(slope, jnp.float32)), rtol=1e-6
    )


def at_the_truth(number):
    """Returns the two states with labels that the models themselves make, but for the noise."""
    x, _ = data(number)
    found = {}
    for name, state in states().items():
        params = dict(states()["linen"].params)
        y = by_hand(jax.tree.map(np.asarray, params), np.asarray(x))[3]
        h = np.asarray(x @ params["first"]["kernel"], np.float64)
        moved = {"mean": h.mean(0), "var": h.var(0)}
        found[name] = (with_stats(state, moved), (x, jnp.asarray(y[:, 0])))
    return found


def with_stats(state, values):
    """Returns a state with other running statistics."""

    def leaf(path, value):
        name = next((name for name in values if f"'{name}'" in jax.tree_util.keystr(path)), None)
        return value if name is None else jnp.asarray(values[name], value.dtype)

    return state.replace(model_state=jax.tree.map_with_path(leaf, state.model_state))


def test_zeta_in_a_model_is_the_gap_that_batches_make():
    size, number = 64, 200_000
    found = at_the_truth(5_000)
    coefficients = {
        name: jax.jit(
            lambda state, batch, key: diagnostics.decay_coefficients(
                loss, state, batch, batch_size=size, key=key, probes=32
            )
        )(state, batch, KEY)
        for name, (state, batch) in found.items()
    }
    for ours in coefficients.values():
        assert set(ours) == {"norm"}
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
            ours,
            coefficients["linen"],
        )
    state, (x, _) = found["linen"]
    params = state.params
    scale = params["norm"]["scale"]
    predicted = float(jnp.sum(coefficients["linen"]["norm"].zeta * scale**2))

    # Every feature has the noise of the same batch; those of one feature by itself add up where
    # features are independent, and here they are not: one feature at a time is given a batch's.
    stats = {name: np.asarray(v, np.float32) for name, v in state.batch_stats["norm"].items()}
    rows = jax.random.randint(jax.random.key(3), (number // size, size), 0, len(x))

    @jax.jit
    def gaps(rows):
        with jax.numpy_rank_promotion("allow"):
            h, n, _, y = by_hand(params, x[rows], stats["mean"][None], stats["var"][None])
        noisy = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
        return jnp.stack([
            jnp.mean((nn.softplus(n.at[:, i].set(noisy[:, i])) @ params["last"]["kernel"]
                      + params["last"]["bias"][None] - y) ** 2)
            for i in range(6)
        ])  # fmt: skip

    gap = np.asarray(jax.lax.map(gaps, rows), np.float64)
    error = np.sqrt((gap.var(0) / len(gap)).sum())
    assert error < 0.02 * predicted
    assert gap.mean(0).sum() == pytest.approx(predicted, abs=4 * error, rel=5 / size)


def test_positions_of_an_image_move_together():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return normax.linen.BatchNorm(use_running_average=not train, name="norm")(x).sum((1, 2))

    def half(model, x, train):
        return 0.5 * jnp.mean(jnp.sum(model(x, train=train) ** 2, 1))

    # All positions of an image are one number: the noise is that of one entry an image.
    x = jnp.broadcast_to(jax.random.normal(KEY, (20_000, 1, 1, 2)), (20_000, 2, 3, 2))
    state = train.TrainState.create(Model(), optax.sgd(0.1), KEY, x[:2], train=False)
    found = diagnostics.decay_coefficients(half, state, x, batch_size=32, key=KEY, probes=1)
    np.testing.assert_allclose(found["norm"].zeta, 36 * 3 / (4 * 32), rtol=0.03)
    published = diagnostics.decay_coefficients(
        half, state, x, batch_size=32, key=KEY, probes=1, form="published"
    )
    each = found["norm"]
    third = each.skewness * each.slant / (2 * 32)
    np.testing.assert_allclose(each.zeta - published["norm"].zeta, third, rtol=1e-2, atol=1e-7)


def test_norms_without_a_bias_and_with_a_variance_only():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            plain = {"use_running_average": not train, "use_bias": False}
            x = normax.linen.BatchNorm(**plain, name="both")(x)
            return normax.linen.VarianceOnlyBatchNorm(**plain, name="variance")(x)

    def half(model, x, train):
        return 0.5 * jnp.mean(jnp.sum(model(x, train=train) ** 2, 1))

    x = jax.random.normal(KEY, (20_000, 2))
    state = train.TrainState.create(Model(), optax.sgd(0.1), KEY, x[:2], train=False)
    found = diagnostics.decay_coefficients(half, state, x, batch_size=32, key=KEY)
    np.testing.assert_allclose(found["both"].zeta, 3 / (4 * 32), rtol=0.03)
    np.testing.assert_allclose(found["variance"].zeta, 1 / (4 * 32), rtol=0.03)


def test_zeta_of_a_skewed_input_and_of_a_masked_one():
    logistic = lambda h, mean: jax.nn.softplus(h) - mean * h
    x = jax.random.exponential(KEY, (50_000, 1)) - 1

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, train, mask=None):
            return normax.linen.BatchNorm(use_running_average=not train, name="norm")(x, mask=mask)

    state = train.TrainState.create(Head(), optax.sgd(0.1), KEY, x, train=False)
    state = with_stats(state, {"mean": np.asarray(x.mean(0)), "var": np.asarray(x.var(0))})
    of = lambda model, x, train: jnp.mean(
        logistic(model(x, train=train), jax.nn.sigmoid(2 * x + 0.5))
    )
    (found,) = diagnostics.decay_coefficients(
        of, state, x, batch_size=64, key=KEY, probes=1
    ).values()
    standard = (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True)
    _, curvature = theory.loss_derivatives(logistic, standard, jax.nn.sigmoid(2 * x + 0.5))
    expected = theory.decay_coefficient(curvature, standard, 64)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3), found, expected)
    assert abs(found.slant * found.skewness / 128) > 0.1 * found.zeta  # which is held by this alone

    mask = jnp.arange(60_000)[:, None] < 50_000
    padded = jnp.concatenate([x, jnp.full((10_000, 1), 1e3)])
    masked = lambda model, x, train: jnp.mean(model(x, train=train, mask=mask) ** 2)
    (found,) = diagnostics.decay_coefficients(
        masked, state, padded, batch_size=64, key=KEY, probes=1
    ).values()
    np.testing.assert_allclose(found.skewness, expected.skewness, rtol=1e-4)


@pytest.mark.parametrize(("library", "activation"), [("linen", nn.softplus), ("nnx", nn.relu)])
def test_an_activation_in_the_norm_is_as_one_behind(library, activation):
    class OfLinen(nn.Module):
        within: bool

        @nn.compact
        def __call__(self, x, train):
            inside = {"activation": activation} if self.within else {}
            x = nn.Dense(6, name="first")(x)
            x = normax.linen.BatchNorm(use_running_average=not train, **inside, name="norm")(x)
            return nn.Dense(1, name="last")(x if self.within else activation(x))

    class OfNNX(NNX):
        def __init__(self, within):
            super().__init__(nnx.Rngs(0))
            self.within = within
            if within:
                self.norm = normax.nnx.BatchNorm(6, activation=activation, rngs=nnx.Rngs(0))

        def __call__(self, x, train):
            x = self.norm(self.first(x))
            return self.last(x if self.within else activation(x))

    def state(within):
        if library == "nnx":
            return train.TrainState.from_nnx(OfNNX(within), optax.sgd(0.1))
        x = jnp.ones((2, 4))
        return train.TrainState.create(OfLinen(within), optax.sgd(0.1), KEY, x, train=False)

    batch = data(64)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    zeta = lambda state: diagnostics.decay_coefficients(
        loss, state, batch, batch_size=8, key=KEY, probes=1
    )
    ours, expected = (zeta(state(within))["norm"] for within in (True, False))
    jax.tree.map(close, ours, expected)
    assert jnp.abs(ours.zeta).max() > 0
    for gradient in ("none", "batch"):
        step = population_step(loss, gradient=gradient, donate=False)
        ours, expected = (step(state(within), batch, batch)[0] for within in (True, False))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating):
                close(a, b)
    found = diagnostics.layer_statistics(loss, state(True), batch)["norm"].output
    expected = diagnostics.layer_statistics(loss, state(False), batch)["last"].input
    jax.tree.map(close, found, expected)


def test_frozen_norms_have_no_noise():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            plain = {"use_running_average": not train}
            x = normax.linen.BatchNorm(**plain, freeze_stats=True, name="frozen")(x)
            return normax.linen.BatchNorm(**plain, name="norm")(x)

    x = data(64)[0]
    square = lambda model, x, train: jnp.mean(jnp.sum(model(x, train=train) ** 2, 1) * x[:, 0])
    state = train.TrainState.create(Model(), optax.sgd(0.1), KEY, x, train=False)
    found = diagnostics.decay_coefficients(square, state, x, batch_size=8, key=KEY, probes=1)
    assert set(found) == {"norm"}
    ours, _ = population_step(square, gradient="batch", donate=False)(state, x, x)
    expected, _ = train.train_step(square, donate=False)(state, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, ours.params, expected.params)
    np.testing.assert_array_equal(ours.batch_stats["frozen"]["mean"], 0)


@pytest.mark.parametrize("zeta", [0.25, np.float32(0.25), jnp.array(0.25), "tree"])
def test_gamma_decay_is_the_gradient_of_its_penalty(zeta):
    params = {"norm": {"scale": jnp.array([1.0, -2.0]), "bias": jnp.ones(2)}, "kernel": jnp.ones(3)}
    if isinstance(zeta, str):
        zeta = {"norm": {"scale": jnp.array([0.5, 2.0]), "bias": 9.0}, "kernel": 9.0}
    at_scale = zeta["norm"]["scale"] if isinstance(zeta, dict) else zeta
    slope = jax.grad(lambda p: jnp.sum(at_scale * p["norm"]["scale"] ** 2) + p["kernel"].sum())(
        params
    )
    tx = theory.gamma_decay(zeta)
    plain = jax.tree.map(jnp.zeros_like, params) | {"kernel": jnp.ones(3)}
    updates, state = tx.update(plain, tx.init(params), params)
    jax.tree.map(np.testing.assert_allclose, updates, slope)
    assert int(state.steps) == 1


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.usefixtures("optax_promotes")
def test_gamma_decay_is_measured_on_a_schedule(framework):
    tx = optax.chain(
        theory.gamma_decay(diagnostics.measured_decay(loss, batch_size=32, probes=2), every=3),
        optax.sgd(0.1),
    )
    state, step = states(tx)[framework], train.train_step(loss, donate=False)
    kept = []
    for number in range(4):
        before, (state, _) = state, step(state, data(32, number))
        leaves = jax.tree.leaves_with_path(state.opt_state[0].zeta)
        (zeta,) = [leaf for path, leaf in leaves if "scale" in jax.tree_util.keystr(path)]
        assert all(
            not leaf.any() for path, leaf in leaves if "scale" not in jax.tree_util.keystr(path)
        )
        kept.append(np.asarray(zeta))
        if number == 3:
            grads = jax.grad(diagnostics.objective(loss, before, data(32, number)))(before.params)
            old, new, slope = (
                next(
                    v
                    for p, v in jax.tree.leaves_with_path(tree)
                    if "scale" in jax.tree_util.keystr(p)
                )
                for tree in (before.params, state.params, grads)
            )
            np.testing.assert_allclose(
                new, old - 0.1 * (slope + 2 * zeta * old), rtol=1e-4, atol=1e-6
            )
    np.testing.assert_array_equal(kept[0], kept[2])
    assert (kept[0] >= 0).all()
    assert kept[0].any()
    assert (kept[3] != kept[0]).any()


@pytest.mark.usefixtures("optax_promotes")
def test_measured_decay_of_masked_parameters():
    measure = diagnostics.measured_decay(loss, batch_size=32, probes=1)
    labels = lambda params: jax.tree.map_with_path(lambda path, _: "norm" in str(path[0]), params)
    tx = optax.chain(optax.masked(theory.gamma_decay(measure), labels), optax.sgd(0.1))
    state, _ = train.train_step(loss, donate=False)(states(tx)["linen"], data(32))
    zeta = state.opt_state[0].inner_state.zeta["norm"]["scale"]
    assert zeta.shape == (6,)
    assert zeta.any()
    with pytest.raises(TypeError, match="measured_decay: expected a train_state"):
        measure(state.params)


def test_population_training_by_hand():
    many, found = data(512, 9), []
    for state in states().values():
        step = population_step(loss, every=2, donate=False)
        params, stats = to_float64(states()["linen"].params), None
        for number in range(3):
            batch = data(8, number)
            if number % 2 == 0:
                h, *_ = by_hand(params, np.asarray(many[0], np.float64))
                stats = h.mean(0, keepdims=True), h.var(0, keepdims=True)
            x, y = to_float64(batch)
            of_params = lambda params, x=x, y=y, stats=stats: jnp.mean(
                (by_hand(params, x, *stats)[3][:, 0] - y) ** 2
            )
            with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
                slopes = jax.grad(of_params)(params)
            params = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g, np.float64), params, slopes)
            state, metrics = step(state, batch, many)
        found.append((state, metrics))
    for state, _ in found:
        leaves = {jax.tree_util.keystr(p): v for p, v in jax.tree.leaves_with_path(state.params)}
        for layer, parts in params.items():
            for name, expected in parts.items():
                (leaf,) = [v for key, v in leaves.items() if layer in key and name in key]
                np.testing.assert_allclose(leaf, expected, rtol=2e-4, atol=2e-6)
    mean = found[0][0].batch_stats["norm"]["mean"]
    np.testing.assert_allclose(mean, stats[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_population_training_with_the_gradient_of_batch_norm(framework):
    # One batch that is the population: the value is the same, and so the gradient is batch norm's.
    batch = data(64)
    ours, metrics = population_step(loss, gradient="batch", donate=False)(
        states()[framework], batch, batch
    )
    plain, expected = train.train_step(loss, donate=False)(states()[framework], batch)
    held, _ = population_step(loss, donate=False)(states()[framework], batch, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, ours.params, plain.params)
    first = lambda state: np.asarray(jax.tree.leaves(state.params)[1])
    assert abs(first(held) - first(plain)).max() > 1e-3
    # Of another batch the value is the population's all the same.
    other = data(8, 5)
    _, far = population_step(loss, gradient="batch", donate=False)(
        states()[framework], other, batch
    )
    _, value = population_step(loss, donate=False)(states()[framework], other, batch)
    np.testing.assert_allclose(far["loss"], value["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "options", "words"),
    [
        (normax.linen.BatchRenorm, {}, "that normalize by the batch alone"),
        (nn.BatchNorm, {}, "norms of normax, not Flax's"),
        (normax.linen.BatchNorm, {"epsilon_on": "deviation"}, "epsilon_on='variance'"),
    ],
)
def test_population_training_refuses_what_it_cannot_do(norm, options, words):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return norm(use_running_average=not train, **options)(x)

    state = train.TrainState.create(Model(), optax.sgd(0.1), KEY, data(8)[0], train=False)
    with pytest.raises(ValueError, match=f"population_step: expected .*{words}"):
        population_step(loss, gradient="batch")(state, data(8), data(8))


def test_curvature_of_half_precision():
    bowl = lambda x: jnp.sum(jnp.array([1.0, 2.0, 4.0], jnp.bfloat16) * x**2) / 2
    found = diagnostics.hessian_spectrum(bowl, jnp.ones(3, jnp.bfloat16), key=KEY, steps=3)
    np.testing.assert_allclose(found.values, [1, 2, 4], rtol=0.02)
    rate = diagnostics.largest_learning_rate(bowl, jnp.ones(3, jnp.bfloat16))
    np.testing.assert_allclose(rate, 2 * 21 / (1 + 8 + 64), rtol=0.05)
    concave = diagnostics.hessian_spectrum(lambda x: -jnp.sum(x**2), jnp.ones(2), key=KEY)
    assert concave.stable_rate == math.inf


def test_population_training_needs_statistics_that_move():
    state = train.TrainState.create(nn.Dense(1), optax.sgd(0.1), KEY, jnp.ones((1, 4)))
    step = population_step(lambda model, batch, train: jnp.mean(model(batch[0]) ** 2))
    with pytest.raises(
        ValueError, match="population_step: expected a model with running statistics"
    ):
        step(state, data(4), data(8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: population_step(loss, every=0), ValueError, "population_step: expected every"),
        (lambda: population_step(loss, gradient="all"), ValueError, "population_step: expected gradient to be one of"),
        (lambda: theory.gamma_decay(0.1, every=1.5), TypeError, "gamma_decay: expected every"),
        (lambda: theory.gamma_decay("0.1"), TypeError, "gamma_decay: expected zeta"),
        (lambda: theory.gamma_decay(None), TypeError, "gamma_decay: expected a zeta"),
        (lambda: theory.gamma_decay([0.1]).init({"scale": jnp.ones(2)}), TypeError, "gamma_decay: expected zeta of the structure"),
        (lambda: theory.gamma_decay({"scale": jnp.ones(3)}).init({"scale": jnp.ones(2)}), ValueError, r"gamma_decay: expected zeta.shape == \(2,\), got \(3,\)"),
        (lambda: theory.gamma_decay(0.1).update({}, theory.gamma_decay(0.1).init({})), ValueError, "gamma_decay: expected params"),
        (lambda: diagnostics.decay_coefficients(loss, states()["linen"], data(8), batch_size=1, key=KEY), ValueError, "expected batch_size in"),
        (lambda: diagnostics.decay_coefficients(loss, states()["linen"], data(8), batch_size=8, key=KEY, form="new"), ValueError, "expected form to be one of"),
        (lambda: diagnostics.largest_learning_rate(jnp.sum, jnp.ones(2), start=0.0), ValueError, "largest_learning_rate: expected start"),
        (lambda: diagnostics.gradient_smoothness(jnp.sum, jnp.ones(2), jnp.ones((2, 2))), ValueError, "gradient_smoothness: expected rates.shape"),
        (lambda: diagnostics.hessian_spectrum(jnp.sum, jnp.ones(2), key=KEY, steps=0), ValueError, "hessian_spectrum: expected steps"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
