"""What the normalizers that Flax has are, whatever the framework."""

from typing import ClassVar

from normax import axes as ax
from normax.batch import batch_norm, normalize_batch
from normax.group import group_norm
from normax.layer import instance_norm, layer_norm, rms_norm
from normax.options.fields import (
    Activated,
    Affine,
    FeatureAxes,
    GroupAxes,
    Groups,
    Implemented,
    LayerAxes,
    Normalizer,
    Pooled,
    Scaled,
    options,
    shifted,
)
from normax.options.running import RunningNormalizer


# In all of these the fields come in the order of the bases from last to first.
@options
class BatchNormOptions(Activated, Implemented, RunningNormalizer, Pooled, Affine):
    """What a `BatchNorm` is.

    Args:
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
      epsilon_on: add epsilon to the "variance", inside the root, or to the "deviation".
    """

    _function = staticmethod(batch_norm)
    epsilon: float = 1e-5
    unbiased: bool = False
    epsilon_on: str = "variance"

    def _normalize_first(self, x, parameters, state, *args, mask=None):
        """Returns the input normalized by its own statistics, on this device, and keeps none."""
        y, _ = normalize_batch(
            x,
            **parameters,
            feature_axes=self.axis,
            mask=mask,
            dtype=self._output_dtype(x, *parameters.values()),
            **self._passed_on(normalize_batch, but=("axis_name", "axis_index_groups")),
        )
        return y


@options
class LayerNormOptions(Activated, Implemented, Normalizer, Pooled, LayerAxes, Affine):
    """What a `LayerNorm` is."""

    _function = staticmethod(layer_norm)


@options
class RMSNormOptions(Activated, Implemented, Normalizer, Pooled, LayerAxes, Scaled):
    """What an `RMSNorm` is.

    Args:
      scale_offset: added to the scale, which then starts at what `scale_init` gives less this: 1
        for checkpoints that hold the scale less one.
    """

    _function = staticmethod(rms_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale",)
    scale_offset: float = 0.0

    def _parameters(self, features):
        """Yields the scale, less what is added to it."""
        for name, init, shape in super()._parameters(features):
            yield name, (shifted(init, -self.scale_offset) if self.scale_offset else init), shape


@options
class GroupNormOptions(Activated, Implemented, Normalizer, Pooled, GroupAxes, Affine, Groups):
    """What a `GroupNorm` is.

    Args:
      feature_axes: the one axis of features.
    """

    _function = staticmethod(group_norm)
    feature_axes: ax.Axes = -1

    def _check_features(self, features):
        """Refuses groups that `features` cannot be split into."""
        ax.group_count("GroupNorm", features, self.num_groups, self.group_size)


@options
class InstanceNormOptions(Activated, Implemented, Normalizer, Pooled, FeatureAxes, Affine):
    """What an `InstanceNorm` is."""

    _function = staticmethod(instance_norm)
