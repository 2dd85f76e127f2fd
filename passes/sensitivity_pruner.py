"""Widths in proportion to what each group's sensitivity allows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.searching_pruner import Ground, SearchingPruner, require_dense
from fxcompress.search.history import SearchHistory
from fxcompress.search.relative import scale_of
from fxcompress.search.search import Search
from fxcompress.search.sweep import Curve, sweep
from fxcompress.search.trial import Proposal
from fxcompress.sensitivity import SPARSITIES, Sensitivity
from fxcompress.task import Need, require_count

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
        drop: how far the score may fall, as a fraction of the score at the start of the round. (Where that is next to
            nothing, of how much lower the score of the uniform allocation is.)
        rounds: how many.
        epochs: of training after each round; 0 for none.
        measured: what :func:`fxcompress.sensitivity` found for this model, so that nothing is measured again; for one
            round. Its groups lose the channels with the smallest L1 norms, whatever the inner pruner.

    Needs the task's score; its batches, loss and optimizer too if it trains.
    """

    drop: float = 0.05
    rounds: int = 1
    epochs: int = 0
    measured: Sensitivity | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.drop, bool) or not isinstance(self.drop, (int, float)) or not self.drop > 0:
            raise InputError(f"drop is {self.drop!r}; expected a fraction of the score, above 0.")
        require_count("rounds", self.rounds)
        require_count("epochs", self.epochs, least=0)
        if self.measured is not None and not isinstance(self.measured, Sensitivity):
            raise InputError(f"measured is {self.measured!r}; expected what fxcompress.sensitivity(..) returned.")
        if self.measured is not None and self.rounds > 1:
            raise InputError(
                f"rounds is {self.rounds}, and measured is about the model before the first; expected rounds=1."
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, what the inner pruner needs, and what training needs."""
        return tuple(dict.fromkeys((*super().needs, *(TRAINING if self.epochs else ()))))

    def expected(self, ground: Ground) -> int:
        """The model as it is, the uniform allocation, every sparsity of every group, and what comes of them."""
        return 3 + (len(SPARSITIES) * int(ground.free.sum()) if self.measured is None else 0)

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
        """Measure the curves, unless they are known, scale what they allow, and try that."""
        free = np.flatnonzero(ground.free).tolist()
        uniform = ground.fill(np.ones(len(ground.free)))
        first, *others = require_dense(search, search.evaluate(ground.proposals(np.stack([ground.most, uniform]))))
        dense = first.score or 0.0
        if self.measured is None:
            scale = scale_of(dense, [trial.score for trial in others])
            curves = self._curves(ground, search, free, dense - self.drop * scale)
            allowed = [curve.allowed(dense, self.drop, scale) for curve in curves]
        else:
            allowed = self._known(self.measured, ground, free)
        shares = np.zeros(len(ground.free))
        shares[free] = np.maximum(allowed, _LEAST)
        ground.context.notes.append(
            f"a drop of {self.drop:.1%} allows "
            + ", ".join(f"{ground.names[group]} {shares[group]:.2f}" for group in free)
        )
        (proposal,) = ground.proposals(ground.fill(shares)[None])
        if search.interrupted:
            return ground.history(search, dense=dense, taken=proposal)
        search.evaluate([proposal])
        return ground.history(search, dense=dense, best=search.trials[-1].number, taken=proposal)

    def _curves(self, ground: Ground, search: Search, free: list[int], limit: float) -> tuple[Curve, ...]:
        """The curve of every group that may lose units, each as far as its score is no lower than the limit."""
        groups = [ground.prices.groups[place] for place in free]
        blank = [
            Curve(group.name, "sparsity", group.layers, int(ground.prices.units[place]))
            for group, place in zip(groups, free, strict=True)
        ]

        def propose(item: int, sparsity: float) -> Proposal:
            group = free[item]
            kept = ground.most.copy()
            wanted = ground.prices.units[group] - int(ground.prices.units[group] * sparsity)
            kept[group] = max(ground.least[group], min(kept[group], wanted))
            return ground.proposals(kept[None], group=group, sparsity=sparsity)[0]

        return sweep(search, blank, SPARSITIES, propose, lambda score: score >= limit)

    def _known(self, measured: Sensitivity, ground: Ground, free: list[int]) -> list[float]:
        """What the curves that were measured before allow each group that may lose units; of joined ones the least.

        Raises:
            InputError: a group has no curve.
        """
        curves = {curve.name: curve for curve in measured.groups}
        parts = ground.prices.parts([group for group in ground.ranking.groups if group.removable])
        names_of = {part.name: names for part, names in parts}
        allowed = []
        for place in free:
            name = ground.names[place]
            own = [curves[each] for each in names_of[name] if each in curves]
            if not own:
                raise InputError(
                    f"measured has no curve for {name}; expected the sensitivity of this model (it has "
                    f"{', '.join(curves) or 'none'}). Measure it with the same "
                    "include= and exclude=, or leave measured= out."
                )
            allowed.append(min(curve.allowed(measured.dense, self.drop, measured.scale) for curve in own))
        return allowed
