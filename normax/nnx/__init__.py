"""Flax nnx modules: parameters and state in, the pure function called, out."""

from normax.nnx.activations import BatchNorm as BatchNorm
from normax.nnx.activations import GroupNorm as GroupNorm
from normax.nnx.activations import InstanceNorm as InstanceNorm
from normax.nnx.activations import LayerNorm as LayerNorm
from normax.nnx.activations import RMSNorm as RMSNorm
from normax.nnx.weights import SpectralNorm as SpectralNorm
from normax.nnx.weights import WeightNorm as WeightNorm
