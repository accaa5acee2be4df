"""Modules that a condition drives: linen, nnx and the functions are one."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx
from normax.interop import from_flax

X = jax.random.normal(jax.random.key(0), (4, 6, 3))
CONDITION = jax.random.normal(jax.random.key(1), (4, 5))
OPTIONS = {"kernel_init": jax.nn.initializers.normal(0.5), "bias_init": jax.nn.initializers.ones}


def projected(params, name):
    """Returns what the condition gives, by NumPy in float64."""
    kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
    return np.asarray(CONDITION, np.float64) @ kernel + bias


def in_nnx(module, variables):
    """Gives an nnx module the variables of a linen one."""
    state, _ = from_flax(variables, nnx.state(module))
    nnx.update(module, state)
    return module


def test_adaptive_instance_norm():
    style = jax.random.uniform(jax.random.key(2), (4, 9, 3))
    mask = jnp.arange(6)[None, :, None] < 5
    linen = normax.linen.AdaptiveInstanceNorm(epsilon=1e-3)
    ours = normax.nnx.AdaptiveInstanceNorm(epsilon=1e-3, rngs=nnx.Rngs(0))
    expected = normax.adaptive_instance_norm(X, style, epsilon=1e-3, mask=mask)
    np.testing.assert_array_equal(linen.apply({}, X, style, mask=mask), expected)
    np.testing.assert_array_equal(ours(X, style, mask=mask), expected)


def test_film():
    linen = normax.linen.FiLM(**OPTIONS)
    variables = linen.init(jax.random.key(3), X, CONDITION)
    ours = in_nnx(normax.nnx.FiLM(5, 3, rngs=nnx.Rngs(0)), variables)
    y = linen.apply(variables, X, CONDITION)
    np.testing.assert_array_equal(ours(X, CONDITION), y)
    scale, bias = (projected(variables["params"], name) for name in ("scale", "bias"))
    expected = np.asarray(X) * (1 + scale[:, None]) + bias[:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_adaln_zero(masked):
    mask = jnp.arange(6)[None, :, None] < 5 if masked else None
    block = flax.linen.Dense(3)
    linen = normax.linen.AdaLNZero(block, **OPTIONS)
    variables = linen.init(jax.random.key(3), X, CONDITION)
    inside = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    ours = in_nnx(normax.nnx.AdaLNZero(inside, 5, 3, rngs=nnx.Rngs(0)), variables)
    poisoned = X if mask is None else jnp.where(mask, X, jnp.nan)
    y = linen.apply(variables, poisoned, CONDITION, mask=mask)
    np.testing.assert_array_equal(ours(poisoned, CONDITION, mask=mask), y)
    params = variables["params"]
    scale, bias, gate = (projected(params, name)[:, None] for name in ("scale", "bias", "gate"))
    x = np.asarray(X, np.float64)
    xhat = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    h = xhat * (1 + scale) + bias
    out = h @ np.asarray(params["layer_instance"]["kernel"]) + np.asarray(
        params["layer_instance"]["bias"]
    )
    expected = x + gate * out
    valid = slice(None) if mask is None else slice(5)
    np.testing.assert_allclose(y[:, valid], expected[:, valid], rtol=1e-4, atol=1e-4)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize("name", ["FiLM", "AdaLNZero"])
def test_before_training_it_is_the_identity_and_it_can_leave_it(name):
    inside = () if name == "FiLM" else (flax.linen.Dense(3),)
    linen = getattr(normax.linen, name)(*inside)
    variables = linen.init(jax.random.key(3), X, CONDITION)
    np.testing.assert_array_equal(linen.apply(variables, X, CONDITION), X)
    loss = lambda params: (linen.apply({"params": params}, X, CONDITION) ** 3).sum()
    moved = jax.grad(loss)(variables["params"])
    last = "scale" if name == "FiLM" else "gate"
    assert (moved[last]["kernel"] != 0).any()


def test_bfloat16_conditions_and_inputs_of_rank_one():
    film = normax.nnx.FiLM(5, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert film(X, CONDITION).dtype == jnp.bfloat16
    linen = normax.linen.FiLM()
    with pytest.raises(ValueError, match="FiLM: expected x of rank 2 or more"):
        linen.init(jax.random.key(0), X[0, 0], CONDITION[0])
