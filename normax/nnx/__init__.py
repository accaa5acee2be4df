"""Flax nnx modules: parameters and state in, the pure function called, out."""

from normax.nnx.activations import BatchNorm as BatchNorm
from normax.nnx.activations import GroupNorm as GroupNorm
from normax.nnx.activations import InstanceNorm as InstanceNorm
from normax.nnx.activations import LayerNorm as LayerNorm
from normax.nnx.activations import RMSNorm as RMSNorm
from normax.nnx.family import BatchRenorm as BatchRenorm
from normax.nnx.family import DivisiveNorm as DivisiveNorm
from normax.nnx.family import DomainBatchNorm as DomainBatchNorm
from normax.nnx.family import DynamicTanh as DynamicTanh
from normax.nnx.family import EvoNormB0 as EvoNormB0
from normax.nnx.family import EvoNormS0 as EvoNormS0
from normax.nnx.family import FilterResponseNorm as FilterResponseNorm
from normax.nnx.family import GhostBatchNorm as GhostBatchNorm
from normax.nnx.family import GlobalResponseNorm as GlobalResponseNorm
from normax.nnx.family import KalmanBatchNorm as KalmanBatchNorm
from normax.nnx.family import L2Norm as L2Norm
from normax.nnx.family import LocalResponseNorm as LocalResponseNorm
from normax.nnx.family import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from normax.nnx.family import SegmentNorm as SegmentNorm
from normax.nnx.family import SwitchableNorm as SwitchableNorm
from normax.nnx.family import VarianceOnlyBatchNorm as VarianceOnlyBatchNorm
from normax.nnx.weights import CenteredWeightNorm as CenteredWeightNorm
from normax.nnx.weights import ScaledWeightStandardization as ScaledWeightStandardization
from normax.nnx.weights import SpectralNorm as SpectralNorm
from normax.nnx.weights import WeightNorm as WeightNorm
from normax.nnx.weights import WeightStandardization as WeightStandardization
