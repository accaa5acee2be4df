"""Scaling of features: scikit-learn's numbers, on arrays and on streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.base import clone
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

import normax

KEY = jax.random.key(0)
CONSTANT = (2, 4)
SCALERS = {
    "standard": (normax.standardize_features, StandardScaler()),
    "min-max": (normax.min_max_features, MinMaxScaler()),
    "min-max in a range": (
        functools.partial(normax.min_max_features, feature_range=(-2, 3)),
        MinMaxScaler((-2, 3)),
    ),
    "robust": (normax.robust_features, RobustScaler()),
    "robust in a range": (
        functools.partial(normax.robust_features, quantile_range=(5.0, 93.7)),
        RobustScaler(quantile_range=(5.0, 93.7)),
    ),
}
each_scaler = pytest.mark.parametrize(("measure", "scaler"), SCALERS.values(), ids=SCALERS)
each_measure = pytest.mark.parametrize("measure", [s[0] for s in SCALERS.values()], ids=SCALERS)
x64 = pytest.mark.usefixtures("x64")


def table(rows=101, seed=0):
    """Returns columns of several sizes in float64; those of `CONSTANT` have equal entries."""
    rng = np.random.default_rng(seed)
    spread = np.array([1.0, 400.0, 0.0, 1e-3, 0.0, 1.0])
    return rng.normal(size=(rows, 6)) * spread + np.array([0.0, 3000.0, 7.0, -1.0, 0.1, 1e6])


def streamed(x, measure, merge, ends=(1, 30, 31, 90)):
    """Returns what was measured on chunks of several lengths, an empty one among them."""
    chunks = [measure(jnp.asarray(part), 0) for part in (*np.split(x, ends), x[:0])]
    return functools.reduce(merge, chunks)


STREAMS = {
    "standard": lambda x: normax.standardize_features(streamed(x, normax.moments, normax.merge)),
    "min-max": lambda x: normax.min_max_features(
        streamed(x, normax.extremes, normax.merge_extremes)
    ),
}


def offset_and_factor(fitted):
    """Returns what a fitted scikit-learn scaler does, as x -> (x - offset) / factor."""
    if isinstance(fitted, MinMaxScaler):
        return -fitted.min_ / fitted.scale_, 1 / fitted.scale_
    center = fitted.mean_ if isinstance(fitted, StandardScaler) else fitted.center_
    return center, fitted.scale_


def agree(scaling, fitted, rtol=1e-12):
    """Checks a float64 scaling against a fitted scaler, both ways, on other entries."""
    x = table(seed=1)
    y = normax.transform_features(x, scaling)
    # A shift by the rounding of the offset shows beside a small deviation.
    shift = 1e-15 * np.abs(np.asarray(scaling.offset) / np.asarray(scaling.factor)).max()
    np.testing.assert_allclose(y, fitted.transform(x), rtol=rtol, atol=shift)
    np.testing.assert_allclose(normax.inverse_features(y, scaling), x, rtol=1e-12)
    back = normax.inverse_features(x, scaling)
    np.testing.assert_allclose(back, fitted.inverse_transform(x), rtol=rtol, atol=1e-11)


@x64
@each_scaler
def test_scikit_learn(measure, scaler):
    agree(measure(table()), clone(scaler).fit(table()))


@x64
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@each_scaler
def test_scikit_learn_on_few_rows(measure, scaler, rows):
    agree(measure(table(rows)), clone(scaler).fit(table(rows)))


@each_scaler
def test_float32_is_scikit_learn_in_float64(measure, scaler):
    x = table().astype(np.float32)
    fitted = clone(scaler).fit(x.astype(np.float64))
    scaling = measure(x)
    assert scaling.offset.dtype == scaling.factor.dtype == jnp.float32
    offset, factor = offset_and_factor(fitted)
    # Two roundings of the offset, in multiples of the factor.
    shift = np.spacing(np.abs(np.asarray(scaling.offset))) / factor
    assert (np.abs(scaling.offset - offset) <= (1e-6 + shift) * factor).all()
    assert (np.abs(scaling.factor / factor - 1) <= 1e-6 + shift).all()
    y, exact = normax.transform_features(x, scaling), fitted.transform(x.astype(np.float64))
    assert (np.abs(y - exact) <= (1e-6 + shift) * (1 + np.abs(exact))).all()


@pytest.mark.parametrize("size", [1e-34, 1e-30, 1e-20, 1e20, 1e30, 1e38, 1.6e38])
@each_scaler
def test_any_size_of_float32(measure, scaler, size):
    x = (np.random.default_rng(5).uniform(-1, 1, (64, 3)) * size).astype(np.float32)
    wide = x.astype(np.float64) / size
    fitted = clone(scaler).fit(wide)
    y = normax.transform_features(x, measure(x))
    np.testing.assert_allclose(y, fitted.transform(wide), rtol=1e-5, atol=2e-5)
    back = np.asarray(normax.inverse_features(y, measure(x)), np.float64) / size
    np.testing.assert_allclose(back, wide, rtol=1e-5, atol=1e-5)


def test_entries_further_apart_than_any_number():
    x = np.float32([-3.3e38, -3.2e38, 3.1e38, 3.2e38, 3.3e38])[:, None]
    for percent in ((1.0, 20.0), (60.0, 90.0), (30.0, 40.0)):
        scaling = normax.robust_features(x[:4], quantile_range=percent)
        fitted = RobustScaler(quantile_range=percent).fit(x[:4].astype(np.float64))
        np.testing.assert_allclose(scaling, (fitted.center_, fitted.scale_), rtol=1e-5, atol=1e32)
    scaling = normax.standardize_features(x)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean()) / wide.std()
    np.testing.assert_allclose(normax.transform_features(x, scaling), expected, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_entry_beside_a_quantile(sign):
    x = sign * np.float32([1.0, 2.0, 3.0, 4.0, np.inf])[:, None]
    scaling = normax.robust_features(x)  # the quartiles are entries: the second and the fourth
    np.testing.assert_array_equal(scaling, np.float32([[sign * 3.0], [2.0]]))
    gradient = jax.grad(lambda x: normax.robust_features(x)[1][0])(jnp.asarray(x))
    np.testing.assert_array_equal(gradient[:, 0], sign * np.float32([0, -1, 0, 1, 0]))
    # Between an entry and inf is inf, and so is the range.
    assert np.isposinf(normax.robust_features(x[1:], quantile_range=(10.0, 90.0))[1][0])


def test_a_deviation_smaller_than_any_normal_number_is_none():
    x = np.float32([[1e-42], [-2e-42], [3e-40]])
    for measure, _ in SCALERS.values():
        y = normax.transform_features(x, measure(x))
        assert np.isfinite(y).all()
        assert np.isfinite(normax.inverse_features(y, measure(x))).all()


@x64
@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_partial_fits(name):
    x = table()
    scaler = clone(SCALERS[name][1])
    for part in np.split(x, (1, 30, 31, 90)):
        scaler.partial_fit(part)
    agree(STREAMS[name](x), scaler)


def check_stream(standard, extremes, x):
    """Checks scalings of a float32 stream against the whole in float64."""
    wide, live = x.astype(np.float64), np.setdiff1d(range(6), CONSTANT)
    offset, factor = (np.asarray(v) for v in standard)
    deviation = np.where(np.isin(range(6), CONSTANT), 1, wide.std(0))
    shift = np.spacing(np.abs(x.mean(0))) / deviation
    assert (np.abs(offset - wide.mean(0)) <= (1e-6 + 8 * shift) * deviation).all()
    # The means of chunks were rounded, and their spread is part of the variance.
    assert (np.abs(factor / deviation - 1) <= 1e-6 + 0.3 * shift).all()
    offset, factor = (np.asarray(v) for v in extremes)
    np.testing.assert_array_equal(offset, x.min(0))
    np.testing.assert_allclose(factor[live], np.ptp(wide, 0)[live], rtol=1e-6)
    assert (factor[list(CONSTANT)] == 1).all()


def test_a_stream_in_float32_is_the_whole_in_float64():
    x = table(1000).astype(np.float32)
    check_stream(STREAMS["standard"](x), STREAMS["min-max"](x), x)


def test_a_stream_in_a_scan():
    x = table(1200).astype(np.float32)
    nothing = (
        normax.Moments(jnp.zeros(6, jnp.int32), jnp.zeros(6), jnp.zeros(6)),
        normax.Extremes(jnp.full(6, jnp.inf), jnp.full(6, -jnp.inf)),
    )

    def step(seen, chunk):
        m = normax.merge(seen[0], normax.moments(chunk, 0))
        return (m, normax.merge_extremes(seen[1], normax.extremes(chunk, 0))), None

    @jax.jit
    def stream(chunks):
        (m, e), _ = jax.lax.scan(step, nothing, chunks)
        return normax.standardize_features(m), normax.min_max_features(e)

    check_stream(*stream(x.reshape(120, 10, 6)), x)


def test_merging_extremes_is_exact_whatever_the_order():
    a, b, c = (normax.extremes(table(5, seed).astype(np.float32), 0) for seed in range(3))
    merge = normax.merge_extremes
    nothing = normax.Extremes(jnp.full(6, jnp.inf), jnp.full(6, -jnp.inf))
    everything = np.concatenate([table(5, seed).astype(np.float32) for seed in range(3)])
    expected = [everything.min(0), everything.max(0)]
    for merged in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(c, merge(b, a)),
        merge(merge(nothing, a), merge(b, merge(c, nothing))),
    ):
        np.testing.assert_array_equal(merged, expected)


@each_measure
def test_constant_features_become_zero_and_come_back(measure):
    x = table().astype(np.float32)
    scaling = measure(x)
    # A range of another width divides the factor of one by its width.
    width = 5 if measure is SCALERS["min-max in a range"][0] else 1
    start = -2 if width == 5 else 0
    y = normax.transform_features(x, scaling)
    columns = list(CONSTANT)
    np.testing.assert_allclose(scaling.factor[jnp.array(columns)], 1 / width, rtol=1e-7)
    np.testing.assert_allclose(np.asarray(y)[:, columns], start, atol=1e-6 if start else 0)
    back = np.asarray(normax.inverse_features(y, scaling))
    np.testing.assert_allclose(back[:, columns], x[:, columns], rtol=2e-7 if start else 0)


def test_constant_features_of_a_stream():
    for name, stream in STREAMS.items():
        scaling = stream(table().astype(np.float32))
        assert (scaling.factor[jnp.array(CONSTANT)] == 1).all(), name
        np.testing.assert_array_equal(
            scaling.offset[jnp.array(CONSTANT)], np.float32([7.0, 0.1]), err_msg=name
        )


@x64
@each_scaler
@pytest.mark.parametrize("poison", [0.0, np.inf, np.nan])
def test_masked_rows_are_rows_removed(measure, scaler, poison):
    x, mask = table(), np.random.default_rng(2).random((101, 1)) < 0.7
    agree(measure(np.where(mask, x, poison), mask=mask), clone(scaler).fit(x[mask[:, 0]]))


@x64
@each_scaler
def test_masked_entries_are_the_missing_values_of_scikit_learn(measure, scaler):
    x, mask = table(), np.random.default_rng(2).random((101, 6)) < 0.7
    missing = np.where(mask, x, np.nan)
    agree(measure(missing, mask=mask), clone(scaler).fit(missing))


@x64
def test_masked_streams_are_the_missing_values_of_scikit_learn():
    x, mask = table(), np.random.default_rng(2).random((101, 6)) < 0.7
    missing = np.where(mask, x, np.nan)
    parts = slice(0, 40), slice(40, 101)
    m = normax.merge(*(normax.moments(missing[p], 0, mask=mask[p]) for p in parts))
    e = normax.merge_extremes(*(normax.extremes(missing[p], 0, mask=mask[p]) for p in parts))
    agree(normax.standardize_features(m), StandardScaler().fit(missing), rtol=1e-10)
    agree(normax.min_max_features(e), MinMaxScaler().fit(missing))


@each_measure
@pytest.mark.parametrize("rows", [0, 3])
def test_a_feature_of_no_entries_is_left_as_it_is(measure, rows):
    mask = jnp.zeros((rows, 2), bool)

    def energy(x):
        scaling = measure(x, mask=mask)
        return jnp.sum(jnp.sin(scaling.offset) + scaling.factor), scaling

    x = jnp.full((rows, 2), jnp.nan)
    dx, scaling = jax.grad(energy, has_aux=True)(x)
    width, start = (5, -2) if measure is SCALERS["min-max in a range"][0] else (1, 0)
    np.testing.assert_allclose(scaling.factor, [1 / width] * 2)
    np.testing.assert_allclose(scaling.offset, [-start / width] * 2)
    np.testing.assert_array_equal(dx, jnp.zeros_like(x))


@each_measure
def test_a_valid_nan_shows_in_its_feature_alone(measure):
    x = table().astype(np.float32)
    expected = measure(x)
    x[3, 1] = np.nan
    for leaf, other in zip(measure(x), expected, strict=True):
        assert np.isnan(leaf[1])
        np.testing.assert_array_equal(np.delete(leaf, 1), np.delete(other, 1))


@pytest.mark.parametrize("axes", [0, (3, 1), (), (0, 1, 2, 3)])
@each_scaler
def test_any_rank_and_axes(measure, scaler, axes):
    x = jax.random.normal(KEY, (4, 3, 5, 6))
    mask = jax.random.bernoulli(KEY, 0.8, x.shape) | (axes == (0, 1, 2, 3))
    scaling = jax.jit(lambda x: measure(x, feature_axes=axes, mask=mask))(x)
    features = sorted(np.atleast_1d(np.asarray(axes, int)).tolist())
    others = [axis for axis in range(4) if axis not in features]

    def as_table(v):
        """Returns the same entries with a row for each index of the other axes."""
        v = np.broadcast_to(v, x.shape).transpose(others + features)
        return v.reshape(-1, int(np.prod(v.shape[len(others) :])))

    fitted = clone(scaler).fit(as_table(np.where(mask, x, np.nan).astype(np.float64)))
    for leaf, exact in zip(scaling, offset_and_factor(fitted), strict=True):
        assert leaf.shape == tuple(x.shape[axis] for axis in features)
        np.testing.assert_allclose(np.ravel(leaf), exact, rtol=2e-6, atol=1e-6)
    y = normax.transform_features(x, scaling, feature_axes=axes)
    exact = fitted.transform(as_table(x).astype(np.float64))
    np.testing.assert_allclose(as_table(y), exact, rtol=1e-5, atol=2e-6)
    back = normax.inverse_features(y, scaling, feature_axes=axes)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_scaler
def test_halves_are_measured_and_scaled_in_float32(measure, scaler, dtype):
    x = jnp.asarray(table()[:, :4]).astype(dtype)
    wide = np.asarray(x).astype(np.float64)
    scaling = measure(x)
    fitted = clone(scaler).fit(wide)
    assert scaling.offset.dtype == scaling.factor.dtype == jnp.float32
    y = normax.transform_features(x, scaling)
    assert y.dtype == dtype
    # One rounding: half a unit of the dtype.
    half = float(jnp.finfo(dtype).eps) / 2
    exact = fitted.transform(wide)
    np.testing.assert_allclose(
        np.asarray(y).astype(float), exact, rtol=1.1 * half, atol=1e-3 * half
    )
    back = normax.inverse_features(y, scaling)
    exact = fitted.inverse_transform(np.asarray(y).astype(float))
    assert back.dtype == dtype
    np.testing.assert_allclose(np.asarray(back).astype(float), exact, rtol=1.1 * half, atol=1e-6)


def test_a_mean_a_million_times_the_deviation():
    x = np.asarray(1e6 + jax.random.normal(KEY, (1000, 3)))
    wide = x.astype(np.longdouble)
    offset, factor = (np.asarray(v).astype(np.longdouble) for v in normax.standardize_features(x))
    np.testing.assert_allclose((factor / wide.std(0)).astype(float), 1, rtol=3e-7)
    # The offset is the mean as near as float32 has it, and y is what that offset leaves.
    assert (np.abs(offset - wide.mean(0)) <= np.spacing(np.float32(1e6)) / 2).all()
    y = normax.transform_features(x, normax.standardize_features(x))
    exact = (wide - offset) / wide.std(0)
    np.testing.assert_allclose(y, exact.astype(float), rtol=1e-6)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-6)
    np.testing.assert_allclose(y.mean(0), 0, atol=0.032)
    back = normax.inverse_features(y, normax.standardize_features(x))
    np.testing.assert_array_equal(back, x)


@x64
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_float64_scaling_is_rounded_once(dtype):
    x = jnp.asarray(table()[:, [1, 3, 5]] / 100).astype(dtype)
    wide = np.asarray(x).astype(np.float64)
    scaling = normax.standardize_features(wide)
    assert scaling.offset.dtype == jnp.float64
    y = normax.transform_features(x, scaling)
    assert y.dtype == dtype
    offset, factor = (np.asarray(leaf) for leaf in scaling)
    np.testing.assert_array_equal(y, jnp.asarray((wide - offset) / factor).astype(dtype))


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
@each_scaler
def test_every_size(measure, scaler, size):
    x = table().astype(np.float32)[:, [0, 1, 3]]
    scaling = measure(x * np.float32(size))
    fitted = clone(scaler).fit(x.astype(np.float64))
    offset, factor = offset_and_factor(fitted)
    np.testing.assert_allclose(np.asarray(scaling.offset) / size, offset, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(np.asarray(scaling.factor) / size, factor, rtol=1e-4)
    y = normax.transform_features(x * np.float32(size), scaling)
    np.testing.assert_allclose(y, fitted.transform(x), rtol=1e-4, atol=1e-3)


@x64
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_the_sample_variance(rows):
    x = table(rows)
    stream = normax.merge(normax.moments(x[:1], 0), normax.moments(x[1:], 0))
    expected = x.std(0, ddof=1) if rows > 1 else np.zeros(6)
    expected = np.where(expected < 1e-12, 1, expected)
    for given in (x, stream):
        scaling = normax.standardize_features(given, unbiased=True)
        np.testing.assert_allclose(scaling.factor, expected, rtol=1e-9)


def test_complex_features():
    x = jax.random.normal(KEY, (50, 3), "complex64") * 2 + (3 - 1j)
    wide = np.asarray(x).astype(np.complex128)
    scaling = normax.standardize_features(x)
    np.testing.assert_allclose(scaling.factor, wide.std(0), rtol=1e-6)
    assert scaling.factor.dtype == jnp.float32
    y = normax.transform_features(x, scaling)
    np.testing.assert_allclose(y, (wide - wide.mean(0)) / wide.std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normax.inverse_features(y, scaling), x, rtol=1e-5)


@each_measure
def test_jit_and_vmap(measure):
    x = jnp.asarray(table(60).astype(np.float32)).reshape(3, 20, 6)

    def there_and_back(x):
        scaling = measure(x)
        y = normax.transform_features(x, scaling)
        return scaling, y, normax.inverse_features(y, scaling)

    mapped = jax.jit(jax.vmap(there_and_back))(x)
    looped = [there_and_back(one) for one in x]
    for leaf, *others in zip(*map(jax.tree.leaves, (mapped, *looped)), strict=True):
        np.testing.assert_allclose(leaf, jnp.stack(others), rtol=1e-6, atol=1e-6)


def test_a_scaling_is_an_argument_of_a_compiled_function():
    transform = jax.jit(normax.transform_features)
    for seed in range(3):
        x = table(seed=seed).astype(np.float32)
        y = transform(x, normax.min_max_features(x))
        assert float(y.min()) == 0
        assert float(y.max()) == 1
    assert transform._cache_size() == 1


def scaled(measure, x, mask=None):
    return jnp.sin(normax.transform_features(x, measure(x, mask=mask), mask=mask))


@x64
@each_measure
def test_gradients(measure):
    # Distinct entries a step apart keep their order under the numerical derivative.
    x = jax.random.permutation(KEY, jnp.linspace(-1, 2, 22)).reshape(11, 2)
    mask = jax.random.bernoulli(KEY, 0.7, x.shape)
    check_grads(jax.jit(lambda x: scaled(measure, x, mask)), (x,), 1, ("fwd", "rev"), eps=1e-6)


@each_measure
def test_gradients_are_finite(measure):
    x = jnp.asarray(table(20).astype(np.float32))
    mask = jnp.arange(20)[:, None] % 3 > 0
    x = jnp.where(mask, x, jnp.nan)

    def energy(x):
        return jnp.sum(scaled(measure, x, mask))

    dx, slope = jax.jit(lambda x: jax.jvp(jax.grad(energy), (x,), (jnp.ones_like(x),)))(x)
    assert jnp.isfinite(dx).all()
    assert jnp.isfinite(slope).all()
    np.testing.assert_array_equal(jnp.where(mask, 0, dx), jnp.zeros_like(dx))


def test_gradients_through_a_stream_are_finite():
    x = jnp.asarray(table(20).astype(np.float32))

    def energy(x, stream):
        return jnp.sum(jnp.sin(normax.transform_features(x, stream(x))))

    for name, stream in STREAMS.items():
        assert jnp.isfinite(jax.jit(jax.grad(lambda x, s=stream: energy(x, s)))(x)).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_masked_entries_come_out_as_zero_and_back_as_the_offset(dtype):
    x = jnp.asarray([[1.0, jnp.nan], [3.0, 4.0], [jnp.inf, 8.0]], dtype)
    mask = jnp.isfinite(x)
    scaling = normax.standardize_features(x, mask=mask)
    y = normax.transform_features(x, scaling, mask=mask)
    np.testing.assert_array_equal(y, [[-1, 0], [1, -1], [0, 1]])
    back = normax.inverse_features(jnp.where(mask, y, jnp.nan), scaling, mask=mask)
    np.testing.assert_array_equal(back, [[1, 6], [3, 4], [2, 8]])
    for function in (normax.transform_features, normax.inverse_features):
        dx = jax.grad(lambda x, f=function: jnp.sum(jnp.sin(f(x, scaling, mask=mask))))(x)
        assert jnp.isfinite(dx).all()
        assert (dx[~mask] == 0).all()


# Income and height: means, deviations; in dollars and inches, in thousands and feet.
PEOPLE = {"dollars": ([3000, 69], [400, 3]), "thousands": ([3, 5.75], [0.4, 0.25])}


def people(unit, rows, dtype="float64"):
    mean, deviation = PEOPLE[unit]
    rng = np.random.default_rng(3)
    return (rng.normal(size=(rows, 2)) * deviation + mean).astype(dtype)


def ratio_of_eigenvalues(x):
    """Returns that of the second moments of two features, by the quadratic formula."""
    x = np.asarray(x).astype(np.longdouble)
    a, b, c = (x * x).mean(0)[0], (x * x).mean(0)[1], x.prod(1).mean()
    largest = (a + b + np.sqrt((a - b) ** 2 + 4 * c * c)) / 2
    return float(largest**2 / (a * b - c * c))


@x64
@pytest.mark.parametrize(("unit", "expected"), [("dollars", 99492), ("thousands", 302.99)])
def test_the_condition_number_of_income_and_height(unit, expected):
    (a, b), (s, t) = PEOPLE[unit]
    # Four people with the population's mean and covariance.
    x = np.array([[a + i * s, b + j * t] for i in (-1.0, 1.0) for j in (-1.0, 1.0)])
    np.testing.assert_allclose(ratio_of_eigenvalues(x), expected, rtol=1e-5)
    np.testing.assert_allclose(normax.condition_number(x), ratio_of_eigenvalues(x), rtol=1e-10)
    y = normax.transform_features(x, normax.standardize_features(x))
    np.testing.assert_allclose(normax.condition_number(y), 1, rtol=1e-12)


@pytest.mark.parametrize(("unit", "expected"), [("dollars", 99492), ("thousands", 302.99)])
def test_the_condition_number_of_a_hundred_thousand_people(unit, expected):
    x = people(unit, 100_000, "float32")
    ours = normax.condition_number(x)
    np.testing.assert_allclose(ours, expected, rtol=0.02)
    np.testing.assert_allclose(ours, ratio_of_eigenvalues(x), rtol=2e-4)
    after = {
        measure: normax.condition_number(normax.transform_features(x, measure(x)))
        for measure in (normax.standardize_features, normax.min_max_features)
    }
    assert 1 <= after[normax.standardize_features] < 1.03
    assert 10 < after[normax.min_max_features] < 60


@x64
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_condition_number_of_standardized_features_is_their_correlation(unbiased):
    x = people("dollars", 1000)
    x[:, 1] += 0.004 * x[:, 0]
    r = abs(np.corrcoef(x.T)[0, 1])
    y = normax.transform_features(x, normax.standardize_features(x, unbiased=unbiased))
    np.testing.assert_allclose(normax.condition_number(y), (1 + r) / (1 - r), rtol=1e-12)


@x64
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
def test_the_condition_number_of_many_features(dtype, size):
    x = np.asarray(jax.random.normal(KEY, (7, 3, 4, 2), dtype)) * np.arange(1, 5)[:, None]
    mask = np.asarray(jax.random.bernoulli(KEY, 0.9, (7, 1, 4, 1)))
    rows = x.transpose(0, 3, 1, 2).reshape(14, 12)
    expected = np.linalg.cond(rows.T @ rows.conj())
    ours = normax.condition_number(x * size, feature_axes=(1, 2))
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert ours.dtype == jnp.float64
    # A vector is absent where any part of it is.
    few = x.transpose(1, 2, 0, 3)[:2, :2]
    rows = few.transpose(2, 3, 0, 1)[mask[:, 0, :2, 0].all(1)].reshape(-1, 4)
    poisoned = np.where(mask.transpose(1, 2, 0, 3)[:, :2], few, np.nan) * size
    ours = normax.condition_number(
        poisoned, feature_axes=(0, 1), mask=mask.transpose(1, 2, 0, 3)[:, :2]
    )
    np.testing.assert_allclose(ours, np.linalg.cond(rows.T @ rows.conj()), rtol=1e-9)


def test_the_condition_number_of_dependent_features_is_infinite():
    x = table(20).astype(np.float32)
    centred = normax.transform_features(x, normax.standardize_features(x))
    twins = np.stack([x[:, 0], 3 * x[:, 0]], 1)
    for dependent in (centred, twins, x[:3], x[:0], np.zeros((4, 2), np.float32)):
        number, dx = jax.value_and_grad(normax.condition_number)(jnp.asarray(dependent))
        assert jnp.isinf(number)
        np.testing.assert_array_equal(dx, jnp.zeros_like(dx))
    assert jnp.isnan(normax.condition_number(np.where(x > 6, np.nan, x)))


@x64
def test_gradients_of_the_condition_number():
    x = jax.random.normal(KEY, (9, 3))
    check_grads(jax.jit(normax.condition_number), (x,), 1, ("fwd", "rev"), rtol=1e-4)
    # Equal singular values: nothing to follow, but nothing that is no number.
    dx = jax.grad(normax.condition_number)(jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]))
    assert jnp.isfinite(dx).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_condition_number_of_halves_is_computed_in_float32(dtype):
    x = jnp.asarray(people("thousands", 200), dtype)
    ours = jax.jit(normax.condition_number)(x)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, ratio_of_eigenvalues(x), rtol=1e-5)
