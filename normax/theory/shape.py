"""What of a distribution's shape the theory asks for, measured."""

import jax
from jax.typing import ArrayLike

from normax import axes as ax
from normax.moments import moments
from normax.standardize import standardize


def skewness(x: ArrayLike, axes: ax.Axes, *, mask: ArrayLike | None = None) -> jax.Array:
    r"""Measures how much further entries reach to one side.

    .. math:: \kappa_3 = \frac{1}{n} \sum_{i=1}^n \left(\frac{x_i - \mu}{\sigma}\right)^3

    Args:
      x: array of any rank and real floating-point dtype.
      axes: axes to reduce.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`; False entries read as
        absent and may hold NaN.

    Returns:
      An array of the shape that is left, float32 at least: 0 for a symmetric law and where all
      entries are equal, 2 for the exponential one.

    Raises:
      ValueError: axes out of range or repeated; a mask that does not broadcast.
      TypeError: integer or complex `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import theory
      >>> print(f"{theory.skewness(jnp.array([0.0, 0.0, 0.0, 1.0]), 0):.4f}")
      1.1547
    """
    return _mean_power("skewness", x, axes, mask, 3)


def excess_kurtosis(x: ArrayLike, axes: ax.Axes, *, mask: ArrayLike | None = None) -> jax.Array:
    r"""Measures how much more than a Gaussian's the extremes weigh.

    .. math:: \rho = \frac{1}{n} \sum_{i=1}^n \left(\frac{x_i - \mu}{\sigma}\right)^4 - 3

    Args:
      x: as in `skewness`.
      axes: axes to reduce.
      mask: as in `skewness`.

    Returns:
      An array of the shape that is left, float32 at least: 0 for a Gaussian, -1.2 for a uniform
      law, 3 for Laplace's, 6 for the exponential one; -3 where all entries are equal.

    Raises:
      ValueError: as `skewness`.
      TypeError: as `skewness`.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import theory
      >>> print(theory.excess_kurtosis(jnp.array([-1.0, 1.0, -1.0, 1.0]), 0))
      -2.0
    """
    return _mean_power("excess_kurtosis", x, axes, mask, 4) - 3


def _mean_power(name, x, axes, mask, power):
    """Returns the mean of a power of the standardized entries."""
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    reduced = ax.reduced_axes(name, "axes", axes, x.ndim)
    xhat, _ = standardize(
        x.astype(ax.compute_dtype(x.dtype)),
        reduction_axes=reduced,
        epsilon=0.0,
        mask=mask,
        caller=name,
    )
    return moments(xhat**power, reduced, mask=mask).mean
