"""How the axes of an array are those that a kernel knows: rows, columns, or groups."""

import math
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """How the axes of an array are those of a kernel.

    Of rows: any axes, and the row. Of groups: `examples` axes, `positions` axes, the groups, and
    their members unless each feature is a group.
    """

    entries: str  # names of the axes, as in `sharded`
    parameters: str  # those of a scale or bias
    whole: str  # those that a group lies along
    examples: int = 0
    positions: int = 0

    def four(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns a shape with one axis each for examples, positions, groups and members."""
        features = self.examples + self.positions
        examples, positions = shape[: self.examples], shape[self.examples : features]
        return math.prod(examples), math.prod(positions), *self.two(shape[features:])

    def two(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the shape of a scale or bias, one axis each for groups and members."""
        return (*shape, 1)[:2]


ROWS = Layout("... d", "d", "d")
COLUMNS = Layout("... d", "d", "")


def layout_of(plan, x, scale, bias) -> Layout | None:
    """Returns the layout that the groups of a plan have, None where they have none.

    It is kept in the plan, because the backward pass does not see all parameters.
    """
    axes, ndim = plan.reduction.axes, x.ndim

    def along(features):
        shape = (1,) * (ndim - features) + x.shape[ndim - features :]
        return all(v is None or v.shape == shape for v in (scale, bias))

    if axes == (ndim - 1,) and along(1) and plan.activation is None:
        return ROWS
    if axes == tuple(range(ndim - 1)) and along(1):
        return COLUMNS
    members = axes[-1:] == (ndim - 1,)
    positions, features = len(axes) - members, 1 + members
    examples = ndim - features - positions
    middle = tuple(range(examples, examples + positions))
    if examples < 1 or axes[:positions] != middle or not along(features):
        return None
    names = [f"n{i}" for i in range(examples)], [f"p{i}" for i in range(positions)]
    parameters = ["g", "k"][:features]
    entries = " ".join([*names[0], *names[1], *parameters])
    return Layout(
        entries, " ".join(parameters), " ".join([*names[1], *parameters[1:]]), examples, positions
    )
