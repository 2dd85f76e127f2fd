"""Removable units in the order in which they go, and what lives without the lowest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.plan import Settled, settled
from fxcompress.removable_units import Units, channel_units

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Ranking:
    """Removable units of several groups, ranked in each, and what lives without the lowest of them.

    Attributes:
        module: the clean traced module.
        groups: its analysis.
        live: for every label whether it lives now.
        tables: the units of every group.
    """

    module: TracedModule
    groups: ChannelGroups
    live: BoolArray
    tables: tuple[Units, ...]

    @classmethod
    def of(
        cls,
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        parts: Sequence[Group],
        scores: Sequence[FloatArray],
        *,
        aligned: bool = False,
    ) -> Ranking:
        """The units of groups by the scores of their channels.

        Args:
            module: the clean traced module.
            groups: its analysis.
            masking: what is masked already, which goes first.
            parts: the groups, or parts of groups (:attr:`fxcompress.prices.Prices.groups`).
            scores: of the channels of each: (width,).
            aligned: see :func:`channel_units`.
        """
        channels, live = groups.channels, masking.live(groups.channels)
        alive = channels.alive(live)
        tables = [
            channel_units(part, values, alive[part.components], channels.rows.row[part.components], aligned=aligned)
            for part, values in zip(parts, scores, strict=True)
        ]
        return cls(module, groups, live, tuple(tables))

    def without(self, counts: Sequence[int]) -> Settled:
        """What lives without the lowest ``counts`` units of every group."""
        channels = self.groups.channels
        components, whole = self.lowest(counts)
        rank = np.zeros(len(channels.component))
        for units in self.tables:
            rank[units.ranked] = units.importance
        return settled(self.module, self.groups, self.live & channels.live(components, whole), rank)

    def lowest(self, counts: Sequence[int]) -> tuple[IntArray, IntArray]:
        """The components and the rows of the lowest ``counts`` units of every group."""
        gone = [units.lowest(count) for units, count in zip(self.tables, counts, strict=True)]
        components, whole = (
            np.concatenate([_NONE, *parts]) for parts in (zip(*gone, strict=True) if gone else ((), ()))
        )
        return components, whole

    def keeping(self, kept: IntArray) -> Settled:
        """What lives where so many units are kept of every group: (groups,)."""
        return self.without([units.number - int(count) for units, count in zip(self.tables, kept, strict=True)])
