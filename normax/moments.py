"""Measure, merge, pool over devices, remember: the statistics behind every normalizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import measure as me
from normax import pool


class Moments(NamedTuple):
    """What was measured: how many entries, their mean, and their variance.

    A pytree whose three leaves have one shape, that of the entries after reduction.
    Zeros of that shape are the identity of `merge`.

    Attributes:
      count: number of entries, int32. It stops at 2**31 - 1 rather than wrapping around. The sum
        of their weights, floating-point, where they have any.
      mean: their mean, float32 at least; complex for complex entries; 0 if measured uncentred.
      var: their biased variance E|x - mean|^2, real; E|x|^2 if measured uncentred.
    """

    count: Any
    mean: Any
    var: Any


class RunningStats(NamedTuple):
    """What is remembered between steps: one type, whatever the options.

    Attributes:
      mean: running mean, of the feature shape.
      var: running variance, of the feature shape, real.
      count: number of entries seen, int32, of the feature shape.
    """

    mean: Any
    var: Any
    count: Any

    @classmethod
    def create(cls, feature_shape, dtype: DTypeLike = jnp.float32) -> "RunningStats":
        """Returns the state before any data: mean 0, variance 1, count 0.

        Args:
          feature_shape: shape of the statistics, `x.shape[feature_axes]`; an int is one axis.
          dtype: dtype of the mean, float32 at least; the variance has its real part's.

        Returns:
          A `RunningStats`; its leaves keep their dtypes for ever.

        Raises:
          TypeError: `dtype` names none.

        >>> mean, var, count = RunningStats.create(2)
        >>> print(mean, var, count)
        [0. 0.] [1. 1.] [0 0]
        """
        ax.dtype_of("RunningStats.create", dtype)  # refuses what is none
        dtype = ax.compute_dtype(dtype)
        return cls(
            mean=jnp.zeros(feature_shape, dtype),
            var=jnp.ones(feature_shape, ax.real_dtype(dtype)),
            count=jnp.zeros(feature_shape, jnp.int32),
        )


def moments(
    x: ArrayLike,
    axes: ax.Axes,
    *,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> Moments:
    r"""Measures the count, mean and biased variance of `x` over `axes`.

    .. math:: n = \sum w,\quad \mu = \frac1n \sum w x,\quad
              \sigma^2 = \frac1n \sum w |x - \mu|^2

    over the valid entries, w being 1 unless weights are given. The deviations are centred a second
    time before they are squared, so the variance is right where the mean is a million times the
    deviation.

    Args:
      x: array of any rank and floating-point or complex dtype.
      axes: axis or axes to reduce; negative counts from the end.
      mask: booleans that broadcast to `x.shape`; False entries read as absent and may hold NaN. Or
        weights, real numbers: how often an entry counts, 2 being as good as two entries, and 0, or
        less, as none. A derivative with respect to them is as any other.
      axis_name: name, or names, of a mapped axis to pool over. Counts are pooled too, so unequal
        masks on devices give the statistics of the whole batch. One collective.
      axis_index_groups: groups of device indices along `axis_name` that pool among themselves.

    Returns:
      `Moments` of the shape of `x` without `axes`, float32 at least. A variance beyond the range of
      that is inf, the mean never is.

    Raises:
      ValueError: axes out of range, repeated or none; a mask that does not broadcast; an
        `axis_name` that is not bound.
      TypeError: integer `x`, or a complex mask.

    Where others differ: flax averages the means of devices, whatever each of them counted;
    `use_fast_variance=True`, its default, subtracts squares and returns noise at a large mean.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([1.0, 3.0, jnp.nan])
      >>> count, mean, var = normax.moments(x, 0, mask=jnp.array([True, True, False]))
      >>> print(count, mean, var)
      2 2.0 1.0
      >>> count, mean, var = normax.moments(x, 0, mask=jnp.array([3.0, 1.0, 0.0]))
      >>> print(count, mean, var)
      4.0 1.5 0.75

    The corrected two-pass form: Chan, Golub, LeVeque, "Algorithms for computing the sample
    variance", 1983, https://doi.org/10.1080/00031305.1983.10483115.
    """
    x = ax.to_float_array("moments", x)
    axes = ax.reduced_axes("moments", "axes", axes, x.ndim)
    mask = ax.to_weights("moments", mask, x)
    return moments_over(
        "moments", x, axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups
    )


def moments_over(
    name, x, axes, *, centered=True, mask=None, axis_name=None, axis_index_groups=None
):
    """Measures what has been through `axes.py`; an axis may be none, or uncentred the result."""
    reduction = me.Reduction.over(name, axes, centered, axis_name, axis_index_groups)
    return _measure(reduction, x, mask)


@functools.partial(jax.jit, static_argnums=0)
def _measure(reduction, x, mask):
    return to_moments(reduction, x, me.measure(reduction, x, mask))


def to_moments(reduction: me.Reduction, x: jax.Array, measured: me.Measured) -> Moments:
    """Returns what was measured on `x` as `Moments`, without the reduced axes."""
    count = me.count_entries(reduction, x, measured)
    if isinstance(count, int):
        count = min(count, me.MAX_COUNT)
    weighed = measured.count is not None and len(measured.count) == 1
    count = count if weighed else jnp.asarray(count, jnp.int32)
    count = jnp.broadcast_to(count, measured.var.shape)
    mean = jnp.zeros_like(measured.var)
    if measured.mean is not None:
        mean = measured.mean if measured.rest is None else measured.mean + measured.rest
    unit = jnp.ones_like(measured.var) if measured.unit is None else measured.unit
    leaves = (count, me.times(mean, unit), measured.var * unit * unit)
    return Moments(*(jnp.squeeze(leaf, reduction.axes) for leaf in leaves))


def merge(a: Moments, b: Moments) -> Moments:
    r"""Returns the moments of two sets of entries taken together.

    .. math::
        n = n_a + n_b,\quad w_a = n_a / n,\quad w_b = n_b / n,\quad
        \delta = \mu_b - \mu_a,\quad \mu = \mu_a + w_b \delta,\quad
        \sigma^2 = w_a \sigma_a^2 + w_b \sigma_b^2 + w_a w_b |\delta|^2

    Associative and commutative up to rounding, exact in the counts; zeros are the identity.
    Use it to join batches, microbatches, chunks of a stream or devices.

    Args:
      a: `Moments` of any shape.
      b: `Moments` whose leaves have the shape and dtype of those of `a`.

    Returns:
      `Moments` of the same shape.

    Raises:
      ValueError: the two have different shapes.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.arange(6.0)
      >>> whole = normax.moments(x, 0)
      >>> parts = normax.merge(normax.moments(x[:2], 0), normax.moments(x[2:], 0))
      >>> bool(jnp.allclose(parts.var, whole.var)), int(parts.count)
      (True, 6)

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
    """
    ax.check_statistics("merge", "a", a, Moments)
    ax.check_statistics("merge", "b", b, Moments)
    if jnp.shape(a.mean) != jnp.shape(b.mean):
        raise ValueError(
            "merge: expected moments of one shape, got means of shapes "
            f"{jnp.shape(a.mean)} and {jnp.shape(b.mean)}"
        )
    return _merge(a, b)


@jax.jit
def _merge(a, b):
    dtype, mean_dtype = ax.promote(a.var, b.var), ax.promote(a.mean, b.mean)
    (n_a, n_b), (var_a, var_b) = (
        [jnp.asarray(leaf, dtype) for leaf in leaves]
        for leaves in ((a.count, b.count), (a.var, b.var))
    )
    # n_a + n_b, not the new count: one that has reached its limit must not tip the weights.
    both = jnp.where(n_a + n_b > 0, n_a + n_b, 1)
    w_a, w_b = n_a / both, n_b / both
    mean_a, mean_b = jnp.asarray(a.mean, mean_dtype), jnp.asarray(b.mean, mean_dtype)
    delta = jnp.where((n_a > 0) & (n_b > 0), mean_b - mean_a, 0)
    mean = jnp.where(n_a < n_b, mean_b - me.times(delta, w_a), mean_a + me.times(delta, w_b))
    var_a, var_b = jnp.where(n_a > 0, var_a, 0), jnp.where(n_b > 0, var_b, 0)
    apart = me.inner(me.times(delta, w_a), me.times(delta, w_b))
    var = w_a * var_a + w_b * var_b + apart
    return Moments(_add_counts(a.count, b.count), mean, var)


def update(
    stats: RunningStats,
    m: Moments,
    momentum: float | None = 0.99,
    *,
    unbiased: bool = False,
    nonfinite: str = "skip",
) -> RunningStats:
    r"""Folds the moments of a batch into running statistics.

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) \mu_B,\qquad
              \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) \sigma_B^2

    with momentum :math:`\alpha`, the weight of the past; or, with `momentum=None`, by `merge`:
    then the state holds the statistics of all data seen. Where the batch has no valid entry, or a
    mean or variance that is not finite, the state stays as it is, bit for bit; and so it does with
    a momentum where there is one valid entry, whose variance of 0 would only make the state shrink.

    Args:
      stats: the state so far, `RunningStats` of any shape.
      m: `Moments` of the same shape.
      momentum: weight of the past in [0, 1], a number or a scalar array; None merges.
      unbiased: remember the variance times n / (n - 1), as PyTorch does; the default remembers
        the biased one, as Keras and Flax do.
      nonfinite: "skip" leaves a feature as it was where what it would become is not finite, and
        does not count the batch; "keep" lets NaN and inf in, where they stay. Pooled moments are
        the same on every device, and so is what is done with them.

    Returns:
      `RunningStats` of the dtypes of `stats`. A count of ints takes a sum of weights rounded: use
      one of floats where weights add up to little.

    Raises:
      ValueError: shapes differ, a Python `momentum` is outside [0, 1], or `nonfinite` is another
        word.
      TypeError: complex moments for a real state.

    Where others differ: PyTorch's momentum is the weight of the new batch, one minus this one; in
    every other library one NaN in one batch makes the running statistics NaN for ever.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> stats = normax.RunningStats.create(())
      >>> batch = normax.moments(jnp.array([1.0, 3.0]), 0)
      >>> print(normax.update(stats, batch, momentum=0.75).mean)
      0.5
      >>> print(normax.update(stats, batch, momentum=None).mean)
      2.0

    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.
    """
    ax.check_momentum("update", momentum)
    ax.check_choice("update", "nonfinite", nonfinite, ("skip", "keep"))
    ax.check_statistics("update", "stats", stats, RunningStats)
    ax.check_statistics("update", "m", m, Moments)
    if jnp.shape(m.mean) != jnp.shape(stats.mean):
        raise ValueError(
            f"update: expected moments of shape {jnp.shape(stats.mean)}, that of the running "
            f"statistics, got {jnp.shape(m.mean)}"
        )
    if jnp.iscomplexobj(m.mean) and not jnp.iscomplexobj(stats.mean):
        raise TypeError(
            f"update: expected real moments for a running mean of {jnp.result_type(stats.mean)}, "
            f"got {jnp.result_type(m.mean)}; create the statistics, or the module, with a complex "
            "dtype: the state keeps its dtypes"
        )
    stats, m = jax.tree.map(jnp.asarray, (stats, m))
    # The state stays where it is, too: with explicit sharding, moments are sharded as x was.
    m = jax.tree.map(pool.placed_like, m, Moments(stats.count, stats.mean, stats.var))
    return _update(unbiased, nonfinite, stats, m, momentum)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(unbiased, nonfinite, stats, m, momentum):
    average = _cumulative if momentum is None else functools.partial(_exponential, momentum)
    mean, var = average(stats, m, unbiased)
    new = RunningStats(
        mean.astype(stats.mean.dtype),
        var.astype(stats.var.dtype),
        _add_counts(stats.count, count_like(m.count, stats.count)),
    )
    moves = jnp.asarray(m.count) > (0 if momentum is None else 1)
    if nonfinite == "skip":
        moves &= jnp.isfinite(new.mean) & jnp.isfinite(new.var)
    return jax.tree.map(functools.partial(jnp.where, moves), new, stats)


def _exponential(momentum, stats, m, unbiased):
    """Returns the moving average of mean and variance."""
    dtype, mean_dtype = ax.promote(m.var, stats.var), ax.promote(m.mean, stats.mean)
    past = jnp.asarray(momentum, dtype)
    var = jnp.asarray(m.var, dtype) * (bessel(m.count, dtype) if unbiased else 1)
    old, new = jnp.asarray(stats.mean, mean_dtype), jnp.asarray(m.mean, mean_dtype)
    mean = me.times(old, past) + me.times(new, 1 - past)
    return mean, past * jnp.asarray(stats.var, dtype) + (1 - past) * var


def _cumulative(stats, m, unbiased):
    """Returns mean and variance of all entries seen."""
    past = Moments(stats.count, stats.mean, stats.var)
    if not unbiased:
        _, mean, var = _merge(past, m)
        return mean, var
    dtype = jnp.result_type(stats.var)
    count, mean, var = _merge(past._replace(var=past.var / bessel(past.count, dtype)), m)
    return mean, var * bessel(count, var.dtype)


def bessel(count, dtype):
    """Returns n / (n - 1), and 1 where n < 2 so that a single entry's variance stays 0."""
    n = jnp.asarray(count, dtype)
    return jnp.where(n < 2, 1, n / jnp.maximum(n - 1, 1))


def _add_counts(a, b):
    """Returns a + b, held at the largest int32 instead of wrapping around; real if one is."""
    dtype = ax.promote(a, b, jnp.int32)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return a + b
    return jnp.where(a > me.MAX_COUNT - b, me.MAX_COUNT, a + b)


def count_like(count: Any, kept: Any) -> jax.Array:
    """Returns a count in the dtype of the one that is kept: a sum of weights rounded to an int."""
    dtype = jnp.result_type(kept)
    if jnp.issubdtype(jnp.result_type(count), jnp.floating) and jnp.issubdtype(dtype, jnp.integer):
        full = jnp.asarray(count) >= 2.0**31
        return jnp.where(full, me.MAX_COUNT, jnp.round(jnp.where(full, 0, count)).astype(dtype))
    return jnp.asarray(count, dtype)
