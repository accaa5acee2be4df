"""Bad input is refused when traced: which argument, what it was, what was expected."""

import ast
import functools
import pathlib
import re

import flax.linen
import flax.nnx
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest

import normax
import normax.axes
import normax.checks
from normax import linen, nnx
from normax.recalibrate import recalibrate
from normax.train import TrainState, eval_step, train_step

X = jnp.ones((4, 8))
IMAGE = jnp.ones((2, 3, 4))
STATS = normax.RunningStats.create(8)
U = normax.SpectralState.create(jax.random.key(0), 8)
M = normax.moments(X, 0)
LOSS = lambda model, batch, train: model(batch).sum()
ROOM = (normax.axes.__file__, normax.checks.__file__)
IDS = jnp.arange(4) % 2
SCALING = normax.standardize_features(X)
POWER = normax.PowerState.create(8)
DRIFTS = normax.overwrite_drift(optax.sgd(1.0))
BAD_STATS = STATS._replace(mean=jnp.full(8, jnp.nan))
BAD_VAR = STATS._replace(var=jnp.full(8, -1.0))
COMPLEX = jnp.ones(8, complex)
MESH = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
DEALT_OUT = jax.device_put(X, jax.NamedSharding(MESH, jax.P("rows")))


def train(x, stats=STATS, **options):
    return normax.batch_norm(x, stats, **{"use_running_average": False, **options})


def symbolic(shape, f):
    """Traces a function of sizes that are not known yet."""
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    return jax.eval_shape(f, x)


# call, exception, what the message says
BAD = [
    (lambda: normax.layer_norm(jnp.ones(3, int)), TypeError, r"layer_norm: expected x of a fl.*int32"),
    (lambda: normax.layer_norm(X.astype(jnp.float8_e4m3fn)), TypeError, r"layer_norm: expected x .* of at least 16 bits, got float8_e4m3fn; convert it first"),
    (lambda: normax.rms_norm(jnp.ones(3, bool)), TypeError, r"rms_norm: expected x .* got bool"),
    (lambda: normax.moments(jnp.ones(3, int), 0), TypeError, r"moments: expected x .* got int32"),
    (lambda: normax.weight_norm(jnp.ones(3, int)), TypeError, r"weight_norm: expected v .* got int"),
    (lambda: normax.layer_norm(X, jnp.ones(8, int)), TypeError, r"expected scale .* got int32"),
    (lambda: normax.layer_norm(X, activation="relu"), TypeError, r"layer_norm: expected activation to be a function .* got 'relu'"),
    (lambda: normax.layer_norm(X, activation=functools.partial(jnp.multiply, X)), TypeError, r"holds no arrays"),
    (lambda: linen.LayerNorm(activation=flax.linen.PReLU()).init(jax.random.key(0), X), TypeError, r"holds no arrays"),
    (lambda: normax.layer_norm(X, activation=jax.nn.glu), ValueError, r"entry by entry .* got .*glu"),
    (lambda: normax.layer_norm(X, activation=lambda x: x.astype(jnp.bfloat16)), ValueError, r"to keep the dtype, got .*bfloat16"),
    (lambda: normax.layer_norm(X, implementation="cuda"), ValueError, r"implementation to be one of \(None, 'xla', .* got 'cuda'"),
    (lambda: normax.layer_norm(IMAGE, reduction_axes=1, implementation="mosaic_tpu"), ValueError, r"implementation='mosaic_tpu' can do, got groups over axes \(1,\)"),
    (lambda: normax.layer_norm(IMAGE, reduction_axes=-5), ValueError, r"layer_norm: expected reduction_axes within \[-3, 3\) for an array of rank 3, got -5"),
    (lambda: normax.layer_norm(IMAGE, reduction_axes=3), ValueError, r"reduction_axes within .* got 3"),
    (lambda: normax.layer_norm(IMAGE, reduction_axes=(-1, 2)), ValueError, r"without repeats .* got \(-1, 2\)"),
    (lambda: normax.layer_norm(IMAGE, reduction_axes=()), ValueError, r"at least one axis in reduction_axes, got \(\)"),
    (lambda: normax.layer_norm(X, reduction_axes="last"), TypeError, r"reduction_axes to be an int .* got 'last'"),
    (lambda: normax.layer_norm(X, reduction_axes=(1.0,)), TypeError, r"reduction_axes to be an int .* got \(1.0,\)"),
    (lambda: normax.layer_norm(X, reduction_axes=None), TypeError, r"reduction_axes to be an int .* got None"),
    (lambda: normax.layer_norm(X, feature_axes=2), ValueError, r"feature_axes within .* got 2"),
    (lambda: normax.moments(X, 4), ValueError, r"moments: expected axes within .* got 4"),
    (lambda: normax.instance_norm(IMAGE, feature_axes=0), ValueError, r"instance_norm: expected feature_axes without axis 0, got \(0,\)"),
    (lambda: normax.layer_norm(X, jnp.ones(5)), ValueError, r"layer_norm: expected scale.shape == \(8,\) \(x.shape=\(4, 8\) at feature axes \(1,\)\), got \(5,\)"),
    (lambda: normax.layer_norm(X, None, jnp.ones(())), ValueError, r"expected bias.shape == \(8,\) .* got \(\)"),
    (lambda: normax.group_norm(X, jnp.ones(2), num_groups=2), ValueError, r"group_norm: expected scale.shape == \(8,\)"),
    (lambda: train(X, normax.RunningStats.create(5)), ValueError, r"batch_norm: expected stats.mean.shape == \(8,\) .* got \(5,\)"),
    (lambda: train(X, STATS._replace(var=jnp.ones(()))), ValueError, r"expected stats with leaves of one shape, got \[\(8,\), \(\), \(8,\)\]"),
    (lambda: normax.weight_norm(X, jnp.ones(4)), ValueError, r"weight_norm: expected g.shape == \(8,\)"),
    (lambda: normax.layer_norm(X, epsilon=-1e-6), ValueError, r"epsilon in \[0, inf\], got -1e-06"),
    (lambda: normax.layer_norm(X, epsilon=float("nan")), ValueError, r"epsilon in \[0, inf\], got nan"),
    (lambda: jax.jit(lambda e: normax.layer_norm(X, epsilon=e))(1.0), TypeError, r"epsilon to be a Python number"),
    (lambda: train(X, momentum=1.5), ValueError, r"batch_norm: expected momentum in \[0, 1\], got 1.5"),
    (lambda: train(X, momentum="fast"), TypeError, r"momentum to be a Python number, got 'fast'"),
    (lambda: normax.update(STATS, M, momentum=-0.1), ValueError, r"update: expected momentum in \[0, 1\], got -0.1"),
    (lambda: normax.update(STATS, normax.moments(X, 1)), ValueError, r"update: expected moments of shape \(8,\).* got \(4,\)"),
    (lambda: normax.update(STATS, normax.moments(X.astype(complex), 0)), TypeError, r"update: expected real moments .* got complex64"),
    (lambda: normax.merge(M, normax.moments(X, 1)), ValueError, r"merge: expected moments of one shape.*\(8,\) and \(4,\)"),
    (lambda: normax.l2_norm(X, mask=jnp.ones((4, 8))), TypeError, r"l2_norm: expected a boolean mask .* got float32"),
    (lambda: normax.layer_norm(X, mask=X.astype(complex)), TypeError, r"layer_norm: expected a mask of booleans .* real weights, got complex64"),
    (lambda: normax.segment_norm(X, IDS, 2, mean_scale=jnp.ones(8), num_groups=2), ValueError, r"expected either mean_scale or num_groups, got both"),
    (lambda: normax.segment_norm(X, IDS, 2, mean_scale=jnp.ones(8), centered=False), ValueError, r"either mean_scale or centered=False, got both"),
    (lambda: DRIFTS.update({"drift": X}, DRIFTS.init({"drift": X})), ValueError, r"overwrite_drift: expected params"),
    (lambda: normax.standardize(X, reduction_axes=-1, floor=-1.0), ValueError, r"standardize: expected floor in \[0, inf\], got -1"),
    (lambda: normax.spectral_norm(X, U, bound=0), ValueError, r"spectral_norm: expected bound in .* got 0"),
    (lambda: normax.exact_spectral_norm(jnp.ones(3)), ValueError, r"exact_spectral_norm: expected w of rank 2 or more, got shape \(3,\)"),
    (lambda: normax.condition_number(jnp.ones((4, 0))), ValueError, r"condition_number: expected a feature in x, got none"),
    (lambda: normax.adaptive_instance_norm(X, X), ValueError, r"at least one axis in the axes between batch and features"),
    (lambda: normax.power_norm(X, POWER, use_running_average=False, momentum=None), TypeError, r"power_norm: expected a momentum, got None"),
    (lambda: jax.jit(lambda a: normax.power_norm(X, POWER, use_running_average=False, drift_momentum=a))(0.9), TypeError, r"power_norm: expected drift_momentum to be a Python number, got .*Tracer"),
    (lambda: normax.momentum_per_entry(None, M, reference=4), TypeError, r"momentum_per_entry: expected a momentum, got None"),
    (lambda: normax.divisive_norm(X, window=3), TypeError, r"divisive_norm: expected window to be several ints, got 3"),
    (lambda: normax.kalman_batch_norm(X, STATS, M, use_running_average=False, largest_ratio=None), TypeError, r"expected largest_ratio to be a Python number, got None"),
    (lambda: normax.segment_norm(X, IDS, 2, num_groups=3), ValueError, r"segment_norm: expected num_groups to divide 8 features, got 3"),
    (lambda: normax.layer_norm(X, mask=jnp.ones((3, 8), bool)), ValueError, r"mask that broadcasts to x.shape=\(4, 8\), got shape \(3, 8\)"),
    (lambda: normax.layer_norm(X, mask=jnp.ones((1, 4, 8), bool)), ValueError, r"got shape \(1, 4, 8\)"),
    (lambda: train(X, use_running_average=1), TypeError, r"use_running_average to be True or False, got 1"),
    (lambda: jax.jit(lambda t: train(X, use_running_average=t))(True), TypeError, r"static argument of jit"),
    (lambda: train(X[:1]), ValueError, r"batch_norm: expected more than one value per feature .* x.shape=\(1, 8\)"),
    (lambda: normax.group_norm(X, num_groups=3), ValueError, r"group_norm: expected num_groups to divide 8 features, got 3"),
    (lambda: normax.group_norm(X, num_groups=0), ValueError, r"num_groups to divide 8 features, got 0"),
    (lambda: normax.group_norm(X, group_size=5), ValueError, r"group_size to divide 8 features, got 5"),
    (lambda: normax.group_norm(X), ValueError, r"either num_groups or group_size, got num_groups=None"),
    (lambda: normax.group_norm(X, num_groups=2, group_size=4), ValueError, r"either num_groups or group_size"),
    (lambda: normax.group_norm(X, num_groups=2.0), TypeError, r"num_groups to be an int, got 2.0"),
    (lambda: normax.group_norm(IMAGE, num_groups=2, feature_axes=(1, 2)), ValueError, r"one axis in feature_axes, got \(1, 2\)"),
    (lambda: normax.group_norm(IMAGE, num_groups=2, reduction_axes=(0, 1)), ValueError, r"reduction_axes to include the feature axis 2"),
    (lambda: normax.group_norm(X, num_groups=2, feature_axes=0), ValueError, r"without axis 0"),
    (lambda: normax.spectral_norm(jnp.ones(8), U), ValueError, r"spectral_norm: expected w of rank 2 or more, got shape \(8,\)"),
    (lambda: normax.spectral_norm(X.T, U), ValueError, r"state.u.shape == \(1, 4\) .* got \(1, 8\)"),
    (lambda: normax.spectral_norm(X, U, n_steps=0), ValueError, r"n_steps to be an int of at least 1, got 0"),
    (lambda: train(X, axis_name="nowhere"), ValueError, r"batch_norm: expected axis_name='nowhere' to be an axis"),
    (lambda: jax.vmap(lambda x: train(x, axis_name="i", axis_index_groups=[[0], [0]]), axis_name="i")(jnp.ones((2, 4, 8))), ValueError, r"axis_index_groups to hold each of 0 to 1 once"),
    (lambda: linen.SpectralNorm(flax.linen.DenseGeneral((2, 2)), error_on_non_matrix=True).init(jax.random.key(0), X, update_stats=False), ValueError, r"weights of rank 2, got shape \(8, 2, 2\)"),
    (lambda: train(X, {"mean": X[0], "var": X[0]}), TypeError, r"batch_norm: expected stats to be a normax.RunningStats\(mean, var, count\), got dict"),
    (lambda: train(X, None), TypeError, r"expected stats to be a normax.RunningStats.* got NoneType"),
    (lambda: normax.update(STATS, STATS), TypeError, r"update: expected m to be a normax.Moments\(count, mean, var\), got RunningStats"),
    (lambda: normax.update(STATS, M._replace(var=X)), ValueError, r"update: expected m with leaves of one shape, got \[\(8,\), \(8,\), \(4, 8\)\]"),
    (lambda: normax.merge(M, (1, 2, 3)), TypeError, r"merge: expected b to be a normax.Moments.* got tuple"),
    (lambda: train(X, momentum=3.0, use_running_average=True), ValueError, r"momentum in \[0, 1\], got 3.0"),
    (lambda: normax.layer_norm(X, axis_index_groups=[[0, 1]]), ValueError, r"layer_norm: expected an axis_name with axis_index_groups=\[\[0, 1\]\], got None"),
    (lambda: normax.layer_norm(X, dtype=jnp.int32), TypeError, r"layer_norm: expected dtype to be floating-point or complex, got int32"),
    (lambda: normax.layer_norm(X, X[0].astype(complex)), TypeError, r"layer_norm: expected a complex dtype for the output, scale being complex64, got float32"),
    (lambda: train(X.astype(complex), STATS, use_running_average=True, dtype=jnp.float32), TypeError, r"batch_norm: .* x being complex64, got float32"),
    (lambda: train(X, normax.RunningStats.create(8, complex), use_running_average=True), TypeError, r"batch_norm: .* stats being complex64, got float32"),
    (lambda: normax.spectral_norm(X.astype(complex), U), TypeError, r"spectral_norm: expected w of a real dtype, got complex64"),
    (lambda: linen.BatchNorm(use_running_average=False, momentum=None).apply({"batch_stats": {"mean": X[0], "var": X[0]}, "params": {"scale": X[0], "bias": X[0]}}, X, mutable=["batch_stats"]), ValueError, r"BatchNorm: expected batch_stats with \('mean', 'var', 'count'\), got only \('mean', 'var'\)"),
    (lambda: normax.update(STATS, M, nonfinite="drop"), ValueError, r"update: expected nonfinite to be one of \('skip', 'keep'\), got 'drop'"),
    (lambda: normax.validate({"mean": X, "m": X}, {"mean": X, "var": X}), ValueError, r"validate: expected state .* missing are \['var'\], unknown are \['m'\]"),
    (lambda: normax.validate({"bn": {"mean": X}}, {"bn": {"mean": X[0]}}), ValueError, r"validate: expected bn/mean of shape \(8,\), got \(4, 8\)"),
    (lambda: normax.validate({"s": STATS._asdict()}, {"s": STATS}), TypeError, r"validate: expected state of the structure PyTreeDef.*RunningStats.*, got PyTreeDef"),
    (lambda: normax.debias(STATS, STATS, -1.0), ValueError, r"debias: expected past_weight in \[0, 1\], got -1.0"),
    (lambda: recalibrate(lambda v, x: linen.BatchNorm(False).apply(v, x, mutable=["batch_stats"]), linen.BatchNorm(False).init(jax.random.key(0), X), [X]), TypeError, r"recalibrate: expected what apply returns to be the updated collections, .* got tuple"),
    (lambda: recalibrate(None, {}, []), ValueError, r"recalibrate: expected variables with running statistics, got none"),
    (lambda: normax.validate(STATS, STATS._replace(count=STATS.mean)), TypeError, r"validate: expected count of dtype float32, got int32"),
    (lambda: normax.validate(BAD_STATS, STATS), ValueError, r"validate: expected finite mean, got 8 values that are not"),
    (lambda: normax.validate(BAD_VAR, STATS), ValueError, r"validate: expected var of at least 0, got -1.0"),
    (lambda: normax.weight_norm(X, X[0].astype(complex)), TypeError, r"weight_norm: expected a complex dtype for the output, g being complex64, got float32"),
    (lambda: normax.layer_norm("text"), TypeError, r"layer_norm: expected x to be an array, got 'text'"),
    (lambda: normax.layer_norm([[1.0], [1.0, 2.0]]), TypeError, r"layer_norm: expected x to be an array, got \[\["),
    (lambda: normax.rms_norm(X, scale_offset=jnp.ones(8)), ValueError, r"rms_norm: expected scale_offset to be one number, got shape \(8,\)"),
    (lambda: normax.rms_norm(X, scale_offset=COMPLEX[0]), TypeError, r"rms_norm: expected scale_offset of a real dtype, got complex64"),
    (lambda: normax.update(STATS, normax.moments(X, 0), COMPLEX[0]), TypeError, r"update: expected momentum of a real dtype"),
    (lambda: normax.filter_response_norm(X, threshold=COMPLEX), TypeError, r"filter_response_norm: expected threshold of a real dtype"),
    (lambda: normax.filter_response_norm(IMAGE, learned_epsilon=COMPLEX[:IMAGE.shape[-1]]), TypeError, r"filter_response_norm: expected learned_epsilon of a real dtype"),
    (lambda: normax.segment_norm(X, jnp.zeros(4, int), 1, mean_scale=COMPLEX), TypeError, r"segment_norm: expected mean_scale of a real dtype"),
    (lambda: normax.switchable_norm(X, STATS, COMPLEX[:2], COMPLEX[:2], use_running_average=False), TypeError, r"switchable_norm: expected mean_weights of a real dtype"),
    (lambda: normax.dynamic_tanh(X, COMPLEX[0]), TypeError, r"dynamic_tanh: expected alpha of a real dtype"),
    (lambda: normax.RunningStats.create(8, "foo"), TypeError, r"RunningStats.create: expected dtype to be one, such as jnp.float32, got 'foo'"),
    (lambda: normax.PowerState.create(8, "foo"), TypeError, r"PowerState.create: expected dtype to be one, such as jnp.float32, got 'foo'"),
    (lambda: normax.SpectralState.create(jax.random.key(0), 8, "foo"), TypeError, r"SpectralState.create: expected dtype to be one, such as jnp.float32, got 'foo'"),
    (lambda: normax.evonorm_b0(IMAGE, normax.RunningStats.create(IMAGE.shape[-1], complex), use_running_average=False), TypeError, r"evonorm_b0: expected stats of a real dtype"),
    (lambda: normax.kalman_batch_norm(X, STATS, normax.Moments(STATS.count, COMPLEX, STATS.var), use_running_average=False), TypeError, r"kalman_batch_norm: expected prior of a real dtype"),
    (lambda: normax.kalman_prior(normax.Moments(STATS.count, COMPLEX, STATS.var), lambda x: x, jax.random.key(0), shape=(4, 8)), TypeError, r"kalman_prior: expected posterior of a real dtype"),
    (lambda: normax.kalman_prior(normax.Moments(STATS.count, STATS.count, STATS.count), lambda x: x, jax.random.key(0), shape=(4, 8)), TypeError, r"kalman_prior: expected posterior.mean of a fl"),
    (lambda: normax.power_norm(X, normax.PowerState(STATS.var, COMPLEX), use_running_average=False), TypeError, r"power_norm: expected state of a real dtype"),
    (lambda: normax.adaln_zero(X, lambda x: x.astype(complex), X, X, X), TypeError, r"adaln_zero: expected block\(x\) of a real dtype"),
    (lambda: normax.layer_norm(X, dtype="bf16"), TypeError, r"layer_norm: expected dtype to be one, such as jnp.float32, got 'bf16'"),
    (lambda: linen.LayerNorm(dtype="bf16").init(jax.random.key(0), X), TypeError, r"LayerNorm: expected dtype to be one, .* got 'bf16'"),
    (lambda: train_step(LOSS, dtype="foo"), TypeError, r"train_step: expected dtype to be one, .* got 'foo'"),
    (lambda: train_step(LOSS, dtype=jnp.int32), TypeError, r"train_step: expected dtype to be floating-point or None, got int32"),
    (lambda: train_step(LOSS, loss_scale=0.0), ValueError, r"train_step: expected loss_scale in .* got 0.0"),
    (lambda: eval_step(LOSS, dtype=complex), TypeError, r"eval_step: expected dtype to be floating-point or None, got complex128"),
    (lambda: TrainState.create(flax.linen.Dense(1), optax.sgd(1.0), jax.random.key(0), X, rngs="noise"), TypeError, r"TrainState.create: expected rngs to be a tuple of strings, got 'noise'"),
    (lambda: normax.batch_renorm(X, STATS, use_running_average=False, momentum=None), TypeError, r"batch_renorm: expected a momentum, got None"),
    (lambda: normax.batch_renorm(X, STATS, use_running_average=False, r_max=0.5), ValueError, r"batch_renorm: expected r_max in \[1, inf\], got 0.5"),
    (lambda: normax.ghost_batch_norm(X, STATS, use_running_average=False, ghost_size=0), ValueError, r"ghost_batch_norm: expected ghost_size to be at least 1, got 0"),
    (lambda: normax.ghost_batch_norm(X, STATS, use_running_average=False, ghost_size=2.0), TypeError, r"ghost_size to be an int, got 2.0"),
    (lambda: normax.ghost_batch_norm(X, STATS, use_running_average=False, ghost_size=1), ValueError, r"ghost_batch_norm: expected more than one value per feature"),
    (lambda: symbolic("b, 8", lambda x: normax.ghost_batch_norm(x, STATS, use_running_average=False, ghost_size=2)), ValueError, r"ghost_batch_norm: expected ghost_size to divide a symbolic batch, such as 2\*b, got 2 for b examples"),
    (lambda: symbolic("4, n", normax.l2_norm), ValueError, r"l2_norm: expected reduction_axes of known sizes, got \(1,\) of \(4, n\)"),
    (lambda: jax.vmap(lambda x: normax.ghost_batch_norm(x, STATS, use_running_average=False, ghost_size=3, axis_name="i"), axis_name="i")(jnp.ones((2, 4, 8))), ValueError, r"ghost_size to divide the 4 examples of a device, or .* 2 devices, got 3"),
    (lambda: normax.kalman_batch_norm(X, STATS, M, use_running_average=False, prior_weight=2.0), ValueError, r"kalman_batch_norm: expected prior_weight in \[0, 1\], got 2.0"),
    (lambda: normax.switchable_norm(X, STATS, jnp.ones(3), jnp.ones(3), use_running_average=False), ValueError, r"switchable_norm: expected mean_weights.shape == \(2,\), got \(3,\)"),
    (lambda: normax.segment_norm(X, IDS.astype(float), 2), TypeError, r"segment_norm: expected segment_ids to be ints, got float32"),
    (lambda: normax.segment_norm(X, IDS[:3], 2), ValueError, r"segment_norm: expected segment_ids.shape == \(4,\), got \(3,\)"),
    (lambda: normax.domain_batch_norm(X, STATS, IDS, use_running_average=False), ValueError, r"domain_batch_norm: expected stats.mean of rank 2 or more, got shape \(8,\)"),
    (lambda: normax.evonorm_b0(X, STATS, use_running_average=False), ValueError, r"evonorm_b0: expected at least one axis in the axes between batch and features, got \(\)"),
    (lambda: normax.divisive_norm(X, window=(3, 3)), ValueError, r"divisive_norm: expected window.shape == \(1,\), got \(2,\)"),
    (lambda: normax.adaptive_instance_norm(IMAGE, jnp.ones((2, 5, 3))), ValueError, r"adaptive_instance_norm: expected style.shape == \(2, -1, 4\), got \(2, -1, 3\)"),
    (lambda: normax.adaln_zero(X, lambda y: y[:, :2], X, X, X), ValueError, r"adaln_zero: expected block\(x\).shape == \(4, 8\), got \(4, 2\)"),
    (lambda: normax.filter_response_norm(X.astype(complex)), TypeError, r"filter_response_norm: expected x of a real dtype, got complex64"),
    (lambda: normax.local_response_norm(X, k=0.0), ValueError, r"local_response_norm: expected k in"),
    (lambda: normax.local_response_norm(X, alpha=-1.0), ValueError, r"local_response_norm: expected alpha in"),
    (lambda: normax.local_response_norm(X, beta="b"), TypeError, r"local_response_norm: expected beta .* got 'b'"),
    (lambda: normax.rms_norm(X, jnp.ones(8), scale_offset=None), TypeError, r"rms_norm: expected scale_offset .* got None"),
    (lambda: normax.film(X, jnp.ones((4, 8)), None, scale_offset="1"), TypeError, r"film: expected scale_offset .* got '1'"),
    (lambda: normax.operator_norm(lambda w, u: w * u, X, X), TypeError, r"operator_norm: expected state to be a normax.SpectralState"),
    (lambda: normax.spectral_norm(X, None), TypeError, r"spectral_norm: expected state to be a normax.SpectralState"),
    (lambda: linen.LayerNorm().init(jax.random.key(0), X, gamma=jnp.ones(8)), TypeError, r"LayerNorm: expected a call to give of scale, bias, got gamma"),
    (lambda: nnx.RMSNorm(8, rngs=flax.nnx.Rngs(0))(X, bias=jnp.ones(8)), TypeError, r"RMSNorm: expected a call to give of scale, got bias"),
    (lambda: linen.LayerNorm().init(jax.random.key(0), X, scale=jnp.ones(3)), ValueError, r"layer_norm: expected scale.shape == \(8,\)"),
    (lambda: normax.transform_weights(X, normax.weight_norm), ValueError, r"transform_weights: expected where to choose a weight"),
    (lambda: train(X, epsilon_on="root"), ValueError, r"batch_norm: expected epsilon_on to be one of \('variance', 'deviation'\), got 'root'"),
    (lambda: linen.DynamicTanh().init(jax.random.key(0), X, mask=X > 0), TypeError, r"DynamicTanh: expected no mask, which dynamic_tanh does not take"),
    (lambda: nnx.GroupNorm(8, 3, rngs=flax.nnx.Rngs(0)), ValueError, r"GroupNorm: expected num_groups to divide"),
    (lambda: normax.standardize_features(jnp.ones(3, int)), TypeError, r"standardize_features: expected x_or_moments of a fl.* got int32"),
    (lambda: normax.standardize_features(X, feature_axes=2), ValueError, r"standardize_features: expected feature_axes within .* got 2"),
    (lambda: normax.min_max_features(X, mask=X), TypeError, r"min_max_features: expected a boolean mask"),
    (lambda: normax.standardize_features(STATS), TypeError, r"standardize_features: expected x_or_moments to be a normax.Moments\(count, mean, var\), got RunningStats"),
    (lambda: normax.standardize_features(normax.extremes(X, 0)), TypeError, r"x_or_moments to be a normax.Moments.* got Extremes"),
    (lambda: normax.standardize_features(M, mask=X > 0), ValueError, r"standardize_features: expected a mask with an array only, got one with x_or_moments"),
    (lambda: normax.min_max_features(M), TypeError, r"min_max_features: expected x_or_extremes to be a normax.Extremes\(low, high\), got Moments"),
    (lambda: normax.min_max_features(normax.extremes(X, 0), mask=X > 0), ValueError, r"min_max_features: expected a mask with an array only"),
    (lambda: normax.min_max_features(jnp.ones(3, int)), TypeError, r"min_max_features: expected x_or_extremes of a fl.* got int32"),
    (lambda: normax.min_max_features(X.astype(complex)), TypeError, r"min_max_features: expected x_or_extremes of a real dtype, got complex64"),
    (lambda: normax.min_max_features(X, feature_range=(1, 0)), ValueError, r"min_max_features: expected feature_range to ascend within .* got \(1, 0\)"),
    (lambda: normax.min_max_features(X, feature_range=(0, 0.0)), ValueError, r"feature_range to ascend within .* got \(0, 0.0\)"),
    (lambda: normax.min_max_features(X, feature_range=(0, jnp.inf)), ValueError, r"feature_range to ascend within .* got \(0, inf\)"),
    (lambda: normax.min_max_features(X, feature_range=(0, 1, 2)), TypeError, r"min_max_features: expected feature_range to be two numbers, got \(0, 1, 2\)"),
    (lambda: jax.jit(lambda a: normax.min_max_features(X, feature_range=(a, 1)))(0.0), TypeError, r"feature_range to be two numbers"),
    (lambda: normax.robust_features(X, quantile_range=(25.0, 101.0)), ValueError, r"robust_features: expected quantile_range to ascend within \[0, 100\], got \(25.0, 101.0\)"),
    (lambda: normax.robust_features(X, quantile_range=50), TypeError, r"robust_features: expected quantile_range to be two numbers, got 50"),
    (lambda: normax.robust_features(X.astype(complex)), TypeError, r"robust_features: expected x of a real dtype, got complex64"),
    (lambda: normax.robust_features(M), TypeError, r"robust_features: expected x to be one array, as quantiles .* got Moments"),
    (lambda: normax.extremes(jnp.ones(3, bool), 0), TypeError, r"extremes: expected x of a fl.* got bool"),
    (lambda: normax.extremes(X, ()), ValueError, r"extremes: expected at least one axis in axes"),
    (lambda: normax.merge_extremes(normax.extremes(X, 0), M), TypeError, r"merge_extremes: expected b to be a normax.Extremes.* got Moments"),
    (lambda: normax.merge_extremes(normax.extremes(X, 0), normax.extremes(X, 1)), ValueError, r"merge_extremes: expected extremes of one shape, got \(8,\) and \(4,\)"),
    (lambda: normax.transform_features(jnp.ones(8, int), SCALING), TypeError, r"transform_features: expected x of a fl.* got int32"),
    (lambda: normax.transform_features(X.T, SCALING), ValueError, r"transform_features: expected scaling.offset.shape == \(4,\) .* got \(8,\)"),
    (lambda: normax.transform_features(X, normax.FeatureScaling(0.0, 1.0)), ValueError, r"expected scaling.offset.shape == \(8,\) .* got \(\)"),
    (lambda: normax.transform_features(X, SCALING._replace(factor=1.0)), ValueError, r"transform_features: expected scaling with leaves of one shape"),
    (lambda: normax.transform_features(X, (0.0, 1.0)), TypeError, r"transform_features: expected scaling to be a normax.FeatureScaling\(offset, factor\), got tuple"),
    (lambda: normax.transform_features(X, SCALING._replace(offset=X[0].astype(complex))), TypeError, r"transform_features: expected a complex dtype for the output, scaling being complex64, got float32"),
    (lambda: normax.inverse_features(jnp.ones(8, int), SCALING), TypeError, r"inverse_features: expected y of a fl.* got int32"),
    (lambda: normax.inverse_features(X, SCALING, feature_axes=0), ValueError, r"inverse_features: expected scaling.offset.shape == \(4,\)"),
    (lambda: normax.inverse_features(X, SCALING, mask=X[:3] > 0), ValueError, r"inverse_features: expected a mask that broadcasts"),
    (lambda: normax.segment_norm(DEALT_OUT, IDS, num_segments=2), ValueError, r"segment_norm: expected x with rows that are not dealt out along explicit mesh axes, got P\('rows'"),
    (lambda: jax.jit(lambda m: normax.axes.check_known("train_step", "the momentum of norm", m))(0.9), TypeError, r"train_step: expected the momentum of norm to be known before the model is called"),
    (lambda: normax.condition_number(jnp.ones((3, 3), int)), TypeError, r"condition_number: expected x of a fl.* got int32"),
    (lambda: normax.condition_number(X, feature_axes=(1, -1)), ValueError, r"condition_number: expected feature_axes without repeats"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "exception", "message"), BAD, ids=range(len(BAD)))
def test_bad_calls(call, exception, message):
    with pytest.raises(exception, match=message):
        call()
    # Raised while tracing, too.
    with pytest.raises(exception, match=message):
        jax.eval_shape(call)


def test_every_message_of_the_room_is_in_the_table():
    said = set()
    for call, exception, _ in BAD:
        try:
            call()
        except exception as error:
            last = error.__traceback__
            while last.tb_next:
                last = last.tb_next
            frame = last.tb_frame
            if frame.f_code.co_filename in ROOM:
                said.add(frame.f_code.co_name)
    raising = {
        function.name
        for path in ROOM
        for function in ast.walk(ast.parse(pathlib.Path(path).read_text()))
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Raise) for node in ast.walk(function))
    }
    assert said == raising


def test_raises_only_where_checks_belong():
    folder = pathlib.Path(normax.axes.__file__).parent
    allowed = {"axes.py": 99, "checks.py": 99, "moments.py": 3, "regularize.py": 1, "trees.py": 2}
    allowed |= {"order.py": 4, "features.py": 2, "implementations.py": 1}
    allowed |= {"microbatch.py": 1, "checkpoint.py": 12, "merging.py": 1}  # of batches and files
    for path in folder.glob("*.py"):
        if path.name not in ("train.py", "bind.py"):
            number = len(re.findall(r"^\s+raise ", path.read_text(), re.MULTILINE))
            assert number <= allowed.get(path.name, 0), path.name
