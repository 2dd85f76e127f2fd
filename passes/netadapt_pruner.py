"""NetAdapt: a little less of one group at a time, by what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fxcompress.channels.labels import IntArray
from fxcompress.checkpoint import seeded
from fxcompress.context import Context
from fxcompress.errors import InputError, SearchError
from fxcompress.module import TracedModule
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.searching_pruner import Ground, SearchingPruner, require_dense, told
from fxcompress.search.history import SearchHistory
from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal, Trial, best_of
from fxcompress.search.worker import one_thread
from fxcompress.task import Need, require_count
from fxcompress.training import Training


@dataclass(frozen=True)
class _Taken:
    """One step.

    Attributes:
        tried: how many trials it took.
        winner: the one that was taken; None where somebody interrupted.
        dense: the score before the first step.
    """

    tried: int
    winner: Trial | None
    dense: float


@dataclass(frozen=True)
class NetAdaptPruner(SearchingPruner):
    """Takes from one group per step, the one without which the model scores best, until the budget is met.

    Yang et al. 2018, arXiv 1804.03230, algorithm 1. In step i the model may cost ``step * step_decay^i`` of the dense
    model less than it does. For each group, just as many of its lowest units go as that takes; each of these candidates
    is trained for ``epochs`` and scored, and the best is kept, weights included. What a step costs is priced on the
    graph (or measured, for a latency); every step is noted with it.

    Args:
        budget: what may be left, as fractions of the caller's dense model.
        inner: in which order channels go, and which layers are taken.
        step: what the first step takes, as a fraction of the dense model.
        step_decay: what each step takes, as a fraction of the one before.
        epochs: of training for each candidate; 0 for none.

    Needs the task's score; its batches, loss and optimizer too if it trains. Follow with ``FineTune``.
    """

    step: float = 0.05
    step_decay: float = 0.98
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step", "step_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise InputError(f"{name} is {value!r}; expected a fraction in (0, 1].")
        require_count("epochs", self.epochs, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, what the inner pruner needs, and what training needs."""
        return tuple(dict.fromkeys((*super().needs, *(TRAINING if self.epochs else ()))))

    def expected(self, ground: Ground) -> int:
        """About as many steps as the budget takes, each with a trial for every group."""
        cost = max(1 - ratio for ratio in self.budget.ratios.values())
        steps, size = 0, self.step
        while cost > 0 and steps < 1000:
            steps, cost, size = steps + 1, cost - size, size * self.step_decay
        return 1 + steps * int(ground.free.sum())

    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """What was tried in all steps."""
        return ground.history(search)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Step until the budget is met."""
        ground = self.ground(module, context)
        ground.fill(np.ones(len(ground.free)))  # raises where it cannot be met
        size, number, dense, best = self.step, 0, 0.0, None
        with self.begin(ground, self.expected(ground)) as search:
            while not self._met(ground.cost(ground.most[None])[0]):
                before = len(search.trials)
                taken = context.step(module, partial(self._step, module, context, search, size, number))
                if len(search.trials) == before:
                    search.skip(taken.tried)
                dense = taken.dense if number == 0 else dense
                if taken.winner is None:
                    context.step(module, partial(self._rest, module, context))
                    break
                best, number, size = taken.winner.number, number + 1, size * self.step_decay
                have, ground = ground.most, self.ground(module, context)
                if (ground.most == have).all():  # all of it came back
                    context.step(module, partial(self._rest, module, context))
                    break
            history = replace(self.look(ground, search), best=best, dense=dense)
        context.notes += told(history)
        context.searches.append(history)
        return module

    def _met(self, cost: Mapping[str, float]) -> bool:
        return all(cost[name] <= ratio * (1 + 1e-9) for name, ratio in self.budget.ratios.items())

    def _step(self, module: TracedModule, context: Context, search: Search, size: float, number: int) -> _Taken:
        """Try to take a little from every group, and take it from the best."""
        ground = self.ground(module, context)
        before = len(search.trials)
        dense = 0.0
        if number == 0:
            first, *_ = require_dense(search, search.evaluate(ground.proposals(ground.most[None])))
            dense = first.score or 0.0
        have = ground.cost(ground.most[None])[0]
        wanted = {name: max(ratio, have[name] - size) for name, ratio in self.budget.ratios.items()}
        search.about(partial(ground.subject, self.epochs))
        found = [] if search.interrupted else search.evaluate(self._candidates(ground, wanted))
        tried = len(search.trials) - before
        if search.interrupted:
            return _Taken(tried, None, dense)
        winner = best_of(found)
        if winner is None:
            raise SearchError(f"{self.name}: all {len(found)} trials of a step failed; the first: {found[0].error}.")
        self._take(winner, ground, context, search)
        group = next(i for i, kept in enumerate(winner.proposal.kept) if kept != ground.most[i])
        cost = winner.proposal.cost
        figures = ", ".join(f"{cost[name]:.2%} of the {name} ({most:.2%} allowed)" for name, most in wanted.items())
        change = f"{ground.names[group]} from {ground.most[group]} to {winner.proposal.kept[group]} units"
        context.notes.append(f"step {number + 1}: {figures}, {change}, score {winner.score:.6g}")
        return _Taken(tried, winner, dense)

    def _take(self, winner: Trial, ground: Ground, context: Context, search: Search) -> None:
        """Mask what the winner does not keep, and train once more as it was trained."""
        ground.mask_as_asked(winner.proposal.kept)
        if not self.epochs:
            return
        task = context.required_task(self.needs, self.name)
        with context.laid(ground.module, self.name), one_thread(), seeded(*search.seeds, winner.number):
            task.train(ground.module, Training(epochs=self.epochs, title=self.name))

    def _rest(self, module: TracedModule, context: Context) -> None:
        """Somebody interrupted, or steps lead nowhere: meet the budget in the proportions so far."""
        ground = self.ground(module, context)
        ground.mask(ground.fill(np.maximum(1 - ground.most / ground.prices.units, 1e-6)).tolist())

    def _candidates(self, ground: Ground, wanted: Mapping[str, float]) -> list[Proposal]:
        """For every group that can pay for the step alone the most that it may keep; if none can, all they can pay."""
        enough, least = [], []
        for group in np.flatnonzero(ground.free & (ground.most > ground.least)).tolist():
            numbers = np.arange(ground.most[group] - 1, ground.least[group] - 1, -1)
            numbers = numbers[numbers * ground.prices.sizes[group] % ground.round_to == 0]
            if not len(numbers):
                continue
            kept: IntArray = np.tile(ground.most, (len(numbers), 1))
            kept[:, group] = numbers
            figures = ground.prices.of(kept)
            fits = np.all([figures[f] <= share * ground.dense[f] * (1 + 1e-12) for f, share in wanted.items()], axis=0)
            least.append(kept[-1])
            if fits.any():
                enough.append(kept[int(np.argmax(fits))])
        if not least:
            raise InputError(f"the budget allows {self.budget}, and no group can lose any more; expected a larger one.")
        return ground.proposals(np.stack(enough or least))
