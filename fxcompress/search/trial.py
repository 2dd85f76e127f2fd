"""What a search tries, and what came of it: plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxcompress.errors import CheckpointError


@dataclass(frozen=True)
class Proposal:
    """A candidate before it was tried.

    Attributes:
        kept: for every removable group how many units stay; empty where a search is not about widths.
        bits: for every layer the bits of its weight; empty where a search is not about bits.
        cost: what the candidate costs by figure (``"macs"``, ``"params"``, ``"bytes"``, ``"latency"``), as a fraction
            of the dense model.
        notes: numbers of the algorithm, such as the temperature.
    """

    kept: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def candidate(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What tells one candidate from others. (Its cost may be a measurement, and its notes are the algorithm's.)"""
        return self.kept, self.bits

    def within(self, budget: Mapping[str, float]) -> bool:
        """Whether it costs at most these fractions of the dense model; of figures without a cost nothing is known."""
        return all(self.cost.get(name, 0.0) <= ratio * (1 + 1e-9) for name, ratio in budget.items())


@dataclass(frozen=True)
class Trial:
    """One candidate that was tried.

    Attributes:
        number: from 0, in the order of the proposals.
        proposal: the candidate.
        state: ``"done"``, or ``"failed"`` with an error.
        score: the task's, higher is better; None where the trial failed.
        seconds: how long it took where it ran.
        error: what was raised, empty where it is done.
        same_as: the number of the trial that had tried this candidate before, whose outcome this is; None where it
            was tried itself.
    """

    number: int
    proposal: Proposal
    state: Literal["done", "failed"]
    score: float | None
    seconds: float
    error: str = ""
    same_as: int | None = None

    @property
    def done(self) -> bool:
        """Whether there is a score."""
        return self.state == "done"

    def record(self) -> dict[str, Any]:
        """The trial as JSON takes it."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Trial:
        """A trial from its record.

        Raises:
            CheckpointError: it is no record of a trial.
        """
        try:
            given = dict(record)
            proposal = given.pop("proposal")
            kept, bits = tuple(proposal.pop("kept")), tuple(proposal.pop("bits"))
            return cls(proposal=Proposal(kept, bits, **proposal), **given)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{record!r} is no record of a trial ({error}).") from error


def best_of(trials: Iterable[Trial], within: Callable[[Trial], bool] | None = None) -> Trial | None:
    """The trial with the highest score, the first of several; None where none has a score.

    Args:
        trials: in any order.
        within: says of a trial whether it counts; all that are done by default.
    """
    found: Trial | None = None
    for trial in trials:
        if trial.score is None or (within is not None and not within(trial)):
            continue
        if found is None or found.score is None or (-trial.score, trial.number) < (-found.score, found.number):
            found = trial
    return found
