"""Power normalization against the paper's algorithm, step by step, in NumPy."""

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx
from normax import train
from normax.recalibrate import recalibrate, recalibrate_nnx


def paper(xs, cts, scale, bias, momentum, drift_momentum, epsilon=1e-5):
    """Yields y, dx, dscale, mean square and drift of each step: algorithm 2, in float64."""
    square, drift = np.ones(xs.shape[-1]), np.zeros(xs.shape[-1])
    for x, ct in zip(np.asarray(xs, np.float64), np.asarray(cts, np.float64), strict=True):
        psi = np.sqrt(square + epsilon)
        xhat, g = x / psi, ct * scale
        dx = (g - drift * xhat) / psi
        gamma, lam = (xhat**2).mean(0), (g * xhat).mean(0)
        drift = drift * (1 - (1 - drift_momentum) * gamma) + (1 - drift_momentum) * lam
        square = momentum * square + (1 - momentum) * (x**2).mean(0)
        yield xhat * scale + bias, dx, (ct * xhat).sum(0), square, drift


def step(x, ct, state, scale, bias, **options):
    def apply(x, drift, scale):
        return normax.power_norm(
            x, state._replace(drift=drift), scale, bias, use_running_average=False, **options
        )

    y, vjp, new = jax.vjp(apply, x, state.drift, scale, has_aux=True)
    dx, drift, dscale = vjp(ct)
    return y, dx, dscale, new._replace(drift=drift)


@pytest.mark.parametrize("masked", [False, True])
def test_the_paper_s_algorithm(masked):
    key = jax.random.key(0)
    xs, cts = 2 * jax.random.normal(key, (2, 5, 16, 3)) + 0.5
    scale, bias = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 1.0, -1.0])
    state = normax.PowerState.create(3)
    momenta = {"momentum": 0.8, "drift_momentum": 0.7}
    expected = paper(xs, cts, np.asarray(scale), np.asarray(bias), 0.8, 0.7)
    if masked:
        rows = jnp.full((5, 4, 3), jnp.nan)
        xs, cts = jnp.concatenate([xs, rows], 1), jnp.concatenate([cts, jnp.ones((5, 4, 3))], 1)
        momenta["mask"] = (jnp.arange(20) < 16)[:, None]
    run = jax.jit(lambda x, ct, state: step(x, ct, state, scale, bias, **momenta))
    for x, ct, (y, dx, dscale, square, drift) in zip(xs, cts, expected, strict=True):
        ours_y, ours_dx, ours_dscale, state = run(x, ct, state)
        np.testing.assert_allclose(ours_y[:16], y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours_dx[:16], dx, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ours_dx[16:], 0)
        np.testing.assert_allclose(ours_dscale, dscale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.square, square, rtol=1e-5)
        np.testing.assert_allclose(state.drift, drift, rtol=1e-4, atol=1e-5)
    y, same = normax.power_norm(xs[0], state, use_running_average=True)
    chex.assert_trees_all_equal(same, state)
    expected = np.asarray(xs[0, :16]) / np.sqrt(np.asarray(state.square) + 1e-5)
    np.testing.assert_allclose(y[:16], expected, rtol=1e-5)


def test_warming_up_divides_by_the_batch_and_a_bad_batch_moves_nothing():
    x = 5 * jax.random.normal(jax.random.key(0), (16, 3))
    state = normax.PowerState.create(3)
    run = lambda x, flag: normax.power_norm(x, state, use_running_average=False, warming_up=flag)
    y, _ = jax.jit(run)(x, True)
    xs = np.asarray(x)
    np.testing.assert_allclose(y, xs / np.sqrt((xs**2).mean(0) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(x, False)[0], xs / np.sqrt(1 + 1e-5), rtol=1e-5)
    bad = x.at[0].set(jnp.nan)
    *_, new = step(bad, x, state, jnp.ones(3), jnp.zeros(3))
    chex.assert_trees_all_equal(new, state)


def test_half_precision_comes_back():
    x = jax.random.normal(jax.random.key(0), (16, 3)).astype(jnp.bfloat16)
    y, _ = normax.power_norm(x, normax.PowerState.create(3), use_running_average=False)
    assert y.dtype == jnp.bfloat16


def test_bad_input_is_refused():
    x, state = jnp.ones((4, 3)), normax.PowerState.create(3)
    with pytest.raises(TypeError, match=r"power_norm: expected state to be a normax.PowerState"):
        normax.power_norm(x, normax.RunningStats.create(3), use_running_average=False)
    with pytest.raises(ValueError, match=r"power_norm: expected drift_momentum in \[0, 1\], got 2"):
        normax.power_norm(x, state, use_running_average=False, drift_momentum=2)
    with pytest.raises(ValueError, match=r"expected state.square.shape == \(4,\)"):
        normax.power_norm(jnp.ones((3, 4)), state, use_running_average=False)


def by_hand(batches, scale, bias, warmup):
    """Yields y and the state of each step of a loss of y cubed, by the function alone."""
    state = normax.PowerState.create(3)
    for steps, x in enumerate(batches):

        def loss(drift, x=x, state=state, steps=steps):
            y, new = normax.power_norm(
                x,
                state._replace(drift=drift),
                scale,
                bias,
                use_running_average=False,
                warming_up=steps < warmup,
            )
            return (y**3).mean(), (y, new)

        drift, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(state.drift)
        state = new._replace(drift=drift)
        yield y, state


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_module_trains_as_the_function_does(kind):
    batches = 2 * jax.random.normal(jax.random.key(0), (4, 16, 3)) + 1
    # Nothing but the drift moves: its optimizer alone knows how.
    tx = normax.overwrite_drift(optax.set_to_zero())
    if kind == "linen":
        model = normax.linen.PowerNorm(warmup_steps=2)
        key = jax.random.key(1)
        state = train.TrainState.create(model, tx, key, batches[0], use_running_average=True)
    else:
        model = normax.nnx.PowerNorm(3, warmup_steps=2, rngs=nnx.Rngs(0))
        state = train.TrainState.from_nnx(model, tx)

    def loss(model, batch, train):
        y = model(batch, use_running_average=not train)
        return (y**3).mean(), {"y": y}

    step = train.train_step(loss)
    for x, (y, expected) in zip(
        batches, by_hand(batches, jnp.ones(3), jnp.zeros(3), 2), strict=True
    ):
        state, metrics = step(state, x)
        np.testing.assert_allclose(metrics["y"], y, rtol=1e-5, atol=1e-6)
        stats = state.model_state["batch_stats"] if kind == "linen" else state.model_state
        np.testing.assert_allclose(jax.tree.leaves(stats["var"])[0], expected.square, rtol=1e-5)
        drift = jax.tree.leaves(state.params["drift"])[0]
        np.testing.assert_allclose(drift, expected.drift, rtol=1e-4, atol=1e-7)
    assert (drift != 0).all()
    assert jax.tree.leaves(normax.norm_labels(state.params)["drift"]) == ["norm"]


def test_modules_are_one_and_inference_leaves_the_state():
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1
    linen = normax.linen.PowerNorm()
    ours = normax.nnx.PowerNorm(3, rngs=nnx.Rngs(0))
    variables = linen.init(jax.random.key(1), x, use_running_average=True)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"scale": (3,), "bias": (3,), "drift": (3,)},
        "batch_stats": {"var": (3,)},
    }
    for _ in range(2):
        y, new = linen.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **new}
        np.testing.assert_array_equal(ours(x), y)
        np.testing.assert_array_equal(ours.var[...], variables["batch_stats"]["var"])
    ours.eval()
    y = linen.apply(variables, x, use_running_average=True)
    np.testing.assert_array_equal(ours(x), y)
    state = normax.PowerState(variables["batch_stats"]["var"], jnp.zeros(3))
    expected, _ = normax.power_norm(x, state, jnp.ones(3), jnp.zeros(3), use_running_average=True)
    np.testing.assert_array_equal(y, expected)


def test_recalibration_leaves_a_power_norm_as_it_is():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            x = normax.linen.PowerNorm(use_running_average=not train, name="power")(x)
            return normax.linen.BatchNorm(use_running_average=not train, name="batch")(x)

    class NNXModel(nnx.Module):
        def __init__(self):
            self.power = normax.nnx.PowerNorm(3, rngs=nnx.Rngs(0))
            self.batch = normax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.batch(self.power(x))

    x = 2 * jax.random.normal(jax.random.key(0), (8, 3)) + 1
    model = Model()
    variables = model.init(jax.random.key(1), x, train=False)
    apply = lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    new = recalibrate(apply, variables, [x[:4], x[4:]])["batch_stats"]
    np.testing.assert_array_equal(new["power"]["var"], jnp.ones(3))
    np.testing.assert_allclose(new["batch"]["mean"], x.mean(0), rtol=1e-4)
    copy = recalibrate_nnx(NNXModel(), [x[:4], x[4:]])
    np.testing.assert_array_equal(copy.power.var[...], jnp.ones(3))
    np.testing.assert_allclose(copy.batch.mean[...], x.mean(0), rtol=1e-4)
    assert not copy.power.freeze_stats


def test_overwriting_needs_parameters():
    tx = normax.overwrite_drift(optax.sgd(1.0))
    params = {"drift": jnp.ones(1)}
    with pytest.raises(ValueError, match="overwrite_drift: expected params"):
        tx.update(params, tx.init(params))
