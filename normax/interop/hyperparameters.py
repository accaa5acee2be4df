"""Options of normalization layers of PyTorch and Keras, in normax's words."""

from typing import Any

import numpy as np


def options_of(layer: Any) -> dict[str, Any]:
    """Returns the options that make a module of normax do what a layer of PyTorch or Keras does.

    PyTorch's momentum is the weight of the new, and its running variance the unbiased one; Keras's
    are as here. Axes are those of `normax`, features last, for PyTorch; for Keras they stay. Those
    of PyTorch's LayerNorm and RMSNorm are the last, as there: where several are normalized and
    channels are moved last, its weights are of another layout, in `from_torch` too.

    Args:
      layer: of PyTorch a BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm, LayerNorm or RMSNorm;
        of Keras a BatchNormalization, GroupNormalization, LayerNormalization or RMSNormalization.

    Returns:
      Keyword arguments of the module of that name, in `normax.linen` or `normax.nnx`.

    Raises:
      TypeError: another layer.
      ValueError: a layer that keeps no running statistics, or keeps them where normax does not,
        `track_running_stats`; or averages batches, `momentum=None` of PyTorch; a LayerNormalization
        with `rms_scaling`, which is neither a layer norm nor an RMS norm.

    Example:
      >>> import types, normax.interop
      >>> class BatchNorm2d(types.SimpleNamespace):  # stands for PyTorch's
      ...     pass
      >>> layer = BatchNorm2d(eps=1e-5, momentum=0.1, affine=True, track_running_stats=True)
      >>> options = normax.interop.options_of(layer)
      >>> options["momentum"], options["unbiased"]
      (0.9, True)
    """
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    for names, options in _KINDS:
        if kinds & set(names):
            return options(layer)
    raise TypeError(
        "options_of: expected layer to be a normalization of PyTorch or Keras, got "
        f"{type(layer).__name__}"
    )


def _torch_batch(layer):
    if not layer.track_running_stats:
        raise ValueError(
            "options_of: expected a BatchNorm with track_running_stats, got one without: it uses "
            "the batch always; give use_running_average=False"
        )
    if layer.momentum is None:
        raise ValueError(
            "options_of: expected a BatchNorm with a momentum, got None: PyTorch averages batches "
            "then, each alike; momentum=None of normax has the statistics of all entries"
        )
    return {"momentum": 1 - layer.momentum, "unbiased": True, **_torch(layer)}


def _torch_instance(layer):
    if layer.track_running_stats:
        raise ValueError(
            "options_of: expected an InstanceNorm without track_running_stats, got one with"
        )
    return _torch(layer)


def _torch_group(layer):
    return {"num_groups": layer.num_groups, **_torch(layer)}


def _torch(layer):
    return {"epsilon": layer.eps, "use_scale": layer.affine, "use_bias": layer.affine}


def _torch_layer(layer):
    bias = getattr(layer, "bias", None) is not None
    return {**_torch_rms(layer), "use_bias": bias}


def _torch_rms(layer):
    axes = tuple(range(-len(layer.normalized_shape), 0))
    # PyTorch's default is the precision of the input.
    epsilon = float(np.finfo(np.float32).eps) if layer.eps is None else layer.eps
    axes = {"reduction_axes": axes, "feature_axes": axes}
    return {"epsilon": epsilon, "use_scale": layer.elementwise_affine, **axes}


def _keras_batch(layer):
    frozen = {} if layer.trainable else {"freeze_stats": True}
    return {"momentum": layer.momentum, "axis": layer.axis, **frozen, **_keras(layer)}


def _keras_group(layer):
    # Keras writes -1 for a group of each feature.
    grouped = {"group_size": 1, "num_groups": None} if layer.groups == -1 else {}
    groups = grouped or {"num_groups": layer.groups}
    return {**groups, **_keras(layer), "feature_axes": layer.axis}


def _keras_layer(layer):
    if getattr(layer, "rms_scaling", False):
        raise ValueError(
            "options_of: expected a LayerNormalization without rms_scaling, got one with: it "
            "divides by the deviation and does not centre"
        )
    return {**_keras(layer), **_keras_axes(layer)}


def _keras_rms(layer):
    return {"epsilon": layer.epsilon, **_keras_axes(layer)}


def _keras_axes(layer):
    axes = layer.axis
    axes = axes if isinstance(axes, int) else tuple(axes)
    return {"reduction_axes": axes, "feature_axes": axes}


def _keras(layer):
    return {"epsilon": layer.epsilon, "use_scale": layer.scale, "use_bias": layer.center}


_KINDS = (
    (("_BatchNorm",), _torch_batch),
    (("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), _torch_batch),
    (("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _torch_instance),
    (("GroupNorm",), _torch_group),
    (("LayerNorm",), _torch_layer),
    (("RMSNorm",), _torch_rms),
    (("BatchNormalization",), _keras_batch),
    (("GroupNormalization",), _keras_group),
    (("LayerNormalization",), _keras_layer),
    (("RMSNormalization",), _keras_rms),
)
