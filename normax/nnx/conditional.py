"""Modules that a condition drives, as nnx modules."""

from typing import Any

from flax import nnx

from normax import options
from normax.nnx.activations import Sizeless
from normax.nnx.plumbing import signed


@signed
@options.documented
class AdaptiveInstanceNorm(Sizeless, options.AdaptiveInstanceNormOptions, nnx.Module):
    """The mean and deviation of another input; over `normax.adaptive_instance_norm`.

    Variables: none. It is called with the input and the style.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x, style = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
      >>> nn.AdaptiveInstanceNorm(rngs=nnx.Rngs(0))(x, style).shape
      (4, 8, 3)
    """


class _Projected(options.Projected):
    """A module with a linear layer of the condition for each number that it needs."""

    def _create(self, condition_features, num_features, rngs):
        """Gives a module its linear layers."""
        for name in self.projections:
            linear = nnx.Linear(
                condition_features,
                num_features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                rngs=rngs,
            )
            setattr(self, name, linear)

    def _project(self, condition):
        """Yields what the condition gives, by name."""
        for name in self.projections:
            yield getattr(self, name)(condition)


@signed
@options.documented
class FiLM(_Projected, options.FiLMOptions, nnx.Module):
    """A scale and bias for each example, of its condition; over `normax.film`.

    Variables: a kernel and a bias in each of `scale` and `bias`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> film = nn.FiLM(5, 3, rngs=nnx.Rngs(0))
      >>> film(jax.numpy.ones((4, 8, 3)), jax.numpy.ones((4, 5))).shape
      (4, 8, 3)

    Options of nnx:
      condition_features: length of the condition.
      num_features: length of the feature axis.
      rngs: random keys for the initializers.
    """

    def __init__(self, condition_features, num_features, *, rngs, **kwargs):
        super().__init__(**kwargs)
        self._create(condition_features, num_features, rngs)

    def __call__(self, x, condition):
        """Returns the rescaled input.

        Args:
          x: array of rank 2 or more, floating-point; batch first, features last.
          condition: array of shape `(x.shape[0], n)`.
        """
        return self._modulate(x, *self._project(condition))


@signed
@options.documented
class AdaLNZero(_Projected, options.AdaLNZeroOptions, nnx.Module):
    """A block between a layer norm and a sum, driven by a condition; over `normax.adaln_zero`.

    Variables: those of the block, in `layer_instance`, and a kernel and a bias in each of `scale`,
    `bias` and `gate`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
      >>> block = nn.AdaLNZero(linear, 5, 3, rngs=nnx.Rngs(1))
      >>> x = jax.numpy.ones((4, 8, 3))
      >>> bool((block(x, jax.numpy.ones((4, 5))) == x).all())
      True

    Options of nnx:
      condition_features: length of the condition.
      num_features: length of the feature axis.
      rngs: random keys for the initializers.
    """

    layer_instance: Any

    def __init__(self, layer_instance, condition_features, num_features, *, rngs, **kwargs):
        super().__init__(layer_instance=layer_instance, **kwargs)
        self._create(condition_features, num_features, rngs)

    def __call__(self, x, condition, *args, mask=None, **kwargs):
        """Returns `x`, batch first and features last, and what the block adds to it.

        The condition is of shape `(x.shape[0], n)`, in the paper through SiLU; the mask is as in
        `adaln_zero`; the other arguments are for the block, after its input.
        """

        def block(value):
            return self.layer_instance(value, *args, **kwargs)

        return self._modulate(x, block, mask, *self._project(condition))
