"""Widths found by a sampler of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fxcompress.budget import Budget
from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.errors import InputError
from fxcompress.passes.samplers import SAMPLERS, Suggestions, require_sampler, tuned
from fxcompress.passes.searching_pruner import LEAST, Ground, SearchingPruner, require_dense
from fxcompress.search.history import SearchHistory
from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal, Trial
from fxcompress.task import require_count

#: The largest sparsity that is suggested; what a group cannot lose it does not.
_LARGEST = 0.99
_FIGURES = tuple(figure.name for figure in fields(Budget))


@dataclass(frozen=True)
class TunedPruner(SearchingPruner):
    """Lets Optuna choose every group's sparsity; they are scaled so that each trial meets the budget.

    Akiba et al. 2019, "Optuna", arXiv 1907.10902. The first trials are the dense model and the uniform allocation.

    Args:
        budget: what may be left, as fractions of the caller's dense model. Every trial with one objective uses it up,
            to within 0.5 % where units are that small.
        inner: in which order channels go, and which layers are taken.
        sampler: ``"tpe"``, ``"cmaes"``, ``"nsga2"``, ``"random"`` or ``"grid"`` (as many levels of each group as the
            trials allow).
        trials: how many, besides the first two.
        objectives: ``("score",)``, or the score and figures to be kept small (``("score", "macs")``): then trials cost
            at most the budget, the history has the front, and the best score is taken. ``"latency"`` takes a budget
            of latency.

    Needs ``fxcompress[search]``.
    """

    sampler: str = "tpe"
    trials: int = 64
    objectives: Sequence[str] = ("score",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sampler(self.sampler)
        require_count("trials", self.trials)
        wrong = [name for name in self.objectives[1:] if name not in _FIGURES]
        if isinstance(self.objectives, str) or list(self.objectives[:1]) != ["score"] or wrong:
            raise InputError(
                f"objectives is {self.objectives!r}; expected 'score' first, then figures of {', '.join(_FIGURES)}."
            )
        if "latency" in self.objectives and self.budget.latency is None:
            raise InputError(
                f"objectives is {self.objectives!r}, and latencies are priced under a budget of latency alone; "
                "expected one such as Budget(macs=0.5, latency=0.9)."
            )
        if len(self.objectives) > 1 and not SAMPLERS[self.sampler].several:
            raise InputError(f"the {self.sampler} sampler takes one objective; expected 'nsga2', 'tpe' or 'random'.")

    def expected(self, ground: Ground) -> int:
        """All of them."""
        return 2 + self.trials

    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """Try what the sampler suggests."""
        free = np.flatnonzero(ground.free)
        names = [ground.names[group] for group in free]
        directions = ["maximize", *("minimize" for _ in self.objectives[1:])]
        study = Suggestions(self.sampler, names, _LARGEST, self.trials, search.seeds, directions)
        uniform = ground.fill(np.ones(len(ground.free)))
        dense, *_ = require_dense(search, search.evaluate(ground.proposals(np.stack([ground.most, uniform]))))

        def propose(asked: FloatArray) -> list[Proposal]:
            sparsities = np.zeros((len(asked), len(ground.free)))
            sparsities[:, free] = asked
            return ground.proposals(self._allocations(sparsities, ground))

        tuned(search, study, self.trials, propose, self._values)
        best = search.best(ground.meets)
        return ground.history(search, best=best.number, dense=dense.score)

    def _allocations(self, sparsities: FloatArray, ground: Ground) -> IntArray:
        """What is tried: with one objective, the whole budget is used; with several, at most the budget."""
        proportions = np.maximum(sparsities, LEAST)  # all zero says nothing about them
        if len(self.objectives) == 1:
            return ground.fill(proportions)
        units = ground.prices.units
        wanted = units.astype(np.float64) - np.floor(units * sparsities).astype(np.float64)
        rounded = ground.prices.rounded(wanted, ground.round_to)
        kept: IntArray = np.clip(rounded, ground.least, ground.most)
        ratios = ground.budget.ratios
        over = np.array([any(cost[f] > ratio for f, ratio in ratios.items()) for cost in ground.cost(kept)])
        if over.any():
            kept[over] = ground.fill(proportions[over])
        return kept

    def _values(self, trial: Trial) -> list[float]:
        assert trial.score is not None
        return [trial.score, *(trial.proposal.cost[figure] for figure in self.objectives[1:])]
