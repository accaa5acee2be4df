"""What a power normalization is, whatever the framework."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax.nn import initializers

from normax.options.fields import Affine, Initializer, options
from normax.options.running import Remembering
from normax.power import PowerState, power_norm


@options
class PowerNormOptions(Remembering, Affine):
    """What a `PowerNorm` is.

    Args:
      drift_momentum: weight of the past in what the backward pass remembers.
      warmup_steps: training steps that divide by the batch's own root mean square.
      drift_init: initializer of what the backward pass remembers.
    """

    _function = staticmethod(power_norm)
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias", "drift")
    epsilon: float = 1e-5
    momentum: Any = 0.9
    drift_momentum: float = 0.9
    warmup_steps: int = 0
    drift_init: Initializer = initializers.zeros

    def _given(self, parameters):
        """Returns the parameters as the function is given them; the drift is never frozen."""
        return {**super()._given(parameters), "drift": parameters["drift"]}

    def _has_schedule(self):
        return self.warmup_steps > 0 or super()._has_schedule()

    def _normalize_and_remember(
        self, x, parameters, state, *args, use_running_average, mask=None
    ) -> tuple[Any, dict]:
        """Returns the normalized input and the new state by name; the mean square is its `var`."""
        use_running_average = use_running_average or self.freeze_stats
        steps = state.get("steps", 0)
        given = self._given(parameters)
        y, new = power_norm(
            x,
            PowerState(state["var"], given.pop("drift")),
            *args,
            **given,
            use_running_average=use_running_average,
            feature_axes=self.axis,
            **self._at(steps),
            drift_momentum=self.drift_momentum,
            epsilon=self.epsilon,
            warming_up=jnp.asarray(steps) < self.warmup_steps,
            dtype=self._output_dtype(x, *given.values()),
            **self._masked(mask),
        )
        taken = 0 if use_running_average else 1
        return y, {"var": new.square, "steps": jnp.asarray(steps, jnp.int32) + taken}
