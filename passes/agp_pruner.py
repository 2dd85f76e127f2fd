"""Automated gradual pruning."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.passes.scheduled_pruner import ScheduledPruner


@dataclass(frozen=True)
class AGPPruner(ScheduledPruner):
    """Prunes fast at first and ever more slowly: s_t = s_f + (s_i - s_f) * (1 - t/n)^3, t = 1 .. n.

    Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1, around any pruner. Options, needs and
    guarantees: :class:`ScheduledPruner`.
    """

    def remaining(self, progress: float) -> float:
        """The cubic."""
        return cubic(progress)


def cubic(progress: float) -> float:
    """(1 - progress)^3."""
    return (1 - progress) ** 3
