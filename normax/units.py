"""Units: powers of two that bring the entries of a group to a size that can be squared.

Squares of float32 numbers overflow above 1e19 and vanish below 1e-19. A group is therefore measured
in a unit near its largest entry. The unit is a power of two, so dividing by it loses nothing.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from normax import axes as ax


def needed(dtype) -> bool:
    """Returns whether squares of `dtype` can leave the range of the dtype to compute in."""
    return jnp.finfo(dtype).maxexp >= jnp.finfo(ax.compute_dtype(dtype)).maxexp


def least(epsilon) -> float:
    """Returns a unit in which `epsilon`, added to a variance, is large but in range."""
    return 2.0 ** (math.frexp(epsilon)[1] // 2 - 48) if epsilon else 0.0


def choose(x, axes, least):
    """Returns a unit for each group of `x`, not below `least`; 1 where all entries are zero."""
    magnitude = functools.reduce(jnp.maximum, map(_magnitude, parts(x)))
    peak = jnp.max(magnitude, axes, keepdims=True, initial=0)
    info = jnp.finfo(x.dtype)
    # The bits of the exponent alone are a power of two. In the smallest unit a subnormal number can
    # be squared; in the largest a gradient still fits.
    power = _float(peak & _bits(jnp.asarray(jnp.inf, info.dtype)), info.dtype)
    smallest, largest = 2.0 ** (info.minexp + 26), 2.0 ** (info.maxexp * 5 // 8)
    return jnp.where(peak == 0, 1, jnp.clip(power, max(least, smallest), largest))


def divide(x, unit):
    """Returns `x / unit`, unit None for one. Where XLA reads subnormal numbers as zero, so here."""
    return x if unit is None else x * (1 / unit).astype(x.dtype)


def divide_exactly(x, unit):
    """Returns `x / unit`, unit None for one, subnormal numbers included."""
    if unit is None:
        return x
    if jnp.iscomplexobj(x):
        return lax.complex(*(divide_exactly(part, unit) for part in parts(x)))
    info = jnp.finfo(x.dtype)
    # A subnormal number is its mantissa times the smallest normal number. With the exponent of one
    # in front, the same bits read as one more than the mantissa.
    small, one = jnp.abs(x) < info.smallest_normal, _bits(jnp.ones((), x.dtype))
    mantissa = _float(jnp.where(small, _magnitude(x) | one, one), x.dtype) - 1
    signed = jnp.where(_bits(x) < 0, -mantissa, mantissa)
    return jnp.where(small, signed * (info.smallest_normal / unit), divide(x, unit))


def found_once(unit, *others):
    """Returns a unit, None for one, and what else is known of each group, behind a barrier.

    Else XLA may find them anew for each entry and, where that takes as long as memory does, write
    down what it makes of them. 1 / unit is kept: in `divide` XLA takes out both quotients.
    """
    per_unit = None if unit is None else 1 / unit
    per_unit, *others = lax.optimization_barrier((per_unit, *others))
    return None if per_unit is None else 1 / per_unit, *others


def parts(x):
    """Returns the real numbers that `x` is made of."""
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))


def _float(bits, dtype):
    return lax.bitcast_convert_type(bits, dtype)


def _magnitude(x):
    bits = _bits(x)
    return bits & jnp.asarray(np.iinfo(bits.dtype).max, bits.dtype)
