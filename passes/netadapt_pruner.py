"""NetAdapt: a little less of one group at a time, by what is measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.checkpoint import seeded
from fxcompress.context import Context
from fxcompress.errors import InputError, SearchError
from fxcompress.module import TracedModule
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.searching_pruner import BudgetPruner, Ground, Terms, require_dense, shown, told
from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal, Trial, best_of
from fxcompress.search.worker import one_thread
from fxcompress.task import Need, require_count
from fxcompress.training import Training
from fxcompress.water_filling import TOLERANCE


@dataclass(frozen=True)
class _Step:
    """What came of one step: all that the loop knows, so that it goes the same way where steps are not taken again.

    Attributes:
        trials: those of the step.
        left: what is left after it, as fractions of the dense model; a latency is measured.
        factors: what is left as a multiple of what the prices say.
        winner: the trial that was taken.
        end: why no step follows; empty where one does.
    """

    trials: tuple[Trial, ...]
    left: Mapping[str, float]
    factors: Mapping[str, float]
    winner: Trial | None = None
    end: Literal["", "met", "interrupted", "stuck"] = ""


@dataclass(frozen=True)
class NetAdaptPruner(BudgetPruner):
    """Takes from one group per step, the one without which the model scores best, until the budget is met.

    Yang et al. 2018, arXiv 1804.03230, algorithm 1. In step i the model may cost ``step * step_decay^i`` of the dense
    model less than it does; with a budget of several figures, of the one that is furthest from its budget. For each
    group, just as many of its lowest units go as that takes; each of these candidates is trained for ``epochs`` and
    scored, and the best is kept, weights included. Candidates that end below the budget share their step with a second
    group where that uses more of it. What a step costs is priced on the graph (or measured, for a latency); every step
    is noted with it.

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

    def expected(self, groups: int) -> int:
        """About as many steps as the budget takes, each with a trial for every group."""
        cost = max(1 - ratio for ratio in self.budget.ratios.values())
        steps, size = 0, self.step
        while cost > 0 and steps < 1000:
            steps, cost, size = steps + 1, cost - size, size * self.step_decay
        return 1 + steps * groups

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Step until the budget is met."""
        terms = self.terms(module, context)
        with self.begin(context, terms, self.expected(int(terms.free.sum()))) as search:
            steps = [context.step(module, partial(self._begin, module, context, terms, search))]
            while not steps[-1].end:
                search.trials = [trial for step in steps for trial in step.trials]
                steps.append(context.step(module, partial(self._step, module, context, terms, search, steps)))
            search.trials = [trial for step in steps for trial in step.trials]
            taken = context.step(module, partial(self._end, module, context, terms, steps))
            winners = [step.winner for step in steps if step.winner is not None]
            last = winners[-1].number if winners else 0
            history = search.history(
                best=last if steps[-1].end == "met" else None,
                groups=tuple(group.name for group in terms.allowance.prices.groups),
                widths=tuple(terms.allowance.prices.units.tolist()),
                dense=steps[0].trials[0].score,
                budget=dict(self.budget.ratios),
                taken=taken,
            )
        history = replace(history, interrupted=steps[-1].end == "interrupted")
        context.notes += told(history)
        context.searches.append(history)
        return module

    # ---- steps -------------------------------------------------------------------------------------------------

    def _begin(self, module: TracedModule, context: Context, terms: Terms, search: Search) -> _Step:
        """Score the model as it came."""
        ground = self.ground(module, context, terms)
        ground.fill(np.ones(len(ground.free)))  # raises where the budget cannot be met
        search.about(ground.subject)
        trials = tuple(require_dense(search, search.evaluate(ground.proposals(ground.most[None]))))
        left = ground.cost(ground.most[None])[0]
        met = terms.allowance.allows(left)
        end: Literal["met", "interrupted", ""] = "interrupted" if search.interrupted else "met" if met else ""
        return _Step(trials, left, dict.fromkeys(self.budget.ratios, 1.0), end=end)

    def _step(
        self, module: TracedModule, context: Context, terms: Terms, search: Search, steps: Sequence[_Step]
    ) -> _Step:
        """Try to take a little from every group, and take it from the best."""
        before, number = steps[-1], len(steps)
        ground = self.ground(module, context, terms)
        ground = ground.within(terms.allowance.corrected(before.factors))
        name, allowed = self._allowed(before.left, self.step * self.step_decay ** (number - 1))
        search.about(partial(ground.subject, self.epochs))
        candidates = self._candidates(ground, name, allowed)
        trials = tuple(search.evaluate(candidates))
        if search.interrupted:
            return replace(before, trials=trials, winner=None, end="interrupted")
        winner = best_of(trials)
        if winner is None:
            raise SearchError(f"{self.name}: all {len(trials)} trials of a step failed; the first: {trials[0].error}.")
        live = ground.masking.live(ground.ranking.groups.channels)
        self._take(winner, ground, context, search)
        assert context.masking is not None
        now = context.masking.live(ground.ranking.groups.channels)
        left = terms.allowance.left(now)
        priced = winner.proposal.cost
        factors = {each: before.factors[each] * left[each] / priced[each] for each in left}
        changes = ", ".join(
            f"{ground.names[group]} from {ground.most[group]} to {kept} units"
            for group, kept in enumerate(winner.proposal.kept)
            if kept != ground.most[group]
        )
        context.notes.append(
            f"step {number}: {left[name]:.2%} of the {name} ({allowed:.2%} allowed), {changes}, "
            f"score {winner.score:.6g}"
        )
        end: Literal["", "met", "stuck"] = "stuck" if (now == live).all() else ""
        return _Step(trials, left, factors, winner, "met" if terms.allowance.allows(left) else end)

    def _allowed(self, left: Mapping[str, float], size: float) -> tuple[str, float]:
        """The figure that is furthest from its budget, and what the step may leave of it."""
        ratios = self.budget.ratios
        name = max(ratios, key=lambda each: left[each] / ratios[each])
        return name, max(ratios[name], left[name] - size)

    def _take(self, winner: Trial, ground: Ground, context: Context, search: Search) -> None:
        """Mask what the winner does not keep, and train once more as it was trained."""
        ground.mask_as_asked(winner.proposal.kept)
        if not self.epochs:
            return
        task = context.required_task(self.needs, self.name)
        with context.laid(ground.module, self.name), one_thread(), seeded(*search.seeds, winner.number):
            task.train(ground.module, Training(epochs=self.epochs, title=self.name))

    def _end(self, module: TracedModule, context: Context, terms: Terms, steps: Sequence[_Step]) -> Proposal:
        """See that the budget is met, in the proportions so far where the steps have not."""
        ground = self.ground(module, context, terms)
        met = steps[-1].end == "met"
        taken = ground.mask((ground.most if met else ground.fill(ground.shares(ground.most))).tolist())
        if not met or (taken.kept != tuple(ground.most.tolist())):
            context.notes.append(f"the rest goes in the proportions so far: {shown(taken, ground)}")
        return taken

    # ---- candidates --------------------------------------------------------------------------------------------

    def _candidates(self, ground: Ground, name: str, allowed: float) -> list[Proposal]:
        """For every group that can pay for the step alone the most that it may keep; if none can, all they can pay.

        Args:
            ground: as it is now.
            name: of the figure that the step is about.
            allowed: what the step may leave of it, as a fraction of the dense model.
        """
        enough, least = [], []
        wanted = {name: allowed}  # a latency may be above that of the dense model
        for group in np.flatnonzero(ground.free).tolist():
            kept = self._narrowed(ground, ground.most, group)
            if not len(kept):
                continue
            least.append(kept[-1])
            first = self._first(ground, kept, wanted)
            if first is not None:
                enough.append(self._completed(ground, kept[: first + 1], group))
        if not least:
            raise InputError(f"the budget allows {self.budget}, and no group can lose any more; expected a larger one.")
        return ground.proposals(np.stack(enough or least))

    def _completed(self, ground: Ground, kept: IntArray, group: int) -> IntArray:
        """A candidate; where it is a last one and leaves some of the budget, it may share the step with another group.

        Args:
            ground: as it is now.
            kept: with ever fewer units of the group, the candidate last: (allocations, groups).
            group: the candidate's.
        """
        best: IntArray = kept[-1]
        use = float(self._use(ground, best[None], ground.budget.ratios)[0])
        if use > 1:
            return best
        others = [other for other in np.flatnonzero(ground.free).tolist() if other != group]
        for start, other in itertools.product(kept[-2::-1], others):
            if use >= 1 - TOLERANCE:
                break
            narrower = self._narrowed(ground, start, other)
            first = self._first(ground, narrower, ground.budget.ratios)
            if first is None:
                continue
            found = float(self._use(ground, narrower[first][None], ground.budget.ratios)[0])
            if found > use:
                use, best = found, narrower[first]
        return best

    def _narrowed(self, ground: Ground, start: IntArray, group: int) -> IntArray:
        """An allocation, (groups,), with ever fewer units of one group: (allocations, groups)."""
        numbers = np.arange(start[group] - 1, ground.least[group] - 1, -1)
        numbers = numbers[numbers * ground.prices.sizes[group] % ground.round_to == 0]
        kept: IntArray = np.tile(start, (len(numbers), 1))
        kept[:, group] = numbers
        return kept

    def _first(self, ground: Ground, kept: IntArray, ratios: Mapping[str, float]) -> int | None:
        """The first of some allocations, (allocations, groups), that costs at most these fractions of the dense one."""
        fits = self._use(ground, kept, ratios) <= 1 + 1e-12 if len(kept) else np.zeros(0, dtype=bool)
        return int(np.argmax(fits)) if fits.any() else None

    def _use(self, ground: Ground, kept: IntArray, ratios: Mapping[str, float]) -> FloatArray:
        """What allocations, (allocations, groups), use of the scarcest of some figures: (allocations,)."""
        figures = ground.prices.of(kept)
        used: FloatArray = np.max([figures[n] / (ratio * ground.dense[n]) for n, ratio in ratios.items()], 0)
        return used
