"""Normalizers of activations that Flax has too, as nnx modules."""

from typing import Any

from flax import nnx
from flax.nnx.module import first_from

from normax import axes, options
from normax.nnx.plumbing import NO_METADATA, Promoting, create_parameters, parameters_of, signed

_NO_MODE = (
    "{}: expected use_running_average (True at inference, False in training) at the call, "
    "in the constructor, or by model.train(), model.eval() or nnx.view, and got None in all"
)


class Stateless(Promoting):
    """The constructor of a normalizer with learned parameters.

    Args:
      num_features: length of the feature axis; several for several axes.
      rngs: random keys for the initializers.
      promote_dtype: Flax's function of the input and parameters; it decides the output's dtype.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
    """

    _normalize: Any

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
        metadata = {"bias": bias_metadata, "scale": scale_metadata}
        create_parameters(self, axes.feature_shape(num_features), rngs, metadata)

    def __call__(self, x, *args, mask=None, **given):
        """Returns the normalized input.

        Args:
          x: the input.
          *args: what else the function takes by position, such as the ids of segments.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes.
        """
        return self._normalize(x, parameters_of(self, x, given), *args, mask=mask)


class Running(Stateless):
    """The constructor of a normalizer with running statistics."""

    mean: nnx.BatchStat
    var: nnx.BatchStat
    count: Any
    momentum: Any
    freeze_stats: bool
    _normalize_and_remember: Any
    _needs_key: Any
    _create_state: Any
    _stats_dtype: Any
    _state_names: Any

    def __init__(self, num_features, *, use_running_average=False, rngs, **options):
        super().__init__(
            num_features, use_running_average=use_running_average, rngs=rngs, **options
        )
        key = rngs.params() if self._needs_key() else None
        start = self._create_state(key, axes.feature_shape(num_features), self._stats_dtype())
        kept = self._state_names()
        for name in ("mean", "var", "count", "steps"):
            setattr(self, name, nnx.BatchStat(start[name]) if name in kept else nnx.data(None))

    def __call__(self, x, use_running_average=None, *, mask=None, **given):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the normalized input; in training the running statistics move.

        Args:
          x: array of any rank, floating-point or complex.
          use_running_average: here, or as the module was told before.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes.
        """
        return self._run(x, use_running_average, mask, given)

    def _run(self, x, use_running_average, mask, given, *args):
        use_running_average = first_from(
            use_running_average,
            self.use_running_average,
            error_msg=_NO_MODE.format(type(self).__name__),
        )
        state = {name: getattr(self, name)[...] for name in self._state_names()}
        masked = {} if mask is None else {"mask": mask}
        y, new = self._normalize_and_remember(
            x,
            parameters_of(self, x, given),
            state,
            *args,
            use_running_average=use_running_average,
            **masked,
        )
        if not use_running_average and not self.freeze_stats:
            for name in state:
                getattr(self, name)[...] = new[name]
        return y

    def set_view(self, use_running_average: bool | None = None):
        """Sets the mode, for `nnx.view`.

        Args:
          use_running_average: True at inference, False in training; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class RunningWith(Running):
    """The constructor of one that is told something else of each batch."""

    def __call__(self, x, told, use_running_average=None, *, mask=None, **given):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the normalized input; in training the running statistics move.

        Args:
          x: array, floating-point.
          told: what the function takes after the statistics: ids of domains, or a prior.
          use_running_average: here, or as the module was told before.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes.
        """
        return self._run(x, use_running_average, mask, given, told)


class Sizeless(Stateless):
    """The constructor of a normalizer without parameters of the features' shape.

    Args:
      rngs: random keys for the initializers.
      promote_dtype: Flax's function of the input and parameters; it decides the output's dtype.
      scale_metadata: metadata of the scale.
    """

    not_taken = ("num_features", "bias_metadata")

    def __init__(
        self,
        *,
        rngs,
        promote_dtype=Promoting.promote_dtype,
        scale_metadata=NO_METADATA,
        **options,
    ):
        super().__init__(
            (), rngs=rngs, promote_dtype=promote_dtype, scale_metadata=scale_metadata, **options
        )


@signed
@options.documented
class BatchNorm(Running, options.BatchNormOptions, nnx.Module):
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


@signed
@options.documented
class LayerNorm(Stateless, options.LayerNormOptions, nnx.Module):
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
class RMSNorm(Stateless, options.RMSNormOptions, nnx.Module):
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
class GroupNorm(Stateless, options.GroupNormOptions, nnx.Module):
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
        self._check_features(num_features)


@signed
@options.documented
class InstanceNorm(Stateless, options.InstanceNormOptions, nnx.Module):
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
