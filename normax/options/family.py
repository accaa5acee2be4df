"""What the normalizers beyond Flax's are, whatever the framework."""

from typing import Any, ClassVar

from jax.nn import initializers

from normax import axes as ax
from normax.evonorm import evonorm_b0, evonorm_s0
from normax.ghost import ghost_batch_norm
from normax.instance import running_instance_norm
from normax.kalman import kalman_batch_norm
from normax.length import dynamic_tanh, l2_norm
from normax.options.fields import (
    Affine,
    Devices,
    FeatureAxes,
    Groups,
    Implemented,
    Initializer,
    LayerAxes,
    Normalizer,
    Output,
    Scaled,
    options,
)
from normax.options.running import RunningNormalizer
from normax.partial import mean_only_batch_norm, variance_only_batch_norm
from normax.renorm import batch_renorm
from normax.residual import add_layer_norm, add_rms_norm
from normax.response import (
    divisive_norm,
    filter_response_norm,
    global_response_norm,
    local_response_norm,
)
from normax.segment import domain_batch_norm, segment_norm
from normax.switchable import switchable_norm


@options
class BatchRenormOptions(RunningNormalizer, Devices, Affine):
    """What a `BatchRenorm` is.

    Args:
      r_max: largest correction of the deviation; a number, or a function of the number of training
        steps, such as a schedule of optax.
      d_max: largest correction of the mean, likewise.
    """

    _function = staticmethod(batch_renorm)
    scheduled: ClassVar[tuple[str, ...]] = ("momentum", "r_max", "d_max")
    epsilon: float = 1e-3
    r_max: Any = 3.0
    d_max: Any = 5.0


@options
class GhostBatchNormOptions(RunningNormalizer, Affine):
    """What a `GhostBatchNorm` is.

    Args:
      ghost_size: examples in a ghost batch, at most.
      axis_name: name, or names, of a mapped axis over which statistics are pooled, by count.
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
    """

    _function = staticmethod(ghost_batch_norm)
    epsilon: float = 1e-5
    ghost_size: int = 128
    axis_name: Any = None
    unbiased: bool = False


@options
class RunningInstanceNormOptions(RunningNormalizer, Devices, Affine):
    """What a `RunningInstanceNorm` is.

    Args:
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
    """

    _function = staticmethod(running_instance_norm)
    epsilon: float = 1e-5
    momentum: Any = 0.9
    unbiased: bool = False


@options
class MeanOnlyBatchNormOptions(RunningNormalizer, Devices, Output):
    """What a `MeanOnlyBatchNorm` is.

    Args:
      use_bias: whether there is a bias.
      bias_init: initializer of the bias.
    """

    _function = staticmethod(mean_only_batch_norm)
    epsilon: ClassVar[Any] = None  # nothing is divided by a deviation
    learned: ClassVar[tuple[str, ...]] = ("bias",)
    use_bias: bool = True
    bias_init: Initializer = initializers.zeros


@options
class VarianceOnlyBatchNormOptions(RunningNormalizer, Devices, Affine):
    """What a `VarianceOnlyBatchNorm` is.

    Args:
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
    """

    _function = staticmethod(variance_only_batch_norm)
    epsilon: float = 1e-5
    unbiased: bool = False


@options
class SwitchableNormOptions(RunningNormalizer, Devices, Affine):
    """What a `SwitchableNorm` is.

    Args:
      mean_weights_init: initializer of the logits of the means.
      var_weights_init: initializer of the logits of the variances.
      num_statistics: 3 for instance, layer and batch; 2 where there is no axis between batch and
        features.
    """

    _function = staticmethod(switchable_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "mean_weights", "var_weights")
    epsilon: float = 1e-5
    momentum: Any = 0.9
    mean_weights_init: Initializer = initializers.ones
    var_weights_init: Initializer = initializers.ones
    num_statistics: int = 3

    def _parameters(self, features):
        """Yields the parameters; logits there are one for each kind of statistics."""
        for name, init, shape in super()._parameters(features):
            yield name, init, (self.num_statistics,) if name.endswith("_weights") else shape


@options
class KalmanBatchNormOptions(RunningNormalizer, Devices, Affine):
    """What a `KalmanBatchNorm` is.

    Args:
      prior_weight: weight of the prior in the mixture; a number, or a function of the number of
        training steps.
      largest_ratio: the ratio of variances from which on the prior is left out.
    """

    _function = staticmethod(kalman_batch_norm)
    scheduled: ClassVar[tuple[str, ...]] = ("momentum", "prior_weight")
    epsilon: float = 1e-5
    momentum: Any = 0.9
    prior_weight: Any = 0.9
    largest_ratio: float = 100.0

    def _state_names(self, training=True) -> tuple[str, ...]:
        """Returns what is kept; of the mixture that inference gives the count is a part."""
        names = super()._state_names(training)
        return names if training or self.momentum is not None else (*names, "count")


@options
class DomainBatchNormOptions(RunningNormalizer, Affine):
    """What a `DomainBatchNorm` is.

    Args:
      num_domains: how many domains have statistics of their own.
      axis_name: name, or names, of a mapped axis over which statistics are pooled, by count.
      unbiased: remember the variance times n / (n - 1), as PyTorch does.
    """

    _function = staticmethod(domain_batch_norm)
    epsilon: float = 1e-5
    num_domains: int = 2
    axis_name: Any = None
    unbiased: bool = False

    def _stats_shape(self, features):
        """Returns the shape of the running statistics: a row for each domain."""
        return (self.num_domains, *features)

    def _axes_passed_on(self):
        """Returns nothing: the features are last."""
        ax.check_choice("DomainBatchNorm", "axis", self.axis, (-1,))
        return {}


@options
class Sloped(Output):
    """Options of a slope.

    Args:
      use_slope: whether the slope is learned; it is one otherwise.
      slope_init: initializer of the slope.
    """

    use_slope: bool = True
    slope_init: Initializer = initializers.ones


@options
class EvoNormB0Options(RunningNormalizer, Devices, Affine, Sloped):
    """What an `EvoNormB0` is."""

    _function = staticmethod(evonorm_b0)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "slope")
    epsilon: float = 1e-5
    momentum: Any = 0.9


@options
class EvoNormS0Options(Normalizer, FeatureAxes, Affine, Sloped, Groups):
    """What an `EvoNormS0` is."""

    _function = staticmethod(evonorm_s0)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "slope")
    epsilon: float = 1e-5


@options
class FilterResponseNormOptions(Normalizer, Devices, FeatureAxes, Affine):
    """What a `FilterResponseNorm` is.

    Args:
      use_threshold: whether there is a threshold.
      use_learned_epsilon: whether a learned number is added to epsilon, for features without axes
        between them and the batch.
      threshold_init: initializer of the threshold.
      learned_epsilon_init: initializer of that number.
    """

    _function = staticmethod(filter_response_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "threshold", "learned_epsilon")
    use_threshold: bool = True
    use_learned_epsilon: bool = False
    threshold_init: Initializer = initializers.zeros
    learned_epsilon_init: Initializer = initializers.constant(1e-4)


@options
class GlobalResponseNormOptions(Normalizer, FeatureAxes, Affine):
    """What a `GlobalResponseNorm` is: the identity, before training."""

    _function = staticmethod(global_response_norm)
    scale_init: Initializer = initializers.zeros


@options
class LocalResponseNormOptions(Normalizer, FeatureAxes, Output):
    """What a `LocalResponseNorm` is.

    Args:
      size: features in the window.
      alpha: weight of the mean square.
      beta: exponent.
      k: added inside the power.
    """

    _function = staticmethod(local_response_norm)
    epsilon: ClassVar[Any] = None  # nothing is divided by a deviation
    learned: ClassVar[tuple[str, ...]] = ()
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0


@options
class DivisiveNormOptions(Normalizer, FeatureAxes, Affine):
    """What a `DivisiveNorm` is.

    Args:
      window: length of the window along each axis after the first.
    """

    _function = staticmethod(divisive_norm)
    epsilon: float = 1.0
    window: tuple[int, ...] = ()


@options
class L2NormOptions(Normalizer, Output):
    """What an `L2Norm` is.

    Args:
      reduction_axes: axes of a vector.
      use_scale: whether there is a scale, one number for all.
      scale_init: initializer of the scale.
    """

    _function = staticmethod(l2_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale",)
    scalars: ClassVar[tuple[str, ...]] = ("scale",)
    epsilon: float = 1e-12
    reduction_axes: ax.Axes = -1
    use_scale: bool = True
    scale_init: Initializer = initializers.ones


@options
class DynamicTanhOptions(Normalizer, FeatureAxes, Affine):
    """What a `DynamicTanh` is.

    Args:
      alpha_init: initializer of the slope, one number for all.
    """

    _function = staticmethod(dynamic_tanh)
    epsilon: ClassVar[Any] = None  # nothing is divided by a deviation
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "alpha")
    scalars: ClassVar[tuple[str, ...]] = ("alpha",)
    alpha_init: Initializer = initializers.constant(0.5)


@options
class Adding(Implemented, Normalizer, LayerAxes):
    """What a norm of a sum is."""

    def _dtype_for(self, x, parameters, *args):
        """Returns the dtype that x, the residual and the parameters promote to."""
        return self._output_dtype(x, *args, *parameters.values())


@options
class AddLayerNormOptions(Adding, Affine):
    """What an `AddLayerNorm` is."""

    _function = staticmethod(add_layer_norm)


@options
class AddRMSNormOptions(Adding, Scaled):
    """What an `AddRMSNorm` is."""

    _function = staticmethod(add_rms_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale",)


@options
class SegmentNormOptions(Normalizer, FeatureAxes, Affine):
    """What a `SegmentNorm` is.

    Args:
      num_segments: number of segments, static.
      num_groups: groups of neighbouring features that share statistics; None: each has its own.
      centered: subtract the mean; False divides by the root mean square.
      use_mean_scale: whether the mean of a feature is scaled before it is subtracted; that of a
        group is not.
      mean_scale_init: initializer of that scale.
    """

    _function = staticmethod(segment_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "mean_scale")
    epsilon: float = 1e-5
    num_segments: int = 1
    num_groups: int | None = None
    centered: bool = True
    use_mean_scale: bool = True
    mean_scale_init: Initializer = initializers.ones

    def _parameters(self, features):
        """Yields the parameters; the mean of a group, or none, has no scale."""
        plain = self.num_groups is None and self.centered
        return (each for each in super()._parameters(features) if plain or each[0] != "mean_scale")
