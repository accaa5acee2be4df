"""Normalizers of weights against their formulas: lengths, singular values, gradients."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from differences import check_derivatives

import normax
from normax.singular import singular_values

V = jax.random.normal(jax.random.key(0), (3, 4, 5))


@pytest.mark.parametrize("axes", [-1, 0, (0, 2), (), None, (0, 1, 2)])
def test_weight_norm_is_g_v_over_its_length(axes):
    features = () if axes is None else axes
    features = {a % 3 for a in ([features] if isinstance(features, int) else features)}
    reduced = tuple(axis for axis in range(3) if axis not in features)
    shape = tuple(V.shape[axis] for axis in sorted(features))
    g = 1 + jax.random.uniform(jax.random.key(1), shape)
    exact = np.asarray(V, np.longdouble)
    length = np.sqrt((exact**2).sum(reduced, keepdims=True))
    expected = np.expand_dims(np.asarray(g), reduced) * exact / length
    w = normax.weight_norm(V, g, feature_axes=axes)
    np.testing.assert_allclose(np.asarray(w), expected.astype(np.float64), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_gradients_of_the_paper():
    # Salimans and Kingma, equation 3.
    v = jax.random.normal(jax.random.key(0), (6, 3), jnp.float64)
    dv, dg = jax.vjp(normax.weight_norm, v, jnp.array([1.0, 2.0, 3.0]))[1](jnp.cos(v))
    v, g = np.asarray(v), np.array([1.0, 2.0, 3.0])
    ct, length = np.cos(v), np.linalg.norm(v, axis=0)
    expected = (ct * v).sum(0) / length
    np.testing.assert_allclose(dg, expected, rtol=1e-12)
    projected = g / length * ct - g * expected / length**2 * v
    np.testing.assert_allclose(dv, projected, rtol=1e-10)
    np.testing.assert_allclose((dv * v).sum(0), 0, atol=1e-12)


def test_short_rows_get_their_length_and_zero_rows_stay():
    v = jnp.array([[3e-7, 0.0, 3e-9], [4e-7, 0.0, 4e-9]])
    w, vjp = jax.vjp(normax.weight_norm, v)
    np.testing.assert_allclose(w, [[0.6, 0.0, 0.6], [0.8, 0.0, 0.8]], rtol=1e-6)
    (dv,) = vjp(jnp.ones_like(v))
    assert jnp.isfinite(dv).all()
    np.testing.assert_array_equal(dv[:, 1], [0, 0])
    np.testing.assert_array_equal(normax.weight_norm(v, epsilon=1e-8)[:, 2], [0, 0])


def test_spectral_norm_finds_the_largest_singular_value():
    w = jax.random.normal(jax.random.key(2), (3, 2, 5))
    state = normax.SpectralState.create(jax.random.key(3), 5)
    bar, new = jax.jit(lambda w, s: normax.spectral_norm(w, s, n_steps=100))(w, state)
    largest = np.linalg.svd(np.asarray(w, np.float64).reshape(-1, 5))[1][0]
    np.testing.assert_allclose(new.sigma, largest, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(bar).reshape(-1, 5), 2), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(new.u), 1, rtol=1e-6)
    # One more step from there stays there.
    _, again = jax.jit(normax.spectral_norm)(w, new)
    np.testing.assert_allclose(again.sigma, largest, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-13, 1e-20])
def test_a_kernel_too_small_for_spectral_norm_leaves_the_state_good_for_the_next(size):
    state = normax.SpectralState.create(jax.random.key(0), 2)
    w = size * jnp.diag(jnp.array([2.0, 1.0]))
    small, state = normax.spectral_norm(w, state)
    np.testing.assert_array_equal(small, w)
    bar, state = normax.spectral_norm(100 * jnp.diag(jnp.array([2.0, 1.0])), state, n_steps=20)
    np.testing.assert_allclose(bar, np.diag([1, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(state.sigma, 200, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_spectral_norm_is_that_of_the_singular_value():
    w = jax.random.normal(jax.random.key(2), (6, 4), jnp.float64)
    state = normax.SpectralState.create(jax.random.key(3), 4, jnp.float64)
    ct = jnp.sin(w)
    ours = jax.vjp(lambda w: normax.spectral_norm(w, state, n_steps=200)[0], w)[1](ct)[0]
    u, s, vt = np.linalg.svd(np.asarray(w))
    bar = np.asarray(w) / s[0]
    expected = (np.asarray(ct) - (np.asarray(ct) * bar).sum() * np.outer(u[:, 0], vt[0])) / s[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_flows_through_the_state():
    w = jax.random.normal(jax.random.key(2), (6, 4))
    state = normax.SpectralState.create(jax.random.key(3), 4)
    grad = jax.grad(lambda w: sum(map(jnp.sum, normax.spectral_norm(w, state)[1])))(w)
    np.testing.assert_array_equal(grad, jnp.zeros_like(w))


def test_a_zero_kernel_stays_zero():
    state = normax.SpectralState.create(jax.random.key(3), 4)
    w, vjp, new = jax.vjp(lambda w: normax.spectral_norm(w, state), jnp.zeros((6, 4)), has_aux=True)
    np.testing.assert_array_equal(w, jnp.zeros((6, 4)))
    assert jnp.isfinite(vjp(jnp.ones_like(w))[0]).all()
    assert jnp.isfinite(new.sigma)


def test_half_precision_kernels_are_computed_in_float32():
    w = jax.random.normal(jax.random.key(2), (64, 8)).astype(jnp.bfloat16)
    state = normax.SpectralState.create(jax.random.key(3), 8)
    bar, _ = normax.spectral_norm(w, state, n_steps=20)
    wide, _ = normax.spectral_norm(w.astype(jnp.float32), state, n_steps=20)
    np.testing.assert_array_equal(bar, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_power_iteration_goes_on_after_a_bad_kernel(bad):
    w = jax.random.normal(jax.random.key(0), (5, 3))
    state = normax.SpectralState.create(jax.random.key(1), 3)
    y, after = normax.spectral_norm(jnp.full_like(w, bad), state, n_steps=2)
    np.testing.assert_array_equal(after.u, state.u)
    assert np.isnan(np.asarray(y)).all()
    _, after = normax.spectral_norm(w, after, n_steps=50)
    largest = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[0]
    np.testing.assert_allclose(after.sigma, largest, rtol=1e-5)


def test_a_parameter_that_began_at_zero_is_left_alone_as_in_flax():
    zeros, w = jnp.zeros((5, 3)), jax.random.normal(jax.random.key(0), (5, 3))
    module = flax.linen.SpectralNorm(flax.linen.Dense(3, use_bias=False))
    variables = module.init(jax.random.key(1), zeros, update_stats=False)
    state = normax.SpectralState.create(jax.random.key(1), 3)
    for kernel in (zeros, w, 2 * w):
        ours, state = normax.spectral_norm(kernel, state)
        variables["params"]["layer_instance"] = {"kernel": kernel}
        theirs, new = module.apply(
            variables, jnp.eye(5), update_stats=True, mutable=["batch_stats"]
        )
        variables |= new
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, kernel)


def test_a_weight_that_is_no_number_shows_in_its_row():
    w = np.asarray(normax.weight_norm(jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])))
    assert np.isnan(w[:, 0]).all()
    assert np.isfinite(w[:, 1]).all()


def test_a_bound_leaves_what_is_below_it():
    w = jnp.asarray(np.diag([3.0, 1.0]).astype("f4"))
    state = normax.SpectralState.create(jax.random.key(0), 2)
    run = lambda bound: normax.spectral_norm(w, state, n_steps=30, bound=bound)[0]
    np.testing.assert_allclose(run(2.0), w * (2 / 3), rtol=1e-5)
    np.testing.assert_array_equal(run(4.0), w)
    # Below the bound the gradient is that of the kernel itself.
    ones = jnp.ones_like(w)
    f = lambda w: normax.spectral_norm(w, state, n_steps=30, bound=4.0)[0]
    np.testing.assert_array_equal(jax.vjp(f, w)[1](ones)[0], ones)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bound", [None, 0.5, 100.0])
def test_exact_spectral_norm_is_numpy_s(bound):
    w = jax.random.normal(jax.random.key(2), (3, 2, 5), jnp.float64)
    sigma = np.linalg.norm(np.asarray(w).reshape(-1, 5), 2)
    expected = w / sigma if bound is None else w / max(sigma / bound, 1)
    f = lambda w: normax.exact_spectral_norm(w, bound=bound)
    np.testing.assert_allclose(f(w), expected, rtol=1e-12)
    check_derivatives(f, (w,))
    zero = jnp.zeros((2, 3))
    np.testing.assert_array_equal(f(zero), zero)


def test_a_kernel_is_kept_within_a_bound():
    tx = optax.chain(
        optax.sgd(1.0),
        normax.weight_constraint(functools.partial(normax.exact_spectral_norm, bound=1.0)),
    )
    params = {"kernel": jnp.diag(jnp.asarray([3.0, 0.5])), "bias": jnp.full(2, 9.0)}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], np.diag([1.0, 0.5 / 3]), atol=1e-6)
    np.testing.assert_array_equal(new["bias"], params["bias"])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e38])
def test_exact_spectral_norm_in_the_whole_range(size):
    w = size * jnp.diag(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(normax.exact_spectral_norm(w), np.diag([0.5, 1]), rtol=1e-6)
    bounded = normax.exact_spectral_norm(w, bound=0.5)
    np.testing.assert_allclose(bounded, w if size < 1 else np.diag([0.25, 0.5]), rtol=1e-6)


def test_spectral_norms_of_no_outputs():
    w = jnp.zeros((3, 0))
    assert normax.exact_spectral_norm(w).shape == (3, 0)
    state = normax.SpectralState.create(jax.random.key(0), 0)
    assert normax.spectral_norm(w, state)[0].shape == (3, 0)


def second_difference(f, step=1e-4):
    return (f(step) - 2 * f(0.0) + f(-step)) / step**2


# Those in between are equal, and that which is asked for is not; of low rank most are zero.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
@pytest.mark.parametrize(
    ("sizes", "index"), [((3, 2, 2, 1), 0), ((3, 2, 2, 1), -1), ((3, 0, 0, 0), 0)]
)
def test_the_second_derivative_of_a_singular_value(sizes, index, shape, dtype):
    rng = np.random.default_rng(0)
    left, right, way = (
        rng.normal(size=size) + (1j * rng.normal(size=size) if dtype is complex else 0)
        for size in ((shape[0],) * 2, (shape[1],) * 2, shape)
    )
    (left, _), (right, _) = np.linalg.qr(left), np.linalg.qr(right)
    start = left[:, :4] * np.float64(sizes) @ right[:4]
    exact = second_difference(lambda t: np.linalg.svd(start + t * way, compute_uv=False)[index])
    along = lambda t: singular_values(start + t * way, (index,))[0]
    for twice in (jax.grad(jax.grad(along)), jax.jacfwd(jax.grad(along))):
        np.testing.assert_allclose(twice(0.0), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_kernel_of_low_rank_has_second_derivatives():
    rng = np.random.default_rng(0)
    start = np.outer(rng.normal(size=6), rng.normal(size=5))
    way = rng.normal(size=(6, 5))

    def exact(t):
        w = start + t * way
        return np.sin(w / np.linalg.norm(w, 2)).sum()

    ours = lambda t: jnp.sum(jnp.sin(normax.exact_spectral_norm(start + t * way)))
    np.testing.assert_allclose(jax.grad(jax.grad(ours))(0.0), second_difference(exact), rtol=1e-5)
