"""Penalties and projections reach the scales and biases of normalizers, and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx


class Linen(nn.Module):
    """Two normalizers and what they must not be taken for."""

    @nn.compact
    def __call__(self, x):
        x = normax.linen.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        x = normax.linen.LayerNorm(use_scale=False)(x)
        return normax.linen.WeightNorm(nn.Dense(2))(x)


def linen_params():
    return Linen().init(jax.random.key(0), jnp.ones((2, 3)))["params"]


def nnx_params():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(3, 4, rngs=rngs), normax.nnx.BatchNorm(4, rngs=rngs)
    wrapped = normax.nnx.WeightNorm(nnx.Linear(4, 2, rngs=rngs), rngs=rngs)
    return nnx.state(nnx.Sequential(*layers, wrapped), nnx.Param)


def test_labels_in_linen():
    assert normax.norm_labels(linen_params()) == {
        "Dense_0": {"kernel": "other", "bias": "other"},
        "BatchNorm_0": {"scale": "scale", "bias": "bias"},
        "LayerNorm_0": {"bias": "bias"},
        "Dense_1": {"kernel": "other", "bias": "other"},
        "WeightNorm_0": {"Dense_1/kernel/scale": "scale"},
    }


def test_labels_in_nnx():
    labels = jax.tree.leaves(normax.norm_labels(nnx_params()))
    assert sorted(labels) == ["bias", *["other"] * 4, "scale", "scale"]


@pytest.mark.parametrize("params", [linen_params, nnx_params], ids=["linen", "nnx"])
def test_the_penalty_sums_over_scales_only(params):
    params = params()
    square = lambda v: optax.tree.norm(v, squared=True)
    # four scales of the batch norm and two lengths, all one at the start
    np.testing.assert_allclose(normax.norm_penalty(params, scale=square), 6.0)
    grads = jax.grad(lambda p: normax.norm_penalty(p, scale=square))(params)
    labels = jax.tree.leaves(normax.norm_labels(params))
    for label, grad in zip(labels, jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(grad, jnp.full(grad.shape, 2.0 * (label == "scale")))
    assert normax.norm_penalty(params) == 0.0


@pytest.mark.parametrize("params", [linen_params, nnx_params], ids=["linen", "nnx"])
def test_the_constraint_projects_after_the_step(params):
    params = params()
    box = lambda v: optax.projections.projection_box(v, 0.5, 1.0)
    tx = optax.chain(optax.sgd(1.0), normax.norm_constraint(scale=box))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    labels = jax.tree.leaves(normax.norm_labels(params))
    for label, old, new in zip(labels, *map(jax.tree.leaves, (params, moved)), strict=True):
        np.testing.assert_allclose(new, 0.5 if label == "scale" else old - 1)


def test_the_constraint_needs_the_parameters():
    tx = normax.norm_constraint(scale=optax.projections.projection_non_negative)
    with pytest.raises(ValueError, match="expected params"):
        tx.update({}, tx.init({}))


def test_what_optax_masks_still_tells_what_a_bias_is_of():
    params = {
        "Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    }
    seven = normax.norm_constraint(bias=lambda bias: jnp.full_like(bias, 7))
    for tx in (
        optax.masked(seven, lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 1, tree)),
        optax.multi_transform(
            {"decayed": optax.sgd(0.1), "rest": optax.chain(optax.sgd(0.1), seven)},
            lambda tree: jax.tree.map(lambda leaf: "decayed" if leaf.ndim > 1 else "rest", tree),
        ),
    ):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        new = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(new["norm"]["bias"], 7)
        np.testing.assert_array_equal(new["Dense_0"]["bias"], 0)


def test_what_else_a_normalizer_learns_is_labelled():
    frn = {"scale": 1.0, "bias": 0.0, "threshold": 0.0}
    assert normax.norm_labels({"frn": frn})["frn"]["threshold"] == "norm"
    assert normax.norm_labels({"dense": {"kernel": 1.0, "threshold": 0.0}})["dense"] == {
        "kernel": "other",
        "threshold": "other",
    }
