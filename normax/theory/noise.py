r"""How far the statistics of a batch stray from those of the population.

A batch of M entries standardizes by its own mean :math:`\mu_B` and deviation :math:`\sigma_B`, the
population by :math:`\mu_P` and :math:`\sigma_P`. In all of this an entry is a member of its batch,
as it is in batch norm, and epsilon is zero.
"""

import math
from typing import NamedTuple

from normax import axes as ax

STATISTICS = ("both", "mean", "variance")
# 1 - E[chi_n] / sqrt(n) in powers of 1/n: Gamma's own differences lose their digits for large n.
_SERIES = (1 / 4, -1 / 32, -5 / 128, 21 / 2048, 399 / 8192, -869 / 65536, -39325 / 262144)
_LARGE = 64


class DeviationLaw(NamedTuple):
    """The law of a batch's mean and deviation, to the first order in 1 / M.

    Attributes:
      mean_var: variance of the mean; exact.
      deviation_mean: expectation of the deviation.
      deviation_var: variance of the deviation.
      covariance: of the mean and the deviation.
    """

    mean_var: float
    deviation_mean: float
    deviation_var: float
    covariance: float


def expected_deviation(batch_size: int, *, ddof: int = 0) -> float:
    r"""Returns the expected deviation of a batch of standard Gaussian numbers.

    .. math:: E[s_M] = \sqrt{\tfrac{2}{M}}\,\frac{\Gamma(M / 2)}{\Gamma((M - 1) / 2)}

    with the root of :math:`2 / (M - 1)` in place of that of :math:`2 / M` for a `ddof` of 1. It is
    the factor by which converged batch norm shortens what it learns.

    Args:
      batch_size: M, 2 or more.
      ddof: what the sum of squares is divided by is M less this: 0 or 1.

    Returns:
      A float; its distance from 1 to a relative error of 1e-11.

    Raises:
      ValueError: a batch of one, another `ddof`.
      TypeError: a `batch_size` that is no int.

    Example:
      >>> from normax import theory
      >>> print(f"{theory.expected_deviation(32):.6f} {theory.expected_deviation(32, ddof=1):.6f}")
      0.976347 0.991969
    """
    return 1 - _missing_deviation("expected_deviation", batch_size, ddof)


def batch_noise(batch_size: int, *, statistics: str = "both", ddof: int = 0) -> float:
    r"""Returns the noise that a batch's statistics add to a Gaussian input, exactly.

    .. math:: E[(\hat x_B - \hat x_P)^2] = 2 - 2\,E[s_M]

    where :math:`\hat x_B = (x - \mu_B) / \sigma_B` and :math:`\hat x_P = (x - \mu_P) / \sigma_P`.
    For a law other than Gaussian the formula holds with that law's :math:`E[s_M]`. To the first
    order it is 3 / (2 M): see `approximate_noise`.

    Args:
      batch_size: M, 2 or more.
      statistics: "both"; "mean", where only the mean is the batch's; or "variance", where only the
        deviation is, about the known mean.
      ddof: what the sum of squares is divided by is M less this: 0, as batch norm has it, or 1. Of
        "both" only.

    Returns:
      A float, to a relative error of 1e-11.

    Raises:
      ValueError: a batch of one, another word or `ddof`.
      TypeError: a `batch_size` that is no int.

    Example:
      >>> from normax import theory
      >>> print(f"{theory.batch_noise(32):.7f}, and not 3/64: {3 / 64}")
      0.0473065, and not 3/64: 0.046875
    """
    name = "batch_noise"
    ax.check_choice(name, "statistics", statistics, STATISTICS)
    missing = _missing_deviation(name, batch_size, ddof)
    if statistics == "mean":
        return 1 / batch_size
    if statistics == "variance":
        return 2 * _missing_length(batch_size)
    if ddof == 0:
        return 2 * missing
    # E[xhat_B^2] + E[x^2] - 2 E[xhat_B x], of which the last is (M - 1) / M E[s] for ddof = 1.
    return (1 - 1 / batch_size) * 2 * missing + 1 / batch_size


def approximate_noise(
    batch_size: int, *, excess_kurtosis: float = 0.0, statistics: str = "both"
) -> float:
    r"""Returns the noise that a batch's statistics add, to the first order, for any law.

    .. math:: E[(\hat x_B - \hat x_P)^2] \approx \frac1M + \frac{\rho + 2}{4 M}

    The first term is the mean's, and exact; the second the deviation's.

    Args:
      batch_size: M, 2 or more.
      excess_kurtosis: rho of the law, 0 for a Gaussian: see `excess_kurtosis`.
      statistics: as in `batch_noise`.

    Returns:
      A float; what is left out is of the order of 1 / M**2.

    Raises:
      ValueError: a batch of one, another word.
      TypeError: a `batch_size` that is no int; a kurtosis that is no number.

    Example:
      >>> from normax import theory
      >>> theory.approximate_noise(32)
      0.046875
    """
    name = "approximate_noise"
    ax.check_choice(name, "statistics", statistics, STATISTICS)
    size = to_batch_size(name, batch_size)
    ax.check_number(name, "excess_kurtosis", excess_kurtosis)
    mean, deviation = 1 / size, (excess_kurtosis + 2) / (4 * size)
    return {"both": mean + deviation, "mean": mean, "variance": deviation}[statistics]


def deviation_law(
    batch_size: int,
    *,
    deviation: float = 1.0,
    excess_kurtosis: float = 0.0,
    skewness: float = 0.0,
) -> DeviationLaw:
    r"""Returns the law of a batch's mean and deviation, to the first order in 1 / M.

    .. math:: \mathrm{Var}\,\mu_B = \frac{\sigma^2}{M},\quad
              E\,\sigma_B = \sigma \left(1 - \frac{1}{2 M} - \frac{\rho + 2}{8 M}\right),\quad
              \mathrm{Var}\,\sigma_B = \sigma^2 \frac{\rho + 2}{4 M},\quad
              \mathrm{Cov} = \sigma^2 \frac{\kappa_3}{2 M}

    Args:
      batch_size: M, 2 or more: how many entries are independent. The positions of an image are not.
      deviation: sigma of the population.
      excess_kurtosis: rho of the population.
      skewness: :math:`\kappa_3` of the population.

    Returns:
      `DeviationLaw`.

    Raises:
      ValueError: a batch of one; a deviation below 0 or an excess kurtosis below -2.
      TypeError: a `batch_size` that is no int; another that is no number.

    Example:
      >>> from normax import theory
      >>> theory.deviation_law(32, deviation=5.0).deviation_var
      0.390625
    """
    name = "deviation_law"
    size = to_batch_size(name, batch_size)
    given = {"deviation": deviation, "excess_kurtosis": excess_kurtosis, "skewness": skewness}
    for label, value in given.items():
        ax.check_number(name, label, value)
    ax.check_limit(name, "deviation", deviation, 0.0)
    # The square of a variable cannot vary less than not at all.
    ax.check_limit(name, "excess_kurtosis", excess_kurtosis, -2.0)
    var = deviation * deviation
    spread = (excess_kurtosis + 2) / (4 * size)
    return DeviationLaw(
        var / size,
        deviation * (1 - 0.5 / size - spread / 2),
        var * spread,
        var * skewness / 2 / size,
    )


def finite_population(batch_size: int, population: int) -> float:
    r"""Returns the share of the noise that is left where batches are drawn without replacement.

    .. math:: \frac{P - M}{P - 1}

    A batch that is the population has no noise.

    Args:
      batch_size: M, at most P.
      population: P, 2 or more.

    Returns:
      A float.

    Raises:
      ValueError: a batch below 1 or larger than the population.
      TypeError: what is no int.

    Example:
      >>> from normax import theory
      >>> theory.finite_population(32, 63)
      0.5
    """
    name = "finite_population"
    size = ax.to_positive_int(name, "batch_size", batch_size)
    population = to_batch_size(name, population, "population")
    ax.check_limit(name, "population", population, size)
    return (population - size) / (population - 1)


def to_batch_size(name: str, value: int, label: str = "batch_size") -> int:
    """Returns how many examples a batch has, two at least."""
    ax.check_limit(name, label, ax.to_positive_int(name, label, value), 2)
    return value


def _missing_deviation(name, batch_size, ddof):
    """Returns 1 - E[s_M], without the digits that the difference would lose."""
    size = to_batch_size(name, batch_size)
    ax.check_choice(name, "ddof", ddof, (0, 1))
    missing = _missing_length(size - 1)
    if ddof:
        return missing
    # s_M is the length of M - 1 Gaussian numbers over the root of M.
    fewer = (1 / size) / (1 + math.sqrt(1 - 1 / size))
    return missing + (1 - missing) * fewer


def _missing_length(number):
    r"""Returns 1 - E[chi_n] / sqrt(n): how much is missing to the length of n Gaussian numbers."""
    if number >= _LARGE:
        return sum(term / number**power for power, term in enumerate(_SERIES, 1))
    log = math.lgamma((number + 1) / 2) - math.lgamma(number / 2) + math.log(2 / number) / 2
    return -math.expm1(log)
