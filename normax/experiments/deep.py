"""A deep network of dense layers, all alike, with any normalizer after each."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from normax import linen as norms

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "relu": nn.relu,
}
# Under which the signal keeps its size: the variance of a weight times the number of inputs.
VARIANCE = {"sigmoid": 1.0, "tanh": 1.0, "relu": 2.0}
NORMS = ("none", "batch", "layer", "rms", "group", "weight")


class Deep(nn.Module):
    """Dense layers of one width with a normalizer and an activation after each; then ten logits.

    Attributes:
      norm: one of `NORMS`.
      activation: one of `ACTIVATIONS`.
      depth: number of layers before the logits.
      width: number of units of each.
    """

    norm: str
    activation: str
    depth: int
    width: int = 100

    @nn.compact
    def __call__(self, x, train: bool):
        """Returns the logits of images of any shape."""
        x = x.reshape(len(x), -1)
        variance = VARIANCE[self.activation]
        init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
        for number in range(1, self.depth + 1):
            layer = nn.Dense(self.width, kernel_init=init, name=f"dense{number}")
            if self.norm == "weight":
                x = norms.WeightNorm(layer, name=f"weight{number}")(x)
            else:
                x = layer(x)
            norm = self._norm(train)
            x = x if norm is None else norm(name=f"norm{number}")(x)
            x = ACTIVATIONS[self.activation](x)
        return nn.Dense(10, name="logits")(x)

    def _norm(self, train):
        if self.norm == "batch":
            return functools.partial(norms.BatchNorm, use_running_average=not train, momentum=0.9)
        if self.norm == "group":
            return functools.partial(norms.GroupNorm, num_groups=5)
        return {"layer": norms.LayerNorm, "rms": norms.RMSNorm}.get(self.norm)
