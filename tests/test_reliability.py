"""What a user may rely on, check by check: the test that holds it, or the reason why none does."""

import ast
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent
CHECKS = {
    1: "accuracy::test_grid",
    2: "accuracy::test_stress_rows",
    3: "accuracy::test_grid",
    4: "accuracy::test_gradients_of_scale_and_bias",
    5: "accuracy::test_stored_statistics",
    6: "laws::test_the_output_has_the_input_s_shape_and_dtype_and_is_rounded_once",
    7: "accuracy::test_constant_rows_are_exactly_zero_with_the_right_gradient",
    8: "accuracy::test_a_long_reduction_keeps_mean_and_variance",
    9: "range::test_every_size range::test_subnormal_numbers range::test_weights_of_every_size",
    10: "state::test_float16_gradients_are_numbers",
    11: "state::test_an_epsilon_far_below_float16_is_added_all_the_same",
    12: "accuracy::test_jit_equals_eager",
    13: "torch::test_layer_norm torch::test_batch_norm_trains_and_infers",
    14: "torch::test_double_backward derivatives::test_hessian",
    15: "derivatives::test_values_jvp_and_vjp derivatives::test_jacobians",
    16: "derivatives::test_numerically_to_second_order",
    17: "derivatives::test_no_gradient_flows_through_running_statistics "
    "derivatives::test_the_inference_gradient_is_linear_in_the_cotangent_alone",
    18: "derivatives::test_vmap_of_grad_scan_and_remat laws::test_vmap_is_the_loop",
    19: "onnx::test_case onnx::test_no_case_is_left_out",
    20: "torch::test_batch_norm_trains_and_infers torch::test_group_norm torch::test_weight_norm",
    21: "laws::test_no_values_are_moved_in_place",
    22: "moments::test_the_state_keeps_its_dtypes moments::test_float64_is_not_lost",
    23: "state::test_a_bfloat16_model_keeps_a_float32_average_that_moves",
    24: "moments::test_the_cumulative_average_is_of_all_data_seen "
    "state::test_microbatches_merged_are_one_update "
    "state::test_a_layer_called_twice_moves_its_state_twice",
    25: "moments::test_evaluation_before_training_is_the_identity_but_for_epsilon",
    26: "errors::test_bad_calls masks::test_an_empty_batch_leaves_the_state",
    27: "masks::test_masked_is_the_formula_over_what_is_there",
    28: "masks::test_what_is_masked_moves_nothing",
    29: "masks::test_a_group_with_nothing_valid "
    "masks::test_the_state_stays_bit_for_bit_where_nothing_is_valid",
    30: "sync::test_vmap_with_an_axis_name sync::test_shard_map "
    "sync::test_plain_jit_with_a_sharded_batch",
    31: "sync::test_shard_map",
    32: "sync::test_groups_of_devices_pool_among_themselves",
    33: "sync::test_one_all_reduce_forward",
    34: "errors::test_bad_calls properties::test_illegal_axes_are_refused "
    "properties::test_axes_count_from_either_end_in_any_order",
    35: "errors::test_bad_calls flax::test_statistics_of_another_shape_are_refused_at_inference",
    36: "errors::test_bad_calls",
    37: "modules::test_shells_are_the_function_bit_for_bit "
    "modules::test_batch_norm_shells_are_the_function_bit_for_bit",
    38: "modules::test_flax_checkpoints_load_and_agree",
    39: "state::test_one_bad_number_is_skipped_in_its_feature_and_shows_in_the_output "
    "state::test_every_device_does_the_same_when_one_has_a_bad_batch",
    40: "state::test_validate_refuses_what_does_not "
    "state::test_validate_refuses_a_missing_key_and_an_impossible_count",
    41: None,  # needs checkpoints, which normax does not write yet
    42: "memory::test_bytes_kept",
    43: "laws::test_a_second_call_compiles_nothing",
    44: "mutations.py",
}
# Of ONNX's cases in check 19, LpNormalization, LRN and MeanVarianceNormalization are not normax's
# yet; tests/test_onnx.py names them.


@pytest.mark.parametrize("number", range(1, 45))
def test_the_test_of_a_check_is_there(number):
    for name in (CHECKS[number] or "").split():
        file, _, function = name.partition("::")
        if not function:
            assert (FOLDER / file).exists()
            continue
        tree = ast.parse((FOLDER / f"test_{file}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
