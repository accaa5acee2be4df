"""How unevenly least squares on features curves, by the singular values of the data."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from normax import axes as ax
from normax import measure as me
from normax import order, pool, units
from normax.singular import singular_values


def condition_number(
    x: ArrayLike, *, feature_axes: ax.Axes = -1, mask: ArrayLike | None = None
) -> jax.Array:
    r"""Measures how unevenly least squares on these features curves.

    .. math:: \kappa = \frac{\lambda_{\max}(H)}{\lambda_{\min}(H)},\qquad
              H = \frac1n \sum_{i=1}^n x_i x_i^*

    H is the Hessian of linear regression without an intercept, the uncentred second moments; of
    features less their means it is their covariance. Gradient descent takes a number of steps in
    proportion to :math:`\kappa`. It is measured by the singular values of the data, which keep
    the digits that forming H would lose.

    Args:
      x: array of any rank, floating-point or complex.
      feature_axes: axes that make up the vectors :math:`x_i`; every other axis counts them.
      mask: booleans that broadcast to `x.shape`; a vector with a False entry reads as absent.

    Returns:
      A real scalar, float32 at least, of 1 or more. It is inf, and has no gradient, where the
      features are linearly dependent to the dtype's precision: :math:`\kappa` of 1 / eps**2. Where
      another eigenvalue is equal to the largest or the smallest the second derivative is NaN.

    Raises:
      ValueError: axes out of range or repeated; a mask that does not broadcast; no features.
      TypeError: integer `x`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[2600.0, 66.0], [2600.0, 72.0], [3400.0, 66.0], [3400.0, 72.0]])
      >>> print(f"{normax.condition_number(x):.2e}")  # dollars and inches
      9.95e+04
      >>> units = normax.FeatureScaling(jnp.zeros(2), jnp.array([1000.0, 12.0]))
      >>> y = normax.transform_features(x, units)
      >>> print(f"{normax.condition_number(y):.0f}")  # thousands of dollars and feet
      303
      >>> y = normax.transform_features(x, normax.standardize_features(x))
      >>> print(f"{normax.condition_number(y):.3f}")
      1.000

    LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, section 5,
    https://doi.org/10.1007/3-540-49430-8_2.
    """
    name = "condition_number"
    x = ax.to_float_array(name, x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    mask = ax.to_mask(name, mask, x)
    mask = None if mask is None else jnp.all(mask, features, keepdims=True)
    entries = pool.whole(me.present(x, mask))
    # Not every backend's decomposition squares in range.
    everything = tuple(range(x.ndim))
    entries = units.divide(entries, lax.stop_gradient(units.choose(entries, everything, 0.0)))
    matrix = order.in_a_row(entries, features)
    ax.check_found(name, "a feature in x", matrix.shape[-1] > 0)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    missing = max(matrix.shape[1] - matrix.shape[0], 0)
    matrix = jnp.pad(matrix, ((0, missing), (0, 0)))
    largest, smallest = singular_values(matrix, (0, -1))
    dependent = smallest <= jnp.finfo(largest.dtype).eps * largest
    ratio = jnp.where(dependent, 1, largest) / jnp.where(dependent, 1, smallest)
    return jnp.where(dependent, jnp.inf, ratio * ratio)
