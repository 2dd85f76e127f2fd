"""Pruning to a budget by trying: what all searches for widths share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from fxcompress.budget import Budget
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.context import Context
from fxcompress.errors import InputError, SearchError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.passes.allowance import Allowance
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.l1_filter_pruner import L1FilterPruner
from fxcompress.pipeline import Pass
from fxcompress.plan import Settled
from fxcompress.prices import Prices
from fxcompress.ranking import Ranking
from fxcompress.search.history import SearchHistory
from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal, Trial
from fxcompress.search.widths import WidthSubject, masking_of
from fxcompress.select import Selectors
from fxcompress.task import Need

#: The share of a group that lost nothing, where all others together cannot lose enough.
LEAST = 1e-6


@dataclass(frozen=True)
class Terms:
    """What does not change while a pass searches, however often it masks and trains.

    Attributes:
        allowance: the budget, and the prices of allocations: a latency has one table, and one dense model.
        free: (groups,): whether a group may lose units.
    """

    allowance: Allowance
    free: BoolArray

    def within(self, budget: Budget) -> Terms:
        """The same for another budget of the same figures."""
        return replace(self, allowance=self.allowance.within(budget))


@dataclass(frozen=True)
class Ground:
    """What a search for widths stands on: the groups, in which order their units go, and what they cost.

    Attributes:
        module: the clean module.
        context: of the run.
        masking: what was masked before.
        terms: the budget, the prices, and which groups may lose units.
        ranking: the units of each of the prices' groups.
        round_to: kept channels are a multiple of it.
    """

    module: TracedModule
    context: Context
    masking: Masking
    terms: Terms
    ranking: Ranking
    round_to: int

    @property
    def allowance(self) -> Allowance:
        """The budget, and the prices of allocations."""
        return self.terms.allowance

    @property
    def free(self) -> BoolArray:
        """(groups,): whether a group may lose units."""
        return self.terms.free

    @property
    def prices(self) -> Prices:
        """What allocations cost."""
        return self.allowance.prices

    @property
    def dense(self) -> Mapping[str, float]:
        """What the budget is a fraction of, by figure."""
        return self.allowance.dense

    @property
    def budget(self) -> Budget:
        """What has to be met."""
        return self.allowance.budget

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, as proposals list them."""
        return tuple(group.name for group in self.prices.groups)

    @property
    def most(self) -> IntArray:
        """(groups,): the most units that each group keeps: those that are not masked already."""
        return np.array([units.number - units.gone for units in self.ranking.tables], dtype=np.int64)

    @property
    def least(self) -> IntArray:
        """(groups,): the fewest units that each group keeps."""
        fewest = np.array([units.number - len(units.scores) for units in self.ranking.tables], dtype=np.int64)
        found: IntArray = np.where(self.free, fewest, self.most)
        return found

    def within(self, allowance: Allowance) -> Ground:
        """The same for another allowance."""
        return replace(self, terms=replace(self.terms, allowance=allowance))

    def fill(self, sparsities: FloatArray) -> IntArray:
        """Allocations (.., groups) that meet the budget, by sparsities of the same shape."""
        shares = np.where(self.free, sparsities, 0.0)
        limits = {"least": self.least, "most": self.most}
        return self.prices.fill(shares, self.budget, self.round_to, **limits, dense=self.dense)

    def shares(self, kept: IntArray) -> FloatArray:
        """Sparsities in the proportions of an allocation, (groups,), to be scaled by :meth:`fill`."""
        shares: FloatArray = np.maximum(1 - kept / self.prices.units, LEAST)
        return shares

    def cost(self, kept: IntArray) -> list[dict[str, float]]:
        """What each of some allocations, (allocations, groups), costs as fractions of the dense model."""
        figures = self.prices.of(kept)
        shares = {name: figures[name] / self.dense[name] for name in figures}
        return [{name: float(share[i]) for name, share in shares.items()} for i in range(len(kept))]

    def proposals(self, kept: IntArray, **notes: float) -> list[Proposal]:
        """Allocations, (allocations, groups), as proposals."""
        lists = zip(kept.tolist(), self.cost(kept), strict=True)
        return [Proposal(tuple(numbers), cost=cost, notes=notes) for numbers, cost in lists]

    def meets(self, trial: Trial) -> bool:
        """Whether a trial is within the budget."""
        return trial.proposal.within(self.budget.ratios)

    def subject(self, epochs: int = 0) -> WidthSubject:
        """What trials are about: a copy of the module."""
        context = self.context
        assert context.task is not None
        assert context.inputs is not None
        tables, groups = self.ranking.tables, self.ranking.groups
        module = copy.deepcopy(self.module)
        return WidthSubject(module, context.inputs, context.task, self.masking, tables, epochs, groups)

    def met(self, kept: Sequence[int]) -> Proposal:
        """An allocation, corrected until what it leaves is within the budget.

        Channels may come back (coupled rows that must stay equal, nodes that cannot be rewritten), and a latency is a
        prediction: what is left is priced, or measured, and others go (come back) in the proportions of the allocation.

        Raises:
            InputError: it cannot be.
        """
        return self._met(kept)[0]

    def mask(self, kept: Sequence[int]) -> Proposal:
        """Mask what an allocation does not keep, corrected as by :meth:`met`; returns what is kept."""
        proposal, found = self._met(kept)
        self.context.masking = self.masking.with_live(self.ranking.groups.channels, found.live)
        return proposal

    def mask_as_asked(self, kept: Sequence[int]) -> None:
        """Mask what an allocation does not keep, whatever comes back."""
        self.context.masking = masking_of(kept, self.ranking, self.masking)

    def _met(self, kept: Sequence[int]) -> tuple[Proposal, Settled]:
        asked = np.array(kept, dtype=np.int64)
        gone, found = self.allowance.met(self.ranking, partial(self._counts, asked))
        (proposal,) = self.proposals((self.prices.units - np.array(gone, dtype=np.int64))[None])
        return proposal, found

    def _counts(self, kept: IntArray, corrected: Allowance) -> list[int]:
        """How many units go: those that an allocation does not keep, or more (fewer) in these proportions."""
        if corrected.dense != self.dense:
            kept = self.within(corrected).fill(self.shares(kept))
        return [int(units) for units in self.prices.units - kept]

    def history(self, search: Search, **known: Any) -> SearchHistory:
        """What was tried, with the groups by name."""
        return search.history(
            groups=self.names, widths=tuple(self.prices.units.tolist()), budget=dict(self.budget.ratios), **known
        )


@dataclass(frozen=True)
class BudgetPruner(Pass):
    """Prunes groups, in the order that another pruner says, until a budget is met, and asks the task for scores.

    Args:
        budget: what may be left, as fractions of the caller's dense model.
        inner: says in which order the channels of a group go, which layers are taken, and what kept widths are rounded
            to; how many go is what is searched. Groups to which it gives a sparsity of 0 stay whole.
        include: name patterns, module types or predicates that choose layers, instead of those of the inner pruner.
        exclude: layers to leave alone, instead of those of the inner pruner; a group with one of them stays whole.

    Needs the task's score, and what the inner pruner needs. Masks that were there stay.
    """

    budget: Budget
    inner: ChannelPruner = field(default_factory=partial(L1FilterPruner, 0.5))
    include: Selectors | None = field(default=None, kw_only=True)
    exclude: Selectors | None = field(default=None, kw_only=True)

    needs_inputs: ClassVar[bool] = True
    lifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise InputError(
                f"budget is {self.budget!r}, a {type(self.budget).__name__}; expected a Budget, such as "
                "fxcompress.Budget(macs=0.5)."
            )
        if not isinstance(self.inner, ChannelPruner):
            raise InputError(f"inner is {self.inner!r}; expected a channel pruner, such as L1FilterPruner(0.5).")
        if self.inner.granularity == "head":
            raise InputError(f"inner is {self.inner!r}; searches count channels, not heads: expected 'head_dim'.")
        for name in ("include", "exclude"):
            if getattr(self, name) is not None and getattr(self.inner, name) is not None:
                raise InputError(f"{name} is given, and inner is {self.inner!r}; expected it in one of the two places.")
        self.criterion  # noqa: B018 - raises where a selector is none

    @property
    def criterion(self) -> ChannelPruner:
        """The inner pruner, with the layers that this one was told to take."""
        given = {name: getattr(self, name) for name in ("include", "exclude")}
        return replace(self.inner, **{name: value for name, value in given.items() if value is not None})

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, and what the inner pruner needs."""
        return tuple(dict.fromkeys(("score", *self.inner.needs)))

    def terms(self, module: TracedModule, context: Context) -> Terms:
        """Analyse and price a module whose masks are lifted; a latency table is measured in a step of the run.

        Raises:
            InputError: there is nothing to prune.
        """
        inner, groups = self.criterion, context.groups(module)
        allowance = Allowance.of(self.budget, module, groups, context, inner.round_to)
        prices = allowance.prices
        shares = {item.name: share for item, share in inner._choose(groups, module, context)}
        taken = [group for group in groups if shares.get(group.name, 0) > 0]
        free = {part.name for part, _ in prices.parts(taken)}
        if not free:
            raise InputError(f"{self.name} has no group to prune; expected at least one that {inner!r} takes.")
        return Terms(allowance, np.array([item.name in free for item in prices.groups]))

    def ground(self, module: TracedModule, context: Context, terms: Terms | None = None) -> Ground:
        """Rank the units of a module whose masks are lifted.

        Args:
            module: as it is now.
            context: of the run.
            terms: those of the pass that is under way; new ones by default.
        """
        terms = self.terms(module, context) if terms is None else terms
        inner, groups = self.criterion, context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        items = list(terms.allowance.prices.groups)
        scores = inner.scores(items, module, groups, masking, context)
        aligned = inner.granularity == "head_dim"
        ranking = Ranking.of(module, groups, masking, items, scores, aligned=aligned)
        return Ground(module, context, masking, terms, ranking, inner.round_to)

    def begin(self, context: Context, terms: Terms, total: int, label: str = "") -> Search:
        """A search over allocations."""
        names = tuple(group.name for group in terms.allowance.prices.groups)
        budget = terms.allowance.budget

        def within(trial: Trial) -> bool:
            return trial.proposal.within(budget.ratios)

        return context.search(self.name, total, self, names, budget, label=label, within=within)


@dataclass(frozen=True)
class SearchingPruner(BudgetPruner):
    """Finds how many channels each group keeps, so that the model meets a budget and scores best.

    See :class:`BudgetPruner` for what it takes and needs. Masks that were there stay.
    """

    @abstractmethod
    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """Try allocations, and say which is taken (:attr:`SearchHistory.best`)."""

    def expected(self, ground: Ground) -> int:
        """How many trials are expected."""
        raise NotImplementedError

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Search, then mask what the best allocation does not keep."""
        self.search(module, context, self.terms(module, context))
        return module

    def search(
        self,
        module: TracedModule,
        context: Context,
        terms: Terms,
        number: int = 1,
        rounds: int = 1,
        *,
        masks: bool = True,
    ) -> SearchHistory:
        """Search, mask what the best allocation does not keep, and say what was tried.

        A round before the last one has a part of the budget, ``budget^(number / rounds)``. If somebody interrupts it,
        what it has found is scaled to the whole budget, and no further round is to follow.

        Args:
            module: its masks are lifted.
            context: of the run.
            terms: of the run, with the whole budget.
            number: of the round, from 1.
            rounds: how many there are.
            masks: whether to mask; without, the masks are left as they were.
        """
        history = context.step(module, partial(self._searched, module, context, terms, number, rounds, masks))
        context.searches.append(history)
        return history

    def _searched(
        self, module: TracedModule, context: Context, terms: Terms, number: int, rounds: int, masks: bool
    ) -> SearchHistory:
        whole = self.ground(module, context, terms)
        whole.fill(np.ones(len(whole.free)))  # raises where even the last round could not meet its budget
        part = Budget(**{name: ratio ** (number / rounds) for name, ratio in self.budget.ratios.items()})
        ground = whole.within(whole.allowance.within(part))
        if rounds > 1:
            context.notes.append(f"round {number} of {rounds}: {part}")
        with self.begin(context, ground.terms, self.expected(ground), f".{number}" if rounds > 1 else "") as search:
            search.about(ground.subject)
            history = self._found(ground, search, number)
        taken, chosen = history.taken, history.chosen
        if taken is None:
            assert chosen is not None
            taken = chosen.proposal
        if history.interrupted and number < rounds:
            ground, chosen = whole, None
            (taken,) = ground.proposals(ground.fill(ground.shares(np.array(taken.kept)))[None])
        context.notes += [*told(history), outcome(taken, chosen, ground)]
        kept = taken
        if number == rounds or history.interrupted:
            kept = ground.mask(taken.kept) if masks else ground.met(taken.kept)
        elif masks:  # a round before the last one need not meet its budget exactly
            ground.mask_as_asked(taken.kept)
        if kept.candidate != taken.candidate:
            context.notes.append(f"corrected for what is left: {shown(kept, ground)}")
        return replace(history, best=None if chosen is None else chosen.number, taken=kept)

    def _found(self, ground: Ground, search: Search, number: int) -> SearchHistory:
        """What was tried; of a round that was interrupted before it found anything, what the rounds before left."""
        try:
            return self.look(ground, search)
        except KeyboardInterrupt:
            if not search.interrupted or number == 1:
                raise
        (taken,) = ground.proposals(ground.fill(ground.shares(ground.most))[None])
        return ground.history(search, taken=taken)


def require_dense(search: Search, found: list[Trial]) -> list[Trial]:
    """The first trials of a search, of which the very first tried the model as it came.

    Raises:
        SearchError: that one failed.
        KeyboardInterrupt: the search was interrupted before it ended.
    """
    if not found:
        raise KeyboardInterrupt
    if found[0].score is None:
        raise SearchError(
            f"{search.name}: task.score(model) fails on the model as it came ({found[0].error}); expected a score to "
            "compare others with. Call it yourself to see where."
        )
    return found


def told(history: SearchHistory) -> list[str]:
    """What a search met, for the notes."""
    notes = []
    if history.failed:
        notes.append(f"{len(history.failed)} of {len(history.trials)} trials failed; first: {history.failed[0].error}")
    if history.interrupted:
        notes.append(f"interrupted after {len(history.trials)} trials; the best so far is taken")
    return notes


def outcome(taken: Proposal, chosen: Trial | None, ground: Ground) -> str:
    """What was taken, in a line."""
    cost = shown(taken, ground)
    if chosen is None or chosen.score is None:
        return f"taken without a score: {cost}"
    return f"trial {chosen.number} is taken: score {chosen.score:.6g}, {cost}"


def shown(proposal: Proposal, ground: Ground) -> str:
    """What an allocation costs, by what has a budget."""
    return ", ".join(f"{proposal.cost[name]:.2%} of the {name}" for name in ground.budget.ratios)
