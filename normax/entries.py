"""Entries one by one: present or absent, weighed, less their mean, real or complex."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normax import axes as ax
from normax import sums, units

DIGIT = 2.0**15
SHORT = 256


def are_short_rows(x, axes):
    """Returns whether groups are rows so short that what is measured of each weighs beside it."""
    sizes = [x.shape[axis] for axis in axes]
    are_rows = list(axes) == [*range(x.ndim - len(axes), x.ndim)]
    return are_rows and all(isinstance(size, int) for size in sizes) and math.prod(sizes) < SHORT


def present(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype to compute in, with zeros where an entry is absent."""
    x = x.astype(ax.compute_dtype(x.dtype))
    return x if mask is None else jnp.where(there(mask), x, 0)


def there(mask: jax.Array) -> jax.Array:
    """Returns which entries are present, by a mask or by weights."""
    return mask if mask.dtype == jnp.bool_ else mask > 0


def weigh(x, mask):
    """Returns what is to be summed: `x`, zero where an entry is absent, times weights if any."""
    if mask is None or mask.dtype == jnp.bool_:
        return x
    return times(x, jnp.where(there(mask), mask, 0))


def subtract(x, mean, rest, mask):
    """Returns `x - mean - rest`, either None for zero; 0 where an entry is absent."""
    if mean is None:
        return x
    d = x - mean if rest is None else (x - mean) - rest
    return d if mask is None else jnp.where(there(mask), d, 0)


def counted(axes, x, mask):
    """Returns how many entries the mask lets count, as two digits, or in one the sum of weights."""
    repeats = math.prod(x.shape[axis] for axis in axes if mask.shape[axis] == 1)
    if mask.dtype != jnp.bool_:
        return (sums.total(weigh(jnp.ones_like(mask), mask), axes) * repeats,)
    number = jnp.sum(mask, axes, dtype=jnp.int32, keepdims=True) * repeats
    dtype = ax.real_dtype(ax.compute_dtype(x.dtype))
    return tuple(digit.astype(dtype) for digit in jnp.divmod(number, jnp.int32(DIGIT)))


def near_one(mask, sizes, axes) -> Any:
    """Returns weights that can be multiplied by squares, and their unit, near the largest of some
    sizes over axes; a mask as it is, and one.
    """
    if mask is None or mask.dtype == jnp.bool_:
        return mask, jnp.ones((), bool)
    unit = lax.stop_gradient(units.choose(jnp.where(sizes > 0, sizes, 0), axes, 0.0))
    return mask / unit, unit


def at_least_one(count, like):
    """Returns a count to divide by, real, of the precision of `like`; one for nothing."""
    dtype = ax.real_dtype(ax.compute_dtype(like.dtype))
    if isinstance(count, int):
        return jnp.asarray(max(count, 1), dtype)
    count = jnp.asarray(count, dtype)
    return jnp.where(count > 0, count, 1)


def times(x, real):
    """Returns `x * real`, x real or complex."""
    return x * real.astype(x.dtype)


def over(x, real):
    """Returns `x / real`, x real or complex."""
    return x / real.astype(x.dtype)


def settled(x):
    """Returns `x` as the number it is when stored.

    A compiler may take `a - b * c` in one operation and keep digits of the product that the stored
    product has lost; then what is left over would not belong to the mean that is kept for the
    backward pass. It cannot look through this: the bits as an integer, bounded where no bound is.
    """
    if jnp.iscomplexobj(x):
        return jax.lax.complex(settled(jnp.real(x)), settled(jnp.imag(x)))
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    # Only -0.0 is below the bound, and comes out as the number next to it.
    bits = jnp.maximum(bits, jnp.asarray(-np.iinfo(integer).max, integer))
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def square(x):
    """Returns |x|^2, real."""
    return inner(x, x)


def inner(a, b):
    """Returns the real inner product of entries, Re(conj(a) b)."""
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b
