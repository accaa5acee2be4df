"""PyTorch in float64 as the oracle: outputs, state and gradients."""

import jax
import numpy as np
import pytest

import normax

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
X, CT = RNG.normal(3, 2, (4, 6, 5)), RNG.normal(size=(4, 6, 5))
SCALE, BIAS = RNG.normal(1, 0.3, 6), RNG.normal(size=6)
LAST_SCALE, LAST_BIAS = RNG.normal(1, 0.3, 5), RNG.normal(size=5)


def check(ours, theirs, *arrays):
    """Compares values and the gradients of every argument."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    ct = np.resize(CT, tuple(expected.shape))
    expected.backward(torch.tensor(ct))
    y, vjp = jax.vjp(ours, *arrays)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    for left, right in zip(vjp(jax.numpy.asarray(ct)), tensors, strict=True):
        np.testing.assert_allclose(left, right.grad.numpy(), rtol=1e-9, atol=1e-9)


def test_layer_norm():
    check(
        lambda x, s, b: normax.layer_norm(x, s, b, epsilon=1e-5),
        lambda x, s, b: F.layer_norm(x, (5,), s, b),
        X,
        LAST_SCALE,
        LAST_BIAS,
    )


def test_rms_norm():
    check(
        lambda x, s: normax.rms_norm(x, s, epsilon=1e-6),
        lambda x, s: F.rms_norm(x, (5,), s, 1e-6),
        X,
        LAST_SCALE,
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups):
    check(
        lambda x, s, b: normax.group_norm(x, s, b, num_groups=groups, feature_axes=1, epsilon=1e-5),
        lambda x, s, b: F.group_norm(x, groups, s, b),
        X,
        SCALE,
        BIAS,
    )


def test_instance_norm():
    check(
        lambda x, s, b: normax.instance_norm(x, s, b, feature_axes=1, epsilon=1e-5),
        lambda x, s, b: F.instance_norm(x, weight=s, bias=b),
        X,
        SCALE,
        BIAS,
    )


def test_batch_norm_in_training_and_at_inference():
    check(
        lambda x, s, b: normax.normalize_batch(x, s, b, feature_axes=1)[0],
        lambda x, s, b: F.batch_norm(x, None, None, s, b, training=True),
        X,
        SCALE,
        BIAS,
    )
    stats = normax.RunningStats.create(6, "float64")
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for step in range(3):
        # PyTorch's momentum is the weight of the new batch, and its variance is unbiased.
        _, stats = normax.batch_norm(
            X + step, stats, use_running_average=False, feature_axes=1, momentum=0.9, unbiased=True
        )
        F.batch_norm(torch.tensor(X + step), mean, var, training=True, momentum=0.1)
        np.testing.assert_allclose(stats.mean, mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(stats.var, var.numpy(), rtol=1e-12)
    check(
        lambda x, s, b: normax.batch_norm(x, stats, s, b, use_running_average=True, feature_axes=1)[
            0
        ],
        lambda x, s, b: F.batch_norm(x, mean, var, s, b),
        X,
        SCALE,
        BIAS,
    )


@pytest.mark.parametrize("axis", [0, 2])
def test_weight_norm(axis):
    g = RNG.uniform(1, 2, X.shape[axis])
    shape = [1, 1, 1]
    shape[axis] = -1
    check(
        lambda v, g: normax.weight_norm(v, g, feature_axes=axis),
        lambda v, g: torch._weight_norm(v, g.reshape(shape), axis),
        X,
        g,
    )
