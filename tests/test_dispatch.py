"""One function on one platform, another on another, in every transformation and when exported."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waves
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from waves import WAVES, backward, close, kernel_wave, plain, wave

from normax.kernels import primitive as pr
from normax.kernels.dispatch import by_platform

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


@pytest.fixture
def arrays():
    return waves.arrays()


def both(x, power):
    return x * power, x + power


def no_such_kernel(x, power):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = jax.ffi.ffi_call("no_such_kernel", (shape, shape))(x)
    return y[0] * power, y[1]


def not_traced(*operands):
    raise AssertionError("traced for a platform that the program is not lowered for")


def test_the_platform_chooses(arrays):
    x, _ = arrays
    here = by_platform(not_tripled, cpu=tripled, cuda=not_traced)
    close(here(x), 3 * np.asarray(x))
    close(jax.jit(here)(x), 3 * np.asarray(x))
    close(by_platform(tripled, cuda=not_traced)(x), 3 * np.asarray(x))
    close(by_platform(tripled)(x), 3 * np.asarray(x))
    close(jax.vmap(here, 1, 1)(x), 3 * np.asarray(x))
    close(jax.lax.map(here, x), 3 * np.asarray(x))
    with jax.disable_jit():
        close(here(x), 3 * np.asarray(x))


def tripled(x):
    return 3 * x


def not_tripled(x):
    return 4 * x


@pytest.mark.parametrize("symbolic", [True, False])
def test_exported_for_all_platforms_at_once(symbolic):
    function = by_platform(both, cuda=no_such_kernel)
    rows = export.symbolic_shape("rows")[0] if symbolic else 3
    x = jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    power = jax.ShapeDtypeStruct((), jnp.float32)
    allowed = [export.DisabledSafetyCheck.custom_call("no_such_kernel")]
    exported = export.export(jax.jit(function), platforms=PLATFORMS, disabled_checks=allowed)
    exported = exported(x, power)
    assert len(re.findall("custom_call @no_such_kernel", exported.mlir_module())) == 1
    again = export.deserialize(exported.serialize())
    x = jnp.ones((3, 4))
    close(again.call(x, jnp.float32(2)), both(np.asarray(x), 2.0))


def test_gradients_are_exported_for_all_platforms_at_once(arrays):
    def gradient(x, scale):
        return jax.grad(lambda x, scale: wave(x, scale).sum(), (0, 1))(x, scale)

    x, scale = arrays
    rows = export.symbolic_shape("rows")[0]
    symbolic = jax.ShapeDtypeStruct((rows, 4, 6), jnp.float32)
    exported = export.export(jax.jit(gradient), platforms=PLATFORMS)(symbolic, scale)
    close(
        export.deserialize(exported.serialize()).call(x, scale), backward(arrays, np.ones(x.shape))
    )


def test_derivatives_are_those_of_the_default(x64):
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    function = by_platform(jnp.sin, cpu=lambda x: jnp.sin(x))
    for transform in (jax.jit, jax.checkpoint, jax.vmap, lambda f: f):
        check_grads(transform(function), (x,), order=2)
    odd = by_platform(tripled, cpu=not_tripled)
    y, dy = jax.jvp(odd, (x,), (x,))
    close((y, dy), (4 * x, 3 * x))
    close(jax.linear_transpose(odd, x)(x), 3 * x)


def test_integers_have_no_derivative(arrays):
    x, _ = arrays
    function = by_platform(lambda x, i: (x * 2, i + 1), cpu=lambda x, i: (x * 2, i + 1))
    gradient = jax.grad(lambda x: function(x, jnp.arange(3))[0].sum())(x)
    close(gradient, np.full(x.shape, 2.0))
    _, (_, di) = jax.jvp(lambda x: function(x, jnp.arange(3)), (x,), (x,))
    assert di.dtype == jax.dtypes.float0


@pytest.mark.parametrize("in_axes", [(0, None), (1, None), (None, 0), (2, 0)])
def test_batching_is_a_loop(arrays, in_axes):
    x, scale = arrays
    x, scale = (x, scale) if in_axes[0] is not None else (x[0], jnp.stack([scale, 2 * scale]))
    mapped = jax.vmap(by_platform(plain, cpu=plain), in_axes)
    close(mapped(x, scale), jax.vmap(plain, in_axes)(x, scale), 0)
    close(jax.jit(mapped)(x, scale), jax.vmap(plain, in_axes)(x, scale))


def test_collectives_over_a_mapped_axis(arrays):
    x, scale = arrays
    function = by_platform(centred, cuda=not_traced)
    wanted = np.asarray(x) - np.asarray(x).mean(0)
    close(jax.vmap(function, axis_name="i")(x), wanted)
    close(jax.vmap(jax.vmap(function, axis_name="i"), 1, 1, axis_name="j")(x), wanted)
    total = by_platform(lambda x: jax.lax.psum(x, "i"), cuda=not_traced)
    # Nothing is batched, and still the sum is over eight.
    close(jax.vmap(lambda _: total(scale), axis_name="i")(x)[0], 8 * np.asarray(scale))


def centred(x):
    return x - jax.lax.pmean(x, "i")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_collectives_over_a_mesh(arrays, check_vma, transform):
    x, _ = arrays
    function = by_platform(centred, cuda=not_traced)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=check_vma
    )
    close(transform(mapped)(x), np.asarray(x) - np.asarray(x).mean(0))


def test_a_second_call_compiles_nothing(arrays):
    x, _ = arrays
    traces = []

    def scaled(factor, x):
        traces.append(factor)
        return x * factor

    def call():
        return by_platform(functools.partial(scaled, 2), cuda=functools.partial(scaled, 3))(x)

    def mapped():
        function = by_platform(functools.partial(scaled, 2), cuda=functools.partial(scaled, 3))
        return jax.vmap(function)(x)

    for run in (call, mapped):
        run()
        assert traces
        assert set(traces) == {2}
        traces.clear()
        run()
        assert not traces


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap], ids=["plain", "vmap"])
def test_outputs_that_nobody_uses_are_dropped(arrays, transform):
    x, _ = arrays
    default = lambda x: (x * 4, {"other": jnp.cos(x)})
    chosen = transform(by_platform(default, cpu=lambda x: (x * 2, {"other": jnp.sin(x)})))
    first, other = lambda x: chosen(x)[0], lambda x: chosen(x)[1]["other"]
    close(jax.jit(first)(x), 2 * np.asarray(x))
    close(jax.jit(other)(x), np.sin(np.asarray(x)))
    close(other(x), np.sin(np.asarray(x)))
    for function, used in ((first, (True, False)), (other, (False, True))):
        needed = pr.without_dead_code(lambda x, function=function: [function(x)])
        [equation] = jax.make_jaxpr(needed)(x).eqns
        assert equation.params["used"] == used
        assert len(equation.outvars) == 1
        compiled = jax.jit(function).lower(x).compile().as_text()
        assert ("sine" in compiled) == used[1]
    assert "sine" not in jax.jit(lambda x: (x, first(x), other(x))[0]).lower(x).as_text()


def scanned(function, x, scale):
    return jax.lax.scan(lambda x, _: (function(x, scale), None), x, None, length=2)[0]


def chosen_at_run_time(function, x, scale):
    return jax.lax.cond(x[0, 0, 0] > -9, function, lambda x, scale: x, x, scale)


CONTROL = {
    "scan": scanned,
    "cond": chosen_at_run_time,
    "remat": lambda function, *args: jax.checkpoint(function)(*args),
    "map": lambda function, x, scale: jax.lax.map(lambda x: function(x, scale), x),
    "vmap": lambda function, x, scale: jax.vmap(function, (1, None), 1)(x, scale),
}


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("which", ["wave", "kernel_wave"])
def test_within_control_flow(arrays, which, name):
    def gradient(function):
        return jax.grad(lambda *args: CONTROL[name](function, *args).sum(), (0, 1))

    close(CONTROL[name](WAVES[which], *arrays), CONTROL[name](plain, *arrays))
    close(jax.jit(gradient(WAVES[which]))(*arrays), gradient(plain)(*arrays), 1e-4)


def test_within_a_while_loop(arrays):
    x, scale = arrays
    step = lambda carry: (carry[0] + 1, kernel_wave(carry[1], scale))
    close(jax.lax.while_loop(lambda carry: carry[0] < 1, step, (0, x))[1], plain(x, scale))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[:1], r"cpu .*\(8, 4, 6\).*, got \(\(1, 4, 6\)"),
        (lambda x: x.astype(jnp.bfloat16), "float32.*, got.*bfloat16"),
        (lambda x: (x, x), r"PyTreeDef\(\*\), got"),
        (lambda x: None, r"PyTreeDef\(\*\), got PyTreeDef\(None\)"),
    ],
)
def test_a_branch_that_returns_something_else_is_refused(arrays, wrong, message):
    with pytest.raises(TypeError, match=message):
        by_platform(tripled, cpu=wrong)(arrays[0])


def test_arrays_are_no_static_arguments(arrays):
    with pytest.raises(TypeError, match="hashed"):
        by_platform(tripled, cpu=functools.partial(plain, arrays[0]))
