"""The forms of the formulas that other platforms get: as accurate, with right derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_accuracy
import test_derivatives
from cases import CASES, Case
from differences import check_derivatives

import normax
from normax import sums

pytestmark = pytest.mark.usefixtures("form")
FEW = [c for c in CASES if c.name in ("batch", "layer", "rms", "group", "instance")]
ACTIVATIONS = [jax.nn.relu, jax.nn.silu]


@pytest.mark.parametrize("n", [64, 1000])
@pytest.mark.parametrize("dtype", test_accuracy.DTYPES)
def test_grid(dtype, n):
    rng = np.random.default_rng(0)
    for mean, deviation in test_accuracy.SCALES:
        if dtype == "float16" and mean == 1e6:
            continue
        rows = jnp.asarray(rng.normal(size=(test_accuracy.ROWS, n)) * deviation + mean, dtype)
        ct = jnp.asarray(rng.normal(size=(test_accuracy.ROWS, n)), dtype)
        test_accuracy.check(rows, ct, dtype)


# Longer rows would show how a CPU sums, one number after the other, and no accelerator does.
@pytest.mark.parametrize("n", [3, 1000, 8192])
def test_stress_rows(n):
    ct = jnp.asarray(np.random.default_rng(2).normal(size=(1, n)), "float32")
    for row in test_accuracy.stress(n).values():
        rows = jnp.asarray(row, "float32")[None]
        test_accuracy.check(rows, ct, "float32", only=("layer", "batch", "rms"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_rows(dtype):
    for n in (3, 7, 1000):
        for value in (1 / 3, 1.0, 1e6, 1e7 + 1, 3e9 / 7, 1e30):
            test_accuracy.test_constant_rows_are_exactly_zero_with_the_right_gradient(
                value, n, dtype
            )


def test_stored_statistics():
    for scale, dtype in test_accuracy.GRID:
        test_accuracy.test_stored_statistics(scale, dtype, 1000)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_derivatives_of(case):
    test_derivatives.test_values_jvp_and_vjp(case, False)
    x, scale, bias, _, _ = test_derivatives.inputs(case)
    check_derivatives(lambda *args: case.apply(*args, None), (x, scale, bias))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_narrow_entries_where_python_has_wide_numbers(case, dtype):
    x = jnp.ones(case.shape, dtype).at[0].set(2)
    norm = jax.jit(lambda x: case.apply(x, None, None, None))
    y, backward = jax.vjp(norm, x)
    assert y.dtype == backward(y)[0].dtype == x.dtype
    # Beside what this platform has, for it is lowered for each: none may return other dtypes.
    there = jax.export.export(norm, platforms=("cpu", "cuda", "tpu"))(x)
    assert there.out_avals[0].dtype == x.dtype


@pytest.mark.parametrize("shape", [(1,), (5, 1), (0, 4), (3, 0)])
def test_shapes_with_little_in_them(shape):
    x = jnp.full(shape, 2.0)
    axes = tuple(range(len(shape)))
    y, backward = jax.vjp(lambda x: normax.standardize(x, reduction_axes=axes)[0], x)
    np.testing.assert_array_equal(y, jnp.zeros(shape))
    # What rounding leaves of one less a mean of ones, times a reciprocal deviation of a thousand.
    np.testing.assert_allclose(backward(jnp.ones(shape))[0], jnp.zeros(shape), atol=1e-3)


def test_a_row_may_be_several_axes():
    case = Case("", None, (4, 3, 5, 2), (1, 2, 3))
    x = 1e4 + jax.random.normal(jax.random.key(0), case.shape)
    scale, bias = jnp.array([2.0, -1.0]), jnp.array([0.5, 3.0])
    y = normax.layer_norm(x, scale, bias, reduction_axes=(1, 2, 3), epsilon=1e-5)
    exact = reference.forward(case, x) * np.asarray(scale) + np.asarray(bias)
    assert test_accuracy.units(y, exact, "float32") <= 4


def test_sums_in_parts():
    x = jax.random.normal(jax.random.key(0), (3, 16, 7, 5))
    for axes in ((1,), (1, 2), (2,), (0, 1, 2), (1, 2, 3), (3,), (0, 2), ()):
        exact = np.asarray(x, np.float64).sum(axes, keepdims=True)
        np.testing.assert_allclose(sums.total_in_one_read(x, axes), exact, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sums.total(x, axes), exact, rtol=1e-5, atol=1e-5)
    # Columns that are cut: along the first axis, along a later one, and where nothing divides them.
    for shape in ((256, 3), (8, 16, 16, 3), (2, 2, 96, 3), (97, 3), (1, 64, 3), (31, 3), (8192, 3)):
        x = 1 + jax.random.normal(jax.random.key(0), shape)
        axes = tuple(range(len(shape) - 1))
        exact = np.asarray(x, np.float64).sum(axes, keepdims=True)
        for cut in (True, False):
            found = sums.total_in_one_read(x, axes, cut)
            text = str(jax.make_jaxpr(sums.total_in_one_read, static_argnums=(1, 2))(x, axes, cut))
            few = shape[0] in (97, 31, 8192)
            assert text.count("reduce_sum") == (1 if few or not cut else 2), shape
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    for length in (sums.LONG, sums.LONG + 3):
        for shape, axes in (
            ((2, length), (1,)),
            ((length, 3), (0,)),
            ((3, length // 2, 2), (0, 1, 2)),
        ):
            x = 1 + jax.random.normal(jax.random.key(0), shape)
            exact = np.asarray(x, np.float64).sum(axes, keepdims=True)
            np.testing.assert_allclose(sums.total_in_parts(x, axes), exact, rtol=1e-6)


def test_the_median_of_five():
    values = np.random.default_rng(0).normal(size=(5, 1000)).astype("float32")
    np.testing.assert_array_equal(sums._median(list(jnp.asarray(values))), np.median(values, 0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reduced", [(0, 1), (2,)], ids=["batch", "layer"])
def test_an_activation(reduced, activation):
    x, scale, bias, _, ct = test_derivatives.inputs(Case("", None, (6, 3, 4), reduced))
    mask = jnp.ones((6, 3, 4), bool)

    def both(scaled, **options):
        f = lambda *args: scaled(*args, reduction_axes=reduced, **options)
        return jax.tree.leaves((f(x, scale, bias), jax.vjp(f, x, scale, bias)[1](ct)))

    fused = lambda *args, **o: normax.standardize(*args, activation=activation, **o)[0]
    apart = both(lambda *args, **options: activation(normax.standardize(*args, **options)[0]))
    for options in ({}, {"mask": mask}):
        for ours, theirs in zip(both(fused, **options), apart, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "dtype", "mean", "limit"),
    [("bfloat16", "bfloat16", 3, 1), ("float16", "float16", 3, 1), ("float32", "bfloat16", 1e6, 8)],
)
@pytest.mark.parametrize(
    ("reduced", "centered", "groups"),
    [((0, 1), True, None), ((2,), True, None), ((2,), False, None), ((1, 3), True, 4)],
    ids=["batch", "layer", "rms", "group"],
)
def test_an_activation_in_16_bits(reduced, centered, groups, given, dtype, mean, limit):
    # Of rows of twenty a GPU does not compute SiLU where it has them on chip.
    case = Case("", None, (64, 6, 20), reduced, centered=centered, groups=groups)
    keys = jax.random.split(jax.random.key(0), 4)
    x = mean + jax.random.normal(keys[0], case.shape, given)
    ct = 3 + jax.random.normal(keys[1], case.shape, dtype)
    scale, bias = (1 + jax.random.normal(key, 20) for key in keys[2:])
    options = {"activation": jax.nn.silu, "epsilon": case.epsilon, "dtype": dtype}
    if groups:
        norm = functools.partial(normax.group_norm, num_groups=groups, **options)
    else:
        options |= {"reduction_axes": reduced, "centered": centered}
        norm = lambda *args: normax.standardize(*args, **options)[0]
    y, backward = jax.vjp(jax.jit(norm), x, scale, bias)
    xhat = reference.forward(case, x)
    before = xhat * np.asarray(scale) + np.asarray(bias)
    activated, through = reference.silu(before, ct)
    dx = reference.backward(case, x, through * np.asarray(scale))
    of_parameters = (through * xhat).sum((0, 1)), through.sum((0, 1))
    assert test_accuracy.units(y, activated, dtype) <= 1
    found = backward(ct)
    assert test_accuracy.units(found[0], dx, given) <= limit
    for ours, exact in zip(found[1:], of_parameters, strict=True):
        assert test_accuracy.units(ours, exact, "float32") <= 16


def test_mapped_where_one_alone_loses_digits():
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))
    x = x.at[1, 2].add(1e6)
    norm = lambda x: normax.layer_norm(x, epsilon=1e-5)
    twice = jax.jit(jax.vmap(jax.vmap(norm)))(x)
    exact = reference.forward(Case("", None, x.shape, (2,)), x)
    assert test_accuracy.units(twice, exact, "float32") <= 4


def test_parameters_of_another_dtype():
    x = jax.random.normal(jax.random.key(0), (3, 16), jnp.bfloat16)
    for scale, bias in (("bfloat16", "float32"), ("float16", "bfloat16")):
        args = x, jnp.ones(16, scale), jnp.zeros(16, bias)
        y, backward = jax.vjp(normax.layer_norm, *args)
        assert [d.dtype for d in backward(y)] == [a.dtype for a in args]


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1e30])
@pytest.mark.parametrize("reduced", [(0,), (1,)], ids=["batch", "layer"])
def test_cotangents_of_any_size(reduced, epsilon):
    case = Case("", None, (64, 48), reduced, epsilon=epsilon)
    options = {"reduction_axes": reduced, "epsilon": epsilon}

    @jax.jit
    def both(x, ct):
        f = lambda x, scale: normax.standardize(x, scale, **options)[0]
        y, backward = jax.vjp(f, x, jnp.ones(48))
        return y, *backward(ct)

    for size, along in ((1e-10, 1e-25), (1e18, 1e16), (1e10, 1e25), (1, 1)):
        x = size * jax.random.normal(jax.random.key(0), case.shape)
        ct = along * jax.random.normal(jax.random.key(1), x.shape)
        y, dx, dscale = both(x, ct)
        xhat = reference.forward(case, x)
        assert test_accuracy.units(y, xhat, "float32") <= 4
        exact = reference.backward(case, x, ct)
        if 1e-30 < np.abs(exact).max() < 1e37:
            assert test_accuracy.units(dx, exact, "float32") <= 8
        weighted = (np.asarray(ct, np.longdouble) * xhat).sum(0)
        if np.abs(weighted).max() > 1e-30:
            assert test_accuracy.units(dscale, weighted, "float32") <= 64


def test_sizes_that_are_symbols():
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 4"), jnp.float32)
    for norm in (normax.instance_norm, lambda x: normax.group_norm(x, num_groups=2)):
        step = jax.jit(jax.grad(lambda x, norm=norm: jnp.sum(norm(x) ** 3)))
        there = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(x)
        here = jax.random.normal(jax.random.key(0), (2, 5, 8, 4))
        np.testing.assert_allclose(there.call(here), step(here), rtol=1e-4, atol=1e-4)


def test_what_the_samples_do_not_show():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (401, 4))) * 1e20
    for step, value in ((100, 0.0), (80, 0.0), (50, 1e30)):
        rows = x.at[::step].set(value)
        case = Case("", None, x.shape, (0,), epsilon=1e-5)
        y = test_accuracy.batch_norm(rows)[0]
        assert test_accuracy.units(y, reference.forward(case, rows), "float32") <= 32


@pytest.mark.parametrize("odd", [0, 4])
def test_a_sample_that_is_like_nothing_else(odd):
    x = jax.random.normal(jax.random.key(0), (20000, 2))
    rows = sums._sample(jnp.arange(len(x))[:, None], (0,), odd)
    rows = x.at[rows[0, 0]].set(1e6)
    case = Case("", None, x.shape, (0,), epsilon=1e-5)
    y = test_accuracy.batch_norm(rows)[0]
    assert test_accuracy.units(y, reference.forward(case, rows), "float32") <= 8


@pytest.mark.usefixtures("x64")
def test_float64_has_digits_of_its_own():
    steps = np.random.default_rng(0).integers(-3, 4, (2, 64))
    x = jnp.asarray((1 + steps * 2.0**-50) * 2.0**60)
    case = Case("", None, x.shape, (1,), epsilon=1e-6)
    y = np.asarray(normax.layer_norm(x))
    np.testing.assert_allclose(y, reference.forward(case, x).astype(float), atol=1e-9)
