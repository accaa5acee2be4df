"""What has an order: extremes, which merge over a stream, and quantiles, which do not."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normax import axes as ax
from normax import pool


class Extremes(NamedTuple):
    """What was measured: the smallest and the largest entry.

    A pytree whose two leaves have one shape, that of the entries after reduction. +inf and -inf of
    that shape are the identity of `merge_extremes`.

    Attributes:
      low: the smallest entry, float32 at least; +inf of no entries.
      high: the largest entry, likewise; -inf of no entries.
    """

    low: Any
    high: Any


def extremes(x: ArrayLike, axes: ax.Axes, *, mask: ArrayLike | None = None) -> Extremes:
    """Measures the smallest and the largest entry of `x` over `axes`.

    Args:
      x: array of any rank and real floating-point dtype.
      axes: axis or axes to reduce; negative counts from the end.
      mask: booleans that broadcast to `x.shape`; False entries read as absent and may hold NaN.

    Returns:
      `Extremes` of the shape of `x` without `axes`, float32 at least. A valid NaN shows.

    Raises:
      ValueError: axes out of range, repeated or none; a mask that does not broadcast.
      TypeError: integer or complex `x`, or a mask that is neither boolean nor integer.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0, 20.0], [3.0, 10.0], [jnp.nan, 30.0]])
      >>> low, high = normax.extremes(x, 0, mask=~jnp.isnan(x))
      >>> print(low, high)
      [ 1. 10.] [ 3. 30.]
    """
    x = to_real_array("extremes", x)
    axes = ax.reduced_axes("extremes", "axes", axes, x.ndim)
    return measure_extremes(x, axes, ax.to_mask("extremes", mask, x))


def measure_extremes(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> Extremes:
    """Returns the `Extremes` over axes; the arguments have been through the checks."""
    x = x.astype(ax.compute_dtype(x.dtype))
    low, high = (x, x) if mask is None else (_filled(x, mask, v) for v in (jnp.inf, -jnp.inf))
    return Extremes(jnp.min(low, axes, initial=jnp.inf), jnp.max(high, axes, initial=-jnp.inf))


def merge_extremes(a: Extremes, b: Extremes) -> Extremes:
    """Returns the extremes of two sets of entries taken together.

    Associative, commutative and exact; +inf and -inf are the identity. Use it to join the chunks
    of a stream.

    Args:
      a: `Extremes` of any shape.
      b: `Extremes` of the same shape.

    Returns:
      `Extremes` of that shape, of the wider dtype.

    Raises:
      ValueError: the two have different shapes.
      TypeError: either is no `Extremes`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([2.0, 1.0, 5.0, 4.0])
      >>> low, high = normax.merge_extremes(normax.extremes(x[:2], 0), normax.extremes(x[2:], 0))
      >>> print(low, high)
      1.0 5.0
    """
    ax.check_statistics("merge_extremes", "a", a, Extremes)
    ax.check_statistics("merge_extremes", "b", b, Extremes)
    if jnp.shape(a.low) != jnp.shape(b.low):
        raise ValueError(
            "merge_extremes: expected extremes of one shape, got "
            f"{jnp.shape(a.low)} and {jnp.shape(b.low)}"
        )
    dtype = ax.promote(*a, *b)
    (low_a, high_a), (low_b, high_b) = ([jnp.asarray(v, dtype) for v in each] for each in (a, b))
    return Extremes(jnp.minimum(low_a, low_b), jnp.maximum(high_a, high_b))


def quantiles(
    x: jax.Array, axes: tuple[int, ...], fractions: tuple[float, ...], mask: jax.Array | None
) -> list[jax.Array]:
    """Returns quantiles over axes, linear between neighbours; 0 of no entries, NaN if one is.

    Each is a neighbour plus a part of the step to the next, so that those of equal entries are
    equal; `jnp.quantile` adds two parts, each rounded.
    """
    kept = ax.other_axes(axes, x.ndim)
    x = pool.whole(x.astype(ax.compute_dtype(x.dtype)), *kept)
    mask = None if mask is None else pool.whole(mask, *kept)
    valid = jnp.broadcast_to(True if mask is None else mask, x.shape)
    count = jnp.sum(valid, axes, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)
    ranked = jnp.sort(in_a_row(_filled(x, valid, jnp.inf), axes))
    unknown = jnp.any(jnp.isnan(x) & valid, axes)

    def at(place):
        return jnp.take_along_axis(ranked, place[..., None], -1)[..., 0]

    def quantile(fraction):
        place = fraction * last.astype(x.dtype)
        below = jnp.minimum(place.astype(jnp.int32), last)
        low, high = at(below), at(jnp.minimum(below + 1, last))
        part = place - below.astype(x.dtype)
        value = low + part * (high - low)
        # A step from below zero to above it may be larger than any number; one from or to inf is.
        far = ((low < 0) & (high > 0)) | jnp.isinf(low)
        value = jnp.where(far, low * (1 - part) + high * part, value)
        value = jnp.where((part == 0) | (low == high), low, value)
        return jnp.where(unknown, jnp.nan, jnp.where(count > 0, value, 0))

    return [quantile(fraction) for fraction in fractions]


def to_real_array(name: str, x: ArrayLike, label: str = "x") -> jax.Array:
    """Returns `x` as an array; refuses complex numbers too, which have no order."""
    x = ax.to_float_array(name, x, label)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{name}: expected {label} of a real dtype, got {x.dtype}")
    return x


def to_range(name: str, label: str, pair: Any, low: float, high: float) -> tuple[float, float]:
    """Returns two Python numbers; refuses any but two that ascend within [low, high]."""
    try:
        start, stop = (float(number) for number in pair)
    except (TypeError, ValueError):  # JAX's ConcretizationTypeError, of a tracer, is a TypeError
        raise TypeError(f"{name}: expected {label} to be two numbers, got {pair!r}") from None
    if not low <= start < stop <= high:
        raise ValueError(
            f"{name}: expected {label} to ascend within [{low:g}, {high:g}], got {pair!r}"
        )
    return start, stop


def _filled(x, mask, value):
    """Returns `x` with a number in place of absent entries."""
    return jnp.where(mask, x, jnp.asarray(value, x.dtype))


def in_a_row(x, axes):
    """Returns `x` with `axes` laid out as one, the last."""
    kept = ax.other_axes(axes, x.ndim)
    shape = [x.shape[axis] for axis in kept]
    length = math.prod(x.shape[axis] for axis in axes)
    return jnp.transpose(x, (*kept, *axes)).reshape(*shape, length)
