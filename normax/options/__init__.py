"""The options of the modules: spelled, defaulted and documented once for linen and nnx.

A module is one of these classes, which knows how to call the pure function, and the plumbing of
parameters and state, which is all that `normax.linen` and `normax.nnx` add. Names, order, meaning
and defaults are Flax's where Flax has the module; what Flax lacks comes last.
"""

from normax.options.activations import BatchNormOptions as BatchNormOptions
from normax.options.activations import GroupNormOptions as GroupNormOptions
from normax.options.activations import InstanceNormOptions as InstanceNormOptions
from normax.options.activations import LayerNormOptions as LayerNormOptions
from normax.options.activations import RMSNormOptions as RMSNormOptions
from normax.options.conditional import AdaLNZeroOptions as AdaLNZeroOptions
from normax.options.conditional import AdaptiveInstanceNormOptions as AdaptiveInstanceNormOptions
from normax.options.conditional import FiLMOptions as FiLMOptions
from normax.options.conditional import Projected as Projected
from normax.options.family import AddLayerNormOptions as AddLayerNormOptions
from normax.options.family import AddRMSNormOptions as AddRMSNormOptions
from normax.options.family import BatchRenormOptions as BatchRenormOptions
from normax.options.family import DivisiveNormOptions as DivisiveNormOptions
from normax.options.family import DomainBatchNormOptions as DomainBatchNormOptions
from normax.options.family import DynamicTanhOptions as DynamicTanhOptions
from normax.options.family import EvoNormB0Options as EvoNormB0Options
from normax.options.family import EvoNormS0Options as EvoNormS0Options
from normax.options.family import FilterResponseNormOptions as FilterResponseNormOptions
from normax.options.family import GhostBatchNormOptions as GhostBatchNormOptions
from normax.options.family import GlobalResponseNormOptions as GlobalResponseNormOptions
from normax.options.family import KalmanBatchNormOptions as KalmanBatchNormOptions
from normax.options.family import L2NormOptions as L2NormOptions
from normax.options.family import LocalResponseNormOptions as LocalResponseNormOptions
from normax.options.family import MeanOnlyBatchNormOptions as MeanOnlyBatchNormOptions
from normax.options.family import RunningInstanceNormOptions as RunningInstanceNormOptions
from normax.options.family import SegmentNormOptions as SegmentNormOptions
from normax.options.family import SwitchableNormOptions as SwitchableNormOptions
from normax.options.family import VarianceOnlyBatchNormOptions as VarianceOnlyBatchNormOptions
from normax.options.fields import Activated as Activated
from normax.options.fields import Output as Output
from normax.options.fields import documented as documented
from normax.options.power import PowerNormOptions as PowerNormOptions
from normax.options.weights import CenteredWeightNormOptions as CenteredWeightNormOptions
from normax.options.weights import (
    ScaledWeightStandardizationOptions as ScaledWeightStandardizationOptions,
)
from normax.options.weights import SpectralNormOptions as SpectralNormOptions
from normax.options.weights import WeightNormOptions as WeightNormOptions
from normax.options.weights import WeightStandardizationOptions as WeightStandardizationOptions
