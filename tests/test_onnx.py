"""ONNX's own node cases: every output of the five normalizations, to a relative error of 1e-5."""

import collections
import functools
import warnings

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx.backend.test import loader

import normax


def batch(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    stats = normax.RunningStats(mean, var, np.zeros(mean.shape, np.int32))
    y, stats = normax.batch_norm(
        x,
        stats,
        scale,
        bias,
        use_running_average=not training_mode,
        feature_axes=1,
        momentum=momentum,
        epsilon=epsilon,
    )
    return [y, stats.mean, stats.var] if training_mode else [y]


def trailing(x, axis):
    return tuple(range(axis % x.ndim, x.ndim))


def layer(x, scale, bias=None, *, axis=-1, epsilon=1e-5):
    axes = trailing(x, axis)
    y = normax.layer_norm(x, scale, bias, reduction_axes=axes, feature_axes=axes, epsilon=epsilon)
    _, mean, var = normax.moments(x, axes)
    return [y, jnp.expand_dims(mean, axes), jnp.expand_dims((var + epsilon) ** -0.5, axes)]


def rms(x, scale, *, axis=-1, epsilon=1e-5):
    axes = trailing(x, axis)
    return [normax.rms_norm(x, scale, reduction_axes=axes, feature_axes=axes, epsilon=epsilon)]


def on_axis_1(function, *arrays, epsilon=1e-5, **options):
    return [function(*arrays, feature_axes=1, epsilon=epsilon, **options)]


OURS = {
    "BatchNormalization": batch,
    "GroupNormalization": functools.partial(on_axis_1, normax.group_norm),
    "InstanceNormalization": functools.partial(on_axis_1, normax.instance_norm),
    "LayerNormalization": layer,
    "RMSNormalization": rms,
}
# Cases to run, and `_expanded` ones to skip: the same arrays, the operator spelled out in others.
COUNTS = {
    "BatchNormalization": (4, 0),
    "GroupNormalization": (2, 2),
    "InstanceNormalization": (2, 0),
    "LayerNormalization": (19, 38),
    "RMSNormalization": (19, 19),
}


def load():
    """Returns the cases that hold one of our operators, and the names of all cases."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # ONNX makes the arrays of all operators, casts that overflow
        cases = loader.load_node_model_tests()
    ours = [c for c in cases if any(node.op_type in OURS for node in c.model.graph.node)]
    return {c.name: c for c in ours}, [c.name for c in cases]


CASES, NAMES = load()


def test_no_case_is_left_out():
    operator = {name: case.model.graph.node[0].op_type for name, case in CASES.items()}
    run = collections.Counter(operator.values())
    skipped = [name.partition("_expanded") for name in NAMES if name not in CASES]
    expanded = collections.Counter(operator[n] for n, mark, _ in skipped if mark and n in operator)
    assert {name: (run[name], expanded[name]) for name in OURS} == COUNTS


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    case = CASES[name]
    [node] = case.model.graph.node
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    [(inputs, outputs)] = case.data_sets
    ours = OURS[node.op_type](*inputs, **options)
    assert len(ours) == len(outputs) == len(node.output)
    for y, expected in zip(ours, outputs, strict=True):
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
