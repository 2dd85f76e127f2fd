"""What an allocation counts: of every group the units that may go one by one, all of them used alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from fxcompress.channels.groups import Group
from fxcompress.channels.labels import IntArray
from fxcompress.polynomials import Cell


def unit_count(group: Group) -> int:
    """How many units a group has: channels that have to go together, one of every row."""
    return group.width // unit_size(group)


def unit_size(group: Group) -> int:
    """How many channels of a group go together."""
    return math.lcm(*(int(division.max()) + 1 for division in group.crossed)) if group.crossed else group.rows


def allocatable(groups: Iterable[Group], cells: Iterable[Cell]) -> tuple[Group, ...]:
    """The removable groups, of whose channels only the number matters for what the model costs.

    A group whose channels are not all used alike (``cat([x, x[:, :4]])``) becomes several, each of which keeps equally
    many channels of every row if the group has to. A channel shuffle that crosses such a group freezes it.
    """
    cell = numbered_cells(cells)
    return tuple(part for group in groups if group.removable for part in _alike(group, cell[group.components]))


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
