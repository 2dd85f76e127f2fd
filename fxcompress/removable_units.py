"""What a channel pruner counts and removes: single channels, positions of all rows, or whole rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from fxcompress.channels.groups import Group
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.channels.row_sets import RowSet


@dataclass(frozen=True)
class Units:
    """Removable units of equal standing.

    Attributes:
        number: how many there are; those that are gone already count.
        scores: of the units that may go, lowest first.
        components: (components, units): those that go with each of them.
        rows: (rows, units): the numbers of the rows that go with each of them.
        multiple: how many channels of a group's width one unit stands for.
        ranked: the group's components, whether they may go or not.
        importance: of each of those, for what has to come back.
    """

    number: int
    scores: FloatArray
    components: IntArray
    rows: IntArray
    multiple: int
    ranked: IntArray
    importance: FloatArray

    @property
    def gone(self) -> int:
        """How many are gone already; their scores are the lowest there are."""
        return int(np.isneginf(self.scores).sum())

    def lowest(self, count: int) -> tuple[IntArray, IntArray]:
        """Components and rows of the units with the lowest scores."""
        return self.components[:, :count].reshape(-1), self.rows[:, :count].reshape(-1)

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
    if group.crossed:
        table = crossed_units(group.crossed, scores)
        number, table = table.shape[1], table[:, :-1]
        return _units(group, number, table, len(table), scores)
    lists = [np.flatnonzero(group.row_of == number) for number in range(group.rows)]
    if aligned and group.rows > 1:
        ordered = [line for kind in _kinds(lists, row) for line in _aligned(kind, scores)]
    else:
        ordered = [line[np.argsort(scores[line], kind="stable")] for line in lists]
    number = min(map(len, ordered))
    table = np.stack([line[: number - 1] for line in ordered])  # the last unit of a group never goes
    return _units(group, number, table, group.rows, scores)


def _units(group: Group, number: int, table: IntArray, multiple: int, scores: FloatArray) -> Units:
    """Units of single channels; ``table``: (channels, units), indices of a group's channels."""
    components = group.components
    return Units(number, _means(scores, table), components[table], _none(table), multiple, components, scores)


def _none(units: IntArray) -> IntArray:
    """Nothing that goes with each of some units."""
    return np.empty((0, units.shape[1]), dtype=np.int64)


def _means(scores: FloatArray, table: IntArray) -> FloatArray:
    """The mean score of every unit."""
    means: FloatArray = scores[table].mean(axis=0)
    return means


def crossed_units(crossed: Sequence[IntArray], scores: FloatArray) -> IntArray:
    """Channels of two divisions that cross each other, as sets that take equally many from every row of either.

    Each set is the cheapest flow through what is left, from the rows of one division to those of the other. There
    always is one: taking the same fraction of every channel takes equally many from every row, and what a fractional
    flow can do, an integral one can. The least scores go first.

    Returns:
        (channels, sets).
    """
    left, right = crossed
    sizes = int(left.max()) + 1, int(right.max()) + 1
    several = math.lcm(*sizes)
    finite = np.isfinite(scores)
    span = max(float(np.ptp(scores[finite])), 1e-30) if finite.any() else 1.0
    lowest = float(scores[finite].min()) if finite.any() else 0.0
    alive = np.where(finite, scores, lowest)
    costs = np.where(finite, 2**32 + np.round((alive - lowest) / span * 2**20), 0).astype(np.int64)
    cells: dict[tuple[int, int], list[int]] = {}
    for channel in np.argsort(scores, kind="stable").tolist():
        cells.setdefault((int(left[channel]), int(right[channel])), []).append(channel)
    made = []
    for _ in range(len(scores) // several):
        graph: nx.MultiDiGraph[tuple[int, int]] = nx.MultiDiGraph()
        for side, (size, sign) in enumerate(zip(sizes, (-1, 1), strict=True)):
            graph.add_nodes_from(((side, row) for row in range(size)), demand=sign * several // size)
        for (row, column), channels in cells.items():
            for channel in channels[:several]:
                graph.add_edge((0, row), (1, column), key=channel, capacity=1, weight=int(costs[channel]))
        _, flow = nx.network_simplex(graph)
        taken = {c for ends in flow.values() for keys in ends.values() for c, amount in keys.items() if amount}
        cells = {cell: [c for c in channels if c not in taken] for cell, channels in cells.items()}
        made.append(sorted(taken))
    return np.array(made, dtype=np.int64).T


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
    """Whole rows. The last row that a weight produces never goes.

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
    numbers = rows.numbers[chosen].reshape(1, -1)
    return Units(rows.width, scores[chosen], _none(numbers), numbers, 1, numbers[:0, 0], scores[:0])
