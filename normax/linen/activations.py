"""Normalizers of activations that Flax has too, as linen modules."""

from flax import linen as nn

from normax import axes, options


def parameters_of(module, x, given):
    """Returns the parameters of a module by name, those it uses, or what is given."""
    given = module._at_call(given)
    own = {
        name: module.param(name, init, shape, module.param_dtype)
        for name, init, shape in module._parameters(module._feature_shape(x))
        if name not in given
    }
    return {**own, **given}


class Stateless(nn.Module):
    """A normalizer that remembers nothing."""

    @nn.compact
    def __call__(self, x, *args, mask=None, **given):
        """Returns the normalized input.

        Args:
          x: the input.
          *args: what else the function takes by position, such as the ids of segments.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes; a parameter that is given is not created.
        """
        return self._normalize(x, parameters_of(self, x, given), *args, mask=mask)


class Running(nn.Module):
    """A normalizer with running statistics."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None, **given):
        """Returns the normalized input; in training `batch_stats` must be mutable.

        Args:
          x: array of any rank, floating-point or complex.
          use_running_average: here or in the constructor.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes; a parameter that is given is not created.
        """
        return self._run(x, use_running_average, mask, given)

    def _run(self, x, use_running_average, mask, given, *args):
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        parameters = parameters_of(self, x, given)
        training = not use_running_average
        state = self._kept(x, training or self.is_initializing())
        values = {name: variable.value for name, variable in state.items()}
        masked = {} if mask is None else {"mask": mask}
        if self.is_initializing() and training:
            return self._normalize_first(x, parameters, values, *args, **masked)
        y, new = self._normalize_and_remember(
            x, parameters, values, *args, use_running_average=use_running_average, **masked
        )
        if training and not self.freeze_stats:
            for name, variable in state.items():
                variable.value = new[name]
        return y

    def _kept(self, x, training):
        """Returns the variables of the state by name."""
        names = self._state_names(training)
        there = [name for name in names if self.has_variable("batch_stats", name)]
        axes.check_all_or_none(type(self).__name__, "batch_stats", there, names)
        start = {}
        if not there:
            key = self.make_rng("params") if self._needs_key() else None
            start = self._create_state(key, self._feature_shape(x), self._stats_dtype(x))
        return {name: self.variable("batch_stats", name, start.get, name) for name in names}


class RunningWith(Running):
    """A normalizer with running statistics that is told something else of each batch."""

    @nn.compact
    def __call__(self, x, told, use_running_average=None, *, mask=None, **given):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the normalized input; in training `batch_stats` must be mutable.

        Args:
          x: array, floating-point.
          told: what the function takes after the statistics: ids of domains, or a prior.
          use_running_average: here or in the constructor.
          mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries
            read as absent.
          **given: arrays in place of parameters, by name and of their shape, such as a `scale` that
            another network makes; a parameter that is given is not created.
        """
        return self._run(x, use_running_average, mask, given, told)


@options.documented
class BatchNorm(options.BatchNormOptions, Running):
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


@options.documented
class LayerNorm(options.LayerNormOptions, Stateless):
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
class RMSNorm(options.RMSNormOptions, Stateless):
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
class GroupNorm(options.GroupNormOptions, Stateless):
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
class InstanceNorm(options.InstanceNormOptions, Stateless):
    """Instance normalization; `flax.linen.InstanceNorm`, over `normax.instance_norm`.

    Variables: `params/scale`, `params/bias`.

    Example:
      >>> import jax, normax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 6))
      >>> y, variables = nn.InstanceNorm().init_with_output(jax.random.key(1), x)
      >>> bool((y == normax.instance_norm(x, **variables["params"])).all())
      True
    """
