"""What every nnx module here shares: its signature, its parameters, and Flax's dtype rule."""

import dataclasses
import inspect
from types import MappingProxyType

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from normax import options

NO_METADATA = MappingProxyType({})


def signed(module):
    """Shows a module's options in its signature, as keywords with their defaults."""
    own = list(inspect.signature(module.__init__).parameters.values())
    names = {parameter.name for parameter in own}
    extra = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(module)
        if field.name not in names
    ]
    shown = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    module.__init__.__signature__ = inspect.Signature([*shown, *extra])
    return module


class Promoting(options.Output):
    """Gives a module Flax's `promote_dtype`, which here decides the dtype of the output.

    The input is not cast by it: statistics are taken of the input as it came.
    """

    promote_dtype = staticmethod(dtypes.promote_dtype)

    def output_dtype(self, x, *params):
        """Returns the dtype of the output, by Flax's rule for what was promoted."""
        with jax.numpy_dtype_promotion("standard"):
            promoted = jax.eval_shape(
                lambda values: self.promote_dtype(values, dtype=self.dtype), (x, *params)
            )
        return super().output_dtype(*promoted)


def create_parameters(module, shape, rngs, bias_metadata, scale_metadata):
    """Gives a module its scale and bias; None for one it does not use."""
    module.scale = module.bias = nnx.data(None)
    if module.use_scale:
        value = module.scale_init(rngs.params(), shape, module.param_dtype)
        module.scale = nnx.Param(value, **scale_metadata)
    if module.use_bias:
        value = module.bias_init(rngs.params(), shape, module.param_dtype)
        module.bias = nnx.Param(value, **bias_metadata)


def value_of(variable):
    """Returns the array of a variable, and None for none."""
    return None if variable is None else variable[...]
