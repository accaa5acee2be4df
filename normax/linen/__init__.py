"""Flax linen modules: parameters and state in, the pure function called, out."""

from normax.linen.activations import BatchNorm as BatchNorm
from normax.linen.activations import GroupNorm as GroupNorm
from normax.linen.activations import InstanceNorm as InstanceNorm
from normax.linen.activations import LayerNorm as LayerNorm
from normax.linen.activations import RMSNorm as RMSNorm
from normax.linen.family import BatchRenorm as BatchRenorm
from normax.linen.family import DivisiveNorm as DivisiveNorm
from normax.linen.family import DomainBatchNorm as DomainBatchNorm
from normax.linen.family import DynamicTanh as DynamicTanh
from normax.linen.family import EvoNormB0 as EvoNormB0
from normax.linen.family import EvoNormS0 as EvoNormS0
from normax.linen.family import FilterResponseNorm as FilterResponseNorm
from normax.linen.family import GhostBatchNorm as GhostBatchNorm
from normax.linen.family import GlobalResponseNorm as GlobalResponseNorm
from normax.linen.family import KalmanBatchNorm as KalmanBatchNorm
from normax.linen.family import L2Norm as L2Norm
from normax.linen.family import LocalResponseNorm as LocalResponseNorm
from normax.linen.family import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from normax.linen.family import SegmentNorm as SegmentNorm
from normax.linen.family import SwitchableNorm as SwitchableNorm
from normax.linen.family import VarianceOnlyBatchNorm as VarianceOnlyBatchNorm
from normax.linen.weights import CenteredWeightNorm as CenteredWeightNorm
from normax.linen.weights import ScaledWeightStandardization as ScaledWeightStandardization
from normax.linen.weights import SpectralNorm as SpectralNorm
from normax.linen.weights import WeightNorm as WeightNorm
from normax.linen.weights import WeightStandardization as WeightStandardization
