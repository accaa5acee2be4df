"""The family against its papers' formulas, numerical derivatives, masks, and its modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_derivatives
from family import FAMILY
from flax import nnx

import normax
import normax.linen
import normax.nnx

EVERY = pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
MASKED = [member for member in FAMILY if member.removable is not None]
MODULES = [member for member in FAMILY if member.module]
STATEFUL = [member for member in FAMILY if member.stats is not None]
NAMED = {"ids": lambda member: member.name}


@EVERY
def test_the_formula(member, x64):
    x, parameters = member.inputs(jnp.float64)
    y = jax.jit(member.call)(x, parameters)
    np.testing.assert_allclose(y, member.expected(x, parameters), rtol=1e-9, atol=1e-10)


@EVERY
def test_the_formula_in_float32_jitted(member):
    x, parameters = member.inputs()
    y = jax.jit(member.call)(x, parameters)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, member.expected(x, parameters), rtol=3e-5, atol=3e-6)


@EVERY
def test_half_precision_is_computed_in_float32_and_rounded_once(member):
    x, parameters = member.inputs(jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parameters)
    call = jax.jit(member.call)
    y = call(x, parameters)
    assert y.dtype == jnp.bfloat16
    expected = call(x.astype(jnp.float32), wide).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("member", [m for m in FAMILY if not m.stops], **NAMED)
def test_derivatives_forwards_and_backwards(member, x64):
    x, parameters = member.inputs(jnp.float64)
    if "threshold" in parameters:  # away from the kink
        parameters["threshold"] = jnp.full(4, 0.123)
    check_derivatives(member.call, (x, parameters))


def test_batch_renorm_s_gradient_is_r_times_that_of_batch_norm(x64):
    (member,) = (member for member in FAMILY if member.stops)
    x, parameters = member.inputs(jnp.float64)
    ct = jax.random.normal(jax.random.key(3), x.shape)
    _, vjp = jax.vjp(lambda x: member.call(x, parameters), x)
    stats = normax.RunningStats.create(4, jnp.float64)

    def batch_norm(x):
        return normax.batch_norm(
            x, stats, parameters["scale"], use_running_average=False, epsilon=1e-3
        )[0]

    r = np.clip(np.sqrt((np.var(x, (0, 1, 2)) + 1e-3) / (3 + 1e-3)), 1 / 1.1, 1.1)
    assert (np.abs(r - 1) > 0.01).any()
    np.testing.assert_allclose(
        vjp(ct)[0], jax.vjp(batch_norm, x)[1](ct * r[None, None, None])[0], rtol=1e-9
    )


@pytest.mark.parametrize("member", MASKED, **NAMED)
def test_masked_positions_are_not_there(member):
    x, parameters = member.inputs()
    axis = member.removable
    there = jnp.arange(x.shape[axis]) < x.shape[axis] - 1
    mask = jnp.expand_dims(there, tuple(i for i in range(x.ndim) if i != axis))
    poisoned = jnp.where(mask, x, jnp.nan)
    fewer = jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
    y, vjp = jax.vjp(jax.jit(lambda x: member.call(x, parameters, mask=mask)), poisoned)
    expected, expected_vjp = jax.vjp(jax.jit(lambda x: member.call(x, parameters)), fewer)
    ct = jax.random.normal(jax.random.key(2), x.shape)
    kept = lambda v: jax.lax.slice_in_dim(v, 0, x.shape[axis] - 1, axis=axis)
    np.testing.assert_allclose(kept(y), expected, rtol=1e-5, atol=1e-6)
    (dx,) = vjp(ct)
    np.testing.assert_allclose(kept(dx), expected_vjp(kept(ct))[0], rtol=1e-4, atol=1e-6)
    gone = jax.lax.slice_in_dim(dx, x.shape[axis] - 1, x.shape[axis], axis=axis)
    np.testing.assert_array_equal(gone, jnp.zeros_like(gone))
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize("member", MODULES, **NAMED)
def test_linen_nnx_and_the_function_agree_bit_for_bit(member):
    x, parameters = member.inputs()
    told = jax.tree.map(jnp.asarray, member.told[:1])
    options = {**member.options, **member.module_options}
    linen = getattr(normax.linen, member.module)(**options)
    sizeless = member.module in ("L2Norm", "LocalResponseNorm")
    features = () if sizeless else (x.shape[-1],)
    module = getattr(normax.nnx, member.module)(*features, **options, rngs=nnx.Rngs(0))
    running = member.stats is not None
    training = {"use_running_average": False} if running else {}
    variables = linen.init(jax.random.key(0), x, *told, **training)
    assert set(variables.get("params", {})) == set(parameters)
    for name, value in parameters.items():
        assert variables["params"][name].shape == value.shape
        getattr(module, name)[...] = value
    variables = {**variables, "params": parameters}
    first = lambda out: out[0] if isinstance(out, tuple) else out
    if not running:
        expected = member.call(x, parameters)
        np.testing.assert_array_equal(linen.apply(variables, x, *told), expected)
        np.testing.assert_array_equal(module(x, *told), expected)
        return
    state = normax.RunningStats.create(member.stats)
    momentum = {"momentum": linen.momentum}
    for _ in range(2):
        y, new = linen.apply(variables, x, *told, **training, mutable=["batch_stats"])
        variables = {**variables, **new}
        expected, state, *_ = member.function(
            x,
            state,
            *member.told,
            **parameters,
            **member.options,
            **momentum,
            use_running_average=False,
        )
        np.testing.assert_array_equal(first(y), expected)
        np.testing.assert_array_equal(first(module(x, *told)), expected)
        for name, leaf in variables["batch_stats"].items():
            np.testing.assert_array_equal(leaf, getattr(state, name))
            np.testing.assert_array_equal(leaf, getattr(module, name)[...])
    module.eval()
    y = linen.apply(variables, x, *told, use_running_average=True)
    np.testing.assert_array_equal(first(y), first(module(x, *told)))


@pytest.mark.parametrize("member", STATEFUL, **NAMED)
def test_inference_leaves_the_state_and_a_bad_batch_does_too(member):
    x, parameters = member.inputs()
    stats = member.start()
    run = lambda x, inference: member.function(
        x, stats, *member.told, **parameters, **member.options, use_running_average=inference
    )
    for given, inference in ((x, True), (x.at[...].set(jnp.nan), False)):
        jax.tree.map(np.testing.assert_array_equal, run(given, inference)[1], stats)


@pytest.mark.parametrize("member", STATEFUL, **NAMED)
def test_after_many_steps_inference_gives_what_training_gave(member):
    x, parameters = member.inputs()
    options = {**member.options, "momentum": 0.5}
    step = jax.jit(
        lambda stats: member.function(
            x, stats, *member.told, **parameters, **options, use_running_average=False
        )
    )
    stats = normax.RunningStats.create(member.stats)
    for _ in range(60):
        y, stats, *_ = step(stats)
    if "ghost" in member.name:  # at inference there are no ghosts
        y, _ = normax.batch_norm(x, stats, **parameters, use_running_average=True)
    if "instance" in member.name:  # at inference there is one example: the average one
        wide = np.asarray(x)
        mean, var = wide.mean((0, 1, 2)), wide.var((1, 2)).mean(0)
        y = (wide - mean) / np.sqrt(var + 1e-3)
        y = y * np.asarray(parameters["scale"]) + np.asarray(parameters["bias"])
    again = member.function(
        x, stats, *member.told, **parameters, **options, use_running_average=True
    )[0]
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_kalman_norm_of_entries_without_a_variance_gives_numbers(weight):
    x = 1e25 * jax.random.normal(jax.random.key(0), (16, 3))
    stats, prior = normax.RunningStats.create(3), normax.moments(x[:8] / 1e25, 0)

    def call(x):
        options = {"use_running_average": False, "prior_weight": weight}
        return normax.kalman_batch_norm(x, stats, prior, **options)[0]

    y, pull = jax.vjp(call, x)
    assert np.isfinite(y).all()
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()
    with pytest.raises(ValueError, match=r"prior_weight.shape == \(\), got \(3,\)"):
        normax.kalman_batch_norm(
            x, stats, prior, use_running_average=False, prior_weight=jnp.ones(3)
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_weight_of_kalman_norm_s_prior_has_a_derivative_at_its_ends_too(weight):
    x = np.random.default_rng(0).normal(1, 1, (16, 2))
    stats, prior = normax.RunningStats.create(2, jnp.float64), normax.Moments(9, 0.5, 2.0)
    prior = jax.tree.map(lambda v: jnp.full(2, v), prior)

    def mixture(p):
        options = {"use_running_average": False, "prior_weight": p}
        return normax.kalman_batch_norm(x, stats, prior, **options)[2]

    slopes = jax.jacobian(lambda p: mixture(p)[1:])(jnp.asarray(weight))
    mean, var = x.mean(0), x.var(0)
    apart = (mean - 0.5) ** 2
    np.testing.assert_allclose(slopes[0], 0.5 - mean, rtol=1e-9)
    np.testing.assert_allclose(slopes[1], 2 - var + (1 - 2 * weight) * apart, rtol=1e-9)
