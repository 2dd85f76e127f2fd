"""What a search tries, and what came of it: plain data."""

from __future__ import annotations

from collections.abc import Mapping
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

    def same(self, other: Proposal) -> bool:
        """Whether another proposal is the same candidate. (Its cost may be a measurement, and differ.)"""
        return (self.kept, self.bits) == (other.kept, other.bits)


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
    """

    number: int
    proposal: Proposal
    state: Literal["done", "failed"]
    score: float | None
    seconds: float
    error: str = ""

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


def best_of(trials: Any, within: Any = None) -> Trial | None:
    """The trial with the highest score, the first of several; None where none has a score.

    Args:
        trials: any iterable of trials.
        within: says of a trial whether it counts; all that are done by default.
    """
    found: Trial | None = None
    for trial in trials:
        if not trial.done or (within is not None and not within(trial)):
            continue
        if found is None or trial.score > found.score or (trial.score == found.score and trial.number < found.number):
            found = trial
    return found
