"""Normalizers of activations beyond Flax's, as nnx modules."""

from flax import nnx

from normax import options
from normax.nnx.activations import Running, RunningWith, Sizeless, Stateless
from normax.nnx.plumbing import signed


@signed
@options.documented
class BatchRenorm(Running, options.BatchRenormOptions, nnx.Module):
    """Batch renormalization; over `normax.batch_renorm`.

    Variables: `scale`, `bias`, `mean`, `var`, and with a schedule
    `steps`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.BatchRenorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class GhostBatchNorm(Running, options.GhostBatchNormOptions, nnx.Module):
    """Batch normalization of ghost batches; over `normax.ghost_batch_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.GhostBatchNorm(3, ghost_size=4, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class RunningInstanceNorm(Running, options.RunningInstanceNormOptions, nnx.Module):
    """Instance normalization with running statistics; over `normax.running_instance_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> norm = nn.RunningInstanceNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (2, 8, 3)
    """


@signed
@options.documented
class MeanOnlyBatchNorm(Running, options.MeanOnlyBatchNormOptions, nnx.Module):
    """Batch normalization without the deviation; over `normax.mean_only_batch_norm`.

    Variables: those of `BatchNorm`, without a scale.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.MeanOnlyBatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class VarianceOnlyBatchNorm(Running, options.VarianceOnlyBatchNormOptions, nnx.Module):
    """Batch normalization without the mean; over `normax.variance_only_batch_norm`.

    Variables: those of `BatchNorm`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.VarianceOnlyBatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class PowerNorm(Running, options.PowerNormOptions, nnx.Module):
    """Power normalization: running statistics in both passes; over `normax.power_norm`.

    Variables: `scale`, `bias`, `drift`, the mean square `var`, and with a warm-up or a schedule
    `steps`. The drift is what the backward pass remembers: train with
    `normax.overwrite_drift(optimizer)`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.PowerNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class SwitchableNorm(Running, options.SwitchableNormOptions, nnx.Module):
    """A learned mixture of instance, layer and batch statistics; over `normax.switchable_norm`.

    Variables: those of `BatchNorm`, `mean_weights` and `var_weights`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.SwitchableNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class KalmanBatchNorm(RunningWith, options.KalmanBatchNormOptions, nnx.Module):
    """Batch normalization with a prior from the layer below; over `normax.kalman_batch_norm`.

    Variables: those of `BatchNorm`. Called with the prior after the input, it returns the
    output and the mixture, which `normax.kalman_prior` takes further.

    Example:
      >>> import jax, jax.numpy as jnp, normax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = normax.Moments(jnp.full(3, 8), jnp.zeros(3), jnp.ones(3))
      >>> norm = nn.KalmanBatchNorm(3, rngs=nnx.Rngs(0))
      >>> y, mixture = norm(x, told)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class DomainBatchNorm(RunningWith, options.DomainBatchNormOptions, nnx.Module):
    """Batch normalization domain by domain; over `normax.domain_batch_norm`.

    Variables: those of `BatchNorm`, the statistics with a row for each domain. Called with the
    domains' ids after the input.

    Example:
      >>> import jax, jax.numpy as jnp, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = jnp.arange(8) % 2
      >>> norm = nn.DomainBatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x, told)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class EvoNormB0(Running, options.EvoNormB0Options, nnx.Module):
    """EvoNorm-B0, of batch and instance; over `normax.evonorm_b0`.

    Variables: those of `BatchNorm`, and `slope`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.EvoNormB0(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class EvoNormS0(Stateless, options.EvoNormS0Options, nnx.Module):
    """EvoNorm-S0, of groups; over `normax.evonorm_s0`.

    Variables: `scale`, `bias`, `slope`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 4))
      >>> norm = nn.EvoNormS0(4, num_groups=2, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 4)
    """


@signed
@options.documented
class FilterResponseNorm(Stateless, options.FilterResponseNormOptions, nnx.Module):
    """Filter response normalization with its threshold; over `normax.filter_response_norm`.

    Variables: `scale`, `bias`, `threshold`, and if asked for `learned_epsilon`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.FilterResponseNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class GlobalResponseNorm(Stateless, options.GlobalResponseNormOptions, nnx.Module):
    """Global response normalization; over `normax.global_response_norm`.

    Variables: `scale`, `bias`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.GlobalResponseNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class LocalResponseNorm(Sizeless, options.LocalResponseNormOptions, nnx.Module):
    """Local response normalization; over `normax.local_response_norm`.

    Variables: none.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.LocalResponseNorm(size=3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class DivisiveNorm(Stateless, options.DivisiveNormOptions, nnx.Module):
    """Divisive normalization among neighbours; over `normax.divisive_norm`.

    Variables: `scale`, `bias`.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 5, 3))
      >>> norm = nn.DivisiveNorm(3, window=(3, 3), rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 5, 3)
    """


@signed
@options.documented
class L2Norm(Sizeless, options.L2NormOptions, nnx.Module):
    """Vectors of one length, which is learned: ScaleNorm; over `normax.l2_norm`.

    Variables: `scale`, one number.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.L2Norm(rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class DynamicTanh(Stateless, options.DynamicTanhOptions, nnx.Module):
    """A squashing function in place of a normalizer; over `normax.dynamic_tanh`.

    Variables: `scale`, `bias`, and `alpha`, one number.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.DynamicTanh(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> y.shape
      (8, 3)
    """


@signed
@options.documented
class SegmentNorm(Stateless, options.SegmentNormOptions, nnx.Module):
    """Graph normalization: of the rows of each segment; over `normax.segment_norm`.

    Variables: `scale`, `bias`, `mean_scale`. Called with the segments' ids after the input.

    Example:
      >>> import jax, jax.numpy as jnp, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> told = jnp.arange(8) % 2
      >>> norm = nn.SegmentNorm(3, num_segments=2, rngs=nnx.Rngs(0))
      >>> y = norm(x, told)
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


@signed
@options.documented
class AddLayerNorm(Adding, options.AddLayerNormOptions, nnx.Module):
    """Adds a residual, and layer-normalizes the sum; over `normax.add_layer_norm`.

    Variables: `scale` and `bias`, of type `nnx.Param`. Called with the residual after the
    input, it returns the output and the sum.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x, residual = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> y, total = nn.AddLayerNorm(3, rngs=nnx.Rngs(0))(x, residual)
      >>> bool((total == x + residual).all())
      True
    """


@signed
@options.documented
class AddRMSNorm(Adding, options.AddRMSNormOptions, nnx.Module):
    """Adds a residual, and divides the sum by its root mean square; over `normax.add_rms_norm`.

    Variables: `scale`, of type `nnx.Param`. Called with the residual after the
    input, it returns the output and the sum.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x, residual = jax.random.normal(jax.random.key(0), (2, 8, 3))
      >>> y, total = nn.AddRMSNorm(3, rngs=nnx.Rngs(0))(x, residual)
      >>> bool((total == x + residual).all())
      True
    """
