"""Normalizers of activations beyond Flax's, as linen modules."""

from normax import options
from normax.linen.activations import Running, RunningWith, Stateless


@options.documented
class BatchRenorm(options.BatchRenormOptions, Running):
    """Batch renormalization; over `normax.batch_renorm`.

    Variables: `params/scale`, `params/bias`, `batch_stats/mean`, `batch_stats/var`, and with a
    schedule
    `batch_stats/steps`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.BatchRenorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class GhostBatchNorm(options.GhostBatchNormOptions, Running):
    """Batch normalization of ghost batches; over `normax.ghost_batch_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.GhostBatchNorm(ghost_size=4, use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class RunningInstanceNorm(options.RunningInstanceNormOptions, Running):
    """Instance normalization with running statistics; over `normax.running_instance_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> norm = nn.RunningInstanceNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (2, 8, 3)
    """


@options.documented
class MeanOnlyBatchNorm(options.MeanOnlyBatchNormOptions, Running):
    """Batch normalization without the deviation; over `normax.mean_only_batch_norm`.

    Variables: those of `BatchNorm`, without a scale.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.MeanOnlyBatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class VarianceOnlyBatchNorm(options.VarianceOnlyBatchNormOptions, Running):
    """Batch normalization without the mean; over `normax.variance_only_batch_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.VarianceOnlyBatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class PowerNorm(options.PowerNormOptions, Running):
    """Power normalization: running statistics in both passes; over `normax.power_norm`.

    Variables: `params/scale`, `params/bias`, `params/drift`, the mean square `batch_stats/var`, and
    with a warm-up or a schedule `batch_stats/steps`. The drift is what the backward pass remembers:
    train with `normax.overwrite_drift(optimizer)`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.PowerNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class SwitchableNorm(options.SwitchableNormOptions, Running):
    """A learned mixture of instance, layer and batch statistics; over `normax.switchable_norm`.

    Variables: those of `BatchNorm`, `mean_weights` and `var_weights`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.SwitchableNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class KalmanBatchNorm(options.KalmanBatchNormOptions, RunningWith):
    """Batch normalization with a prior from the layer below; over `normax.kalman_batch_norm`.

    Variables: those of `BatchNorm`. Called with the prior after the input, it returns the
    output and the mixture, which `normax.kalman_prior` takes further.

    Example:
      >>> import jax, jax.numpy as jnp, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = normax.Moments(jnp.full(3, 8), jnp.zeros(3), jnp.ones(3))
      >>> norm = nn.KalmanBatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x, told)
      >>> (y, mixture), updates = norm.apply(variables, x, told, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class DomainBatchNorm(options.DomainBatchNormOptions, RunningWith):
    """Batch normalization domain by domain; over `normax.domain_batch_norm`.

    Variables: those of `BatchNorm`, the statistics with a row for each domain. Called with the
    domains' ids after the input.

    Example:
      >>> import jax, jax.numpy as jnp, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = jnp.arange(8) % 2
      >>> norm = nn.DomainBatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x, told)
      >>> y, updates = norm.apply(variables, x, told, mutable=["batch_stats"])
      >>> y.shape
      (8, 3)
    """


@options.documented
class EvoNormB0(options.EvoNormB0Options, Running):
    """EvoNorm-B0, of batch and instance; over `normax.evonorm_b0`.

    Variables: those of `BatchNorm`, and `slope`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.EvoNormB0(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class EvoNormS0(options.EvoNormS0Options, Stateless):
    """EvoNorm-S0, of groups; over `normax.evonorm_s0`.

    Variables: `scale`, `bias`, `slope`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 4))
      >>> norm = nn.EvoNormS0(num_groups=2)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 5, 4)
    """


@options.documented
class FilterResponseNorm(options.FilterResponseNormOptions, Stateless):
    """Filter response normalization with its threshold; over `normax.filter_response_norm`.

    Variables: `scale`, `bias`, `threshold`, and if asked for `learned_epsilon`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.FilterResponseNorm()
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class GlobalResponseNorm(options.GlobalResponseNormOptions, Stateless):
    """Global response normalization; over `normax.global_response_norm`.

    Variables: `scale`, `bias`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.GlobalResponseNorm()
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class LocalResponseNorm(options.LocalResponseNormOptions, Stateless):
    """Local response normalization; over `normax.local_response_norm`.

    Variables: none.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.LocalResponseNorm(size=3)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class DivisiveNorm(options.DivisiveNormOptions, Stateless):
    """Divisive normalization among neighbours; over `normax.divisive_norm`.

    Variables: `scale`, `bias`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.DivisiveNorm(window=(3, 3))
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 5, 3)
    """


@options.documented
class L2Norm(options.L2NormOptions, Stateless):
    """Vectors of one length, which is learned: ScaleNorm; over `normax.l2_norm`.

    Variables: `scale`, one number.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.L2Norm()
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 3)
    """


@options.documented
class DynamicTanh(options.DynamicTanhOptions, Stateless):
    """A squashing function in place of a normalizer; over `normax.dynamic_tanh`.

    Variables: `scale`, `bias`, and `alpha`, one number.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.DynamicTanh()
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y = norm.apply(variables, x)
      >>> y.shape
      (8, 3)
    """


@options.documented
class SegmentNorm(options.SegmentNormOptions, Stateless):
    """Graph normalization: of the rows of each segment; over `normax.segment_norm`.

    Variables: `scale`, `bias`, `mean_scale`. Called with the segments' ids after the input.

    Example:
      >>> import jax, jax.numpy as jnp, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = jnp.arange(8) % 2
      >>> norm = nn.SegmentNorm(num_segments=2)
      >>> variables = norm.init(jax.random.key(1), x, told)
      >>> y = norm.apply(variables, x, told)
      >>> y.shape
      (8, 3)
    """


class Adding(Stateless):
    """A norm of a sum."""

    def __call__(self, x, residual, *, mask=None, **given):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the normalized sum, and the sum.

        Args:
          x: the input.
          residual: what it is added to, of its shape.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent from the norm.
          **given: arrays in place of parameters, by name and of their shape.
        """
        return super().__call__(x, residual, mask=mask, **given)


@options.documented
class AddLayerNorm(options.AddLayerNormOptions, Adding):
    """Adds a residual, and layer-normalizes the sum; over `normax.add_layer_norm`.

    Variables: `params/scale`, `params/bias`. Called with the residual after the
    input, it returns the output and the sum.

    Example:
      >>> import jax, normax.linen as nn
      >>> x, residual = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> (y, total), _ = nn.AddLayerNorm().init_with_output(jax.random.key(1), x, residual)
      >>> bool((total == x + residual).all())
      True
    """


@options.documented
class AddRMSNorm(options.AddRMSNormOptions, Adding):
    """Adds a residual, and divides the sum by its root mean square; over `normax.add_rms_norm`.

    Variables: `params/scale`. Called with the residual after the
    input, it returns the output and the sum.

    Example:
      >>> import jax, normax.linen as nn
      >>> x, residual = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> (y, total), _ = nn.AddRMSNorm().init_with_output(jax.random.key(1), x, residual)
      >>> bool((total == x + residual).all())
      True
    """
