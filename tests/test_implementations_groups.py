"""Group and instance norm by kernels: those of a GPU, run on CPU by a stand-in, and native ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_accuracy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_implementations import NATIVE

import normax
import normax.linen
import normax.nnx
from normax import implementations

NORMS = {
    "group": functools.partial(normax.group_norm, num_groups=4),
    "instance": normax.instance_norm,
    "without positions": lambda x, *args, **options: normax.group_norm(
        x.reshape(-1, x.shape[-1]), *args, num_groups=4, **options
    ).reshape(x.shape),
}
SHAPE = (4, 3, 5, 32)
BY = "mosaic_gpu"
OF_ITS_PLATFORM = implementations.NAMED[BY]


@pytest.fixture(autouse=True, scope="module")
def here():
    """Has the kernels run here, by their stand-in."""
    stand_in = {
        "platform": "cpu",
        "interpret": True,
        "groups": "group_stand_in",
        "rows": "row_stand_in",
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(implementations.NAMED, BY, OF_ITS_PLATFORM._replace(**stand_in))
        jax.clear_caches()
        yield
        jax.clear_caches()


@pytest.fixture(params=[BY, NATIVE])
def by(request):
    """Names an implementation that runs here."""
    return request.param


def arguments(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    x, ct = (jax.random.normal(key, SHAPE).astype(dtype) for key in keys[:2])
    scale, bias = (1 + 0.3 * jax.random.normal(key, SHAPE[-1:]) for key in keys[2:])
    return (x + jnp.asarray(3, dtype), scale, bias), ct


def both(f, ct):
    return lambda *args: jax.tree.leaves((f(*args), jax.vjp(f, *args)[1](ct)))


def exact(kind, args, ct, activation):
    """Returns y and the gradients, in float64 and without a kernel or a fused activation."""

    def f(x, scale, bias):
        y = NORMS[kind](x, scale, bias, epsilon=1e-5)
        return y if activation is None else activation(y)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (*args, ct)]
        return [np.asarray(v, np.longdouble) for v in both(f, wide[-1])(*wide[:-1])]


DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("by", "dtype", "activation"),
    [
        *zip([BY] * 3, DTYPES, [None, jax.nn.silu, jax.nn.silu], strict=True),
        *(pytest.param("cpu", dtype, None, marks=NATIVE.marks) for dtype in DTYPES),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("kind", NORMS)
def test_output_and_gradients(kind, by, dtype, activation):
    args, ct = arguments(dtype)
    f = functools.partial(NORMS[kind], epsilon=1e-5, activation=activation, implementation=by)
    y, dx, *of_parameters = jax.jit(both(f, ct))(*args)
    assert y.dtype == dx.dtype == dtype
    expected = exact(kind, args, ct, activation)
    limits = test_accuracy.LIMITS[dtype]
    assert test_accuracy.units(y, expected[0], dtype) <= limits[0]
    assert test_accuracy.units(dx, expected[1], dtype) <= limits[1]
    for value, precise in zip(of_parameters, expected[2:], strict=True):
        assert value.dtype == jnp.float32
        assert test_accuracy.units(value, precise, "float32") <= 32


@pytest.mark.parametrize("only", ["scale", "bias", "neither"])
@pytest.mark.parametrize("kind", NORMS)
def test_with_some_of_the_parameters(kind, only, by):
    (x, scale, bias), ct = arguments()
    parameters = {"scale": (scale, None), "bias": (None, bias), "neither": (None, None)}[only]

    def f(x, name):
        return NORMS[kind](x, *parameters, implementation=name)

    ours, theirs = (jax.jit(both(lambda x, name=name: f(x, name), ct))(x) for name in (by, None))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_entries_of_any_size(size, epsilon, by):
    (x, *_), _ = arguments()
    y = NORMS["group"](x * size, epsilon=epsilon, implementation=by)
    theirs = NORMS["group"](x * size, epsilon=epsilon)
    np.testing.assert_allclose(y, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["group", "instance"])
@pytest.mark.parametrize("shape", [(0, *SHAPE[1:]), (2, 0, SHAPE[-1])])
def test_an_empty_batch(shape, kind, by):
    args = jnp.zeros(shape), jnp.ones(SHAPE[-1]), jnp.zeros(SHAPE[-1])
    f = functools.partial(NORMS[kind], implementation=by)
    y, dx, dscale, dbias = both(f, jnp.zeros(shape))(*args)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dscale + dbias, jnp.zeros(SHAPE[-1]))


@pytest.mark.parametrize("kind", ["group", "instance"])
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat", "twice"])
def test_transformed(transform, kind, by):
    args, ct = arguments()
    f = lambda x, *rest: NORMS[kind](x, *rest, implementation=by)
    plain = lambda x, *rest: NORMS[kind](x, *rest)
    if transform == "twice":
        twice = lambda f: jax.jvp(
            lambda *args: jax.grad(lambda *args: jnp.sum(jnp.cos(f(*args))), (0, 1, 2))(*args),
            args,
            tuple(jnp.cos(7 * a) for a in args),
        )
        ours, theirs = twice(f), twice(plain)
    else:
        mapped = {
            "vmap": jax.vmap(lambda x, *rest: f(x[None], *rest)[0], (0, None, None)),
            "scan": lambda x, *rest: jax.lax.scan(lambda c, x: (c, f(x[None], *rest)[0]), 0, x)[1],
            "remat": jax.checkpoint(f),
        }[transform]
        ours, theirs = jax.jit(both(mapped, ct))(*args), both(plain, ct)(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spec", [P("data"), P(None, None, None, "data")], ids=["batch", "groups"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_is_sharded_is_not_gathered(axis_type, spec, by):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:4])
    args, ct = arguments()
    whole = both(NORMS["group"], ct)(*args)
    f = functools.partial(NORMS["group"], implementation=by)
    step = lambda ct, *args: both(f, ct)(*args)
    with jax.set_mesh(mesh):
        x, ct = jax.device_put((args[0], ct), NamedSharding(mesh, spec))
        lines = jax.device_put(args[1:], NamedSharding(mesh, P(*spec[3:])))
        compiled = jax.jit(step).lower(ct, x, *lines).compile()
        parts = compiled(ct, x, *lines)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [normax.linen, normax.nnx])
def test_modules_pass_it_on(module):
    (x, *_), _ = arguments()
    options = {"implementation": BY, "activation": jax.nn.relu}
    for norm, more in ((module.GroupNorm, {"num_groups": 8}), (module.InstanceNorm, {})):
        if module is normax.linen:
            y, _ = norm(**options, **more).init_with_output(jax.random.key(0), x)
        else:
            y = norm(x.shape[-1], rngs=nnx.Rngs(0), **options, **more)(x)
        function = normax.group_norm if more else normax.instance_norm
        np.testing.assert_allclose(y, jax.nn.relu(function(x, **more)), rtol=1e-5, atol=1e-5)


def test_the_kernel_is_in_the_program_of_its_platform_and_none_elsewhere(monkeypatch):
    monkeypatch.setitem(implementations.NAMED, BY, OF_ITS_PLATFORM)
    x = jax.ShapeDtypeStruct((8, 16, 16, 128), jnp.bfloat16)
    f = functools.partial(normax.group_norm, num_groups=32, implementation=BY)

    def count(f):
        lowered = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@mosaic_gpu")

    assert count(f) == 1
    assert count(jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32) ** 2))) == 2
    assert count(functools.partial(normax.group_norm, num_groups=32)) == 0
    with pytest.raises(NotImplementedError, match="is for cuda alone"):
        jax.jit(f).trace(x).lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: NORMS["group"](x, mask=x > 0, implementation=BY), "a mask"),
        (lambda x: NORMS["instance"](x, feature_axes=1, implementation=BY), r"over axes \(2, 3\)"),
        (
            lambda x: normax.group_norm(x, num_groups=4, feature_axes=1, implementation=BY),
            r"over axes \(2, 3, 4\)",
        ),
        (lambda x: NORMS["group"](x, implementation="mosaic_tpu"), r"over axes \(1, 2, 4\)"),
        (lambda x: NORMS["group"](jnp.ones((2, 512, 512, 64)), implementation=BY), "262144"),
        (lambda x: NORMS["group"](x, activation=jax.nn.softplus, implementation=BY), "log1p"),
        pytest.param(
            lambda x: NORMS["group"](x, activation=jax.nn.silu, implementation="cpu"),
            "an activation",
            marks=NATIVE.marks,
        ),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(call, reason):
    with pytest.raises(ValueError, match=f"can do, got .*{reason}"):
        call(jnp.ones((2, 8, 8, 32)))
