r"""Zeta, the coefficient of gamma decay, measured in a model.

What a batch's statistics do to the output of a norm, they do to its scale and bias: a mean that is
off by m deviations shifts the output by :math:`-\gamma m`, a deviation by a part s shrinks it by
that part. So the curvature that counts is that of the loss in scale and bias themselves, and of a
convolution all positions of an image move together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import normax.linen
import normax.nnx
from normax import axes as ax
from normax.diagnostics.watch import watched
from normax.options import Activated
from normax.regularize import names_of
from normax.theory.regularizer import FORMS, Coefficient, coefficient
from normax.theory.shape import excess_kurtosis, skewness
from normax.train import TrainState

Loss = Callable[[Any, Any, bool], Any]
_BOTH = (normax.linen.BatchNorm, normax.nnx.BatchNorm, linen.BatchNorm, nnx.BatchNorm)
_VARIANCE = (normax.linen.VarianceOnlyBatchNorm, normax.nnx.VarianceOnlyBatchNorm)


def decay_coefficients(
    loss: Loss,
    state: TrainState,
    batch: Any,
    *,
    batch_size: int,
    key: jax.Array,
    probes: int = 8,
    form: str = "corrected",
) -> dict[str, Coefficient]:
    r"""Measures zeta of each batch norm of a model: how strongly its noise acts as gamma decay.

    .. math:: \zeta_c = \frac{\rho_c + 2}{8 M} \frac{\partial^2 L}{\partial \gamma_c^2}
                        + \frac{1}{2 M} \frac{\partial^2 L}{\partial \beta_c^2}
                        + \frac{\kappa_{3,c}}{2 M}
                          \frac{\partial^2 L}{\partial \gamma_c \partial \beta_c}

    L is the loss by the running statistics, in inference. The second derivatives are estimated by
    products of the Hessian with random signs (Hutchinson), layer by layer: without bias, and exact
    where the features of a layer do not act on one another. What bends only at a point, as ReLU
    does, has no curvature there, so that of a layer below one is of the layers above alone.

    Args:
      loss: as in `normax.train.train_step`, an average over the batch.
      state: of the model; its running statistics are taken for the population's.
      batch: many examples, as the loss takes them.
      batch_size: M of training, 2 or more: how many independent entries a statistic is of. The
        positions of an image are not independent; the number of images is the least it can be.
      key: random key of the signs.
      probes: how many signs to average over; each costs four to six gradients a layer.
      form: "corrected" or "published": without the term of skewed inputs.

    Returns:
      `Coefficient` by the path of each `BatchNorm` and `VarianceOnlyBatchNorm` that has a scale and
      is not frozen, normax's or Flax's, each leaf of the shape of the scale. Those within `nn.scan`
      or `nn.vmap` are left out. Of one that is called several times kurtosis and skewness are those
      of the first call. One with an activation is as if it were written behind.

    Raises:
      ValueError: a batch of one, no probe, another form; a model without batch norms.
      TypeError: a `batch_size` or `probes` that is no int.

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.

    Example:
      >>> import jax, jax.numpy as jnp, normax.linen, optax
      >>> from normax import diagnostics, train
      >>> def loss(model, x, train):
      ...     return jnp.mean((model(x, use_running_average=not train) - x) ** 2)
      >>> x, norm = jax.random.normal(jax.random.key(0), (10_000, 1)), normax.linen.BatchNorm()
      >>> state = train.TrainState.create(
      ...     norm, optax.sgd(0.1), jax.random.key(1), x, use_running_average=True
      ... )
      >>> found = diagnostics.decay_coefficients(
      ...     loss, state, x, batch_size=32, key=jax.random.key(2)
      ... )
      >>> print(f"{found[''].zeta[0]:.3f}, {3 / (2 * 32):.3f}")
      0.047, 0.047
    """
    name = "decay_coefficients"
    ax.check_limit(name, "batch_size", ax.to_positive_int(name, "batch_size", batch_size), 2)
    probes = ax.to_positive_int(name, "probes", probes)
    ax.check_choice(name, "form", form, FORMS)
    shapes, statistics = _shapes(loss, state, batch)
    scales = {
        path: leaf.astype(jnp.float32)
        for path, leaf in map(_scale_at, jax.tree.leaves_with_path(state.params))
        if path in shapes
    }
    ax.check_found(name, "a batch norm with a scale", bool(scales))
    zeros = jax.tree.map(jnp.zeros_like, scales)

    def value(scales, shifts):
        def change(call):
            if call.path not in shifts:
                return call.output
            shift = _along(call, shifts[call.path])
            shifted = call.output + shift.astype(call.output.dtype)
            return call.module.activation(shifted) if is_active(call.module) else shifted

        def options(path, module):
            # The shift is of what goes into the activation.
            return {"activation": None} if path in shifts and is_active(module) else {}

        def is_active(module):
            return isinstance(module, Activated) and module.activation is not None

        bound = state.replace(params=_with_scales(state.params, scales))
        return watched(loss, bound, batch, train=False, change=change, options=options)[0]

    def bends(inputs):
        # One layer at a time: what layers in a row do to one another is as large as what is sought.
        number, key = inputs
        signs = {
            path: jnp.where(number == place, jax.random.rademacher(key, leaf.shape, leaf.dtype), 0)
            for place, (path, leaf) in enumerate(scales.items())
        }
        slopes = lambda *at: jax.grad(value, (0, 1))(*at)  # noqa: E731
        of_scale = jax.jvp(slopes, (scales, zeros), (signs, zeros))[1]
        of_shift = jax.jvp(slopes, (scales, zeros), (zeros, signs))[1]
        times = lambda tree: jax.tree.map(jnp.multiply, tree, signs)  # noqa: E731
        return times(of_scale[0]), times(of_shift[1]), times(of_scale[1])

    layers = jnp.repeat(jnp.arange(len(scales)), probes)
    every = jax.lax.map(bends, (layers, jax.random.split(key, layers.size)))
    fisher, curvature, slant = jax.tree.map(lambda leaf: leaf.sum(0) / probes, every)
    return {
        path: coefficient(
            fisher[path],
            curvature[path],
            slant[path],
            *shapes[path],
            batch_size=batch_size,
            statistics=statistics[path],
            form=form,
        )
        for path in scales
    }


def measured_decay(
    loss: Loss, *, batch_size: int, batch: Any = None, probes: int = 8, form: str = "corrected"
) -> Callable[..., Any]:
    """Returns a function that measures zeta in a training step, for `normax.theory.gamma_decay`.

    Args:
      loss: as in `decay_coefficients`.
      batch_size: M, as in `decay_coefficients`.
      batch: examples to measure on; None takes those of the step.
      probes: as in `decay_coefficients`.
      form: as in `decay_coefficients`.

    Returns:
      A function of the parameters, and of what `normax.train.train_step` gives an optimizer, that
      returns a pytree of the structure of the parameters: zeta at the scale of each batch norm,
      but 0 where it is negative, which would make a scale grow, and 0 elsewhere.

    Example:
      >>> import jax, jax.numpy as jnp, normax.linen, optax
      >>> from normax import diagnostics, theory, train
      >>> def loss(model, x, train):
      ...     return jnp.mean((model(x, use_running_average=not train) - x) ** 2)
      >>> measure = diagnostics.measured_decay(loss, batch_size=32)
      >>> tx = optax.chain(theory.gamma_decay(measure, every=10), optax.sgd(0.1))
      >>> x, norm = jax.random.normal(jax.random.key(0), (10_000, 1)), normax.linen.BatchNorm()
      >>> state = train.TrainState.create(norm, tx, jax.random.key(1), x, use_running_average=True)
      >>> state, _ = train.train_step(loss)(state, x)
      >>> print(f"{state.opt_state[0].zeta['scale'][0]:.3f}")
      0.047
    """
    given = batch

    def measure(params, *, train_state: Any = None, batch: Any = None, **_):
        # Of masked parameters only some are given; the state has all.
        ax.check_given("measured_decay", "train_state by the update's extra arguments", train_state)
        found = decay_coefficients(
            loss,
            train_state,
            batch if given is None else given,
            batch_size=batch_size,
            key=jax.random.fold_in(train_state.key, train_state.step),
            probes=probes,
            form=form,
        )
        zeta = {path: jnp.maximum(each.zeta, 0) for path, each in found.items()}
        return _with_scales(jax.tree.map(lambda leaf: 0.0, params), zeta)

    return measure


def _shapes(loss, state, batch):
    """Returns kurtosis and skewness of what each batch norm is given, and which noise it has."""
    statistics = {}

    def note(call):
        # A frozen one has no noise of a batch; Flax's own cannot be frozen.
        if not isinstance(call.module, _BOTH + _VARIANCE) or is_frozen(call.module):
            return None
        statistics[call.path] = "both" if isinstance(call.module, _BOTH) else "variance"
        x = call.input
        axes = ax.sorted_axes("decay_coefficients", "axis", call.module.axis, x.ndim)
        entries = ax.other_axes(axes, x.ndim)
        mask = call.kwargs.get("mask")
        return excess_kurtosis(x, entries, mask=mask), skewness(x, entries, mask=mask)

    def is_frozen(module):
        return getattr(module, "freeze_stats", False)

    notes = watched(loss, state, batch, train=False, note=note)[1]
    return {path: calls[0] for path, calls in notes.items()}, statistics


def _along(call, shift):
    """Returns one number for each feature, to be added to an output."""
    axes = ax.sorted_axes("decay_coefficients", "axis", call.module.axis, call.output.ndim)
    return ax.along(shift, call.output.ndim, axes)


def _scale_at(item):
    """Returns the path of the module whose scale a leaf is, or None, and the leaf."""
    *parent, name = names_of(item[0])
    return "/".join(parent) if name == "scale" else None, item[1]


def _with_scales(params, scales):
    """Returns parameters with other scales, by the path of their module."""

    def leaf(keys, value):
        path, _ = _scale_at((keys, value))
        return jnp.asarray(scales[path], getattr(value, "dtype", None)) if path in scales else value

    return jax.tree.map_with_path(leaf, params)
