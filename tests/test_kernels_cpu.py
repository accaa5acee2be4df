"""Native kernels on CPU: rows, groups and columns held to long double, and what is refused."""

import ctypes
import functools
import itertools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_accuracy import GRID, LIMITS, stress, units

import normax
from normax import kernels as all_kernels
from normax.kernels import cpu as kernels
from normax.kernels import cpu_columns as columns
from normax.kernels import cpu_groups as groups
from normax.kernels import cpu_library as library

DTYPES = ["float32", "bfloat16", "float16"]
RULE = {"centered": True, "epsilon": 1e-5}
needs_library = pytest.mark.skipif(
    not library.PATH.exists(), reason="the kernels for CPU were not built: no compiler"
)


def exact(v):
    return np.asarray(v).astype(np.longdouble)


def data(shape, dtype, mean=0.0, deviation=1.0, line=None):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape) * deviation + mean, dtype)
    dy = jnp.asarray(rng.normal(size=shape), dtype)
    line = shape[-1:] if line is None else line
    of_line = "float64" if dtype == "float64" else "float32"
    scale, bias = (jnp.asarray(rng.normal(size=line), of_line) for _ in range(2))
    return x, dy, scale, bias


def case_of(x, centered=True, epsilon=1e-5):
    return Case("rows", None, x.shape, (x.ndim - 1,), epsilon=epsilon, centered=centered)


@functools.cache
def compiled(centered, epsilon, scaled):
    """Returns a function to y, dx, dscale and dbias by the kernels, compiled once for a shape."""
    rule = {"centered": centered, "epsilon": epsilon}

    def both(x, dy, scale, bias):
        lines = (scale, bias) if scaled else (None, None)
        y = kernels.forward(x, *lines, **rule)
        return y, *kernels.backward(x, lines[0], dy, **rule)

    return jax.jit(both)


def check_rows(x, dy, centered=True, epsilon=1e-5, limits=None):
    """Holds y and dx of each row to long double, by units of its own largest."""
    dtype = str(x.dtype)
    line = jnp.zeros(x.shape[-1], kernels.parameter_dtype(x))
    y, dx, *_ = compiled(centered, epsilon, False)(x, dy, line, line)
    case = case_of(x, centered, epsilon)
    pairs = (y, reference.forward(case, x)), (dx, reference.backward(case, x, dy))
    for (found, right), limit in zip(pairs, limits or LIMITS[dtype], strict=True):
        assert found.dtype == x.dtype
        for row in range(len(x)):
            assert units(found[row], right[row], dtype) <= limit, (row, dtype)


@needs_library
def test_available():
    assert all_kernels.available() == {"cpu": None}


@needs_library
@pytest.mark.parametrize("n", [64, 1000, 1024, 65536])
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_the_grid(scale, dtype, n):
    x, dy, *_ = data((6, n), dtype, *scale)
    for centered in (True, False):
        check_rows(x, dy, centered)


@needs_library
@pytest.mark.parametrize("n", [64, 1000, 65537])
def test_stress_rows(n):
    x = jnp.asarray(np.stack(list(stress(n).values())), "float32")
    for centered in (True, False):
        check_rows(x, data(x.shape, "float32")[1], centered)


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 1001])
def test_rows_of_any_length(n, dtype, x64):
    x, dy, scale, bias = data((5, 3, n), dtype, mean=2)
    of_line = kernels.parameter_dtype(x)
    limits = {**LIMITS, "float64": (4, 8)}[dtype]
    for centered in (True, False):
        y, dx, dscale, dbias = compiled(centered, 1e-5, True)(x, dy, scale, bias)
        assert (y.dtype, dx.dtype, dscale.dtype) == (x.dtype, x.dtype, of_line)
        case, long_dy = case_of(x, centered), exact(dy)
        xhat = reference.forward(case, x)
        assert units(y, xhat * exact(scale) + exact(bias), dtype) <= limits[0]
        right = reference.backward(case, x, long_dy * exact(scale))
        # Of a few numbers dx is a difference of nearly equal ones; of one, centred, there is none.
        if n > 3:
            assert units(dx, right, dtype) <= limits[1]
        elif n == 1 and centered:
            np.testing.assert_array_equal(dx, jnp.zeros_like(dx))
        assert units(dscale, (long_dy * xhat).sum((0, 1)), of_line) <= 8
        assert units(dbias, long_dy.sum((0, 1)), of_line) <= 8


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_rows_are_zero_with_the_right_gradient(dtype):
    values = [0.0, 1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, -1e30, 3e38]
    for n in (3, 7, 1000):
        x = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (8, n))
        dy = data(x.shape, dtype)[1]
        y = kernels.forward(x, **RULE)
        np.testing.assert_array_equal(y, jnp.zeros_like(y))
        check_rows(x, dy)


@needs_library
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("centered", [True, False])
def test_entries_of_any_size(epsilon, centered):
    rng = np.random.default_rng(3)
    normal = rng.normal(size=1000)
    sizes = (1e-30, 1e-20, 1e-6, 1e12, 1e20, 3e38)
    rows = [normal / np.abs(normal).max() * size for size in sizes]
    rows += [normal * 1e24 + 1e30, np.where(normal > 2, 1e30, normal)]
    x = jnp.asarray(np.stack(rows), "float32")
    check_rows(x, data(x.shape, "float32")[1], centered, epsilon)


@needs_library
@pytest.mark.parametrize("size", [1e-36, 1e-39, 1e-42])
@pytest.mark.parametrize("rows", [8, 4096])
def test_subnormal_numbers_are_no_zeros(rows, size):
    """By one thread and by several: what XLA's threads take them for."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(rows, 64)) * size, "float32")
    grouped = x.reshape(-1, 8, 64)
    groups = Case("groups", None, grouped.shape, (1, 3), epsilon=0.0, groups=4)
    for y, case in (
        (normax.layer_norm(x, epsilon=0.0, implementation="cpu"), case_of(x, True, 0.0)),
        (normax.rms_norm(x, epsilon=0.0, implementation="cpu"), case_of(x, False, 0.0)),
        (normax.group_norm(grouped, num_groups=4, epsilon=0.0, implementation="cpu"), groups),
    ):
        right = reference.forward(case, x.reshape(y.shape))
        np.testing.assert_allclose(exact(y), right, rtol=1e-6, atol=1e-7)


@needs_library
@pytest.mark.parametrize("size", [1e-250, 1e-3, 1e250, 1e307])
def test_float64_of_any_size(size, x64):
    x, dy, *_ = data((4, 777), "float64", deviation=size)
    x = x.at[1].add(3 * size).at[2].set(size).at[3, 5].mul(1e6 if size < 1 else 1)
    for centered in (True, False):
        check_rows(x, dy, centered, 0.0 if not centered else 1e-12, limits=(8, 16))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_widened_and_rounded_as_by_jax(dtype):
    """By scale and bias alone: xhat of equal entries is zero, so y is the bias, rounded."""
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**32, 8192, dtype=np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), np.float32([0, -0.0, 65519, 65520, 6e-8, 3e-8])]
    )
    values = values[np.abs(values) >= np.finfo(np.float32).tiny]
    x = jnp.zeros((1, len(values)), dtype)
    y = kernels.forward(x, None, jnp.asarray(values), **RULE)
    np.testing.assert_array_equal(y[0], jnp.asarray(values).astype(dtype))
    # Each half number there is, as a residual of zero, comes back.
    if dtype != "float32":
        every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)[None]
        total, _ = kernels.add_forward(every, jnp.zeros_like(every) * 0, **RULE)
        total, every = (np.asarray(v.astype("float32")) for v in (total, every))
        # What XLA calls may read subnormal float32 as zero, as XLA does.
        normal = ~(np.abs(every) < np.finfo(np.float32).tiny)
        np.testing.assert_array_equal(total[normal], every[normal])


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_out_of_half_precision(dtype):
    x, dy, scale, bias = data((9, 130), dtype)
    y = kernels.forward(x, scale, bias, dtype="float32", **RULE)
    dy = dy.astype("float32")
    dx, dscale, _ = kernels.backward(x, scale, dy, **RULE)
    assert (y.dtype, dx.dtype) == ("float32", dtype)
    xhat = reference.forward(case_of(x), x)
    assert units(y, xhat * exact(scale) + exact(bias), "float32") <= 4
    assert units(dx, reference.backward(case_of(x), x, exact(dy) * exact(scale)), dtype) <= 1
    assert units(dscale, (exact(dy) * xhat).sum(0), "float32") <= 8


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_a_residual(dtype, x64):
    x, dy, scale, bias = data((6, 45), dtype)
    residual, ds = 3 * dy[::-1], dy[:, ::-1]
    total, y = kernels.add_forward(x, residual, scale, bias, **RULE)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(y, kernels.forward(total, scale, bias, **RULE))
    dx, *sums = kernels.add_backward(total, scale, dy, ds, **RULE)
    alone, *others = kernels.backward(total, scale, dy, **RULE)
    for a, b in zip(sums, others, strict=True):
        np.testing.assert_array_equal(a, b)
    right = reference.backward(case_of(x), total, exact(dy) * exact(scale)) + exact(ds)
    assert units(dx, right, dtype) <= 2
    assert not np.array_equal(dx, alone)


@needs_library
def test_many_rows_give_the_same_bits_each_time():
    x, dy, scale, bias = data((4097, 65), "float32", mean=1)
    again = [compiled(True, 1e-5, True)(x, dy, scale, bias) for _ in range(8)]
    for one in again[1:]:
        for a, b in zip(one, again[0], strict=True):
            np.testing.assert_array_equal(a, b)
    xhat = reference.forward(case_of(x), x)
    assert units(again[0][2], (exact(dy) * xhat).sum(0), "float32") <= 4
    assert units(again[0][3], exact(dy).sum(0), "float32") <= 4


@needs_library
def test_no_rows_and_one():
    x, dy, scale, bias = data((0, 3, 64), "float32")
    y, dx, dscale, dbias = compiled(True, 1e-5, True)(x, dy, scale, bias)
    assert y.shape == dx.shape == x.shape
    np.testing.assert_array_equal((dscale, dbias), np.zeros((2, 64)))
    check_rows(*data((1, 64), "float32")[:2])
    x, dy, scale, _ = data((64,), "float32")
    dx = kernels.backward(x, scale, dy, **RULE)[0]
    right = reference.backward(case_of(x), x, exact(dy) * exact(scale))
    assert units(dx, right, "float32") <= 8


@needs_library
@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, 0), (None, 0, 0), (1, None, 1)])
def test_mapped_it_is_the_same_as_one_by_one(axes):
    x, dy, scale, _ = data((4, 4, 36), "float32", line=(4, 36))
    given = [v[0] if axis is None else v for v, axis in zip((x, scale, dy), axes, strict=True)]
    function = lambda x, scale, dy: (
        kernels.forward(x, scale, None, **RULE),
        *kernels.backward(x, scale, dy, **RULE),
    )
    mapped = jax.vmap(function, axes)(*given)
    for i in range(4):
        one = [
            v if axis is None else jnp.take(v, i, axis) for v, axis in zip(given, axes, strict=True)
        ]
        for a, b in zip(mapped, function(*one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


@needs_library
@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ((0, None, None, 0), (None, None, None, 0)),
        ((None, None, 0, None), (0, None, None, 0)),
        ((None, 0, None, None), (1, None, None, None)),
        ((0, None, None, 0), (0, 0, 0, 0)),
        ((0, None, None, 0), (None, 0, None, 0)),
    ],
    ids=str,
)
def test_mapped_twice_with_parameters_of_some_calls(inner, outer):
    """Of x, scale, bias and dy; parameters that calls have in common are there once."""
    given = []
    for i, (shape, *axes) in enumerate(
        zip([(4, 5), (5,), (5,), (4, 5)], inner, outer, strict=True)
    ):
        for axis, size in zip(axes, (3, 2), strict=True):
            shape = shape if axis is None else (*shape[:axis], size, *shape[axis:])
        given.append(jax.random.normal(jax.random.key(i), shape))

    norm = functools.partial(normax.layer_norm, implementation="cpu")

    def function(x, scale, bias, dy):
        y, pull = jax.vjp(norm, x, scale, bias)
        return y, *pull(dy)

    mapped = jax.vmap(jax.vmap(function, inner), outer)(*given)
    for i, j in itertools.product(range(2), range(3)):
        one = []
        for v, *axes in zip(given, outer, inner, strict=True):
            for axis, index in zip(axes, (i, j), strict=True):
                v = v if axis is None else jnp.take(v, index, axis)
            one.append(v)
        for a, b in zip(mapped, function(*one), strict=True):
            np.testing.assert_allclose(a[i, j], b, rtol=1e-5, atol=1e-5)


@needs_library
def test_mapped_over_rows_parameters_are_not_written_out():
    x, scale = jnp.ones((256, 64)), jnp.ones(64)
    norm = lambda x, scale, bias: normax.layer_norm(x, scale, bias, implementation="cpu")
    mapped = jax.vmap(norm, (0, None, None))
    text = jax.jit(mapped).lower(x, scale, scale).compile().as_text()
    (call,) = re.findall(r"custom-call\((.*?)\), custom_call_target=.normax_forward", text)
    operands = [re.search(rf"{re.escape(name)} = (\S+?)\{{", text)[1] for name in call.split(", ")]
    assert operands == ["f32[256,64]", "f32[64]", "f32[64]"]


@needs_library
@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_mapped_over_they_are_called_once(norm):
    x, ct = (jax.random.normal(jax.random.key(i), (4, 3, 10, 8)) for i in range(2))
    norm = {
        "batch": lambda x: normax.normalize_batch(x, implementation="cpu")[0],
        "group": lambda x: normax.group_norm(x, num_groups=2, implementation="cpu"),
        "instance": lambda x: normax.instance_norm(x, implementation="cpu"),
    }[norm]

    def step(x, ct):
        y, pull = jax.vjp(norm, x)
        return y, *pull(ct)

    mapped = jax.jit(jax.vmap(step)).lower(x, ct).compile().as_text()
    alone = jax.jit(step).lower(x[0], ct[0]).compile().as_text()
    assert "while" not in mapped
    assert mapped.count("custom_call_target") == alone.count("custom_call_target") > 0


@needs_library
def test_columns_and_groups_give_the_same_bits_each_time():
    x, dy, scale, bias = data((3, 4097, 8, 9), "float32", mean=1, line=(8, 9))
    rule = {"centered": True, "epsilon": 1e-5}

    @jax.jit
    def step(x, dy):
        y = groups.forward_groups(x, scale, bias, **rule)
        of_groups = y, *groups.backward_groups(x, scale, bias, dy, **rule)
        x, dy = x.reshape(-1, 72), dy.reshape(-1, 72)
        moments = columns.column_moments_in_units(x)
        sums = columns.column_gradients(x, dy, *moments, epsilon=1e-5)
        dx = columns.backward_columns(
            x, scale.reshape(-1), dy, *moments, *sums, epsilon=1e-5, count=len(x)
        )
        return of_groups, moments, sums, dx

    first = step(x, dy)
    for _ in range(8):
        jax.tree.map(np.testing.assert_array_equal, step(x, dy), first)


def batch_norm(x, scale, bias, **options):
    stats = normax.RunningStats.create(x.shape[-1])
    return normax.batch_norm(x, stats, scale, bias, use_running_average=False, **options)[0]


NORMS = {
    "layer": normax.layer_norm,
    "rms": lambda x, scale, bias, **options: normax.rms_norm(x, scale, **options),
    "group": functools.partial(normax.group_norm, num_groups=4),
    "instance": normax.instance_norm,
    "batch": batch_norm,
}


def step_of(norm):
    """Returns the program of a norm forward and backward, and what it is given."""

    def step(x, dy, *lines):
        y, pull = jax.vjp(functools.partial(NORMS[norm], implementation="cpu"), x, *lines)
        return y, *pull(dy)

    x, dy = (jax.random.normal(jax.random.key(i), (16, 6, 64)) for i in range(2))
    return jax.jit(step), (x, dy, jnp.linspace(0.5, 1.5, 64), jnp.linspace(-1, 1, 64))


@needs_library
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("norm", NORMS)
def test_on_eight_devices_nothing_is_gathered(norm, axis_type):
    step, (x, dy, *lines) = step_of(norm)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    wanted = step(x, dy, *lines)
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, dy), NamedSharding(mesh, P("data")))
        lines = jax.device_put(lines, NamedSharding(mesh, P()))
        compiled = step.lower(*placed, *lines).compile()
        found = compiled(*placed, *lines)
    assert "normax_" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_exported_for_other_platforms_is_the_form_there(norm):
    step, args = step_of(norm)
    with pytest.warns(UserWarning, match="='cpu' is for .* alone"):
        exported = jax.export.export(step, platforms=("cuda", "tpu"))(*args)
    assert "normax_" not in exported.mlir_module()


@needs_library
@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_keeps_what_its_backward_pass_reads(norm):
    _, (x, _, *lines) = step_of(norm)
    f = functools.partial(NORMS[norm], implementation="cpu")
    pull = jax.jit(lambda *args: jax.vjp(f, *args)[1])(x, *lines)
    kept = [leaf.size for leaf in jax.tree.leaves(pull)]
    assert sum(size > 64 for size in kept) == 1  # x
    # A scale, and of batch norm what was measured.
    assert sum(kept) <= x.size + (5 if norm == "batch" else 2) * 64


@needs_library
@pytest.mark.parametrize("norm", ["layer_norm", "add_layer_norm", "group_norm"])
def test_what_is_kept_is_what_the_backward_pass_reads(norm):
    """Nothing is measured for it, for the kernel measures again."""
    x, scale = jnp.ones((16, 64)), jnp.ones(64)
    options = {"num_groups": 4} if norm == "group_norm" else {}
    given = (x, x) if norm.startswith("add") else (x,)
    f = jax.jit(
        lambda scale, *given: getattr(normax, norm)(*given, scale, implementation="cpu", **options)
    )
    pull = jax.vjp(f, scale, *given)[1]
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size > 1}
    assert kept <= {x.shape, scale.shape, (1, 64), (16, 4, 16), (1, 4, 16)}
    text = jax.jit(lambda *args: jax.vjp(f, *args)).lower(scale, *given).compile().as_text()
    assert "reduce" not in text
    assert "while" not in text


def group_case(x, centered=True):
    return Case("groups", None, x.shape, (1, 3), epsilon=1e-5, centered=centered)


SHAPES = [(3, 20, 4, 8), (2, 7, 3, 5), (5, 1, 6, 9), (2, 33, 11, 1), (1, 4100, 2, 24), (3, 5, 1, 3)]
SHAPES += [(5, 3, 9, 1000)]  # more columns than are summed at once


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_groups(shape, dtype, x64):
    of_line = "float64" if dtype == "float64" else "float32"
    x, dy, scale, bias = data(shape, dtype, mean=3, line=shape[2:])
    for centered in (True, False):
        rule = {"centered": centered, "epsilon": 1e-5}
        y = groups.forward_groups(x, scale, bias, **rule)
        dx, dscale, dbias = groups.backward_groups(x, scale, bias, dy, **rule)
        case, long_dy = group_case(x, centered), exact(dy)
        xhat = reference.forward(case, x)
        limits = {**LIMITS, "float64": (4, 8)}[dtype]
        assert y.dtype == dx.dtype == x.dtype
        assert dscale.dtype == dbias.dtype == of_line
        assert units(y, xhat * exact(scale) + exact(bias), dtype) <= limits[0]
        right = reference.backward(case, x, long_dy * exact(scale))
        assert units(dx, right, dtype) <= limits[1]
        assert units(dscale, (long_dy * xhat).sum((0, 1)), of_line) <= 8
        assert units(dbias, long_dy.sum((0, 1)), of_line) <= 8


@needs_library
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_groups_of_the_grid(scale, dtype):
    x, dy, *_ = data((2, 500, 2, 4), dtype, *scale)
    y = groups.forward_groups(x, **RULE)
    dx, *_ = groups.backward_groups(x, None, None, dy, **RULE)
    assert units(y, reference.forward(group_case(x), x), dtype) <= LIMITS[dtype][0]
    assert units(dx, reference.backward(group_case(x), x, dy), dtype) <= LIMITS[dtype][1]


@needs_library
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e7 + 1, 1e30, 3e38])
def test_constant_groups_and_wild_ones(value):
    x, *_ = data((2, 40, 3, 4), "float32")
    x = x.at[:, :, 0].set(value).at[0, :, 1].mul(1e-30).at[1, :, 1].mul(1e30)
    y = groups.forward_groups(x, centered=True, epsilon=0.0)
    np.testing.assert_array_equal(y[:, :, 0], 0)
    right = reference.forward(group_case(x[:, :, 1:])._replace(epsilon=0.0), x[:, :, 1:])
    assert units(y[:, :, 1:], right, "float32") <= 4


@needs_library
@pytest.mark.parametrize(("size", "scale"), [(1e-20, 1e20), (1e20, 1e-22)])
def test_groups_of_a_scale_far_from_one(size, scale):
    x, _, line, _ = data((2, 40, 3, 4), "float32", line=(3, 4))
    x, line = x * jnp.float32(size), line * jnp.float32(scale)
    y = groups.forward_groups(x, line, centered=True, epsilon=0.0)
    right = reference.forward(group_case(x)._replace(epsilon=0.0), x) * exact(line)
    assert units(y, right, "float32") <= 4


@needs_library
def test_no_examples():
    x, dy, scale, bias = data((0, 5, 2, 3), "float32", line=(2, 3))
    assert groups.forward_groups(x, scale, bias, **RULE).shape == x.shape
    dx, dscale, dbias = groups.backward_groups(x, scale, bias, dy, **RULE)
    assert dx.shape == x.shape
    np.testing.assert_array_equal((dscale, dbias), np.zeros((2, 2, 3)))


@needs_library
@pytest.mark.parametrize("n", [2, 64, 1000, 65537])
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_columns(scale, dtype, n):
    x, dy, *_ = data((n, 11), dtype, *scale)
    unit, mean, rest, var = columns.column_moments_in_units(x)
    np.testing.assert_array_equal(unit, 1)
    right = exact(x)
    off = exact(mean) + exact(rest) - right.mean(0)
    assert np.all(np.abs(off) <= 1e-12 * np.abs(right).max(0) + 6e-8 * right.std(0))
    np.testing.assert_allclose(exact(var), right.var(0), rtol=4e-7, atol=0)
    dscale, dbias = columns.column_gradients(x, dy, unit, mean, rest, var, epsilon=1e-5)
    xhat = reference.forward(Case("", None, x.shape, (0,), epsilon=1e-5), x)
    size = np.abs(exact(dy) * xhat).sum(0)
    assert np.all(np.abs(exact(dscale) - (exact(dy) * xhat).sum(0)) <= 2e-7 * size)
    assert units(dbias, exact(dy).sum(0), "float32") <= 1


@needs_library
def test_columns_that_need_units():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, 6)) * np.array([1, 1e30, 1e37, 1e-30, 1, 1e20])
    x[:, 0], x[:, 4] = 1e30, 1e6
    x[0, 4] = np.nextafter(np.float32(1e6), np.float32(2e6))
    x = jnp.asarray(x, "float32")
    unit, mean, rest, var = (exact(v) for v in columns.column_moments_in_units(x))
    np.testing.assert_array_equal(unit[[0, 3, 4]], 1)
    assert np.all(np.log2(unit.astype(float)) % 1 == 0)
    off = np.abs((mean + rest) * unit - exact(x).mean(0))
    # The rest of a mean of 1e-31 is subnormal.
    limit = np.where(unit * mean < 1e-30, 1e-7, 1e-12) * np.abs(exact(x)).max(0)
    assert np.all(off <= limit + 6e-8 * exact(x).std(0))
    wide = np.delete(var * unit * unit, 3)
    np.testing.assert_allclose(wide, np.delete(exact(x).var(0), 3), rtol=4e-7)
    assert var[0] == 0


@needs_library
def test_columns_mapped():
    x, dy, *_ = data((3, 50, 9), "float32", mean=2)
    function = lambda x, dy: (
        columns.column_gradients(
            x, dy, *(moments := columns.column_moments_in_units(x)), epsilon=1e-5
        )
        + moments
    )
    mapped = jax.vmap(function)(x, dy)
    for i in range(3):
        for a, b in zip(mapped, function(x[i], dy[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def column_case(x):
    return Case("columns", None, x.shape, tuple(range(x.ndim - 1)), epsilon=1e-5)


@functools.cache
def written(dtype):
    """Returns a function to y and dx of columns, by what is measured of them."""

    def both(x, dy, scale, bias):
        moments = columns.column_moments_in_units(x)
        y = columns.forward_columns(x, scale, bias, *moments, epsilon=1e-5, dtype=dtype)
        found = columns.column_gradients(x, dy, *moments, epsilon=1e-5)
        options = {"epsilon": 1e-5, "count": x.size // x.shape[-1]}
        return y, columns.backward_columns(x, scale, dy, *moments, *found, **options)

    return jax.jit(both)


@needs_library
@pytest.mark.parametrize("shape", [(64, 11), (3, 300, 16), (40, 5, 2, 37)])
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_columns_standardized(scale, dtype, shape):
    x, dy, line, bias = data(shape, dtype, *scale)
    y, dx = written(dtype)(x, dy, line, bias)
    assert (y.dtype, dx.dtype, y.shape, dx.shape) == (x.dtype, x.dtype, x.shape, x.shape)
    xhat = reference.forward(column_case(x), x)
    assert units(y, xhat * exact(line) + exact(bias), dtype) <= LIMITS[dtype][0]
    right = reference.backward(column_case(x), x, exact(dy) * exact(line))
    assert units(dx, right, dtype) <= LIMITS[dtype][1]


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_columns_in_float32_out_of_half_precision(dtype):
    x, dy, line, bias = data((300, 9), dtype, mean=2)
    dy = dy.astype("float32") * 1.001
    y, dx = written("float32")(x, dy, line, bias)
    assert (y.dtype, dx.dtype) == ("float32", dtype)
    xhat = reference.forward(column_case(x), x)
    assert units(y, xhat * exact(line) + exact(bias), "float32") <= LIMITS["float32"][0]
    right = reference.backward(column_case(x), x, exact(dy) * exact(line))
    assert units(dx, right, dtype) <= LIMITS[dtype][1]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", [30.0, 6e4])
def test_sums_about_an_entry_that_is_far_out(far, dtype):
    """What is subtracted is the first entry: alone it would take the digits of all others."""
    x, dy, line, bias = data((400, 16), dtype)
    x = x.at[0].set(far).at[:, 0].set(x[0, 0])
    *_, var = columns.column_moments_in_units(x)
    np.testing.assert_allclose(exact(var), exact(x).var(0), rtol=4e-7)
    y, dx = written(dtype)(x, dy, line, bias)
    xhat = reference.forward(column_case(x), x)
    assert units(y, xhat * exact(line) + exact(bias), dtype) <= LIMITS[dtype][0]
    check_rows(x.T, dy.T)
    one, ct = x.reshape(1, 400, 4, 4), dy.reshape(1, 400, 4, 4)
    y = groups.forward_groups(one, **RULE)
    dx = groups.backward_groups(one, None, None, ct, **RULE)[0]
    right = reference.backward(group_case(one), one, ct)
    assert units(y, reference.forward(group_case(one), one), dtype) <= LIMITS[dtype][0]
    assert units(dx, right, dtype) <= LIMITS[dtype][1]


def repeated(kind, shape):
    """Returns entries of which many are equal, so that roundings of float32 are all alike."""
    rng = np.random.default_rng(6)
    normal = rng.normal(size=shape)
    x = {
        "few ones": (rng.random(shape) < 0.1) * rng.random(shape[-1]),
        "relu": np.maximum(normal, 0),
        "relu, mostly zero": np.maximum(normal - 1, 0),
        "two values": np.where(np.arange(len(normal))[:, None] * 2 < len(normal), 0.1, 0.7),
        "tiled": np.broadcast_to(rng.normal(size=(1, shape[-1])), shape) * (1 + (normal > 1)),
        "exponential": rng.exponential(size=shape),
    }[kind] + np.zeros(shape)
    x[0] = x.mean(0) + 3.7 * x.std(0)
    return jnp.asarray(x, "float32"), jnp.asarray(rng.normal(size=shape), "float32")


@needs_library
@pytest.mark.parametrize("width", [8, 64, 256])
@pytest.mark.parametrize(
    "kind", ["few ones", "relu", "relu, mostly zero", "two values", "tiled", "exponential"]
)
def test_entries_that_are_repeated(kind, width):
    x, dy = repeated(kind, (2048, width))
    ones, zeros = jnp.ones(width), jnp.zeros(width)
    found = written("float32")(x, dy, ones, zeros)
    case = column_case(x)
    right = reference.forward(case, x), reference.backward(case, x, dy)
    one, ct = x.reshape(1, 2048, width, 1), dy.reshape(1, 2048, width, 1)
    of_groups = (
        groups.forward_groups(one, **RULE),
        groups.backward_groups(one, None, None, ct, **RULE)[0],
    )
    for pair in (found, of_groups):
        for value, exact_value, limit in zip(pair, right, LIMITS["float32"], strict=True):
            assert units(value.reshape(x.shape), exact_value, "float32") <= limit
    dscale, dbias = columns.column_gradients(
        x, dy, *columns.column_moments_in_units(x), epsilon=1e-5
    )
    for value, terms in ((dscale, exact(dy) * right[0]), (dbias, exact(dy))):
        off = np.abs(exact(value) - terms.sum(0))
        assert np.all(off <= 4e-7 * np.abs(terms).sum(0))


@needs_library
def test_squares_that_are_all_too_small():
    row = jnp.full((1, 64), 1e-20).at[0, ::2].mul(-2)
    exactly = {"epsilon": 0.0}
    for dtype in ("float32", "bfloat16"):
        x = row.astype(dtype)
        for centered in (True, False):
            case = case_of(x, centered, 0.0)
            y = kernels.forward(x, centered=centered, **exactly)
            assert units(y, reference.forward(case, x), dtype) <= LIMITS[dtype][0]
            four = x.reshape(1, 64, 1, 1)
            y = groups.forward_groups(four, centered=centered, **exactly)
            assert units(y.reshape(1, 64), reference.forward(case, x), dtype) <= LIMITS[dtype][0]
    # About the first entry, deviations that cancel out.
    x = jnp.zeros((1, 64), "bfloat16").at[0, 2:].set(1e-20).at[0, 2::2].mul(-1)
    y = kernels.forward(x, centered=True, **exactly)
    right = reference.forward(case_of(x, True, 0.0), x)
    assert units(y, right, "bfloat16") <= LIMITS["bfloat16"][0]


@needs_library
@pytest.mark.parametrize("of_dy", [1e-30, 1e-20])
def test_groups_of_gradients_that_are_small(of_dy):
    x, dy, *_ = data((2, 400, 2, 4), "float32", deviation=3e-6)
    dy = dy * jnp.float32(of_dy)
    dx = groups.backward_groups(x, None, None, dy, centered=True, epsilon=0.0)[0]
    right = reference.backward(group_case(x)._replace(epsilon=0.0), x, dy)
    assert units(dx, right, "float32") <= LIMITS["float32"][1]


@needs_library
@pytest.mark.parametrize("rows", [192, 512])
def test_sums_of_gradients_that_leave_the_range_and_come_back(rows):
    x = data((rows, 8), "float32")[0]
    dy = jnp.where(jnp.arange(rows)[:, None] // 16 % 2 == 0, 3e37, -3e37) + jnp.zeros((1, 8))
    _, dbias = columns.column_gradients(x, dy, *columns.column_moments_in_units(x), epsilon=1e-5)
    np.testing.assert_array_equal(dbias, jnp.zeros(8))


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [31, 63, 64, 95])
def test_one_large_example_whose_groups_are_dealt_out(width, dtype):
    """A strip of them may be whole lines of cache where the rows are not."""
    rows = (9 << 20) // (width * jnp.dtype(dtype).itemsize)
    x, dy, *_ = data((1, rows, width, 1), dtype, mean=1)
    y = groups.forward_groups(x, **RULE)
    dx = groups.backward_groups(x, None, None, dy, **RULE)[0]
    some = slice(rows // 2, rows // 2 + 50)
    long = np.asarray(x[0, :, :, 0].astype("float32"), np.float64)
    d = long - long.mean(0)
    rstd = 1 / np.sqrt((d * d).mean(0) + 1e-5)
    ct = np.asarray(dy[0, :, :, 0].astype("float32"), np.float64)
    xhat = d * rstd
    moved = rstd * (ct - ct.mean(0) - xhat * (ct * xhat).mean(0))
    assert units(y[0, some, :, 0], xhat[some], dtype) <= LIMITS[dtype][0]
    assert units(dx[0, some, :, 0], moved[some], dtype) <= LIMITS[dtype][1]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 10, 12, 15, 16, 20, 24, 31, 32, 63])
def test_short_rows_taken_as_one(width, dtype):
    """And those that are left over: of no rows in a multiple."""
    x, dy, line, bias = data((1109, width), dtype, mean=1)
    y, dx = written(dtype)(x, dy, line, bias)
    case, groups_of = column_case(x), (1, 1109, width, 1)
    xhat = reference.forward(case, x)
    right = reference.backward(case, x, exact(dy) * exact(line))
    parameters = line.reshape(width, 1), bias.reshape(width, 1)
    one, ct = x.reshape(groups_of), dy.reshape(groups_of)
    alone = groups.forward_groups(one, *parameters, **RULE)
    moved, dscale, dbias = groups.backward_groups(one, *parameters, ct, **RULE)
    for value in (y, alone.reshape(x.shape)):
        assert units(value, xhat * exact(line) + exact(bias), dtype) <= LIMITS[dtype][0]
    for value in (dx, moved.reshape(x.shape)):
        assert units(value, right, dtype) <= LIMITS[dtype][1]
    moments = columns.column_moments_in_units(x)
    for found in (
        (dscale.reshape(-1), dbias.reshape(-1)),
        columns.column_gradients(x, dy, *moments, epsilon=1e-5),
    ):
        for value, terms in zip(found, (exact(dy) * xhat, exact(dy)), strict=True):
            off = np.abs(exact(value) - terms.sum(0))
            assert np.all(off <= 4e-7 * np.abs(terms).sum(0))


@needs_library
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e15, 1e25])
@pytest.mark.parametrize("of_dy", [1e-30, 1e30])
def test_columns_of_gradients_of_any_size(size, of_dy):
    x, dy, line, _ = data((1000, 8), "float32", size, size)
    dy = dy * jnp.float32(of_dy)
    moments = columns.column_moments_in_units(x)
    dscale, dbias = columns.column_gradients(x, dy, *moments, epsilon=1e-24)
    case = column_case(x)._replace(epsilon=1e-24)
    xhat = reference.forward(case, x)
    off = np.abs(exact(dscale) - (exact(dy) * xhat).sum(0))
    assert np.all(off <= 2e-7 * np.abs(exact(dy)).sum(0))
    assert units(dbias, exact(dy).sum(0), "float32") <= 4
    size = {"epsilon": 1e-24, "count": 1000}
    dx = columns.backward_columns(x, line, dy, *moments, dscale, dbias, **size)
    right = reference.backward(case, x, exact(dy) * exact(line))
    if np.all(np.abs(right) < 1e38) and np.abs(right).max() > 1e-30:
        assert units(dx, right, "float32") <= 8


@needs_library
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_shows_where_it_is_and_nowhere_else(value):
    x, dy, line, bias = data((300, 16), "float32")
    x = x.at[7, 3].set(value)
    y, dx = written("float32")(x, dy, line, bias)
    rows = compiled(True, 1e-5, False)(x, dy, line, bias)[:2]
    one, ct = x.reshape(1, 300, 16, 1), dy.reshape(1, 300, 16, 1)
    of_groups = (
        groups.forward_groups(one, **RULE),
        groups.backward_groups(one, None, None, ct, **RULE)[0],
    )
    for found in (y, dx, *(v.reshape(x.shape) for v in of_groups)):
        assert np.isnan(found[:, 3]).all()
        assert np.isfinite(np.delete(found, 3, 1)).all()
    for found in rows:
        assert np.isnan(found[7]).all()
        assert np.isfinite(np.delete(found, 7, 0)).all()


@needs_library
@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_infinite_cotangent_has_an_infinite_sum(dtype, rows, x64):
    """As in XLA's form: what a mean lacks in float32 is not multiplied by it."""
    x, dy, _, _ = data((rows, 200), dtype)
    places = np.arange(200) * 7 % rows
    dy = dy.at[places, np.arange(200)].set(np.inf)
    unit, mean, rest, var = columns.column_moments_in_units(x + 3)
    found = columns.column_gradients(x + 3, dy, unit, mean, rest, var, epsilon=1e-5)
    assert np.isposinf(found[1]).all()
    above = np.asarray(x + 3, np.float64) > np.asarray(mean * unit, np.float64)
    np.testing.assert_array_equal(found[0], np.where(above[places, np.arange(200)], 1, -1) * np.inf)


@needs_library
@pytest.mark.parametrize("members", [2, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_an_infinite_cotangent_in_a_group_has_an_infinite_sum(dtype, members, x64):
    x, dy, *_ = data((2, 40, 64 // members, members), dtype, mean=3)
    places = np.arange(64) * 7 % 40
    line = np.arange(64)
    dy = dy.reshape(2, 40, 64).at[0, places, line].set(np.inf).reshape(x.shape)
    _, dscale, dbias = groups.backward_groups(x, None, None, dy, centered=True, epsilon=1e-5)
    assert np.isposinf(dbias).all()
    entries = np.asarray(x, np.float64)
    above = (entries > entries.mean((1, 3), keepdims=True)).reshape(2, 40, 64)[0, places, line]
    np.testing.assert_array_equal(dscale.reshape(-1), np.where(above, 1, -1) * np.inf)


@needs_library
@pytest.mark.parametrize("width", [1000, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_have_the_bits_of_small_ones(dtype, width):
    """What is written past the caches, because there is much of it, is the same."""
    bytes_of_row = width * jnp.dtype(dtype).itemsize
    x, dy, scale, bias = data(((9 << 20) // bytes_of_row, width), dtype)
    parts = [slice(0, 40), slice(-40, None)]
    y, dx, *_ = compiled(True, 1e-5, True)(x, dy, scale, bias)
    for part in parts:
        few, of_few, *_ = compiled(True, 1e-5, True)(x[part], dy[part], scale, bias)
        np.testing.assert_array_equal(y[part], few)
        np.testing.assert_array_equal(dx[part], of_few)
    moments = columns.column_moments_in_units(x)
    write = functools.partial(columns.forward_columns, epsilon=1e-5, dtype=dtype)
    back = functools.partial(columns.backward_columns, epsilon=1e-5, count=len(x))
    y = write(x, scale, bias, *moments)
    dx = back(x, scale, dy, *moments, scale, bias)
    for part in parts:
        np.testing.assert_array_equal(y[part], write(x[part], scale, bias, *moments))
        np.testing.assert_array_equal(
            dx[part], back(x[part], scale, dy[part], *moments, scale, bias)
        )
    count = len(x) // 40
    four = lambda v: v[: 40 * count].reshape(count, 40, width // 8, 8)
    lines = scale.reshape(-1, 8), bias.reshape(-1, 8)
    y = groups.forward_groups(four(x), *lines, **RULE)
    dx = groups.backward_groups(four(x), *lines, four(dy), **RULE)[0]
    for at in (0, count - 1):
        one = slice(at, at + 1)
        np.testing.assert_array_equal(y[one], groups.forward_groups(four(x)[one], *lines, **RULE))
        alone = groups.backward_groups(four(x)[one], *lines, four(dy)[one], **RULE)[0]
        np.testing.assert_array_equal(dx[one], alone)


@needs_library
def test_columns_written_where_they_are_mapped_or_none():
    x, dy, scale, bias = data((3, 50, 9), "float32", mean=2, line=(3, 9))
    mapped = jax.vmap(written("float32"))(x, dy, scale, bias)
    for i in range(3):
        for a, b in zip(mapped, written("float32")(x[i], dy[i], scale[i], bias[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)
    y, dx = written("float32")(x[0, :0], dy[0, :0], scale[0], bias[0])
    assert y.shape == dx.shape == (0, 9)


@needs_library
def test_an_output_that_has_no_kernel_is_that_of_the_form():
    x = data((200, 8), "float32", mean=3)[0]
    norm = functools.partial(normax.standardize, x, reduction_axes=0, dtype="bfloat16")
    y, _ = norm(implementation="cpu")
    assert y.dtype == "bfloat16"
    right, _ = norm()
    np.testing.assert_allclose(y.astype("float32"), right.astype("float32"), rtol=8e-3)


def in_doubles(x, dy, scale, bias, epsilon):
    """Returns y, dx, dscale and dbias of columns by the kernels."""
    moments = columns.column_moments_in_units(x)
    found = columns.column_gradients(x, dy, *moments, epsilon=epsilon)
    count = x.size // x.shape[-1]
    y = columns.forward_columns(x, scale, bias, *moments, epsilon=epsilon, dtype=x.dtype)
    dx = columns.backward_columns(x, scale, dy, *moments, *found, epsilon=epsilon, count=count)
    return y, dx, *found


def about_the_mean(x, axes):
    """Returns the same less a number near the mean: of that long double has digits to spare."""
    x = exact(x)
    return x - np.asarray((x / x.shape[0]).mean(axes, keepdims=True) * x.shape[0], np.float64)


def check_doubles(x, dy, scale, bias, epsilon=1e-5):
    """Holds columns, and the same as groups of one example, to long double."""
    case = column_case(x)._replace(epsilon=epsilon)
    entries = about_the_mean(x, 0)
    xhat, long_dy = reference.forward(case, entries), exact(dy)
    right = (
        xhat * exact(scale) + exact(bias),
        reference.backward(case, entries, long_dy * exact(scale)),
        (long_dy * xhat).sum(0),
        long_dy.sum(0),
    )
    line = scale.shape[0]
    one, ct = (v.reshape(1, -1, line, 1) for v in (x, dy))
    lines = scale.reshape(line, 1), bias.reshape(line, 1)
    rule = {"centered": True, "epsilon": epsilon}
    y = groups.forward_groups(one, *lines, **rule)
    dx, *sums = groups.backward_groups(one, *lines, ct, **rule)
    terms = np.abs(long_dy * xhat).sum(0), np.abs(long_dy).sum(0)
    for found in (in_doubles(x, dy, scale, bias, epsilon), (y, dx, *sums)):
        assert all(v.dtype == "float64" for v in found)
        for value, wanted, limit in zip(found[:2], right[:2], (8, 16), strict=True):
            # Column by column: each is of a size of its own. Of two numbers dx is nearly nothing.
            for c in range(line if len(x) > 2 or limit == 8 else 0):
                value, column = exact(value).reshape(x.shape), wanted[:, c]
                assert units(value[:, c], column, "float64") <= limit
        for value, wanted, size in zip(found[2:], right[2:], terms, strict=True):
            assert np.all(np.abs(exact(value).reshape(-1) - wanted) <= 2e-15 * size)


@needs_library
@pytest.mark.parametrize("rows", [2, 50, 3000])
@pytest.mark.parametrize("mean", [0.0, 1e6, -1e12])
@pytest.mark.parametrize("width", [3, 16, 77])
def test_columns_of_doubles(rows, mean, width, x64):
    check_doubles(*data((rows, width), "float64", mean))


@needs_library
@pytest.mark.parametrize("kind", ["constant", "large", "larger", "apart", "far"])
def test_columns_of_doubles_of_any_size(kind, x64):
    x, dy, scale, bias = data((400, 5), "float64")
    x = {
        "constant": x.at[:, 1].set(1e300).at[:, 2].set(0).at[:, 3].set(1 / 3),
        "large": x.at[:, 1].mul(1e160).at[:, 2].mul(1e200),
        "larger": x.at[:, 3].mul(3e307).at[:, 4].mul(1e-30),
        "apart": x.at[:, 1].set(jnp.where(x[:, 1] > 0, 1.7e308, -1.7e308)),
        "far": x.at[:, 1].add(1e15).at[0, 2].set(1e12).at[7, 3].set(1e160),
    }[kind]
    check_doubles(x, dy, scale, bias)


@needs_library
@pytest.mark.parametrize("size", [1e-250, 1e-170, 1e170, 1e307])
@pytest.mark.parametrize("centered", [True, False])
def test_groups_of_doubles_of_any_size(size, centered, x64):
    x, dy, *_ = data((2, 60, 3, 4), "float64", deviation=size)
    x = x.at[0, :, 1].set(size).at[1, :, 2].divide(size)
    rule = {"centered": centered, "epsilon": 0.0}
    case = group_case(x, centered)._replace(epsilon=0.0)
    y = groups.forward_groups(x, **rule)
    dx = groups.backward_groups(x, None, None, dy, **rule)[0]
    np.testing.assert_array_equal(y[0, :, 1], 0 if centered else 1)
    entries = about_the_mean(x, (1, 3)) if centered else exact(x)
    with np.errstate(invalid="ignore", divide="ignore"):  # equal entries, which have no deviation
        both = reference.forward(case, entries), reference.backward(case, entries, dy)
    for found, right, limit in zip((y, dx), both, (8, 16), strict=True):
        for n in range(2):
            for g in range(3):
                # Smaller ones are subnormal, larger ones none at all.
                if np.abs(right[n, :, g]).max() < 1e308:
                    assert units(found[n, :, g], right[n, :, g], "float64") <= limit


@needs_library
def test_doubles_that_are_mapped_absent_or_no_number(x64):
    x, dy, scale, bias = data((3, 50, 9), "float64", mean=2, line=(3, 9))
    function = lambda *v: in_doubles(*v, 1e-5)
    mapped = jax.vmap(function)(x, dy, scale, bias)
    for i in range(3):
        for a, b in zip(mapped, function(x[i], dy[i], scale[i], bias[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-14, atol=1e-14)
    y, dx, dscale, dbias = function(x[0, :0], dy[0, :0], scale[0], bias[0])
    assert y.shape == dx.shape == (0, 9)
    assert dscale.dtype == dbias.dtype == y.dtype == dx.dtype == "float64"
    for value in (np.nan, np.inf):
        y, dx, *_ = function(x[0].at[7, 3].set(value), dy[0], scale[0], bias[0])
        for found in (y, dx):
            assert np.isnan(found[:, 3]).all()
            assert np.isfinite(np.delete(found, 3, 1)).all()


def two_values(shape, first, second):
    """Returns entries of which each is one of two: what sums of them lose is all alike."""
    at = np.arange(np.prod(shape)).reshape(shape)
    return jnp.asarray(np.where(at // 3 % 2 == 0, first, second), "float64")


def nearly(dx, right, x):
    """Returns whether dx is right, next to what it is a difference of: here it is nearly none."""
    return np.abs(exact(dx) - right).max() <= 16 * 2.3e-16 / exact(x).std()


@needs_library
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 5000), (1, 49, 2, 512), (2, 1, 1, 100_000), (20_000, 1, 1, 2)]
)
def test_groups_of_doubles_that_are_repeated(shape, x64):
    x, dy = two_values(shape, 1.2986961328189226, -1.7), two_values(shape[::-1], 0.1, 0.7)
    dy = dy.reshape(shape)
    x = x.at[..., 0].add(0.3)
    case = group_case(x)._replace(epsilon=0.0)
    rule = {"centered": True, "epsilon": 0.0}
    xhat = reference.forward(case, x)
    dx, dscale, dbias = groups.backward_groups(x, None, None, dy, **rule)
    assert units(groups.forward_groups(x, **rule), xhat, "float64") <= 8
    assert nearly(dx, reference.backward(case, x, dy), x)
    for value, terms in ((dscale, exact(dy) * xhat), (dbias, exact(dy))):
        off = np.abs(exact(value) - terms.sum((0, 1)))
        assert np.all(off <= 4e-15 * np.abs(terms).sum((0, 1)))


@needs_library
@pytest.mark.parametrize("shape", [(2, 100_001), (30_000, 4)])
def test_rows_of_doubles_that_are_repeated(shape, x64):
    x, dy = two_values(shape, 1.2986961328189226, -1.7), two_values(shape, 0.7, 0.1)
    line = jnp.ones(shape[1])
    y, dx, dscale, dbias = compiled(True, 1e-5, True)(x, dy, line, 0 * line)
    xhat = reference.forward(case_of(x), x)
    assert units(y, xhat, "float64") <= 8
    assert nearly(dx, reference.backward(case_of(x), x, dy), x)
    for value, terms in ((dscale, exact(dy) * xhat), (dbias, exact(dy))):
        assert np.all(np.abs(exact(value) - terms.sum(0)) <= 4e-15 * np.abs(terms).sum(0))


@needs_library
@pytest.mark.parametrize("width", [1, 3, 16])
def test_columns_of_doubles_that_are_repeated(width, x64):
    x, dy = two_values((16_384, width), 1 / 3, -0.7), data((16_384, width), "float64")[1]
    check_doubles(x, dy, jnp.ones(width), jnp.zeros(width))


@needs_library
@pytest.mark.parametrize(("of_x", "of_scale"), [(1e-20, 1e303), (1e20, 1e-303)])
def test_doubles_of_a_scale_at_the_end_of_the_range(of_x, of_scale, x64):
    x, _, scale, _ = data((60, 5), "float64", deviation=of_x)
    scale = scale * of_scale
    case = column_case(x)._replace(epsilon=1e-24)
    xhat = reference.forward(case, x)
    moments = columns.column_moments_in_units(x)
    y = columns.forward_columns(x, scale, None, *moments, epsilon=1e-24, dtype="float64")
    assert units(y, xhat * exact(scale), "float64") <= 8
    case = case._replace(epsilon=0.0)
    one, line = x.reshape(1, 60, 5, 1), scale.reshape(5, 1)
    y = groups.forward_groups(one, line, centered=True, epsilon=0.0).reshape(60, 5)
    assert units(y, reference.forward(case, x) * exact(scale), "float64") <= 8


@needs_library
@pytest.mark.parametrize(("of_x", "of_dy"), [(1e90, 1e230), (1e-90, 1e-230)])
def test_products_of_doubles_that_would_leave_the_range(of_x, of_dy, x64):
    x, dy, *_ = data((2, 30, 2, 4), "float64", deviation=of_x)
    dy = dy * of_dy
    dx, dscale, _ = groups.backward_groups(x, None, None, dy, centered=True, epsilon=0.0)
    case = group_case(x)._replace(epsilon=0.0)
    assert units(dx / of_dy * of_x, reference.backward(case, x, dy) / of_dy * of_x, "float64") <= 16
    terms = exact(dy) * reference.forward(case, x) / of_dy
    off = np.abs(exact(dscale) / of_dy - terms.sum((0, 1)))
    assert np.all(off <= 4e-15 * np.abs(terms).sum((0, 1)))
    rows, of_rows = x.reshape(4, 120), dy.reshape(4, 120)
    dx, *_ = kernels.backward(rows, None, of_rows, centered=True, epsilon=0.0)
    case = case_of(rows, epsilon=0.0)
    right = reference.backward(case, rows, of_rows)
    assert units(dx / of_dy * of_x, right / of_dy * of_x, "float64") <= 16


@needs_library
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_norms_of_doubles(mean, x64):
    """From the front, where what is kept in between is float64 too."""
    x, dy, scale, bias = data((40, 6, 8), "float64", mean)
    stats = normax.RunningStats.create(8, dtype="float64")

    def batch(x, scale, bias):
        options = {"use_running_average": False, "implementation": "cpu"}
        return normax.batch_norm(x, stats, scale, bias, **options)[0]

    group = functools.partial(normax.group_norm, num_groups=2, implementation="cpu")
    flat = about_the_mean(x.reshape(40, 6, 2, 4), (1, 3))
    cases = (
        (batch, column_case(x), about_the_mean(x, (0, 1)), (0, 1)),
        (group, group_case(flat), flat, (0, 1)),
    )
    for norm, case, entries, axes in cases:
        case = case._replace(epsilon=1e-5 if norm is batch else 1e-6)
        y, back = jax.vjp(norm, x, scale, bias)
        dx, dscale, dbias = back(dy)
        xhat = reference.forward(case, entries).reshape(x.shape)
        moved = reference.backward(case, entries, (exact(dy) * exact(scale)).reshape(entries.shape))
        assert units(y, xhat * exact(scale) + exact(bias), "float64") <= 8
        assert units(dx, moved.reshape(x.shape), "float64") <= 16
        assert units(dscale, (exact(dy) * xhat).sum(axes), "float64") <= 16
        assert units(dbias, exact(dy).sum(axes), "float64") <= 16


@needs_library
def test_supports_says_why_not():
    def why(shape, x_dtype, **how):
        return kernels.supports(jax.ShapeDtypeStruct(shape, x_dtype), **how)

    for dtype in (*DTYPES, "float64"):
        assert why((4, 65), dtype) is why((0, 1), dtype) is None
    assert "int32" in why((4, 64), "int32")
    assert "float16 out of float32" in why((4, 64), "float32", dtype="float16")
    assert why((4, 64), "bfloat16", dtype="float32") is None
    assert why((4, 0), "float32") == why((), "float32") == "there is no row"
    four = jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.int32)
    assert "int32" in groups.supports_groups(four)
    assert "int32" in columns.supports_columns(four)
    four = jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float32)
    assert "activation" in groups.supports_groups(four, activation=jax.nn.relu)
    assert "no group" in groups.supports_groups(jax.ShapeDtypeStruct((2, 0, 4, 5), jnp.float32))


def test_what_an_older_build_left_hides_no_library(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("left", "installed")]
    for place in places:
        (place / "normax.egg-info").mkdir(parents=True)
        (place / "normax.egg-info" / "PKG-INFO").write_text("Name: normax\nVersion: 0\n")
    built = places[1] / "normax" / "kernels" / library.NAME
    built.parent.mkdir(parents=True)
    built.touch()
    monkeypatch.setattr(library, "__file__", str(tmp_path / "cpu_library.py"))
    monkeypatch.setattr(sys, "path", [*map(str, places), *sys.path])
    assert library._find() == built


@needs_library
@pytest.mark.parametrize("norm", NORMS)
def test_a_program_that_names_them_can_be_stored(norm):
    step, args = step_of(norm)
    with pytest.raises(ValueError, match="normax_"):
        jax.export.export(step)(*args)
    named = set(re.findall(r"@(normax_\w+)\(", step.lower(*args).as_text()))
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in named]
    stored = jax.export.export(step, disabled_checks=checks)(*args).serialize()
    for ours, theirs in zip(jax.export.deserialize(stored).call(*args), step(*args), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_library
def test_a_stored_program_is_run_by_whoever_imports_normax(tmp_path):
    """Nothing was traced there that would have loaded the library."""
    step = jax.jit(functools.partial(normax.layer_norm, implementation="cpu"))
    named = [jax.export.DisabledSafetyCheck.custom_call("normax_forward")]
    x = jnp.arange(12.0).reshape(3, 4) ** 2
    stored = tmp_path / "stored"
    stored.write_bytes(jax.export.export(step, disabled_checks=named)(x).serialize())
    program = f"""
import jax, normax, numpy
assert not jax._src.xla_bridge.backends_are_initialized()
x = numpy.arange(12, dtype="float32").reshape(3, 4) ** 2
step = jax.export.deserialize(bytearray(open({str(stored)!r}, "rb").read()))
numpy.save({str(tmp_path / "y.npy")!r}, step.call(x))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), step(x))


def test_a_library_that_is_not_there_or_too_new_is_refused(tmp_path):
    runtime = library._version_of_runtime()
    assert runtime is not None
    assert "not built" in library._register(tmp_path / "none.so", runtime)
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    assert "cannot be loaded" in library._register(broken, runtime)


@needs_library
@pytest.mark.parametrize("runtime", [None, (0, 0), (1, 9)])
def test_a_runtime_of_another_version_is_refused(runtime):
    assert "XLA's interface" in library._register(library.PATH, runtime)


@needs_library
def test_what_another_version_of_normax_left_is_refused(monkeypatch):
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    runtime = library._version_of_runtime()
    assert "another version of normax" in library._register(library.PATH, runtime)


@needs_library
def test_without_the_library_there_are_devices_and_a_reason(tmp_path):
    code = f"""
import pathlib
from normax.kernels import cpu_library
cpu_library.PATH = pathlib.Path({str(tmp_path / "none.so")!r})
cpu_library.unavailable.cache_clear()
import jax, jax.numpy as jnp, normax
assert jax.devices() and normax.layer_norm(jnp.ones((2, 3))).shape == (2, 3)
try:
    normax.layer_norm(jnp.ones((2, 3)), implementation="cpu")
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "were not built" in said.stdout


@needs_library
@pytest.mark.skipif(not shutil.which("g++"), reason="links a program of its own")
def test_every_set_of_instructions_that_this_processor_has(tmp_path):
    program, here = tmp_path / "levels", pathlib.Path(__file__).parent
    native = here.parent / "normax" / "kernels" / "native"
    sources = [f"-I{native}", str(here / "kernel_levels.cc"), str(library.PATH)]
    options = ["-std=c++17", "-O1", f"-Wl,-rpath,{library.PATH.parent}", "-o", str(program)]
    subprocess.run(["g++", *sources, *options], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    assert "baseline: 1170888 held, 0 wrong" in said.stdout
    if platform.machine() != "x86_64":
        return
    # Built without both of the others, as CI does once, it has neither; else it has them all.
    built = ctypes.CDLL(str(library.PATH))
    names = [f"_ZN6normax{len(level)}{level}7kernelsE" for level in ("avx2", "avx512")]
    has = [hasattr(built, name) for name in names]
    assert any(has) == all(has)
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    for level, flag in (("avx2", "avx2"), ("avx512", "avx512dq")):
        held = f"{level}: 1170888 held, 0 wrong" in said.stdout
        assert held == (flag in flags and all(has))


@needs_library
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="maps memory as Linux does"
)
def test_of_more_than_two_to_the_31_entries_none_is_missed(tmp_path):
    program, here = tmp_path / "huge", pathlib.Path(__file__).parent
    sources = [str(here / "huge_arrays.cc"), str(library.PATH), "-isystem", jax.ffi.include_dir()]
    options = ["-std=c++17", "-O1", f"-Wl,-rpath,{library.PATH.parent}", "-pthread"]
    subprocess.run(["g++", *sources, *options, "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    assert "all is the same" in said.stdout


@needs_library
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("ldd"), reason="asks the loader of Linux"
)
def test_the_library_needs_no_python():
    said = subprocess.run(["ldd", str(library.PATH)], capture_output=True, text=True, check=True)
    assert "python" not in said.stdout
