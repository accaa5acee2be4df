"""A network of four convolutions, in the variants whose generalization is compared."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax

import normax
from normax import linen as norms
from normax.intercept import intercepted


class Variant(NamedTuple):
    """What a network has in each layer but the last, and how it is trained.

    Attributes:
      norm: of what a layer gives, one of `NORMS`.
      weight_norm: whether the weights of the layer are normalized.
      before: rate of a dropout in front of the norm.
      after: rate of a dropout behind the norm, and before the ReLU.
      population: whether the norm goes by the statistics of all training images, and what flows
        through them: "none" or "batch", as `population_step` has it.
      decay: whether the scales of the norm decay as the noise of a batch would have it.
      rate: factor of the learning rate.
      batch_size: of training.
    """

    norm: str | None = None
    weight_norm: bool = False
    before: float = 0.0
    after: float = 0.0
    population: str | None = None
    decay: bool = False
    rate: float = 1.0
    batch_size: int = 64


NORMS = {
    "batch": norms.BatchNorm,
    "mean": norms.MeanOnlyBatchNorm,
    "variance": norms.VarianceOnlyBatchNorm,
}
VARIANTS = {
    "SGD": Variant(),
    "BN": Variant("batch"),
    "WN": Variant(weight_norm=True),
    "WN, mean-only BN": Variant("mean", weight_norm=True),
    "WN, variance-only BN": Variant("variance", weight_norm=True),
    "WN, dropout": Variant(weight_norm=True, after=0.25),
    "SGD, M = 256": Variant(batch_size=256),
    "BN, M = 256": Variant("batch", batch_size=256),
    "BN, M = 256, dropout after": Variant("batch", after=0.125, batch_size=256),
    "BN, M = 256, dropout before": Variant("batch", before=0.125, batch_size=256),
    "PN": Variant("batch", population="batch"),
    "PN, gamma decay": Variant("batch", population="batch", decay=True),
    # Statistics that are held constant bear no more: at the whole rate the loss ends above 1.
    "PN held, rate / 5": Variant("batch", population="none", rate=0.2),
}


class Network(nn.Module):
    """Convolutions of 32, 32, 64 and 64 channels, 3x3; a pool by 2; 512 hidden units; 10 classes.

    Attributes:
      variant: what each layer but the last has.
    """

    variant: Variant

    @nn.compact
    def __call__(self, x, train: bool):
        """Returns the logits of images of shape (batch, height, width, channels)."""
        for number, channels in enumerate((32, 32, 64, 64), start=1):
            x = self.block(nn.Conv, x, train, number, features=channels, kernel_size=(3, 3))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = self.block(nn.Dense, x, train, 5, features=512)
        return nn.Dense(10, kernel_init=nn.initializers.lecun_uniform(), name="layer6")(x)

    def block(self, kind, x, train, number, **sizes):
        """Applies a layer, what the variant has around it, and a ReLU."""
        variant = self.variant
        layer = kind(
            **sizes,
            use_bias=variant.norm is None,
            kernel_init=nn.initializers.he_uniform(),
            name=f"layer{number}",
        )
        if variant.weight_norm:
            # A deviation divides the length away; the scale of the norm is the length there.
            learns_length = variant.norm != "variance"
            layer = norms.WeightNorm(layer, use_scale=learns_length, name=f"weights{number}")
        x = nn.Dropout(variant.before, deterministic=not train)(layer(x))
        if variant.norm is not None:
            norm = NORMS[variant.norm](momentum=0.8, name=f"norm{number}")
            x = norm(x, use_running_average=not train)
        return nn.relu(nn.Dropout(variant.after, deterministic=not train)(x))


@functools.partial(jax.jit, static_argnums=0)
def standardized(model: Network, variables: dict[str, Any], image: jax.Array) -> Any:
    """Returns parameters with which the layers of normalized weights start standardized.

    On these images each of them then gives mean 0 and variance 1 in every feature; where a norm
    subtracts the mean or divides by the deviation, that half is left to the norm.
    """
    variant = model.variant
    params = {name: dict(part) for name, part in variables["params"].items()}
    for number in range(1, 6):
        x = _given_by(f"weights{number}", model, {**variables, "params": params}, image)
        lengths, biases = normax.weight_norm_init(normax.moments(x, tuple(range(x.ndim - 1))))
        if variant.norm != "variance":
            params[f"weights{number}"][f"layer{number}/kernel/scale"] = lengths
        if variant.norm != "mean":
            owner = f"layer{number}" if variant.norm is None else f"norm{number}"
            params[owner]["bias"] = biases
    return params


def _given_by(name, model, variables, image):
    """Returns what a module of a network gives, with every norm by the statistics of the images."""
    seen = []

    def look(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == name and context.method_name == "__call__":
            seen.append(out)
        return out

    by_batch = model.variant.norm is not None
    with intercepted(look):
        rngs = {"dropout": jax.random.key(0)}
        model.apply(variables, image, train=by_batch, mutable=["batch_stats"], rngs=rngs)
    return seen[0]
