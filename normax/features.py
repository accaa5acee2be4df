"""Scaling of input features: measured once, on an array or a stream, applied and taken back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from normax import axes as ax
from normax import measure as me
from normax import order, units
from normax.moments import Moments, bessel, to_moments
from normax.order import Extremes
from normax.quotient import quotient

LARGEST = float(np.finfo(np.float32).max)


class FeatureScaling(NamedTuple):
    """How features are scaled: x to (x - offset) / factor.

    A pytree whose two leaves have one shape, the feature shape: to be kept in a checkpoint beside
    the parameters, and passed to jitted functions as an argument.

    Attributes:
      offset: what becomes zero, float32 at least. Where it is large beside `factor` its rounding
        moves a whole feature by up to half a unit in its last place, over `factor`.
      factor: what becomes one, real, never zero: a span below the smallest normal number counts as
        none. One above the largest number is inf, and gives NaN.
    """

    offset: Any
    factor: Any


def standardize_features(
    x_or_moments: ArrayLike | Moments,
    *,
    feature_axes: ax.Axes = -1,
    unbiased: bool = False,
    mask: ArrayLike | None = None,
) -> FeatureScaling:
    r"""Measures the scaling that gives each feature mean 0 and deviation 1.

    .. math:: x \mapsto \frac{x - \mu}{\sigma},\qquad
              \mu = \frac1n \sum x,\quad \sigma^2 = \frac1n \sum |x - \mu|^2

    A feature whose entries are all equal, or that has none, gets the factor 1: it becomes zero, and
    the inverse gives it back.

    Args:
      x_or_moments: array of any rank, floating-point or complex; or the `Moments` of a stream,
        of which `moments` measured each chunk and `merge` joined them.
      feature_axes: axes of the array that have a scaling of their own; every other is reduced.
      unbiased: divide by the root of the sample variance, :math:`\sigma^2 n / (n - 1)`.
      mask: booleans, or weights as in `moments`, that broadcast to the array's shape; False entries
        read as absent and may hold NaN. Of a stream, give it to `moments`.

    Returns:
      `FeatureScaling` of the array's feature shape, the axes ascending, or of the moments' shape.

    Raises:
      ValueError: axes out of range or repeated; a mask that does not broadcast, or beside moments.
      TypeError: an integer array; a tuple that is no `Moments`.

    Where others differ: scikit-learn's `StandardScaler` counts every NaN as absent, and takes a
    feature for constant where its variance is within the error bound of its algorithm; here equal
    entries have no deviation. A stream in float32 whose mean is a million times its deviation has
    chunks with rounded means, and a deviation good to three or four digits: an array has seven.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0, 5.0, 10.0], [3.0, 5.0, 30.0]])
      >>> scaling = normax.standardize_features(x)
      >>> print(scaling.offset, scaling.factor)
      [ 2.  5. 20.] [ 1.  1. 10.]
      >>> print(normax.transform_features(x, scaling))
      [[-1.  0. -1.]
       [ 1.  0.  1.]]
      >>> chunks = [normax.moments(x[i : i + 1], 0) for i in range(2)]
      >>> print(normax.standardize_features(normax.merge(*chunks)).factor)
      [ 1.  1. 10.]

    LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, section 4.3,
    https://doi.org/10.1007/3-540-49430-8_2.
    """
    name = "standardize_features"
    if isinstance(x_or_moments, tuple):
        _check_measured(name, "x_or_moments", x_or_moments, Moments, mask)
        m = Moments(*(jnp.asarray(leaf) for leaf in x_or_moments))
        mean, var = (v.astype(ax.compute_dtype(v.dtype)) for v in (m.mean, m.var))
        return _standard(m.count, mean, var, jnp.ones_like(var), unbiased)
    x = ax.to_float_array(name, x_or_moments, "x_or_moments")
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    reduction = me.Reduction.over(name, ax.other_axes(features, x.ndim))
    measured = me.measure(reduction, x, ax.to_weights(name, mask, x))
    # The variance stays in its unit: entries of 1e25 have a deviation, but no variance.
    m, per_unit = (to_moments(reduction, x, v) for v in (measured, measured._replace(unit=None)))
    unit = jnp.ones_like(measured.var) if measured.unit is None else measured.unit
    unit = jnp.squeeze(unit, reduction.axes)
    return _standard(m.count, m.mean, per_unit.var, unit, unbiased)


def min_max_features(
    x_or_extremes: ArrayLike | Extremes,
    *,
    feature_axes: ax.Axes = -1,
    feature_range: tuple[float, float] = (0.0, 1.0),
    mask: ArrayLike | None = None,
) -> FeatureScaling:
    r"""Measures the scaling that takes each feature from its extremes to a range.

    .. math:: x \mapsto a + (b - a) \frac{x - \min x}{\max x - \min x}

    A feature whose entries are all equal becomes `a`, as if its extremes were one apart.

    Args:
      x_or_extremes: array of any rank and real floating-point dtype; or the `Extremes` of a stream,
        of which `extremes` measured each chunk and `merge_extremes` joined them.
      feature_axes: axes of the array that have a scaling of their own; every other is reduced.
      feature_range: a and b, Python numbers.
      mask: booleans that broadcast to the array's shape; False entries read as absent and may hold
        NaN. Of a stream, give it to `extremes`.

    Returns:
      `FeatureScaling` of the array's feature shape, the axes ascending, or of the extremes' shape.
      With the range of 0 to 1, entries between the extremes stay within it, bit for bit.

    Raises:
      ValueError: axes out of range or repeated; a range that does not ascend; a mask that does not
        broadcast, or beside extremes.
      TypeError: an integer or complex array; a tuple that is no `Extremes`.

    Where others differ: scikit-learn's `MinMaxScaler` counts every NaN as absent, and takes a
    feature for constant where its extremes are within 10 units of 2**-52, whatever its size.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0, 10.0], [2.0, 30.0], [5.0, 20.0]])
      >>> print(normax.transform_features(x, normax.min_max_features(x)))
      [[0.   0.  ]
       [0.25 1.  ]
       [1.   0.5 ]]
      >>> chunks = normax.extremes(x[:2], 0), normax.extremes(x[2:], 0)
      >>> scaling = normax.min_max_features(normax.merge_extremes(*chunks), feature_range=(-1, 1))
      >>> print(normax.transform_features(x, scaling)[1])
      [-0.5  1. ]
    """
    name = "min_max_features"
    start, stop = order.to_range(name, "feature_range", feature_range, -LARGEST, LARGEST)
    if isinstance(x_or_extremes, tuple):
        _check_measured(name, "x_or_extremes", x_or_extremes, Extremes, mask)
        dtype = ax.promote(jnp.float32, *x_or_extremes)
        low, high = (jnp.asarray(v, dtype) for v in x_or_extremes)
    else:
        x = order.to_real_array(name, x_or_extremes, "x_or_extremes")
        features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
        reduced = ax.other_axes(features, x.ndim)
        low, high = order.measure_extremes(x, reduced, ax.to_mask(name, mask, x))
    nothing = low > high
    low, high = (jnp.where(nothing, 0, v) for v in (low, high))
    factor = _one_for_zero(high - low) / (stop - start)
    return FeatureScaling(low - start * factor, factor)


def robust_features(
    x: ArrayLike,
    *,
    feature_axes: ax.Axes = -1,
    quantile_range: tuple[float, float] = (25.0, 75.0),
    mask: ArrayLike | None = None,
) -> FeatureScaling:
    r"""Measures the scaling by median and interquartile range, which a few outliers do not move.

    .. math:: x \mapsto \frac{x - q_{50}}{q_{75} - q_{25}}

    Quantiles of the chunks of a stream do not give those of the whole, so there is nothing here to
    merge: use `standardize_features` of merged `moments`, take a sample of the stream that fits in
    memory, or give `FeatureScaling` the quantiles of a sketch.

    Args:
      x: array of any rank and real floating-point dtype.
      feature_axes: axes that have a scaling of their own; every other axis is reduced.
      quantile_range: the two quantiles in percent, Python numbers. Linear between neighbours.
      mask: booleans that broadcast to `x.shape`; False entries read as absent and may hold NaN.

    Returns:
      `FeatureScaling` of shape `x.shape[feature_axes]`, the axes ascending. Where the quantiles are
      equal, the factor is 1.

    Raises:
      ValueError: axes out of range or repeated; quantiles that do not ascend within [0, 100]; a
        mask that does not broadcast.
      TypeError: integer or complex `x`.

    Where others differ: scikit-learn's `RobustScaler` counts every NaN as absent.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e6]])
      >>> scaling = normax.robust_features(x)
      >>> print(scaling.offset, scaling.factor)
      [3.] [2.]
    """
    name = "robust_features"
    if isinstance(x, tuple):
        raise TypeError(
            f"{name}: expected x to be one array, as quantiles do not merge over a stream, "
            f"got {type(x).__name__}"
        )
    x = order.to_real_array(name, x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    ends = order.to_range(name, "quantile_range", quantile_range, 0, 100)
    fractions = (0.5, *(percent / 100 for percent in ends))
    reduced, mask = ax.other_axes(features, x.ndim), ax.to_mask(name, mask, x)
    median, low, high = order.quantiles(x, reduced, fractions, mask)
    return FeatureScaling(median, _one_for_zero(high - low))


def transform_features(
    x: ArrayLike,
    scaling: FeatureScaling,
    *,
    feature_axes: ax.Axes = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Scales features.

    .. math:: y = \frac{x - \text{offset}}{\text{factor}}

    Args:
      x: array of any rank, floating-point or complex.
      scaling: `FeatureScaling` of shape `x.shape[feature_axes]`, the axes ascending.
      feature_axes: axes that have a scaling of their own.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries read as
        absent: they may hold NaN, move no gradient, and come out as zero.

    Returns:
      An array of the shape and dtype of `x`, computed in float32 at least and rounded once.

    Raises:
      ValueError: axes out of range or repeated; a scaling that is not of the feature shape; a
        mask that does not broadcast.
      TypeError: integer `x`; a `scaling` that is no `FeatureScaling`, or complex for a real `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> scaling = normax.FeatureScaling(jnp.array([3000.0, 69.0]), jnp.array([400.0, 3.0]))
      >>> print(normax.transform_features(jnp.array([[3200.0, 72.0]]), scaling))
      [[0.5 1. ]]
    """
    name = "transform_features"
    x, mask, (entries, offset, factor) = _alike(name, "x", x, scaling, feature_axes, mask)
    unit = _unit(factor)
    entries, offset, factor = (units.divide(v, unit) for v in (entries, offset, factor))
    return quotient(me.subtract(entries, offset, None, mask), factor).astype(x.dtype)


def inverse_features(
    y: ArrayLike,
    scaling: FeatureScaling,
    *,
    feature_axes: ax.Axes = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Takes a scaling of features back.

    .. math:: x = y \cdot \text{factor} + \text{offset}

    Args:
      y: array of any rank, floating-point or complex.
      scaling: `FeatureScaling` of shape `y.shape[feature_axes]`, the axes ascending.
      feature_axes: axes that have a scaling of their own.
      mask: booleans, or weights as in `moments`, that broadcast to `y.shape`; False entries read as
        absent: they may hold NaN, move no gradient, and come out as `offset`.

    Returns:
      An array of the shape and dtype of `y`, computed in float32 at least and rounded once. What a
      half cannot hold overflows: convert `y` first.

    Raises:
      ValueError: as `transform_features`.
      TypeError: as `transform_features`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> scaling = normax.FeatureScaling(jnp.array([3000.0, 69.0]), jnp.array([400.0, 3.0]))
      >>> print(normax.inverse_features(jnp.array([[0.5, 1.0]]), scaling))
      [[3200.   72.]]
    """
    name = "inverse_features"
    y, _, (entries, offset, factor) = _alike(name, "y", y, scaling, feature_axes, mask)
    unit = _unit(factor)
    offset, factor = (units.divide(v, unit) for v in (offset, factor))
    return ((entries * factor + offset) * unit).astype(y.dtype)


def _check_measured(name, label, value, kind, mask):
    """Refuses statistics of another kind, and a mask beside them."""
    ax.check_statistics(name, label, value, kind)
    if mask is not None:
        raise ValueError(
            f"{name}: expected a mask with an array only, got one with {label}, which has been "
            "measured: give it where that is done"
        )


def _standard(count, mean, var, unit, unbiased):
    """Returns the scaling by a mean and a variance in multiples of the unit squared."""
    var = var * bessel(count, var.dtype) if unbiased else var
    constant = var == 0
    factor = jnp.where(constant, 0, jnp.sqrt(jnp.where(constant, 1, var)) * unit)
    return FeatureScaling(mean, _one_for_zero(factor))


def _one_for_zero(size):
    return jnp.where(size == 0, 1, size)


def _unit(factor):
    """Returns a power of two in which the reciprocal of a factor, and a few of it, are in range."""
    large = 2.0 ** (jnp.finfo(factor.dtype).maxexp // 2)
    return jnp.where(jnp.abs(lax.stop_gradient(factor)) > large, large, 1).astype(factor.dtype)


def _alike(name, label, x, scaling, feature_axes, mask):
    """Returns `x` and the mask; and x, offset and factor in one dtype, laid along x."""
    x = ax.to_float_array(name, x, label)
    ax.check_statistics(name, "scaling", scaling, FeatureScaling)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    for field, leaf in zip(FeatureScaling._fields, scaling, strict=True):
        ax.check_feature_shape(name, f"scaling.{field}", jnp.shape(leaf), x, features)
    offset, factor = (ax.along(jnp.asarray(leaf), x.ndim, features) for leaf in scaling)
    ax.to_dtype(name, None, x, scaling=offset)
    mask = ax.to_weights(name, mask, x)
    dtype = ax.promote(jnp.float32, x, offset, factor)
    return x, mask, [v.astype(dtype) for v in (me.present(x, mask), offset, factor)]
