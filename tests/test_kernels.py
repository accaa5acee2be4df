"""Normalizers of kernels and linear maps against their formulas, and of whole parameter trees."""

import functools

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

W = jax.random.normal(jax.random.key(0), (3, 3, 5, 4)) * 2 + 1
G = jnp.linspace(0.5, 2, 4)


def standardized(w, g, axes):
    return g * (w - w.mean(axes, keepdims=True)) / (w.std(axes, keepdims=True) + 1e-5)


def standardized_unbiased(w, g, axes):
    return g * (w - w.mean(axes, keepdims=True)) / (w.std(axes, keepdims=True, ddof=1) + 1e-5)


def scaled(w, g, axes):
    size = np.prod([w.shape[axis] for axis in axes])
    var = w.var(axes, keepdims=True)
    return g * (w - w.mean(axes, keepdims=True)) / np.sqrt(np.maximum(var * size, 1e-4))


def centered(w, g, axes):
    d = w - w.mean(axes, keepdims=True)
    return g * d / (np.sqrt((d * d).sum(axes, keepdims=True)) + 1e-5)


KERNELS = [
    (normax.weight_standardization, standardized),
    (functools.partial(normax.weight_standardization, unbiased=True), standardized_unbiased),
    (normax.scaled_weight_standardization, scaled),
    (normax.centered_weight_norm, centered),
]


@pytest.mark.parametrize(("function", "formula"), KERNELS)
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_the_formula(function, formula, size, x64):
    w, g = jnp.asarray(W, jnp.float64) * size, jnp.asarray(G, jnp.float64)
    expected = formula(np.asarray(w), np.asarray(g), (0, 1, 2))
    np.testing.assert_allclose(function(w, g), expected, rtol=1e-9)
    first = np.moveaxis(expected, -1, 0)
    np.testing.assert_allclose(function(jnp.moveaxis(w, -1, 0), g, feature_axes=0), first, 1e-9)


@pytest.mark.parametrize(("function", "formula"), KERNELS)
def test_derivatives(function, formula, x64):
    w = jnp.asarray(W[0, 0], jnp.float64)
    check_derivatives(function, (w, jnp.asarray(G, jnp.float64)))


@pytest.mark.parametrize(("function", "formula"), KERNELS)
def test_constant_weights_come_out_as_zero_with_a_finite_gradient(function, formula):
    w, vjp = jax.vjp(function, jnp.full((6, 4), 3.0))
    np.testing.assert_array_equal(w, jnp.zeros((6, 4)))
    assert jnp.isfinite(vjp(jnp.ones((6, 4)))[0]).all()


@pytest.mark.parametrize(("function", "formula"), KERNELS)
def test_stacked_kernels_are_normalized_one_by_one(function, formula):
    g = jnp.stack([G, 2 * G, 3 * G])
    stacked = function(W, g, feature_axes=(0, -1))
    one_by_one = jnp.stack([function(w, each) for w, each in zip(W, g, strict=True)])
    np.testing.assert_allclose(stacked, one_by_one, rtol=1e-6)


def test_a_first_batch_comes_out_standardized(x64):
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (500, 6))
    v = jax.random.normal(jax.random.key(2), (6, 4))
    g, b = normax.weight_norm_init(normax.moments(x @ normax.weight_norm(v), 0))
    y = np.asarray(x) @ (np.asarray(v) / np.linalg.norm(v, axis=0) * np.asarray(g)) + np.asarray(b)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-9)


def test_the_norm_of_a_convolution_as_an_operator(x64):
    w = jax.random.normal(jax.random.key(3), (3, 3, 2, 4))

    def convolve(w, u):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(u[None], w, (2, 2), "SAME", dimension_numbers=numbers)[
            0
        ]

    u = jax.random.normal(jax.random.key(4), (6, 6, 2))
    matrix = jax.jacobian(lambda u: convolve(w, u))(u).reshape(-1, u.size)
    state = normax.SpectralState(u, jnp.zeros(()))
    sigma, state = normax.operator_norm(convolve, w, state, n_steps=400)
    exact = np.linalg.svd(np.asarray(matrix), compute_uv=False)[0]
    np.testing.assert_allclose(sigma, exact, rtol=1e-6)
    own = np.linalg.svd(np.asarray(w).reshape(-1, 4), compute_uv=False)[0]
    assert abs(own / exact - 1) > 0.01  # what spectral_norm of the kernel would say
    grad = jax.grad(lambda w: normax.operator_norm(convolve, w, state, n_steps=1)[0])(w)
    largest = lambda w: jnp.linalg.norm(
        jax.jacobian(lambda u: convolve(w, u))(u).reshape(-1, 72), 2
    )
    np.testing.assert_allclose(grad, jax.grad(largest)(w), atol=1e-4)


def test_a_linear_map_of_rank_one_and_a_bad_one():
    matrix = jnp.outer(jnp.arange(3.0), jnp.ones(4))
    state = normax.SpectralState(jnp.arange(1.0, 5.0), jnp.zeros(()))
    sigma, after = normax.operator_norm(jnp.matmul, matrix, state)
    np.testing.assert_allclose(sigma, np.sqrt(5 * 4), rtol=1e-6)
    _, kept = normax.operator_norm(jnp.matmul, matrix * jnp.nan, after)
    np.testing.assert_array_equal(kept.u, after.u)


def test_the_weights_of_a_model_by_path_and_not_written_back():
    model = flax.linen.Sequential(
        [flax.linen.Dense(3), flax.linen.LayerNorm(), flax.linen.Dense(2)]
    )
    x = jax.random.normal(jax.random.key(5), (4, 5))
    params = model.init(jax.random.key(6), x)["params"]
    before = jax.tree.map(np.array, params)

    def loss(params):
        kept = normax.transform_weights(params, normax.weight_standardization)
        return (model.apply({"params": kept}, x) ** 2).sum()

    grads = jax.grad(loss)(params)
    chex.assert_trees_all_equal(params, before)
    kernel = grads["layers_0"]["kernel"]
    np.testing.assert_allclose(kernel.sum(0), 0, atol=1e-4)  # no gradient along a shift
    only = normax.transform_weights(
        params, jnp.zeros_like, where=lambda path, leaf: path == ("layers_2", "kernel")
    )
    np.testing.assert_array_equal(only["layers_2"]["kernel"], 0)
    np.testing.assert_array_equal(only["layers_0"]["kernel"], params["layers_0"]["kernel"])
    with pytest.raises(ValueError, match="expected where to choose a weight, got 'kernels'"):
        normax.transform_weights(params, jnp.zeros_like, where="kernels")


def test_nnx_parameters_too():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    state = normax.transform_weights(nnx.state(layer, nnx.Param), normax.weight_norm)
    np.testing.assert_allclose(jnp.linalg.norm(state["kernel"][...], axis=0), 1, rtol=1e-6)


def test_a_constraint_holds_after_the_step(optax_promotes):
    params = {"Dense_0": {"kernel": W[0, 0], "bias": jnp.ones(4)}}
    constraint = normax.weight_constraint(normax.weight_standardization)
    tx = optax.chain(optax.adam(0.1), constraint)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(kernel.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(kernel.std(0), 1, rtol=1e-4)
    assert not np.allclose(params["Dense_0"]["bias"], 1)
    with pytest.raises(ValueError, match="expected params in update"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("WeightStandardization", normax.weight_standardization),
        ("ScaledWeightStandardization", normax.scaled_weight_standardization),
        ("CenteredWeightNorm", normax.centered_weight_norm),
    ],
)
def test_modules_call_their_layer_with_the_function_s_weights(name, function):
    x = jax.random.normal(jax.random.key(7), (4, 6))
    layer = flax.linen.Dense(4)
    wrapped = getattr(normax.linen, name)(layer, use_scale=True)
    variables = wrapped.init(jax.random.key(8), x)
    variables["params"]["layer_instance/kernel/scale"] = G
    inner = variables["params"]["layer_instance"]
    expected = layer.apply({"params": {**inner, "kernel": function(inner["kernel"], G)}}, x)
    np.testing.assert_array_equal(wrapped.apply(variables, x), expected)
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    linear.kernel[...] = inner["kernel"]
    module = getattr(normax.nnx, name)(linear, use_scale=True, rngs=nnx.Rngs(1))
    module.scales["kernel",][...] = G
    np.testing.assert_array_equal(module(x), expected)
    np.testing.assert_array_equal(linear.kernel[...], inner["kernel"])
    scales = nnx.state(module, nnx.Param)
    assert len(jax.tree.leaves(scales)) == 3
