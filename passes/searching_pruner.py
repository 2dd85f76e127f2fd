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
from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.context import Context
from fxcompress.errors import InputError, SearchError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.passes.allowance import Allowance
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.l1_filter_pruner import L1FilterPruner
from fxcompress.pipeline import Pass
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
class Ground:
    """What a search for widths stands on: the groups, in which order their units go, and what they cost.

    Attributes:
        module: the clean module.
        context: of the run.
        masking: what was masked before.
        allowance: the budget, and the prices of allocations.
        ranking: the units of each of the prices' groups.
        free: (groups,): whether a group may lose units.
        round_to: kept channels are a multiple of it.
    """

    module: TracedModule
    context: Context
    masking: Masking
    allowance: Allowance
    ranking: Ranking
    free: Any
    round_to: int

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

    def fill(self, sparsities: FloatArray, budget: Budget | None = None) -> IntArray:
        """Allocations (.., groups) that meet the budget, by sparsities of the same shape."""
        shares = np.where(self.free, sparsities, 0.0)
        return self.prices.fill(
            shares, budget or self.budget, self.round_to, least=self.least, most=self.most, dense=self.dense
        )

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

    def mask(self, kept: Sequence[int]) -> None:
        """Mask what an allocation does not keep, within the budget.

        Channels may come back (coupled rows that must stay equal, nodes that cannot be rewritten), and a latency is a
        prediction: what is left is priced, or measured, and the allocation corrected until the budget is met.

        Raises:
            InputError: it cannot be.
        """
        _, found = self.allowance.met(self.ranking, partial(self._counts, np.array(kept, dtype=np.int64)))
        self.context.masking = self.masking.with_live(self.ranking.groups.channels, found.live)

    def mask_as_asked(self, kept: Sequence[int]) -> None:
        """Mask what an allocation does not keep, whatever comes back."""
        self.context.masking = masking_of(kept, self.ranking, self.masking)

    def _counts(self, kept: IntArray, corrected: Allowance) -> list[int]:
        """How many units go: those that an allocation does not keep, or more (fewer) in these proportions."""
        if corrected.dense != self.allowance.dense:
            shares = np.where(self.free, np.maximum(1 - kept / self.prices.units, LEAST), 0.0)
            limits = {"least": self.least, "most": self.most}
            kept = self.prices.fill(shares, self.budget, self.round_to, **limits, dense=corrected.dense)
        return [units.number - int(count) for units, count in zip(self.ranking.tables, kept, strict=True)]

    def history(self, search: Search, **known: Any) -> SearchHistory:
        """What was tried, with the groups by name."""
        return search.history(
            groups=self.names, widths=tuple(self.prices.units.tolist()), budget=dict(self.budget.ratios), **known
        )


@dataclass(frozen=True)
class SearchingPruner(Pass):
    """Finds how many channels each group keeps, so that the model meets a budget and scores best.

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

    def ground(self, module: TracedModule, context: Context, budget: Budget | None = None) -> Ground:
        """Analyse, rank and price a module whose masks are lifted.

        Raises:
            InputError: there is nothing to prune.
        """
        assert context.inputs is not None
        inner, groups = self.criterion, context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        allowance = Allowance.of(budget or self.budget, module, groups, context, inner.round_to)
        prices = allowance.prices
        shares = {item.name: share for item, share in inner._choose(groups, module, context)}
        taken = [group for group in groups if shares.get(group.name, 0) > 0]
        free = {part.name for part, _ in prices.parts(taken)}
        if not free:
            raise InputError(f"{self.name} has no group to prune; expected at least one that {inner!r} takes.")
        items = list(prices.groups)
        scores = inner.scores(items, module, groups, masking, context)
        aligned = inner.granularity == "head_dim"
        return Ground(
            module,
            context,
            masking,
            allowance,
            Ranking.of(module, groups, masking, items, scores, aligned=aligned),
            np.array([item.name in free for item in items]),
            inner.round_to,
        )

    def begin(self, ground: Ground, total: int, label: str = "") -> Search:
        """A search over allocations."""
        context = ground.context
        parts = self, ground.names, ground.budget
        search = context.search(self.name, total, *parts, label=label, within=ground.meets)
        search.about(ground.subject)
        return search

    @abstractmethod
    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """Try allocations, and say which is taken (:attr:`SearchHistory.best`)."""

    def expected(self, ground: Ground) -> int:
        """How many trials are expected."""
        raise NotImplementedError

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Search, then mask what the best allocation does not keep."""
        self.search(module, context)
        return module

    def search(
        self,
        module: TracedModule,
        context: Context,
        budget: Budget | None = None,
        label: str = "",
        *,
        masks: bool = True,
    ) -> SearchHistory:
        """Search, mask what the best allocation does not keep, and say what was tried.

        Args:
            module: its masks are lifted.
            context: of the run.
            budget: another than the pass's own.
            label: tells the search from others of the same run.
            masks: whether to mask; without, the masks are left as they were.
        """
        history = context.step(module, partial(self._searched, module, context, budget, label, masks))
        context.searches.append(history)
        return history

    def _searched(
        self, module: TracedModule, context: Context, budget: Budget | None, label: str, masks: bool
    ) -> SearchHistory:
        ground = self.ground(module, context, budget)
        with self.begin(ground, self.expected(ground), label) as search:
            history = self.look(ground, search)
        taken, chosen = history.taken, history.chosen
        if taken is None:
            assert chosen is not None
            taken = chosen.proposal
        if masks:
            ground.mask(taken.kept)
        context.notes += [*told(history), outcome(taken, chosen, ground)]
        return replace(history, taken=taken)


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
    cost = ", ".join(f"{taken.cost[name]:.2%} of the {name}" for name in ground.budget.ratios)
    if chosen is None or chosen.score is None:
        return f"taken without a score: {cost}"
    return f"trial {chosen.number} is taken: score {chosen.score:.6g}, {cost}"
