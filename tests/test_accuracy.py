"""A few units in the last place, whatever the mean and scale: outputs, gradients and state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case

import normax

SCALES = [(0, 1), (1e3, 1), (1e4, 1), (1e6, 1), (0, 1e-4), (0, 1e4), (1e4, 1e-2)]
LENGTHS = [64, 1000, 1024, 65536]
DTYPES = ["float32", "bfloat16", "float16"]
# float16 ends at 65504.
GRID = [(s, d) for s in SCALES for d in DTYPES if not (d == "float16" and s[0] == 1e6)]
LIMITS = {"float32": (4, 8), "bfloat16": (1, 1), "float16": (1, 1)}
ROWS = 6


def batch_norm(x):
    stats = normax.RunningStats.create(x.shape[1])
    return normax.batch_norm(x, stats, use_running_average=False, momentum=0.0)


train = jax.jit(batch_norm)


def cases(rows, n):
    """Returns (case, function, how rows become x) for the five norms over rows of length n."""
    eps = {"epsilon": 1e-5}
    same = lambda x: x
    return [
        (Case("layer", None, (rows, n), (1,)), lambda x: normax.layer_norm(x, **eps), same),
        (
            Case("rms", None, (rows, n), (1,), centered=False),
            lambda x: normax.rms_norm(x, **eps),
            same,
        ),
        (Case("batch", None, (n, rows), (0,)), lambda x: batch_norm(x)[0], lambda x: x.T),
        (
            Case("group", None, (rows // 2, n // 4, 8), (1, 3), groups=2),
            lambda x: normax.group_norm(x, num_groups=2, **eps),
            # Each row becomes a group of four features.
            lambda x: jnp.moveaxis(x.reshape(rows // 2, 2, n // 4, 4), 1, 2).reshape(
                rows // 2, n // 4, 8
            ),
        ),
        (
            Case("instance", None, (1, n, rows), (1,)),
            lambda x: normax.instance_norm(x, **eps),
            lambda x: x.T[None],
        ),
    ]


def units(value, exact, dtype):
    """Returns the largest error in units of the last place at the largest exact value."""
    error = np.abs(np.asarray(value).astype(np.longdouble) - exact).max()
    largest = np.abs(exact).max()
    return float(error / max(largest, np.longdouble(1e-30)) / jnp.finfo(dtype).eps)


@functools.cache
def compiled(shape):
    """Returns the cases of a shape with their jitted output and gradient: compiled once for all."""

    def both(f):
        def outputs(x, t):
            y, backward = jax.vjp(f, x)
            # A program that is differentiated may compute y in another form.
            return f(x), y, backward(t)[0]

        return jax.jit(outputs)

    return [(case, both(function), arrange) for case, function, arrange in cases(*shape)]


def check(rows, ct, dtype, only=None):
    y_limit, dx_limit = LIMITS[dtype]
    for case, function, arrange in compiled(rows.shape):
        if only and case.name not in only:
            continue
        x, t = arrange(rows), arrange(ct)
        y, same, dx = function(x, t)
        assert y.dtype == same.dtype == dx.dtype == x.dtype
        exact = reference.forward(case, x)
        assert units(y, exact, dtype) <= y_limit, case.name
        assert units(same, exact, dtype) <= y_limit, case.name
        # Of three values one degree of freedom is left: dx is a difference of nearly equal numbers.
        if rows.shape[1] > 3:
            assert units(dx, reference.backward(case, x, t), dtype) <= dx_limit, case.name


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_grid(scale, dtype, n):
    mean, deviation = scale
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(ROWS, n)) * deviation + mean, dtype)
    check(rows, jnp.asarray(rng.normal(size=(ROWS, n)), dtype), dtype)


def stress(n):
    """Returns rows that are hard: outliers, clusters, ramps, heavy tails, constants, one ulp."""
    rng = np.random.default_rng(1)
    outlier = rng.normal(size=n)
    outlier[n // 2] = 1e6
    one_ulp = np.full(n, 1e6, np.float32)
    one_ulp[: n // 3] = np.nextafter(np.float32(1e6), np.float32(2e6))
    return {
        "outlier": outlier,
        "outlier_first": np.concatenate([[1e6], rng.normal(size=n - 1)]),
        "clusters": np.where(rng.random(n) < 0.5, -1e4, 1e4) + rng.normal(size=n),
        "ramp": np.linspace(1e6, 1e6 + n, n),
        "lognormal": rng.lognormal(sigma=3, size=n),
        "cauchy": rng.standard_cauchy(size=n),
        "one_ulp": one_ulp,
    }


@pytest.mark.parametrize("n", [3, 64, 1000, 65537])
@pytest.mark.parametrize("kind", sorted(stress(3)))
def test_stress_rows(kind, n):
    row = jnp.asarray(stress(n)[kind], "float32")[None]
    ct = jnp.asarray(np.random.default_rng(2).normal(size=(1, n)), "float32")
    check(row, ct, "float32", only=("layer", "batch", "rms"))


@pytest.mark.parametrize("kind", ["outlier", "lognormal"])
def test_long_rows_and_cotangents_of_one_sign(kind):
    """One sum of so many numbers that grow it loses digits, whatever a processor adds at once."""
    n = 2**18 + 1
    ct = jnp.asarray(np.random.default_rng(2).uniform(size=(1, n)) ** 4, "float32")
    check(jnp.asarray(stress(n)[kind], "float32")[None], ct, "float32", only=("layer",))


@jax.jit
def layer_norm_and_gradient(x, ct):
    y, vjp = jax.vjp(lambda x: normax.layer_norm(x, epsilon=1e-5), x)
    return y, vjp(ct)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [3, 7, 1000, 65537])
@pytest.mark.parametrize("value", [1 / 3, 1.0, 1e6, 1e7 + 1, 3e9 / 7, 1e30])
def test_constant_rows_are_exactly_zero_with_the_right_gradient(value, n, dtype):
    rows = jnp.full((1, n), value, dtype)
    ct = jnp.asarray(np.random.default_rng(2).normal(size=(1, n)), dtype)
    y, dx = layer_norm_and_gradient(rows, ct)
    np.testing.assert_array_equal(y, jnp.zeros_like(y))
    np.testing.assert_array_equal(normax.layer_norm(rows, epsilon=1e-5), jnp.zeros_like(y))
    case = Case("layer", None, rows.shape, (1,))
    assert units(dx, reference.backward(case, rows, ct), dtype) <= 8


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_stored_statistics(scale, dtype, n):
    mean, deviation = scale
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(n, 4)) * deviation + mean, dtype)
    _, stats = train(x)
    exact = np.asarray(x).astype(np.longdouble)
    var = exact.var(0)
    np.testing.assert_allclose(np.asarray(stats.var), var, rtol=4e-6, atol=0)
    # The mean to its own rounding, or to that of the values where it is near zero.
    tolerance = 4e-6 * np.maximum(np.abs(exact.mean(0)), np.sqrt(var)) + 1e-30
    assert (np.abs(np.asarray(stats.mean) - exact.mean(0)) <= tolerance).all()
    assert stats.mean.dtype == stats.var.dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scale_and_bias(dtype):
    rows, n = 512, 64
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(rows, n)) + 100, dtype)
    ct = jnp.asarray(rng.normal(size=(rows, n)), dtype)
    scale, bias = jnp.ones(n), jnp.zeros(n)
    _, vjp = jax.vjp(lambda s, b: normax.layer_norm(x, s, b, epsilon=1e-5), scale, bias)
    dscale, dbias = vjp(ct)
    exact_ct = np.asarray(ct).astype(np.longdouble)
    xhat = reference.forward(Case("layer", None, x.shape, (1,)), x)
    limit = 8 * np.sqrt(rows)
    assert units(dscale, (exact_ct * xhat).sum(0), "float32") <= limit
    assert units(dbias, exact_ct.sum(0), "float32") <= limit


def test_a_long_reduction_keeps_mean_and_variance():
    x = jax.random.uniform(jax.random.key(0), (2**24,)) + jnp.float32(999.5)
    count, mean, var = jax.jit(lambda x: normax.moments(x, 0))(x)
    exact = np.asarray(x, np.float64)
    assert int(count) == 2**24
    np.testing.assert_allclose(mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jit_equals_eager(dtype):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(8, 1000)) + 1e3, dtype)
    eager, jitted = normax.layer_norm(x), jax.jit(normax.layer_norm)(x)
    assert units(eager, np.asarray(jitted).astype(np.longdouble), dtype) <= 2


def test_float16_of_nearly_equal_entries():
    x = jnp.full((1, 10000), 1024, jnp.float16).at[0, 0].set(1025)
    exact = reference.forward(Case("layer", None, x.shape, (1,), epsilon=1e-6), x)
    y = np.asarray(normax.layer_norm(x)).astype(np.longdouble)
    np.testing.assert_allclose(y[0, 1].astype(float), exact[0, 1].astype(float), rtol=2e-3)
