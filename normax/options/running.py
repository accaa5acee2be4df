"""What a normalizer with running statistics is, whatever the framework."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import initializers

from normax import axes as ax
from normax.moments import RunningStats
from normax.options.fields import Initializer, Normalizer, Running, options


@options
class Remembering(Normalizer, Running):
    """What any of them has.

    Args:
      var_init: initializer of the running variance, or mean square.
      freeze_stats: use the running statistics and leave them, whatever the mode, for fine-tuning.
    """

    scheduled: ClassVar[tuple[str, ...]] = ("momentum",)
    var_init: Initializer = initializers.ones
    freeze_stats: bool = False

    def _feature_shape(self, x):
        """Returns the shape of the parameters and statistics."""
        return ax.shape_along(type(self).__name__, "axis", self.axis, x)

    def _stats_shape(self, features):
        """Returns the shape of the running statistics."""
        return features

    def _stats_dtype(self, x=None):
        """Returns the dtype of the running mean: float32 at least, whatever the input."""
        if not getattr(self, "force_float32_reductions", True):
            return self.param_dtype
        return ax.promote(*(d for d in (jnp.float32, x, self.dtype) if d is not None))

    def _state_names(self, training=True) -> tuple[str, ...]:
        """Returns what is kept; inference needs no steps."""
        return ("var", "steps") if training and self._has_schedule() else ("var",)

    def _create_state(self, key, features, dtype):
        """Returns the state before any data, by name."""
        var = self.var_init(key, self._stats_shape(features), ax.real_dtype(dtype))
        return {"var": var, "steps": jnp.zeros((), jnp.int32)}

    def _needs_key(self):
        """Returns whether the running statistics start anywhere but at 0 and 1."""
        return self.var_init is not initializers.ones

    def _at(self, steps):
        """Returns the options that may follow a schedule, by name, at a number of steps."""
        values = {name: getattr(self, name) for name in self.scheduled}
        return {name: v(steps) if callable(v) else v for name, v in values.items()}

    def _has_schedule(self):
        return any(callable(getattr(self, name)) for name in self.scheduled)

    def _normalize_first(self, x, parameters, state, *args, mask=None):
        """Returns what initialization gives: inference, which needs one value and no device."""
        out, _ = self._normalize_and_remember(
            x, parameters, state, *args, use_running_average=True, mask=mask
        )
        return out

    def _normalize_and_remember(
        self, x, parameters, state, *args, use_running_average, mask=None
    ) -> tuple[Any, dict]:
        """Returns the normalized input and the new state by name."""
        raise NotImplementedError


@options
class RunningNormalizer(Remembering):
    """What one with a running mean and variance has.

    Args:
      mean_init: initializer of the running mean.
      nonfinite: "skip" leaves the running statistics of a feature as they were where those of the
        batch are not finite; "keep" lets NaN and inf in.
    """

    mean_init: Initializer = initializers.zeros
    nonfinite: str = "skip"

    def _state_names(self, training=True) -> tuple[str, ...]:
        """Returns what is kept; inference needs neither count nor steps."""
        counted = ("count",) if training and self.momentum is None else ()
        stepped = ("steps",) if training and self._has_schedule() else ()
        return ("mean", "var", *counted, *stepped)

    def _create_state(self, key, features, dtype):
        """Returns the state before any data, by name."""
        shape = self._stats_shape(features)
        keys = (None, None) if key is None else jax.random.split(key)
        mean = self.mean_init(keys[0], shape, dtype)
        count = jnp.zeros(shape, jnp.int32)
        return {"mean": mean, "count": count, **super()._create_state(keys[1], features, dtype)}

    def _needs_key(self):
        """Returns whether the running statistics start anywhere but at 0 and 1."""
        return self.mean_init is not initializers.zeros or super()._needs_key()

    def _normalize_and_remember(
        self, x, parameters, state, *args, use_running_average, mask=None
    ) -> tuple[Any, dict]:
        """Returns the normalized input and the new state by name."""
        count = state.get("count")
        if count is None:
            count = jnp.zeros(jnp.shape(state["mean"]), jnp.int32)
        use_running_average = use_running_average or self.freeze_stats
        options = self._passed_on(self._function, but=("use_running_average", *self.scheduled))
        steps = state.get("steps", 0)
        options |= self._at(steps)
        options |= self._masked(mask)
        y, stats, *rest = self._function(
            x,
            RunningStats(state["mean"], state["var"], count),
            *args,
            **self._given(parameters),
            use_running_average=use_running_average,
            dtype=self._output_dtype(x, *parameters.values()),
            **self._axes_passed_on(),
            **options,
        )
        taken = 0 if use_running_average else 1
        new = {**stats._asdict(), "steps": jnp.asarray(steps, jnp.int32) + taken}
        return (y, *rest) if rest else y, new

    def _axes_passed_on(self):
        """Returns how the function calls the axis option."""
        return {"feature_axes": self.axis}
