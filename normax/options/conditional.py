"""What a module is that a condition drives, whatever the framework."""

from typing import Any, ClassVar

from jax.nn import initializers

from normax import axes as ax
from normax.adaptive import adaln_zero, adaptive_instance_norm, film
from normax.options.fields import (
    FeatureAxes,
    Initializer,
    Normalizer,
    Output,
    Wrapper,
    options,
)


@options
class AdaptiveInstanceNormOptions(Normalizer, FeatureAxes, Output):
    """What an `AdaptiveInstanceNorm` is."""

    _function = staticmethod(adaptive_instance_norm)
    learned: ClassVar[tuple[str, ...]] = ()
    epsilon: float = 1e-5


@options
class Projected(Output):
    """Options of what is learned of the condition.

    Args:
      kernel_init: initializer of the kernels that the condition is projected by.
      bias_init: initializer of their biases.
    """

    projections: ClassVar[tuple[str, ...]]
    kernel_init: Initializer = initializers.zeros
    bias_init: Initializer = initializers.zeros

    def _features(self, x):
        """Returns how many numbers each projection gives."""
        ax.check_rank(type(self).__name__, "x", x, 2)
        return x.shape[-1]


@options
class FiLMOptions(Projected):
    """What a `FiLM` is: the identity, before training.

    Args:
      scale_offset: added to the scale that the condition gives.
    """

    projections: ClassVar[tuple[str, ...]] = ("scale", "bias")
    epsilon: ClassVar[Any] = None  # nothing is divided by a deviation
    scale_offset: float = 1.0

    def _modulate(self, x, scale, bias):
        """Returns x rescaled by what the condition gave."""
        dtype = self._output_dtype(x, scale, bias)
        return film(x, scale, bias, scale_offset=self.scale_offset, dtype=dtype)


@options
class AdaLNZeroOptions(Projected, Wrapper):
    """What an `AdaLNZero` is: the identity, before training."""

    projections: ClassVar[tuple[str, ...]] = ("scale", "bias", "gate")

    def _modulate(self, x, block, mask, scale, bias, gate):
        """Returns what the block adds to x, modulated and gated by what the condition gave."""
        dtype = self._output_dtype(x, scale, bias, gate)
        return adaln_zero(x, block, scale, bias, gate, epsilon=self.epsilon, mask=mask, dtype=dtype)
