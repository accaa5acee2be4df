"""Batch norm by kernels: those of a TPU, run on CPU by Pallas' interpreter, and native ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_accuracy
from cases import Case
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_implementations import NATIVE, needs_library

import normax
import normax.linen
import normax.nnx
from normax import implementations

BY = "mosaic_tpu"
OF_ITS_PLATFORM = implementations.NAMED[BY]
SHAPE = (4, 6, 16)


@pytest.fixture(autouse=True, scope="module")
def here():
    """Has the kernels run here, by Pallas' interpreter."""
    interpreted = OF_ITS_PLATFORM._replace(platform="cpu", interpret=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(implementations.NAMED, BY, interpreted)
        jax.clear_caches()
        yield
        jax.clear_caches()


@pytest.fixture(params=[BY, NATIVE])
def by(request):
    """Names an implementation that runs here."""
    return request.param


def norm(x, scale, bias, **options):
    """Returns y, and the new statistics where the past has no weight."""
    stats = normax.RunningStats.create(x.shape[-1])
    training = {"use_running_average": False, "momentum": 0.0}
    return normax.batch_norm(x, stats, scale, bias, **training, **options)


def arguments(dtype="float32", shape=SHAPE):
    keys = jax.random.split(jax.random.key(0), 4)
    x, ct = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    scale, bias = (1 + 0.3 * jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return (x + jnp.asarray(3, dtype), scale, bias), ct


def both(ct, **options):
    def function(*args):
        y, backward, stats = jax.vjp(lambda *a: norm(*a, **options), *args, has_aux=True)
        return y, stats.mean, stats.var, *backward(ct)

    return function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_statistics_and_gradients(dtype, by):
    args, ct = arguments(dtype)
    y, mean, var, dx, dscale, dbias = jax.jit(both(ct, implementation=by))(*args)
    assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, jnp.float32)
    case = Case("", None, SHAPE, (0, 1), epsilon=1e-5)
    exact = lambda v: np.asarray(v).astype(np.longdouble)
    xhat = reference.forward(case, args[0])
    limits = test_accuracy.LIMITS[dtype]
    assert test_accuracy.units(y, xhat * exact(args[1]) + exact(args[2]), dtype) <= limits[0]
    moved = reference.backward(case, args[0], exact(ct) * exact(args[1]))
    assert test_accuracy.units(dx, moved, dtype) <= limits[1]
    assert test_accuracy.units(dscale, (exact(ct) * xhat).sum((0, 1)), "float32") <= 32
    assert test_accuracy.units(dbias, exact(ct).sum((0, 1)), "float32") <= 32
    assert test_accuracy.units(mean, exact(args[0]).mean((0, 1)), "float32") <= 4
    assert test_accuracy.units(var, exact(args[0]).var((0, 1)), "float32") <= 4


def test_large_means_large_entries_and_equal_ones(by):
    rng = np.random.default_rng(0)
    for center, deviation in ((1e6, 1), (1e30, 1e29), (0, 1e-4)):
        x = jnp.asarray(rng.normal(size=(64, 16)) * deviation + center, jnp.float32)
        x = x.at[:, 3].set(center)
        y, _ = norm(x, None, None, implementation=by)
        case = Case("", None, x.shape, (0,), epsilon=1e-5)
        assert test_accuracy.units(y, reference.forward(case, x), "float32") <= 4
        np.testing.assert_array_equal(y[:, 3], 0)


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.relu], ids=["silu", "relu"])
def test_with_an_activation(activation, by):
    args, ct = arguments()
    ours, theirs = (
        jax.jit(both(ct, activation=activation, implementation=name))(*args) for name in (by, None)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_forward_mode_and_twice(by):
    args, _ = arguments(shape=(2, 8, 16))
    tangents = tuple(jnp.cos(7 * a) for a in args)
    loss = lambda name: lambda *args: jnp.sum(jnp.cos(norm(*args, implementation=name)[0]))
    along = lambda name: jax.jvp(jax.grad(loss(name), (0, 1, 2)), args, tangents)
    for a, b in zip(jax.tree.leaves(along(by)), jax.tree.leaves(along(None)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_mapped(by):
    args, ct = arguments(shape=(3, 8, 16))
    apart = [
        jax.vmap(lambda x, ct, name=name: both(ct, implementation=name)(x, *args[1:]))
        for name in (by, None)
    ]
    ours, theirs = (jax.jit(f)(args[0], ct) for f in apart)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["hessian", "scan", "remat"])
def test_transformed(transform, by):
    args, ct = arguments(shape=(3, 8, 16))

    def run(name):
        f = lambda *args: norm(*args, implementation=name)[0]
        if transform == "hessian":
            along = lambda t: jnp.sum(jnp.sin(f(args[0] + t[0] + t[1] * args[0] ** 2, *args[1:])))
            return [jax.hessian(along)(jnp.asarray([0.1, 0.3]))]
        over = lambda x, *rest: jax.lax.scan(lambda c, x: (c, f(x, *rest)), 0, x)[1]
        y, pull = jax.vjp(over if transform == "scan" else jax.checkpoint(f), *args)
        return y, *pull(ct)

    for a, b in zip(run(by), run(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@needs_library
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_devices_pool_half_precision(dtype):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = (1000 + 30 * jax.random.normal(jax.random.key(0), (64, 4))).astype(dtype)
    apart = jax.device_put(x, NamedSharding(mesh, P("data")))
    f = jax.jit(functools.partial(normax.normalize_batch, implementation="cpu"))
    for ours, theirs in zip(f(apart)[:2], normax.normalize_batch(x)[:2], strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=1e-2)


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=["batch", "features"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_devices_pool_and_gather_nothing(axis_type, spec, by):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    (x, *lines), ct = arguments()
    x = x * jnp.arange(1.0, 5)[:, None, None] + 1e4 * jnp.arange(4.0)[:, None, None]

    def step(ct, *args, implementation=by):
        f = functools.partial(normax.normalize_batch, implementation=implementation)
        y, backward, m = jax.vjp(f, *args, has_aux=True)
        return y, m.mean, m.var, *backward(ct)

    whole = step(ct, x, *lines, implementation=None)
    with jax.set_mesh(mesh):
        x, ct = jax.device_put((x, ct), NamedSharding(mesh, spec))
        lines = jax.device_put(lines, NamedSharding(mesh, P(*spec[2:])))
        compiled = jax.jit(step).lower(ct, x, *lines).compile()
        parts = compiled(ct, x, *lines)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [normax.linen, normax.nnx])
def test_modules_pass_it_on(module, by):
    (x, *_), _ = arguments()
    options = {"implementation": by, "use_running_average": False}
    if module is normax.linen:
        y, _ = module.BatchNorm(**options).init_with_output(jax.random.key(0), x)
    else:
        y = module.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0), **options)(x)
    np.testing.assert_allclose(y, norm(x, None, None)[0], rtol=1e-5, atol=1e-5)


def test_the_kernels_are_in_the_program_of_their_platform(monkeypatch):
    monkeypatch.setitem(implementations.NAMED, BY, OF_ITS_PLATFORM)
    x = jax.ShapeDtypeStruct((64, 128, 256), jnp.bfloat16)
    f = lambda x: norm(x, None, None, implementation=BY)[0]

    def count(f):
        lowered = jax.jit(f).trace(x).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count("@tpu_custom_call")

    assert count(f) == 1
    assert count(jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32) ** 2))) == 2
    with pytest.raises(NotImplementedError, match="is for tpu alone"):
        jax.jit(f).trace(x).lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("by", [BY, NATIVE])
def test_second_derivatives_where_a_mesh_is_manual_in_part(by):
    x, ct = (jax.random.normal(jax.random.key(i), (32, 8)) + 2 for i in range(2))
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)

    def along(f):
        curved = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * ct))
        return jax.jit(lambda x: jax.jvp(curved, (x,), (ct,))[1])(x)

    def formula(x):
        d = x - x.mean(0, keepdims=True)
        return d / jnp.sqrt(jnp.square(d).mean(0, keepdims=True) + 1e-5)

    def ours(x):
        return normax.normalize_batch(x, epsilon=1e-5, implementation=by)[0]

    with jax.set_mesh(mesh):
        # Each half of the batch has statistics of its own.
        partly = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
        found = along(jax.shard_map(ours, axis_names={"data"}, **partly))
    expected = along(lambda x: jax.vmap(formula)(x.reshape(2, 16, 8)).reshape(x.shape))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [BY, NATIVE])
@pytest.mark.parametrize("size", [1e13, 1e20])
def test_second_derivatives_of_large_entries(by, size):
    x, ct = (np.random.default_rng(i).normal(size=(32, 8)).astype(np.float32) for i in range(2))

    def along(f, size):
        curved = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * ct))
        return jax.jvp(curved, (x * np.float32(size),), (ct * np.float32(size),))[1]

    def formula(x):
        d = x - x.mean(0, keepdims=True)
        return d / jnp.sqrt(jnp.square(d).mean(0, keepdims=True))

    found = along(lambda x: normax.normalize_batch(x, epsilon=1e-5, implementation=by)[0], size)
    # Of x over a size the derivatives are those of x times the size.
    np.testing.assert_allclose(found * size, along(formula, 1), rtol=1e-3, atol=1e-4)


def test_at_inference_a_name_is_all_that_is_asked():
    x, stats = jnp.ones((8, 16)), normax.RunningStats.create(16)
    y, _ = normax.batch_norm(x, stats, use_running_average=True, implementation="mosaic_gpu")
    np.testing.assert_allclose(y, x, rtol=1e-5)
    with pytest.raises(ValueError, match="implementation to be one of"):
        normax.batch_norm(x, stats, use_running_average=True, implementation="triton")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda f, x: f(x, mask=x > 0), "a mask"),
        (lambda f, x: f(x, jnp.ones(8), feature_axes=0), "over axes"),
        (lambda f, x: f(x.astype("float16")), "float16"),
        (lambda f, x: f(x, dtype="float16"), "float16"),
        (lambda f, x: f(x, epsilon=0.0), "epsilon=0.0, below"),
        (lambda f, x: f(x, implementation="mosaic_gpu"), "over axes"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(call, reason):
    f = functools.partial(normax.normalize_batch, implementation=BY)
    with pytest.raises(ValueError, match=f"can do, got .*{reason}"):
        call(f, jnp.ones((8, 16)))
