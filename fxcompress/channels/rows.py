"""Rows that may go whole: attention heads, groups of a convolution, groups of a GroupNorm.

A channel ends where it is summed, but the row that it was summed with goes on: attention scores have a label for each
head, although the channels of queries and keys have none left. Such a *row label* lives as long as its row does, and
that as long as any of its members. So a label dies for one of two reasons: its channel does, or its row. Channels that
meet a tensor which extends along one row only (rotary embedding's cosines) are one channel, of which every row has a
part of its own: what lives is rows times channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.labels import BoolArray, IntArray, distinct
from fxcompress.channels.ledger import Freeze, RowTie


@dataclass(frozen=True)
class Rows:
    """Which row every label lies in.

    Attributes:
        ties: row labels with their members, pair by pair.
        part: for every label the part of a channel that it belongs to: labels that are one element by element.
        row: for every label the number of its row, 0 for none. What goes whole together has one number.
        carried: for every label whether it only stands for its row, and so lives as long as that does.
        frozen: for every number of a row whether something keeps it.
    """

    ties: tuple[RowTie, ...]
    part: IntArray
    row: IntArray
    carried: BoolArray
    frozen: BoolArray

    @classmethod
    def none(cls, part: IntArray) -> Rows:
        """No label lies in a row."""
        row, carried = np.zeros(len(part), dtype=np.int64), np.zeros(len(part), dtype=bool)
        return cls((), part, row, carried, np.ones(1, dtype=bool))

    @property
    def number(self) -> int:
        """How many rows there are, 0 (none) included."""
        return len(self.frozen)

    def living(self, live: BoolArray) -> BoolArray:
        """For every row whether one of its members lives."""
        alive: BoolArray = np.zeros(self.number, dtype=bool)
        alive[self.row[live & ~self.carried]] = True
        alive[0] = True
        return alive

    def product(self, live: BoolArray, component: IntArray, channels: BoolArray) -> BoolArray:
        """What lives where these channels do, in every row of which something lives, and what stands for such rows.

        Args:
            live: for every label whether it lives.
            component: for every label its channel.
            channels: for every channel whether it lives.
        """
        if not self.ties:
            return live  # in one row, the whole model, a channel lives where it does
        alive = self.living(live)
        lives: BoolArray = channels[component] & alive[self.row]
        held = np.zeros(len(component), dtype=bool)
        while True:  # what stands for a row that lives is held, with all that is one channel with it
            stand = self.carried & alive[self.row]
            held[component[stand & ~lives]] = True
            more = lives | (held[component] & alive[self.row])
            if (more == lives).all():
                return lives
            lives, alive = more, self.living(more)

    def empty(self, tie: RowTie, live: BoolArray) -> IntArray:
        """The row labels of a tie that live although none of their members does."""
        standing = distinct(tie.rows[live[tie.rows]])
        found: IntArray = np.setdiff1d(standing, tie.rows[live[tie.members]])
        return found


def rows_of(
    ties: Iterable[RowTie], part: IntArray, freezes: Iterable[Freeze], merge: tuple[IntArray, IntArray]
) -> Rows:
    """Number the rows: row labels and members that are tied, by whatever way, have the same number.

    Args:
        ties: what the ledger found.
        part: for every label the part of a channel that it belongs to.
        freezes: labels that stay; their rows do too.
        merge: the smallest part among those that ties connect, for every part; which parts are in a tie at all.
    """
    ties = tuple(ties)
    root, tied = merge
    numbers = np.zeros(len(part), dtype=np.int64)
    roots = distinct(root[tied]) if len(tied) else tied
    numbers[tied] = np.searchsorted(roots, root[tied]) + 1
    row = numbers[part]
    stands = np.zeros(len(part), dtype=bool)
    for tie in ties:
        stands[part[tie.rows]] = True
    carried = stands[part]
    members = np.zeros(len(roots) + 1, dtype=bool)
    members[row[~carried]] = True
    carried &= members[row]  # a row of nothing but row labels is one of ordinary channels
    frozen = np.zeros(len(roots) + 1, dtype=bool)
    frozen[0] = True
    for freeze in freezes:
        frozen[row[freeze.labels]] = True
    return Rows(ties, part, row, carried, frozen)
