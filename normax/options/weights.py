"""What a normalizer of weights is, whatever the framework."""

from normax import axes as ax
from normax.options.fields import Output, PowerIteration, Scaled, Wrapper, options
from normax.weight import SpectralState, spectral_norm, weight_norm


@options
class WeightNormOptions(Scaled, Wrapper):
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
class SpectralNormOptions(Output, PowerIteration):
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
