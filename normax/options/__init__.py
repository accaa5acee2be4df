"""The options of the modules: spelled, defaulted and documented once for linen and nnx.

A module is one of these classes, which knows how to call the pure function, and the plumbing of
parameters and state, which is all that `normax.linen` and `normax.nnx` add. Names, order, meaning
and defaults are Flax's; what Flax lacks comes last.
"""

from normax.options.activations import BatchNormOptions as BatchNormOptions
from normax.options.activations import GroupNormOptions as GroupNormOptions
from normax.options.activations import InstanceNormOptions as InstanceNormOptions
from normax.options.activations import LayerNormOptions as LayerNormOptions
from normax.options.activations import RMSNormOptions as RMSNormOptions
from normax.options.fields import Output as Output
from normax.options.fields import documented as documented
from normax.options.weights import SpectralNormOptions as SpectralNormOptions
from normax.options.weights import WeightNormOptions as WeightNormOptions
