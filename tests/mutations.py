"""Break normax in many small ways, one at a time: some test must fail for each.

    python tests/mutations.py            # all, two at a time
    python tests/mutations.py momentum   # those whose name has the word
    python tests/mutations.py 2/3        # every third, from the second on

Ends with the share that was noticed, and with status 1 if any was not. Each is shown to the tests
named with it, which pass where nothing is broken: that is what the test run says, and for the first
of them it is checked here, so that an environment without JAX does not pass for a sharp eye.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import warnings
from typing import NamedTuple

import conftest
import flax.linen
import flax.nnx
import pytest
import scipy.stats

ROOT = pathlib.Path(__file__).parents[1]
# What takes seconds to import, and normax does not change: the processes of the mutations have it.
IMPORTED = (conftest, flax.linen, flax.nnx, scipy.stats)
WORKERS = 2


class Mutation(NamedTuple):
    """One change: in a file, from one text to another; tests are what pytest is to run."""

    name: str
    file: str
    old: str
    new: str
    tests: str


STATE = "test_state.py test_moments.py"
MASKS = "test_masks.py -k layer or batch_2d or state"
ACCURACY = "test_accuracy.py -k grid-1e+06 or (test_grid and scale3 and float32 and 64)"
VALUES = "test_derivatives.py -k test_values and (layer or batch_2d or rms)"
SYNC = "test_sync.py -k vmap or test_shard_map"
ERRORS = "test_errors.py test_properties.py -k test_bad_calls or illegal"
RANGE = "test_range.py -k every_size or subnormal or unit or moments"
FEATURES = "test_features.py -k every_size or sample_variance or come_out or few_rows or income or missing_values or any_size or further_apart or smaller_than"

MUTATIONS = [
    # The measurement.
    Mutation("unbiased for biased variance", "forms.py", "mask))) / n", "mask))) / jnp.maximum(n - 1, 1)", ACCURACY),
    Mutation("no second centring", "forms.py", "rest = settled(over(total(subtract(entries, mean, None, mask)), n))", "rest = jnp.zeros_like(mean)", ACCURACY),
    Mutation("the rest added, not subtracted", "entries.py", "(x - mean) - rest", "(x - mean) + rest", ACCURACY),
    Mutation("the fast variance", "forms.py", "total(square(subtract(entries, mean, rest, mask))) / n", "total(square(entries)) / n - (0 if mean is None else square(mean))", ACCURACY),
    Mutation("mask ignored in the mean", "entries.py", "return x if mask is None else jnp.where(there(mask), x, 0)", "return x", MASKS),
    Mutation("mask ignored in the deviations", "entries.py", "return d if mask is None else jnp.where(there(mask), d, 0)", "return d", MASKS),
    Mutation("masked entries counted", "parts.py", "n = at_least_one(size if count is None else _number(*count), x)", "n = at_least_one(size, x)", MASKS),
    Mutation("a mask's repeats not counted", "entries.py", "keepdims=True) * repeats", "keepdims=True)", "test_masks.py -k counts or broadcasts"),
    Mutation("no guard against a count of zero", "entries.py", "return jnp.where(count > 0, count, 1)", "return count", "test_masks.py -k nothing"),
    Mutation("counts wrap around", "measure.py", "full = high * DIGIT >= 2.0**31", "full = high * DIGIT < 0", "test_moments.py -k count"),
    Mutation("complex squares", "entries.py", "return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)", "return jnp.real(a) * jnp.real(b)", "test_laws.py -k complex"),
    Mutation("the variance's tangent halved", "measure.py", "units.divide(2 * along, measured.unit)", "units.divide(along, measured.unit)", "test_derivatives.py -k moments"),
    Mutation("the mean has no tangent", "measure.py", "mean = None if dmean is None else units.divide(dmean, measured.unit)", "mean = zeros.mean", "test_derivatives.py -k moments"),
    Mutation("mask ignored in the backward pass of moments", "measure.py", "jnp.zeros_like(d) if t is None else present(t, mask)", "jnp.zeros_like(d) if t is None else t", "test_derivatives.py -k moments"),
    Mutation("rounding passes for a rest", "forms.py", "jnp.where(jnp.abs(lacking) <= size, 0, lacking)", "lacking", "test_accuracy.py -k constant_rows"),
    Mutation("the rest forgotten", "forms.py", "return unit, mean, rest, total(", "return unit, mean, mean if mean is None else 0 * mean, total(", ACCURACY),
    Mutation("one sum over separate axes", "sums.py", "x, length = _over(jnp.sum(x, run, keepdims=True), _near(size)), length * _near(size)", "x, length = jnp.sum(x, run, keepdims=True), length * _near(size)", "test_moments.py -k numpy"),
    # Units.
    Mutation("squares may overflow", "forms.py", "needed = (tiny & (unit < 2.0**-10)) | wild", "needed = tiny & (unit < 2.0**-10)", RANGE),
    Mutation("squares may vanish", "forms.py", "needed = (tiny & (unit < 2.0**-10)) | wild", "needed = wild", RANGE),
    Mutation("subnormal entries are zero", "forms.py", "entries = units.divide_exactly(", "entries = units.divide(", RANGE),
    Mutation("subnormal entries are zero in the output", "standardize.py", "standardized(plan, x, measured, mask, units.divide_exactly)", "standardized(plan, x, measured, mask)", RANGE),
    Mutation("a unit that is no power of two", "units.py", "_float(peak & _bits(jnp.asarray(jnp.inf, info.dtype)), info.dtype)", "_float(peak, info.dtype)", RANGE),
    Mutation("the unit of zeros", "units.py", "jnp.where(peak == 0, 1,", "jnp.where(peak < 0, 1,", RANGE),
    Mutation("epsilon is not in units", "rescale.py", "per_unit = 1 if measured.unit is None else 1 / measured.unit", "per_unit = 1", RANGE),
    Mutation("the gradient is not in units", "gradient.py", "dx = (t - xhat * along) * units.divide(rstd, measured.unit)", "dx = (t - xhat * along) * rstd", RANGE),
    Mutation("devices in units of their own", "parts.py", "ratio = unit / common", "ratio = jnp.ones_like(unit)", "test_range.py -k devices"),
    # Standardizing.
    Mutation("epsilon outside the root", "rescale.py", "reciprocal_root(jnp.where(below, 1, squared))", "1 / (jnp.sqrt(jnp.where(below, 1, squared - epsilon)) + epsilon)", VALUES),
    Mutation("no floor", "rescale.py", "(squared <= floor)", "(squared <= 0)", "test_weights.py"),
    Mutation("a division by zero", "rescale.py", "jnp.where(below, 0, reciprocal_root(jnp.where(below, 1, squared)))", "reciprocal_root(squared)", "test_weights.py test_range.py -k zero or all_sizes"),
    Mutation("no projection off xhat", "standardize.py", "pt - me.times(xhat, along)", "pt", VALUES),
    Mutation("no projection off the mean", "standardize.py", "pt = me.subtract(t, dmean, None, mask)", "pt = t", VALUES),
    Mutation("the projection twice", "standardize.py", "pt - me.times(xhat, along)", "pt - 2 * me.times(xhat, along)", VALUES),
    Mutation("mask ignored in the backward pass", "standardize.py", "jnp.zeros_like(xhat) if dx is None else me.present(dx, mask)", "jnp.zeros_like(xhat) if dx is None else me.present(dx, None)", MASKS),
    Mutation("the scale forgotten in the backward pass", "rescale.py", "terms.append(dxhat if scale is None else jnp.multiply(*alike(dxhat, scale)))", "terms.append(dxhat)", VALUES),
    Mutation("the gradient of the scale forgotten", "rescale.py", "terms.append(jnp.multiply(*alike(xhat, dscale)))", "terms.append(0 * jnp.multiply(*alike(xhat, dscale)))", VALUES),
    Mutation("bias before scale", "rescale.py", "xhat = jnp.add(*alike(xhat, bias))", "xhat = jnp.add(*alike(xhat, bias if scale is None else bias * scale))", VALUES),
    Mutation("rounded twice", "standardize.py", "rescale(xhat, scale, bias, plan.activation).astype(plan.dtype)", "rescale(xhat.astype(plan.dtype), scale, bias, plan.activation).astype(plan.dtype)", "test_laws.py -k rounded"),
    Mutation("the output in float32", "standardize.py", "rescale(xhat, scale, bias, plan.activation).astype(plan.dtype)", "rescale(xhat, scale, bias, plan.activation)", "test_laws.py -k rounded"),
    Mutation("mask ignored at inference", "standardize.py", "d = me.subtract(x, mean, None, mask)", "d = x - mean", "test_masks.py -k inference"),
    # The backward pass by hand, and the forms for other platforms.
    Mutation("by hand: no projection off xhat", "gradient.py", "dx = (t - xhat * along)", "dx = t", VALUES),
    Mutation("by hand: no projection off the mean", "gradient.py", "t = dy - ones if plan.reduction.centered else dy", "t = dy", VALUES),
    Mutation("by hand: the scale forgotten", "gradient.py", "ones, along = (jnp.multiply(*alike(v, scale)) for v in (ones, along))", "pass", VALUES),
    Mutation("by hand: a gradient of the scale over too few", "gradient.py", "of_parameters = [total(along, others), total(ones, others)]", "of_parameters = [along, total(ones, others)]", VALUES),
    Mutation("few arrays: uncentred as if centred", "gradient.py", "shift = entries * along + ones if plan.reduction.centered else entries * along", "shift = entries * along + ones", "test_forms.py -k 16_bits and tpu"),
    Mutation("few arrays: of narrow entries the mean forgotten", "gradient.py", "ones = ones - along * (measured.mean / size)", "pass", "test_range.py -k other_platforms and tpu and bfloat16"),
    Mutation("few arrays: narrow entries not brought to a size", "gradient.py", "size = units.choose(size, (), 0.0)", "size = jnp.ones_like(measured.var)", "test_range.py -k other_platforms and tpu and bfloat16"),
    Mutation("few arrays: found twice, what the mean lacks forgotten", "gradient.py", "ones = ones if measured.rest is None else ones - along * measured.rest", "pass", "test_forms.py -k 16_bits and tpu"),
    Mutation("few arrays: deviations not brought to a size", "gradient.py", "size = units.choose(1 / reciprocal_per_unit(plan, measured), (), 0.0) / 4", "size = jnp.ones_like(measured.var)", "test_range.py -k activation_on_other and tpu"),
    Mutation("few arrays: a unit of the deviation that is subnormal", "gradient.py", "size = jnp.maximum(size, units.divide(4 * jnp.finfo(size.dtype).tiny, measured.unit))", "pass", "test_range.py -k small_deviations"),
    Mutation("squares out of range are not missed", "sums.py", " & jnp.isfinite(squares))", ")", "test_range.py -k other_platforms and tpu and layer"),
    Mutation("a mean square that is out of range", "sums.py", "jnp.where(is_right, squares, further)", "squares", "test_range.py -k other_platforms and tpu and rms"),
    Mutation("short rows: large ones in no unit", "forms.py", "unit = jnp.where(measured[-1] > 2.0**60, 2.0**76, jnp.ones_like(measured[-1]))", "unit = jnp.ones_like(measured[-1])", "test_range.py -k other_platforms and tpu and layer"),
    Mutation("short rows: what the mean lacks forgotten", "forms.py", "rest = jnp.zeros_like(mean)\n    return None, unit, mean, rest", "pass\n    return None, unit, mean, jnp.zeros_like(mean)", "test_forms.py -k grid and 64 and tpu"),
    Mutation("by hand: forwards no projection", "gradient.py", "t = t - xhat * (total(xhat * t, plan.reduction.axes) / n)", "pass", VALUES),
    Mutation("by hand: the activation's slope at the wrong place", "rescale.py", "slope = slope if scale is None else jnp.multiply(*alike(slope, scale))", "pass", "test_forms.py -k activation"),
    Mutation("rows in two reads: no projection off xhat", "gradient.py", "t - xhat * (along / n)", "t", "test_forms.py -k 16_bits and cuda"),
    Mutation("rows in two reads: no projection off the mean", "gradient.py", "t = t - ones / n if plan.reduction.centered else t", "pass", "test_forms.py -k 16_bits and cuda"),
    Mutation("rows: one centring", "rows.py", "for _ in range(2):", "for _ in range(1):", "test_forms.py -k cuda and (grid or stress)"),
    Mutation("rows: what rounding leaves of equal entries", "rows.py", "nothing = 4 * jnp.finfo(d.dtype).eps ** 2", "nothing = 0.0", "test_forms.py -k cuda and constant"),
    Mutation("rows: no unit", "rows.py", "return jnp.maximum(power * (1 / largest), 1)", "return jnp.ones_like(power)", "test_range.py -k cuda"),
    Mutation("rows: equal entries in a unit", "rows.py", "jnp.where(equal, 1, 1 / unit)", "1 / unit", "test_forms.py -k cuda and constant"),
    Mutation("parts: none", "gradient.py", "functools.partial(_whole, plan, shape, sums.total_in_parts)", "functools.partial(_whole, plan, shape, sums.total)", "test_accuracy.py -k one_sign"),
    Mutation("parts: of what is cut among devices", "sums.py", "if cut or not", "if not", "test_sharding.py -k long_sums"),
    Mutation("parts: the last one forgotten", "sums.py", "if equal < size:", "if False:", "test_forms.py -k sums_in_parts and cuda"),
    Mutation("one read: the mean of the samples' deviations forgotten", "sums.py", "var = squares / n - rest * rest", "var = squares / n", "test_forms.py -k cuda and stored"),
    Mutation("one read: one sample", "sums.py", "mean = units.divide(_median(samples), unit)", "mean = units.divide(samples[0], unit)", "test_forms.py -k cuda and like_nothing_else"),
    Mutation("one read: columns cut, and divided for good", "sums.py", "return _times(jnp.squeeze(x, axis), size)", "return jnp.squeeze(x, axis)", "test_forms.py -k sums_in_parts and cuda"),
    Mutation("what is found once: a unit for its reciprocal", "units.py", "return None if per_unit is None else 1 / per_unit", "return per_unit", "test_range.py -k cuda"),
    Mutation("quantiles: a step to inf of no length", "order.py", "jnp.where((part == 0) | (low == high), low, value)", "value", "test_features.py -k infinite_entry"),
    Mutation("one read: lost digits are not missed", "sums.py", "LOST = 4.0", "LOST = 1e30", "test_forms.py -k tpu and grid"),
    Mutation("equal entries in a unit", "forms.py", "(var == 0) & (unit > 1)", "(var < 0) & (unit > 1)", "test_forms.py -k tpu and constant"),
    Mutation("few steps: the rest forgotten", "rescale.py", "-measured.rest * slope", "-0 * measured.rest * slope", "test_forms.py -k cuda and test_grid and float32 and 1000"),
    Mutation("residual: the sum is not rounded first", "residual.py", "return jax.lax.reduce_precision(total, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)", "return total", "test_residual.py -k output and xla and layer"),
    Mutation("residual: the cotangent of the sum forgotten", "implementations.py", '"ds": dtotal}', '"ds": 0 * dtotal}', "test_residual.py -k output and mosaic_gpu and layer"),
    Mutation("a shift is spread out before it varies", "rescale.py", "parts.spread(alike(v, xhat)[0], xhat)", "jnp.broadcast_to(v, xhat.shape)", "test_meshes.py -k crosses and sync"),
    Mutation("columns: devices are not taken together", "kernels/sharding.py", "if self.together is not None and any(sums):", "if False:", "test_implementations_columns.py -k gather and Auto and batch"),
    Mutation("columns: the bias left out", "implementations.py", 'lines = {"scale": scale, "bias": bias, **_lines_of(measured)}', 'lines = {"scale": scale, "bias": None, **_lines_of(measured)}', "test_implementations_columns.py -k output and cpu"),
    Mutation("columns: the sums of dy taken for those of dy xhat", "implementations.py", '"dscale": along, "dbias": ones}', '"dscale": ones, "dbias": along}', "test_implementations_columns.py -k output and cpu"),
    Mutation("columns: a device's count", "implementations.py", '"count": me.count_entries(plan.reduction, x)}', '"count": me.count_entries(plan.reduction, x) // 2}', "test_implementations_columns.py -k output and cpu"),
    Mutation("columns: an output that no kernel can write", "kernels/cpu_columns.py", "return cpu.unsupported_dtypes(x, dtype) is None", "return True", "test_kernels_cpu.py -k no_kernel"),
    Mutation("microbatches: a line search with other dropout", "microbatch.py", "        model = bind(params, model_state, jax.random.fold_in(key, i))\n        _, more", "        model = bind(params, model_state, key)\n        _, more", "test_microbatches.py -k same_dropout"),
    Mutation("microbatches: a momentum of the model's own", "merging.py", "                ax.check_known(\"train_step\", f\"the momentum of {where}\", module.momentum)\n", "", "test_microbatches.py -k model_computes"),
    Mutation("checkpoint: what has no entries", "checkpoint.py", "for name, array in arrays.items() if array.size", "for name, array in arrays.items()", "test_checkpoint.py -k no_entries"),
    Mutation("compare: folders one by one", "experiments/compare.py", "    check_kept(training, options)\n", "", "test_experiments.py -k bad_folder"),
    Mutation("explicit axes: parameters gathered", "kernels/primitive.py", "placed = sharding if sharding.mesh.explicit_axes else None", "placed = None", "test_meshes.py -k explicit_axes"),
    Mutation("export: refused elsewhere", "implementations.py", "    others |= {f\"exported_{name}\": exported for name in elsewhere}\n", "", "test_implementations.py -k form_there"),
    Mutation("explicit axes: a variance laid out whole", "evonorm.py", "parts.spread(rstd, grouped)", "jnp.broadcast_to(rstd, grouped.shape)", "test_meshes.py -k crosses_explicit and evonorm_s0"),
    Mutation("explicit axes: a proportion laid out whole", "switchable.py", "spread(weight, value)", "jnp.broadcast_to(weight, value.shape)", "test_meshes.py -k crosses_explicit and switchable"),
    Mutation("parts: of the first axis alone", "parts.py", "for axis in axes}", "for axis in axes[:1]}", "test_meshes.py -k dealt_out_is_measured"),
    Mutation("parts: of one axis", "parts.py", "if count > 1}", "if count > 3}", "test_meshes.py -k dealt_out_is_measured"),
    Mutation("parts: sums along one axis after the other", "parts.py", "    if len(cuts) < 2:", "    if True:", "test_meshes.py -k dealt_out_is_measured"),
    Mutation("parts: sums of cotangents along one axis after the other", "parts.py", "if len(_dealt_out(like, axes)) < 2:", "if True:", "test_meshes.py -k dealt_out_is_measured"),
    Mutation("parts: those of explicit axes alone", "parts.py", "            cuts = {0: both}", "            pass", "test_meshes.py -k one_axis_may_be"),
    Mutation("parts: weights laid out for their gradient", "measure.py", "parts.spread(dmask, t)", "jnp.broadcast_to(dmask, t.shape)", "test_meshes.py -k not_laid_out"),
    Mutation("mapped native kernels one after the other", "kernels/cpu.py", 'vmap_method="broadcast_all"', 'vmap_method="sequential"', "test_kernels_cpu.py -k mapped_over_they_are"),
    Mutation("native kernels in programs for other platforms", "implementations.py", "exported for name in elsewhere}", 'exported for name in elsewhere if name == "cpu"}', "test_implementations.py -k exported_for_other and cuda"),
    Mutation("stored programs call what was not loaded", "exporting.py", "cpu_library.unavailable()", "pass", "test_kernels_cpu.py -k whoever_imports"),
    Mutation("parts: the unit of a whole is one", "parts.py", "unit if unit is None else _like(unit, var), *measured", "unit, *measured", "test_meshes.py -k tpu_needs_one"),
    Mutation("a mean and what is along xhat apart", "standardize.py", "parts.spread(along.astype(t.dtype), t)", "parts.spread(along, t)", "test_meshes.py -k forward_mode_have"),
    Mutation("forward mode along one axis after the other", "gradient.py", "me.present(dx, None), functools.partial(parts.total, sums.total)", "me.present(dx, None), sums.total", "test_meshes.py -k forward_mode_have"),
    Mutation("gradients of narrow parameters added up as they are", "rescale.py", "parts.spread(alike(v, xhat)[0], xhat)", "parts.spread(v, xhat)", "test_masks.py -k narrow_parameters"),
    Mutation("a scale from outside of a mesh", "kernels/primitive.py", "theirs.mesh.empty or ours", "ours", "test_meshes.py -k own_agree"),
    Mutation("parts: a unit led by parts", "parts.py", "jnp.expand_dims(value, [axis - 1 for axis in itertools.compress(part.axes, cut)])", "value[None]", "test_meshes.py -k tpu_needs_one"),
    Mutation("layouts: pieces in any order", "kernels/layouts.py", "return axes if np.array_equal", "return axes if True or np.array_equal", "test_sharding.py -k another_order"),
    Mutation("layouts: primes from the least up", "kernels/layouts.py", "        if not lost:\n", "        if True:\n", "test_sharding.py -k several_primes"),
    Mutation("layouts: the last order, not the best", "kernels/layouts.py", "if lost < least:", "if True:", "test_sharding.py -k one_mesh"),
    Mutation("layouts: axes in the order of the mesh", "kernels/layouts.py", "axes = sorted(steps, key=lambda i: -steps[i])", "axes = sorted(steps)", "test_sharding.py -k terms_of_primes"),
    Mutation("parts: where groups are many, too", "parts.py", "few = [*cuts] == [0] or (", "few = True or (", "test_meshes.py -k many_groups"),
    Mutation("parts: about a mean of means", "parts.py", "jnp.where(places == largest, mean, 0)", "share * mean", "test_meshes.py -k equal_entries"),
    Mutation("parts: cut as nothing is dealt out", "parts.py", "or size % count:", "or False:", "test_meshes.py -k do_not_divide and not within"),
    Mutation("the guarded array passed on", "forms.py", "jnp.any(needed), again, x, common)", "jnp.any(needed), again, guarded, common)", "test_memory.py -k temporary"),
    Mutation("masks stay where they are", "forms.py", "pool.placed_like(mask, x)", "mask", "test_meshes.py -k mask_that_is_whole"),
    Mutation("parts: as many as divide the batch", "parts.py", "{0: devices}", "{0: math.gcd(x.shape[0], devices)}", "test_meshes.py -k within_a"),
    Mutation("parts: of no batch", "parts.py", "return cuts if few and count <= MOST else {}", "return {}", "test_meshes.py -k two_all_reduces"),
    Mutation("parts: features ask for units", "forms.py", "_in_a_unit_where_needed if devices == 1 else _in_a_unit", "_in_a_unit_where_needed", "test_meshes.py -k second_axis"),
    Mutation("parts: a mask is as narrow as it came", "parts.py", "lambda digit: _like(times(digit, weight), var)", "lambda digit: times(digit, weight)", "test_meshes.py -k second_axis"),
    Mutation("parts: weights ask for the largest", "measure.py", "near_one(mask, None if measured.count is None else measured.count[0], ())", "near_one(mask, mask, reduction.axes)", "test_meshes.py -k second_axis"),
    Mutation("parts: weights add up to infinity", "parts.py", "number = number / units.choose(number, (0,), 0.0)", "pass", "test_meshes.py -k second_axis"),
    Mutation("parts: all of one share", "parts.py", "        share = number /", "        share = jnp.ones_like(number) /", "test_meshes.py -k two_all_reduces"),
    Mutation("parts: the unit of each", "parts.py", "unit, var = common[0], var * ratio * ratio", "unit, var = common[0], var", "test_meshes.py -k exchange_once"),
    Mutation("default: where a partitioner sees it", "kernels/primitive.py", "return kinds == {AxisType.Explicit}", "return True", "test_defaults.py -k partitioner"),
    Mutation("default: on any GPU", "kernels/primitive.py", 'found == {"9.0"}', "found", "test_defaults.py -k which_devices"),
    Mutation("default: in exported programs", "kernels/primitive.py", " or module.lowering_parameters.for_export", "", "test_defaults.py -k which_devices"),
    Mutation("default: where XLA is named", "implementations.py", "if plan.implementation is not None or plan.layout", "if plan.layout", "test_defaults.py -k both_ways"),
    Mutation("gpu: a copy leaves its row", "kernels/mosaic_gpu_rows.py", "min(size, plan.run) for size", "plan.run for size", "test_kernels_gpu.py -k leaves"),
    Mutation("a kernel falls back", "implementations.py", "others = dict.fromkeys(elsewhere, refusal)", "others = {}", "test_implementations.py -k elsewhere"),
    Mutation("a kernel's scale is not the norm's", "implementations.py", "operands = {name: next(given) if is_there else None for name, is_there in there}", "operands = {name: next(given) if is_there else None for name, is_there in there} | {'scale': None}", "test_implementations.py -k tpu and output"),
    # Running statistics.
    Mutation("momentum swapped", "moments.py", "past = jnp.asarray(momentum, dtype)", "past = 1 - jnp.asarray(momentum, dtype)", STATE),
    Mutation("Bessel's correction the other way round", "moments.py", "n / jnp.maximum(n - 1, 1))", "jnp.maximum(n - 1, 1) / jnp.maximum(n, 1))", STATE),
    Mutation("unbiased ignored", "moments.py", "(bessel(m.count, dtype) if unbiased else 1)", "1", STATE),
    Mutation("mean of means in merge", "moments.py", "w_a, w_b = n_a / both, n_b / both", "w_a, w_b = jnp.full_like(n_a, 0.5), jnp.full_like(n_b, 0.5)", STATE),
    Mutation("no distance of means in merge", "moments.py", " + apart", "", STATE),
    Mutation("counts of merge wrap", "moments.py", "jnp.where(a > me.MAX_COUNT - b, me.MAX_COUNT, a + b)", "a + b", STATE),
    Mutation("the state's dtype drifts", "moments.py", "mean.astype(stats.mean.dtype),", "mean,", STATE),
    Mutation("an empty batch moves the state", "moments.py", "moves = jnp.asarray(m.count) > (0 if momentum is None else 1)", "moves = jnp.asarray(m.count) >= 0", "test_masks.py -k state"),
    Mutation("a bad batch is kept", "moments.py", 'if nonfinite == "skip":', 'if nonfinite == "keep":', STATE),
    Mutation("a bad variance is kept", "moments.py", "moves &= jnp.isfinite(new.mean) & jnp.isfinite(new.var)", "moves &= jnp.isfinite(new.mean)", "test_range.py -k remembered"),
    Mutation("gradients flow into the state", "batch.py", "stats, lax.stop_gradient(m), momentum", "stats, m, momentum", "test_derivatives.py -k running"),
    Mutation("inference by the batch", "batch.py", "(stats.mean, stats.var))", "(stats.mean * 0 + jnp.mean(x), stats.var))", STATE),
    Mutation("one entry shrinks the variance", "moments.py", "(0 if momentum is None else 1)", "0", "test_state.py -k one_valid"),
    Mutation("NaN in the variance is zero in the output", "rescale.py", "below = (squared <= floor) & (squared >= 0)", "below = ~(squared > floor)", "test_state.py -k shows"),
    # Devices.
    Mutation("mean of means over devices", "parts.py", "share = number / at_least_one(jnp.sum(number, 0, keepdims=True), var)", "share = jnp.full_like(number, 1 / number.shape[0])", SYNC),
    Mutation("no distance of means over devices", "parts.py", "jnp.sum(share * (var + square(apart)), 0)", "jnp.sum(share * var, 0)", SYNC),
    Mutation("the backward pass is not pooled", "pool.py", "return lax.psum(value, axis_name)", "return value", SYNC),
    Mutation("one device for many", "pool.py", "return lax.axis_size(axis_name)", "return 1", SYNC),
    Mutation("groups ignored", "pool.py", "slots = jnp.where(pooled, slots, 0)", "slots = slots", "test_sync.py -k groups"),
    # Refusals.
    Mutation("axes out of range taken", "axes.py", "if not -ndim <= int(axis) < ndim:", "if False:", ERRORS),
    Mutation("repeated axes taken", "axes.py", "if len(set(positive)) < len(positive):", "if False:", ERRORS),
    Mutation("one axis too many", "axes.py", "if not -ndim <= int(axis) < ndim:", "if not -ndim <= int(axis) <= ndim:", ERRORS),
    Mutation("a scale of any shape taken", "axes.py", "if tuple(shape) != expected:", "if len(shape) != len(expected):", ERRORS),
    Mutation("integers taken", "axes.py", "if not jnp.issubdtype(x.dtype, jnp.inexact) or", "if jnp.issubdtype(x.dtype, jnp.inexact) and", ERRORS),
    Mutation("a single value taken", "axes.py", "if isinstance(count, int) and count == 1:", "if False:", ERRORS),
    Mutation("a negative epsilon taken", "checks.py", "if not low <= number <= high", "if not number <= high", ERRORS),
    Mutation("float64 lost", "axes.py", "return promote(dtype, jnp.float32)", 'return jnp.dtype("complex64" if jnp.issubdtype(dtype, jnp.complexfloating) else "float32")', "test_moments.py -k float64"),
    Mutation("half precision computed in half", "axes.py", "return promote(dtype, jnp.float32)", "return jnp.dtype(dtype)", "test_accuracy.py -k stored_statistics and 64"),
    # Features.
    Mutation("feature: the deviation is not in units", "features.py", "jnp.sqrt(jnp.where(constant, 1, var)) * unit", "jnp.sqrt(jnp.where(constant, 1, var))", FEATURES),
    Mutation("feature: unbiased ignored", "features.py", "var = var * bessel(count, var.dtype) if unbiased else var", "var = var", FEATURES),
    Mutation("feature: large factors in no unit", "features.py", "> large, large, 1)", "> large, 1, 1)", FEATURES),
    Mutation("feature: a factor of zero", "features.py", "FeatureScaling(mean, _one_for_zero(factor))", "FeatureScaling(mean, factor)", FEATURES),
    Mutation("feature: a step larger than any number", "order.py", "far = ((low < 0) & (high > 0)) |", "far =", FEATURES),
    Mutation("feature: mask ignored by the inverse", "features.py", "(me.present(x, mask), offset, factor)", "(x, offset, factor)", FEATURES),
    Mutation("a singular vector turned to its own side alone", "singular.py", "(value * along + values * against) / gap", "value * along / gap", "test_weights.py -k singular"),
    Mutation("a singular vector stays in the span of the others", "singular.py", "lefts @ to_left + forth / value", "lefts @ to_left", "test_weights.py -k singular"),
    Mutation("feature: the condition number of the data", "condition.py", "ratio * ratio", "ratio", FEATURES),
    Mutation("feature: absent entries are ranked", "order.py", "count = jnp.sum(valid, axes, dtype=jnp.int32)", "count = jnp.sum(valid | True, axes, dtype=jnp.int32)", FEATURES),
    Mutation("feature: extremes merged the wrong way", "order.py", "jnp.maximum(high_a, high_b)", "jnp.minimum(high_a, high_b)", FEATURES),
    # The family.
    Mutation("renorm: no limit on r", "renorm.py", "1 / jnp.asarray(r_max), r_max)", "0, jnp.inf)", "test_family.py -k renorm"),
    Mutation("renorm: masked entries by d", "renorm.py", "y = jnp.where(there(mask), y, absent", "y = jnp.where(there(mask) | True, y, absent", "test_conditions.py -k renorm"),
    Mutation("kalman: no distance of means", "kalman.py", " + p * (1 - p) * square(apart)", "", "test_family.py -k kalman"),
    Mutation("kalman: absent channels drop the prior", "kalman.py", "seen = m.count > 0", "seen = m.count >= 0", "test_conditions.py -k channel"),
    Mutation("response: not in a unit", "response.py", "scaled = units.divide(x, unit)", "scaled, unit = x, 1", "test_conditions.py -k every_size"),
    Mutation("segment: ids wrap", "segment.py", "ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids", "ids", "test_conditions.py -k narrow"),
    Mutation("segment: ids are cut", "segment.py", "ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids", "ids.astype(jnp.int32)", "test_conditions.py -k ids_of_a_wide"),
    Mutation("adaptive: masked entries in the sum", "adaptive.py", "there = present(x, ax.to_weights(name, mask, x))", "there = present(x, None)", "test_conditions.py -k adaptive_block"),
    Mutation("columns: derivatives in the unit of the form", "implementations.py", "return _measure_by_kernel(plan, x)", "return _measure_by_kernel.fun(plan, x)", "test_implementations_columns.py -k second_derivatives"),
    Mutation("tpu: numbers of 64 bits", "kernels/mosaic_tpu_blocks.py", "@jax.enable_x64(False)", "@jax.enable_x64(True)", "test_kernels_tpu.py -k wide_numbers"),
    Mutation("quotient: by the square", "quotient.py", "quotient(dx - out * dy, primals[1])", "dx / primals[1] - primals[0] * dy / primals[1] ** 2", "test_range.py -k kernels_over"),
    Mutation("quotient: by the cube", "quotient.py", "-0.5 * tangents[0] * out * out * out", "-0.5 * tangents[0] * (out * out * out)", "test_range.py -k through_statistics"),
    Mutation("quotient: by the next power", "quotient.py", "out * (exponent * quotient(dx, x))", "exponent * x ** (exponent - 1) * dx", "test_range.py -k through_statistics"),
    Mutation("style: in no unit", "adaptive.py", "units.divide(entries, unit), spatial", "units.divide(entries, unit) * unit, spatial", "test_range.py -k style"),
    Mutation("ids: lower digits", "axes.py", "and wide.itemsize > 4", "and False", "test_conditions.py -k wide_ids"),
    Mutation("kalman: no count at inference", "options/family.py", "or self.momentum is not None else (*names", "or True else (*names", "test_conditions.py -k mixture_at_inference"),
    Mutation("theory: masked entries count", "theory/regularizer.py", "present(v.astype(dtype), weights)", "present(v.astype(dtype), None)", "test_theory.py -k masked"),
    Mutation("recalibrate: nnx as it is", "recalibrate.py", "bound = bind(params, state, None, train=True", "bound = bind(params, state, None, train=False", "test_population.py -k sees_what"),
    Mutation("recalibrate: weights are rounded", "recalibrate.py", "layers[path].count[...].astype(jnp.float32)", "layers[path].count[...]", "test_population.py -k counts_weights"),
    Mutation("folding: into 16 bits", "interop/marking.py", "digits >= 32 and _pads_nothing(module)", "_pads_nothing(module)", "test_folding.py -k digits_would"),
    Mutation("folding: weights are rounded", "interop/marking.py", "_digits(value) < digits", "False", "test_folding.py -k digits_would"),
    Mutation("recalibrate: frozen layers too", "recalibrate.py", "isinstance(module, RunningNormalizer) and not module.freeze_stats", "isinstance(module, RunningNormalizer)", "test_population.py -k frozen"),
    # In and out.
    Mutation("fold: nn.jit remembers the listener", "intercept.py", "with _listener(interceptor), linen", "with linen", "test_folding.py -k jit"),
    Mutation("fold: a kernel read elsewhere", "interop/graph.py", "path, times=1)", "path, times=9)", "test_folding.py -k not_one_affine"),
    Mutation("torch: a transposed kernel not turned", "interop/pytorch.py", "turned = tuple(range(rank - 2)) if transposed else ()", "turned = ()", "test_interop.py -k transposed or keras"),
    Mutation("report: what is unused passes", "interop/pairing.py", "if strict and (report.missing or report.unused or report.mismatched)", "if strict and (report.missing or report.mismatched)", "test_interop.py -k reported"),
    Mutation("fold: the mean forgotten", "interop/folding.py", " - factor * mean.astype(dtype)", "", "test_folding.py -k affine"),
    Mutation("fold: groups in another order", "interop/folding.py", "jnp.repeat(row.reshape(groups, size), width, axis=0)", "jnp.tile(row.reshape(groups, size), (width, 1))", "test_folding.py -k kernels"),
    Mutation("fold: a kernel changed on the way", "interop/graph.py", "set(owners) == {path} and number", "number", "test_baking.py -k whatever"),
    Mutation("bake: a kernel read elsewhere", "interop/graph.py", "(owners[path] if times is None", "(math.inf if times is None", "test_baking.py -k whatever"),
    Mutation("fold: through a padding of zeros", "interop/marking.py", "padding in _OF_THE_INPUT if isinstance(padding, str) else", "True if isinstance(padding, str) else", "test_folding.py -k a_model_of"),
    Mutation("fold: what is used elsewhere too", "interop/graph.py", "made.get(source) if used[source] == 1 else None", "made.get(source)", "test_folding.py -k a_model_of"),
    Mutation("fold: a module's activation goes with the norm", "interop/marking.py", "x = norm.activation(x.astype(ax.promote(jnp.float32, x)))", "pass", "test_folding.py -k activation and None and True"),
    # Sample weights.
    Mutation("weights read as a mask", "entries.py", "return times(x, jnp.where(there(mask), mask, 0))", "return x", "test_sample_weights.py -k average or merge"),
    Mutation("weights below zero count", "entries.py", "return mask if mask.dtype == jnp.bool_ else mask > 0", "return mask if mask.dtype == jnp.bool_ else mask != 0", "test_sample_weights.py -k below_zero"),
    Mutation("weights: the mean has no derivative", "measure.py", "moves[0] + times(d, dmask * (unit / weight))", "moves[0]", "test_sample_weights.py -k derivatives"),
    Mutation("weights: the variance has half a derivative", "measure.py", "(unit * length / (2 * weight))", "(unit * length / (4 * weight))", "test_sample_weights.py -k derivatives"),
    Mutation("weights: the count has no derivative", "measure.py", "count = (dcount,)", "count = (0 * dcount,)", "test_sample_weights.py -k derivatives"),
    Mutation("weights: the running count drifts to a float", "moments.py", "return jnp.where(full, me.MAX_COUNT, jnp.round(jnp.where(full, 0, count)).astype(dtype))", "return count", "test_sample_weights.py -k int"),
    Mutation("weights: a segment counts rows", "segment.py", "counted = there.astype(jnp.int32) if weights is None else counted", "counted = there.astype(jnp.int32)", "test_sample_weights.py -k segment"),
    Mutation("weights: power norm's gradient by the mask", "power.py", "(g - each * old * xhat)", "(g - old * xhat)", "test_sample_weights.py -k power"),
    # Diagnostics and population training.
    Mutation("diagnostics: skewed inputs forgotten", "diagnostics/decay.py", "return times(of_scale[0]), times(of_shift[1]), times(of_scale[1])", "return times(of_scale[0]), times(of_shift[1]), zeros", "test_diagnostics.py -k skewed"),
    Mutation("diagnostics: other models too", "diagnostics/watch.py", "watching.interceptor = look\n    value, _ = value_and_metrics(loss(watching, batch, train))", "from normax.intercept import intercepted\n    with intercepted(look):\n        value, _ = value_and_metrics(loss(watching, batch, train))", "test_diagnostics.py -k another_model"),
    Mutation("diagnostics: not orthogonal", "diagnostics/landscape.py", "w = _orthogonal(w - alpha * v - beta * v_before, basis)", "w = w - alpha * v - beta * v_before", "test_diagnostics.py -k decades"),
    Mutation("gamma decay: half a gradient", "theory/decay.py", "(2 * coefficient * leaf", "(coefficient * leaf", "test_diagnostics.py -k gradient_of_its_penalty"),
    Mutation("gamma decay: measured once", "theory/decay.py", "state.steps % every == 0", "state.steps == 0", "test_diagnostics.py -k on_a_schedule and linen"),
    Mutation("population: the past has a weight", "population_training.py", 'return {"momentum": 0.0}', 'return {"momentum": 0.5}', "test_diagnostics.py -k population_training_by_hand"),
    Mutation("diagnostics: behind a module's activation", "diagnostics/decay.py", 'return {"activation": None} if path in shifts and is_active(module) else {}', "return {}", "test_diagnostics.py -k activation_in and linen"),
    Mutation("population: a module's activation dropped", "population_training.py", "y if activation is None else activation(y).astype(dtype)", "y", "test_diagnostics.py -k activation_in and linen"),
    Mutation("initialization without a module's activation", "options/activations.py", '("axis_name", "axis_index_groups")', '("axis_name", "axis_index_groups", "activation")', "test_modules.py -k activation_is and BatchNorm"),
    # Weights.
    Mutation("the length is a root mean square", "weight.py", "/ math.sqrt(size),", "/ 1.0,", "test_weights.py"),
    Mutation("no power iteration", "weight.py", "first if n_steps == 1 else", "first if n_steps else", "test_weights.py"),
    Mutation("NaN ends the iteration", "weight.py", "left = jnp.all(jnp.isfinite(u)) & (", "left = (", "test_weights.py"),
    Mutation("a small kernel ends it", "weight.py", " & (jnp.any(u != 0) | jnp.all(fixed == 0))", "", "test_weights.py -k too_small"),
    Mutation("a spectral state goes elsewhere", "weight.py", "pool.placed_like(jnp.where(left, u, start), old)", "jnp.where(left, u, start)", "test_meshes.py -k stays_where"),
    Mutation("gradients flow through u and v", "weight.py", "fixed, old = lax.stop_gradient((matrix, jnp.asarray(state.u)))", "fixed, old = matrix, jnp.asarray(state.u)", "test_weights.py"),
    # Training: parts, bad batches, checkpoints.
    Mutation("training: each part moves the running statistics", "merging.py", "return isinstance(module, RunningNormalizer) and", "return False and", "test_microbatches.py -k whole and linen and plain and False"),
    Mutation("training: parts forget the parts before", "microbatch.py", "params, model_state, merged, part, jax.random.fold_in(key, i)", "params, model_state, unseen, part, jax.random.fold_in(key, i)", "test_microbatches.py -k whole and linen and plain and False"),
    Mutation("training: neighbours are one part", "microbatch.py", "jnp.swapaxes(jnp.reshape(x, (shape[0] // count, count, *shape[1:])), 0, 1)", "jnp.reshape(x, (count, shape[0] // count, *shape[1:]))", "test_microbatches.py -k sharded and auto"),
    Mutation("training: gradients of parts are added up", "microbatch.py", "(total / count).astype(p.dtype)", "total.astype(p.dtype)", "test_microbatches.py -k without"),
    Mutation("training: parts draw alike", "microbatch.py", "merged, part, jax.random.fold_in(key, i)", "merged, part, key", "test_microbatches.py -k key_of"),
    Mutation("training: a bad batch is let in", "train.py", "bad = ~jnp.stack(finite).all()", "bad = jnp.zeros((), bool)", "test_bad_batches.py -k changes_nothing and linen"),
    Mutation("training: gradients are not looked at", "train.py", 'for v in (metrics["loss"], *jax.tree.leaves(grads))]', 'for v in (metrics["loss"],)]', "test_bad_batches.py -k before_the_optimizer"),
    Mutation("training: what the optimizer made is looked at", "train.py", "_unless_finite(state, new, grads, metrics)", "_unless_finite(state, new, updates, metrics)", "test_bad_batches.py -k before_the_optimizer"),
    Mutation("training: statistics are not looked at", "train.py", "(state.params, state.model_state, _arrays", "(state.params, (), _arrays", "test_bad_batches.py -k leave_the_range"),
    Mutation("training: new parameters are not looked at", "train.py", "(state.params, state.model_state, _arrays", "((), state.model_state, _arrays", "test_bad_batches.py -k leave_the_range"),
    Mutation("training: the optimizer is not looked at", "train.py", "_arrays(state.opt_state))", "())", "test_bad_batches.py -k optimizer_that_would"),
    Mutation("training: what was not finite is looked at", "train.py", "(jnp.isfinite(after) | ~jnp.isfinite(before))", "jnp.isfinite(after)", "test_bad_batches.py -k leave_the_range"),
    Mutation("training: gradients stay scaled", "train.py", "grad / loss_scale, grads", "grad, grads", "test_bad_batches.py -k not_scaled"),
    Mutation("training: bad batches are not counted", "train.py", "skipped=old.skipped + skipped", "skipped=old.skipped", "test_bad_batches.py -k counted"),
    Mutation("training: the data's position is lost", "checkpoint.py", '"position": position, "metrics": metrics})', '"position": None, "metrics": metrics})', "test_checkpoint.py -k same_bits and linen and 1"),
    Mutation("a soak that lets bad batches in", "train.py", "bad = ~jnp.stack(finite).all()", "bad = jnp.zeros((), bool)", "test_soak.py"),
    Mutation("training: a save waits", "checkpoint.py", "return self._manager.save(", "return (lambda *a, **k: [self._manager.save(*a, **k), self.wait()][0])(", "test_checkpoint.py -k does_not_wait"),
    Mutation("training: saved beside what is later", "checkpoint.py", "        if step <= last:", "        if False:", "test_checkpoint.py -k older_one"),
    Mutation("training: no number is the best", "checkpoint.py", "return worst if math.isnan(value) else value", "return value", "test_checkpoint.py -k metrics_that_are"),
    Mutation("training: what was half deleted is in the way", "checkpoint.py", "if None not in (found, saved) and ", "if ", "test_checkpoint.py -k while_it_deletes"),
    Mutation("training: metrics are not held", "checkpoint.py", "            self._hold_metrics()", "            pass", "test_checkpoint.py -k metrics_that_are"),
    Mutation("training: parts are added up in half precision", "microbatch.py", "ax.compute_dtype(p.dtype)), params)", "p.dtype), params)", "test_microbatches.py -k half"),
    Mutation("training: no checksums", "checkpoint.py", "!= checksum(leaf)", "is None", "test_checkpoint.py -k checksum"),
    Mutation("training: no checksum of what is dealt out", "checkpoint.py", "!= checksum(leaf)", "not in (None, checksum(leaf) if leaf.is_fully_addressable else None)", "test_processes.py -k any_number"),
    Mutation("training: what is said of arrays is not checked", "checkpoint.py", 'or read.get("checksum") != zlib.crc32(text.encode())', "or False", "test_checkpoint.py -k damaged"),
    Mutation("training: another dtype comes back", "checkpoint.py", "ax.check_like(NAME, name, kept, leaf)", "pass", "test_checkpoint.py -k refused_by_name"),
    Mutation("training: other keys come back", "checkpoint.py", "ax.check_keys(NAME,", "(lambda *_: None)(NAME,", "test_checkpoint.py -k refused_by_name"),
    Mutation("training: the best is not kept", "checkpoint.py", "kept.append(", "list(", "test_checkpoint.py -k last_and_the_best"),
    Mutation("training: random keys begin anew", "checkpoint.py", "jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))", "old", "test_checkpoint.py -k same_bits and linen and 1"),
]  # fmt: skip


def run(mutation: Mutation) -> tuple[int, str]:
    """Returns pytest's exit status where normax is broken, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("normax", "tests"):
            shutil.copytree(ROOT / name, copy / name)  # with what Python has compiled
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "normax" / mutation.file
        text = path.read_text()
        if mutation.old and text.count(mutation.old) != 1:
            return -1, f"expected its text once in {path.name}: {mutation.old!r}"
        if mutation.old:
            path.write_text(text.replace(mutation.old, mutation.new))
        files, _, words = mutation.tests.partition(" -k ")
        arguments = ["-xq", "-p", "no:cacheprovider", "--no-header", f"--rootdir={copy}"]
        arguments += [f"tests/{file}" for file in files.split()] + (["-k", words] if words else [])
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        del sys.modules["conftest"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = pytest.main(arguments)
        import normax

        # Where the tests saw another normax they show nothing.
        where = pathlib.Path(normax.__file__).parents[1]
        return (int(status) if where.samefile(copy) else -1), printed.getvalue()


def forked(mutation: Mutation) -> tuple[int, str]:
    """Returns what `run` does, in a process of its own, or how that process ended."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(run(mutation)))
    process.start()
    there.close()  # so that a process that dies ends the wait
    try:
        found = here.recv()
    except EOFError:
        found = None
    process.join()
    return found or (process.exitcode or -1, "its process ended")


def main(words: list[str]) -> int:
    """Runs the mutations whose names have the words, or a part; returns an exit status."""
    chosen = MUTATIONS
    for word in words:
        part, _, parts = word.partition("/")
        if part.isdigit() and parts.isdigit():
            chosen = chosen[int(part) - 1 :: int(parts)]
        else:
            chosen = [m for m in chosen if word in m.name]
    results = []
    # JAX warns of any fork; before its first array it has no threads that could be lost.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    first = [Mutation("nothing", "axes.py", "", "", chosen[0].tests)] if chosen else []
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as workers:
        done = workers.map(forked, first + chosen)
        for mutation, (status, text) in zip(first + chosen, done, strict=True):
            # 1: a test failed. Any other but 0: pytest did not run, which shows nothing.
            if status not in (0, 1):
                sys.exit(f"{mutation.name}: pytest ended with {status}\n{text[-2000:]}")
            if mutation in first:
                if status:
                    sys.exit(f"expected {mutation.tests} to pass where nothing is broken")
                continue
            results.append(status == 1)
            print(f"{'noticed ' if status else 'SURVIVED'}  {mutation.name}", flush=True)
    print(f"{sum(results)} of {len(results)} mutations noticed")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
