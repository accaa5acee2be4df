r"""Gamma decay: the penalty that the noise of a batch's statistics amounts to, for optax."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import axes as ax
from normax.regularize import norm_labels


class GammaDecayState(NamedTuple):
    """What gamma decay remembers.

    Attributes:
      steps: number of updates so far, int32.
      zeta: the coefficients in use: of the structure of the parameters, one for each entry of a
        scale and one 0 for any other parameter.
    """

    steps: jax.Array
    zeta: Any


def gamma_decay(
    zeta: Any | Callable[..., Any], *, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a penalty on the scales of a model's normalizers.

    .. math:: \sum_\gamma \zeta_\gamma \gamma^2,\qquad g_\gamma \leftarrow g_\gamma + 2 \zeta \gamma

    With population statistics in place of the batch's it is what batch norm's noise does to the
    value of a loss, where the model fits; see `decay_coefficient` for the coefficient and
    `normax.population_training` for the statistics. As a pull on gamma it is up to twice as strong
    as that noise: see `normax.theory.expected_deviation`.

    Args:
      zeta: a number, for all scales; or a pytree of the structure of the parameters, of which the
        leaves at scales count; or a function of the parameters, and of the extra arguments of the
        update, that measures such a pytree, as `normax.diagnostics.measured_decay` gives it.
      every: how many updates measured coefficients serve; the first one measures.

    Returns:
      An optax transformation of `GammaDecayState`, to be chained before the optimizer. Its update
      needs `params`.

    Raises:
      ValueError: an `every` below 1; by its update, without `params`.
      TypeError: an `every` that is no int; a `zeta` that is none of the three.

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from normax import theory
      >>> tx = optax.chain(theory.gamma_decay(0.25), optax.sgd(1.0))
      >>> params = {"norm": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.ones(2)}}
      >>> updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
      >>> print(updates["norm"]["scale"], updates["norm"]["bias"])
      [-0.5 -1. ] [-0. -0.]
    """
    name = "gamma_decay"
    every = ax.to_positive_int(name, "every", every)

    measure = zeta if callable(zeta) else None
    is_one = isinstance(zeta, int | float | np.number | jax.Array) and jnp.ndim(zeta) == 0
    if measure is None and jax.tree.structure(zeta) == jax.tree.structure(None):
        ax.check_given(name, "zeta", None)
    if is_one or isinstance(zeta, str):
        ax.check_number(name, "zeta", zeta)

    def init(params):
        start = zeta if measure is None else 0.0
        if is_one or measure is not None:
            start = jax.tree.map(lambda leaf: start, params)
        coefficients = _at_scales(norm_labels(params), start, params)
        return GammaDecayState(jnp.zeros((), jnp.int32), coefficients)

    def update(updates, state, params: Any = None, **extra):
        ax.check_params(name, params)
        labels, coefficients = norm_labels(params), state.zeta
        if measure is not None:
            fresh = functools.partial(measure, params, **extra)
            coefficients = jax.lax.cond(
                state.steps % every == 0,
                lambda: _at_scales(labels, fresh(), params),
                lambda: state.zeta,
            )

        def penalized(label, update, coefficient, leaf):
            if label != "scale":
                return update
            return update + (2 * coefficient * leaf.astype(jnp.float32)).astype(update.dtype)

        updates = jax.tree.map(penalized, labels, updates, coefficients, params)
        return updates, GammaDecayState(state.steps + 1, coefficients)

    return optax.GradientTransformationExtraArgs(init, update)


def _at_scales(labels, zeta, params):
    """Returns coefficients of one shape for each scale, and a 0 for any other parameter."""
    ax.check_structure("gamma_decay", "zeta", zeta, params)

    def leaf(label, value, like):
        shape = jnp.shape(like) if label == "scale" else ()
        value = value if label == "scale" else 0.0
        if jnp.ndim(value):
            ax.check_shape("gamma_decay", "zeta", jnp.shape(value), shape)
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape)

    return jax.tree.map(leaf, labels, zeta, params)
