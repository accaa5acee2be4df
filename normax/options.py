"""The options of the modules: spelled, defaulted and documented once for linen and nnx.

A module is one of these classes, which knows how to call the pure function, and the plumbing of
parameters and state, which is all that `normax.linen` and `normax.nnx` add. Names, order, meaning
and defaults are Flax's; what Flax lacks comes last.
"""

import dataclasses
import inspect
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.nn import initializers

from normax import axes as ax
from normax.batch import batch_norm, normalize_batch
from normax.group import group_norm
from normax.layer import instance_norm, layer_norm, rms_norm
from normax.moments import RunningStats
from normax.weight import SpectralState, spectral_norm, weight_norm

Initializer = Any


@dataclass_transform(eq_default=False)
def options(cls):
    """Makes a class a set of options; equality and representation are left to the module."""
    return dataclasses.dataclass(eq=False, repr=False)(cls)


def documented(module):
    """Appends the options' documentation to a module's docstring."""
    sections = [
        inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].rstrip()
        for cls in reversed(module.__mro__)
        if "__dataclass_fields__" in vars(cls) and cls.__module__ == __name__
    ]
    body = "\n".join(section for section in sections if section)
    module.__doc__ = f"{inspect.cleandoc(module.__doc__)}\n\nOptions:\n{body}\n"
    return module


@options
class Output:
    """Options of the output.

    Args:
      epsilon: added to the variance, inside the root.
      dtype: dtype of the output; None is what the input and the parameters promote to.
      param_dtype: dtype that the parameters are created with.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def output_dtype(self, x, *params):
        """Returns the dtype of the output, by Flax's rule."""
        return ax.result_dtype(self.dtype, x, *params)


@options
class _Affine(Output):
    """Options of scale and bias.

    Args:
      use_bias: whether there is a bias.
      use_scale: whether there is a scale; a linear layer that follows can do without.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
    """

    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones


@options
class _Scaled(Output):
    """Options of a scale.

    Args:
      use_scale: whether there is a scale.
      scale_init: initializer of the scale.
    """

    use_bias: ClassVar[bool] = False
    use_scale: bool = True
    scale_init: Initializer = initializers.ones


@options
class _Pooled:
    """Options of statistics over devices.

    Args:
      axis_name: name, or names, of a mapped axis over which statistics are pooled, by count.
      axis_index_groups: groups of device indices that pool among themselves.
      use_fast_variance: taken for Flax's sake; the variance is always the accurate one.
      force_float32_reductions: False keeps running statistics in `param_dtype`, as in Flax;
        reductions are in float32 at least, whatever this says.
    """

    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True


@options
class _LayerAxes:
    """Options of which axes.

    Args:
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale and bias of their own.
    """

    reduction_axes: ax.Axes = -1
    feature_axes: ax.Axes = -1


@options
class _FeatureAxes:
    """Options of which features.

    Args:
      feature_axes: axes that keep statistics, a scale and a bias of their own.
    """

    feature_axes: ax.Axes = -1


@options
class _Groups:
    """Options of which groups.

    Args:
      num_groups: number of groups; it must divide the number of features.
      group_size: features in a group, in place of `num_groups`, which then must be None.
    """

    num_groups: int | None = 32
    group_size: int | None = None


@options
class _GroupAxes:
    """Options of which axes.

    Args:
      reduction_axes: axes that are summarised together, the feature axis among them; every axis
        but the leading one by default.
    """

    reduction_axes: ax.Axes | None = None


@options
class _Running:
    """Options of running statistics.

    Args:
      use_running_average: True at inference, False in training; here or at the call.
      axis: axis or axes that keep statistics, a scale and a bias of their own.
      momentum: weight of the past; None makes the running statistics those of all data seen, and
        keeps their count beside them.
    """

    use_running_average: bool | None = None
    axis: ax.Axes = -1
    momentum: float | None = 0.99


# In all of these the fields come in the order of the bases from last to first.
@options
class BatchNormOptions(_Pooled, _Affine, _Running):
    """What a `BatchNorm` is.

    Args:
      mean_init: initializer of the running mean.
      var_init: initializer of the running variance.
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
    """

    epsilon: float = 1e-5
    mean_init: Initializer = initializers.zeros
    var_init: Initializer = initializers.ones
    unbiased: bool = False

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

    def normalize(self, x, stats, scale, bias, *, use_running_average, mask=None):
        """Returns the normalized input and the new running statistics."""
        return batch_norm(
            x,
            stats,
            scale,
            bias,
            use_running_average=use_running_average,
            feature_axes=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            unbiased=self.unbiased,
            dtype=self.output_dtype(x, scale, bias),
        )


@options
class LayerNormOptions(_Pooled, _LayerAxes, _Affine):
    """What a `LayerNorm` is."""

    def feature_shape(self, x):
        """Returns the shape of the parameters."""
        return ax.shape_along("LayerNorm", "feature_axes", self.feature_axes, x)

    def normalize(self, x, scale, bias, *, mask=None):
        """Returns the normalized input."""
        return layer_norm(
            x,
            scale,
            bias,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.output_dtype(x, scale, bias),
        )


@options
class RMSNormOptions(_Pooled, _LayerAxes, _Scaled):
    """What an `RMSNorm` is."""

    def feature_shape(self, x):
        """Returns the shape of the parameters."""
        return ax.shape_along("RMSNorm", "feature_axes", self.feature_axes, x)

    def normalize(self, x, scale, bias=None, *, mask=None):
        """Returns the normalized input; there is no bias."""
        return rms_norm(
            x,
            scale,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.output_dtype(x, scale, bias),
        )


@options
class GroupNormOptions(_Pooled, _GroupAxes, _Affine, _Groups):
    """What a `GroupNorm` is.

    Args:
      feature_axes: the one axis of features.
    """

    feature_axes: ax.Axes = -1

    def feature_shape(self, x):
        """Returns the shape of the parameters."""
        return ax.shape_along("GroupNorm", "feature_axes", self.feature_axes, x)

    def check_features(self, features):
        """Refuses groups that `features` cannot be split into."""
        ax.group_count("GroupNorm", features, self.num_groups, self.group_size)

    def normalize(self, x, scale, bias, *, mask=None):
        """Returns the normalized input."""
        return group_norm(
            x,
            scale,
            bias,
            num_groups=self.num_groups,
            group_size=self.group_size,
            feature_axes=self.feature_axes,
            reduction_axes=self.reduction_axes,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.output_dtype(x, scale, bias),
        )


@options
class InstanceNormOptions(_Pooled, _FeatureAxes, _Affine):
    """What an `InstanceNorm` is."""

    def feature_shape(self, x):
        """Returns the shape of the parameters."""
        return ax.shape_along("InstanceNorm", "feature_axes", self.feature_axes, x)

    def normalize(self, x, scale, bias, *, mask=None):
        """Returns the normalized input."""
        return instance_norm(
            x,
            scale,
            bias,
            feature_axes=self.feature_axes,
            epsilon=self.epsilon,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.output_dtype(x, scale, bias),
        )


@options
class _Wrapper:
    """Options of a module around a module.

    Args:
      layer_instance: the layer whose weights are normalized.
    """

    layer_instance: Any


@options
class WeightNormOptions(_Scaled, _Wrapper):
    """What a `WeightNorm` is.

    Args:
      feature_axes: axes whose entries have a length of their own; None gives the whole one.
    """

    epsilon: float = 1e-12
    feature_axes: ax.Axes | None = -1

    def scale_shape(self, value):
        """Returns the shape of the lengths of a weight."""
        axes = () if self.feature_axes is None else self.feature_axes
        return ax.shape_along("WeightNorm", "feature_axes", axes, value)

    def normalize(self, value, scale):
        """Returns the weight with its lengths replaced by the scale."""
        return weight_norm(
            value,
            scale,
            feature_axes=self.feature_axes,
            epsilon=self.epsilon,
            dtype=self.output_dtype(value, scale),
        )


@options
class _PowerIteration(_Wrapper):
    """Options of a power iteration.

    Args:
      n_steps: power iterations at each call; 0 leaves the weights as they are.
    """

    n_steps: int = 1


@options
class SpectralNormOptions(Output, _PowerIteration):
    """What a `SpectralNorm` is.

    Args:
      error_on_non_matrix: refuse weights of rank above 2 instead of flattening leading axes.
      collection_name: the collection of linen that holds the iteration's state.
    """

    epsilon: float = 1e-12
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    def applies_to(self, value):
        """Returns whether a parameter is a weight to normalize."""
        return self.n_steps > 0 and ax.is_weight(value, self.error_on_non_matrix)

    def create_state(self, key, value):
        """Returns the iteration's state before any."""
        return SpectralState.create(key, value.shape[-1], self.param_dtype)

    def normalize(self, value, u, sigma):
        """Returns the weight over its largest singular value, and the iteration's state."""
        return spectral_norm(
            value,
            SpectralState(u, sigma),
            n_steps=self.n_steps,
            epsilon=self.epsilon,
            dtype=self.output_dtype(value, u),
        )
