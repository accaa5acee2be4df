"""Kernels keep a batch sharded: nothing is gathered, sums are added up."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waves
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from waves import (
    WAVES,
    backward_kernel,
    backward_sharded,
    close,
    forward_kernel,
    kernel,
    kernel_wave,
    plain,
)

import normax
from normax.kernels import layouts
from normax.kernels.sharding import sharded


@pytest.fixture
def arrays():
    return waves.arrays()


SPECS = [P(), P("a"), P(("a", "b")), P("b", "a"), P(None, "a"), P("a", None, "b")]


def loss_and_gradients(function, x, scale):
    loss = lambda x, scale: (jnp.cos(function(x, scale)) * x).sum()
    return function(x, scale), jax.grad(loss, (0, 1))(x, scale)


def collectives(text):
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    return {name: len(re.findall(rf"{name}(?:-start)?\(", text)) for name in names}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(request.param,) * 2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nothing_is_gathered(arrays, mesh, spec):
    x, scale = arrays
    wanted = loss_and_gradients(plain, x, scale)
    x = jax.device_put(x, NamedSharding(mesh, spec))
    scale = jax.device_put(scale, NamedSharding(mesh, P()))
    run = jax.jit(functools.partial(loss_and_gradients, kernel_wave))
    compiled = run.lower(x, scale).compile()
    close(compiled(x, scale), wanted, 1e-4)
    with jax.set_mesh(mesh):
        close(loss_and_gradients(kernel_wave, x, scale), wanted, 1e-4)
        close(run(x, scale), wanted, 1e-4)
    counts = collectives(compiled.as_text())
    whole = len(spec) < 3
    assert counts.pop("all-reduce") == (1 if len(spec) else 0)
    assert any(counts.values()) != whole
    y, (dx, _) = compiled(x, scale)
    if whole:
        assert y.sharding.is_equivalent_to(x.sharding, 3)
        assert dx.sharding.is_equivalent_to(x.sharding, 3)


def test_a_mapped_axis_stays_sharded(arrays, mesh):
    x, scale = arrays
    wanted = loss_and_gradients(plain, x, scale)
    x = jax.device_put(x, NamedSharding(mesh, P("b", "a")))
    scale = jax.device_put(scale, NamedSharding(mesh, P()))
    for axis in (0, 1):
        mapped = jax.vmap(kernel_wave, (axis, None), axis)
        run = jax.jit(functools.partial(loss_and_gradients, mapped))
        compiled = run.lower(x, scale).compile()
        close(compiled(x, scale), wanted, 1e-4)
        counts = collectives(compiled.as_text())
        assert not any(n for name, n in counts.items() if name != "all-reduce")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("manual", ["a", "ab"])
@pytest.mark.parametrize("which", ["wave", "kernel_wave"])
def test_within_shard_map(arrays, mesh, check_vma, manual, which):
    x, scale = arrays
    wanted = loss_and_gradients(plain, x, scale)
    spec = P(tuple(manual))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, spec))
        how = {"out_specs": spec, "axis_names": set(manual), "check_vma": check_vma}
        mapped = jax.shard_map(WAVES[which], in_specs=(spec, P()), **how)
        compiled = jax.jit(functools.partial(loss_and_gradients, mapped)).lower(x, scale).compile()
        close(compiled(x, scale), wanted, 1e-4)
        counts = collectives(compiled.as_text())
        if len(manual) == 2:
            assert counts.pop("all-reduce") == 1
            assert not any(counts.values())

        def inside(x, scale):
            loss = lambda x, scale: (jnp.cos(WAVES[which](x, scale)) * x).sum()
            dx, dscale = jax.grad(loss, (0, 1))(x, scale)
            # Where types say what varies, JAX has added up the cotangents of what does not.
            return dx, dscale if check_vma else jax.lax.psum(dscale, tuple(manual))

        how["out_specs"] = (spec, P())
        close(
            jax.jit(jax.shard_map(inside, in_specs=(spec, P()), **how))(x, scale), wanted[1], 1e-4
        )


def test_second_derivatives_where_sharded(arrays, mesh):
    def second(function, x, scale):
        gradient = jax.grad(lambda *args: (function(*args) ** 2).sum(), (0, 1))
        return jax.grad(lambda *args: sum((g**2).sum() for g in gradient(*args)), (0, 1))(x, scale)

    x, scale = arrays
    wanted = second(plain, x, scale)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
        close(jax.jit(functools.partial(second, kernel_wave))(x, scale), wanted, 1e-3)


def test_an_axis_that_does_not_divide_is_gathered():
    # Parts that are padded would be summed with the padding.
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    twice = functools.partial(kernel, lambda x: (x, jnp.ones_like(x)), ("rows", "sum"))
    function = sharded(twice, "n d -> n d, d")
    x = jax.random.normal(jax.random.key(0), (6, 3))
    over_rows = NamedSharding(mesh, P("a"))
    run = lambda x: function(jax.lax.with_sharding_constraint(x, over_rows) * 2)
    close(jax.jit(run)(x), (2 * x, np.full(3, 6.0)))


def test_without_a_rule_it_is_gathered(arrays):
    x, scale = arrays
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    counts = [
        collectives(jax.jit(function).lower(x, scale, x).compile().as_text())
        for function in (backward_kernel, backward_sharded)
    ]
    assert counts[0]["all-gather"] > 0
    assert counts[1] == {name: int(name == "all-reduce") for name in counts[1]}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("... d -> ... d", "operands"),
        ("a b, d -> a b", "shapes"),
        ("... d, ... d -> ... d", "shapes"),
        ("... d, d -> ... d, d", "outputs"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(arrays, rule, message):
    with pytest.raises(ValueError, match=message):
        sharded(forward_kernel, rule)(*arrays)


@pytest.mark.parametrize("shape", [(3 * 2**14, 4), (33009, 4), (6, 3 * 2**12, 4)], ids=str)
def test_long_sums_of_a_sharded_batch(shape):
    mesh = jax.make_mesh((3,), ("a",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:3])
    x = jax.random.normal(jax.random.key(0), shape)
    loss = lambda scale, x: (normax.layer_norm(x, scale) ** 3).sum()
    wanted = jax.grad(loss)(jnp.ones(4), x)
    with jax.set_mesh(mesh):
        for spec in (P("a"), P(*[None] * (len(shape) - 2), "a")):
            found = jax.jit(jax.grad(loss))(jnp.ones(4), jax.device_put(x, spec))
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-1)


def test_an_axis_that_a_reshape_has_split():
    """Along a part of a mesh axis, that is; JAX's own decoding of it fails."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jnp.arange(16.0 * 32).reshape(16, 32)
    twice = sharded(lambda x: (2 * x, x.sum((0, 1))), "... d -> ... d, d")

    @jax.jit
    def run(x):
        y, total = twice(x.reshape(4, 4, 32))
        return y.reshape(16, 32), total

    given = jax.device_put(x, NamedSharding(mesh, P("a")))
    compiled = run.lower(given).compile()
    assert collectives(compiled.as_text()) == {
        "all-gather": 0,
        "all-reduce": 1,
        "all-to-all": 0,
        "collective-permute": 0,
    }
    close(compiled(given), (2 * x, x.sum(0)), 1e-6)


def mesh_of(sizes, names):
    devices = jax.devices()[: math.prod(sizes)]
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, tuple(names), axis_types=axis_types, devices=devices)


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ((8,), P()),
        ((8,), P(None, "a")),
        ((4, 2), P("a")),
        ((4, 2), P("b", "a")),
        ((2, 4), P(("b", "a"))),
        ((2, 4), P(("a", "b"))),
        ((2, 2, 2), P("c", ("b", "a"))),
        ((3, 2), P("a")),
        ((3, 2), P("b", "a")),
        ((2, 3), P("a")),
        ((2, 3), P(("b", "a"))),
        ((6,), P("a")),
    ],
    ids=str,
)
def test_a_layout_in_terms_of_primes_is_the_same(sizes, spec):
    names = ("a", "b", "c")[: len(sizes)]
    mesh = mesh_of(sizes, names)
    sharding = NamedSharding(mesh, spec)
    (found,), primes = layouts.of([sharding], [2])
    assert set(primes.devices.shape) <= {2, 3}
    assert NamedSharding(primes, P(*found)).is_equivalent_to(sharding, 2)


def test_arrays_have_one_mesh_of_primes():
    """One in which all have their axes, or most: six devices 2 x 3 for some, 3 x 2 for others."""
    first, other = mesh_of((2, 3), "ab"), mesh_of((3, 2), "ab")
    given = [NamedSharding(first, P("a")), NamedSharding(other, P("b")), NamedSharding(other, P())]
    found, primes = layouts.of(given[1:], [1, 2])
    assert primes.devices.shape == (3, 2)
    assert found == [(("prime1",),), ((), ())]
    found, primes = layouts.of([given[0], given[1], given[1]], [1, 1, 1])
    assert primes.devices.shape == (3, 2)
    assert found == [((),), (("prime1",),), (("prime1",),)]
    found, primes = layouts.of([given[0], given[1], given[0]], [1, 1, 1])
    assert primes.devices.shape == (2, 3)
    assert found == [(("prime0",),), ((),), (("prime0",),)]


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)], ids=str)
def test_meshes_of_several_primes_gather_nothing(sizes):
    mesh = mesh_of(sizes, ("data", "model"))
    x = jax.device_put(jnp.arange(6.0 * 4 * 8).reshape(6, 4, 8), NamedSharding(mesh, P("data")))
    twice = sharded(lambda x, s: (s[None, None] * x, x.sum((0, 1))), "... d, d -> ... d, d")
    compiled = jax.jit(twice).lower(x, jnp.full(8, 2.0)).compile()
    assert collectives(compiled.as_text())["all-gather"] == 0
    assert collectives(compiled.as_text())["all-reduce"] == 1
    close(compiled(x, jnp.full(8, 2.0)), (2 * x, x.sum((0, 1))), 1e-6)


def test_pieces_in_another_order_have_no_axes():
    """Two devices of eight, exchanged, hold what a mesh would give the other."""

    class Exchanged:
        num_devices = 8

        def devices_indices_map(self, shape):
            mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
            indices = NamedSharding(mesh, P("a")).devices_indices_map(shape)
            *rest, one, other = indices
            return {d: indices[d] for d in rest} | {one: indices[other], other: indices[one]}

    assert layouts.of([Exchanged()], [1])[0] == [((),)]
