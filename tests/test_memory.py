"""Kept for the backward pass of a bfloat16 input: the input, and next to nothing else."""

import jax
import jax.numpy as jnp
import pytest

import normax


def batch_norm(x, scale, bias):
    stats = normax.RunningStats.create(x.shape[-1])
    return normax.batch_norm(x, stats, scale, bias, use_running_average=False)[0]


def inference(x, scale, bias):
    stats = normax.RunningStats.create(x.shape[-1])
    return normax.batch_norm(x, stats, scale, bias, use_running_average=True)[0]


NORMS = {
    "layer": (normax.layer_norm, (512, 256)),
    "layer_short_rows": (normax.layer_norm, (4096, 64)),
    "rms": (lambda x, scale, bias: normax.rms_norm(x, scale), (512, 256)),
    "group": (lambda *args: normax.group_norm(*args, num_groups=8), (4, 16, 16, 64)),
    "instance": (normax.instance_norm, (4, 16, 16, 64)),
    "batch": (batch_norm, (8, 16, 16, 64)),
    "batch_inference": (inference, (8, 16, 16, 64)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bytes_kept(name, transform):
    function, shape = NORMS[name]
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    scale, bias = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
    y, backward = jax.vjp(transform(function), x, scale, bias)
    assert y.dtype == jnp.bfloat16
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(backward)}
    # The scale is a parameter: it is there anyway.
    data = [leaf for leaf in kept.values() if leaf.size != scale.size or name.startswith("batch")]
    assert sum(leaf.nbytes for leaf in data) <= 1.1 * x.nbytes


def test_a_mask_is_kept_as_it_came():
    x = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)
    mask = jnp.arange(512)[:, None] < 500
    _, backward = jax.vjp(lambda x: normax.layer_norm(x, mask=mask), x)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(backward)}
    assert sum(leaf.nbytes for leaf in kept.values()) <= 1.1 * x.nbytes


@pytest.mark.parametrize("name", ["layer", "rms", "batch"])
def test_nothing_of_x_s_size_is_temporary(name):
    function, _ = NORMS[name]
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    line = jax.ShapeDtypeStruct((512,), jnp.float32)
    jax.config.update("jax_disable_most_optimizations", False)  # the fixture of all turns it back
    compiled = jax.jit(function).lower(x, line, line).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.25 * x.size * 4
