"""Numbers of any size: from subnormal to the largest, squares or no squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_accuracy import LIMITS

import normax
from normax import units

TINY = np.finfo(np.float32).tiny
SIZES = [1e-30, 1e-25, 1e-19, 1e-12, 1e12, 1e19, 1e25, 1e37, 3e38]


def batch_norm(x, **options):
    stats = normax.RunningStats.create(x.shape[-1])
    return normax.batch_norm(x, stats, use_running_average=False, **options)[0]


def group_norm(x, **options):
    return normax.group_norm(x, num_groups=2, **options)


NORMS = {
    "layer": (normax.layer_norm, Case("", None, (6, 48), (1,))),
    "rms": (normax.rms_norm, Case("", None, (6, 48), (1,), centered=False)),
    "batch": (batch_norm, Case("", None, (48, 6), (0,))),
    "group": (group_norm, Case("", None, (2, 9, 6), (1, 3), groups=2)),
    "instance": (normax.instance_norm, Case("", None, (2, 24, 3), (1,))),
}


def entries(shape, size, offset=0.5):
    x = np.random.default_rng(0).uniform(-1, 1, shape)
    x = (x + offset) / np.abs(x + offset).max()
    return jnp.asarray(x * size, jnp.float32)


def error(value, exact):
    """Returns the largest error in units of the last place of the largest exact value."""
    exact = np.asarray(exact, np.longdouble)
    largest = np.abs(exact).max()
    # Results below the normal numbers may be flushed to zero.
    off = np.abs(np.asarray(value).astype(np.longdouble) - exact).max() - TINY
    return float(max(off, 0) / largest / np.finfo(np.float32).eps)


@functools.cache
def compiled(name, epsilon, **options):
    """Returns the jitted output and gradient of a norm."""
    f = functools.partial(NORMS[name][0], epsilon=epsilon, **options)
    return jax.jit(lambda x, ct: (f(x), jax.vjp(f, x)[1](ct)[0]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("name", NORMS)
def test_every_size(name, epsilon, size):
    case = NORMS[name][1]._replace(epsilon=epsilon)
    x = entries(case.shape, size)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=case.shape), jnp.float32)
    y, dx = compiled(name, epsilon)(x, ct)
    assert error(y, reference.forward(case, x)) <= 4
    exact = reference.backward(case, x, ct)
    if TINY * 1e8 < np.abs(exact).max() < 1e37:
        assert error(dx, exact) <= 8
    else:
        assert np.isfinite(np.asarray(dx)).all() or np.abs(exact).max() > 1e37


@pytest.mark.parametrize("size", [s for s in SIZES if s > 1e-12])
def test_weights_of_every_size(size):
    v = entries((48, 3), size)
    exact = np.asarray(v, np.longdouble)
    exact = exact / np.sqrt((exact**2).sum(0))
    assert error(normax.weight_norm(v), exact) <= 4
    assert error(jax.jit(normax.weight_norm)(v), exact) <= 4


@pytest.mark.parametrize("size", [1e-39, 1e-41, 3e-44])
def test_subnormal_numbers(size):
    x = entries((4, 64), size)
    case = Case("", None, x.shape, (1,))
    assert not np.asarray(x * 1).any()  # this platform reads them as zero
    for epsilon in (0.0, 1e-30, 1e-6):
        exact = reference.forward(case._replace(epsilon=epsilon), x)
        assert error(normax.layer_norm(x, epsilon=epsilon), exact) <= 4
        exact = reference.forward(case._replace(epsilon=epsilon, centered=False), x)
        assert error(jax.jit(lambda x, e=epsilon: normax.rms_norm(x, epsilon=e))(x), exact) <= 4


def test_groups_of_all_sizes_at_once():
    sizes = np.array([1e-41, *SIZES, 1, 0])
    x = jnp.concatenate([entries((1, 64), 1) if s == 1 else entries((1, 64), s) for s in sizes])
    ours = normax.layer_norm(x, epsilon=0.0)
    each = jnp.concatenate([normax.layer_norm(row[None], epsilon=0.0) for row in x])
    for y in (ours, jax.vmap(lambda row: normax.layer_norm(row, epsilon=0.0))(x)):
        np.testing.assert_allclose(y, each, rtol=0, atol=2e-6)
    case = Case("", None, (12, 64), (1,), epsilon=0.0)
    assert error(ours[:-1], reference.forward(case, x[:-1])) <= 4
    np.testing.assert_array_equal(ours[-1], jnp.zeros(64))


@pytest.mark.parametrize("size", [6e4, 1e-4, 6e-8])
def test_float16_to_its_ends(size):
    x = entries((4, 64), size).astype(jnp.float16)
    case = Case("", None, x.shape, (1,), epsilon=1e-12)
    y, vjp = jax.vjp(lambda x: normax.layer_norm(x, epsilon=1e-12), x)
    exact = reference.forward(case, x)
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=0, atol=2e-3)
    # Gradients of small entries are beyond float16's end, and are infinite there: not NaN.
    assert not np.isnan(np.asarray(vjp(jnp.ones_like(x))[0])).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
@pytest.mark.parametrize("size", [1e-30, 1e25, 1e38])
def test_other_dtypes(dtype, size):
    x = entries((4, 64), size)
    if dtype == "complex64":
        x = jax.lax.complex(x, x[::-1])
    x = x.astype(dtype)
    wide = np.asarray(x).astype(np.clongdouble)
    d = wide - wide.mean(1, keepdims=True)
    exact = d / np.sqrt((np.abs(d) ** 2).mean(1, keepdims=True))
    y = np.asarray(normax.layer_norm(x, epsilon=0.0)).astype(np.clongdouble)
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(y - exact).max() <= 4 * eps * np.abs(exact).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e200, 1e307])
def test_float64(size):
    x = jnp.asarray(np.asarray(entries((4, 64), 1), np.float64) * size)
    case = Case("", None, x.shape, (1,), epsilon=0.0)
    exact = reference.forward(case, np.asarray(x))
    y = normax.layer_norm(x, epsilon=0.0)
    # Subnormal entries have fewer digits, and long double has the exponents for all.
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 2**20])
def test_devices_with_entries_of_different_sizes(offset):
    sizes = np.array([1e25, 1e37, 1e12, 1e30], np.float32)
    x = jnp.stack([entries((16, 3), s, offset=0.5) for s in sizes])
    if offset:
        x = x.at[:].set(entries((4, 16, 3), 1e25, offset=2.0**10))
    case = Case("", None, (64, 3), (0,), epsilon=0.0)
    exact = reference.forward(case, x.reshape(64, 3)).reshape(x.shape)
    norm = lambda x: normax.normalize_batch(x, epsilon=0.0, axis_name="i")[0]
    assert error(jax.vmap(norm, axis_name="i")(x), exact) <= 4
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4])
    one = jax.shard_map(lambda x: norm(x[0])[None], mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    assert error(jax.jit(one)(jax.device_put(x, NamedSharding(mesh, P("i")))), exact) <= 4


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e38])
def test_devices_far_apart(size):
    norm = lambda x: normax.normalize_batch(x, epsilon=0.0, axis_name="i")[0]
    pooled = lambda x: jax.vmap(norm, axis_name="i")(jnp.float32(size) * jnp.array(x))
    np.testing.assert_allclose(pooled([[[1.0]], [[-1.0]]]), [[[1]], [[-1]]], rtol=1e-6)
    root = np.sqrt(2)
    y = pooled([[[1.0], [-1.0]], [[0.0], [0.0]]])
    np.testing.assert_allclose(y, [[[root], [-root]], [[0], [0]]], rtol=1e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("name", NORMS)
def test_the_forms_for_other_platforms(name, epsilon, dtype):
    case = NORMS[name][1]._replace(epsilon=epsilon)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=case.shape), dtype)
    f = compiled(name, epsilon)
    y_limit, dx_limit = LIMITS[dtype]
    ulp = float(jnp.finfo(dtype).eps / jnp.finfo(jnp.float32).eps)
    far = 2.0**6 if dtype == "bfloat16" else 1e5
    sizes = (1e-25, 0.5), (1, far), (1e18, 0.0), (1e19, 0.0), (1e30, 0.5), (3e38, 0.0), (3e38, 2.0)
    for size, offset in sizes:
        x = entries(case.shape, size, offset).astype(dtype)
        exact = reference.backward(case, x, ct)
        for weight in (1, 2.0**-30):
            y, dx = f(x, ct * weight)
            assert error(y, reference.forward(case, x)) <= y_limit * ulp
            if np.abs(exact).max() * weight > TINY * 1e8:
                assert error(dx, exact * weight) <= dx_limit * ulp
    zeros = jnp.zeros(case.shape, dtype)
    np.testing.assert_array_equal(f(zeros, ct)[0], zeros)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("name", NORMS)
def test_an_activation_on_other_platforms(name, epsilon):
    case = NORMS[name][1]._replace(epsilon=epsilon)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=case.shape), jnp.bfloat16)
    f = compiled(name, epsilon, activation=jax.nn.silu)
    ulp = float(jnp.finfo(jnp.bfloat16).eps / jnp.finfo(jnp.float32).eps)
    for size, offset in ((1e-30, 0.5), (1e-3, 2.0), (1, 2.0**6), (1e18, 0.0), (1e30, 0.5)):
        x = entries(case.shape, size, offset).astype(jnp.bfloat16)
        activated, through = reference.silu(reference.forward(case, x), ct)
        exact = reference.backward(case, x, through)
        for weight in (1, 2.0**-30):
            y, dx = f(x, ct * weight)
            assert error(y, activated) <= ulp
            if np.abs(exact).max() * weight > TINY * 1e8:
                assert error(dx, exact * weight) <= ulp
    zeros = jnp.zeros(case.shape, jnp.bfloat16)
    np.testing.assert_array_equal(f(zeros, ct)[0], zeros)


@pytest.mark.usefixtures("form")
def test_an_activation_and_small_deviations():
    """Near 1e-38, of entries near 1e-33."""
    noise = np.random.default_rng(0).normal(size=(4, 512))
    x = jnp.asarray(1e-33 * (1 + 1e-5 * noise), jnp.float32)
    ct = jnp.asarray(1e-3 * np.random.default_rng(1).normal(size=x.shape), jnp.bfloat16)
    case = Case("", None, x.shape, (1,), epsilon=0.0)
    options = {"reduction_axes": 1, "epsilon": 0.0, "dtype": jnp.bfloat16}
    f = lambda x: normax.standardize(x, activation=jax.nn.silu, **options)[0]
    [dx] = jax.jit(lambda x, ct: jax.vjp(f, x)[1](ct))(x, ct)
    _, through = reference.silu(reference.forward(case, x), ct)
    assert error(dx, reference.backward(case, x, through)) <= 64


def test_moments_of_large_numbers():
    x = entries((1000,), 3e38)
    m = normax.moments(x, 0)
    exact = np.asarray(x, np.longdouble)
    np.testing.assert_allclose(m.mean, np.float64(exact.mean()), rtol=1e-6)
    assert np.isinf(m.var)  # float32 has no number for it
    x = entries((1000,), 1e19)
    exact = np.asarray(x, np.longdouble)
    np.testing.assert_allclose(normax.moments(x, 0).var, np.float64(exact.var()), rtol=1e-6)
    gradient = jax.grad(lambda x: normax.moments(x, 0).mean)(x)
    np.testing.assert_allclose(gradient, np.full(1000, 1e-3), rtol=1e-6)


def test_a_gradient_of_moments_of_zeros():
    dmean, dvar = jax.jacrev(lambda x: normax.moments(x, 0)[1:])(jnp.zeros(4))
    np.testing.assert_array_equal(dmean, np.full(4, 0.25))
    np.testing.assert_array_equal(dvar, np.zeros(4))


def test_statistics_too_large_for_float32_are_not_remembered():
    x = entries((64, 2), 1) * jnp.array([[1.0, 1e25]])
    stats = normax.RunningStats.create(2)
    y, new = normax.batch_norm(x, stats, use_running_average=False)
    assert np.isfinite(np.asarray(y)).all()
    assert new.count.tolist() == [64, 0]
    assert (new.mean[1], new.var[1]) == (0, 1)


def test_a_unit_is_a_power_of_two_near_the_largest_entry():
    x = jnp.array([[3.0, -5.0], [1e-30, 0.0], [0.0, 0.0], [1e-40, 0.0], [3e38, 1.0]])
    unit = np.asarray(units.choose(x, (1,), 0.0))[:, 0].tolist()
    assert unit == [4, 2.0**-100, 1, 2.0**-100, 2.0**80]
    assert units.choose(x, (1,), 2.0**-10)[1, 0] == 2.0**-10


@pytest.mark.parametrize("unit", [1.0, 2.0**-64, 2.0**70, 2.0**-100])
def test_division_by_a_unit_is_exact(unit):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=4000) * 10.0 ** rng.uniform(-46, 38, 4000)).astype(np.float32)
    exact = x.astype(np.longdouble) / np.longdouble(unit)
    ours = np.asarray(jax.jit(units.divide_exactly)(x, jnp.float32(unit))).astype(np.longdouble)
    fits = (np.abs(exact) >= TINY) & (np.abs(exact) < 3.4e38)
    assert fits.sum() > 1500
    np.testing.assert_array_equal(ours[fits], exact[fits])


FEATURES = 3
STATS = normax.RunningStats.create(FEATURES)
BATCH, INSTANCE, LAYER = ({"axis": axis, "keepdims": True} for axis in ((0, 1), 1, (1, 2)))


def instance(x, epsilon):
    root = lambda over: jnp.sqrt(x.var(**over) + epsilon)
    return x / jnp.maximum(root(BATCH), x + root(INSTANCE))


def mixture(x, epsilon):
    mean, var = ((f(**INSTANCE) + f(**LAYER) + f(**BATCH)) / 3 for f in (x.mean, x.var))
    return (x - mean) / jnp.sqrt(var + epsilon)


def by_variance(x, epsilon):
    return x / jnp.sqrt(x.var(**BATCH) + epsilon)


# A function of x and epsilon, and the formula of its paper.
THROUGH_STATISTICS = {
    "variance_only": (
        lambda x, e: normax.variance_only_batch_norm(
            x, STATS, use_running_average=False, epsilon=e
        )[0],
        by_variance,
    ),
    "switchable": (
        lambda x, e: normax.switchable_norm(
            x, STATS, jnp.zeros(3), jnp.zeros(3), use_running_average=False, epsilon=e
        )[0],
        mixture,
    ),
    "evonorm_b0": (
        lambda x, e: normax.evonorm_b0(x, STATS, use_running_average=False, epsilon=e)[0],
        instance,
    ),
    "domain": (
        lambda x, e: normax.domain_batch_norm(
            x,
            normax.RunningStats.create((1, FEATURES)),
            jnp.zeros(len(x), jnp.int32),
            use_running_average=False,
            epsilon=e,
        )[0],
        lambda x, e: (x - x.mean(**BATCH)) / jnp.sqrt(x.var(**BATCH) + e),
    ),
    "features": (
        lambda x, e: normax.transform_features(x, normax.standardize_features(x)),
        lambda x, e: (x - x.mean(**BATCH)) / x.std(**BATCH),
    ),
    "local_response": (
        lambda x, e: normax.local_response_norm(x, size=3, alpha=3.0, k=1.0),
        lambda x, e: (
            x
            * (
                1 + x**2 + jnp.pad(x[..., 1:] ** 2, ((0, 0), (0, 0), (0, 1)))
                + jnp.pad(x[..., :-1] ** 2, ((0, 0), (0, 0), (1, 0)))
            )
            ** -0.75
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1e-16, 1e-13, 1e-9, 1e9, 1e13, 1e16])
@pytest.mark.parametrize("name", THROUGH_STATISTICS)
def test_gradients_through_statistics(name, size, x64):
    """Whose cubes are not in range: a deviation of 1e13 has one of 1e39."""
    if name == "local_response":
        size = min(size, 1e13)  # the power of a larger square leaves the range by itself
    ours, formula = THROUGH_STATISTICS[name]
    epsilon = 0.0 if size < 1 else 1e-5
    x, ct = np.random.default_rng(0).normal(size=(2, 4, 6, FEATURES))
    x = (x * size).astype(np.float32)
    _, vjp = jax.vjp(lambda x: ours(x, epsilon), jnp.asarray(x))
    _, right = jax.vjp(lambda x: formula(x, epsilon), jnp.asarray(x, jnp.float64))
    (dx,), (expected,) = vjp(jnp.asarray(ct, jnp.float32)), right(jnp.asarray(ct))
    assert dx.dtype == jnp.float32
    largest = float(abs(expected).max())
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("size", [1e-11, 1.0, 1e13, 1e19, 1e30, 1e36])
@pytest.mark.parametrize("bound", [None, 1.5])
def test_gradients_of_kernels_over_their_largest_singular_value(bound, size, x64):
    w, ct = np.array([[3.0, 1], [1, 2], [0, 1]]), np.arange(1.0, 7).reshape(3, 2)
    state = normax.SpectralState(jnp.ones((1, 2), jnp.float32), jnp.ones((), jnp.float32))

    def ours(w):
        return normax.spectral_norm(w, state, n_steps=30, bound=bound)[0]

    def formula(w):
        largest = jnp.linalg.norm(w, 2)
        return w / (largest if bound is None else jnp.maximum(largest / bound, 1))

    large = (w * size).astype(np.float32)
    (found,) = jax.vjp(ours, jnp.asarray(large))[1](jnp.asarray(ct, jnp.float32))
    (expected,) = jax.vjp(formula, jnp.asarray(large, jnp.float64))[1](jnp.asarray(ct))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize("size", [1.0, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("masked", [False, True])
def test_a_style_of_any_size(masked, size):
    rng = np.random.default_rng(0)
    x, style = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)
    style = (style + 2) * np.float32(size)
    mask = np.arange(5)[:, None] < (3 if masked else 5)
    given = np.where(mask, style, np.nan)
    y = normax.adaptive_instance_norm(x, given, style_mask=mask, epsilon=0.0)
    valid = style[:, mask[:, 0]].astype(np.longdouble)
    wide = x.astype(np.longdouble)
    expected = valid.std(1, keepdims=True) * (wide - wide.mean(1, keepdims=True)) / wide.std(
        1, keepdims=True
    ) + valid.mean(1, keepdims=True)
    np.testing.assert_allclose(y, expected.astype(np.float64), rtol=1e-5, atol=1e-5 * size)
