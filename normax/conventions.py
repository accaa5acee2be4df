"""What other libraries mean by their defaults, as plain values in normax's words."""

from types import MappingProxyType

from normax import axes as ax

_PLAIN = ("layer_norm", "rms_norm", "group_norm", "instance_norm")


def _library(epsilon, batch_norm, **others):
    rest = {name: {"epsilon": others.get(name, epsilon)} for name in _PLAIN}
    return {"batch_norm": {"unbiased": False, **batch_norm}, **rest}


_BATCH = {"epsilon": 1e-5, "momentum": 0.99}
# Haiku has no default momentum, and Keras no instance normalization but a group normalization.
_CONVENTIONS = MappingProxyType(
    {
        "flax": _library(1e-6, _BATCH, instance_norm=1e-6),
        "torch": _library(
            1e-5,
            {"epsilon": 1e-5, "momentum": 0.9, "unbiased": True},
            rms_norm=2.0**-23,  # that of float32; it follows the input's dtype there
        ),
        "keras": _library(1e-3, {"epsilon": 1e-3, "momentum": 0.99}, rms_norm=1e-6),
        "haiku": _library(1e-5, _BATCH),
        "equinox": _library(1e-5, _BATCH),
        "onnx": _library(1e-5, {"epsilon": 1e-5, "momentum": 0.9}),
    }
)


def convention(library: str, normalizer: str) -> dict:
    """Returns the options that make a normalizer what another library's defaults make it.

    Args:
      library: "flax", "torch", "keras", "haiku", "equinox" or "onnx".
      normalizer: "batch_norm", "layer_norm", "rms_norm", "group_norm" or "instance_norm".

    Returns:
      A dict of `epsilon`, and for batch norm `momentum`, the weight of the past, and `unbiased`:
      to be given to the function, or to the module of that name.

    Raises:
      ValueError: another library or normalizer.

    Example:
      >>> import normax
      >>> normax.convention("torch", "batch_norm")
      {'unbiased': True, 'epsilon': 1e-05, 'momentum': 0.9}
      >>> import jax.numpy as jnp
      >>> y = normax.layer_norm(jnp.ones((2, 3)), **normax.convention("keras", "layer_norm"))
    """
    ax.check_choice("convention", "library", library, tuple(_CONVENTIONS))
    chosen = _CONVENTIONS[library]
    ax.check_choice("convention", "normalizer", normalizer, tuple(chosen))
    return dict(chosen[normalizer])
