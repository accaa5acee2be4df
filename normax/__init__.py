"""normax: normalization for JAX and Flax. Pure functions, explicit state."""

from normax.batch import batch_norm as batch_norm
from normax.batch import normalize_batch as normalize_batch
from normax.features import FeatureScaling as FeatureScaling
from normax.features import condition_number as condition_number
from normax.features import inverse_features as inverse_features
from normax.features import min_max_features as min_max_features
from normax.features import robust_features as robust_features
from normax.features import standardize_features as standardize_features
from normax.features import transform_features as transform_features
from normax.group import group_norm as group_norm
from normax.layer import instance_norm as instance_norm
from normax.layer import layer_norm as layer_norm
from normax.layer import rms_norm as rms_norm
from normax.moments import Moments as Moments
from normax.moments import RunningStats as RunningStats
from normax.moments import merge as merge
from normax.moments import moments as moments
from normax.moments import update as update
from normax.order import Extremes as Extremes
from normax.order import extremes as extremes
from normax.order import merge_extremes as merge_extremes
from normax.regularize import norm_constraint as norm_constraint
from normax.regularize import norm_labels as norm_labels
from normax.regularize import norm_penalty as norm_penalty
from normax.standardize import standardize as standardize
from normax.state import validate as validate
from normax.weight import SpectralState as SpectralState
from normax.weight import spectral_norm as spectral_norm
from normax.weight import weight_norm as weight_norm

__version__ = "0.1.0"
