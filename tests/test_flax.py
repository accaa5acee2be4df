"""Where Flax's normalizers are wrong, normax's are right: one test for each line of the README."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax
import normax.linen
import normax.nnx

KEY = jax.random.key(0)


def exact(x, axes, epsilon, mask=True):
    """The definition, in long double."""
    x = np.where(mask, np.asarray(x).astype(np.longdouble), 0)
    n = np.broadcast_to(mask, x.shape).sum(axes, keepdims=True)
    d = np.where(mask, x - x.sum(axes, keepdims=True) / n, 0)
    return d / np.sqrt((d * d).sum(axes, keepdims=True) / n + np.longdouble(epsilon))


def assert_within_eps(y, reference, units):
    """Compares in units of the last place of float32, at the scale of the reference."""
    error = np.abs(np.asarray(y).astype(np.longdouble) - reference).max()
    assert error <= units * np.finfo(np.float32).eps * np.abs(reference).max()


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_a_large_mean_costs_no_digits(use_fast_variance):
    # The two tests of Flax's that compare with its own rounding, here against the definition.
    x = jax.random.normal(jax.random.split(KEY)[0], (2, 3, 4)) + 1e6
    layer = normax.linen.LayerNorm(
        use_bias=False, use_scale=False, epsilon=1e-5, use_fast_variance=use_fast_variance
    )
    assert_within_eps(layer.apply({}, x), exact(x, -1, 1e-5), 4)
    x = jax.random.normal(jax.random.split(KEY)[0], (2, 3, 4, 5)) + 1e4
    instance = normax.linen.InstanceNorm(
        use_bias=False, use_scale=False, epsilon=1e-5, use_fast_variance=use_fast_variance
    )
    assert_within_eps(instance.apply({}, x), exact(x, (1, 2), 1e-5), 4)


def test_nnx_group_norm_reduces_the_axes_it_is_given():
    x = jax.random.normal(KEY, (2, 3, 4)) * jnp.arange(1.0, 4.0)[None, :, None]
    norm = normax.nnx.GroupNorm(4, num_groups=2, reduction_axes=(-1,), rngs=nnx.Rngs(0))
    expected = exact(x.reshape(2, 3, 2, 2), -1, 1e-6).reshape(x.shape)
    assert_within_eps(norm(x), expected, 4)


def test_nnx_batch_norm_does_not_round_its_statistics_to_the_output_dtype():
    x = 300.7 + jax.random.normal(KEY, (4096, 1))
    norm = normax.nnx.BatchNorm(1, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    norm(x)
    norm.eval()
    error = jnp.abs(norm(x).astype(jnp.float32) - exact(x, 0, 1e-5).astype(np.float32))
    assert error.max() < 0.02  # bfloat16 rounds 4 to within 0.016


def test_nnx_weight_norm_trains_its_scales_and_leaves_the_kernel():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    norm = normax.nnx.WeightNorm(
        layer, scale_init=jax.nn.initializers.normal(), param_dtype=jnp.float16, rngs=nnx.Rngs(1)
    )
    kernel = jnp.array(layer.kernel[...])
    x = jnp.ones((4, 3))
    grads = nnx.grad(lambda model: model(x).sum())(norm)
    assert isinstance(norm.scales["kernel",], nnx.Param)
    assert norm.scales["kernel",].dtype == jnp.float16
    assert jnp.all(grads.scales["kernel",][...] != 0)
    norm.eval()
    norm(x)
    np.testing.assert_array_equal(layer.kernel[...], kernel)


def test_nnx_spectral_norm_leaves_the_kernel():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    norm = normax.nnx.SpectralNorm(layer, n_steps=30, rngs=nnx.Rngs(1))
    kernel = np.asarray(layer.kernel[...])
    y = norm(jnp.eye(3)) - layer.bias[...][None]
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    np.testing.assert_allclose(np.linalg.norm(y, 2), 1, rtol=1e-4)


def test_the_kernel_comes_back_after_an_error():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    norm = normax.nnx.WeightNorm(layer, rngs=nnx.Rngs(1))
    kernel = np.asarray(layer.kernel[...])
    with pytest.raises(TypeError):
        norm(jnp.ones((4, 7)))
    np.testing.assert_array_equal(layer.kernel[...], kernel)


def test_poison_in_padding_reaches_no_gradient():
    mask = jnp.array([[True, True, True, False]])
    x = jnp.where(mask, jnp.array([[1.0, 2.0, 4.0, 0.0]]), jnp.nan)
    grad = jax.grad(lambda x: jnp.sum(normax.layer_norm(x, mask=mask) ** 3))(x)
    clean = jax.grad(lambda x: jnp.sum(normax.layer_norm(x) ** 3))(x[:, :3])
    np.testing.assert_allclose(grad[:, :3], clean, rtol=1e-5, atol=1e-6)
    assert grad[0, 3] == 0


@pytest.mark.parametrize("ours", [normax.linen, normax.nnx])
def test_a_batch_with_nothing_valid_leaves_the_state(ours):
    x, mask = jnp.full((4, 2), jnp.nan), jnp.zeros((4, 1), bool)
    if ours is normax.linen:
        norm = ours.BatchNorm(use_running_average=False)
        variables = norm.init(KEY, jnp.ones((4, 2)))
        y, new = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
        state = new["batch_stats"]
    else:
        norm = ours.BatchNorm(2, rngs=nnx.Rngs(0))
        y = norm(x, mask=mask)
        state = {"mean": norm.mean[...], "var": norm.var[...]}
    np.testing.assert_array_equal(y, jnp.zeros((4, 2)))
    np.testing.assert_array_equal(state["mean"], [0, 0])
    np.testing.assert_array_equal(state["var"], [1, 1])


def test_unequal_masks_on_devices_pool_by_count():
    x = jax.random.normal(KEY, (4, 6, 3))
    mask = jnp.arange(6)[None, :, None] < jnp.array([6, 1, 3, 0])[:, None, None]
    norm = normax.linen.BatchNorm(use_running_average=False, momentum=0.0, axis_name="device")
    variables = norm.init(KEY, x[0])

    def one(x, mask):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])

    _, new = jax.vmap(one, axis_name="device")(x, mask)
    valid = np.asarray(x, np.longdouble)[np.broadcast_to(mask, x.shape)].reshape(-1, 3)
    np.testing.assert_allclose(new["batch_stats"]["mean"][0], valid.mean(0), atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"][0], valid.var(0), rtol=1e-6)


def test_group_norm_takes_a_mask_without_features():
    x = jax.random.normal(KEY, (2, 3, 3, 4))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 3, 3, 1)).at[:, 0].set(True)
    y = normax.linen.GroupNorm(num_groups=2, use_bias=False, use_scale=False).apply(
        {}, x, mask=mask
    )
    wide = np.asarray(mask)[..., None]
    expected = exact(x.reshape(2, 3, 3, 2, 2), (1, 2, 4), 1e-6, wide).reshape(x.shape)
    assert_within_eps(y, expected, 4)


def test_axes_are_sorted_numbers_and_not_a_set():
    x = jax.random.normal(KEY, (1, 2, 1, 1, 1, 1, 1, 1, 4))
    norm = normax.linen.GroupNorm(num_groups=2, reduction_axes=(1, -1))
    y, _ = norm.init_with_output(KEY, x)  # a false error in Flax
    assert y.shape == x.shape
    for axes in (-5, (2, 2), (-1, 2), 5):
        with pytest.raises(ValueError, match="reduction_axes"):
            normax.linen.LayerNorm(reduction_axes=axes).init(KEY, jnp.ones((2, 3, 4)))


def test_short_weights_get_their_length():
    v = jnp.full((4, 1), 0.5e-7)
    dense = flax.linen.Dense(1, use_bias=False, kernel_init=lambda *_: v)
    y, _ = normax.linen.WeightNorm(dense).init_with_output(KEY, jnp.ones((1, 4)))
    np.testing.assert_allclose(y, [[2.0]], rtol=1e-6)


def test_statistics_of_another_shape_are_refused_at_inference():
    norm = normax.linen.BatchNorm(use_running_average=True)
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"stats.mean.shape == \(1,\)"):
        norm.apply(
            {"params": {"scale": jnp.ones(1), "bias": jnp.ones(1)}, "batch_stats": stats},
            jnp.ones((4, 1)),
        )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_the_state_keeps_its_dtype_in_a_scan(dtype):
    norm = normax.linen.BatchNorm(use_running_average=False)
    xs = jax.random.normal(KEY, (3, 8, 2), jnp.float32).astype(dtype)
    variables = norm.init(KEY, xs[0])

    def step(state, x):
        _, new = norm.apply({**variables, **state}, x, mutable=["batch_stats"])
        return new, None

    state, _ = jax.lax.scan(step, {"batch_stats": variables["batch_stats"]}, xs)
    assert state["batch_stats"]["var"].dtype == jnp.float32


def test_a_float64_state_stays_one_in_a_scan():
    with jax.enable_x64(True):
        norm = normax.linen.BatchNorm(use_running_average=False, dtype=jnp.float64)
        xs = jax.random.normal(KEY, (3, 8, 2), jnp.float64)
        state = norm.init(KEY, xs[0])["batch_stats"]

        def step(state, x):
            variables = {"params": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
            out = norm.apply({**variables, "batch_stats": state}, x, mutable=["batch_stats"])
            return out[1]["batch_stats"], None

        state, _ = jax.lax.scan(step, state, xs)
        assert {leaf.dtype for leaf in state.values()} == {jnp.dtype("float64")}


def test_a_missing_axis_name_says_what_to_do():
    norm = normax.nnx.BatchNorm(2, axis_name="batch", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"axis_name='batch'.*Under plain\s+jax.jit leave"):
        norm(jnp.ones((4, 2)))


def test_the_backward_pass_keeps_the_input_only():
    x = jax.random.normal(KEY, (256, 512), jnp.bfloat16)
    for norm in (normax.linen.LayerNorm(), normax.linen.RMSNorm(), normax.linen.GroupNorm(4)):
        params = norm.init(KEY, x)
        _, backward = jax.vjp(lambda x, norm=norm, params=params: norm.apply(params, x), x)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if leaf.ndim > 1)
        assert kept <= 1.1 * x.nbytes


def test_one_bad_batch_does_not_stay_in_the_state():
    x = jax.random.normal(KEY, (8, 2))
    states = []
    for library in (normax.linen, flax.linen):
        norm = library.BatchNorm(use_running_average=False)
        variables = norm.init(KEY, x)
        _, new = norm.apply(variables, x.at[0, 1].set(jnp.nan), mutable=["batch_stats"])
        _, new = norm.apply({**variables, **new}, x, mutable=["batch_stats"])
        states.append(np.asarray(new["batch_stats"]["mean"]))
    ours, theirs = states
    assert np.isnan(theirs[1])
    np.testing.assert_allclose(ours[1], 0.01 * x[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "BatchNorm"])
def test_large_finite_input_is_normalized(name):
    x = jax.random.normal(KEY, (8, 16))
    options = {"use_running_average": False} if name == "BatchNorm" else {}
    ys = []
    for library, factor in ((normax.linen, 1e25), (flax.linen, 1e25), (flax.linen, 1)):
        norm = getattr(library, name)(epsilon=1e-6, **options)
        y, _ = norm.init_with_output(KEY, jnp.float32(factor) * x)
        ys.append(np.asarray(y))
    ours, theirs, expected = ys
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(theirs).any() or not theirs.any()
