"""What a normalizer of weights is, whatever the framework."""

from typing import Any, ClassVar

from normax import axes as ax
from normax.kernel import (
    centered_weight_norm,
    scaled_weight_standardization,
    weight_standardization,
)
from normax.options.fields import Output, PowerIteration, Scaled, Wrapper, options
from normax.weight import SpectralState, spectral_norm, weight_norm


@options
class WeightsOptions(Scaled, Wrapper):
    """What a normalizer of weights is that remembers nothing.

    Args:
      feature_axes: axes whose entries are normalized, and scaled, by themselves: those of the
        outputs, and for stacked layers that of the stack.
    """

    _function: ClassVar[Any]
    feature_axes: ax.Axes | None = -1

    def _scale_shape(self, value):
        """Returns the shape of the scale of a weight."""
        axes = () if self.feature_axes is None else self.feature_axes
        return ax.shape_along(type(self).__name__, "feature_axes", axes, value)

    def _normalize(self, value, scale):
        """Returns the weight normalized, and scaled."""
        return self._function(
            value,
            scale,
            feature_axes=self.feature_axes,
            epsilon=self.epsilon,
            dtype=self._output_dtype(value, scale),
        )


@options
class WeightNormOptions(WeightsOptions):
    """What a `WeightNorm` is; with `feature_axes=None` the whole weight has one length."""

    _function = staticmethod(weight_norm)
    epsilon: float = 1e-12


@options
class CenteredWeightNormOptions(WeightsOptions):
    """What a `CenteredWeightNorm` is."""

    _function = staticmethod(centered_weight_norm)
    epsilon: float = 1e-5


@options
class WeightStandardizationOptions(WeightsOptions):
    """What a `WeightStandardization` is."""

    _function = staticmethod(weight_standardization)
    epsilon: float = 1e-5
    use_scale: bool = False


@options
class ScaledWeightStandardizationOptions(WeightsOptions):
    """What a `ScaledWeightStandardization` is."""

    _function = staticmethod(scaled_weight_standardization)
    epsilon: float = 1e-4


@options
class SpectralNormOptions(Output, PowerIteration):
    """What a `SpectralNorm` is.

    Args:
      error_on_non_matrix: refuse weights of rank above 2 instead of flattening leading axes.
      collection_name: the collection of linen that holds the iteration's state.
      bound: divide only what is larger than this, to this; None brings every weight to 1.
    """

    epsilon: float = 1e-12
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"
    bound: float | None = None

    def _applies_to(self, value):
        """Returns whether a parameter is a weight to normalize."""
        return self.n_steps > 0 and ax.is_weight(value, self.error_on_non_matrix)

    def _create_state(self, key, value):
        """Returns the iteration's state before any."""
        return SpectralState.create(key, value.shape[-1], self.param_dtype)

    def _normalize(self, value, u, sigma):
        """Returns the weight over its largest singular value, and the iteration's state."""
        return spectral_norm(
            value,
            SpectralState(u, sigma),
            n_steps=self.n_steps,
            bound=self.bound,
            epsilon=self.epsilon,
            dtype=self._output_dtype(value, u),
        )
