"""Population normalization: training by the statistics of many examples, not of the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import DTypeLike

import normax.linen
import normax.nnx
from normax import axes as ax
from normax.bind import BoundNNX, check_structure
from normax.intercept import as_if
from normax.options.running import Remembering, RunningNormalizer
from normax.renorm import batch_renorm
from normax.train import TrainState, train_step


def population_step(
    loss: Callable[[Any, Any, bool], Any],
    *,
    every: int = 1,
    gradient: str = "none",
    dtype: DTypeLike | None = None,
    loss_scale: float = 1.0,
    donate: bool = True,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict]]:
    r"""Builds a jitted training step whose batch norms use the population's statistics.

    .. math:: \bar h = \gamma \frac{h - \mu_P}{\sigma_P} + \beta

    The statistics are those of many examples at once, measured before a step and held in it: no
    noise of a batch is in them. With `normax.theory.gamma_decay` it is what batch norm amounts to
    in theory. Without a gradient through the statistics a step makes weights longer to no avail,
    which bears a fraction of batch norm's learning rate; with the batch's own it does not. A norm
    that is called several times keeps the statistics of its last call, and one with a momentum of
    None no count of them. Frozen norms stay as they are.

    Args:
      loss: as in `normax.train.train_step`. It is called with `train` True; only the statistics
        are those of inference, whatever the mode of the layers.
      every: how many steps the measured statistics serve; the first step measures.
      gradient: what flows through the statistics: "none", as they are held; or "batch", in
        `BatchNorm`, what flows through the batch's own in batch norm, as in `batch_renorm` without
        limits.
      dtype: as in `train_step`.
      loss_scale: as in `train_step`.
      donate: as in `train_step`.

    Returns:
      A function `step(state, batch, population)`, otherwise as of `train_step`, where `population`
      is a batch of as many examples as can be afforded, as the loss takes it.

    Raises:
      ValueError: as `train_step`; an `every` below 1; another word; when it is traced: a model
        without running statistics of normax's that move, or with norms that do not normalize by
        the batch alone (`BatchRenorm`, `PowerNorm`) or are Flax's own; with the gradient of the
        batch, an `epsilon_on` other than the variance.
      TypeError: as `train_step`; an `every` that is no int.

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.

    Example:
      >>> import flax.linen as nn, jax, normax.linen, optax
      >>> from normax import train
      >>> from normax.population_training import population_step
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = normax.linen.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
      ...         return nn.Dense(1)(nn.relu(x))
      >>> def loss(model, batch, train):
      ...     return optax.l2_loss(model(batch[0], train=train)[:, 0], batch[1]).mean()
      >>> x = jax.random.normal(jax.random.key(0), (512, 3))
      >>> state = train.TrainState.create(
      ...     Model(), optax.sgd(0.1), jax.random.key(1), x, train=False
      ... )
      >>> step = population_step(loss, every=5)
      >>> for start in range(0, 512, 8):
      ...     some = slice(start, start + 8)
      ...     state, metrics = step(state, (x[some], x[some, 0]), (x, x[:, 0]))
      >>> bool(metrics["loss"] < 0.1)
      True
    """
    every = ax.to_positive_int("population_step", "every", every)
    ax.check_choice("population_step", "gradient", gradient, ("none", "batch"))

    def by_population(model, batch, train):
        found = _told(model, functools.partial(_held, gradient))
        result = loss(model, batch, train)
        ax.check_found("population_step", _MOVES, any(found))
        return result

    take = train_step(by_population, dtype=dtype, loss_scale=loss_scale, donate=False)

    def step(state, batch, population):
        def measured(state):
            key = jax.random.fold_in(state.key, state.step)
            model = state.bind(state.params, state.model_state, key, train=True, dtype=dtype)
            found = _told(model, _measuring)
            loss(model, population, True)
            ax.check_found("population_step", _MOVES, any(found))
            check_structure("the model's state", state.model_state, model.model_state)
            return state.replace(model_state=_statistics_of(model.model_state, state.model_state))

        return take(jax.lax.cond(state.step % every == 0, measured, lambda s: s, state), batch)

    return jax.jit(step, donate_argnums=(0,) if donate else ())


_MOVES = "a model with running statistics of normax that move"
_FLAX = (linen.BatchNorm, nnx.BatchNorm)
_OTHERS = (normax.linen.BatchRenorm, normax.nnx.BatchRenorm)
_OTHERS += (normax.linen.PowerNorm, normax.nnx.PowerNorm)
_NORMS = (normax.linen.BatchNorm, normax.nnx.BatchNorm)


def _by_population(
    x,
    stats,
    scale=None,
    bias=None,
    *,
    use_running_average,
    momentum,
    feature_axes=-1,
    epsilon=1e-5,
    mask=None,
    axis_name=None,
    axis_index_groups=None,
    dtype,
    activation=None,
):
    """Returns the input normalized by the statistics, with a gradient as batch norm's; and them."""
    wide = dtype if activation is None else ax.promote(jnp.float32, x, dtype)
    y, _ = batch_renorm(
        x,
        stats,
        scale,
        bias,
        use_running_average=use_running_average,
        r_max=jnp.asarray(jnp.inf),
        d_max=jnp.asarray(jnp.inf),
        feature_axes=feature_axes,
        epsilon=epsilon,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=wide,
    )
    return y if activation is None else activation(y).astype(dtype), stats


def _held(gradient, norm) -> dict[str, Any]:
    """Returns the options of a norm that normalizes by what it remembers, and remembers nothing."""
    if gradient == "batch" and isinstance(norm, _NORMS):
        variance = norm.epsilon_on == "variance"
        ax.check_found("population_step", "epsilon_on='variance'", variance)
        return {"_function": _by_population}
    return {"freeze_stats": True}


def _measuring(norm) -> dict[str, Any]:
    """Returns the options of a norm that one call leaves with the statistics of that call."""
    known = isinstance(norm, RunningNormalizer) and not isinstance(norm, _OTHERS)
    ax.check_found("population_step", "norms that normalize by the batch alone", known)
    return {"momentum": 0.0}


def _told(model, options) -> list[bool]:
    """Gives a bound model's norms whose statistics move other options; returns one True for each.

    Of linen the list fills as the model is called.
    """
    found = []

    def options_of(module):
        ax.check_found("population_step", "norms of normax, not Flax's", not _is_flax(module))
        if not isinstance(module, Remembering) or module.freeze_stats:
            return {}
        found.append(True)
        return options(module)

    if isinstance(model, BoundNNX):
        for _, layer in nnx.iter_modules(model.nnx_model):
            for name, value in options_of(layer).items():
                setattr(layer, name, value)
        return found

    model.interceptor = as_if(options_of)
    return found


def _is_flax(module):
    return isinstance(module, _FLAX) and not isinstance(module, Remembering)


def _statistics_of(new, old):
    """Returns the state of a model with the running statistics of another."""
    if not isinstance(old, nnx.State):
        return {**old, "batch_stats": new["batch_stats"]}
    statistics, _ = nnx.split_state(new, nnx.BatchStat, ...)
    _, rest = nnx.split_state(old, nnx.BatchStat, ...)
    return nnx.merge_state(statistics, rest)
