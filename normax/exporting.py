"""What `jax.export` has to know of: states, by name, and the kernels that stored programs call."""

import contextlib

from jax import export

from normax.features import FeatureScaling
from normax.kernels import cpu_library
from normax.moments import Moments, RunningStats
from normax.order import Extremes
from normax.power import PowerState
from normax.weight import SpectralState

STATES = (Extremes, FeatureScaling, Moments, PowerState, RunningStats, SpectralState)

for state in STATES:
    # Loaded anew in a notebook, only those of the first time are known.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(state, serialized_name=f"normax.{state.__name__}")

# Whoever runs a stored program that calls them need not have traced one.
cpu_library.unavailable()
