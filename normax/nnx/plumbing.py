"""What every nnx module here shares: its signature, its parameters, and Flax's dtype rule."""

import dataclasses
import functools
import inspect
import math
from types import MappingProxyType

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from normax import options

NO_METADATA = MappingProxyType({})


def signed(module):
    """Gives a module a constructor of its own that shows the options, with their defaults."""
    construct = module.__init__
    shown: dict[str, inspect.Parameter] = {}
    for cls in module.__mro__:
        if "__init__" in vars(cls) and cls.__module__.startswith(__package__ or ""):
            parameters = inspect.signature(cls.__init__).parameters
            shown = {**parameters, **shown}
    for name in getattr(module, "not_taken", ()):
        shown.pop(name)
    for field in dataclasses.fields(module):
        keyword = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default
        )
        shown.setdefault(field.name, keyword)
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    positional = [p for p in shown.values() if p.kind not in kinds]
    keywords = [p for p in shown.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        # They have done their work; kept, two modules with initializers of their own would differ.
        for name in [name for name in vars(self) if name.endswith("_init")]:
            delattr(self, name)

    vars(__init__)["__signature__"] = inspect.Signature([*positional, *keywords])
    module.__init__ = __init__
    return module


class Promoting(options.Output):
    """Gives a module Flax's `promote_dtype`, which here decides the dtype of the output.

    The input is not cast by it: statistics are taken of the input as it came.
    """

    promote_dtype = staticmethod(dtypes.promote_dtype)

    def _output_dtype(self, x, *params):
        """Returns the dtype of the output, by Flax's rule for what was promoted."""
        with jax.numpy_dtype_promotion("standard"):
            promoted = jax.eval_shape(
                lambda values: self.promote_dtype(values, dtype=self.dtype), (x, *params)
            )
        return super()._output_dtype(*promoted)


def create_parameters(module, features, rngs, metadata):
    """Gives a module its parameters; None for one it does not use."""
    for name in module.learned:
        setattr(module, name, nnx.data(None))
    for name, init, shape in module._parameters(features):
        value = init(rngs.params(), shape, module.param_dtype)
        setattr(module, name, nnx.Param(value, **metadata.get(name, NO_METADATA)))


def parameters_of(module, x, given):
    """Returns the arrays of a module's parameters by name, those it uses, or what is given.

    Flax keeps those of several feature axes as one row where `num_features` is their product.
    """
    found = module._at_call(given)
    for name, _, shape in module._parameters(module._feature_shape(x)):
        if name in found:
            continue
        value = getattr(module, name)[...]
        one_row = value.ndim == 1 and value.size == math.prod(shape)
        found[name] = value.reshape(shape) if one_row else value
    return found
