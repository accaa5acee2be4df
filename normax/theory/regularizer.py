r"""What the noise of batch statistics does to a loss: a penalty on gamma, and what else.

Of a pre-activation :math:`\bar h = \gamma x + \beta`, x standardized, under a loss whose
derivatives with respect to it are :math:`\ell'` and :math:`\ell''`:

.. math:: L_{BN} = L_{PN} + \zeta \gamma^2 + \text{first order} + O(M^{-2})

PN normalizes by the statistics of the population. The coefficient is one of the value of the loss,
not of its slope: with a squared loss the minimiser moves half as far as a penalty of it would move
it, see `expected_deviation`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normax import axes as ax
from normax.entries import present
from normax.moments import moments
from normax.theory.noise import STATISTICS
from normax.theory.shape import excess_kurtosis as measure_kurtosis
from normax.theory.shape import skewness as measure_skewness

FORMS = ("corrected", "published")


class Coefficient(NamedTuple):
    """The coefficient of gamma squared, and what it is made of, for each feature.

    Attributes:
      zeta: the coefficient.
      fisher: the mean of the curvature times x squared; of a log-likelihood at the truth it is
        Fisher's information of gamma.
      curvature: the mean of the curvature.
      slant: the mean of the curvature times x; it counts where x is skewed.
      excess_kurtosis: rho of x.
      skewness: that of x.
    """

    zeta: jax.Array
    fisher: jax.Array
    curvature: jax.Array
    slant: jax.Array
    excess_kurtosis: jax.Array
    skewness: jax.Array


def loss_derivatives(
    loss: Callable[..., jax.Array], h: ArrayLike, *args: Any
) -> tuple[jax.Array, jax.Array]:
    r"""Differentiates a loss twice with respect to each pre-activation by itself.

    .. math:: \ell'(h_i),\quad \ell''(h_i)

    The second derivative takes one forward derivative of the gradient where the loss is a sum of
    terms with one pre-activation each, as that of a generalized linear model is. For the features
    of a hidden layer, which the layers above mix, it is that of the loss along all ones.

    Args:
      loss: a function of the pre-activations, and of `args`, that returns the loss of each example,
        or their sum: such as `lambda h, y: (h - y) ** 2`.
      h: pre-activations of any shape.
      *args: what else the loss takes.

    Returns:
      First and second derivative, each of the shape and dtype of `h`.

    Raises:
      TypeError: integer or complex `h`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normax import theory
      >>> logistic = lambda h, y: jax.nn.softplus(h) - y * h
      >>> slope, curvature = theory.loss_derivatives(logistic, jnp.zeros(2), jnp.array([0.0, 1.0]))
      >>> print(slope, curvature)
      [ 0.5 -0.5] [0.25 0.25]
    """
    name = "loss_derivatives"
    h = ax.to_float_array(name, h, "h")
    ax.check_real(name, "h", h)
    slope = jax.grad(lambda h: jnp.sum(loss(h, *args)))
    return jax.jvp(slope, (h,), (jnp.ones_like(h),))


def decay_coefficient(
    curvature: ArrayLike,
    x: ArrayLike,
    batch_size: int,
    *,
    axes: ax.Axes = 0,
    statistics: str = "both",
    form: str = "corrected",
    mask: ArrayLike | None = None,
) -> Coefficient:
    r"""Measures zeta: how strongly the noise of a batch's statistics acts like a penalty on gamma.

    .. math:: \zeta = \frac{\rho + 2}{8 M} E[\ell'' x^2] + \frac{1}{2 M} E[\ell'']
                      + \frac{\kappa_3}{2 M} E[\ell'' x]

    The published form leaves the last term out, which a skewed x needs. The curvature depends on
    gamma and beta, and on the scale of the loss: half a squared error has half the zeta.

    Args:
      curvature: the second derivative of the loss with respect to each pre-activation, such as
        `loss_derivatives` gives; of the shape of `x`.
      x: standardized inputs of the scale, before gamma and beta.
      batch_size: M, 2 or more.
      axes: axes to average over, all but those of the features.
      statistics: "both"; "mean", of mean-only batch norm, the second term; or "variance", of
        variance-only batch norm, the first.
      form: "corrected" or "published".
      mask: as in `moments`.

    Returns:
      `Coefficient`, each leaf of the shape that is left.

    Raises:
      ValueError: a batch of one, another word, a curvature of another shape than `x`; axes out of
        range or repeated; a mask that does not broadcast.
      TypeError: integer or complex input.

    Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", 2018,
    https://arxiv.org/abs/1809.00846.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normax import theory
      >>> x = jax.random.normal(jax.random.key(0), (100_000,))
      >>> found = theory.decay_coefficient(jnp.ones_like(x), x, 32)  # half the squared error
      >>> print(f"{found.zeta:.4f}, {3 / (4 * 32):.4f}")
      0.0234, 0.0234
    """
    name = "decay_coefficient"
    ax.check_choice(name, "statistics", statistics, STATISTICS)
    ax.check_choice(name, "form", form, FORMS)
    ax.check_limit(name, "batch_size", ax.to_positive_int(name, "batch_size", batch_size), 2)
    x, curvature, mean = _alike(name, x, "curvature", curvature, axes, mask)
    kurtosis = measure_kurtosis(x, axes, mask=mask)
    skewness = measure_skewness(x, axes, mask=mask)
    fisher, mu, slant = (mean(curvature * factor) for factor in (x * x, jnp.ones_like(x), x))
    noise = {"batch_size": batch_size, "statistics": statistics, "form": form}
    return coefficient(fisher, mu, slant, kurtosis, skewness, **noise)


def coefficient(
    fisher: jax.Array,
    curvature: jax.Array,
    slant: jax.Array,
    excess_kurtosis: jax.Array,
    skewness: jax.Array,
    *,
    batch_size: int,
    statistics: str,
    form: str,
) -> Coefficient:
    """Returns zeta of what it is made of; see `decay_coefficient`."""
    of_mean = curvature / (2 * batch_size)
    of_variance = (excess_kurtosis + 2) / (8 * batch_size) * fisher
    of_both = skewness / (2 * batch_size) * slant if form == "corrected" else 0 * slant
    zeta = {"mean": of_mean, "variance": of_variance, "both": of_variance + of_mean + of_both}
    return Coefficient(zeta[statistics], fisher, curvature, slant, excess_kurtosis, skewness)


def first_order_gap(
    slope: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    batch_size: int,
    *,
    axes: ax.Axes = 0,
    mask: ArrayLike | None = None,
) -> jax.Array:
    r"""Measures what the noise of a batch's statistics adds to a loss away from its optimum.

    .. math:: \frac{\gamma}{M} E\left[\ell' \left(\frac{3 (\rho + 2)}{8} x - \frac{x^3}{2}
              + \frac{\kappa_3}{2}\right)\right]

    It is zero where the model is the true one, and elsewhere as large as zeta gamma squared: an
    entry is a member of its own batch, and moves the statistics that it is normalized by.

    Args:
      slope: the first derivative of the loss with respect to each pre-activation; of the shape
        of `x`.
      x: standardized inputs of the scale, before gamma and beta.
      gamma: the scale, of the shape of the features, or one number.
      batch_size: M, 2 or more.
      axes: axes to average over, all but those of the features.
      mask: as in `moments`.

    Returns:
      An array of the shape of the features.

    Raises:
      ValueError: as `decay_coefficient`; a gamma of another shape.
      TypeError: as `decay_coefficient`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normax import theory
      >>> x = jax.random.normal(jax.random.key(0), (400_000,))
      >>> slope = 2 * (x - 2 * x)  # a squared error; the true gamma is 2, the model's 1
      >>> print(f"{32 * theory.first_order_gap(slope, x, 1.0, 32):.2f}")
      1.50
    """
    name = "first_order_gap"
    ax.check_limit(name, "batch_size", ax.to_positive_int(name, "batch_size", batch_size), 2)
    x, slope, mean = _alike(name, x, "slope", slope, axes, mask)
    line = mean(slope * x)
    if jnp.shape(gamma) not in ((), line.shape):
        ax.check_shape(name, "gamma", jnp.shape(gamma), line.shape)
    gamma = jnp.asarray(gamma, x.dtype)
    kurtosis = measure_kurtosis(x, axes, mask=mask)
    skewness = measure_skewness(x, axes, mask=mask)
    cube, one = mean(slope * x**3), mean(slope)
    return gamma / batch_size * (0.375 * (kurtosis + 2) * line - cube / 2 + skewness / 2 * one)


def _alike(name, x, label, value, axes, mask):
    """Returns two arrays of one shape in one dtype, and how to average over the axes."""
    x, value = ax.to_float_array(name, x), ax.to_float_array(name, value, label)
    ax.check_real(name, "x", x)
    ax.check_real(name, label, value)
    ax.check_shape(name, label, value.shape, x.shape)
    dtype, weights = ax.promote(jnp.float32, x, value), ax.to_weights(name, mask, x)
    x, value = (present(v.astype(dtype), weights) for v in (x, value))
    return x, value, lambda terms: moments(terms, axes, mask=mask).mean
