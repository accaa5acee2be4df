"""Normalizers of weights, as nnx modules around a layer."""

from typing import Any

from flax import nnx

from normax import options
from normax.nnx.plumbing import Promoting, signed


def _call(layer, values, *args, **kwargs):
    """Calls a layer as if its weights had other values, given by their path.

    It is a copy that gets them: the parameters themselves are what the optimizer moves, and may
    be out of reach of the trace that calls. Other state of the layer moves as it would, and where
    none does nothing is written.
    """
    copy = nnx.clone(layer)
    _set(copy, values)
    before = _others(copy)
    out = copy(*args, **kwargs)
    moved = {path: value for path, value in _others(copy).items() if value is not before.get(path)}
    if moved:
        nnx.update(layer, nnx.from_flat_state(moved))
    return out


def _set(layer, values):
    """Gives parameters of a layer other values, given by their path."""
    for path, param in _parameters(layer):
        if path in values:
            param.set_value(values[path])


def _others(layer):
    """Returns the values of a layer that are no parameters, by their path."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.Param)))
    return {path: variable.get_value() for path, variable in flat}


def _parameters(layer):
    """Returns the parameters of a layer, with their paths."""
    return nnx.to_flat_state(nnx.state(layer, nnx.Param))


def _of(state, path, param, what):
    """Returns the entry that belongs to a parameter of the layer."""
    if path not in state:
        raise ValueError(
            f"{what}: expected the layer's parameters to be those it was constructed with, got "
            f"a new one at {'/'.join(map(str, path))} of shape {param.shape}"
        )
    return state[path]


class Weights(Promoting):
    """The constructor of a layer called with weights that are normalized as they stand.

    Args:
      variable_filter: which parameters of the layer to normalize.
      promote_dtype: Flax's function of the weight and scale; it decides the weight's dtype.
      rngs: random keys for the scales.
    """

    layer_instance: Any
    use_scale: bool
    scale_init: Any
    _scale_shape: Any
    _normalize: Any

    def __init__(
        self,
        layer_instance,
        *,
        variable_filter=nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype=Promoting.promote_dtype,
        rngs,
        **kwargs,
    ):
        super().__init__(layer_instance, **kwargs)
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        self.scales = nnx.data(None)
        if self.use_scale:
            self.scales = nnx.data(
                {path: self._create_scale(rngs, param) for path, param in self._weights()}
            )

    def __call__(self, x, *args, **kwargs):
        """Calls the layer with its weights normalized."""
        return _call(self.layer_instance, self._values(), x, *args, **kwargs)

    @property
    def is_plain(self):
        """Whether no weight of the layer is normalized."""
        return not self._weights()

    def bake(self):
        """Gives the layer its normalized weights for good, for inference."""
        _set(self.layer_instance, self._values())
        self.variable_filter = nnx.filterlib.to_predicate(False)
        self.scales = nnx.data({})

    def _values(self):
        return {path: self._normalize_at(path, param) for path, param in self._weights()}

    def _weights(self):
        params = _parameters(self.layer_instance)
        return [(path, param) for path, param in params if self.variable_filter(path, param)]

    def _create_scale(self, rngs, param):
        return nnx.Param(self.scale_init(rngs.params(), self._scale_shape(param), self.param_dtype))

    def _normalize_at(self, path, param):
        scale = _of(self.scales, path, param, type(self).__name__)[...] if self.use_scale else None
        return self._normalize(param[...], scale)


@signed
@options.documented
class WeightNorm(Weights, options.WeightNormOptions, nnx.Module):
    """A layer with weights of learned length; `flax.nnx.WeightNorm`, over `normax.weight_norm`.

    Variables: those of the layer, which keep their own values, and `scales`, a `nnx.Param` for
    each weight by its path in the layer. They train, as Flax's do not.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer = nn.WeightNorm(layer, use_scale=True, rngs=nnx.Rngs(1))
      >>> layer(jax.numpy.ones((1, 3))).shape
      (1, 2)
      >>> layer.scales["kernel",].shape
      (2,)
    """


@signed
@options.documented
class CenteredWeightNorm(Weights, options.CenteredWeightNormOptions, nnx.Module):
    """A layer with weights of mean 0 and learned length; over `normax.centered_weight_norm`.

    Variables: those of the layer, which keep their own values, and `scales`, a `nnx.Param` for
    each weight by its path in the layer.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer = nn.CenteredWeightNorm(layer, use_scale=True, rngs=nnx.Rngs(1))
      >>> layer(jax.numpy.ones((1, 3))).shape
      (1, 2)
      >>> layer.scales["kernel",].shape
      (2,)
    """


@signed
@options.documented
class WeightStandardization(Weights, options.WeightStandardizationOptions, nnx.Module):
    """A layer with standardized weights; over `normax.weight_standardization`.

    Variables: those of the layer, which keep their own values, and `scales`, a `nnx.Param` for
    each weight by its path in the layer.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer = nn.WeightStandardization(layer, use_scale=True, rngs=nnx.Rngs(1))
      >>> layer(jax.numpy.ones((1, 3))).shape
      (1, 2)
      >>> layer.scales["kernel",].shape
      (2,)
    """


@signed
@options.documented
class ScaledWeightStandardization(Weights, options.ScaledWeightStandardizationOptions, nnx.Module):
    """A layer that keeps the variance; over `normax.scaled_weight_standardization`.

    Variables: those of the layer, which keep their own values, and `scales`, a `nnx.Param` for
    each weight by its path in the layer.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer = nn.ScaledWeightStandardization(layer, use_scale=True, rngs=nnx.Rngs(1))
      >>> layer(jax.numpy.ones((1, 3))).shape
      (1, 2)
      >>> layer.scales["kernel",].shape
      (2,)
    """


@signed
@options.documented
class SpectralNorm(options.SpectralNormOptions, nnx.Module):
    """A layer with weights of largest singular value 1; `flax.nnx.SpectralNorm`.

    Over `normax.spectral_norm`, for every parameter of rank 2 or more. Variables: those of the
    layer, which keep their own values, and `batch_stats`, a `nnx.BatchStat` for each `u` and
    `sigma` by the weight's path.

    Example:
      >>> import jax, normax.nnx as nn
      >>> from flax import nnx
      >>> layer = nn.SpectralNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
      >>> layer(jax.numpy.ones((1, 3))).shape
      (1, 2)

    Options of nnx:
      update_stats: whether to keep the iteration's state, in training; here or at the call.
      rngs: random keys for the start of the iteration.
    """

    def __init__(self, layer_instance, *, update_stats=True, rngs, **kwargs):
        options.SpectralNormOptions.__init__(self, layer_instance, **kwargs)
        self.set_view(not update_stats)
        state = {}
        for path, param in self._weights():
            start = self._create_state(rngs.params(), param)
            state[(*path, "u")] = nnx.BatchStat(start.u)
            state[(*path, "sigma")] = nnx.BatchStat(start.sigma)
        self.batch_stats = nnx.data(state)

    def __call__(self, x, update_stats=None, **kwargs):
        """Calls the layer with its weights normalized; `update_stats` keeps the state."""
        # model.train() and model.eval() set use_running_average, which is the opposite.
        update_stats = not self.use_running_average if update_stats is None else update_stats
        return _call(self.layer_instance, self._values(update_stats), x, **kwargs)

    @property
    def is_plain(self):
        """Whether no weight of the layer is normalized."""
        return not self._weights()

    def bake(self):
        """Gives the layer its normalized weights for good, for inference."""
        _set(self.layer_instance, self._values(False))
        self.n_steps = 0
        self.batch_stats = nnx.data({})

    def _values(self, update_stats):
        return {
            path: self._normalize_at(path, param, update_stats) for path, param in self._weights()
        }

    def set_view(self, use_running_average: bool | None = None):
        """Sets the mode, for `nnx.view`.

        Args:
          use_running_average: True at inference, False in training; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _weights(self):
        params = _parameters(self.layer_instance)
        return [(path, param) for path, param in params if self._applies_to(param)]

    def _normalize_at(self, path, param, update_stats):
        u = _of(self.batch_stats, (*path, "u"), param, "SpectralNorm")
        sigma = _of(self.batch_stats, (*path, "sigma"), param, "SpectralNorm")
        weight, new = self._normalize(param[...], u[...], sigma[...])
        if update_stats:
            u[...], sigma[...] = new
        return weight
