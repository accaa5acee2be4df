"""Claims about which variant generalizes better, and what the seeds say of each."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Claim(NamedTuple):
    """That one variant has less, or more, of something than another.

    Attributes:
      text: the claim.
      of: the score it is about.
      first: a variant.
      second: another.
      sign: -1 where the first is to have less, 1 where more, 0 where they are to be alike.
    """

    text: str
    of: str
    first: str
    second: str
    sign: int


LARGE, DECAYED = "BN, M = 256", "PN, gamma decay"
CLAIMS = (
    Claim("BN below SGD", "gap", "BN", "SGD", -1),
    Claim("BN below WN", "gap", "BN", "WN", -1),
    Claim("BN below WN, mean-only BN", "gap", "BN", "WN, mean-only BN", -1),
    Claim("BN below WN, variance-only BN", "gap", "BN", "WN, variance-only BN", -1),
    Claim("WN, mean-only BN below WN", "gap", "WN, mean-only BN", "WN", -1),
    Claim("WN, variance-only BN below WN", "gap", "WN, variance-only BN", "WN", -1),
    Claim("M = 64 below M = 256, BN", "gap", "BN", LARGE, -1),
    Claim("M = 64 below M = 256, SGD", "gap", "SGD", "SGD, M = 256", -1),
    Claim("dropout after BN below none", "gap", f"{LARGE}, dropout after", LARGE, -1),
    Claim("dropout after BN above none", "accuracy", f"{LARGE}, dropout after", LARGE, 1),
    Claim("dropout after BN above M = 64", "accuracy", f"{LARGE}, dropout after", "BN", 1),
    Claim(
        "dropout before BN below after",
        "accuracy",
        f"{LARGE}, dropout before",
        f"{LARGE}, dropout after",
        -1,
    ),
    Claim("WN, dropout above WN", "accuracy", "WN, dropout", "WN", 1),
    Claim("WN, dropout as BN", "accuracy", "WN, dropout", "BN", 0),
    Claim("PN, gamma decay below BN", "gap", DECAYED, "BN", -1),
    Claim("PN, gamma decay above BN", "accuracy", DECAYED, "BN", 1),
    Claim("PN, gamma decay below PN", "gap", DECAYED, "PN", -1),
    Claim("BN below PN", "gap", "BN", "PN", -1),
)


def summary(runs: Sequence[dict[str, Any]], scores: Sequence[str]) -> dict[str, float]:
    """Returns the mean of each score over the seeds, and its standard error."""
    found = {}
    for name in scores:
        values = np.array([run[name] for run in runs])
        found[name] = float(values.mean())
        found[f"{name}_error"] = _error(values)
    return found


def judge(rows: Sequence[dict[str, Any]], claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """Returns what the seeds say of each claim whose variants were measured.

    Both variants of a claim have the same seeds, that is the same images: the difference is taken
    seed by seed. It has a sign where zero is outside the 95 % interval of Student's t.
    """
    runs = {row["variant"]: {run["seed"]: run for run in row["runs"]} for row in rows}
    judged = []
    for claim in claims:
        if not {claim.first, claim.second} <= set(runs):
            continue
        first, second = runs[claim.first], runs[claim.second]
        seeds = sorted(set(first) & set(second))
        if len(seeds) < 2:
            continue
        values = np.array([first[seed][claim.of] - second[seed][claim.of] for seed in seeds])
        difference, error = float(values.mean()), _error(values)
        room = error * float(stats.t.ppf(0.975, len(seeds) - 1))
        judged.append(
            {
                "claim": claim.text,
                **{name: getattr(claim, name) for name in ("of", "first", "second", "sign")},
                "difference": difference,
                "error": error,
                "room": room,
                "verdict": verdict(claim.sign, difference, room),
            }
        )
    return judged


def verdict(sign: int, difference: float, room: float) -> str:
    """Returns in a word or two whether a difference is as claimed, beyond its error."""
    if abs(difference) <= room:
        return "not told apart"
    if sign == 0:
        return "differ"
    return "holds" if difference * sign > 0 else "the opposite"


def _error(values):
    """Returns the standard error of a mean; of one value there is none."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
