"""Rows of which channels must keep equally many: heads, groups of a convolution or a GroupNorm, and how they cross."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fxcompress.channels.labels import BoolArray, IntArray, dims_of, distinct
from fxcompress.channels.ledger import Constraint
from fxcompress.channels.solve import Channels


def in_rows(channels: Channels) -> BoolArray:
    """For every component whether it lies in rows that may go whole."""
    found: BoolArray = np.zeros(len(channels.component), dtype=bool)
    found[channels.component[channels.rows.row > 0]] = True
    return found


def _whole_rows(channels: Channels) -> IntArray:
    """For every component the number of the one row that it lies in with others; 0 where it is in none, or several."""
    labels = np.flatnonzero(channels.rows.row)
    pairs = distinct(channels.component[labels] * channels.rows.number + channels.rows.row[labels])
    components, numbers = pairs // channels.rows.number, pairs % channels.rows.number
    alone = np.bincount(components, minlength=len(channels.component))[components] == 1
    shared = np.bincount(numbers, minlength=channels.rows.number)[numbers] > 1
    table = np.zeros(len(channels.component), dtype=np.int64)
    table[components[alone & shared]] = numbers[alone & shared]
    return table


def lines_of(channels: Channels) -> Iterator[tuple[Constraint, IntArray]]:
    """Every constraint that wants several rows to keep equally many channels, and the components in each row."""
    for constraint in channels.constraints:
        if all(len(dims_of(factor)) < 2 for factor in constraint.labels.factors):
            continue
        rows = constraint.rows()
        if rows is None or len(rows) < 2:
            continue
        lines = channels.component[rows]
        if (lines.min(axis=1) != lines.max(axis=1)).any():  # rows of one channel each go whole
            yield constraint, lines


def row_tables(channels: Channels) -> list[IntArray]:
    """For every constraint with several rows, the number of the row that each component lies in (0: in none)."""
    tables = [_whole_rows(channels)] if channels.rows.ties else []
    for _, lines in lines_of(channels):
        row = np.zeros(len(channels.component), dtype=np.int64)
        for number in range(len(lines) - 1, -1, -1):  # a channel in several rows counts for the first
            row[lines[number]] = number + 1
        tables.append(row)
    return tables


def rows_among(tables: Sequence[IntArray], chosen: IntArray) -> tuple[IntArray, tuple[IntArray, ...]]:
    """For each of some channels the number of its row, and its rows in two divisions that cross each other.

    The rows are those of all constraints at once if those are equally long, else those of the first constraint whose
    rows are: the rest is repaired when channels have been chosen.
    """
    mine = [table[chosen] for table in tables]
    mine = [row for row in mine if row.min() != row.max()]
    if not mine:
        return np.zeros(len(chosen), dtype=np.int64), ()
    joint = np.zeros(len(chosen), dtype=np.int64)
    with np.errstate(over="ignore"):
        for row in mine:
            joint = joint * np.int64(1_000_003) + row
    crossed = _crossed(mine)
    for keys in (joint, *mine):
        numbers = numbered(keys)
        if len(set(np.bincount(numbers).tolist())) == 1:
            return numbers, crossed
    return np.zeros(len(chosen), dtype=np.int64), crossed


def _crossed(tables: Sequence[IntArray]) -> tuple[IntArray, ...]:
    """Two divisions into rows of equal length that cross each other, if all others follow from one of those."""
    finest: list[IntArray] = []
    for row in map(numbered, tables):
        if not any(_refines(other, row) for other in finest):
            finest = [*(other for other in finest if not _refines(row, other)), row]
    if len(finest) != 2 or any(len(set(np.bincount(row).tolist())) > 1 for row in finest):
        return ()
    return tuple(finest)


def _refines(fine: IntArray, coarse: IntArray) -> bool:
    """Whether channels in one row of the first are in one row of the second."""
    first = np.zeros(int(fine.max()) + 1, dtype=np.int64)
    first[fine] = coarse
    return bool((first[fine] == coarse).all())


def numbered(keys: IntArray) -> IntArray:
    """Equal keys as equal numbers, from 0 in the order in which they appear."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]
