"""Options that several modules have, and what makes a class a set of options."""

import dataclasses
import functools
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.nn import initializers

from normax import axes as ax

Initializer = Any


@dataclass_transform(eq_default=False)
def options(cls):
    """Makes a class a set of options; equality and representation are left to the module."""
    return dataclasses.dataclass(eq=False, repr=False)(cls)


def documented(module):
    """Appends the options' documentation to a module's docstring."""
    sections = [
        inspect.cleandoc(vars(cls).get("__doc__") or "").partition("Args:\n")[2].rstrip()
        for cls in reversed(module.__mro__)
        if cls.__module__.startswith("normax.")
    ]
    taken = {field.name for field in dataclasses.fields(module)}
    entries = [re.split(r"\n(?=  \w)", section) for section in sections if section]
    body = "\n".join(
        entry
        for entry in itertools.chain.from_iterable(entries)
        if not hasattr(Output, name := entry.partition(":")[0].strip()) or name in taken
    )
    module.__doc__ = f"{inspect.cleandoc(module.__doc__)}\n\nOptions:\n{body}\n"
    return module


@options
class Output:
    """Options of the output.

    Args:
      epsilon: added to the variance, inside the root.
      dtype: dtype of the output; None is what the input and the parameters promote to.
      param_dtype: dtype that the parameters are created with.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def _output_dtype(self, x, *params):
        """Returns the dtype of the output, by Flax's rule."""
        return ax.result_dtype(type(self).__name__, self.dtype, x, *params)


@options
class Normalizer(Output):
    """Calls a pure function with the options it takes; a subclass says which function.

    `_function` is the pure one; every option that is also a parameter of it is passed on under its
    own name. A learned parameter `p` has an option `p_init`, and may have a switch `use_p`.

    Args:
      freeze_affine: let no gradient reach the parameters, for fine-tuning.
    """

    _function: ClassVar[Any]
    learned: ClassVar[tuple[str, ...]] = ("scale", "bias")
    scalars: ClassVar[tuple[str, ...]] = ()
    freeze_affine: bool = False

    def _feature_shape(self, x):
        """Returns the shape of the parameters."""
        axes = getattr(self, "feature_axes", ())
        return ax.shape_along(type(self).__name__, "feature_axes", axes, x)

    def _parameters(self, features):
        """Yields name, initializer and shape of each parameter in use; `features` is theirs."""
        for name in self.learned:
            if getattr(self, f"use_{name}", True):
                yield name, getattr(self, f"{name}_init"), () if name in self.scalars else features

    def _at_call(self, given):
        """Returns what a call gives in place of parameters; None is nothing."""
        ax.check_learned(type(self).__name__, given, self.learned)
        return {name: value for name, value in given.items() if value is not None}

    def _given(self, parameters):
        """Returns the parameters as the function is given them."""
        return jax.lax.stop_gradient(parameters) if self.freeze_affine else parameters

    def _passed_on(self, function, *, but=()):
        """Returns the options that a function takes, by name; the dtype is for the caller."""
        names = _shared(function, type(self)) - {"dtype", *but}
        return {name: getattr(self, name) for name in names}

    def _masked(self, mask):
        """Returns the mask as the function is given it, which may know none."""
        if mask is None:
            return {}
        ax.check_takes_mask(type(self).__name__, self._function)
        return {"mask": mask}

    def _dtype_for(self, x, parameters, *args):
        """Returns the dtype of the output, given the parameters by name and what else there is."""
        return self._output_dtype(x, *parameters.values())

    def _normalize(self, x, parameters, *args, mask=None):
        """Returns the normalized input, given the parameters by name."""
        masked = self._masked(mask)
        return self._function(
            x,
            *args,
            **self._given(parameters),
            **masked,
            dtype=self._dtype_for(x, parameters, *args),
            **self._passed_on(self._function),
        )


@functools.cache
def _shared(function, cls):
    """Returns the names of the options that are also parameters of a function."""
    names = {field.name for field in dataclasses.fields(cls)}
    return names & set(inspect.signature(function).parameters)


def shifted(init, offset):
    """Returns an initializer whose values are those of another, moved."""

    def initialize(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype) + jnp.asarray(offset, dtype)

    return initialize


@options
class Affine(Output):
    """Options of scale and bias.

    Args:
      use_bias: whether there is a bias.
      use_scale: whether there is a scale; a linear layer that follows can do without.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
    """

    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones


@options
class Scaled(Output):
    """Options of a scale.

    Args:
      use_scale: whether there is a scale.
      scale_init: initializer of the scale.
    """

    learned: ClassVar[tuple[str, ...]] = ("scale",)
    use_scale: bool = True
    scale_init: Initializer = initializers.ones


@options
class Devices:
    """Options of statistics over devices.

    Args:
      axis_name: name, or names, of a mapped axis over which statistics are pooled, by count.
      axis_index_groups: groups of device indices that pool among themselves.
    """

    axis_name: Any = None
    axis_index_groups: Any = None


@options
class Pooled(Devices):
    """Options of statistics over devices, and of Flax's reductions.

    Args:
      use_fast_variance: taken for Flax's sake; the variance is always the accurate one.
      force_float32_reductions: False keeps running statistics in `param_dtype`, as in Flax;
        reductions are in float32 at least, whatever this says.
    """

    use_fast_variance: bool = True
    force_float32_reductions: bool = True


@options
class LayerAxes:
    """Options of which axes.

    Args:
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale and bias of their own.
    """

    reduction_axes: ax.Axes = -1
    feature_axes: ax.Axes = -1


@options
class FeatureAxes:
    """Options of which features.

    Args:
      feature_axes: axes that keep statistics, a scale and a bias of their own.
    """

    feature_axes: ax.Axes = -1


@options
class Groups:
    """Options of which groups.

    Args:
      num_groups: number of groups; it must divide the number of features.
      group_size: features in a group, in place of `num_groups`, which then must be None.
    """

    num_groups: int | None = 32
    group_size: int | None = None


@options
class GroupAxes:
    """Options of which axes.

    Args:
      reduction_axes: axes that are summarised together, the feature axis among them; every axis
        but the leading one by default.
    """

    reduction_axes: ax.Axes | None = None


@options
class Running:
    """Options of running statistics.

    Args:
      use_running_average: True at inference, False in training; here or at the call.
      axis: axis or axes that keep statistics, a scale and a bias of their own.
      momentum: weight of the past; None makes the running statistics those of all data seen, and
        keeps their count beside them. A function of the number of training steps, such as a
        schedule of optax, keeps that number, `steps`.
    """

    use_running_average: bool | None = None
    axis: ax.Axes = -1
    momentum: Any = 0.99


@options
class Wrapper:
    """Options of a module around a module.

    Args:
      layer_instance: the layer whose weights are normalized.
    """

    layer_instance: Any


@options
class PowerIteration(Wrapper):
    """Options of a power iteration.

    Args:
      n_steps: power iterations at each call; 0 leaves the weights as they are.
    """

    n_steps: int = 1


@options
class Activated:
    """What is applied to the output.

    Args:
      activation: function applied to the output, entry by entry, before it is rounded; what goes
        into it is not kept for the backward pass. It holds no arrays; a new one is compiled anew.
    """

    activation: Callable[[jax.Array], jax.Array] | None = None


@options
class Implemented:
    """Which implementation it is.

    Args:
      implementation: None or "xla", or a kernel by name, of those that the function names. One
        that cannot be had is refused.
    """

    implementation: str | None = None
