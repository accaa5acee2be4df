"""Normalizers of activations, as linen modules."""

from flax import linen as nn

from normax import axes, options

_COUNTED = ("mean", "var", "count")


def _parameters(module, x):
    """Returns the scale and bias of a module; None for one it does not use."""
    shape, dtype = module.feature_shape(x), module.param_dtype
    scale = module.param("scale", module.scale_init, shape, dtype) if module.use_scale else None
    bias = module.param("bias", module.bias_init, shape, dtype) if module.use_bias else None
    return scale, bias


class _Stateless(nn.Module):
    """A normalizer that remembers nothing."""

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns the normalized input; entries where `mask` is False read as absent."""
        return self.normalize(x, *_parameters(self, x), mask=mask)


@options.documented
class BatchNorm(options.BatchNormOptions, nn.Module):
    """Batch normalization; `flax.linen.BatchNorm`, over `normax.batch_norm`.

    Variables: `params/scale`, `params/bias`, `batch_stats/mean`, `batch_stats/var`, and with
    `momentum=None` `batch_stats/count`. Initialization leaves the running statistics alone and
    needs no `axis_name`.

    Example:
      >>> import jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> norm = nn.BatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(1), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> jax.tree.map(lambda leaf: leaf.shape, updates)
      {'batch_stats': {'mean': (3,), 'var': (3,)}}
    """

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        """Returns the normalized input; in training `batch_stats` must be mutable.

        Args:
          x: array of any rank, floating-point or complex.
          use_running_average: here or in the constructor.
          mask: booleans that broadcast to `x.shape`; False entries read as absent.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        scale, bias = _parameters(self, x)
        stats = self._stats(x, counted=not use_running_average or self.is_initializing())
        if self.is_initializing() and not use_running_average:
            return self.normalize_first(x, scale, bias, mask=mask)
        values = self.stats(**{name: variable.value for name, variable in stats.items()})
        y, new = self.normalize_and_remember(
            x, values, scale, bias, use_running_average=use_running_average, mask=mask
        )
        if not use_running_average:
            for name, variable in stats.items():
                variable.value = getattr(new, name)
        return y

    def _stats(self, x, counted):
        """Returns the variables of the running statistics by name; inference needs no count."""
        names = ("mean", "var") if self.momentum is not None or not counted else _COUNTED
        there = [name for name in names if self.has_variable("batch_stats", name)]
        axes.check_all_or_none("BatchNorm", "batch_stats", there, names)
        start = None
        if not there:
            key = self.make_rng("params") if self.needs_key() else None
            start = self.create_stats(key, self.feature_shape(x), self.stats_dtype(x))
        return {name: self.variable("batch_stats", name, getattr, start, name) for name in names}


@options.documented
class LayerNorm(options.LayerNormOptions, _Stateless):
    """Layer normalization; `flax.linen.LayerNorm`, over `normax.layer_norm`.

    Variables: `params/scale`, `params/bias`.

    Example:
      >>> import jax, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> y, variables = nn.LayerNorm().init_with_output(jax.random.key(1), x)
      >>> bool((y == normax.layer_norm(x, **variables["params"])).all())
      True
    """


@options.documented
class RMSNorm(options.RMSNormOptions, _Stateless):
    """Root mean square normalization; `flax.linen.RMSNorm`, over `normax.rms_norm`.

    Variables: `params/scale`.

    Example:
      >>> import jax, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> y, variables = nn.RMSNorm().init_with_output(jax.random.key(1), x)
      >>> bool((y == normax.rms_norm(x, **variables["params"])).all())
      True
    """


@options.documented
class GroupNorm(options.GroupNormOptions, _Stateless):
    """Group normalization; `flax.linen.GroupNorm`, over `normax.group_norm`.

    Variables: `params/scale`, `params/bias`.

    Example:
      >>> import jax, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
      >>> y, variables = nn.GroupNorm(num_groups=3).init_with_output(jax.random.key(1), x)
      >>> bool((y == normax.group_norm(x, **variables["params"], num_groups=3)).all())
      True
    """


@options.documented
class InstanceNorm(options.InstanceNormOptions, _Stateless):
    """Instance normalization; `flax.linen.InstanceNorm`, over `normax.instance_norm`.

    Variables: `params/scale`, `params/bias`.

    Example:
      >>> import jax, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
      >>> y, variables = nn.InstanceNorm().init_with_output(jax.random.key(1), x)
      >>> bool((y == normax.instance_norm(x, **variables["params"])).all())
      True
    """
