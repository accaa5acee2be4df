"""Jitted train and eval steps for models with running statistics, linen and nnx alike."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax.typing import DTypeLike

from normax import axes as ax
from normax.bind import LinenBinding, NNXBinding, check_structure
from normax.microbatch import accumulate, averaged, split


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes: a pytree, to be donated, saved and restored.

    Attributes:
      step: number of steps taken, int32.
      params: the parameters that the optimizer moves, in their own dtypes.
      model_state: every other variable of the model; in linen a dict of collections, such as
        `batch_stats`; in nnx the state that is not `nnx.Param`.
      opt_state: the optimizer's state.
      key: random key; each step folds its number in.
      skipped: number of steps that changed nothing, int32; see `train_step`.
      bind: binds variables to the model; static.
      tx: the optax optimizer; static.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    bind: Any = flax.struct.field(pytree_node=False)
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        model: linen.Module,
        tx: optax.GradientTransformation,
        key: jax.Array,
        *args: Any,
        rngs: tuple[str, ...] = ("dropout",),
        **kwargs: Any,
    ) -> "TrainState":
        """Initializes a linen model and the optimizer.

        Args:
          model: a `flax.linen.Module`.
          tx: any optax optimizer.
          key: random key, for the parameters now and for `rngs` at each step.
          *args: arguments of the model's call; only their shapes and dtypes matter.
          rngs: names of the random streams that the model draws from in training; at evaluation
            it has none.
          **kwargs: keyword arguments of the model's call.

        Returns:
          A `TrainState`.

        Raises:
          TypeError: `rngs` that is one string.

        Example:
          >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
          >>> from normax import train
          >>> state = train.TrainState.create(
          ...     nn.Dense(2), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 3))
          ... )
          >>> state.params["kernel"].shape
          (3, 2)
        """
        rngs = ax.check_names("TrainState.create", "rngs", rngs)
        init_key, key = jax.random.split(key)
        variables = dict(
            model.init({"params": init_key, **dict.fromkeys(rngs, key)}, *args, **kwargs)
        )
        params = variables.pop("params", {})
        bind = LinenBinding(model, rngs)
        return cls._start(params, variables, key, bind, tx)

    @classmethod
    def from_nnx(
        cls, model: nnx.Module, tx: optax.GradientTransformation, key: jax.Array | None = None
    ) -> "TrainState":
        """Takes the state out of an nnx model; `state.model` gives the model back.

        Args:
          model: a `flax.nnx.Module`.
          tx: any optax optimizer.
          key: random key, kept in the state; an nnx model draws from its own streams.

        Returns:
          A `TrainState`.

        Example:
          >>> import optax
          >>> from flax import nnx
          >>> from normax import train
          >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
          >>> state = train.TrainState.from_nnx(model, optax.sgd(0.1))
          >>> state.model.kernel.shape
          (3, 2)
        """
        model = nnx.clone(model)
        nnx.pop(model, nnx.Intermediate)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        key = jax.random.key(0) if key is None else key
        return cls._start(params, rest, key, NNXBinding(graph), tx)

    @classmethod
    def _start(cls, params, model_state, key, bind, tx):
        """Returns the state before the first step.

        It is donated at each step: nothing in it may be the caller's, or be in it twice.
        """
        opt_state = tx.init(params)
        params, model_state, opt_state, key = jax.tree.map(
            _own, (params, model_state, opt_state, key)
        )
        step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        return cls(step, params, model_state, opt_state, key, skipped, bind=bind, tx=tx)

    @property
    def variables(self) -> dict:
        """The variables of a linen model, for `model.apply`."""
        self._made_by("create", LinenBinding, "variables")
        return {"params": self.params, **self.model_state}

    @property
    def batch_stats(self) -> Any:
        """The running statistics of a linen model."""
        self._made_by("create", LinenBinding, "batch_stats")
        return self.model_state.get("batch_stats", {})

    @property
    def model(self) -> Any:
        """The nnx model, with the variables of this state."""
        self._made_by("from_nnx", NNXBinding, "model")
        # The arrays of the state are gone with the next step.
        return self.bind.merge(*jax.tree.map(_own, (self.params, self.model_state)))

    def _made_by(self, maker, kind, name):
        if not isinstance(self.bind, kind):
            raise AttributeError(
                f"TrainState.{name}: expected a state made by TrainState.{maker}; a linen model "
                "has variables and batch_stats, an nnx model is given back by model"
            )


def _own(leaf):
    """Returns a copy of an array, of a dtype that stays as it is."""
    copy = jnp.copy(leaf)
    return copy if jnp.issubdtype(copy.dtype, jax.dtypes.prng_key) else copy.astype(copy.dtype)


def train_step(
    loss: Callable[[Any, Any, bool], Any],
    *,
    dtype: DTypeLike | None = None,
    loss_scale: float = 1.0,
    microbatches: int = 1,
    nonfinite: str = "keep",
    donate: bool = True,
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """Builds a jitted training step for any model, loss and optax optimizer.

    Args:
      loss: a function `loss(model, batch, train)` of the model bound to its variables, called as
        the model itself is, and of a batch, any pytree. It returns a scalar, or a scalar and a
        dict of metrics; optimizers that take extra arguments are given its value and itself, the
        state before the step (`train_state`) and the batch. Each call of the model in it moves the
        running statistics once.
      dtype: mixed precision: the model computes in this dtype, such as `jnp.bfloat16`. The
        parameters are kept, and the loss, gradients, optimizer and running statistics computed,
        in float32; the model is given all of them cast, scale and bias of normalizers too.
      loss_scale: the loss is multiplied by it and the gradients divided, so that those of
        float16 do not underflow.
      microbatches: how many parts a batch is taken in, one after the other, to need the memory of
        one. Gradients, loss and metrics are averaged, as those of a mean over examples are. The
        statistics of the parts are merged, and move the running ones once, as those of the whole
        would but for the rounding of their means; each part is normalized by its own. A normalizer
        that is called twice moves once, too, by all that it saw.
        Normalizers whose statistics do not merge (`BatchRenorm`, `PowerNorm`, Flax's own) move with
        each part.
      nonfinite: "skip" leaves the state as it was, but for `step` and `skipped`, where the loss or
        a gradient is not finite, or a parameter, a number of the model's state or an array of the
        optimizer's would be no more, and adds "skipped" to the metrics, 1 or 0; on several devices
        or hosts all do the same. "keep" lets them in, or leaves them to the optimizer.
      donate: let the new state take the memory of the old one, which is then gone.

    A batch with NaN leaves the running statistics but makes the gradients NaN, and with them the
    parameters, unless it is skipped. An nnx model is put in training for the step; to freeze a
    layer's statistics give it `freeze_stats=True`.

    Returns:
      A function `step(state, batch)` that returns the new state, and the metrics with the loss
      under "loss".

    Raises:
      ValueError: a `loss_scale` that is not above 0; `microbatches` below 1; `nonfinite` another
        word; when it is traced: a loss that is no scalar, metrics that are no dict or have a "loss"
        or "skipped" of their own, a collection of the model that changes its structure, a model
        called inside a transformation of JAX, a batch that microbatches do not divide, or with them
        a normalizer that is called in training and in inference.
      TypeError: a dtype that is not floating-point.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, normax.linen, optax
      >>> from normax import train
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = normax.linen.BatchNorm(use_running_average=not train)(x)
      ...         return nn.Dense(1)(x)
      >>> def loss(model, batch, train):
      ...     x, y = batch
      ...     return optax.l2_loss(model(x, train=train)[:, 0], y).mean()
      >>> x = jax.random.normal(jax.random.key(0), (32, 3))
      >>> state = train.TrainState.create(
      ...     Model(), optax.sgd(0.1), jax.random.key(1), x, train=False
      ... )
      >>> step = train.train_step(loss)
      >>> for _ in range(50):
      ...     state, metrics = step(state, (x, x[:, 0]))
      >>> bool(metrics["loss"] < 0.1), int(state.step)
      (True, 50)
    """
    ax.check_computing_dtype("train_step", dtype)
    ax.check_loss_scale("train_step", loss_scale)
    microbatches = ax.to_positive_int("train_step", "microbatches", microbatches)
    ax.check_choice("train_step", "nonfinite", nonfinite, ("keep", "skip"))

    def call(model, batch):
        value, metrics = value_and_metrics(loss(model, batch, True))
        return value * loss_scale, metrics

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        given = split("train_step", batch, microbatches) if microbatches > 1 else batch

        def bind(params, model_state, key):
            return state.bind(params, model_state, key, train=True, dtype=dtype)

        def objective(params):
            model = bind(params, state.model_state, key)
            scaled, metrics = call(model, batch)
            return scaled, (metrics, _state_after(model, state.model_state))

        # A line search hands on what it is given beside the parameters, where it is named.
        def value_fn(params, train_state=None, batch=None):
            if microbatches == 1:
                return objective(params)[1][0]["loss"]
            return averaged(bind, call, params, state.model_state, given, key)["loss"]

        if microbatches == 1:
            grads, (metrics, model_state) = jax.grad(objective, has_aux=True)(state.params)
        else:
            grads, (metrics, model_state) = accumulate(
                bind, call, state.params, state.model_state, given, key
            )
        grads = jax.tree.map(lambda grad: grad / loss_scale, grads)
        updates, opt_state = optax.with_extra_args_support(state.tx).update(
            grads,
            state.opt_state,
            state.params,
            value=metrics["loss"],
            grad=grads,
            value_fn=value_fn,
            train_state=state,
            batch=batch,
        )
        new = state.replace(
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
        )
        if nonfinite == "skip":
            new, metrics = _unless_finite(state, new, grads, metrics)
        return new.replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=(0,) if donate else ())


def _unless_finite(old, new, grads, metrics):
    """Returns the new state, or the old one if something of the step is not finite."""
    if "skipped" in metrics:
        raise ValueError("loss: expected metrics without 'skipped', which is added")
    finite = [jnp.isfinite(v).all() for v in (metrics["loss"], *jax.tree.leaves(grads))]
    before, after = (
        (state.params, state.model_state, _arrays(state.opt_state)) for state in (old, new)
    )
    finite += jax.tree.leaves(jax.tree.map(_stays_finite, before, after))
    bad = ~jnp.stack(finite).all()
    state = jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)
    skipped = bad.astype(jnp.int32)
    return state.replace(skipped=old.skipped + skipped), {**metrics, "skipped": skipped}


def _arrays(opt_state):
    """Returns those leaves that are no scalars: of these optimizers may make an inf, to tell."""
    return [leaf for leaf in jax.tree.leaves(opt_state) if jnp.ndim(leaf)]


def _stays_finite(before, after):
    """Returns whether no entry was finite and is no more; None of what are no such numbers."""
    if not jnp.issubdtype(jnp.result_type(after), jnp.inexact):
        return None
    return (jnp.isfinite(after) | ~jnp.isfinite(before)).all()


def _state_after(model, before):
    """Returns the state that a model was left with, of the structure it had."""
    check_structure("the model's state", before, model.model_state)
    return model.model_state


def eval_step(
    loss: Callable[[Any, Any, bool], Any], *, dtype: DTypeLike | None = None
) -> Callable[[TrainState, Any], dict]:
    """Builds a jitted evaluation step: the same loss, with `train` False and nothing changed.

    Args:
      loss: as in `train_step`.
      dtype: as in `train_step`.

    Returns:
      A function `evaluate(state, batch)` that returns the metrics, the loss under "loss".

    Raises:
      ValueError: when it is traced: a loss that is no scalar, metrics that are no dict or have a
        "loss" of their own.
      TypeError: a dtype that is not floating-point.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from normax import train
      >>> x = jnp.ones((4, 3))
      >>> state = train.TrainState.create(nn.Dense(2), optax.sgd(0.1), jax.random.key(0), x)
      >>> evaluate = train.eval_step(lambda model, batch, train: (model(batch) ** 2).mean())
      >>> sorted(evaluate(state, x))
      ['loss']
    """
    ax.check_computing_dtype("eval_step", dtype)

    def evaluate(state, batch):
        model = state.bind(state.params, state.model_state, state.key, train=False, dtype=dtype)
        return value_and_metrics(loss(model, batch, False))[1]

    return jax.jit(evaluate)


def value_and_metrics(result):
    """Returns the loss, and the metrics with the loss among them."""
    value, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(metrics, dict) or "loss" in metrics:
        raise ValueError(
            f"loss: expected a dict of metrics without 'loss', which is added, got {metrics!r}"
        )
    if jnp.shape(value) != ():
        raise ValueError(f"loss: expected a scalar, got shape {jnp.shape(value)}; take its mean")
    return value, {"loss": value, **metrics}
