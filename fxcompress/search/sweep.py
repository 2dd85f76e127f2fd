"""Scores along one dimension at a time: what a group, or a layer, loses as it gets less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        value: the sparsity of the group, or the bits of the layer's weight.
        score: the task's; None where the trial failed.
        error: what was raised.
    """

    value: float
    score: float | None
    error: str = ""


@dataclass(frozen=True)
class Curve:
    """How the score follows one group's sparsity, or one layer's bits, all else left as it is.

    Attributes:
        name: of the group or layer.
        kind: ``"sparsity"`` or ``"bits"``.
        layers: the layers that lose channels together; of bits the layer itself.
        units: how many removable units the group has; of bits, how many elements the weight has.
        points: in the order in which they were measured: sparsities rise, bits fall.
    """

    name: str
    kind: Literal["sparsity", "bits"]
    layers: tuple[str, ...]
    units: int
    points: tuple[Point, ...]

    @property
    def measured(self) -> tuple[tuple[float, float], ...]:
        """(value, score) of the points that have a score."""
        return tuple((point.value, point.score) for point in self.points if point.score is not None)

    def allowed(self, dense: float, drop: float) -> float:
        """How far this may go before the score has fallen by a fraction ``drop`` of the dense one.

        Between two points the score is taken to be linear. Of sparsities the largest, 0 at least; of bits the fewest
        that were measured to be enough, and 32 where none were.
        """
        limit = dense - drop * abs(dense)
        if self.kind == "bits":
            return min((value for value, score in self.measured if score >= limit), default=32.0)
        before = (0.0, dense)
        for value, score in self.measured:
            if score < limit:
                share = (before[1] - limit) / (before[1] - score)
                return before[0] + share * (value - before[0])
            before = (value, score)
        return before[0]


def sweep(
    search: Search,
    count: int,
    values: Sequence[float],
    propose: Callable[[int, float], Proposal | None],
    goes_on: Callable[[float], bool],
) -> list[list[Point]]:
    """Measure some items at some values, each value for all items before the next one.

    Args:
        search: whose trials these are.
        count: of the items.
        values: in the order in which they are tried.
        propose: the candidate for an item and a value; None where the item cannot take it.
        goes_on: whether an item whose score is this is tried at the next value.

    Returns:
        For every item its points.
    """
    points: list[list[Point]] = [[] for _ in range(count)]
    active = list(range(count))
    for value in values:
        proposed = [(item, made) for item in active if (made := propose(item, value)) is not None]
        active = []
        for (item, _), trial in zip(proposed, search.evaluate([made for _, made in proposed]), strict=False):
            points[item].append(Point(value, trial.score, trial.error))
            if trial.score is None or goes_on(trial.score):
                active.append(item)
        if search.interrupted:
            break
    return points
