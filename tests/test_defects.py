"""What was found wrong in the sources of other libraries, library by library: right here.

Flax's are in tests/test_flax.py. Not here, because nothing of the kind exists in normax: cumulative
statistics of an instance norm and a synchronization with the host at each step (PyTorch), a device
and dtype that are dropped (timm), one vmap and two all-reduces for a batch norm (Equinox: see
tests/test_sync.py), strings of errors (Keras: see tests/test_errors.py).
"""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_derivatives

import normax
import normax.linen
import normax.nnx

KEY = jax.random.key(0)


def train(x, stats=None, **options):
    features = x.shape[options.get("feature_axes", -1)]
    stats = normax.RunningStats.create(features) if stats is None else stats
    return normax.batch_norm(x, stats, use_running_average=False, **options)


def exact(x, axes):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)


def test_flax_axes_are_no_set_rank_9():
    x = jax.random.normal(KEY, (2, 3, 1, 1, 2, 1, 1, 2, 4))
    y = normax.linen.GroupNorm(2, reduction_axes=(1, -1), epsilon=0.0).init_with_output(KEY, x)[0]
    groups = np.asarray(x).reshape(*x.shape[:-1], 2, 2)
    np.testing.assert_allclose(y, exact(groups, (1, -1)).reshape(x.shape), rtol=2e-4, atol=1e-5)


def test_haiku_the_variance_is_never_negative():
    x = 1e4 + jax.random.normal(KEY, (256, 3))
    y, stats = train(x, epsilon=0.0, momentum=0.0)
    np.testing.assert_allclose(y, exact(x, 0), atol=1e-5)
    np.testing.assert_allclose(stats.var, np.asarray(x, np.float64).var(0), rtol=1e-5)


def test_haiku_a_momentum_of_half_precision_does_not_round_to_one():
    x = (5 + jax.random.normal(KEY, (64, 3))).astype(jnp.bfloat16)
    _, stats = train(x, momentum=0.999)
    start = normax.RunningStats.create(3)
    start = start._replace(mean=start.mean, var=start.var)
    new = normax.debias(stats, start, 0.999)
    np.testing.assert_allclose(new.mean, np.asarray(x, np.float64).mean(0), rtol=1e-4)


def test_haiku_negative_axes_are_the_positive_ones():
    x = jax.random.normal(KEY, (8, 5, 3))
    stats = normax.RunningStats.create((5, 3))
    options = {"use_running_average": False, "epsilon": 0.0}
    scale = np.arange(15, dtype=np.float32).reshape(5, 3)
    for axes in ((1, 2), (-2, -1), (-1, 1), (2, -2)):
        y, _ = normax.batch_norm(x, stats, scale, feature_axes=axes, **options)
        np.testing.assert_allclose(y, exact(x, 0) * scale, rtol=1e-3, atol=1e-4)


def test_haiku_a_module_takes_inputs_of_any_rank():
    norm = normax.linen.GroupNorm(2, epsilon=0.0)
    variables = norm.init(KEY, jnp.ones((2, 4)))
    for shape in ((3, 4), (2, 5, 4), (2, 5, 6, 4)):
        x = jax.random.normal(KEY, shape)
        groups = np.asarray(x).reshape(*shape[:-1], 2, 2)
        expected = exact(groups, (*range(1, x.ndim - 1), -1)).reshape(shape)
        np.testing.assert_allclose(norm.apply(variables, x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("function", [normax.weight_norm, normax.centered_weight_norm])
def test_haiku_and_equinox_a_weight_of_zeros(function):
    w, pull = jax.vjp(function, jnp.zeros((3, 2)))
    np.testing.assert_array_equal(w, 0)
    assert jnp.isfinite(pull(jnp.ones((3, 2)))[0]).all()
    state = normax.SpectralState.create(KEY, 2)
    w, state = normax.spectral_norm(jnp.zeros((3, 2)), state)
    assert jnp.isfinite(w).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_haiku_and_timm_squares_are_not_taken_in_half(dtype):
    x = jnp.array([[[300.0], [-400.0], [60000.0]]], dtype)
    wide = np.asarray(x, np.float64)
    rms = np.sqrt((wide**2).mean())
    for y in (normax.rms_norm(x, reduction_axes=1), normax.filter_response_norm(x)):
        np.testing.assert_allclose(np.asarray(y, np.float64), wide / rms, rtol=8e-3)
    y = normax.global_response_norm(x / 16)
    np.testing.assert_allclose(np.asarray(y, np.float64), wide / 8, rtol=8e-3)


@pytest.mark.parametrize("steps", [1, 10])
def test_equinox_the_start_is_taken_out_of_the_variance_too(steps):
    x, start = 2 * jax.random.normal(KEY, (4096, 3)), normax.RunningStats.create(3)
    stats = start
    for _ in range(steps):
        _, stats = train(x, stats, momentum=0.99)
    y, _ = normax.batch_norm(x, normax.debias(stats, start, 0.99**steps), use_running_average=True)
    np.testing.assert_allclose(np.asarray(y).std(0), 1, rtol=1e-3)


def test_equinox_the_output_has_the_input_s_dtype_and_needs_no_vmap():
    y, stats = train(jnp.ones((4, 3), jnp.bfloat16))
    assert (y.dtype, stats.mean.dtype) == (jnp.bfloat16, jnp.float32)


def test_keras_spectral_norm_in_training_is_that_of_inference():
    layer = normax.nnx.SpectralNorm(
        flax.nnx.Linear(3, 2, rngs=flax.nnx.Rngs(0)), n_steps=30, rngs=flax.nnx.Rngs(1)
    )
    layer.layer_instance.kernel[...] = 20 * jax.random.normal(KEY, (3, 2))
    x = jnp.eye(3)
    for update in (True, False):
        w = np.asarray(layer(x, update_stats=update))
        np.testing.assert_allclose(np.linalg.svd(w, compute_uv=False)[0], 1, rtol=1e-3)


def test_keras_a_mask_beside_channels_first_and_one_channel():
    for features in (3, 1):
        x = jax.random.normal(KEY, (4, features, 5)).at[0, :, 2].set(jnp.nan)
        mask = jnp.ones((4, 1, 5), bool).at[0, 0, 2].set(False)
        y, stats = train(x, feature_axes=1, mask=mask, momentum=0.0)
        rows = np.asarray(x).transpose(0, 2, 1)[np.asarray(mask)[:, 0]]
        np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4, atol=1e-6)
        assert jnp.isfinite(y).all()


def test_keras_a_batch_of_masked_entries_moves_nothing():
    _, stats = train(jnp.ones((4, 3)), mask=jnp.zeros((4, 1), bool), momentum=0.5)
    np.testing.assert_array_equal(stats.var, 1)


@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_keras_large_means_do_not_cancel(mean):
    x = mean + jax.random.normal(KEY, (4, 64, 8))
    options = {"epsilon": 0.0}
    np.testing.assert_allclose(normax.layer_norm(x, **options), exact(x, -1), atol=2e-6)
    np.testing.assert_allclose(normax.instance_norm(x, **options), exact(x, 1), atol=2e-6)
    groups = exact(np.asarray(x).reshape(4, 64, 2, 4), (1, 3)).reshape(x.shape)
    np.testing.assert_allclose(normax.group_norm(x, num_groups=2, **options), groups, atol=2e-6)


def test_keras_bfloat16_has_the_range_of_float32():
    x = (1e8 * jax.random.normal(KEY, (64, 3))).astype(jnp.bfloat16)
    _, stats = train(x, momentum=0.0)
    np.testing.assert_allclose(stats.var, np.asarray(x, np.float64).var(0), rtol=1e-5)


def test_keras_layer_and_group_norm_do_not_ignore_their_mask():
    x = jax.random.normal(KEY, (2, 5, 4)).at[:, 3:].set(jnp.nan)
    mask = ~jnp.isnan(x)
    np.testing.assert_allclose(
        normax.group_norm(x, num_groups=2, mask=mask)[:, :3],
        normax.group_norm(x[:, :3], num_groups=2),
        rtol=1e-5,
        atol=1e-6,
    )
    y = normax.layer_norm(x, reduction_axes=(1, 2), mask=mask)
    expected = exact(np.asarray(x)[:, :3], (1, 2))
    np.testing.assert_allclose(y[:, :3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_torch_and_tokamax_both_modes_and_twice():
    x = jax.random.normal(KEY, (4, 3, 5), jnp.float64)
    for f in (
        normax.weight_norm,
        lambda x: normax.layer_norm(x, reduction_axes=(0, 2)),
        lambda x: normax.rms_norm(x, jnp.arange(1.0, 6.0), reduction_axes=(1, 2)),
    ):
        check_derivatives(f, (x,))


def test_torch_epsilon_does_not_follow_the_dtype():
    x = jnp.full((1, 4), 2.0**-12)
    wide, half = (normax.rms_norm(v)[0, 0] for v in (x, x.astype(jnp.bfloat16)))
    np.testing.assert_allclose(np.float32(half), wide, rtol=4e-3)


def test_timm_it_is_divided_and_scaled_once():
    x = jax.random.normal(KEY, (2, 4, 4, 3))
    scale = jnp.array([2.0, 3.0, 5.0])
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * np.asarray(scale)
    np.testing.assert_allclose(normax.rms_norm(x, scale, epsilon=0.0), expected, rtol=1e-5)


def test_timm_one_value_has_no_unbiased_variance_of_infinity():
    stats = normax.RunningStats.create(3)
    x = jax.random.normal(KEY, (1, 1, 1, 3))
    for unbiased in (False, True):
        new = normax.update(stats, normax.moments(x, (0, 1, 2)), unbiased=unbiased)
        assert jnp.isfinite(new.var).all()
    y, new = normax.evonorm_b0(
        jax.random.normal(KEY, (1, 2, 3)), stats, jnp.ones(3), use_running_average=False
    )
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(new.var).all()


def test_timm_any_rank():
    for shape in ((4, 3), (4, 5, 3), (2, 3, 4, 5, 3)):
        x = jax.random.normal(KEY, shape)
        np.testing.assert_allclose(train(x)[0], exact(x, tuple(range(len(shape) - 1))), atol=1e-3)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_transformer_engine_a_given_initializer_is_used(name):
    fives = jax.nn.initializers.constant(5.0)
    variables = getattr(normax.linen, name)(scale_init=fives).init(KEY, jnp.ones((2, 3)))
    np.testing.assert_array_equal(variables["params"]["scale"], 5)
    module = getattr(normax.nnx, name)(3, scale_init=fives, rngs=flax.nnx.Rngs(0))
    np.testing.assert_array_equal(module.scale[...], 5)
