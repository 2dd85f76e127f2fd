"""Sets of rows that may go whole: the heads of an attention, the groups of a convolution or a GroupNorm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fxcompress.channels.labels import IntArray, distinct

if TYPE_CHECKING:
    from fxcompress.channels.groups import Group, Slices
    from fxcompress.channels.solve import Channels


@dataclass(frozen=True)
class RowSet:
    """Rows of equal standing, each of which may go whole: a head goes with its queries, keys and values.

    Attributes:
        name: the first layer that produces them.
        width: number of rows.
        members: every ``(parameter or buffer, dimension)`` that loses slices when a row goes.
        layers: names of the layers whose weights produce the rows.
        groups: names of the channel groups that the rows are of.
        numbers: the rows' numbers in the analysis, in order.
        slices: the producing rows of weights, for scoring; their ``channels`` count the rows of the set.
        parts: for every item of ``slices`` the rows (0 .. width - 1) of the set that it has channels in.
    """

    name: str
    width: int
    members: tuple[tuple[str, int], ...]
    layers: tuple[str, ...]
    groups: tuple[str, ...]
    numbers: IntArray
    slices: tuple[Slices, ...]
    parts: tuple[IntArray, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.width} rows of {', '.join(self.layers)}"


def row_sets(groups: Iterable[Group], channels: Channels) -> tuple[RowSet, ...]:
    """The sets of at least two rows that nothing keeps from going, in the order of the graph.

    Rows that one weight produces are of one set. (A group may have many sets: shared cosines make one channel of all
    layers.)
    """
    rows = channels.rows
    if not rows.ties:
        return ()
    starts = {(axis.name, axis.dim): axis.start for axis in channels.facts.ledger.axes}
    owned = [(g, [rows.row[starts[item.parameter, item.dim] + item.rows] for item in g.slices]) for g in groups]
    owned = [(group, numbers) for group, numbers in owned if any(found.any() for found in numbers)]
    made = []
    for numbers in _connected([item for _, found in owned for item in map(distinct, found) if item.any()], rows.number):
        free = numbers[~rows.frozen[numbers]]
        if len(free) > 1:
            made.append(_row_set(owned, free, channels))
    return tuple(made)


def _connected(sets: list[IntArray], size: int) -> list[IntArray]:
    """Numbers that lie in a set together, and with which others do; without 0; in the order of the sets."""
    of = np.arange(size)
    for numbers in sets:
        mine = np.isin(of, of[numbers[numbers > 0]])
        of[mine] = of[mine].min() if mine.any() else 0
    firsts = dict.fromkeys(int(of[numbers[numbers > 0][0]]) for numbers in sets)
    return [np.flatnonzero(of == first) for first in firsts]


def _row_set(owned: list[tuple[Group, list[IntArray]]], numbers: IntArray, channels: Channels) -> RowSet:
    place = np.full(channels.rows.number, -1, dtype=np.int64)
    place[numbers] = np.arange(len(numbers))
    slices, parts, names = [], [], []
    for group, found in owned:
        mine = [place[item] for item in found]
        if all((item < 0).all() for item in mine):
            continue
        names.append(group.name)
        for item, which in zip(group.slices, mine, strict=True):
            if (which >= 0).any():
                parts.append(distinct(which[which >= 0]))
                slices.append(replace(item, rows=item.rows[which >= 0], channels=which[which >= 0]))
    layers = tuple(dict.fromkeys(item.layer for item in slices))
    goes = np.isin(channels.rows.row, numbers)
    members = [
        (name, dim)
        for name, labels in channels.facts.state.items()
        for factor in labels.factors
        for dim in [max(d for d, size in enumerate(factor.shape) if size > 1)]
        if goes[factor.numpy()].any()
    ]
    return RowSet(layers[0], len(numbers), tuple(members), layers, tuple(names), numbers, tuple(slices), tuple(parts))
