"""Every implementation of the norms of rows: one suite for all, kernels run on CPU."""

import functools
import itertools

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

import normax
import normax.linen
import normax.nnx
from normax import implementations
from normax.kernels import available

needs_library = pytest.mark.skipif(available()["cpu"] is not None, reason=str(available()["cpu"]))
NATIVE = pytest.param("cpu", marks=needs_library)
NAMES = ["xla", "mosaic_gpu", "mosaic_tpu", NATIVE]
NORMS = {"layer": normax.layer_norm, "rms": normax.rms_norm}
SHAPE = (3, 8, 128)


@pytest.fixture(params=NAMES, scope="module")
def name(request):
    """Names an implementation that runs here, or a kernel in its interpreter or stead."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param not in ("xla", "cpu"):
            kernels = implementations.NAMED[request.param]
            here = kernels._replace(platform="cpu", interpret=True)
            if request.param == "mosaic_gpu":
                here = here._replace(rows="row_stand_in", groups="group_stand_in")
            monkeypatch.setitem(implementations.NAMED, request.param, here)
        jax.clear_caches()
        yield request.param
        jax.clear_caches()


def norm_of(kind, name):
    """Returns a norm of (x, scale, bias), with or without a bias."""
    options = {"epsilon": 1e-5, "implementation": name}
    if kind == "rms":
        return lambda x, scale, bias: normax.rms_norm(x, scale, **options)
    return functools.partial(normax.layer_norm, **options)


def arguments(dtype="float32", shape=SHAPE):
    keys = jax.random.split(jax.random.key(0), 4)
    x, ct = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    scale, bias = (1 + 0.3 * jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return (x + jnp.asarray(3, dtype), scale, bias), ct


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NORMS)
def test_output_and_gradients(kind, dtype, name):
    (x, scale, bias), ct = arguments(dtype)
    f = norm_of(kind, name)
    y, backward = jax.jit(lambda *args: jax.vjp(f, *args))(x, scale, bias)
    dx, dscale, dbias = jax.jit(backward)(ct)
    assert y.dtype == dx.dtype == x.dtype
    assert dscale.dtype == dbias.dtype == jnp.float32
    case = Case("", None, SHAPE, (2,), centered=kind == "layer")
    exact = lambda v: np.asarray(v).astype(np.longdouble)
    xhat, weighted = reference.forward(case, x), exact(ct) * exact(scale)
    shifted = exact(bias) if kind == "layer" else 0
    limits = test_accuracy.LIMITS[dtype]
    assert test_accuracy.units(y, xhat * exact(scale) + shifted, dtype) <= limits[0]
    assert test_accuracy.units(dx, reference.backward(case, x, weighted), dtype) <= limits[1]
    assert test_accuracy.units(dscale, (exact(ct) * xhat).sum((0, 1)), "float32") <= 32
    if kind == "layer":
        assert test_accuracy.units(dbias, exact(ct).sum((0, 1)), "float32") <= 32


def test_large_mean_and_large_entries(name):
    f = norm_of("layer", name)
    for mean, deviation in ((1e6, 1), (1e30, 1e29), (0, 1e-4)):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(8, 256)) * deviation + mean, jnp.float32)
        case = Case("", None, x.shape, (1,))
        y = f(x, None, None)
        assert test_accuracy.units(y, reference.forward(case, x), "float32") <= 4


@pytest.mark.parametrize("kind", NORMS)
def test_forward_mode_and_twice(kind, name):
    args, _ = arguments(shape=(2, 8, 128))
    f, plain = norm_of(kind, name), norm_of(kind, None)
    loss = lambda f: lambda *args: jnp.sum(jnp.cos(f(*args)))
    tangents = tuple(jnp.cos(7 * a) for a in args)
    along = lambda f: jax.jvp(jax.grad(loss(f)), args, tangents)
    for ours, theirs in zip(jax.tree.leaves(along(f)), jax.tree.leaves(along(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    for ours, theirs in zip(
        jax.jvp(f, args, tangents), jax.jvp(plain, args, tangents), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_hessian(kind, name):
    (x, scale, bias), _ = arguments(shape=(2, 128))
    along = lambda f: lambda t: jnp.sum(jnp.sin(f(x + t[0] + t[1] * jnp.cos(x), scale, bias)))
    ours, theirs = (
        jax.hessian(along(norm_of(kind, by)))(jnp.asarray([0.1, 0.3])) for by in (name, None)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def gradients(f, ct):
    return lambda *args: jax.tree.leaves((f(*args), jax.vjp(f, *args)[1](ct)))


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_arrays_of_no_entries(kind, shape, name):
    args, ct = arguments(shape=shape)
    y, dx, dscale, *dbias = jax.jit(gradients(norm_of(kind, name), ct))(*args)
    assert y.shape == dx.shape == shape
    for found in (dscale, *dbias):
        np.testing.assert_array_equal(found, np.zeros(shape[-1:]))
    add = functools.partial(normax.add_layer_norm, implementation=name)
    assert [v.shape for v in add(args[0], args[0], *args[1:])] == [shape, shape]


@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_transformed(transform, name):
    args, ct = arguments(shape=(4, 8, 128))
    x, scale, bias = args
    f = norm_of("layer", name)
    if transform == "vmap":
        mapped = jax.vmap(f, (0, None, None))
    elif transform == "scan":
        mapped = lambda x, *rest: jax.lax.scan(lambda c, x: (c, f(x, *rest)), 0, x)[1]
    else:
        mapped = jax.checkpoint(f)
    whole = gradients(norm_of("layer", None), ct)(*args)
    for ours, theirs in zip(jax.jit(gradients(mapped, ct))(x, scale, bias), whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_is_not_gathered(axis_type, name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    (x, scale, bias), ct = arguments(shape=(4, 8, 128))
    whole = gradients(norm_of("layer", None), ct)(x, scale, bias)
    placed = NamedSharding(mesh, P("data"))
    step = lambda x, scale, bias, ct: gradients(norm_of("layer", name), ct)(x, scale, bias)
    with jax.set_mesh(mesh):
        x, ct = jax.device_put((x, ct), placed)
        scale, bias = jax.device_put((scale, bias), NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(x, scale, bias, ct).compile()
        parts = compiled(x, scale, bias, ct)
    assert "all-gather" not in compiled.as_text()
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [normax.linen, normax.nnx])
def test_modules_pass_it_on(module, name):
    (x, *_), _ = arguments()
    options = {"implementation": name}
    if module is normax.linen:
        y, _ = module.LayerNorm(**options).init_with_output(jax.random.key(0), x)
    else:
        y = module.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0), **options)(x)
    np.testing.assert_allclose(y, normax.layer_norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "platform"),
    [("mosaic_tpu", "tpu"), ("mosaic_gpu", "cuda"), pytest.param("cpu", "cpu", marks=NATIVE.marks)],
)
def test_the_kernel_is_in_the_program_of_its_platform_and_none_elsewhere(implementation, platform):
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    f = functools.partial(normax.layer_norm, implementation=implementation)
    target = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu", "cpu": "normax_"}[platform]
    other = "tpu" if platform == "cpu" else "cpu"

    def count(f):
        lowered = jax.jit(f).trace(x).lower(lowering_platforms=(platform,))
        return lowered.as_text().count(f"@{target}")

    assert count(f) == 1
    assert count(jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32) ** 2))) == 2
    assert count(normax.layer_norm) == 0
    with pytest.raises(NotImplementedError, match=f"is for {platform} alone"):
        jax.jit(f).trace(x).lower(lowering_platforms=(other,))


@pytest.mark.parametrize(
    ("implementation", "platforms"),
    [
        *itertools.product(["mosaic_gpu", "mosaic_tpu"], [("cpu",), ("cpu", "rocm")]),
        pytest.param("cpu", ("cuda", "tpu"), marks=NATIVE.marks),
    ],
    ids=str,
)
def test_exported_for_other_platforms_it_is_the_form_there(implementation, platforms):
    """Never in silence."""
    x = jax.random.normal(jax.random.key(0), (16, 256))
    scale = jnp.linspace(0.5, 1.5, 256)

    def step(x, scale, implementation):
        y, pull = jax.vjp(
            lambda *args: normax.layer_norm(*args, implementation=implementation), x, scale
        )
        return y, *pull(jnp.cos(x))

    named = jax.jit(functools.partial(step, implementation=implementation))
    with pytest.warns(
        UserWarning, match=rf"='{implementation}' is for .* alone.* float32\[16, 256\]"
    ):
        exported = jax.export.export(named, platforms=platforms)(x, scale)
    for call in ("mosaic", "normax"):
        assert f"custom_call @{call}" not in exported.mlir_module()
    if "cpu" not in platforms:
        return
    there = jax.export.deserialize(exported.serialize())
    wanted = jax.jit(functools.partial(step, implementation="xla"))(x, scale)
    for ours, theirs in zip(there.call(x, scale), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda f, x: f(x, mask=x > 0), "a mask"),
        (lambda f, x: f(x, reduction_axes=(0, 1)), "over axes"),
        (lambda f, x: f(x, jnp.ones(x.shape), feature_axes=(0, 1)), "parameters of shape"),
        (lambda f, x: f(x, activation=jax.nn.relu), "an activation"),
        (lambda f, x: f(x.astype(jnp.complex64)), "complex"),
    ],
)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu", NATIVE])
def test_what_a_kernel_cannot_do_is_refused(call, reason, implementation):
    f = functools.partial(normax.layer_norm, implementation=implementation)
    with pytest.raises(
        ValueError, match=f"implementation='{implementation}' can do, got .*{reason}"
    ):
        call(f, jnp.ones((8, 128)))


def test_a_program_for_every_platform_at_once():
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 128), jnp.float32)
    step = jax.jit(jax.grad(lambda x: jnp.sum(normax.layer_norm(x) ** 3)))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(x)
    there = jax.export.deserialize(exported.serialize())
    x = jax.random.normal(jax.random.key(0), (5, 128))
    np.testing.assert_allclose(there.call(x), step(x), rtol=1e-5, atol=1e-5)
