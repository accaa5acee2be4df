"""What each layer of a model is given, gives and is told to change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normax import axes as ax
from normax.diagnostics.length import length
from normax.diagnostics.watch import watched
from normax.moments import Moments, merge, moments
from normax.regularize import names_of
from normax.train import TrainState

Loss = Callable[[Any, Any, bool], Any]


class LayerStatistics(NamedTuple):
    """The statistics of a layer, by feature: the last axis; all others are entries.

    Attributes:
      input: of what it is given.
      output: of what it gives.
    """

    input: Moments
    output: Moments


class GradientNorms(NamedTuple):
    """Lengths of the gradients at a layer.

    Attributes:
      weights: of the loss with respect to the layer's own parameters; 0 where it has none.
      output: of the loss with respect to what it gives, all entries together; 0 where that is no
        array.
    """

    weights: jax.Array
    output: jax.Array


class Shift(NamedTuple):
    """How far a layer's activations moved, over features that vary before and after.

    Attributes:
      mean: root mean square of the means' move, in deviations of before.
      deviation: root mean square of the logarithm of the deviations' ratio.
      divergence: mean of the divergence of Kullback and Leibler of Gaussians of those statistics,
        after from before.
    """

    mean: jax.Array
    deviation: jax.Array
    divergence: jax.Array


def layer_statistics(
    loss: Loss, state: TrainState, batch: Any, *, train: bool = True
) -> dict[str, LayerStatistics]:
    """Measures the statistics of what each layer of a model is given and gives.

    A layer is a module that holds variables itself: a convolution, a dense layer, a norm. The
    model's code stays as it is, and so does its state; linen and nnx alike, within their `jit` and
    `remat` too. It can be jitted, as can what else is in `normax.diagnostics`.

    Args:
      loss: as in `normax.train.train_step`.
      state: of the model.
      batch: what the loss takes.
      train: the mode that the model is in.

    Returns:
      `LayerStatistics` by the path of each layer, in the order of their calls; of several calls all
      together. What is no floating-point array, such as the ids of an embedding, has none, and is
      left out with its layer; so is what is called within `nn.scan` or `nn.vmap`.

    Raises:
      ValueError: a model without layers, or one that the loss calls inside `jax.checkpoint`,
        `jax.jit` or the like: use Flax's own `nn.remat` and `nn.jit` in the model.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from normax import diagnostics, train
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> state = train.TrainState.create(model, optax.sgd(0.1), jax.random.key(1), x)
      >>> loss = lambda model, batch, train: (model(batch) ** 2).mean()
      >>> found = diagnostics.layer_statistics(loss, state, x)
      >>> {path: layer.output.mean.shape for path, layer in found.items()}
      {'layers_0': (4,), 'layers_2': (1,)}
    """

    def note(call):
        if not (_is_float(call.input) and _is_float(call.output)):
            return None
        return LayerStatistics(_by_feature(call.input), _by_feature(call.output))

    _, notes = watched(loss, state, batch, train=train, note=note)
    return {path: _merged(calls) for path, calls in notes.items()}


def gradient_norms(
    loss: Loss, state: TrainState, batch: Any, *, train: bool = True
) -> dict[str, GradientNorms]:
    r"""Measures the gradient that reaches each layer: whether it vanishes or explodes on the way.

    .. math:: \left\|\frac{\partial L}{\partial \theta_l}\right\|,\qquad
              \left\|\frac{\partial L}{\partial h_l}\right\|

    Args:
      loss: as in `normax.train.train_step`.
      state: of the model.
      batch: what the loss takes.
      train: the mode that the model is in.

    Returns:
      `GradientNorms` by the path of each layer, in the order of their calls; of a layer that is
      called several times, or under `jax.vmap`, the lengths at its outputs are added.

    Raises:
      ValueError: a model without layers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from normax import diagnostics, train
      >>> model = nn.Sequential([layer for n in (8,) * 6 for layer in (nn.Dense(n), nn.sigmoid)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> state = train.TrainState.create(model, optax.sgd(0.1), jax.random.key(1), x)
      >>> loss = lambda model, batch, train: (model(batch) ** 2).mean()
      >>> found = diagnostics.gradient_norms(loss, state, x)
      >>> bool(found["layers_0"].weights < 0.01 * found["layers_10"].weights)  # it vanishes
      True
    """
    arrays: dict[str, bool] = {}

    def look(call):
        arrays[call.path] = _is_float(call.output)
        return call.output

    jax.eval_shape(lambda state: watched(loss, state, batch, train=train, change=look)[0], state)

    def value(params, sinks):
        def change(call):
            return _tapped(call.output, sinks[call.path]) if call.path in sinks else call.output

        return watched(loss, state.replace(params=params), batch, train=train, change=change)[0]

    sinks = {path: jnp.zeros((), jnp.float32) for path, is_one in arrays.items() if is_one}
    grads, lengths = jax.grad(value, (0, 1))(state.params, sinks)
    own: dict[str, list] = {path: [] for path in arrays}
    for keys, leaf in jax.tree.leaves_with_path(grads):
        path = "/".join(names_of(keys))
        holders = [layer for layer in own if path.startswith(f"{layer}/") or not layer]
        if holders:
            own[max(holders, key=len)].append(leaf)
    zero = jnp.zeros((), jnp.float32)
    return {
        path: GradientNorms(_size(leaves), lengths.get(path, zero)) for path, leaves in own.items()
    }


def activation_shift(
    before: dict[str, LayerStatistics], after: dict[str, LayerStatistics], *, of: str = "input"
) -> dict[str, Shift]:
    r"""Measures how far each layer's activations moved: what is called internal covariate shift.

    .. math:: \frac{\mu' - \mu}{\sigma},\qquad \log \frac{\sigma'}{\sigma},\qquad
              \log\frac{\sigma}{\sigma'} + \frac{\sigma'^2 + (\mu' - \mu)^2}{2 \sigma^2} - \frac12

    Args:
      before: `layer_statistics`, of a batch before a step.
      after: those of the same batch after it.
      of: "input" or "output".

    Returns:
      `Shift` by path, of the layers that are in both.

    Raises:
      ValueError: another word.

    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import Moments, diagnostics
      >>> layer = lambda mean, var: diagnostics.LayerStatistics(*2 * [
      ...     Moments(jnp.array(8), jnp.array([mean]), jnp.array([var]))
      ... ])
      >>> found = diagnostics.activation_shift({"a": layer(0.0, 4.0)}, {"a": layer(1.0, 4.0)})
      >>> print(found["a"].mean, found["a"].deviation, found["a"].divergence)
      0.5 0.0 0.125
    """
    ax.check_choice("activation_shift", "of", of, LayerStatistics._fields)
    both = [path for path in before if path in after]
    return {path: _shift(getattr(before[path], of), getattr(after[path], of)) for path in both}


def _shift(before, after):
    varies = (before.var > 0) & (after.var > 0)
    old, new = (jnp.where(varies, m.var, 1) for m in (before, after))
    move = (after.mean - before.mean) ** 2 / old
    log = 0.5 * jnp.log(new / old)
    over = lambda terms: moments(terms, range(terms.ndim), mask=varies).mean  # noqa: E731
    divergence = 0.5 * (jnp.expm1(2 * log) + move) - log
    return Shift(jnp.sqrt(over(move)), jnp.sqrt(over(log**2)), over(divergence))


def _is_float(value):
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 0


def _by_feature(x):
    x = x[None] if x.ndim == 1 else x  # of one example, under jax.vmap
    return moments(x, tuple(range(x.ndim - 1)))


def _merged(calls):
    first, *others = calls
    for other in others:
        first = LayerStatistics(*map(merge, first, other))
    return first


def _size(leaves):
    return length(leaves).astype(jnp.float32)


@jax.custom_vjp
def _tapped(x, sink):
    """Returns x; the cotangent of the sink is the length of that of x."""
    return x


def _tap_forward(x, sink):
    return x, None


def _tap_backward(_, cotangent):
    return cotangent, _size([cotangent])


_tapped.defvjp(_tap_forward, _tap_backward)
