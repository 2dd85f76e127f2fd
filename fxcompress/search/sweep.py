"""Scores along one dimension at a time: what a group, or a layer, loses as it gets less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    points: tuple[Point, ...] = ()

    @property
    def measured(self) -> tuple[tuple[float, float], ...]:
        """(value, score) of the points that have a score."""
        return tuple((point.value, point.score) for point in self.points if point.score is not None)

    def allowed(self, dense: float, drop: float, scale: float | None = None) -> float:
        """How far this may go before the score has fallen by a fraction ``drop`` of ``scale``.

        Between two points the score is taken to be linear. Of sparsities the largest, 0 at least; of bits the fewest
        that were measured to be enough, and 32 where none were.

        Args:
            dense: the score of the model as it came.
            drop: how far the score may fall.
            scale: what that is a fraction of; the size of the dense score by default.
        """
        limit = dense - drop * (abs(dense) if scale is None else scale)
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
    curves: Sequence[Curve],
    values: Sequence[float],
    propose: Callable[[int, float], Proposal],
    goes_on: Callable[[float], bool],
) -> tuple[Curve, ...]:
    """Measure some groups or layers at some values, each value for all of them before the next one.

    Args:
        search: whose trials these are.
        curves: of each of them, without points.
        values: in the order in which they are tried.
        propose: the candidate for the place of a curve and a value.
        goes_on: whether what scores this is tried at the next value.

    Returns:
        The curves, with as many points as were measured.
    """
    points: list[list[Point]] = [[] for _ in curves]
    active = list(range(len(curves)))
    for value in values:
        proposed, active = active, []
        for item, trial in zip(proposed, search.evaluate([propose(item, value) for item in proposed]), strict=False):
            points[item].append(Point(value, trial.score, trial.error))
            if trial.score is None or goes_on(trial.score):
                active.append(item)
        if search.interrupted:
            break
    return tuple(replace(curve, points=tuple(found)) for curve, found in zip(curves, points, strict=True))
