"""Modules that a condition drives, as linen modules."""

from flax import linen as nn

from normax import options
from normax.linen.activations import Stateless


@options.documented
class AdaptiveInstanceNorm(options.AdaptiveInstanceNormOptions, Stateless):
    """The mean and deviation of another input; over `normax.adaptive_instance_norm`.

    Variables: none. It is called with the input and the style.

    Example:
      >>> import jax, normax.linen as nn
      >>> x, style = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
      >>> norm = nn.AdaptiveInstanceNorm()
      >>> norm.apply(norm.init(jax.random.key(1), x, style), x, style).shape
      (4, 8, 3)
    """


class _Projected(nn.Module):
    """A module with a linear layer of the condition for each number that it needs."""

    def _project(self, x, condition):
        """Yields what the condition gives for x, by name."""
        for name in self.projections:
            dense = nn.Dense(
                self._features(x),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )
            yield dense(condition)


@options.documented
class FiLM(options.FiLMOptions, _Projected):
    """A scale and bias for each example, of its condition; over `normax.film`.

    Variables: a kernel and a bias in each of `params/scale` and `params/bias`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x, condition = jax.numpy.ones((4, 8, 3)), jax.numpy.ones((4, 5))
      >>> film = nn.FiLM()
      >>> params = film.init(jax.random.key(0), x, condition)["params"]
      >>> params["scale"]["kernel"].shape
      (5, 3)
    """

    @nn.compact
    def __call__(self, x, condition):
        """Returns the rescaled input.

        Args:
          x: array of rank 2 or more, floating-point; batch first, features last.
          condition: array of shape `(x.shape[0], n)`.
        """
        return self._modulate(x, *self._project(x, condition))


@options.documented
class AdaLNZero(options.AdaLNZeroOptions, _Projected):
    """A block between a layer norm and a sum, driven by a condition; over `normax.adaln_zero`.

    Variables: those of the block, in `params/layer_instance`, and a kernel and a bias in each of
    `params/scale`, `params/bias` and `params/gate`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x, condition = jax.numpy.ones((4, 8, 3)), jax.numpy.ones((4, 5))
      >>> block = nn.AdaLNZero(flax.linen.Dense(3))
      >>> y, variables = block.init_with_output(jax.random.key(0), x, condition)
      >>> bool((y == x).all())
      True
    """

    @nn.compact
    def __call__(self, x, condition, *args, mask=None, **kwargs):
        """Returns the input, and what the block adds to it.

        Args:
          x: array of rank 2 or more, floating-point; batch first, features last.
          condition: array of shape `(x.shape[0], n)`; the paper's has been through SiLU.
          *args: for the block, after its input.
          mask: as in `adaln_zero`.
          **kwargs: for the block.
        """

        def block(value):
            return self.layer_instance(value, *args, **kwargs)

        return self._modulate(x, block, mask, *self._project(x, condition))
