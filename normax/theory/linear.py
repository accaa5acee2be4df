r"""A linear teacher and a linear student: the error of what is learned, for inputs without end.

The teacher is :math:`y = w_0^T x / \sqrt N + \eta`, x standard Gaussian of N dimensions,
:math:`|w_0|^2 / N = 1`, the noise of variance :math:`\delta^2`; the student sees P examples, and
:math:`\alpha = P / N` stays as N grows. Errors are against the teacher without its noise. Ridge
regression has two scales: z of :math:`\lambda = N z`, and the zeta of a loss that is an average
over the examples, :math:`\lambda = P \zeta`.
"""

import math

from normax import axes as ax
from normax.theory.noise import expected_deviation, to_batch_size


def ridge_of_decay(decay: float, alpha: float) -> float:
    r"""Returns z of the coefficient of a mean loss.

    .. math:: z = \alpha \zeta

    Args:
      decay: zeta, of the average of :math:`(\varphi - y)^2` plus :math:`\zeta \gamma^2`.
      alpha: examples over dimensions, above 0.

    Returns:
      A float.

    Raises:
      ValueError: a number that is out of range.
      TypeError: what is no number.

    Example:
      >>> from normax import theory
      >>> theory.ridge_of_decay(0.25, 4.0)
      1.0
    """
    name = "ridge_of_decay"
    return _above(name, "decay", decay, least=0.0) * _above(name, "alpha", alpha)


def resolvent_trace(alpha: float, z: float) -> tuple[float, float]:
    r"""Returns the trace of the inputs' resolvent, and its derivative.

    .. math:: G(z) = \frac1N \mathrm{tr} \left(\frac{X^T X}{N} + z\right)^{-1}
              = \frac{1 - \alpha - z + \sqrt{(z + (1 + \sqrt\alpha)^2)(z + (1 - \sqrt\alpha)^2)}}
                     {2 z}

    It solves :math:`z G^2 + (z + \alpha - 1) G - 1 = 0`.

    Args:
      alpha: examples over dimensions, above 0.
      z: the ridge, above 0.

    Returns:
      G and dG/dz, floats.

    Raises:
      ValueError: a number that is out of range.
      TypeError: what is no number.

    Example:
      >>> from normax import theory
      >>> print(f"{theory.resolvent_trace(1.0, 0.25)[0]:.4f}")
      1.5616
    """
    alpha, z = _above("resolvent_trace", "alpha", alpha), _above("resolvent_trace", "z", z)
    linear = z + alpha - 1
    root = _root(alpha, z)
    # Of the two ways to write the root of a quadratic, the one that subtracts nothing.
    trace = (root - linear) / (2 * z) if linear < 0 else 2 / (linear + root)
    # 0 = G^2 + G + (2 z G + z + alpha - 1) dG/dz, and the bracket is the root.
    return trace, -(trace * trace + trace) / root


def ridge_error(alpha: float, z: float, noise: float) -> float:
    r"""Returns the error of ridge regression; of weight norm with gamma decay it is the same.

    .. math:: \epsilon = \delta^2 (G + z G') - z^2 G'

    Smallest at :math:`z = \delta^2`, whatever alpha.

    Args:
      alpha: examples over dimensions, above 0.
      z: the ridge, above 0.
      noise: :math:`\delta^2`, the variance of the teacher's noise.

    Returns:
      A float.

    Raises:
      ValueError: a number that is out of range.
      TypeError: what is no number.

    Example:
      >>> from normax import theory
      >>> print(f"{theory.ridge_error(1.0, 0.25, 0.25):.5f}")
      0.39039
    """
    name = "ridge_error"
    alpha, z = _above(name, "alpha", alpha), _above(name, "z", z)
    noise = _above(name, "noise", noise, least=0.0)
    trace, _ = resolvent_trace(alpha, z)
    # By the equation of G, G + z G' is (1 - z G) / root and -z^2 G' is z G (z G + z) / root, where
    # nothing of the size of G is subtracted.
    kept = z * trace
    return (noise * (1 - kept) + kept * (kept + z)) / _root(alpha, z)


def least_squares_error(alpha: float, noise: float, *, dimensions: int | None = None) -> float:
    r"""Returns the error of least squares, the shortest where there are several.

    .. math:: \epsilon = 1 - \alpha + \frac{\alpha \delta^2}{1 - \alpha}\ (\alpha < 1),\qquad
              \epsilon = \frac{\delta^2}{\alpha - 1}\ (\alpha > 1)

    It is what plain gradient descent from zero converges to.

    Args:
      alpha: examples over dimensions, above 0.
      noise: :math:`\delta^2`, the variance of the teacher's noise.
      dimensions: N, for the exact expectation where there are only so many: the denominators are
        then less by one part in N. None is a limit.

    Returns:
      A float; inf where there are as many examples as dimensions, or one more or less of N.

    Raises:
      ValueError: a number that is out of range.
      TypeError: what is no number.

    Example:
      >>> from normax import theory
      >>> print([round(theory.least_squares_error(a, 0.25), 4) for a in (0.5, 1.0, 2.0)])
      [0.75, inf, 0.25]
    """
    name = "least_squares_error"
    alpha, noise = _above(name, "alpha", alpha), _above(name, "noise", noise, least=0.0)
    return _least_squares(name, 1.0, alpha, noise, dimensions)


def batch_norm_error(
    alpha: float, noise: float, batch_size: int, *, dimensions: int | None = None
) -> float:
    r"""Returns the error of a student with batch norm that has converged.

    .. math:: w_{BN} = c\, w_{LS},\quad c = E[s_M]

    .. math:: \epsilon = c^2 \left(\alpha + \frac{\alpha \delta^2}{1 - \alpha}\right) - 2 c \alpha
              + 1\ (\alpha < 1),\qquad
              \epsilon = (1 - c)^2 + \frac{c^2 \delta^2}{\alpha - 1}\ (\alpha > 1)

    It is least squares, shortened: like least squares, and unlike ridge regression, it diverges
    at as many examples as dimensions. Stopped before, it may look like ridge regression.

    Args:
      alpha: examples over dimensions, above 0.
      noise: :math:`\delta^2`, the variance of the teacher's noise.
      batch_size: M, 2 or more.
      dimensions: as in `least_squares_error`.

    Returns:
      A float; inf as of `least_squares_error`.

    Raises:
      ValueError: a number that is out of range.
      TypeError: what is no number.

    Example:
      >>> from normax import theory
      >>> print([round(theory.batch_norm_error(a, 0.25, 32), 4) for a in (0.5, 1.0, 2.0)])
      [0.7386, inf, 0.2389]
    """
    name = "batch_norm_error"
    alpha, noise = _above(name, "alpha", alpha), _above(name, "noise", noise, least=0.0)
    size = to_batch_size(name, batch_size)
    return _least_squares(name, expected_deviation(size), alpha, noise, dimensions)


def _root(alpha, z):
    """Returns the root of the discriminant of the equation of G."""
    return math.sqrt((z + (1 + math.sqrt(alpha)) ** 2) * (z + (1 - math.sqrt(alpha)) ** 2))


def _least_squares(name, factor, alpha, noise, dimensions):
    """Returns the error of least squares, shortened by a factor."""
    room = abs(1 - alpha)
    if dimensions is not None:
        number = ax.to_positive_int(name, "dimensions", dimensions)
        # In whole examples, as alpha is one number over another and rounded.
        room = (abs(number - round(alpha * number, 6)) - 1) / number
    if room <= 0:
        return math.inf
    kept = min(alpha, 1.0)  # the share of the teacher that the examples show
    return factor**2 * (kept + kept * noise / room) - 2 * factor * kept + 1


def _above(name, label, value, least=1e-300):
    ax.check_number(name, label, value)
    ax.check_limit(name, label, value, least)
    return float(value)
