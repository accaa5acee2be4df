"""A claim beside what was measured, and what follows from the two."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

TO_A_DIGIT = 1e-9  # what arithmetic in float64 may lose


def row(
    statement: str,
    quantity: str,
    claim: str,
    source: str,
    claimed: Any,
    measured: Any,
    *,
    error: float | None = None,
    expected: float | None = None,
    holds: str | bool | None = None,
    room: float = 0.0,
    note: str = "",
) -> dict[str, Any]:
    """Returns one line of the study.

    Args:
      statement: a short key.
      quantity: what was measured, in a few words.
      claim: what the source says, in a sentence.
      source: the document and its section.
      claimed: the number that the source gives or its formula comes to.
      measured: the number that came out; several where the claim is of several.
      error: standard error of what was measured; None where nothing was drawn.
      expected: what the corrected formula comes to.
      holds: the verdict, where it is no comparison of the two numbers.
      room: share of the claimed number that a formula of the first order leaves out.
      note: a sentence.
    """
    if holds is None:
        holds = judged(claimed, measured, error, room)
    elif isinstance(holds, bool | np.bool_):
        holds = "yes" if holds else "no"
    return {
        "statement": statement,
        "quantity": quantity,
        "claim": claim,
        "source": source,
        "claimed": _plain(claimed),
        "measured": _plain(measured),
        "error": _plain(error),
        "expected": _plain(expected),
        "holds": holds,
        "note": note,
    }


def judged(claimed: Any, measured: Any, error: float | None = None, room: float = 0.0) -> str:
    """Returns "yes" within four standard errors, "to first order" within the room besides.

    Where four standard errors are more than a tenth of the claim they decide nothing.
    """
    away = np.abs(np.subtract(measured, claimed, dtype=np.float64))
    size = np.abs(np.asarray(claimed, np.float64))
    noise = 4 * (error or 0.0) + TO_A_DIGIT * np.maximum(size, 1)
    if (away <= noise).all():
        return "undecided" if (noise > 0.1 * size).any() and size.all() else "yes"
    return "to first order" if room and (away <= noise + room * size).all() else "no"


def estimated(
    estimate: Callable[[Any], Any], keys: Iterable[Any], check: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of what is estimated for each key, and its standard error."""
    found = []
    for key in keys:
        found.append(np.asarray(estimate(key), np.float64))
        check()
    return np.mean(found, 0), np.std(found, 0, ddof=1) / math.sqrt(len(found))


def generator(key: jax.Array) -> np.random.Generator:
    """Returns numpy's generator of a key: for small arrays, which it draws without compiling."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _plain(value):
    """Returns what JSON knows."""
    if value is None or isinstance(value, str):
        return value
    found = np.asarray(value).tolist()
    return [_plain(part) for part in found] if isinstance(found, list) else found
