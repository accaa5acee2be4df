"""The theory's functions against high precision, simulation and the library itself.

Simulations are held to so many standard errors of themselves; what a formula leaves out, which is of
the next order in 1 / M, is allowed beside them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from scipy import stats

import normax
from normax import theory

KEY = jax.random.key(0)
LAWS = {
    # drawn with mean 0 and variance 1: excess kurtosis, skewness
    "gaussian": (0.0, 0.0),
    "uniform": (-1.2, 0.0),
    "laplace": (3.0, 0.0),
    "exponential": (6.0, 2.0),
}
BATCHES = 40_000


@functools.cache
def entries(law, batch_size, batches=BATCHES):
    """Returns batches of a law, a column each."""
    rng, shape = np.random.default_rng(batch_size), (batch_size, batches)
    x = {
        "gaussian": lambda: rng.standard_normal(shape),
        "uniform": lambda: rng.uniform(-math.sqrt(3), math.sqrt(3), shape),
        "laplace": lambda: rng.laplace(0, math.sqrt(0.5), shape),
        "exponential": lambda: rng.exponential(1, shape) - 1,
    }[law]()
    return jnp.asarray(x, jnp.float32)


def standardized(x, **options):
    return jax.jit(lambda x: normax.normalize_batch(x, epsilon=0.0, **options)[0])(x)


def mean_and_error(per_batch):
    """Returns the mean over batches and its standard error."""
    values = np.asarray(per_batch, np.float64)
    return values.mean(), values.std() / math.sqrt(values.size)


@pytest.mark.parametrize("batch_size", [2, 3, 8, 32, 64, 65, 66, 100, 128, 1000, 10**4, 10**6])
@mpmath.workdps(50)
def test_the_noise_to_eleven_digits(batch_size):
    m = mpmath.mpf(batch_size)
    close = lambda ours, exact: abs(ours / exact - 1) < 1e-11
    deviation = mpmath.sqrt(2 / m) * mpmath.gamma(m / 2) / mpmath.gamma((m - 1) / 2)
    assert close(theory.batch_noise(batch_size), 2 - 2 * deviation)
    assert abs(theory.expected_deviation(batch_size) - deviation) < 1e-13
    deviation *= mpmath.sqrt(m / (m - 1))
    assert abs(theory.expected_deviation(batch_size, ddof=1) - deviation) < 1e-13
    sample = (m - 1) / m * (1 - 2 * deviation) + 1
    assert close(theory.batch_noise(batch_size, ddof=1), sample)
    length = mpmath.sqrt(2 / m) * mpmath.gamma((m + 1) / 2) / mpmath.gamma(m / 2)
    assert close(theory.batch_noise(batch_size, statistics="variance"), 2 - 2 * length)
    assert theory.batch_noise(batch_size, statistics="mean") == 1 / batch_size


@pytest.mark.parametrize("batch_size", [4, 8, 16, 32, 64, 128])
def test_batch_norm_has_the_noise_of_the_theory(batch_size):
    x = entries("gaussian", batch_size, 130_000)
    mean, error = mean_and_error(jnp.mean((standardized(x) - x) ** 2, 0))
    assert error / mean <= 0.003
    assert abs(mean - theory.batch_noise(batch_size)) <= 4 * error
    of_mean, error = mean_and_error(jnp.mean(x, 0) ** 2)
    assert abs(of_mean - theory.batch_noise(batch_size, statistics="mean")) <= 4 * error
    root = jnp.sqrt(jnp.mean(x * x, 0))
    of_variance, error = mean_and_error((1 - root) ** 2)  # the mean of (x / root - x)^2
    assert abs(of_variance - theory.batch_noise(batch_size, statistics="variance")) <= 4 * error


@pytest.mark.parametrize("law", LAWS)
def test_the_noise_of_other_laws_to_the_first_order(law):
    kurtosis, _ = LAWS[law]
    x = entries(law, 128)
    mean, error = mean_and_error(jnp.mean((standardized(x) - x) ** 2, 0))
    first = theory.approximate_noise(128, excess_kurtosis=kurtosis)
    assert abs(mean - first) <= 4 * error + 8 / 128 * first
    parts = [
        theory.approximate_noise(128, excess_kurtosis=kurtosis, statistics=part)
        for part in ("mean", "variance")
    ]
    assert sum(parts) == pytest.approx(first)


@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_a_batch_s_statistics(law, batch_size):
    kurtosis, skewness = LAWS[law]
    x = entries(law, batch_size)
    m = jax.jit(lambda x: normax.moments(5 * x, 0))(x)
    mean, deviation = np.asarray(m.mean, np.float64), np.sqrt(np.asarray(m.var, np.float64))
    law = theory.deviation_law(
        batch_size, deviation=5.0, excess_kurtosis=kurtosis, skewness=skewness
    )
    room = (4 if abs(kurtosis) <= 1.2 else 8) / batch_size
    for values, expected, slack in (
        ((mean - mean.mean()) ** 2, law.mean_var, 0),
        ((deviation - deviation.mean()) ** 2, law.deviation_var, room),
        ((mean - mean.mean()) * (deviation - deviation.mean()), law.covariance, room),
    ):
        found, error = mean_and_error(values)
        assert abs(found - expected) <= 4 * error + slack * abs(expected)
    found, error = mean_and_error(deviation)
    missing = 5 - law.deviation_mean
    assert abs(5 - found - missing) <= 4 * error + 2 * room * missing


def test_masked_entries_of_a_loss_move_no_gradient():
    x, mask = jnp.array([1.0, -1.0, 0.5, jnp.nan]), jnp.array([True, True, True, False])
    of_curvature = lambda h, x, **masked: theory.decay_coefficient(h, x, 8, **masked).zeta
    of_slope = lambda h, x, **masked: theory.first_order_gap(h, x, 1.0, 8, **masked)
    for f in (of_curvature, of_slope):
        derivative = jax.grad(f)(jnp.array([1.0, 2.0, 3.0, 4.0]), x, mask=mask)
        expected = jax.grad(f)(jnp.array([1.0, 2.0, 3.0]), x[:3])
        np.testing.assert_allclose(derivative, [*expected, 0], rtol=1e-5)


def test_kurtosis_and_skewness_are_scipy_s_and_the_laws():
    x = np.random.default_rng(0).gamma(2.0, size=(50, 3)).astype(np.float32) * 5 + 3
    np.testing.assert_allclose(theory.skewness(x, 0), stats.skew(x.astype(float)), rtol=1e-5)
    np.testing.assert_allclose(
        theory.excess_kurtosis(x, 0), stats.kurtosis(x.astype(float)), rtol=1e-4, atol=1e-5
    )
    mask = np.arange(50)[:, None] < 30
    poisoned = np.where(mask, x, np.nan)
    np.testing.assert_allclose(
        theory.skewness(poisoned, 0, mask=mask), stats.skew(x[:30].astype(float)), rtol=1e-5
    )
    assert theory.skewness(np.full(4, 3.0, np.float32), 0) == 0
    number = 10**6
    for law, (kurtosis, skewness) in LAWS.items():
        sample = 5 * entries(law, 100, number // 100).ravel() + 3
        close = 4 * math.sqrt(24 / number) * {"exponential": 40, "laplace": 10}.get(law, 1)
        assert abs(theory.excess_kurtosis(sample, 0) - kurtosis) <= close
        assert abs(theory.skewness(sample, 0) - skewness) <= close


# Of a pre-activation: the loss less what does not depend on it, and A' of it.
MODELS = {
    "linear": (lambda h, mean: (h - mean) ** 2, lambda h: h),
    "logistic": (lambda h, mean: jax.nn.softplus(h) - mean * h, jax.nn.sigmoid),
    "relu": (lambda h, mean: 0.5 * jax.nn.relu(h) ** 2 - mean * h, jax.nn.relu),
}


@pytest.mark.parametrize("batch_size", [8, 128])
@pytest.mark.parametrize("law", ["gaussian", "uniform", "exponential"])
@pytest.mark.parametrize("model", MODELS)
def test_at_the_truth_the_gap_is_zeta_times_gamma_squared(model, law, batch_size):
    loss, link = MODELS[model]
    x = entries(law, batch_size)
    gap = jnp.mean(loss(standardized(x), link(x)) - loss(x, link(x)), 0)
    _, curvature = theory.loss_derivatives(loss, x, link(x))
    found = theory.decay_coefficient(curvature, x, batch_size, axes=(0, 1))
    mean, error = mean_and_error(gap)
    skewed = LAWS[law][1] != 0
    room = (3.5 if skewed else 2.5) / batch_size
    assert abs(mean / found.zeta - 1) <= room + 4 * error / mean
    published = theory.decay_coefficient(curvature, x, batch_size, axes=(0, 1), form="published")
    third = found.skewness * found.slant / (2 * batch_size)
    np.testing.assert_allclose(published.zeta + third, found.zeta, rtol=1e-5)
    if skewed and model == "relu" and batch_size == 128:
        assert mean / published.zeta > 1.3  # the published form is off by a third


@pytest.mark.parametrize(
    ("model", "gamma", "expected"),
    [("linear", 1.0, 1.5), ("linear_halved", 1.0, 0.75), ("relu", 1.0, 0.375), ("logistic", 1.0, 0.139367)],
)  # fmt: skip
def test_the_coefficients_of_the_special_cases(model, gamma, expected):
    loss, link = MODELS[model.removesuffix("_halved")]
    x = entries("gaussian", 100, 20_000).ravel()
    _, curvature = theory.loss_derivatives(loss, gamma * x, link(gamma * x))
    curvature = curvature / 2 if model.endswith("halved") else curvature
    found = theory.decay_coefficient(curvature, x, 1000)
    np.testing.assert_allclose(1000 * found.zeta, expected, rtol=0.01)
    parts = [
        theory.decay_coefficient(curvature, x, 1000, statistics=part).zeta
        for part in ("mean", "variance")
    ]
    np.testing.assert_allclose(1000 * sum(parts), expected, rtol=0.01)
    if model == "linear":
        np.testing.assert_allclose(1000 * np.asarray(parts), [1.0, 0.5], rtol=0.01)


@pytest.mark.parametrize(
    ("model", "law", "gamma", "truth", "expected", "room"),
    [
        ("linear", "gaussian", 1.0, 2.0, 3.0, 0.1),
        ("linear", "gaussian", 1.0, 0.5, 0.75, 0.05),
        ("logistic", "uniform", 3.0, 1.0, 0.251, 0.02),
        ("logistic", "gaussian", 1.0, 2.0, 0.152, 0.01),
    ],
)
def test_away_from_the_truth_the_first_order_counts(model, law, gamma, truth, expected, room):
    loss, link = MODELS[model]
    x = entries(law, 128)
    mean = link(truth * x)
    slope, curvature = theory.loss_derivatives(loss, gamma * x, mean)
    zeta = theory.decay_coefficient(curvature, x, 128, axes=(0, 1)).zeta * gamma**2
    first = theory.first_order_gap(slope, x, gamma, 128, axes=(0, 1))
    np.testing.assert_allclose(128 * (zeta + first), expected, atol=room)
    # E[slope (a x + b (x^3 - 3 x))] is known of no batch: what moves with its variance is left out.
    gap = jnp.mean(loss(gamma * standardized(x), mean) - loss(gamma * x, mean), 0)
    square = jnp.mean(x * x, 0)
    weight = jnp.cov(gap, square)[0, 1] / jnp.var(square)
    found, error = mean_and_error(gap - weight * (square - 1))
    assert abs(128 * found - expected) <= room + 4 * 128 * error


def test_the_best_gamma_is_the_expected_deviation():
    for batch_size in (8, 32):
        x = entries("gaussian", batch_size)
        best, error = mean_and_error(jnp.mean(2.0 * x * standardized(x), 0))
        assert abs(best - 2 * theory.expected_deviation(batch_size)) <= 4 * error
        by_zeta = 2 / (1 + theory.approximate_noise(batch_size))
        assert abs(best - by_zeta) > 20 * error  # zeta is of the value, not of the slope


def test_batches_without_replacement_have_less_noise():
    population = np.random.default_rng(0).standard_normal((64, 20_000))
    population = (population - population.mean(0)) / population.std(0)
    batch = jnp.asarray(population[:32], jnp.float32)  # of 64 in any order, the first 32
    mean, error = mean_and_error(jnp.mean((standardized(batch) - batch) ** 2, 0))
    expected = theory.batch_noise(32) * theory.finite_population(32, 64)
    assert abs(mean - expected) <= 4 * error + 0.03 * expected
    assert theory.finite_population(64, 64) == 0


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("z", [1e-6, 1 / 64, 0.25, 10.0])
def test_the_resolvent_solves_its_equation(alpha, z):
    trace, slope = theory.resolvent_trace(alpha, z)
    terms = [z * trace * trace, (z + alpha - 1) * trace, -1.0]
    assert abs(sum(terms)) <= 1e-12 * max(abs(term) for term in terms)
    step = 1e-5 * z
    ends = [theory.resolvent_trace(alpha, z + sign * step)[0] for sign in (1, -1)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


def test_the_errors_of_ridge_regression():
    table = {
        (1.0, 1 / 64): 0.94323,
        (2.0, 1 / 64): 0.23584,
        (1.0, 0.25): 0.39039,
        (2.0, 0.25): 0.17539,
    }
    for (alpha, z), error in table.items():
        assert theory.ridge_error(alpha, z, 0.25) == pytest.approx(error, abs=1e-5)
    grid = np.linspace(0.2, 0.3, 201)
    for alpha in (0.25, 1.0, 4.0):
        best = min(grid, key=lambda z, alpha=alpha: theory.ridge_error(alpha, z, 0.25))
        assert 0.24 <= best <= 0.26
    assert theory.ridge_of_decay(0.25, 4.0) == 1.0
    for z in (1e-9, 1e-12, 1e-16):  # without a ridge, least squares
        assert theory.ridge_error(0.5, z, 0.25) == pytest.approx(0.75, rel=1e-8)
        assert theory.ridge_error(2.0, z, 0.25) == pytest.approx(0.25, rel=1e-8)
    # Given the inputs, the risk is an average over the eigenvalues of their covariance.
    number = 1000
    for alpha in (0.5, 1.0, 2.0):
        x = np.random.default_rng(1).standard_normal((int(alpha * number), number))
        eigenvalues = np.linalg.eigvalsh(x.T @ x / number).clip(0)
        for z in (1 / 64, 0.25):
            risk = np.mean((z * z + 0.25 * eigenvalues) / (eigenvalues + z) ** 2)
            assert theory.ridge_error(alpha, z, 0.25) == pytest.approx(risk, rel=5e-3)


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.1, 2.0])
def test_the_error_of_least_squares_where_there_are_so_many_dimensions(alpha):
    rng, number, errors = np.random.default_rng(0), 100, []
    for _ in range(200):
        x = rng.standard_normal((int(alpha * number), number)) / math.sqrt(number)
        truth = rng.standard_normal(number)
        truth *= math.sqrt(number) / np.linalg.norm(truth)
        y = x @ truth + rng.normal(0, 0.5, len(x))
        found = np.linalg.lstsq(x, y, rcond=None)[0]
        errors.append(np.sum((found - truth) ** 2) / number)
    mean, error = mean_and_error(np.asarray(errors))
    assert abs(mean - theory.least_squares_error(alpha, 0.25, dimensions=number)) <= 4 * error


def test_batch_norm_that_has_converged_is_least_squares_shortened():
    c = theory.expected_deviation(32)
    for alpha in (0.25, 0.5, 0.75):
        long = alpha + alpha * 0.25 / (1 - alpha)
        expected = c * c * long - 2 * c * alpha + 1
        assert theory.batch_norm_error(alpha, 0.25, 32) == pytest.approx(expected, rel=1e-12)
    for alpha in (1.5, 2.0, 4.0):
        expected = (1 - c) ** 2 + c * c * 0.25 / (alpha - 1)
        assert theory.batch_norm_error(alpha, 0.25, 32) == pytest.approx(expected, rel=1e-12)
    assert theory.batch_norm_error(1.0, 0.25, 32) == math.inf
    for examples in (48, 49, 50):
        assert theory.least_squares_error(examples / 49, 0.25, dimensions=49) == math.inf


@pytest.mark.usefixtures("x64")
def test_where_a_student_interpolates_batch_norm_has_no_gradient():
    x = jax.random.normal(KEY, (32, 64), jnp.float64) / 8
    y = jax.random.normal(jax.random.key(1), (32,), jnp.float64)

    def loss(w):
        h = (x @ w).reshape(4, 8)  # four batches
        outputs = [normax.normalize_batch(part[:, None], epsilon=0.0)[0][:, 0] for part in h]
        return jnp.sum((0.7 * jnp.stack(outputs) - y.reshape(4, 8)) ** 2)

    exact = jnp.linalg.lstsq(x, y)[0]
    slope = jax.jit(jax.grad(loss))
    assert jnp.abs(slope(exact)).max() <= 1e-12
    assert jnp.abs(slope(jnp.ones(64))).max() >= 1e-3


@pytest.mark.usefixtures("x64")
def test_weight_norm_with_gamma_decay_is_ridge_regression():
    x = jax.random.normal(KEY, (96, 64), jnp.float64) / 8
    y = jax.random.normal(jax.random.key(1), (96,), jnp.float64)
    decay = 1 / 64

    def loss(params):
        w = normax.weight_norm(params["w"], params["gamma"], feature_axes=())
        return jnp.mean((x @ w - y) ** 2) + decay * params["gamma"] ** 2

    params = {"w": x.T @ y, "gamma": jnp.ones(())}
    solver = optax.lbfgs()

    @jax.jit
    def fit(params):
        evaluate = optax.value_and_grad_from_state(loss)

        def step(_, carry):
            params, state = carry
            value, grad = evaluate(params, state=state)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 300, step, (params, solver.init(params)))[0]

    with jax.numpy_dtype_promotion("standard"):
        params = fit(params)
    found = normax.weight_norm(params["w"], params["gamma"], feature_axes=())
    ridge = np.linalg.solve(np.asarray(x.T @ x) + 96 * decay * np.eye(64), np.asarray(x.T @ y))
    assert np.linalg.norm(found - ridge) / np.linalg.norm(ridge) <= 1e-4


@pytest.mark.usefixtures("x64")
def test_population_normalization_is_weight_normalization():
    w, x = (
        jax.random.normal(jax.random.key(seed), shape, jnp.float64)
        for seed, shape in ((0, (6,)), (1, (5, 6)))
    )
    center, a, gamma, beta = jnp.arange(6.0) / 3, 1.7, 0.8, 0.3

    def population(w, std=a):
        mean, var = w @ center, std**2 * w @ w
        stats = normax.RunningStats.create(1, dtype=jnp.float64)
        stats = stats._replace(mean=mean[None], var=var[None])
        h = (x @ w)[:, None]
        return normax.population_norm(h, stats, jnp.full(1, gamma), jnp.full(1, beta), epsilon=0.0)[
            :, 0
        ]

    def weight(w, std=a):
        v = normax.weight_norm(w, jnp.asarray(gamma / std), feature_axes=())
        return x @ v + beta - v @ center

    np.testing.assert_allclose(population(w), weight(w), rtol=0, atol=1e-12)
    cotangent = jnp.sin(jnp.arange(5.0))
    slope = jax.vjp(weight, w)[1](cotangent)[0]
    assert abs(w @ slope) <= 1e-12
    explicit = lambda w: gamma * (x @ w - w @ center) / (a * jnp.linalg.norm(w)) + beta
    np.testing.assert_allclose(slope, jax.vjp(explicit, w)[1](cotangent)[0], rtol=0, atol=1e-12)
    # Read as a covariance of a, not a deviation, the statement does not hold.
    assert jnp.abs(population(w, math.sqrt(a)) - weight(w)).max() > 0.1


EPSILONS = (0.1, 1e-3, 1e-5)
SIZES = (2, 4, 32, 1024)


@jax.jit
def pulled(x, scale, bias, dy, masks):
    """Returns for each epsilon the gradients of each mask, of 32 rows, and of given statistics."""

    def pull(epsilon, x, dy, mask=None):
        norm = lambda *args: normax.normalize_batch(*args, epsilon=epsilon, mask=mask)[0]
        return jax.vjp(norm, x, scale, bias)[1](dy)

    def frozen(epsilon, x, dy):
        m = normax.moments(x, 0)
        given = normax.RunningStats(m.mean, m.var, m.count), scale, bias
        norm = lambda x: normax.batch_norm(x, *given, use_running_average=True, epsilon=epsilon)[0]
        return jax.vjp(norm, x)[1](dy)[0]

    def every(epsilon):
        masked = jax.vmap(lambda mask: pull(epsilon, x, jnp.where(mask, dy, 0), mask))(masks)
        few = x[:32], dy[:32]
        return masked, pull(epsilon, *few), frozen(epsilon, *few)

    return [every(epsilon) for epsilon in EPSILONS]


def printed(epsilon, x, scale, dy):
    """Returns dx, dscale and dbias by the formula, what one term of each can be, and the rest."""
    size, d = len(x), x - x.mean(0)
    s = np.sqrt((d * d).mean(0) + epsilon)
    xhat = d / s
    dscale, dbias = (dy * xhat).sum(0), dy.sum(0)
    dx = scale / (size * s) * (size * dy - dbias - xhat * dscale)
    # At two entries the terms cancel but for epsilon's share.
    terms = np.abs(scale * dy / s).max(0), np.abs(dy).sum(0), np.abs(dy).sum(0)
    return (dx, dscale, dbias), terms, d, s


@pytest.mark.parametrize(("dtype", "room"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_the_backward_pass_is_the_printed_one(dtype, room, x64):
    rng = np.random.default_rng(0)
    x, dy = 3 + 2 * rng.normal(size=(2, 1024, 4))
    x[:, 3] = 0.75  # a column without a deviation
    given = [v.astype(dtype) for v in (x, *(1 + 0.3 * rng.normal(size=(2, 4))), dy)]
    masks = np.arange(1024)[:, None] < np.asarray(SIZES)[:, None, None]
    x, scale, _, dy = (v.astype(np.float64) for v in given)
    for epsilon, found in zip(
        EPSILONS, jax.tree.map(np.asarray, pulled(*given, masks)), strict=True
    ):
        masked, few, frozen = found
        each = [(size, [part[i] for part in masked]) for i, size in enumerate(SIZES)]
        for size, gradients in [*each, (32, few)]:
            exact, terms, d, s = printed(epsilon, x[:size], scale, dy[:size])
            assert {part.dtype for part in gradients} == {np.dtype(dtype)}
            dx = gradients[0][:size].astype(np.float64)
            for ours, theirs, term in zip((dx, *gradients[1:]), exact, terms, strict=True):
                assert (np.abs(ours - theirs) <= room * term).all()
            assert (np.abs(dx.sum(0)) <= size * room * terms[0]).all()
            along = scale * epsilon / s**3 * (dy[:size] * d).sum(0)
            near = size * room * terms[0] * np.abs(d).max(0)
            assert (np.abs((dx * d).sum(0) - along) <= near).all()
        # With the statistics given, and only then, it is the first term.
        (dx, *_), (term, *_), _, s = printed(epsilon, x[:32], scale, dy[:32])
        first = scale * dy[:32] / s
        assert (np.abs(frozen - first) <= room * term).all()
        assert (np.abs(frozen - dx).max(0) >= 0.1 * term).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: theory.batch_noise(1), ValueError, "batch_noise: expected batch_size in"),
        (lambda: theory.batch_noise(8.0), TypeError, "batch_noise: expected batch_size"),
        (lambda: theory.batch_noise(8, statistics="all"), ValueError, "expected statistics to be one of"),
        (lambda: theory.batch_noise(8, ddof=2), ValueError, "batch_noise: expected ddof to be one of"),
        (lambda: theory.expected_deviation(1), ValueError, "expected_deviation: expected batch_size in"),
        (lambda: theory.approximate_noise(8, excess_kurtosis="a"), TypeError, "expected excess_kurtosis"),
        (lambda: theory.deviation_law(8, skewness=None), TypeError, "deviation_law: expected skewness"),
        (lambda: theory.deviation_law(8, deviation=-1.0), ValueError, "deviation_law: expected deviation in"),
        (lambda: theory.deviation_law(8, excess_kurtosis=-3.0), ValueError, "deviation_law: expected excess_kurtosis in"),
        (lambda: theory.first_order_gap(jnp.ones(3), jnp.ones(3), jnp.ones(2), 8), ValueError, r"first_order_gap: expected gamma.shape == \(\), got \(2,\)"),
        (lambda: theory.finite_population(9, 8), ValueError, "finite_population: expected population in"),
        (lambda: theory.skewness(jnp.ones(3, int), 0), TypeError, "skewness: expected x"),
        (lambda: theory.excess_kurtosis(jnp.ones(3), 1), ValueError, "excess_kurtosis: expected axes within"),
        (lambda: theory.decay_coefficient(jnp.ones(3), jnp.ones(4), 8), ValueError, r"decay_coefficient: expected curvature.shape == \(4,\), got \(3,\)"),
        (lambda: theory.decay_coefficient(jnp.ones(3), jnp.ones(3), 1), ValueError, "expected batch_size in"),
        (lambda: theory.decay_coefficient(jnp.ones(3), jnp.ones(3), 8, form="new"), ValueError, "expected form to be one of"),
        (lambda: theory.first_order_gap(jnp.ones(3), jnp.ones(4), 1.0, 8), ValueError, "first_order_gap: expected slope.shape"),
        (lambda: theory.loss_derivatives(jnp.square, jnp.ones(3, int)), TypeError, "loss_derivatives: expected h"),
        (lambda: theory.resolvent_trace(0.0, 1.0), ValueError, "resolvent_trace: expected alpha in"),
        (lambda: theory.resolvent_trace(1.0, float("inf")), ValueError, "resolvent_trace: expected z to be finite, got inf"),
        (lambda: theory.ridge_error(1.0, -1.0, 1.0), ValueError, "ridge_error: expected z in"),
        (lambda: theory.least_squares_error(1.0, None), TypeError, "least_squares_error: expected noise"),
        (lambda: theory.ridge_of_decay(-1.0, 1.0), ValueError, "ridge_of_decay: expected decay in"),
        (lambda: theory.batch_norm_error(0.5, 0.25, 1), ValueError, "batch_norm_error: expected batch_size in"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
