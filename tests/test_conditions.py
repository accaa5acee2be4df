"""What a condition, a device or a schedule decides: adaptive norms, ghosts, priors, schedules."""

import functools
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from differences import check_derivatives
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normax
import normax.linen
import normax.nnx

KEY = jax.random.key(0)


def test_adaptive_instance_norm_is_the_paper_s_formula(x64):
    x, style = 3 + jax.random.normal(KEY, (2, 5, 4, 3)), jax.random.uniform(KEY, (2, 7, 2, 3))
    y = normax.adaptive_instance_norm(x, style)
    xs, ss = np.asarray(x), np.asarray(style)
    at = {"axis": (1, 2), "keepdims": True}
    expected = (xs - xs.mean(**at)) / np.sqrt(xs.var(**at) + 1e-5)
    expected = expected * np.sqrt(ss.var(**at) + 1e-5) + ss.mean(**at)
    np.testing.assert_allclose(y, expected, rtol=1e-10)
    check_derivatives(normax.adaptive_instance_norm, (x, style))


def test_adaptive_instance_norm_masks_content_and_style():
    x, style = jax.random.normal(KEY, (2, 2, 6, 3))
    there = (jnp.arange(6) < 4)[None, :, None]
    y = normax.adaptive_instance_norm(
        jnp.where(there, x, jnp.nan), jnp.where(there, style, jnp.inf), mask=there, style_mask=there
    )
    expected = normax.adaptive_instance_norm(x[:, :4], style[:, :4])
    np.testing.assert_allclose(y[:, :4], expected, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_film_after_any_norm_is_the_conditional_one(dtype):
    x = jax.random.normal(KEY, (3, 5, 4)).astype(dtype)
    scale, bias = jax.random.normal(jax.random.key(1), (2, 3, 4))
    y = normax.film(normax.layer_norm(x), scale, bias, scale_offset=1.0)
    xs = np.asarray(normax.layer_norm(x), np.float64)
    expected = xs * (1 + np.asarray(scale)[:, None]) + np.asarray(bias)[:, None]
    assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=eps, atol=eps)
    with pytest.raises(ValueError, match=r"film: expected scale.shape == \(3, 4\)"):
        normax.film(x, scale[0])


def test_adaln_zero_is_the_transformer_block_of_the_paper(x64):
    x = jax.random.normal(KEY, (2, 5, 4))
    scale, bias, gate = jax.random.normal(jax.random.key(1), (3, 2, 4))
    y = normax.adaln_zero(x, jnp.tanh, scale, bias, gate)
    xs = np.asarray(x)
    xhat = (xs - xs.mean(-1, keepdims=True)) / np.sqrt(xs.var(-1, keepdims=True) + 1e-6)
    s, b, g = (np.asarray(v)[:, None] for v in (scale, bias, gate))
    np.testing.assert_allclose(y, xs + g * np.tanh(xhat * (1 + s) + b), rtol=1e-10)


def test_qk_norm_bounds_the_logits():
    q, k = 100 * jax.random.normal(KEY, (2, 8, 16))
    logits = normax.l2_norm(q) @ normax.l2_norm(k).T
    assert float(jnp.abs(logits).max()) <= 1 + 1e-6


@pytest.mark.parametrize("ghost_size", [2, 4, 8, 16, 32])
def test_ghosts_mean_the_same_on_any_number_of_devices(ghost_size):
    x = jax.random.normal(KEY, (32, 3)) * jnp.arange(1.0, 33)[:, None]
    stats = normax.RunningStats.create(3)
    norm = functools.partial(
        normax.ghost_batch_norm, use_running_average=False, ghost_size=ghost_size
    )
    expected, expected_stats = norm(x, stats)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(norm, axis_name="i"),
        mesh=mesh,
        in_specs=(P("i"), P()),
        out_specs=(P("i"), P()),
    )
    y, new = jax.jit(sharded)(x, stats)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, new, expected_stats)
    parts = np.split(np.asarray(x), 32 // ghost_size)
    formula = np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts])
    np.testing.assert_allclose(expected, formula, rtol=1e-4, atol=1e-5)


def test_local_ghosts_need_no_word_between_devices_under_plain_jit():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jax.random.normal(KEY, (32, 3)), NamedSharding(mesh, P("i")))
    stats = normax.RunningStats.create(3)
    collective = re.compile(r"= (\S+) (?:all-reduce|all-gather|collective-permute|all-to-all)")

    def compiled(ghost_size):
        norm = functools.partial(
            normax.ghost_batch_norm, use_running_average=False, ghost_size=ghost_size
        )
        f = jax.jit(lambda x: norm(x, stats)[0])
        np.testing.assert_allclose(f(x), norm(jnp.asarray(np.asarray(x)), stats)[0], atol=1e-5)
        return set(collective.findall(f.lower(x).compile().as_text()))

    assert not compiled(4)
    assert compiled(16)


@pytest.mark.parametrize("inference", [True, False])
def test_without_an_epsilon_equal_entries_are_no_nan(inference):
    x, stats = jnp.ones((4, 3, 2)), normax.RunningStats.create(2)
    stats = stats._replace(var=jnp.zeros(2))
    run = {"use_running_average": inference, "epsilon": 0.0}
    for y, _ in (
        normax.evonorm_b0(x, stats, jnp.zeros(2), **run),
        normax.batch_renorm(x, stats, **run),
        (normax.global_response_norm(jnp.zeros((4, 3, 2)), jnp.ones(2), epsilon=0.0), None),
    ):
        assert jnp.isfinite(y).all()


def test_no_ghost_is_left_with_one_example():
    x, stats = jax.random.normal(KEY, (3, 4)), normax.RunningStats.create(4)
    y, _ = normax.ghost_batch_norm(x, stats, use_running_average=False, ghost_size=2)
    np.testing.assert_allclose(y, normax.normalize_batch(x)[0], rtol=1e-5, atol=1e-6)


def test_a_masked_ragged_ghost():
    x = jax.random.normal(KEY, (7, 4))
    there = jnp.arange(7) != 5
    stats = normax.RunningStats.create(4)
    y, new = normax.ghost_batch_norm(
        jnp.where(there[:, None], x, jnp.nan),
        stats,
        use_running_average=False,
        ghost_size=3,
        mask=there[:, None],
        momentum=None,
    )
    xs = np.asarray(x, np.float64)
    for rows in ([0, 1, 2], [3, 4], [6]):
        part = xs[rows]
        expected = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
        np.testing.assert_allclose(np.asarray(y)[rows], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.var, np.delete(xs, 5, 0).var(0), rtol=1e-5)
    assert int(new.count[0]) == 6


def test_kalman_falls_back_to_the_batch_where_the_prior_is_far_off():
    x = jax.random.normal(KEY, (16, 4))
    stats = normax.RunningStats.create(4)
    for far in (1e4, jnp.inf, jnp.nan):
        prior = normax.Moments(jnp.full(4, 9), jnp.full(4, far), jnp.full(4, far))
        y, _, mixture = normax.kalman_batch_norm(x, stats, prior, use_running_average=False)
        expected, _ = normax.batch_norm(x, stats, use_running_average=False)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mixture.var, np.asarray(x).var(0), rtol=1e-5)


def test_a_prior_is_what_the_layer_makes_of_normal_numbers():
    posterior = normax.Moments(jnp.full(2, 9), jnp.array([1.0, -2.0]), jnp.array([4.0, 0.0]))
    matrix = jnp.array([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    prior = normax.kalman_prior(
        posterior, lambda x: x @ matrix, jax.random.key(3), shape=(200_000, 2)
    )
    np.testing.assert_allclose(prior.mean, [-5, 2, -2], atol=0.03)
    np.testing.assert_allclose(prior.var, [4, 16, 0], atol=0.3)


def test_renorm_without_limits_is_inference_and_with_none_left_batch_norm():
    x = 4 + jax.random.normal(KEY, (16, 3))
    stats = normax.RunningStats.create(3)._replace(mean=jnp.full(3, 1.0), var=jnp.full(3, 9.0))
    free = normax.batch_renorm(x, stats, use_running_average=False, r_max=1e9, d_max=1e9)[0]
    np.testing.assert_allclose(free, (np.asarray(x) - 1) / np.sqrt(9 + 1e-3), rtol=1e-5)
    tied = normax.batch_renorm(x, stats, use_running_average=False, r_max=1.0, d_max=0.0)[0]
    xs = np.asarray(x)
    np.testing.assert_allclose(tied, (xs - xs.mean(0)) / np.sqrt(xs.var(0) + 1e-3), atol=1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_schedules_of_momentum_and_limits_count_training_steps(library):
    options = {
        "momentum": optax.linear_schedule(0.0, 0.8, 4),
        "r_max": optax.join_schedules([lambda _: 1.0, lambda _: 3.0], [2]),
        "d_max": optax.join_schedules([lambda _: 0.0, lambda _: 5.0], [2]),
    }
    xs = 2 + 3 * jax.random.normal(KEY, (6, 8, 3))
    stats = normax.RunningStats.create(3)
    if library == "linen":
        norm = normax.linen.BatchRenorm(**options)
        variables = norm.init(KEY, xs[0], use_running_average=False)
        assert variables["batch_stats"]["steps"].dtype == jnp.int32
    else:
        module = normax.nnx.BatchRenorm(3, **options, rngs=nnx.Rngs(0))
    for step, x in enumerate(xs):
        expected, stats = normax.batch_renorm(
            x,
            stats,
            use_running_average=False,
            momentum=jnp.float32(min(step, 4) * 0.2),
            r_max=1.0 if step < 2 else 3.0,
            d_max=0.0 if step < 2 else 5.0,
        )
        if library == "linen":
            apply = jax.jit(
                lambda variables, x: norm.apply(
                    variables, x, use_running_average=False, mutable=["batch_stats"]
                )
            )
            y, new = apply(variables, x)
            variables = {**variables, **new}
        else:
            y = module(x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    steps = module.steps[...] if library == "nnx" else variables["batch_stats"]["steps"]
    assert int(steps) == len(xs)


def test_a_condition_drives_a_module_without_scale_and_bias():
    class Conditional(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, condition):
            x = normax.linen.InstanceNorm(use_scale=False, use_bias=False)(x)
            scale = flax.linen.Dense(4, kernel_init=flax.linen.initializers.zeros)(condition)
            return normax.film(x, scale, scale_offset=1.0)

    x, condition = jax.random.normal(KEY, (2, 5, 4)), jnp.ones((2, 3))
    y, _ = Conditional().init_with_output(KEY, x, condition)
    np.testing.assert_allclose(y, normax.instance_norm(x), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_segment_moments_are_those_of_the_rows(weighted, x64):
    x = 1e6 + jax.random.normal(KEY, (9, 2, 3))
    ids = jnp.array([0, 2, 2, -1, 0, 2, 9, 0, 2])
    weights = jnp.linspace(0.0, 2.0, 9) if weighted else None
    poisoned = x.at[jnp.array([3, 6])].set(jnp.nan)
    m = normax.segment_moments(poisoned, ids, 3, weights=weights)
    for segment in range(3):
        rows = (np.asarray(ids) == segment) & (weights is None or np.asarray(weights) > 0)
        w = np.ones(9) if weights is None else np.asarray(weights)
        if not rows.any():
            assert int(m.count[segment].max()) == 0
            continue
        mean = np.average(np.asarray(x)[rows], 0, w[rows])
        var = np.average((np.asarray(x)[rows] - mean) ** 2, 0, w[rows])
        np.testing.assert_allclose(m.mean[segment], mean, rtol=1e-12)
        np.testing.assert_allclose(m.var[segment], var, rtol=1e-7)
        assert int(m.count[segment, 0, 0]) == rows.sum()


def test_segment_norm_reads_padding_as_absent():
    x = jax.random.normal(KEY, (6, 4))
    ids = jnp.array([0, 0, 1, 1, -1, 7])
    poisoned = jnp.where((ids[:, None] >= 0) & (ids[:, None] < 2), x, jnp.nan)
    y, vjp = jax.vjp(lambda x: normax.segment_norm(x, ids, 2, bias=jnp.full(4, 5.0)), poisoned)
    np.testing.assert_array_equal(y[4:], 5.0)
    xs = np.asarray(x)
    expected = (xs[:2] - xs[:2].mean(0)) / np.sqrt(xs[:2].var(0) + 1e-5) + 5
    np.testing.assert_allclose(y[:2], expected, rtol=1e-5)
    (dx,) = vjp(jax.random.normal(KEY, y.shape))
    np.testing.assert_array_equal(dx[4:], 0)
    assert jnp.isfinite(dx).all()


def test_domains_keep_statistics_apart():
    x = jnp.concatenate([jax.random.normal(KEY, (8, 2)), 100 + jax.random.normal(KEY, (8, 2))])
    order = jax.random.permutation(KEY, 16)
    ids = (jnp.arange(16) // 8)[order]
    stats = normax.RunningStats.create((3, 2))
    _, new = normax.domain_batch_norm(
        x[order], stats, ids, use_running_average=False, momentum=None
    )
    xs = np.asarray(x).reshape(2, 8, 2)
    np.testing.assert_allclose(new.mean[:2], xs.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.var[:2], xs.var(1), rtol=1e-3)
    np.testing.assert_array_equal(new.var[2], 1)
    y, _ = normax.domain_batch_norm(x[order], new, ids, use_running_average=True)
    assert float(jnp.abs(y).max()) < 4


def test_masked_entries_of_batch_renorm_come_out_as_bias():
    x = jnp.array([[1.0, 2], [3, 4], [5, 9], [jnp.nan, jnp.inf]])
    mask, bias = jnp.array([[True], [True], [True], [False]]), jnp.array([0.5, -0.5])
    stats = normax.RunningStats.create(2)

    def renorm(scale, x, mask):
        options = {"use_running_average": False, "r_max": 3.0, "d_max": 5.0}
        return normax.batch_renorm(x, stats, scale, bias, mask=mask, **options)[0]

    scale = jnp.array([2.0, 3.0])
    y, whole = renorm(scale, x, mask), renorm(scale, x[:3], None)
    np.testing.assert_array_equal(y[3], bias)
    np.testing.assert_allclose(y[:3], whole, rtol=1e-6)
    slope, expected = (
        jax.grad(lambda *args: renorm(*args).sum())(scale, *args)
        for args in ((x, mask), (x[:3], None))
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    np.testing.assert_array_equal(renorm(scale, jnp.ones((1, 2)) * x[:2], None).shape, (2, 2))


def test_masked_entries_add_nothing_to_an_adaptive_block():
    x, zero = jnp.array([[1.0, 2, jnp.nan], [3, 5, 4]]), jnp.zeros((2, 3))
    mask, one = ~jnp.isnan(x), jnp.ones((2, 3))
    y = lambda x: normax.adaln_zero(x, jnp.tanh, zero, zero, one, mask=mask)
    np.testing.assert_allclose(y(x)[0], [1 - np.tanh(1), 2 + np.tanh(1), 0], rtol=1e-5)
    dx = jax.grad(lambda x: y(x).sum())(x)
    assert jnp.isfinite(dx).all()
    assert dx[0, 2] == 0


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e25])
def test_global_response_norm_of_every_size(size):
    x = np.asarray(jax.random.normal(KEY, (2, 5, 3)), np.float64)
    f = lambda x: normax.global_response_norm(x, epsilon=0.0)
    length = np.sqrt((x**2).sum(1, keepdims=True))
    expected = x + x * length / length.mean(-1, keepdims=True)
    np.testing.assert_allclose(f(jnp.float32(x * size)) / size, expected, rtol=1e-5)
    dx = jax.grad(lambda x: (f(x) / size).sum())(jnp.float32(x * size))
    assert jnp.isfinite(dx).all()
    assert (dx != 0).any()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_ids_of_a_narrow_dtype(dtype):
    number = 256 if dtype == jnp.uint8 else 200
    ids = jnp.array([0, 100, 0, 100], dtype)
    m = normax.segment_moments(jnp.array([[1.0], [2], [3], [4]]), ids, number)
    np.testing.assert_array_equal(m.mean[jnp.array([0, 100]), 0], [2, 3])


@pytest.mark.parametrize(
    ("dtype", "far"),
    [(jnp.int64, 2**32), (jnp.int64, 1 - 2**32), (jnp.uint64, 2**63 + 1), (jnp.uint32, 2**32 - 1)],
)
def test_ids_of_a_wide_dtype_are_not_cut(dtype, far, x64):
    x = jnp.array([[1.0], [3], [1e6]])
    ids = jnp.array([0, 0, far], dtype)
    m = normax.segment_moments(x, ids, 2)
    np.testing.assert_array_equal(m.count.ravel(), [2, 0])
    np.testing.assert_array_equal(m.mean.ravel(), [2, 0])
    _, stats = normax.domain_batch_norm(
        x, normax.RunningStats.create((2, 1)), ids, use_running_average=False, momentum=None
    )
    np.testing.assert_array_equal(stats.mean.ravel(), [2, 0])


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_wide_ids_of_numpy_keep_their_digits_where_jax_has_none_of_them(dtype):
    x, far = jnp.array([[1.0], [3], [1e6]]), np.array([0, 0, 2**32], dtype)
    m = normax.segment_moments(x, far, 1)
    assert (int(m.count[0, 0]), float(m.mean[0, 0])) == (2, 2)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_the_mixture_at_inference_has_the_count_of_all_data(library):
    x, prior = jnp.ones((8, 3)), normax.Moments(*jnp.array([[8.0] * 3, [0.0] * 3, [1.0] * 3]))
    if library == "nnx":
        norm = normax.nnx.KalmanBatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
        norm(x, prior)
        norm.eval()
        _, mixture = norm(x, prior)
    else:
        norm = normax.linen.KalmanBatchNorm(use_running_average=False, momentum=None)
        variables = norm.init(KEY, x, prior)
        _, new = norm.apply(variables, x, prior, mutable=["batch_stats"])
        norm = normax.linen.KalmanBatchNorm(use_running_average=True, momentum=None)
        _, mixture = norm.apply({**variables, **new}, x, prior)
    np.testing.assert_array_equal(mixture.count, [8, 8, 8])


def test_rows_without_features_stay_without():
    stats = normax.RunningStats.create((2, 0))
    ids = jnp.array([0, 1, 0])
    y, _ = normax.domain_batch_norm(jnp.zeros((3, 0)), stats, ids, use_running_average=True)
    assert y.shape == (3, 0)


@pytest.mark.parametrize("library", [normax.linen, normax.nnx])
def test_a_module_that_knows_no_mask_says_so(library):
    x = jnp.ones((3, 4))
    calls = {
        normax.linen: lambda: normax.linen.DynamicTanh().init(KEY, x, mask=x > 0),
        normax.nnx: lambda: normax.nnx.DynamicTanh(4, rngs=nnx.Rngs(0))(x, mask=x > 0),
    }
    with pytest.raises(TypeError, match="DynamicTanh: expected no mask, which dynamic_tanh does"):
        calls[library]()


def test_a_channel_without_an_entry_does_not_drop_the_prior():
    x, mask = jax.random.normal(KEY, (64, 3)), jnp.array([False, True, True])
    prior = normax.Moments(jnp.full(3, 9), jnp.zeros(3), jnp.ones(3))
    stats = normax.RunningStats.create(3)
    options = {"use_running_average": False, "prior_weight": 0.5}
    *_, whole = normax.kalman_batch_norm(x, stats, prior, **options)
    *_, part = normax.kalman_batch_norm(x, stats, prior, mask=mask, **options)
    np.testing.assert_allclose(part.var[1:], whole.var[1:], rtol=1e-6)


def test_the_norm_of_an_operator_that_began_at_zero():
    w = jnp.diag(jnp.array([3.0, 1.0]))
    linear = lambda w, u: w @ u
    state = normax.SpectralState(jnp.array([1.0, 2.0]), jnp.zeros(()))
    _, state = normax.operator_norm(linear, jnp.zeros((2, 2)), state)
    sigma, _ = normax.operator_norm(linear, w, state, n_steps=30)
    np.testing.assert_allclose(sigma, 3, rtol=1e-4)


def inputs_of_instances():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 6, 3))
    return x, normax.RunningStats.create(3)


def test_running_instance_norm_is_torch_s():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.InstanceNorm2d(3, momentum=0.1, track_running_stats=True)
    x, stats = inputs_of_instances()
    for batch in (x, x[::-1] * 2 + 1):
        y, stats = normax.running_instance_norm(
            batch, stats, use_running_average=False, momentum=0.9, unbiased=True
        )
        out = theirs(torch.from_numpy(np.array(batch.transpose(0, 3, 1, 2))))
        np.testing.assert_allclose(y.transpose(0, 3, 1, 2), out.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.mean, theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(stats.var, theirs.running_var.numpy(), rtol=1e-5)
    y, same = normax.running_instance_norm(x, stats, use_running_average=True)
    out = theirs.eval()(torch.from_numpy(np.array(x.transpose(0, 3, 1, 2))))
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), out.numpy(), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_running_instance_norm_of_all_examples_seen():
    # PyTorch takes momentum=None here, and then never moves.
    x, stats = inputs_of_instances()
    for batch in (x, x[:2] * 2 + 1):
        _, stats = normax.running_instance_norm(
            batch, stats, use_running_average=False, momentum=None
        )
    seen = np.concatenate([x, x[:2] * 2 + 1]).astype(float)
    np.testing.assert_allclose(stats.mean, seen.mean((1, 2)).mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, seen.var((1, 2)).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(stats.count, np.full(3, 6 * 30))


def test_running_instance_norm_counts_every_entry():
    x, stats = inputs_of_instances()
    mask = jax.random.bernoulli(KEY, 0.6, x.shape)
    weights = jnp.where(mask, jax.random.uniform(KEY, x.shape), 0)
    for given in (mask, weights):
        _, new = normax.running_instance_norm(
            x, stats, use_running_average=False, momentum=None, mask=given
        )
        w = np.asarray(given, float)
        mean = np.average(x, (1, 2), w)
        var = np.average((np.asarray(x) - mean[:, None, None]) ** 2, (1, 2), w)
        n = w.sum((1, 2))
        np.testing.assert_allclose(new.mean, np.average(mean, 0, n), rtol=1e-5)
        np.testing.assert_allclose(new.var, np.average(var, 0, n), rtol=1e-5)
    full = stats._replace(mean=stats.mean + 5, count=jnp.full(3, 2**31 - 3, jnp.int32))
    _, new = normax.running_instance_norm(x, full, use_running_average=False, momentum=None)
    np.testing.assert_allclose(new.mean, 5, rtol=1e-5)


def test_running_instance_norm_leaves_out_examples_with_nothing_valid():
    x, stats = inputs_of_instances()
    mask = jnp.ones((4, 5, 6, 1), bool).at[1].set(False)
    run = lambda x, mask, name=None: normax.running_instance_norm(
        x, stats, use_running_average=False, mask=mask, axis_name=name
    )[1]
    expected = run(x[jnp.asarray([0, 2, 3])], None)
    several = jax.vmap(lambda x, mask: run(x, mask, "i"), axis_name="i")(
        x.reshape(2, 2, 5, 6, 3), mask.reshape(2, 2, 5, 6, 1)
    )
    for new in (run(x, mask), jax.tree.map(lambda leaf: leaf[0], several)):
        for leaf, other in zip(new, expected, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-6)
    nothing = run(x, jnp.zeros((1, 1, 1, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, nothing, stats)


def test_domains_and_segments_of_weighted_rows_over_devices_are_those_of_all():
    x = jax.random.normal(KEY, (16, 3, 2)) + 100
    ids = jnp.arange(16) * 7 % 5  # of 4 domains, the fifth absent
    weights = jnp.arange(16.0) % 3
    scale = jnp.array([1.0, 2.0])
    stats = normax.RunningStats.create((4, 2))
    devices = lambda array: array.reshape(4, 4, *array.shape[1:])

    def domains(x, ids, weights, **options):
        return normax.domain_batch_norm(
            x, stats, ids, scale, use_running_average=False, weights=weights, **options
        )

    def energy(x, ids, weights, **options):
        y, new = domains(x, ids, weights, **options)
        return jnp.sum(jnp.sin(y)), (y, new)

    def over_devices(x, ids, weights):
        return jax.vmap(functools.partial(energy, axis_name="i"), axis_name="i")(x, ids, weights)

    _, (y, new) = energy(x, ids, weights)
    for domain in range(4):
        rows = np.asarray(ids == domain) & np.asarray(weights > 0)
        values, times = np.asarray(x, float)[rows], np.asarray(weights, float)[rows]
        mean = np.average(values.mean(1), axis=0, weights=times)
        var = np.average(((values - mean) ** 2).mean(1), axis=0, weights=times)
        np.testing.assert_allclose(new.mean[domain], 0.01 * mean, rtol=1e-5)
        expected = (values - mean) / np.sqrt(var + 1e-5) * np.asarray(scale)
        np.testing.assert_allclose(y[rows], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y[weights == 0], 0)
    args = [devices(array) for array in (x, ids, weights)]
    _, (split, state) = over_devices(*args)
    np.testing.assert_allclose(split.reshape(y.shape), y, rtol=1e-4, atol=1e-5)
    for leaf, whole in zip(state, new, strict=True):
        np.testing.assert_allclose(leaf[0], whole, rtol=1e-5)
    slope = jax.grad(lambda x: energy(x, ids, weights)[0])(x)
    parts = jax.jit(jax.grad(lambda x: over_devices(x, *args[1:])[0].sum()))(args[0])
    np.testing.assert_allclose(parts.reshape(x.shape), slope, rtol=1e-3, atol=1e-4)
    m = normax.segment_moments(x, ids, 4, weights=weights)
    pooled = jax.vmap(
        lambda x, i, w: normax.segment_moments(x, i, 4, weights=w, axis_name="i"), axis_name="i"
    )(*args)
    for leaf, whole in zip(pooled, m, strict=True):
        np.testing.assert_allclose(leaf[1], whole, rtol=1e-5)
    with pytest.raises(ValueError, match="segment_norm: expected axis_name"):
        normax.segment_norm(x, ids, 4, axis_name="nowhere")
