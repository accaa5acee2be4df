"""Variables from elsewhere and back: PyTorch, Keras, Flax; normalizers folded into their layers."""

from normax.interop.flax import from_flax as from_flax
from normax.interop.folding import affine_of as affine_of
from normax.interop.folding import fold_into_next as fold_into_next
from normax.interop.folding import fold_into_previous as fold_into_previous
from normax.interop.hyperparameters import options_of as options_of
from normax.interop.keras import from_keras as from_keras
from normax.interop.keras import to_keras as to_keras
from normax.interop.models import Folded as Folded
from normax.interop.models import fold_linen as fold_linen
from normax.interop.models import fold_nnx as fold_nnx
from normax.interop.pairing import Report as Report
from normax.interop.pytorch import from_torch as from_torch
from normax.interop.pytorch import to_torch as to_torch
