"""Normalizers of activations, as nnx modules."""

from typing import Any

from flax import nnx
from flax.nnx.module import first_from

from normax import axes, options
from normax.nnx.plumbing import NO_METADATA, Promoting, create_parameters, signed, value_of

_NO_MODE = (
    "BatchNorm: expected use_running_average (True at inference, False in training) at the call, "
    "in the constructor, or by model.train(), model.eval() or nnx.view, and got None in all"
)


class _Module(Promoting):
    """The constructor of a normalizer with a scale and a bias.

    Args:
      num_features: length of the feature axis; several for several axes.
      rngs: random keys for the initializers.
      promote_dtype: Flax's function of the input and parameters; it decides the output's dtype.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
    """

    scale: nnx.Param | None
    bias: nnx.Param | None
    normalize: Any

    def __init__(
        self,
        num_features,
        *,
        rngs,
        promote_dtype=Promoting.promote_dtype,
        bias_metadata=NO_METADATA,
        scale_metadata=NO_METADATA,
        **options,
    ):
        super().__init__(**options)
        self.num_features = num_features
        self.promote_dtype = promote_dtype
        shape = axes.feature_shape(num_features)
        create_parameters(self, shape, rngs, bias_metadata, scale_metadata)

    def __call__(self, x, mask=None):
        """Returns the normalized input; entries where `mask` is False read as absent."""
        return self.normalize(x, value_of(self.scale), value_of(self.bias), mask=mask)


@signed
@options.documented
class BatchNorm(_Module, options.BatchNormOptions, nnx.Module):
    """Batch normalization; `flax.nnx.BatchNorm`, over `normax.batch_norm`.

    Variables: `scale` and `bias`, of type `nnx.Param`; `mean`, `var` and with `momentum=None`
    `count`, of type `nnx.BatchStat`, float32 or, if that is wider, of the `dtype` given: complex
    input needs `dtype=jnp.complex64`. It starts in training, as Flax's does.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = norm(x)
      >>> norm.eval()
      >>> y = norm(x)
    """

    def __init__(self, num_features, *, use_running_average=False, rngs, **options):
        super().__init__(
            num_features, use_running_average=use_running_average, rngs=rngs, **options
        )
        key = rngs.params() if self.needs_key() else None
        start = self.create_stats(key, axes.feature_shape(num_features), self.stats_dtype())
        self.mean = nnx.BatchStat(start.mean)
        self.var = nnx.BatchStat(start.var)
        self.count = nnx.BatchStat(start.count) if self.momentum is None else nnx.data(None)

    def __call__(self, x, use_running_average=None, *, mask=None):
        """Returns the normalized input; in training the running statistics move.

        Args:
          x: array of any rank, floating-point or complex.
          use_running_average: here, or as the module was told before.
          mask: booleans that broadcast to `x.shape`; False entries read as absent.
        """
        use_running_average = first_from(
            use_running_average, self.use_running_average, error_msg=_NO_MODE
        )
        stats = self.stats(self.mean[...], self.var[...], value_of(self.count))
        scale, bias = value_of(self.scale), value_of(self.bias)
        y, new = self.normalize_and_remember(
            x, stats, scale, bias, use_running_average=use_running_average, mask=mask
        )
        if not use_running_average:
            self.mean[...] = new.mean
            self.var[...] = new.var
            if self.count is not None:
                self.count[...] = new.count
        return y

    def set_view(self, use_running_average: bool | None = None):
        """Sets the mode, for `nnx.view`.

        Args:
          use_running_average: True at inference, False in training; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


@signed
@options.documented
class LayerNorm(_Module, options.LayerNormOptions, nnx.Module):
    """Layer normalization; `flax.nnx.LayerNorm`, over `normax.layer_norm`.

    Variables: `scale` and `bias`, of type `nnx.Param`.

    Example:
      >>> import jax, normax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.LayerNorm(3, rngs=nnx.Rngs(0))
      >>> bool((norm(x) == normax.layer_norm(x, norm.scale[...], norm.bias[...])).all())
      True
    """


@signed
@options.documented
class RMSNorm(_Module, options.RMSNormOptions, nnx.Module):
    """Root mean square normalization; `flax.nnx.RMSNorm`, over `normax.rms_norm`.

    Variables: `scale`, of type `nnx.Param`.

    Example:
      >>> import jax, normax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.RMSNorm(3, rngs=nnx.Rngs(0))
      >>> bool((norm(x) == normax.rms_norm(x, norm.scale[...])).all())
      True
    """


@signed
@options.documented
class GroupNorm(_Module, options.GroupNormOptions, nnx.Module):
    """Group normalization; `flax.nnx.GroupNorm`, over `normax.group_norm`.

    Variables: `scale` and `bias`, of type `nnx.Param`.

    Example:
      >>> import jax, normax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
      >>> norm = nn.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
      >>> scale, bias = norm.scale[...], norm.bias[...]
      >>> bool((norm(x) == normax.group_norm(x, scale, bias, num_groups=3)).all())
      True
    """

    def __init__(self, num_features, num_groups=32, group_size=None, *, rngs, **options):
        super().__init__(
            num_features, num_groups=num_groups, group_size=group_size, rngs=rngs, **options
        )
        self.check_features(num_features)


@signed
@options.documented
class InstanceNorm(_Module, options.InstanceNormOptions, nnx.Module):
    """Instance normalization; `flax.nnx.InstanceNorm`, over `normax.instance_norm`.

    Variables: `scale` and `bias`, of type `nnx.Param`.

    Example:
      >>> import jax, normax, normax.nnx as nn
      >>> from flax import nnx
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
      >>> norm = nn.InstanceNorm(6, rngs=nnx.Rngs(0))
      >>> bool((norm(x) == normax.instance_norm(x, norm.scale[...], norm.bias[...])).all())
      True
    """
