"""Exported for every platform from one machine, with a batch size that is not known yet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from family import FAMILY
from jax import export

import normax


def gradient(case):
    def energy(x, scale, bias):
        return jnp.sum(jnp.tanh(case.apply(x, scale, bias, None)))

    return jax.jit(jax.grad(energy, (0, 1, 2)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gradient_exports_for_cpu_cuda_and_tpu(case):
    f = gradient(case)
    x = jax.random.normal(jax.random.key(0), case.shape)
    args = x, jnp.ones(case.parameter_shape()), jnp.zeros(case.parameter_shape())
    exported = export.export(f, platforms=["cpu", "cuda", "tpu"])(*args)
    again = export.deserialize(exported.serialize())
    for ours, expected in zip(again.call(*args), f(*args), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_symbolic_batch_size(masked):
    def step(x, mask, scale, stats):
        mask = mask if masked else None

        def energy(x, scale):
            y, new = normax.batch_norm(x, stats, scale, use_running_average=False, mask=mask)
            y = normax.group_norm(normax.layer_norm(normax.rms_norm(y, mask=mask)), num_groups=2)
            return jnp.sum(normax.instance_norm(y) ** 3), new

        return jax.value_and_grad(energy, has_aux=True)(x, scale)

    (batch,) = export.symbolic_shape("b")
    shape = (batch, 4, 4, 6)
    scale, stats = jnp.ones(6), normax.RunningStats.create(6)
    spec = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(*spec, scale, stats)
    for size in (2, 5):
        x = jax.random.normal(jax.random.key(size), (size, 4, 4, 6))
        mask = jax.random.bernoulli(jax.random.key(1), 0.9, x.shape)
        ours = jax.tree.leaves(exported.call(x, mask, scale, stats))
        expected = jax.tree.leaves(jax.jit(step)(x, mask, scale, stats))
        for left, right in zip(ours, expected, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def multiple(member):
    """Returns what a batch size has to be a multiple of."""
    return member.options.get("ghost_size", 1)


EXPORTED = [member for member in FAMILY if member.shape[0] % multiple(member) == 0]


@pytest.mark.parametrize("member", EXPORTED, ids=lambda member: member.name)
def test_the_family_with_a_symbolic_batch_size(member):
    x, parameters = member.inputs()
    by_example = [getattr(told, "shape", ())[:1] == x.shape[:1] for told in member.told]

    def step(x, parameters, *given):
        given = iter(given)
        told = [next(given) if v else old for v, old in zip(by_example, member.told, strict=True)]

        def energy(x, parameters):
            return jnp.sum(jnp.tanh(member._replace(told=told).call(x, parameters)))

        return jax.grad(energy, (0, 1))(x, parameters)

    (batch,) = export.symbolic_shape(f"{multiple(member)}*b")
    given = [v for v, known in zip(member.told, by_example, strict=True) if known]
    x_spec, *specs = (
        jax.ShapeDtypeStruct((batch, *jnp.shape(v)[1:]), jnp.result_type(v)) for v in (x, *given)
    )
    f = jax.jit(step)
    exported = export.export(f, platforms=["cpu", "cuda", "tpu"])(x_spec, parameters, *specs)
    both = (jax.tree.leaves(call(x, parameters, *given)) for call in (exported.call, f))
    for ours, expected in zip(*both, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_stored_program_takes_and_returns_states():
    def step(x, stats, bounds):
        y, new = normax.batch_norm(x, stats, use_running_average=False)
        seen = normax.merge_extremes(bounds, normax.extremes(x, axes=0))
        return y, new, normax.moments(x, axes=0), seen

    x = jax.random.normal(jax.random.key(0), (8, 3))
    given = x, normax.RunningStats.create(3), normax.extremes(x + 1, axes=0)
    stored = export.export(jax.jit(step))(*given).serialize()
    found = export.deserialize(stored).call(*given)
    assert jax.tree.structure(found) == jax.tree.structure(step(*given))
    for ours, expected in zip(*map(jax.tree.leaves, (found, step(*given))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_every_public_state_can_be_stored():
    public = {value for value in vars(normax).values() if hasattr(value, "_fields")}
    assert public == set(normax.exporting.STATES)
