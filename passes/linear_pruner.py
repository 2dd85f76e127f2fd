"""Gradual pruning along a straight line."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.passes.scheduled_pruner import ScheduledPruner


@dataclass(frozen=True)
class LinearPruner(ScheduledPruner):
    """Prunes equally much in every iteration: s_t = s_f + (s_i - s_f) * (1 - t/n), t = 1 .. n.

    The baseline for other schedules, around any pruner. Options, needs and guarantees: :class:`ScheduledPruner`.
    """

    def remaining(self, progress: float) -> float:
        """The straight line."""
        return 1 - progress
