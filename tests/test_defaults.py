"""What is taken where no implementation is named: a kernel where one was measured faster, else XLA.

A CPU stands in for a Hopper GPU, and the arithmetic of the kernels for the kernels.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import row_stand_in
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax
from normax import defaults, implementations
from normax.kernels import dispatch
from normax.kernels import primitive as pr

SHAPE = (8, 256)


@pytest.fixture
def taken(monkeypatch):
    """Has CPUs be the kind of device that has a default, and lists the kernels that are taken."""
    found = set()

    def noted(name):
        function = getattr(row_stand_in, name)

        def kernel(*args, **options):
            found.add(name)
            return function(*args, **options)

        return kernel

    def kind(platform, ctx):
        exported = ctx.module_context.lowering_parameters.for_export
        return "hopper" if platform == "cpu" and not exported and pr.is_alone(ctx) else None

    for name in ("forward", "backward"):
        monkeypatch.setattr(row_stand_in, name, noted(name))
    here = implementations.NAMED["mosaic_gpu"]._replace(
        rows="row_stand_in", platform="cpu", interpret=True
    )
    monkeypatch.setitem(implementations.NAMED, "mosaic_gpu", here)
    monkeypatch.setattr(defaults, "KERNELS", {"hopper": "mosaic_gpu"})
    monkeypatch.setattr(pr, "KINDS", {"hopper": "cpu"})
    monkeypatch.setattr(pr, "kind", kind)
    # What was lowered before knows no such kind.
    dispatch._primitive.cache_clear()
    jax.clear_caches()
    yield found
    dispatch._primitive.cache_clear()
    jax.clear_caches()


def arguments(shape=SHAPE, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    x, ct = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
    scale, bias = (1 + 0.3 * jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return (x, scale, bias), ct


def both(f, ct):
    def call(*args):
        y, pull = jax.vjp(f, *args)
        return y, *pull(ct)

    return call


def plain(f, ct, args):
    """Returns the same by XLA, named."""
    return jax.jit(both(functools.partial(f, implementation="xla"), ct))(*args)


def close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_long_rows_both_ways(taken):
    args, ct = arguments()
    found = jax.jit(both(normax.layer_norm, ct))(*args)
    assert taken == {"forward", "backward"}
    taken.clear()
    close(found, plain(normax.layer_norm, ct, args))
    assert not taken, 'implementation="xla" is XLA everywhere'


@pytest.mark.parametrize("f", [normax.rms_norm, normax.layer_norm])
def test_short_rows_xla_brings_forward_faster(taken, f):
    (x, scale, _), ct = arguments((8, 64))
    found = jax.jit(both(f, ct))(x, scale)
    assert taken == {"backward"}
    close(found, plain(f, ct, (x, scale)))


def test_one_sum_of_a_row_xla_fuses_with_what_follows(taken):
    (x, scale, _), ct = arguments()
    y = jax.jit(normax.rms_norm)(x, scale)
    assert not taken
    found = jax.jit(both(normax.rms_norm, ct))(x, scale)
    assert taken == {"forward", "backward"}
    close([y, *found], [found[0], *plain(normax.rms_norm, ct, (x, scale))])


@pytest.mark.parametrize(
    "options",
    [
        {"mask": jnp.arange(8)[:, None] < 5},
        {"activation": jax.nn.gelu},
        {"reduction_axes": 0, "feature_axes": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernel_cannot_have(taken, options):
    args, _ = arguments()
    if "reduction_axes" in options:
        args = args[0], args[1][:256], args[2][:256]
    jax.grad(lambda *args: jnp.sum(normax.layer_norm(*args, **options)))(*args)
    assert not taken


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPE, "float16"), ((8, 260), "float32"), ((1, 65536), "bfloat16")]
)
def test_what_was_not_timed(taken, shape, dtype):
    (x, scale, bias), ct = arguments(shape, dtype)
    jax.jit(both(normax.layer_norm, ct))(x, scale, bias)
    assert not taken


def test_with_and_of_float64(taken, x64):
    args, _ = arguments(dtype="float64")
    jax.grad(lambda x: jnp.sum(normax.layer_norm(x)))(args[0])
    assert not taken
    jax.grad(lambda x: jnp.sum(normax.layer_norm(x)))(args[0].astype("float32"))
    assert taken == {"forward", "backward"}


def test_a_kernel_that_jax_has_no_more(taken, monkeypatch):
    """What it is written in may change in any version; then it is as if there were none."""
    gone = implementations.NAMED["mosaic_gpu"]._replace(rows="normax.kernels.gone")
    monkeypatch.setitem(implementations.NAMED, "mosaic_gpu", gone)
    args, ct = arguments()
    found = jax.jit(both(normax.layer_norm, ct))(*args)
    close(found, plain(normax.layer_norm, ct, args))


def test_rows_that_are_spread_over_devices(taken):
    (x, scale, bias), ct = arguments()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed, moved = (jax.device_put(v, P("data", "model")) for v in (x, ct))
        lines = [jax.device_put(v, P("model")) for v in (scale, bias)]
        call = jax.jit(lambda ct, *args: both(normax.layer_norm, ct)(*args))
        text = call.lower(moved, placed, *lines).compile().as_text()
    assert not taken
    assert "all-gather" not in text


def test_a_partitioner_would_gather_what_it_cannot_look_into(taken):
    (x, scale, bias), ct = arguments()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    call = jax.jit(both(normax.layer_norm, ct))
    text = call.lower(placed, scale, bias).compile().as_text()
    assert not taken
    assert "all-gather" not in text
    close(call(placed, scale, bias), plain(normax.layer_norm, ct, (x, scale, bias)))


def test_explicit_axes_and_manual_ones(taken):
    (x, scale, bias), ct = arguments()
    wanted = plain(normax.layer_norm, ct, (x, scale, bias))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed, moved = (jax.device_put(v, P("data")) for v in (x, ct))
        lines = [jax.device_put(v, P(None)) for v in (scale, bias)]
        call = jax.jit(lambda ct, *args: both(normax.layer_norm, ct)(*args))
        text = call.lower(moved, placed, *lines).compile().as_text()
        assert taken == {"forward", "backward"}
        assert "all-gather" not in text
        close(call(moved, placed, *lines), wanted)
    taken.clear()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        normax.layer_norm, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data")
    )
    close([jax.jit(mapped)(x, scale, bias)], wanted[:1])
    assert taken == {"forward"}


def test_an_exported_program_is_for_any_device(taken):
    args, _ = arguments()
    exported = jax.export.export(jax.jit(normax.layer_norm))(*args)
    assert not taken
    close([exported.call(*args)], [normax.layer_norm(*args, implementation="xla")])


def test_mapped_and_differentiated_twice(taken):
    (x, scale, bias), ct = arguments((4, *SHAPE))
    f = jax.vmap(normax.layer_norm, (0, None, None))
    by_xla = functools.partial(normax.layer_norm, implementation="xla")
    found = jax.jit(both(f, ct))(x, scale, bias)
    assert not taken, "it was not timed, and a grid has no room for many examples"
    close(found, jax.jit(both(by_xla, ct))(x, scale, bias))
    along = lambda f: lambda t: jnp.sum(jnp.sin(f(x[0] + t * jnp.cos(x[0]), scale, bias)))
    close(
        [jax.hessian(along(normax.layer_norm))(jnp.float32(0.3))],
        [jax.hessian(along(by_xla))(jnp.float32(0.3))],
    )


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("length", [64, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_themselves_lower(dtype, length, wide, monkeypatch):
    """On every version of JAX, whatever the width of its integers."""

    def kind(platform, ctx):
        return "hopper" if platform == "cuda" and pr.is_alone(ctx) else None

    monkeypatch.setattr(pr, "kind", kind)
    monkeypatch.setattr(defaults, "KERNELS", {"hopper": "mosaic_gpu"})
    with jax.enable_x64(wide):
        x = jax.ShapeDtypeStruct((300, length), dtype)
        line = jax.ShapeDtypeStruct((length,), "float32")

        def count(f):
            call = jax.jit(lambda x, ct, *lines: both(f, ct)(x, *lines))
            lowered = call.trace(x, x, line, line).lower(lowering_platforms=("cuda",))
            return lowered.as_text().count("custom_call @mosaic_gpu")

        assert count(normax.layer_norm) == (2 if length >= 256 else 1)
        assert count(jax.vmap(normax.layer_norm, (0, None, None))) == 0


def context(capabilities=("9.0",), exported=False, axes=None):
    devices = [types.SimpleNamespace(compute_capability=each) for each in capabilities]
    backend = types.SimpleNamespace(local_devices=lambda: devices)
    return types.SimpleNamespace(
        avals_in=[],
        module_context=types.SimpleNamespace(
            backend=backend,
            lowering_parameters=types.SimpleNamespace(for_export=exported),
            axis_context=axes or types.SimpleNamespace(num_devices=1),
        ),
    )


def test_which_devices_are_of_that_kind():
    assert pr.kind("cuda", context()) == "hopper"
    assert pr.kind("rocm", context()) is None
    assert pr.kind("cuda", context(["8.0"])) is None
    assert pr.kind("cuda", context(["9.0", "10.0"])) is None
    assert pr.kind("cuda", context(exported=True)) is None
    assert pr.kind("cuda", context(axes=types.SimpleNamespace(num_devices=2))) is None
    mesh = types.SimpleNamespace(axis_names=("a", "b"))
    for manual, kind in ((("a", "b"), "hopper"), (("a",), None)):
        axes = types.SimpleNamespace(mesh=mesh, manual_axes=frozenset(manual))
        assert pr.kind("cuda", context(axes=axes)) == kind
