"""What an allocation counts: of every group the units that may go one by one, all of them used alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import networkx as nx
import numpy as np

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import IntArray
from fxcompress.channels.row_tables import lines_of, row_tables, rows_among
from fxcompress.polynomials import Cell


def unit_count(group: Group) -> int:
    """How many units a group has: channels that have to go together, one of every row."""
    return group.width // unit_size(group)


def unit_size(group: Group) -> int:
    """How many channels of a group go together."""
    return math.lcm(*(int(division.max()) + 1 for division in group.crossed)) if group.crossed else group.rows


class Allocatable:
    """Which groups are allocated, and as what.

    A group whose channels are not all used alike (``cat([x, x[:, :4]])``) becomes several, each of which keeps equally
    many channels of every row if the group has to. Groups whose channels meet in rows that keep equally many (a grouped
    convolution over their concatenation) become one. Where neither can be, they stay whole.

    Args:
        groups: the analysis.
        cells: the channels that cost alike.
    """

    def __init__(self, groups: ChannelGroups, cells: Iterable[Cell]) -> None:
        self._tables = row_tables(groups.channels)
        self._cell = numbered_cells(cells)
        self._joint = _met(groups)
        self.groups = tuple(part for part, _ in self.parts([group for group in groups if group.removable]))

    def parts(self, chosen: Iterable[Group]) -> list[tuple[Group, tuple[str, ...]]]:
        """Some of the model's removable groups as they are allocated, each with the names of those that it is of."""
        given = {group.name: group for group in chosen}
        made: list[tuple[Group, tuple[str, ...]]] = []
        for name in given:
            names = self._joint.get(name, (name,))
            if names[0] != name or not all(each in given for each in names):
                continue  # it has its turn with the first of them, or some of them stay
            whole = given[name] if len(names) == 1 else self._together([given[each] for each in names])
            made += ((part, names) for part in _alike(whole, self._cell[whole.components])) if whole else ()
        return made

    def _together(self, groups: Sequence[Group]) -> Group | None:
        """Several groups as one, if they lie in rows of equal length."""
        components = np.concatenate([group.components for group in groups])
        row_of, crossed = rows_among(self._tables, components)
        if row_of.max() == 0:
            return None
        starts = np.cumsum([0, *(group.width for group in groups)])
        return Group(
            name="+".join(group.name for group in groups),
            width=len(components),
            members=tuple(dict.fromkeys(member for group in groups for member in group.members)),
            removable=True,
            reason="",
            rows=int(row_of.max()) + 1,
            layers=tuple(dict.fromkeys(layer for group in groups for layer in group.layers)),
            components=components,
            slices=tuple(
                replace(item, channels=item.channels + start)
                for group, start in zip(groups, starts, strict=False)
                for item in group.slices
            ),
            row_of=row_of,
            crossed=crossed,
        )


def _met(groups: ChannelGroups) -> dict[str, tuple[str, ...]]:
    """For every group that meets others in rows the names of all of them, in the order of the graph."""
    names = [group.name for group in groups]
    graph: nx.Graph[int] = nx.Graph()
    owner = groups.owners()
    for _, lines in lines_of(groups.channels):
        met = [index for index in np.unique(owner[lines]).tolist() if index >= 0]
        nx.add_path(graph, met)
    sets = [sorted(found) for found in nx.connected_components(graph) if len(found) > 1]
    return {names[index]: tuple(names[i] for i in found) for found in sets for index in found}


def numbered_cells(cells: Iterable[Cell]) -> IntArray:
    """For every component (up to the last in a cell) the index of its cell, or -1."""
    parts = [cell.components for cell in cells]
    made = np.full(1 + max((int(part.max()) for part in parts), default=0), -1, dtype=np.int64)
    for index, part in enumerate(parts):
        made[part] = index
    return made


def _alike(group: Group, cell: IntArray) -> Iterator[Group]:
    """A group in parts of which every unit has equally many channels of each cell."""
    if group.crossed:
        if any(_constant(division, cell) for division in group.crossed):
            yield group
        return
    rows = [np.flatnonzero(group.row_of == number) for number in range(group.rows)]
    if len({len(row) for row in rows}) > 1:
        return
    table = np.stack([row[np.argsort(cell[row], kind="stable")] for row in rows])
    _, first, which = np.unique(cell[table], axis=1, return_index=True, return_inverse=True)
    if len(first) == 1:
        yield group
        return
    for number, index in enumerate(np.argsort(first)):
        chosen = np.sort(table[:, which.reshape(-1) == index].reshape(-1))
        yield _part(group, chosen, f"{group.name}:{number}")


def _constant(division: IntArray, cell: IntArray) -> bool:
    """Whether every row of a division lies in one cell."""
    first = np.zeros(int(division.max()) + 1, dtype=np.int64)
    first[division] = cell
    return bool((first[division] == cell).all())


def _part(group: Group, chosen: IntArray, name: str) -> Group:
    """Some channels of a group as a group."""
    place = np.full(group.width, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    slices = []
    for item in group.slices:
        mine = place[item.channels]
        if (mine >= 0).any():
            slices.append(replace(item, rows=item.rows[mine >= 0], channels=mine[mine >= 0]))
    return replace(
        group,
        name=name,
        width=len(chosen),
        layers=tuple(dict.fromkeys(item.layer for item in slices)),
        components=group.components[chosen],
        slices=tuple(slices),
        row_of=group.row_of[chosen],
    )
