"""Bugs that other libraries had, by the number of their public issue: normax has none of them.

Public issues that have no test by their number, and why:

- the same cancellation as those named here, held by tests/test_accuracy.py on a grid:
  pytorch#51102, onnxruntime#28463, #21935, mlx#2238, tensorflow#118701; between eager and jit,
  jax#37281, too;
- statistics in half precision: tensorflow#24979, pytorch#62594, #147303, apex#411: held by the grid
  of tests/test_accuracy.py in float16 and bfloat16;
- a batch of one value: torch/nn#1271: refused, tests/test_errors.py;
- uneven or no entries on a device, and which devices: flax#2417, #1250, #452, pytorch#62967:
  tests/test_sync.py;
- masks: keras#18759, flax#3508, #3690: tests/test_masks.py;
- a state that moves where it should not, or compiles again: equinox#659, #965:
  tests/test_state.py and tests/test_train.py (one compilation);
- more than 2**32 values, pytorch#181555: counts stop at 2**31 - 1 (tests/test_moments.py), the
  memory of such an array is beyond these tests;
- an input overwritten by a kernel, FlagGems#6332: arrays of JAX cannot be.
"""

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differences import check_derivatives

import normax.linen
import normax.nnx

KEY = jax.random.key(0)
X = 2 + jax.random.normal(KEY, (6, 4))


def train(x, **options):
    stats = normax.RunningStats.create(x.shape[-1])
    return normax.batch_norm(x, stats, use_running_average=False, **options)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_flax_1491_equinox_314_jax_30426_the_variance_is_never_negative_nor_noise(mean):
    x = (mean + 1e-7 * mean * jax.random.normal(KEY, (512, 3))).astype(jnp.float32)
    var = normax.moments(x, 0).var
    np.testing.assert_allclose(var, np.asarray(x, np.float64).var(0), rtol=1e-5)
    assert (var >= 0).all()


def test_keras_18795_pytorch_40302_a_small_variance_beside_a_large_mean():
    x = jnp.float32(4096) + jnp.arange(8, dtype=jnp.float32)[:, None] / 1024
    y, stats = train(x, epsilon=0.0, momentum=0.0)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / exact.std(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, exact.var(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_keras_22586_haiku_396_half_precision_statistics_are_float32(dtype):
    x = (300 + jax.random.normal(KEY, (4096, 2))).astype(dtype)
    y, stats = train(x, momentum=0.0)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats.var, exact.var(0), rtol=1e-5)
    assert stats.var.dtype == jnp.float32
    assert y.dtype == dtype


def test_pytorch_189581_rms_norm_of_small_bfloat16():
    x = (1e-4 * jax.random.normal(KEY, (4, 64))).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(normax.rms_norm(x), np.float64), exact, rtol=8e-3)


def test_coremltools_2822_epsilon_belongs_inside_the_root_and_before_the_scale():
    x = 1e-3 * X
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-3)
    y = normax.layer_norm(x, jnp.full(4, 10.0), epsilon=1e-3)
    np.testing.assert_allclose(y, 10 * exact, rtol=1e-4, atol=1e-6)


def test_pytorch_162489_finite_input_does_not_become_zeros():
    for norm in (normax.layer_norm, normax.rms_norm):
        np.testing.assert_allclose(norm(1e30 * X), norm(X, epsilon=0.0), rtol=1e-5)


def test_pytorch_5410_a_constant_feature_comes_out_as_zero():
    x = jnp.full((1000, 2), 1e6, jnp.bfloat16)
    np.testing.assert_array_equal(train(x)[0], jnp.zeros_like(x))


def test_tensorflow_34062_a_single_value_is_refused_or_bias():
    with pytest.raises(ValueError, match="more than one value per feature"):
        train(X[:1])
    np.testing.assert_array_equal(normax.layer_norm(X[:, :1]), jnp.zeros((6, 1)))


def test_pytorch_7028_19902_106366_the_variance_remembered_is_the_one_asked_for():
    for unbiased in (False, True):
        _, stats = train(X, momentum=0.0, unbiased=unbiased)
        np.testing.assert_allclose(stats.var, np.var(X, 0, ddof=int(unbiased)), rtol=1e-5)


def test_haiku_361_evaluation_before_training_is_defined():
    norm = normax.linen.BatchNorm(use_running_average=True)
    y = norm.apply(norm.init(KEY, X), X)
    np.testing.assert_allclose(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_flax_2052_batch_norm_in_a_scan_inside_a_module_carries_its_statistics():
    class Step(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, carry, x):
            return carry, normax.linen.BatchNorm(use_running_average=False, momentum=0.5)(x)

    class Steps(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, xs):
            if self.is_initializing():  # a carried variable must be there before the scan
                return Step(name="step")((), xs[0])[1]
            scan = flax.linen.scan(
                Step,
                variable_carry="batch_stats",
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(name="step")((), xs)[1]

    xs = jnp.stack([X, X + 1, X + 2])
    variables = Steps().init(KEY, xs)
    _, new = Steps().apply(variables, xs, mutable=["batch_stats"])
    expected = np.zeros(4)
    for x in np.asarray(xs):
        expected = 0.5 * expected + 0.5 * x.mean(0)
    (norm,) = new["batch_stats"]["step"].values()
    np.testing.assert_allclose(norm["mean"], expected, rtol=1e-5)


def test_flax_3602_inference_needs_nothing_mutable():
    norm = normax.linen.BatchNorm(use_running_average=True)
    variables = norm.init(KEY, X)
    step = lambda carry, x: (carry, norm.apply(variables, x))
    _, ys = jax.lax.scan(step, None, jnp.stack([X, X]))
    np.testing.assert_array_equal(ys[0], ys[1])


def test_flax_4734_shapes_of_an_nnx_model_without_computing():
    model = flax.nnx.eval_shape(lambda: normax.nnx.BatchNorm(4, rngs=flax.nnx.Rngs(0)))
    assert model.mean.shape == (4,)

    def run(x):
        norm = normax.nnx.BatchNorm(4, rngs=flax.nnx.Rngs(0))
        return norm(x)

    assert flax.nnx.eval_shape(run, X).shape == X.shape


@pytest.mark.parametrize("features", [3, 5, 7])
def test_pytorch_22192_64039_apex_1768_uneven_devices_and_odd_channels(features):
    x = 3 + jax.random.normal(KEY, (4, 5, features))
    valid = jnp.arange(5)[None, :, None] < jnp.array([5, 1, 2, 0])[:, None, None]
    ct = jax.random.normal(jax.random.key(1), x.shape)

    def pooled(x, scale):
        one = lambda x, m: normax.normalize_batch(x, scale, mask=m, axis_name="i")[0]
        return jax.vmap(one, axis_name="i")(x, valid)

    def whole(x, scale):
        flat = jnp.broadcast_to(valid, x.shape).reshape(-1, features)
        y, _ = normax.normalize_batch(x.reshape(-1, features), scale, mask=flat)
        return y.reshape(x.shape)

    scale = jnp.linspace(0.5, 1, features)
    (y, vjp), (expected, other) = (jax.vjp(f, x, scale) for f in (pooled, whole))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    # pytorch#36382: dx; nnabla#1120: the gradient of the scale, reduced once.
    for ours, one_device in zip(vjp(ct), other(ct), strict=True):
        np.testing.assert_allclose(ours, one_device, rtol=1e-5, atol=1e-5)


def test_pytorch_74944_a_device_without_a_batch():
    x = jnp.zeros((4, 0, 3))
    m = jax.vmap(lambda x: normax.moments(x, 0, axis_name="i"), axis_name="i")(x)
    np.testing.assert_array_equal(m.count, jnp.zeros((4, 3)))
    assert np.isfinite(m.mean).all()


def test_keras_19818_20815_a_mask_of_the_batch_and_a_batch_all_masked():
    mask = jnp.array([True, True, False, True, False, True])[:, None]
    y, stats = train(jnp.where(mask, X, jnp.nan), mask=mask, momentum=0.0)
    kept = np.asarray(X)[np.asarray(mask)[:, 0]]
    np.testing.assert_allclose(stats.mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[2], np.zeros(4))
    y, stats = train(X, mask=jnp.zeros_like(mask))
    assert np.isfinite(np.asarray(y)).all()
    np.testing.assert_array_equal(stats.var, jnp.ones(4))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 1.0])
def test_flax_1671_pytorch_19126_184575_the_gradient_at_a_zero_norm_is_finite(scale):
    v = scale * X
    w, vjp = jax.vjp(normax.weight_norm, v)
    (dv,) = vjp(jnp.ones_like(w))
    assert np.isfinite(np.asarray(w)).all()
    assert np.isfinite(np.asarray(dv)).all()
    lengths = np.sqrt((np.asarray(w, np.float64) ** 2).sum(0))
    np.testing.assert_allclose(lengths, np.full(4, float(scale > 1e-12)), atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_pytorch_79705_4422_double_backward_with_a_bias_and_no_scale():
    x, bias = jnp.asarray(X, "float64"), jnp.arange(4.0)
    for norm in (
        lambda x, b: normax.layer_norm(x, None, b),
        lambda x, b: normax.group_norm(x, None, b, num_groups=2),
        lambda x, b: normax.normalize_batch(x, None, b)[0],
    ):
        check_derivatives(lambda x, b, f=norm: jnp.sin(f(x, b)), (x, bias))


def test_pytorch_12737_13350_62293_spectral_norm_keeps_its_state_apart_from_the_weights():
    w = jax.random.normal(KEY, (3, 2, 4))
    state = normax.SpectralState.create(KEY, 4)
    before = jax.tree.map(np.array, (w, state))
    bar, new = normax.spectral_norm(w, state, n_steps=50)
    jax.tree.map(np.testing.assert_array_equal, (w, state), before)
    largest = np.linalg.svd(np.asarray(w, np.float64).reshape(-1, 4), compute_uv=False)[0]
    np.testing.assert_allclose(new.sigma, largest, rtol=1e-5)
    again, same = normax.spectral_norm(w, new, n_steps=1)
    np.testing.assert_allclose(again, bar, atol=1e-5)
    np.testing.assert_allclose(same.sigma, largest, rtol=1e-5)


def test_flaggems_5392_the_backward_pass_of_rank_five():
    x = jax.random.normal(KEY, (2, 3, 4, 5, 6))
    scale = jnp.linspace(0.5, 1.5, 6)
    dscale = jax.grad(lambda s: jnp.sum(normax.layer_norm(x, s) ** 2))(scale)
    xhat = np.asarray(normax.layer_norm(x), np.float64)
    exact = 2 * (xhat**2).sum((0, 1, 2, 3)) * np.asarray(scale)
    np.testing.assert_allclose(dscale, exact, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 4, 6, 12])
def test_flaggems_4985_any_size_of_group(groups):
    x = jax.random.normal(KEY, (2, 5, 12))
    parts = np.asarray(x, np.float64).reshape(2, 5, groups, -1)
    exact = parts - parts.mean((1, 3), keepdims=True)
    exact = exact / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-6)
    y = normax.group_norm(x, num_groups=groups)
    np.testing.assert_allclose(y, exact.reshape(x.shape), rtol=1e-4, atol=1e-5)
