"""What a search did, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from fxcompress.search.trial import Proposal, Trial, best_of
from fxcompress.text import as_text


@dataclass(frozen=True)
class SearchHistory:
    """One search of a pass, ``module.meta["history"][i].searches``; prints as a table. Plain data.

    Attributes:
        name: the pass.
        trials: in the order of their numbers.
        best: number of the trial that was taken; None where another measure than the score decided.
        groups: names of the groups (or, of a search for bits, of the layers) that the proposals list.
        widths: for each of these how many units the dense model has (or the bits of its weights).
        dense: the score before the search; None where it was not measured.
        budget: the fractions of the dense model that were asked for, by figure.
        interrupted: whether it was ended by hand.
        taken: the proposal that was taken, tried or not.
    """

    name: str
    trials: tuple[Trial, ...]
    best: int | None = None
    groups: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    dense: float | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    interrupted: bool = False
    taken: Proposal | None = None

    @property
    def chosen(self) -> Trial | None:
        """The trial that was taken."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials that failed."""
        return tuple(trial for trial in self.trials if not trial.done)

    def progress(self) -> list[tuple[int, float]]:
        """The best score so far of what meets the budget, at every trial that raised it: (number, score)."""
        found: list[tuple[int, float]] = []
        for trial in self.trials:
            if trial.score is None or not trial.proposal.within(self.budget):
                continue
            if not found or trial.score > found[-1][1]:
                found.append((trial.number, trial.score))
        return found

    def front(self, figure: str = "macs") -> tuple[Trial, ...]:
        """The trials that no other one beats in both score and cost, cheapest first."""
        return pareto(self.trials, figure)

    def __rich__(self) -> Table:
        figures = sorted({figure for trial in self.trials for figure in trial.proposal.cost})
        table = Table(title=f"{self.name}: {len(self.trials)} trials, {len(self.failed)} failed", box=box.SIMPLE)
        for column in ("trial", "score", *figures, "seconds", ""):
            table.add_column(column, justify="right" if column else "left")
        shown = {number for number, _ in self.progress()} | {self.best} | {trial.number for trial in self.failed}
        for trial in self.trials:
            if trial.number in shown:
                cost = [f"{trial.proposal.cost[f]:.4f}" if f in trial.proposal.cost else "" for f in figures]
                score = "failed" if trial.score is None else f"{trial.score:.6g}"
                note = "taken" if trial.number == self.best else trial.error
                note += "" if trial.same_as is None else f" (as trial {trial.same_as})"
                table.add_row(str(trial.number), score, *cost, f"{trial.seconds:.2f}", note)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def pareto(trials: Iterable[Trial], figure: str) -> tuple[Trial, ...]:
    """The trials that no other one beats in both score and cost, cheapest first; of equal ones the first."""
    having = [trial for trial in trials if trial.score is not None and figure in trial.proposal.cost]
    having.sort(key=lambda trial: (trial.proposal.cost[figure], -(trial.score or 0.0), trial.number))
    front: list[Trial] = []
    for trial in having:
        best = best_of(front)
        if best is None or (trial.score or 0.0) > (best.score or 0.0):
            front.append(trial)
    return tuple(front)
