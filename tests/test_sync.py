"""Many devices are one: whatever pools statistics equals the whole batch on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normax

N = 4
X = 100 + 3 * jax.random.normal(jax.random.key(0), (N, 8, 5))
CT = jax.random.normal(jax.random.key(1), X.shape)
SCALE, BIAS = jnp.linspace(0.5, 2, 5), jnp.linspace(-1, 1, 5)
# One device has everything, one a single row, one nothing.
RAGGED = jnp.arange(8)[None, :, None] < jnp.array([8, 1, 5, 0])[:, None, None]
MASKS = pytest.mark.parametrize("mask", [None, RAGGED], ids=["", "ragged"])


def norm(x, scale, bias, mask, **options):
    stats = normax.RunningStats.create(5)
    return normax.batch_norm(
        x, stats, scale, bias, use_running_average=False, momentum=0.5, mask=mask, **options
    )


def whole(x, ct, mask, **options):
    """Returns y, stats and gradients on one device, all entries at once."""
    return compiled_whole(tuple(options.items()), x, ct, mask)


@functools.partial(jax.jit, static_argnums=0)
def compiled_whole(options, x, ct, mask):
    flat = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(-1, 5)
    y, vjp, stats = jax.vjp(
        lambda x, s, b: norm(x, s, b, flat, **dict(options)),
        x.reshape(-1, 5),
        SCALE,
        BIAS,
        has_aux=True,
    )
    dx, dscale, dbias = vjp(ct.reshape(-1, 5))
    return y.reshape(x.shape), stats, dx.reshape(x.shape), dscale, dbias


def agree(ours, expected, units=4):
    for left, right in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        scale = max(float(jnp.abs(right).max()), 1e-3)
        np.testing.assert_allclose(left, right, rtol=0, atol=units * 1.2e-7 * scale)


@MASKS
def test_vmap_with_an_axis_name(mask):
    def every(x, scale, bias):
        return jax.vmap(
            lambda x, m: norm(x, scale, bias, m, axis_name="device"), axis_name="device"
        )(x, mask)

    y, vjp, stats = jax.vjp(every, X, SCALE, BIAS, has_aux=True)
    for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    agree((y, jax.tree.map(lambda leaf: leaf[0], stats), *vjp(CT)), whole(X, CT, mask))


def on_mesh(check_vma, mask, **options):
    """Returns the jitted shard_map that gives y, stats and gradients, and its arguments."""
    mesh = jax.make_mesh((N,), ("device",), devices=jax.devices()[:N])
    parts, every = P("device"), P()

    def one(x, ct, mask, scale, bias):
        y, vjp, stats = jax.vjp(
            lambda x, s, b: norm(x, s, b, mask, axis_name="device", **options),
            x,
            scale,
            bias,
            has_aux=True,
        )
        dx, dscale, dbias = vjp(ct)
        if not check_vma:  # there the sum over devices is the caller's
            dscale, dbias = jax.lax.psum((dscale, dbias), "device")
        return y, stats, dx, dscale, dbias

    f = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(parts, parts, parts, every, every),
        out_specs=(parts, every, parts, every, every),
        check_vma=check_vma,
    )
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    args = [put(value, parts) for value in (X, CT)]
    args += [None if mask is None else put(mask, parts), put(SCALE, every), put(BIAS, every)]
    return jax.jit(f), args


@MASKS
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, mask):
    f, args = on_mesh(check_vma, mask)
    agree(f(*args), whole(X, CT, mask))


def collectives(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    return re.findall(r"= .* (all-reduce|all-gather|reduce-scatter|all-to-all)\(", text)


@MASKS
def test_two_all_reduces_for_forward_and_backward(mask):
    f, args = on_mesh(False, mask)
    # The caller's own sum over devices of dscale and dbias travels with the second.
    assert collectives(f, *args) == ["all-reduce"] * 2


@MASKS
def test_one_all_reduce_forward(mask):
    mesh = jax.make_mesh((N,), ("device",), devices=jax.devices()[:N])
    f = jax.shard_map(
        lambda x, mask: norm(x, SCALE, BIAS, mask, axis_name="device"),
        mesh=mesh,
        in_specs=(P("device"), P("device")),
        out_specs=(P("device"), P()),
    )
    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("device")))
    assert collectives(f, put(X), None if mask is None else put(mask)) == ["all-reduce"]


@MASKS
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_plain_jit_with_a_sharded_batch(axis_type, mask):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((N,), ("device",), (kind,), devices=jax.devices()[:N])
    x, ct = X.reshape(-1, 5), CT.reshape(-1, 5)
    flat = None if mask is None else jnp.broadcast_to(mask, X.shape).reshape(-1, 5)

    @jax.jit
    def f(x, ct, mask):
        y, vjp, stats = jax.vjp(lambda *a: norm(*a, mask), x, SCALE, BIAS, has_aux=True)
        return y, stats, *vjp(ct)

    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("device")))
    args = put(x), put(ct), None if flat is None else put(flat)
    ours = f(*args)
    assert ours[0].sharding.spec == P("device", None) or ours[0].sharding.spec == P("device")
    y, stats, dx, *rest = whole(X, CT, mask)
    agree(ours, (y.reshape(-1, 5), stats, dx.reshape(-1, 5), *rest))
    assert "all-gather" not in collectives(f, *args)


GROUPS = pytest.mark.parametrize(
    "groups", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[0], [1, 2, 3]]], ids=str
)


@MASKS
@GROUPS
@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
def test_groups_of_devices_pool_among_themselves(mapped, groups, mask):
    def one(x, m, ct):
        y, vjp, stats = jax.vjp(
            lambda x: norm(x, SCALE, BIAS, m, axis_name="device", axis_index_groups=groups),
            x,
            has_aux=True,
        )
        return y, stats, vjp(ct)[0]

    if mapped == "vmap":
        y, stats, dx = jax.jit(jax.vmap(one, axis_name="device"))(X, mask, CT)
    else:
        mesh = jax.make_mesh((N,), ("device",), devices=jax.devices()[:N])
        put = lambda value: jax.device_put(value, NamedSharding(mesh, P("device")))

        def lifted(x, m, ct):
            out = one(x[0], None if m is None else m[0], ct[0])
            return jax.tree.map(lambda leaf: leaf[None], out)

        f = jax.shard_map(lifted, mesh=mesh, in_specs=P("device"), out_specs=P("device"))
        y, stats, dx = jax.jit(f)(put(X), None if mask is None else put(mask), put(CT))
    y, stats, dx = jax.device_get((y, stats, dx))
    for group in groups:
        index = np.array(group)
        part = None if mask is None else mask[index]
        expected = whole(X[index], CT[index], part)
        agree((y[index], dx[index]), (expected[0], expected[2]))
        for device in group:
            agree(jax.tree.map(lambda leaf, d=device: leaf[d], stats), expected[1])


def test_one_bad_device_in_a_group_does_not_reach_the_other():
    x = X.at[0, 0, 0].set(jnp.nan)
    options = {"axis_name": "device", "axis_index_groups": [[0, 1], [2, 3]]}
    y, _ = jax.vmap(lambda x: norm(x, None, None, None, **options), axis_name="device")(x)
    assert jnp.isnan(y[:2, :, 0]).all()
    assert jnp.isfinite(y[2:]).all()


def test_features_sharded_over_devices():
    x = 50 + jax.random.normal(jax.random.key(2), (6, 32))
    parts = jnp.moveaxis(x.reshape(6, 4, 8), 1, 0)
    for function in (normax.layer_norm, normax.rms_norm):
        one = lambda x, f=function: f(x, axis_name="device")
        y = jax.vmap(one, axis_name="device")(parts)
        agree(jnp.moveaxis(y, 0, 1).reshape(6, 32), function(x))


def test_several_axis_names():
    x = X.reshape(2, 2, 8, 5)
    one = lambda x: norm(x, SCALE, BIAS, None, axis_name=("a", "b"))
    y, _ = jax.vmap(jax.vmap(one, axis_name="b"), axis_name="a")(x)
    agree(y.reshape(X.shape), whole(X, CT, None)[0])


def test_complex_statistics_pool():
    x = jax.lax.complex(X, CT)
    m = jax.vmap(lambda x: normax.moments(x, 0, axis_name="device"), axis_name="device")(x)
    flat = np.asarray(x, np.complex128).reshape(-1, 5)
    np.testing.assert_allclose(m.mean[0], flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(m.var[0], (np.abs(flat - flat.mean(0)) ** 2).mean(0), rtol=1e-5)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_pooled_variance_at_a_large_mean(mean):
    x = mean + jax.random.normal(jax.random.key(3), (8, 64, 3))
    m = jax.vmap(lambda x: normax.moments(x, 0, axis_name="device"), axis_name="device")(x)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(m.var[0], exact.var(0), rtol=4e-6)
    assert m.count[0].tolist() == [512] * 3


@pytest.mark.parametrize("spec", [P(None, None, "d"), P("d"), P(None, "d")], ids=str)
def test_explicit_sharding_of_any_axis(spec):
    mesh = jax.make_mesh((N,), ("d",), devices=jax.devices()[:N])
    x = 5 + jax.random.normal(jax.random.key(2), (8, N, 8))
    put = jax.device_put(x, NamedSharding(mesh, spec))
    scale, stats = jnp.linspace(0.5, 2, 8), normax.RunningStats.create(8)

    def batch(x):
        return normax.batch_norm(x, stats, scale, use_running_average=False, momentum=0.5)

    def group(x):
        return normax.group_norm(x, scale, num_groups=4), None

    for norm in (batch, group):
        for f in (norm, jax.jit(norm)):
            (y, state), (expected, other) = f(put), norm(x)
            assert jax.typeof(y).sharding.spec == jax.typeof(put).sharding.spec
            # The state stays as it was laid out.
            for leaf in jax.tree.leaves(state):
                assert not any(jax.typeof(leaf).sharding.spec)
            agree((np.asarray(y), state), (np.asarray(expected), other))
        dx = jax.jit(jax.grad(lambda x, f=norm: jnp.sum(f(x)[0] ** 3)))
        agree(np.asarray(dx(put)), np.asarray(dx(x)))
