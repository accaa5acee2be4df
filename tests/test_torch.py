"""PyTorch in float64: the same outputs, gradients and running statistics, to 1e-9."""

import jax
import numpy as np
import pytest

import normax

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("x64")
C = 6  # features, on axis 1 unless they trail
SHAPES = pytest.mark.parametrize("shape", [(4, C, 5), (3, C, 4, 2)], ids=["3d", "4d"])


def draw(shape, parameters, seed=0):
    """Returns x, far from mean 0 and variance 1, then a scale and a bias of one shape."""
    rng = np.random.default_rng(seed)
    return rng.normal(3, 2, shape), rng.normal(1, 0.5, parameters), rng.normal(0, 1, parameters)


def close(ours, theirs):
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-9, atol=1e-9)


def agree(ours, theirs, *arrays, **options):
    """Compares outputs, and the vjps of all arrays; returns what else `ours` returned, if any."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    y, vjp, *aux = jax.vjp(ours, *arrays, **options)
    close(y, expected)
    ct = np.random.default_rng(1).normal(size=y.shape)
    gradients = torch.autograd.grad(expected, tensors, torch.tensor(ct))
    for left, right in zip(vjp(jax.numpy.asarray(ct)), gradients, strict=True):
        close(left, right)
    return aux


@pytest.mark.parametrize("shape", [(8, C), (4, C, 5), (3, C, 4, 2)], ids=["2d", "3d", "4d"])
def test_batch_norm_trains_and_infers(shape):
    stats = normax.RunningStats.create(C, np.float64)
    mean, var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)

    def ours(training):
        return lambda x, scale, bias: normax.batch_norm(
            x,
            stats,
            scale,
            bias,
            use_running_average=not training,
            feature_axes=1,
            momentum=1 - 0.3,
            unbiased=True,
        )

    def theirs(training):
        return lambda x, scale, bias: F.batch_norm(x, mean, var, scale, bias, training, 0.3)

    for step in range(3):
        arrays = draw(shape, C, seed=step)
        [stats] = agree(ours(True), theirs(True), *arrays, has_aux=True)
        close(stats.mean, mean)
        close(stats.var, var)
    [same] = agree(ours(False), theirs(False), *draw(shape, C, seed=3), has_aux=True)
    close(same.mean, mean)
    close(same.var, var)


@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norm(axes):
    shape = (3, 4, 5)
    x, scale, bias = draw(shape, shape[-axes:])
    trailing = tuple(range(-axes, 0))
    agree(
        lambda x, scale, bias: normax.layer_norm(
            x, scale, bias, reduction_axes=trailing, feature_axes=trailing, epsilon=1e-5
        ),
        lambda x, scale, bias: F.layer_norm(x, shape[-axes:], scale, bias, 1e-5),
        *(x, scale, bias),
    )


@pytest.mark.parametrize("axes", [1, 2])
def test_rms_norm(axes):
    shape = (3, 4, 5)
    x, scale, _ = draw(shape, shape[-axes:])
    trailing = tuple(range(-axes, 0))
    agree(
        lambda x, scale: normax.rms_norm(
            x, scale, reduction_axes=trailing, feature_axes=trailing, epsilon=1e-5
        ),
        lambda x, scale: F.rms_norm(x, shape[-axes:], scale, 1e-5),
        *(x, scale),
    )


@SHAPES
@pytest.mark.parametrize("groups", [1, 2, C])
def test_group_norm(shape, groups):
    agree(
        lambda x, scale, bias: normax.group_norm(
            x, scale, bias, num_groups=groups, feature_axes=1, epsilon=1e-5
        ),
        lambda x, scale, bias: F.group_norm(x, groups, scale, bias, 1e-5),
        *draw(shape, C),
    )


@SHAPES
def test_instance_norm(shape):
    agree(
        lambda x, scale, bias: normax.instance_norm(x, scale, bias, feature_axes=1, epsilon=1e-5),
        lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=1e-5),
        *draw(shape, C),
    )


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weight_norm(axis):
    # PyTorch's kernel has its outputs first, and its g has the rank of the kernel.
    layer = torch.nn.Conv1d(4, C, 3, dtype=torch.float64)
    weight = torch.nn.utils.parametrizations.weight_norm(layer, dim=axis).parametrizations.weight
    v, _, _ = draw((C, 4, 3), ())
    g = np.linspace(1, 2, weight.original0.numel()).reshape(() if axis is None else -1)
    agree(
        lambda v, g: normax.weight_norm(v, g, feature_axes=axis),
        lambda v, g: weight[0](g.reshape(weight.original0.shape), v),
        *(v, g),
    )


@pytest.mark.parametrize("name", ["layer", "batch", "group", "instance"])
def test_double_backward(name):
    # With a scale: without one PyTorch's own double backward is wrong (pytorch#79705).
    x, scale, bias = draw((4, C, 5), C)
    stats = normax.RunningStats.create(C, np.float64)
    first = {"feature_axes": 1, "epsilon": 1e-5}
    ours, theirs = {
        "layer": (
            lambda x, s, b: normax.layer_norm(x, s, b, reduction_axes=(1, 2), **first),
            lambda x, s, b: F.layer_norm(x, x.shape[1:]) * s[:, None] + b[:, None],
        ),
        "batch": (
            lambda x, s, b: normax.batch_norm(x, stats, s, b, use_running_average=False, **first)[
                0
            ],
            lambda x, s, b: F.batch_norm(x, None, None, s, b, True),
        ),
        "group": (
            lambda x, s, b: normax.group_norm(x, s, b, num_groups=2, **first),
            lambda x, s, b: F.group_norm(x, 2, s, b),
        ),
        "instance": (
            lambda x, s, b: normax.instance_norm(x, s, b, **first),
            lambda x, s, b: F.instance_norm(x, weight=s, bias=b),
        ),
    }[name]
    ct = np.random.default_rng(1).normal(size=x.shape)
    tensors = [torch.tensor(value, requires_grad=True) for value in (x, scale, bias)]
    gradients = torch.autograd.grad(theirs(*tensors), tensors, torch.tensor(ct), create_graph=True)
    expected = torch.autograd.grad(sum((g**3).sum() for g in gradients), tensors[:2])

    def energy(x, scale):
        grads = jax.vjp(ours, x, scale, jax.numpy.asarray(bias))[1](jax.numpy.asarray(ct))
        return sum((g**3).sum() for g in grads)

    for left, right in zip(jax.grad(energy, (0, 1))(x, scale), expected, strict=True):
        close(left, right)
