"""Who takes part in JAX: each library's norm as a function of (x, scale, bias), if it is installed.

A builder takes a `Case` and returns the function, or None where the library has no such norm. A
batch norm returns the running statistics that it updated, too: they are part of its work.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import normax
from benchmarks.speed.cases import ACTIVATIONS, Case

Norm = Callable[[jax.Array, jax.Array, jax.Array], Any]
# The implementations that may be asked for by name on a platform; "xla" may be anywhere.
KERNELS = {"cpu": ["cpu"], "gpu": ["mosaic_gpu"], "tpu": ["mosaic_tpu"]}


class Fused(NamedTuple):
    """A norm that does by itself what is fused with it.

    Attributes:
      function: of (x, second, scale, bias); returns the outputs by name, and what it updated.
    """

    function: Callable[..., tuple[dict[str, jax.Array], Any]]


def _normax(case: Case, **options) -> Norm:
    if case.norm == "layer":
        return functools.partial(normax.layer_norm, epsilon=case.epsilon, **options)
    if case.norm == "rms":
        return lambda x, scale, bias: normax.rms_norm(x, scale, epsilon=case.epsilon, **options)
    if case.norm == "group":
        return functools.partial(
            normax.group_norm, num_groups=case.groups, epsilon=case.epsilon, **options
        )

    def batch(x, scale, bias):
        stats = normax.RunningStats.create(x.shape[-1])
        return normax.batch_norm(
            x, stats, scale, bias, use_running_average=False, epsilon=case.epsilon, **options
        )

    return batch


def _normax_fused(case: Case, **options) -> Fused | None:
    """Returns normax's norm with what is fused with it, where there is such a thing."""
    if case.wrap == "add":
        add = {"layer": normax.add_layer_norm, "rms": normax.add_rms_norm}[case.norm]

        def sum_too(x, second, *parameters):
            given = parameters if case.centered else parameters[:1]
            y, total = add(x, second, *given, epsilon=case.epsilon, **options)
            return {"y": y, "sum": total}, ()

        return Fused(sum_too)
    if case.wrap not in ACTIVATIONS:
        return None
    norm = _normax(case, activation=ACTIVATIONS[case.wrap], **options)

    def activated(x, second, scale, bias):
        del second
        y = norm(x, scale, bias)
        y, state = y if case.norm == "batch" else (y, ())
        return {"y": y}, state

    return Fused(activated)


def implementations(case: Case) -> list[str]:
    """Returns the implementations that normax's function of a case can be asked for by name."""
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    line = jax.ShapeDtypeStruct(case.shape[-1:], "float32")

    def can(name):
        try:
            jax.eval_shape(_normax(case, implementation=name), x, line, line)
        except ValueError:  # which says why not
            return False
        return True

    return ["xla", *filter(can, KERNELS.get(jax.default_backend(), []))]


def _plain(case: Case) -> Norm:
    """Returns the formula as it is written in papers, for autodiff."""

    def normalize(x, scale, bias):
        grouped = x.astype(jnp.float32)
        if case.norm == "group":
            grouped = grouped.reshape(*x.shape[:-1], case.groups, -1)
        last = grouped.ndim - 1
        axes = {"batch": tuple(range(last)), "group": (*range(1, last - 1), last)}
        axes = axes.get(case.norm, (last,))
        mean = jnp.mean(grouped, axes, keepdims=True) if case.centered else 0.0
        d = grouped - mean
        var = jnp.mean(d * d, axes, keepdims=True)
        y = (d * jax.lax.rsqrt(var + case.epsilon)).reshape(x.shape)
        y = y * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        y = (y + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))) if case.centered else y
        y = y.astype(x.dtype)
        if case.norm != "batch":
            return y
        return y, (0.01 * jnp.ravel(mean), 0.99 + 0.01 * jnp.ravel(var))

    return normalize


def _linen(case: Case) -> Norm:
    import flax.linen as nn

    common: dict[str, Any] = {"epsilon": case.epsilon, "dtype": case.dtype}
    if case.norm == "batch":
        layer = nn.BatchNorm(use_running_average=False, **common)

        def batch(x, scale, bias):
            stats = {"mean": jnp.zeros(scale.shape), "var": jnp.ones(scale.shape)}
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
            return layer.apply(variables, x, mutable=["batch_stats"])

        return batch
    if case.norm == "group":
        layer = nn.GroupNorm(num_groups=case.groups, **common)
    else:
        layer = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[case.norm](**common)
    names = ("scale", "bias") if case.centered else ("scale",)
    return lambda x, *given: layer.apply({"params": dict(zip(names, given, strict=False))}, x)


def _nnx(case: Case) -> Norm:
    from flax import nnx

    make: Any = {
        "layer": nnx.LayerNorm,
        "rms": nnx.RMSNorm,
        "group": functools.partial(nnx.GroupNorm, num_groups=case.groups),
        "batch": functools.partial(nnx.BatchNorm, use_running_average=False),
    }[case.norm]

    def normalize(x, scale, bias):
        # Made where it is used: variables of nnx may not be changed from within another trace.
        layer = make(x.shape[-1], epsilon=case.epsilon, dtype=x.dtype, rngs=nnx.Rngs(0))
        layer.scale = nnx.Param(scale)
        if case.centered:
            layer.bias = nnx.Param(bias)
        y = layer(x)
        return (y, (layer.mean[...], layer.var[...])) if case.norm == "batch" else y

    return normalize


def _haiku(case: Case) -> Norm:
    import haiku as hk

    if case.norm == "layer":
        make: Any = lambda: hk.LayerNorm(-1, False, False, eps=case.epsilon)
    elif case.norm == "rms":
        make = lambda: hk.RMSNorm(-1, case.epsilon, create_scale=False)
    elif case.norm == "group":
        make = lambda: hk.GroupNorm(
            case.groups, create_scale=False, create_offset=False, eps=case.epsilon
        )
    else:
        make = lambda: hk.BatchNorm(False, False, decay_rate=0.99, eps=case.epsilon)

    def normalize(x, scale, bias):
        # Parameters of the dtype of x, as in Haiku's mixed precision.
        wide = (None,) * (x.ndim - 1)
        scale, bias = scale.astype(x.dtype)[wide], bias.astype(x.dtype)[wide]

        def layer(x):
            if case.norm == "batch":
                return make()(x, True, scale=scale, offset=bias)
            if case.norm == "rms":
                return make()(x) * scale
            return make()(x, scale=scale, offset=bias)

        model = hk.transform_with_state(layer)
        params, state = model.init(None, x)
        y, state = model.apply(params, state, None, x)
        return (y, state) if case.norm == "batch" else y

    return normalize


def _equinox(case: Case) -> Norm:
    import equinox as eqx

    def normalize(x, scale, bias):
        channels = x.shape[-1]

        def put(layer):
            if not case.centered:
                return eqx.tree_at(lambda layer: layer.weight, layer, scale)
            return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (scale, bias))

        if case.norm == "batch":
            made, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
                channels, "batch", eps=case.epsilon, mode="batch"
            )
            first = jnp.moveaxis(x, -1, 1)
            mapped = jax.vmap(put(made), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            y, state = mapped(first, state)
            return jnp.moveaxis(y, 1, -1), state
        if case.norm == "group":
            layer = put(eqx.nn.GroupNorm(case.groups, channels, eps=case.epsilon))
            return jnp.moveaxis(jax.vmap(layer)(jnp.moveaxis(x, -1, 1)), 1, -1)
        if case.norm == "rms":
            layer = put(eqx.nn.RMSNorm(channels, eps=case.epsilon, use_bias=False))
        else:
            layer = put(eqx.nn.LayerNorm(channels, eps=case.epsilon))
        return jax.vmap(layer)(x)

    return normalize


def _keras(case: Case) -> Norm | None:
    # Keras reads it when it is imported; its own default is another library.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        return None
    policy = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}.get(case.dtype, case.dtype)
    common = {"epsilon": case.epsilon, "dtype": policy}
    if case.norm == "group":
        layer = keras.layers.GroupNormalization(case.groups, **common)
    else:
        names = {"layer": "Layer", "rms": "RMS", "batch": "Batch"}
        layer = getattr(keras.layers, f"{names[case.norm]}Normalization")(**common)
    layer.build(case.shape)

    def normalize(x, scale, bias):
        given = [scale, bias] if case.centered else [scale]
        state = [variable.value for variable in layer.non_trainable_variables]
        options = {"training": True} if case.norm == "batch" else {}
        y, state = layer.stateless_call(given, state, x, **options)[:2]
        return (y, state) if case.norm == "batch" else y

    return normalize


_BUILDERS: dict[str, tuple[str, Callable[[Case], Norm | None]]] = {
    "plain jax": ("jax", _plain),
    "flax linen": ("flax", _linen),
    "flax nnx": ("flax", _nnx),
    "haiku": ("haiku", _haiku),
    "equinox": ("equinox", _equinox),
    "keras": ("keras", _keras),
}
NAMES = ("normax", *_BUILDERS)


@functools.cache
def importable(module: str) -> bool:
    """Returns whether a peer is there; one that is there but broken counts as absent."""
    if module == "keras":
        os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


def norms(case: Case) -> dict[str, Callable[[], Norm | Fused | None]]:
    """Returns what makes the norm of a case, by contestant: normax first."""
    found: dict[str, Callable[[], Any]] = {"normax": lambda: _normax(case)}
    if _normax_fused(case) is not None:
        found["normax fused"] = functools.partial(_normax_fused, case)
    for name in implementations(case):
        found[f"normax {name}"] = functools.partial(_normax, case, implementation=name)
        if name != "xla" and case.wrap == "add":
            found[f"normax {name}"] = functools.partial(_normax_fused, case, implementation=name)
    for name, (module, build) in _BUILDERS.items():
        if importable(module):
            found[name] = functools.partial(build, case)
    return found
