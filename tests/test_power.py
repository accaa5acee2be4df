"""Power normalization against the paper's algorithm, step by step, in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normax


def paper(xs, cts, scale, bias, momentum, drift_momentum, epsilon=1e-5):
    """Yields y, dx, dscale, mean square and drift of each step: algorithm 2, in float64."""
    square, drift = np.ones(xs.shape[-1]), np.zeros(xs.shape[-1])
    for x, ct in zip(np.asarray(xs, np.float64), np.asarray(cts, np.float64), strict=True):
        psi = np.sqrt(square + epsilon)
        xhat, g = x / psi, ct * scale
        dx = (g - drift * xhat) / psi
        gamma, lam = (xhat**2).mean(0), (g * xhat).mean(0)
        drift = drift * (1 - (1 - drift_momentum) * gamma) + (1 - drift_momentum) * lam
        square = momentum * square + (1 - momentum) * (x**2).mean(0)
        yield xhat * scale + bias, dx, (ct * xhat).sum(0), square, drift


def step(x, ct, state, scale, bias, **options):
    def apply(x, drift, scale):
        return normax.power_norm(
            x, state._replace(drift=drift), scale, bias, use_running_average=False, **options
        )

    y, vjp, new = jax.vjp(apply, x, state.drift, scale, has_aux=True)
    dx, drift, dscale = vjp(ct)
    return y, dx, dscale, new._replace(drift=drift)


@pytest.mark.parametrize("masked", [False, True])
def test_the_paper_s_algorithm(masked):
    key = jax.random.key(0)
    xs, cts = 2 * jax.random.normal(key, (2, 5, 16, 3)) + 0.5
    scale, bias = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 1.0, -1.0])
    state = normax.PowerState.create(3)
    momenta = {"momentum": 0.8, "drift_momentum": 0.7}
    expected = paper(xs, cts, np.asarray(scale), np.asarray(bias), 0.8, 0.7)
    if masked:
        rows = jnp.full((5, 4, 3), jnp.nan)
        xs, cts = jnp.concatenate([xs, rows], 1), jnp.concatenate([cts, jnp.ones((5, 4, 3))], 1)
        momenta["mask"] = (jnp.arange(20) < 16)[:, None]
    run = jax.jit(lambda x, ct, state: step(x, ct, state, scale, bias, **momenta))
    for x, ct, (y, dx, dscale, square, drift) in zip(xs, cts, expected, strict=True):
        ours_y, ours_dx, ours_dscale, state = run(x, ct, state)
        np.testing.assert_allclose(ours_y[:16], y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours_dx[:16], dx, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ours_dx[16:], 0)
        np.testing.assert_allclose(ours_dscale, dscale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.square, square, rtol=1e-5)
        np.testing.assert_allclose(state.drift, drift, rtol=1e-4, atol=1e-5)
    y, same = normax.power_norm(xs[0], state, use_running_average=True)
    chex.assert_trees_all_equal(same, state)
    expected = np.asarray(xs[0, :16]) / np.sqrt(np.asarray(state.square) + 1e-5)
    np.testing.assert_allclose(y[:16], expected, rtol=1e-5)


def test_warming_up_divides_by_the_batch_and_a_bad_batch_moves_nothing():
    x = 5 * jax.random.normal(jax.random.key(0), (16, 3))
    state = normax.PowerState.create(3)
    run = lambda x, flag: normax.power_norm(x, state, use_running_average=False, warming_up=flag)
    y, _ = jax.jit(run)(x, True)
    xs = np.asarray(x)
    np.testing.assert_allclose(y, xs / np.sqrt((xs**2).mean(0) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(x, False)[0], xs / np.sqrt(1 + 1e-5), rtol=1e-5)
    bad = x.at[0].set(jnp.nan)
    *_, new = step(bad, x, state, jnp.ones(3), jnp.zeros(3))
    chex.assert_trees_all_equal(new, state)


def test_half_precision_comes_back():
    x = jax.random.normal(jax.random.key(0), (16, 3)).astype(jnp.bfloat16)
    y, _ = normax.power_norm(x, normax.PowerState.create(3), use_running_average=False)
    assert y.dtype == jnp.bfloat16


def test_bad_input_is_refused():
    x, state = jnp.ones((4, 3)), normax.PowerState.create(3)
    with pytest.raises(TypeError, match=r"power_norm: expected state to be a normax.PowerState"):
        normax.power_norm(x, normax.RunningStats.create(3), use_running_average=False)
    with pytest.raises(ValueError, match=r"power_norm: expected drift_momentum in \[0, 1\], got 2"):
        normax.power_norm(x, state, use_running_average=False, drift_momentum=2)
    with pytest.raises(ValueError, match=r"expected state.square.shape == \(4,\)"):
        normax.power_norm(jnp.ones((3, 4)), state, use_running_average=False)
