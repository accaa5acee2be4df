"""Flax linen modules: parameters and state in, the pure function called, out."""

from normax.linen.activations import BatchNorm as BatchNorm
from normax.linen.activations import GroupNorm as GroupNorm
from normax.linen.activations import InstanceNorm as InstanceNorm
from normax.linen.activations import LayerNorm as LayerNorm
from normax.linen.activations import RMSNorm as RMSNorm
from normax.linen.weights import SpectralNorm as SpectralNorm
from normax.linen.weights import WeightNorm as WeightNorm
