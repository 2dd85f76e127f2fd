"""What a channel pruner counts and removes: single channels, positions of all rows, or whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fxcompress.channels.groups import Group
from fxcompress.channels.labels import BoolArray, IntArray
from fxcompress.channels.row_sets import RowSet

FloatArray = npt.NDArray[np.float64]
_NONE: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Units:
    """Removable units of equal standing.

    Attributes:
        number: how many there are; those that are gone already count.
        scores: of the units that may go, lowest first.
        table: for each of those the components that go with it (channels, units).
        rows: for each of those the number of the row that goes (none, or one each).
        multiple: how many channels of a group's width one unit stands for.
        rank: importance of components, for what has to come back.
    """

    number: int
    scores: FloatArray
    table: IntArray
    rows: IntArray
    multiple: int
    rank: dict[int, float] = field(default_factory=dict)

    def lowest(self, count: int) -> tuple[IntArray, IntArray]:
        """Components and rows of the units with the lowest scores."""
        return self.table[:, :count].reshape(-1), self.rows[:count]

    def rounded(self, count: int, round_to: int) -> int:
        """How many go if the width that is kept is rounded up to a multiple."""
        kept = self.number - count
        while kept < self.number and kept * self.multiple % round_to:
            kept += 1
        return self.number - kept


def channel_units(group: Group, scores: FloatArray, alive: BoolArray, row: IntArray, *, aligned: bool) -> Units:
    """A group's channels; where rows must stay equal a channel of every row.

    Args:
        group: the channels.
        scores: theirs.
        alive: whether each is there still: what is masked already counts as removed.
        row: for each the number of the row that it may go with as a whole, 0 for none.
        aligned: the channels of a unit have the same position in every row; else they are every row's lowest.
    """
    scores = np.where(alive, scores, -np.inf)
    lists = [np.flatnonzero(group.row_of == number) for number in range(group.rows)]
    if aligned and group.rows > 1:
        ordered = [line for kind in _kinds(lists, row) for line in _aligned(kind, scores)]
    else:
        ordered = [line[np.argsort(scores[line], kind="stable")] for line in lists]
    number = min(map(len, ordered))
    table = np.stack([line[: number - 1] for line in ordered])  # the last unit of a group never goes
    with np.errstate(invalid="ignore"):
        unit_scores = scores[table].mean(axis=0)
    rank = dict(zip(group.components.tolist(), scores.tolist(), strict=True))
    return Units(number, unit_scores, group.components[table], _NONE, group.rows, rank)


def _kinds(lists: Sequence[IntArray], row: IntArray) -> list[list[IntArray]]:
    """Rows of one kind, together: of a fused projection the queries' rows, and the values' rows."""
    seen: dict[int, int] = {}
    kinds: list[list[IntArray]] = []
    for line in lists:
        head = int(row[line[0]])
        kind = seen.get(head, 0) if head else 0
        seen[head] = kind + 1
        kinds += [[]] if kind == len(kinds) else []
        kinds[kind].append(line)
    return kinds


def _aligned(lists: Sequence[IntArray], scores: FloatArray) -> list[IntArray]:
    """Every row in one order: that of what all rows have at a position."""
    table = np.stack(lists)
    there = np.isfinite(scores[table])
    total = np.where(there.any(axis=0), np.where(there, scores[table], 0).sum(axis=0), -np.inf)
    order = np.argsort(total, kind="stable")
    return [line[order] for line in lists]


def row_units(rows: RowSet, scores: FloatArray, alive: BoolArray) -> Units:
    """Whole rows. The last row of a group never goes.

    Args:
        rows: the rows.
        scores: theirs.
        alive: whether each is there still.
    """
    scores = np.where(alive, scores, -np.inf)
    left = [set(part.tolist()) for part in rows.parts]
    going = []
    for place in np.argsort(scores, kind="stable").tolist():
        mine = [part for part in left if place in part]
        if all(len(part) > 1 for part in mine):
            going.append(place)
            for part in mine:
                part.remove(place)
    chosen = np.array(going, dtype=np.int64)
    return Units(rows.width, scores[chosen], np.empty((0, len(going)), dtype=np.int64), rows.numbers[chosen], 1)
