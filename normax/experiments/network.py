"""The network of the comparison: two convolutions, one hidden layer, a normalizer after each."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from normax import linen as norms


class Network(nn.Module):
    """Convolutions of 10 and 20 channels, 5x5, each pooled by 2; 100 hidden units; 10 classes.

    Attributes:
      norm: one of `NORMS`.
    """

    norm: str

    @nn.compact
    def __call__(self, x, train: bool):
        """Returns the logits of images of shape (batch, height, width, channels)."""
        for number, channels in enumerate((10, 20), start=1):
            conv = nn.Conv(channels, (5, 5), padding="VALID", name=f"conv{number}")
            x = self.normalized(conv, x, train, f"norm{number}")
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(self.normalized(nn.Dense(100, name="dense1"), x, train, "norm3"))
        return nn.Dense(10, name="dense2")(x)

    def normalized(self, layer, x, train, name):
        """Applies a layer, and the normalizer to its weights or to what comes out."""
        if self.norm == "weight":
            return norms.WeightNorm(layer, name=name)(x)
        x = layer(x)
        norm = NORMS[self.norm](x, train)
        return x if norm is None else norm(name=name)(x)


def _batch(x, train):
    return functools.partial(norms.BatchNorm, use_running_average=not train, momentum=0.9)


def _layer(x, train):
    # Over the whole example, each channel with a scale and bias of its own.
    return functools.partial(norms.LayerNorm, reduction_axes=tuple(range(1, x.ndim)))


def _group(x, train):
    return functools.partial(norms.GroupNorm, num_groups=5)


def _instance(x, train):
    # The hidden layer has no pixels to normalize over: there it is left out.
    return norms.InstanceNorm if x.ndim > 2 else None


def _none(x, train):
    return None


NORMS: dict[str, Callable] = {
    "none": _none,
    "batch": _batch,
    "layer": _layer,
    "group": _group,
    "instance": _instance,
    "weight": _none,
}


def count_parameters(variables: dict[str, Any]) -> dict[str, int]:
    """Returns how many numbers each layer holds, running statistics included, in order."""
    counts: dict[str, int] = {}
    for collection in variables.values():
        for layer, leaves in collection.items():
            size = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(leaves))
            counts[layer] = counts.get(layer, 0) + size
    order = ("conv1", "norm1", "conv2", "norm2", "dense1", "norm3", "dense2")
    return {layer: counts[layer] for layer in order if layer in counts}
