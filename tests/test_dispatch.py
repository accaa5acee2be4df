"""The three tools of kernels: dispatch by platform, transposes by hand, sharding by rule."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from normax.kernels.dispatch import by_platform
from normax.kernels.linear import linear
from normax.kernels.sharding import sharded

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


def both(x, power):
    return x * power, x + power


def no_such_kernel(x, power):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = jax.ffi.ffi_call("no_such_kernel", (shape, shape))(x)
    return y[0] * power, y[1]


def not_traced(*operands):
    raise AssertionError("traced for a platform that the program is not lowered for")


def forward(residuals, dx, dscale):
    x, scale = residuals
    moves = jnp.zeros_like(x)
    if dx is not None:
        moves += jnp.cos(x) * jnp.broadcast_to(scale, x.shape) * dx
    if dscale is not None:
        moves += jnp.sin(x) * jnp.broadcast_to(dscale, x.shape)
    return moves


def backward(residuals, dy):
    x, scale = residuals
    dscale = jnp.sum(jnp.sin(x) * dy, range(x.ndim - scale.ndim))
    return jnp.cos(x) * jnp.broadcast_to(scale, x.shape) * dy, dscale


def kernel(body, shapes, *operands):
    """A stand-in for a kernel: rows of any number, an opaque call with no derivative."""
    whole = [operand[None] if operand.ndim == 1 else operand for operand in operands]

    def run(*refs):
        outputs = body(*(ref[...] for ref in refs[: len(whole)]))
        for ref, out in zip(refs[len(whole) :], outputs, strict=True):
            ref[...] = out

    types = [jax.ShapeDtypeStruct(shape, operands[0].dtype, **vma(operands[0])) for shape in shapes]
    return pl.pallas_call(run, out_shape=types, interpret=True)(*whole)


def vma(x):
    return {"manual_axis_type": jax.typeof(x).manual_axis_type}


def by_rows(x):
    return x.reshape(-1, x.shape[-1])


def forward_kernel(x, scale):
    rows = by_rows(x)
    (y,) = kernel(lambda x, scale: [jnp.sin(x) * scale], [rows.shape], rows, scale)
    return y.reshape(x.shape)


def backward_kernel(x, scale, dy):
    def body(x, scale, dy):
        return jnp.cos(x) * scale * dy, jnp.sum(jnp.sin(x) * dy, 0, keepdims=True)

    rows = by_rows(x)
    shapes = [rows.shape, (1, x.shape[-1])]
    dx, dscale = kernel(body, shapes, rows, scale, by_rows(dy))
    return dx.reshape(x.shape), dscale[0]


def plain(x, scale):
    return jnp.sin(x) * jnp.broadcast_to(scale, x.shape)


forward_sharded = sharded(forward_kernel, "... d, d -> ... d", whole="d")
backward_sharded = sharded(backward_kernel, "... d, d, ... d -> ... d, d", whole="d")


def backward_on_cpu(residuals, dy):
    return by_platform(backward, cpu=lambda residuals, dy: backward_sharded(*residuals, dy))(
        residuals, dy
    )


def moves_of(tangents):
    return tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)


@jax.custom_jvp
def wave(x, scale):
    return by_platform(plain, tpu=plain)(x, scale)


@functools.partial(wave.defjvp, symbolic_zeros=True)
def _wave_jvp(primals, tangents):
    return wave(*primals), linear(forward, backward, primals, moves_of(tangents))


@jax.custom_jvp
def kernel_wave(x, scale):
    return by_platform(plain, cpu=forward_sharded)(x, scale)


@functools.partial(kernel_wave.defjvp, symbolic_zeros=True)
def _kernel_wave_jvp(primals, tangents):
    moves = linear(forward, backward_on_cpu, primals, moves_of(tangents))
    return kernel_wave(*primals), moves


WAVES = {"wave": wave, "kernel_wave": kernel_wave}


@pytest.fixture
def arrays():
    return jax.random.normal(jax.random.key(0), (8, 4, 6)), jnp.arange(1.0, 7.0)


def close(got, wanted, tolerance=2e-5):
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), tolerance, tolerance)


# Dispatch.


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
        check_grads(transform(function), (x,), order=3)
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


def test_outputs_that_nobody_uses_are_dropped(arrays):
    x, _ = arrays
    told = []

    def function(x, used=None):
        told.append(used)
        return x * 2, {"other": None if used and not used[1] else jnp.sin(x)}

    default = lambda x: (x * 2, {"other": jnp.sin(x)})
    chosen = by_platform(default, cpu=function, tell_used=True)
    text = jax.jit(lambda x: chosen(x)[0]).lower(x).as_text()
    assert "sine" not in text
    assert told == [(True, False)]
    close(jax.jit(lambda x: chosen(x)[0])(x), 2 * np.asarray(x))
    close(jax.jit(lambda x: jax.vmap(chosen)(x)[0])(x), 2 * np.asarray(x))
    assert told[-1] == (True, False)
    close(jax.jit(lambda x: chosen(x)[1]["other"])(x), np.sin(np.asarray(x)))
    close(chosen(x)[1]["other"], np.sin(np.asarray(x)))


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
        (lambda x: None, "an array"),
    ],
)
def test_a_branch_that_returns_something_else_is_refused(arrays, wrong, message):
    with pytest.raises(TypeError, match=message):
        by_platform(tripled, cpu=wrong)(arrays[0])


def test_arrays_are_no_static_arguments(arrays):
    with pytest.raises(TypeError, match="hashed"):
        by_platform(tripled, cpu=functools.partial(plain, arrays[0]))


# Linear functions.


TRANSFORMS = {
    "eager": lambda function: function,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "rows": lambda function: jax.vmap(function, (0, None)),
    "columns": lambda function: jax.vmap(function, (1, 0), 1),
    "scales": lambda function: jax.vmap(function, (None, 1)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_all_orders(x64, name):
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    scale = jnp.arange(1.0, 5.0)
    if name == "scales":
        scale = jnp.stack([scale, 2 * scale], 1)
    function = TRANSFORMS[name](wave)
    check_grads(function, (x, scale), order=2)
    check_grads(jax.jit(lambda x: function(x, scale)), (x,), order=3)
    check_grads(jax.jit(lambda scale: function(x, scale)), (scale,), order=2)


def test_hessians(x64):
    x, scale = jax.random.normal(jax.random.key(0), (2, 4), jnp.float64), jnp.arange(1.0, 5.0)
    wanted = jax.hessian(lambda *args: plain(*args).sum(), (0, 1))(x, scale)
    loss = lambda *args: wave(*args).sum()
    both_arguments = lambda derivative: functools.partial(derivative, argnums=(0, 1))
    forth, back = both_arguments(jax.jacfwd), both_arguments(jax.jacrev)
    for outer in (forth, back):
        for inner in (forth, back):
            close(outer(inner(loss))(x, scale), wanted, 1e-12)


def test_the_transpose_is_the_one_given(arrays):
    x, _ = arrays
    wrong = lambda residuals, dy: (2 * dy,)
    function = lambda dx: linear(lambda residuals, dx: residuals * dx, wrong, x, (dx,))
    dx = jnp.ones(x.shape)
    close(function(dx), x)
    once = jax.linear_transpose(function, dx)
    close(once(dx), 2 * dx)
    # Transposed twice it is the function, which is not the transpose's own transpose.
    close(jax.linear_transpose(lambda dy: once(dy)[0], dx)(dx), x)
    # The transpose of what is batched is batched, and sums over what is not.
    times = lambda x, dx: linear(plain_times, wrong, x, (dx,))
    mapped = lambda dx: jax.vmap(times)(x, dx)
    close(jax.linear_transpose(mapped, dx)(dx), 2 * dx)
    shared = lambda dx: jax.vmap(times, (0, None))(x, dx)
    close(jax.linear_transpose(shared, dx[0])(dx), 2 * np.asarray(dx).sum(0))


def plain_times(residuals, dx):
    return residuals * dx


def test_operands_that_are_zero_are_dropped(arrays):
    seen = []

    def function(residuals, dx, dscale):
        seen.append((dx is None, dscale is None))
        return forward(residuals, dx, dscale)

    def transposed(residuals, dy):
        return by_platform(backward, cpu=told, tell_used=True)(residuals, dy)

    def told(residuals, dy, used=(True, True)):
        seen.append(used)
        return tuple(
            ct if use else None for ct, use in zip(backward(residuals, dy), used, strict=True)
        )

    x, scale = arrays
    apply = lambda dx, dscale: linear(function, transposed, (x, scale), (dx, dscale))
    close(jax.jvp(lambda dx: apply(dx, scale), (x,), (x,))[1], forward(arrays, x, None))
    assert set(seen) == {(False, False), (False, True)}
    seen.clear()
    close(jax.linear_transpose(lambda dx: apply(dx, None), x)(x), backward(arrays, x)[0])
    assert set(seen) == {(False, True), (True, False)}
    with pytest.raises(ValueError, match="not None"):
        apply(None, None)


def test_a_cotangent_of_another_type_is_refused(arrays):
    x, _ = arrays
    for wrong in (lambda r, dy: (dy[:1],), lambda r, dy: dy, lambda r, dy: (dy, dy)):
        function = lambda dx, wrong=wrong: linear(plain_times, wrong, x, (dx,))
        with pytest.raises(TypeError, match="`transposed` to return"):
            jax.linear_transpose(function, x)(x)


@pytest.mark.parametrize("which", ["wave", "kernel_wave"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_only_the_residuals_are_kept(arrays, which, transform):
    x, scale = arrays
    _, back = jax.vjp(transform(WAVES[which]), x, scale)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(back)}
    assert sorted(leaf.shape for leaf in kept.values()) == [scale.shape, x.shape]


# Sharding.


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
    ones = lambda x: (x, jnp.ones(x.shape).sum(0))
    function = sharded(
        lambda x: kernel(lambda x: (x, jnp.ones_like(x).sum(0)), [x.shape, x.shape[1:]], x),
        "n d -> n d, d",
    )
    x = jax.random.normal(jax.random.key(0), (6, 3))
    run = lambda x: function(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("a"))) * 2)
    close(jax.jit(run)(x), ones(2 * x))


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
