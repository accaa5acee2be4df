"""ONNX's own cases for the five normalizations, at a relative error of 1e-5."""

import collections
import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test import loader

import normax

OPERATORS = {
    "BatchNormalization": 4,
    "LayerNormalization": 19,
    "RMSNormalization": 19,
    "InstanceNormalization": 2,
    "GroupNormalization": 2,
}


def _cases():
    """Yields name, node and arrays of each case; `_expanded` ones spell a node out in others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ONNX's cases for casts that overflow
        every = loader.load_node_model_tests()
    for case in every:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS and "expanded" not in case.name:
            yield case.name, case


CASES = dict(_cases())


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def batch(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    stats = normax.RunningStats(mean, var, np.zeros(mean.shape, np.int32))
    y, new = normax.batch_norm(
        x,
        stats,
        scale,
        bias,
        use_running_average=not training_mode,
        feature_axes=1,
        momentum=momentum,
        epsilon=epsilon,
    )
    return (y, new.mean, new.var) if training_mode else (y,)


def layer(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    axes = tuple(range(axis % x.ndim, x.ndim))
    y = normax.layer_norm(x, scale, bias, reduction_axes=axes, feature_axes=axes, epsilon=epsilon)
    m = normax.moments(x, axes)
    return y, np.expand_dims(m.mean, axes), np.expand_dims(1 / np.sqrt(m.var + epsilon), axes)


def rms(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    axes = tuple(range(axis % x.ndim, x.ndim))
    return (normax.rms_norm(x, scale, reduction_axes=axes, feature_axes=axes, epsilon=epsilon),)


def instance(x, scale, bias, *, epsilon=1e-5):
    return (normax.instance_norm(x, scale, bias, feature_axes=1, epsilon=epsilon),)


def group(x, scale, bias, *, num_groups, epsilon=1e-5, stash_type=1):
    return (
        normax.group_norm(x, scale, bias, num_groups=num_groups, feature_axes=1, epsilon=epsilon),
    )


OURS = {
    "BatchNormalization": batch,
    "LayerNormalization": layer,
    "RMSNormalization": rms,
    "InstanceNormalization": instance,
    "GroupNormalization": group,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_case(name):
    case = CASES[name]
    (node,) = case.model.graph.node
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        arrays = [numpy_helper.to_array(v) if hasattr(v, "raw_data") else v for v in inputs]
        expected = [numpy_helper.to_array(v) if hasattr(v, "raw_data") else v for v in outputs]
        ours = OURS[node.op_type](*arrays, **attributes(node))
        for left, right in zip(ours, expected, strict=False):
            np.testing.assert_allclose(np.asarray(left), right, rtol=1e-5, atol=1e-6)


def test_none_is_left_out():
    found = collections.Counter(case.model.graph.node[0].op_type for case in CASES.values())
    assert found == OPERATORS
