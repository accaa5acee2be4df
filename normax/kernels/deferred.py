"""Pieces that are computed anew wherever they are needed, for what no register has room for.

A `Deferred` stands for the pieces that a loop meets one after the other. Arithmetic on it is
remembered and done in the loop, once an iteration however often its result is used there.
"""

from collections.abc import Callable
from typing import Any


class Deferred:
    """A function of what else is met in the same iteration."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        """Remembers a function of pieces, deferred or not, and of `INDEX`."""
        self.function, self.arguments = function, arguments

    def at(self, index: Any, met: dict[int, Any]) -> Any:
        """Returns the piece at an index; `met` holds what this iteration has computed."""
        if id(self) not in met:
            arguments = [
                each.at(index, met) if isinstance(each, Deferred) else each
                for each in self.arguments
            ]
            met[id(self)] = self.function(*arguments)
        return met[id(self)]

    def __add__(self, other):
        return each(lambda a, b: a + b, self, other)

    def __sub__(self, other):
        return each(lambda a, b: a - b, self, other)

    def __mul__(self, other):
        return each(lambda a, b: a * b, self, other)

    def __neg__(self):
        return each(lambda a: -a, self)

    def __abs__(self):
        return each(abs, self)


class _Index(Deferred):
    def at(self, index, met):
        del met
        return index


INDEX = _Index(lambda: None)


def each(function: Callable[..., Any], *pieces: Any) -> Any:
    """Returns a function of pieces, deferred if one of them is."""
    if any(isinstance(piece, Deferred) for piece in pieces):
        return Deferred(function, *pieces)
    return function(*pieces)
