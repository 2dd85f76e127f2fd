"""Widths in proportion to what each group's sensitivity allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.searching_pruner import Ground, SearchingPruner, require_dense
from fxcompress.search.history import SearchHistory
from fxcompress.search.search import Search
from fxcompress.search.sweep import Curve, sweep
from fxcompress.search.trial import Proposal
from fxcompress.task import Need, require_count

_SPARSITIES = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9
#: Of the share of a group that may lose nothing, where all others together may not lose enough.
_LEAST = 0.01


@dataclass(frozen=True)
class SensitivityPruner(SearchingPruner):
    """Measures every group's sensitivity, and prunes each in proportion to what its curve allows.

    In each of ``rounds`` rounds the score is measured against the sparsity of each group (Li et al. 2017, arXiv
    1608.08710, section 3.2; of coupled layers together). What a group may lose before the score has fallen by ``drop``
    is its share; shares are scaled to the budget of the round, ``budget^(round / rounds)``, and the model is trained
    for ``epochs``.

    Args:
        budget: what may be left, as fractions of the caller's dense model.
        inner: in which order channels go, and which layers are taken.
        drop: how far the score may fall, as a fraction of the score at the start of the round.
        rounds: how many.
        epochs: of training after each round; 0 for none.

    Needs the task's score; its batches, loss and optimizer too if it trains.
    """

    drop: float = 0.05
    rounds: int = 1
    epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.drop, bool) or not isinstance(self.drop, (int, float)) or not self.drop > 0:
            raise InputError(f"drop is {self.drop!r}; expected a fraction of the score, above 0.")
        require_count("rounds", self.rounds)
        require_count("epochs", self.epochs, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, what the inner pruner needs, and what training needs."""
        return tuple(dict.fromkeys((*super().needs, *(TRAINING if self.epochs else ()))))

    def expected(self, ground: Ground) -> int:
        """The model as it is, and every sparsity of every group."""
        return 1 + len(_SPARSITIES) * int(ground.free.sum())

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Measure, prune and train, round by round."""
        terms = self.terms(module, context)
        for number in range(1, self.rounds + 1):
            if self.search(module, context, terms, number, self.rounds).interrupted:
                break
            if self.epochs:
                with context.laid(module, self.name):
                    context.train(module, epochs=self.epochs, title=f"{self.name}, round {number} of {self.rounds}")
        return module

    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """Measure the curves, scale what they allow, and try that."""
        first, *_ = require_dense(search, search.evaluate(ground.proposals(ground.most[None])))
        dense = first.score or 0.0
        limit = dense - self.drop * abs(dense)
        free = np.flatnonzero(ground.free).tolist()

        def propose(item: int, sparsity: float) -> Proposal | None:
            group = free[item]
            kept = ground.most.copy()
            wanted = ground.prices.units[group] - int(ground.prices.units[group] * sparsity)
            kept[group] = max(ground.least[group], min(kept[group], wanted))
            return ground.proposals(kept[None], group=group, sparsity=sparsity)[0]

        points = sweep(search, len(free), _SPARSITIES, propose, lambda score: score >= limit)
        shares = np.zeros(len(ground.free))
        for group, found in zip(free, points, strict=True):
            curve = Curve(ground.names[group], "sparsity", (), int(ground.prices.units[group]), tuple(found))
            shares[group] = max(curve.allowed(dense, self.drop), _LEAST)
        ground.context.notes.append(
            f"a drop of {self.drop:.1%} allows "
            + ", ".join(f"{ground.names[group]} {shares[group]:.2f}" for group in free)
        )
        (proposal,) = ground.proposals(ground.fill(shares)[None])
        if search.interrupted:
            return ground.history(search, dense=dense, taken=proposal)
        search.evaluate([proposal])
        return ground.history(search, dense=dense, best=search.trials[-1].number, taken=proposal)
