"""Normalizers of weights, as linen modules around a layer."""

import dataclasses
from collections.abc import Iterable

import jax
from flax import linen as nn

from normax import options


def _call_with(module, transform, *args, **kwargs):
    """Calls the layer of a wrapper with each of its parameters transformed, given its path."""

    def transform_all(params):
        return jax.tree.map_with_path(
            lambda path, value: transform(_name(module, path), value), params
        )

    mapped = nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        trans_in_fn=transform_all,
        init=module.is_initializing(),
    )
    return mapped(module.layer_instance)


def _name(module, path):
    """Returns the name of a parameter: that of the layer, then the path in it after `params`."""
    inner = jax.tree_util.keystr(path[1:], simple=True, separator="/")
    return f"{module.layer_instance.name}/{inner}"


class Weights(nn.Module):
    """A layer called with weights that are normalized as they stand.

    Options of linen:
      variable_filter: normalize the parameters whose path contains one of these; None is all.
    """

    variable_filter: Iterable | None = dataclasses.field(default_factory=lambda: {"kernel"})

    @nn.compact
    def __call__(self, *args, **kwargs):
        """Calls the layer with its weights normalized."""
        return _call_with(self, self._normalize_at, *args, **kwargs)

    def _normalize_at(self, name, value):
        if self.variable_filter and not any(part in name for part in self.variable_filter):
            return value
        scale = None
        if self.use_scale:
            shape = self._scale_shape(value)
            scale = self.param(f"{name}/scale", self.scale_init, shape, self.param_dtype)
        return self._normalize(value, scale)


@options.documented
class WeightNorm(Weights, options.WeightNormOptions):
    """A layer with weights of learned length; `flax.linen.WeightNorm`, over `normax.weight_norm`.

    Variables: those of the layer, and in this module's `params` a scale for each weight, named by
    its path: `Dense_0/kernel/scale`; a layer without a name is `layer_instance`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> layer = nn.WeightNorm(flax.linen.Dense(2), use_scale=True)
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> params["layer_instance/kernel/scale"].shape
      (2,)

    Options of linen:
      variable_filter: normalize the parameters whose path contains one of these; None is all.
    """


@options.documented
class CenteredWeightNorm(Weights, options.CenteredWeightNormOptions):
    """A layer with weights of mean 0 and learned length; over `normax.centered_weight_norm`.

    Variables: those of the layer, and in this module's `params` a scale for each weight, named by
    its path: `Dense_0/kernel/scale`; a layer without a name is `layer_instance`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> layer = nn.CenteredWeightNorm(flax.linen.Dense(2), use_scale=True)
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> params["layer_instance/kernel/scale"].shape
      (2,)

    Options of linen:
      variable_filter: normalize the parameters whose path contains one of these; None is all.
    """


@options.documented
class WeightStandardization(Weights, options.WeightStandardizationOptions):
    """A layer with standardized weights; over `normax.weight_standardization`.

    Variables: those of the layer, and in this module's `params` a scale for each weight, named by
    its path: `Dense_0/kernel/scale`; a layer without a name is `layer_instance`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> layer = nn.WeightStandardization(flax.linen.Dense(2), use_scale=True)
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> params["layer_instance/kernel/scale"].shape
      (2,)

    Options of linen:
      variable_filter: normalize the parameters whose path contains one of these; None is all.
    """


@options.documented
class ScaledWeightStandardization(Weights, options.ScaledWeightStandardizationOptions):
    """A layer that keeps the variance; over `normax.scaled_weight_standardization`.

    Variables: those of the layer, and in this module's `params` a scale for each weight, named by
    its path: `Dense_0/kernel/scale`; a layer without a name is `layer_instance`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> layer = nn.ScaledWeightStandardization(flax.linen.Dense(2), use_scale=True)
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> params["layer_instance/kernel/scale"].shape
      (2,)

    Options of linen:
      variable_filter: normalize the parameters whose path contains one of these; None is all.
    """


@options.documented
class SpectralNorm(options.SpectralNormOptions, nn.Module):
    """A layer with weights of largest singular value 1; `flax.linen.SpectralNorm`.

    Over `normax.spectral_norm`, for every parameter of rank 2 or more. Variables: those of the
    layer, and in this module's `batch_stats` the state of the iteration for each weight, named by
    its path: `Dense_0/kernel/u` and `Dense_0/kernel/sigma`.

    Example:
      >>> import flax.linen, jax, normax.linen as nn
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> layer = nn.SpectralNorm(flax.linen.Dense(2))
      >>> variables = layer.init(jax.random.key(1), x, update_stats=False)
      >>> y, updates = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
      >>> sorted(updates["batch_stats"])
      ['layer_instance/kernel/sigma', 'layer_instance/kernel/u']
    """

    @nn.compact
    def __call__(self, *args, update_stats: bool, **kwargs):
        """Calls the layer with its weights normalized.

        Args:
          *args: for the layer.
          update_stats: whether to keep the iteration's state, in training; the collection must
            then be mutable.
          **kwargs: for the layer.
        """

        def normalize(name, value):
            return self._normalize_at(name, value, update_stats)

        return _call_with(self, normalize, *args, **kwargs)

    def _normalize_at(self, name, value, update_stats):
        if not self._applies_to(value):
            return value
        where = self.collection_name
        start = None
        if not self.has_variable(where, f"{name}/u"):
            start = self._create_state(self.make_rng("params"), value)
        u = self.variable(where, f"{name}/u", getattr, start, "u")
        sigma = self.variable(where, f"{name}/sigma", getattr, start, "sigma")
        weight, new = self._normalize(value, u.value, sigma.value)
        if update_stats:
            u.value, sigma.value = new
        return weight
