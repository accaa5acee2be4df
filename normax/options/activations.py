"""What a normalizer of activations is, whatever the framework."""

import jax
import jax.numpy as jnp
from jax.nn import initializers

from normax import axes as ax
from normax.batch import batch_norm, normalize_batch
from normax.group import group_norm
from normax.layer import instance_norm, layer_norm, rms_norm
from normax.moments import RunningStats
from normax.options.fields import (
    Affine,
    FeatureAxes,
    GroupAxes,
    Groups,
    Initializer,
    LayerAxes,
    Normalizer,
    Pooled,
    Running,
    Scaled,
    options,
)


# In all of these the fields come in the order of the bases from last to first.
@options
class BatchNormOptions(Normalizer, Pooled, Affine, Running):
    """What a `BatchNorm` is.

    Args:
      mean_init: initializer of the running mean.
      var_init: initializer of the running variance.
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
      nonfinite: "skip" leaves the running statistics of a feature as they were where those of the
        batch are not finite; "keep" lets NaN and inf in.
    """

    epsilon: float = 1e-5
    mean_init: Initializer = initializers.zeros
    var_init: Initializer = initializers.ones
    unbiased: bool = False
    nonfinite: str = "skip"

    def feature_shape(self, x):
        """Returns the shape of the parameters and statistics."""
        return ax.shape_along("BatchNorm", "axis", self.axis, x)

    def stats_dtype(self, x=None):
        """Returns the dtype of the running mean: float32 at least, whatever the input."""
        if not self.force_float32_reductions:
            return self.param_dtype
        return ax.result_dtype(None, *(d for d in (jnp.float32, x, self.dtype) if d is not None))

    def stats(self, mean, var, count=None):
        """Returns the running statistics that variables hold."""
        count = jnp.zeros(jnp.shape(mean), jnp.int32) if count is None else count
        return RunningStats(mean, var, count)

    def needs_key(self):
        """Returns whether the running statistics start anywhere but at 0 and 1."""
        return self.mean_init is not initializers.zeros or self.var_init is not initializers.ones

    def create_stats(self, key, shape, dtype):
        """Returns the running statistics before any data."""
        keys = (None, None) if key is None else jax.random.split(key)
        mean = self.mean_init(keys[0], shape, dtype)
        return self.stats(mean, self.var_init(keys[1], shape, ax.real_dtype(dtype)))

    def normalize_first(self, x, scale, bias, *, mask=None):
        """Returns the input normalized by its own statistics, on this device, and keeps none."""
        y, _ = normalize_batch(
            x,
            scale,
            bias,
            feature_axes=self.axis,
            epsilon=self.epsilon,
            mask=mask,
            dtype=self.output_dtype(x, scale, bias),
        )
        return y

    def normalize_and_remember(self, x, stats, scale, bias, *, use_running_average, mask=None):
        """Returns the normalized input and the new running statistics."""
        return batch_norm(
            x,
            stats,
            scale,
            bias,
            use_running_average=use_running_average,
            feature_axes=self.axis,
            mask=mask,
            dtype=self.output_dtype(x, scale, bias),
            **self.passed_on(batch_norm, but=("use_running_average",)),
        )


@options
class LayerNormOptions(Normalizer, Pooled, LayerAxes, Affine):
    """What a `LayerNorm` is."""

    function = staticmethod(layer_norm)


@options
class RMSNormOptions(Normalizer, Pooled, LayerAxes, Scaled):
    """What an `RMSNorm` is."""

    function = staticmethod(rms_norm)


@options
class GroupNormOptions(Normalizer, Pooled, GroupAxes, Affine, Groups):
    """What a `GroupNorm` is.

    Args:
      feature_axes: the one axis of features.
    """

    function = staticmethod(group_norm)
    feature_axes: ax.Axes = -1

    def check_features(self, features):
        """Refuses groups that `features` cannot be split into."""
        ax.group_count("GroupNorm", features, self.num_groups, self.group_size)


@options
class InstanceNormOptions(Normalizer, Pooled, FeatureAxes, Affine):
    """What an `InstanceNorm` is."""

    function = staticmethod(instance_norm)
