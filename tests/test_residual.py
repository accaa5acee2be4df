"""A residual added and the sum normalized: by each implementation, and as modules."""

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
from test_implementations import name as name  # a fixture

import normax
import normax.linen
import normax.nnx

NORMS = {"layer": normax.add_layer_norm, "rms": normax.add_rms_norm}
SHAPE = (4, 8, 128)


def arguments(kind, x_dtype="float32", residual_dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 6)
    x, residual, *cts = (jax.random.normal(key, SHAPE) for key in keys[:4])
    scale, bias = (1 + 0.3 * jax.random.normal(key, SHAPE[-1:]) for key in keys[4:])
    args = x.astype(x_dtype), residual.astype(residual_dtype) + 3, scale, bias
    return args if kind == "layer" else args[:3], cts


def both(f, cts):
    """Returns a function that gives y, the sum, and the gradients of all arguments."""

    def function(*args):
        (y, total), backward = jax.vjp(f, *args)
        return y, total, *backward((cts[0].astype(y.dtype), cts[1].astype(total.dtype)))

    return function


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("kind", NORMS)
def test_output_and_gradients(kind, dtypes, name):
    args, cts = arguments(kind, *dtypes)
    f = functools.partial(NORMS[kind], epsilon=1e-5, implementation=name)
    y, total, dx, dresidual, dscale, *dbias = jax.jit(both(f, cts))(*args)
    dtype = jnp.dtype(max(dtypes, key=lambda d: jnp.dtype(d).itemsize))
    assert (y.dtype, total.dtype, dx.dtype, dresidual.dtype) == (dtype, dtype, *dtypes)
    exact = lambda v: np.asarray(v).astype(np.longdouble)
    summed = exact(args[0]) + exact(args[1])
    assert test_accuracy.units(total, summed, dtype) <= 0.5
    case = Case("", None, SHAPE, (2,), centered=kind == "layer", epsilon=1e-5)
    xhat = reference.forward(case, total)
    y_ct, total_ct = (exact(ct.astype(dtype)) for ct in cts)
    scale, bias = exact(args[2]), exact(args[3]) if kind == "layer" else 0
    limits = test_accuracy.LIMITS[dtype.name]
    assert test_accuracy.units(y, xhat * scale + bias, dtype) <= limits[0]
    moved = reference.backward(case, total, y_ct * scale) + total_ct
    # Without a kernel the norm's own cotangent is rounded before that of the sum is added.
    for value, kept in ((dx, dtypes[0]), (dresidual, dtypes[1])):
        assert test_accuracy.units(value, moved, kept) <= limits[1] + 1
    assert test_accuracy.units(dscale, (y_ct * xhat).sum((0, 1)), "float32") <= 32
    for value in dbias:
        assert test_accuracy.units(value, y_ct.sum((0, 1)), "float32") <= 32


@pytest.mark.parametrize("which", [0, 1])
def test_where_one_output_alone_is_used(which, name):
    args, cts = arguments("layer")
    f = lambda *args: normax.add_layer_norm(*args, implementation=name)[which]
    plain = lambda *args: normax.add_layer_norm(*args)[which]
    ours, theirs = (jax.vjp(g, *args)[1](cts[0]) for g in (f, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_forward_mode_and_twice(name):
    args, _ = arguments("layer")
    args = (args[0][:2, :3], args[1][:2, :3], *args[2:])
    tangents = tuple(jnp.cos(7 * a) for a in args)

    def loss(implementation):
        def f(*args):
            y, total = normax.add_layer_norm(*args, implementation=implementation)
            return jnp.sum(jnp.cos(y) + jnp.sin(total) * y)

        return f

    along = lambda by: jax.jvp(jax.grad(loss(by), argnums=(0, 1, 2, 3)), args, tangents)
    for a, b in zip(jax.tree.leaves(along(name)), jax.tree.leaves(along(None)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    ours, theirs = (jax.jvp(loss(by), args[:1] + args[1:], tangents) for by in (name, None))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_mapped(name):
    args, cts = arguments("layer")
    f = functools.partial(normax.add_layer_norm, implementation=name)
    mapped = jax.vmap(f, (0, 0, None, None))
    whole = both(normax.add_layer_norm, cts)(*args)
    for a, b in zip(jax.jit(both(mapped, cts))(*args), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_is_not_gathered(axis_type, name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    args, cts = arguments("layer")
    whole = both(normax.add_layer_norm, cts)(*args)
    f = functools.partial(normax.add_layer_norm, implementation=name)
    step = lambda cts, *args: both(f, cts)(*args)
    with jax.set_mesh(mesh):
        rows, cts = jax.device_put((args[:2], cts), NamedSharding(mesh, P("data")))
        lines = jax.device_put(args[2:], NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(cts, *rows, *lines).compile()
        parts = compiled(cts, *rows, *lines)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["AddLayerNorm", "AddRMSNorm"])
def test_modules(kind, name):
    (x, residual, *_), _ = arguments("layer")
    options = {"implementation": name}
    function = {"AddLayerNorm": normax.add_layer_norm, "AddRMSNorm": normax.add_rms_norm}[kind]
    expected = function(x, residual)
    linen = getattr(normax.linen, kind)(**options)
    found = linen.init_with_output(jax.random.key(0), x, residual)[0]
    nnx_module = getattr(normax.nnx, kind)(x.shape[-1], rngs=nnx.Rngs(0), **options)
    for y in (found, nnx_module(x, residual)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), y, expected
        )


def test_a_module_promotes_the_residual_too():
    x, residual = jnp.ones(SHAPE, jnp.bfloat16), jnp.broadcast_to(jnp.arange(128.0), SHAPE)
    bare = {"use_scale": False, "use_bias": False}
    linen = normax.linen.AddLayerNorm(**bare).apply({}, x, residual=residual)
    ours = normax.nnx.AddLayerNorm(128, rngs=nnx.Rngs(0), **bare)(x, residual)
    for y, total in (linen, ours):
        assert y.dtype == total.dtype == jnp.float32
        np.testing.assert_array_equal(y, normax.add_layer_norm(x, residual)[0])


@pytest.mark.parametrize(
    ("implementation", "platform"), [("mosaic_tpu", "tpu"), ("mosaic_gpu", "cuda")]
)
def test_the_kernels_are_in_the_program_of_their_platform(implementation, platform):
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    f = functools.partial(normax.add_rms_norm, implementation=implementation)
    target = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform]

    def count(f):
        lowered = jax.jit(f).trace(x, x).lower(lowering_platforms=(platform,))
        return lowered.as_text().count(f"@{target}")

    def loss(x, residual):
        y, total = f(x, residual)
        return jnp.sum((y.astype(jnp.float32) * total.astype(jnp.float32)) ** 2)

    assert count(f) == 1
    assert count(jax.grad(loss, argnums=(0, 1))) == 2
    with pytest.raises(NotImplementedError, match=f"is for {platform} alone"):
        jax.jit(f).trace(x, x).lower(lowering_platforms=("cpu",))


def test_a_mask_leaves_the_sum_alone():
    (x, residual, scale, bias), _ = arguments("layer")
    mask = jnp.arange(SHAPE[-1]) < 100
    y, total = normax.add_layer_norm(x, residual, scale, bias, mask=mask)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(y[..., 100:], jnp.broadcast_to(bias[100:], y[..., 100:].shape))
    alone = normax.layer_norm((x + residual)[..., :100], scale[:100], bias[:100])
    np.testing.assert_allclose(y[..., :100], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f, x: f(x, x[0]),
            ValueError,
            r"expected residual.shape == \(8, 128\), got \(128,\)",
        ),
        (lambda f, x: f(x, x.astype(int)), TypeError, "residual .* got int32"),
        (lambda f, x: f(x, x, mask=x > 0, implementation="mosaic_gpu"), ValueError, "a mask"),
        (
            lambda f, x: f(x.astype("bfloat16"), x.astype("float16"), implementation="mosaic_gpu"),
            ValueError,
            "got x of bfloat16 and a residual of float16",
        ),
        (
            lambda f, x: f(x, x, reduction_axes=0, implementation="mosaic_gpu"),
            ValueError,
            "a residual, with groups over axes",
        ),
        (
            lambda f, x: f(x, x, reduction_axes=0, implementation="mosaic_tpu"),
            ValueError,
            "a residual, with groups over axes",
        ),
    ],
)
@pytest.mark.parametrize("kind", NORMS)
def test_bad_calls(kind, call, error, message):
    with pytest.raises(error, match=message):
        call(NORMS[kind], jnp.ones((8, 128)))
