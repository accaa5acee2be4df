"""Penalties and projections of scale and bias, on optax: what Keras calls regularizers and
constraints of gamma and beta, in JAX's way.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from normax import axes as ax

# What some normalizers learn beside a scale and a bias.
FURTHER = (
    *("slope", "threshold", "learned_epsilon", "alpha"),
    *("mean_scale", "mean_weights", "var_weights", "drift"),
)

Function = Callable[[jax.Array], jax.Array]


def norm_labels(params: Any) -> Any:
    """Labels each parameter: "scale", "bias" or another one ("norm") of a normalizer, or "other".

    A normalizer is told by what it holds: a scale, a bias, or both, and nothing but what
    normalizers have; so the bias of a Dense or Conv, which has a kernel beside it, is "other", and
    a module that has a parameter named bias and no other passes for one. The lengths of weight
    normalization are "scale"; the threshold of a filter response norm is "norm". For
    `optax.masked`, `optax.multi_transform`, or to keep weight decay off them.

    Args:
      params: parameters of a linen or nnx model, a nested dict or `nnx.State`.

    Returns:
      A pytree of the structure of `params`, of strings.

    Example:
      >>> import normax
      >>> params = {"Dense_0": {"kernel": 1.0, "bias": 0.0}, "norm": {"scale": 1.0, "bias": 0.0}}
      >>> normax.norm_labels(params)["norm"]
      {'bias': 'bias', 'scale': 'scale'}
      >>> normax.norm_labels(params)["Dense_0"]
      {'bias': 'other', 'kernel': 'other'}
    """
    siblings: dict[tuple, set] = {}
    # What optax has masked is no leaf, but it is there: a kernel tells what its bias is of.
    masked = lambda value: isinstance(value, optax.MaskedNode)  # noqa: E731
    for path, _ in jax.tree.leaves_with_path(params, is_leaf=masked):
        *parent, name = names_of(path)
        siblings.setdefault(tuple(parent), set()).add(name)

    def label(path, _):
        *parent, name = names_of(path)
        # linen names a weight's lengths `Dense_0/kernel/scale`; nnx keeps them under `scales`.
        if name.endswith("/scale") or parent[-1:] == ["scales"]:
            return "scale"
        beside = siblings[tuple(parent)]
        if not beside & {"scale", "bias"} or not beside <= {"scale", "bias", *FURTHER}:
            return "other"
        return name if name in ("scale", "bias") else "norm"

    return jax.tree.map_with_path(label, params)


def norm_penalty(
    params: Any, *, scale: Function | None = None, bias: Function | None = None
) -> jax.Array | float:
    r"""Sums a penalty over the scales, and one over the biases, of a model's normalizers.

    .. math:: \sum_\gamma f(\gamma) + \sum_\beta h(\beta)

    Args:
      params: parameters of a linen or nnx model.
      scale: function of each scale that returns a scalar; None is no penalty.
      bias: the same for each bias.

    Returns:
      A scalar, to be added to the loss; 0.0 where there is nothing to penalize.

    Example:
      >>> import jax.numpy as jnp, normax, optax
      >>> params = {"norm": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.zeros(2)}}
      >>> squared = lambda v: 0.1 * optax.tree.norm(v, squared=True)
      >>> print(normax.norm_penalty(params, scale=squared))
      0.5

    Keras, `BatchNormalization(gamma_regularizer=..., beta_regularizer=...)`.
    """
    functions = {"scale": scale, "bias": bias}
    labelled = zip(jax.tree.leaves(norm_labels(params)), jax.tree.leaves(params), strict=True)
    chosen = [(functions.get(label), leaf) for label, leaf in labelled]
    return sum((function(leaf) for function, leaf in chosen if function is not None), start=0.0)


def norm_constraint(
    *, scale: Function | None = None, bias: Function | None = None
) -> optax.GradientTransformation:
    """Projects the scales and biases of a model's normalizers after each optimizer step.

    What optax adds is the difference from the projection, so that a constraint holds to the
    rounding of that sum: to one part in 2**24 of the old value in float32, in 2**8 in bfloat16.

    Args:
      scale: projection of each scale, such as `optax.projections.projection_non_negative`; None
        leaves them.
      bias: the same for each bias.

    Returns:
      An optax transformation, to be chained last.

    Raises:
      ValueError: by its update, without `params`.

    Example:
      >>> import jax.numpy as jnp, normax, optax
      >>> nonnegative = normax.norm_constraint(scale=optax.projections.projection_non_negative)
      >>> tx = optax.chain(optax.sgd(1.0), nonnegative)
      >>> params = {"norm": {"scale": jnp.array([0.5, 2.0])}}
      >>> grads = {"norm": {"scale": jnp.array([1.0, 1.0])}}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["norm"]["scale"])
      [0. 1.]

    Keras, `BatchNormalization(gamma_constraint=..., beta_constraint=...)`.
    """
    functions = {"scale": scale, "bias": bias}

    def update(updates, state, params: Any = None):
        ax.check_params("norm_constraint", params)
        moved = optax.apply_updates(params, updates)

        def project(label, step, old, new):
            function = functions.get(label)
            return step if function is None else function(new) - old

        labels = norm_labels(params)
        return jax.tree.map(project, labels, updates, params, moved), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def names_of(path) -> list[str]:
    """Returns the keys of a path as strings, without the attribute nnx keeps a value under."""
    keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
    return [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]


def overwrite_drift(
    tx: optax.GradientTransformation, *, name: str = "drift"
) -> optax.GradientTransformationExtraArgs:
    r"""Puts the new drift of each power normalization in place of the old one; the rest is `tx`'s.

    .. math:: \nu \leftarrow \mathrm{"gradient"\ of}\ \nu

    What a backward pass remembers comes out of it as a gradient (`power_norm`). A `PowerNorm` keeps
    it among the parameters; this is how it stays there, to the rounding of optax's sum: keep the
    drift in float32. It is not for gradients that were clipped, accumulated or multiplied by a loss
    scale before.

    Args:
      tx: any optax optimizer, which sees every other parameter.
      name: the last name of the paths of what is to be overwritten.

    Returns:
      An optax transformation.

    Raises:
      ValueError: by its update, without `params`.

    Example:
      >>> import jax.numpy as jnp, normax, optax
      >>> tx = normax.overwrite_drift(optax.sgd(1.0))
      >>> params = {"norm": {"drift": jnp.array(3.0), "scale": jnp.array(1.0)}}
      >>> gradients = {"norm": {"drift": jnp.array(5.0), "scale": jnp.array(0.25)}}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["norm"])
      {'drift': Array(5., dtype=float32), 'scale': Array(0.75, dtype=float32)}

    Shen, Yao, Gholami, Mahoney and Keutzer, "PowerNorm: Rethinking Batch Normalization in
    Transformers", 2020, https://arxiv.org/abs/2003.07845.
    """

    def update(updates, state, params: Any = None):
        ax.check_params("overwrite_drift", params)
        return jax.tree.map(lambda new, old: new - old, updates, params), state

    def label(params):
        return jax.tree.map_with_path(
            lambda path, _: "drift" if names_of(path)[-1] == name else "other", params
        )

    overwrite = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.multi_transform({"drift": overwrite, "other": tx}, label)
