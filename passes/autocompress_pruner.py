"""AutoCompress: annealing finds the widths, ADMM trains towards them, round by round; then all that goes is removed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from fxcompress.budget import Budget
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule
from fxcompress.passes.admm_pruner import ADMMPruner
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.scoring import Layer
from fxcompress.passes.searching_pruner import Terms, shown
from fxcompress.passes.simulated_annealing_pruner import SimulatedAnnealingPruner
from fxcompress.passes.speedup import Speedup
from fxcompress.pipeline import Pass, run_pass
from fxcompress.prices import Prices
from fxcompress.ranking import Ranking
from fxcompress.search.widths import masking_of
from fxcompress.select import Selectors
from fxcompress.task import Need, require_count


@dataclass(frozen=True)
class _AllocatedPruner(ChannelPruner):
    """Keeps the channels of every group that hold most of the squared norm of what produces them, so many of each."""

    kept: tuple[int, ...] = ()
    prices: Prices | None = field(default=None, repr=False)

    idempotent: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """That of the pass that it works for."""
        return AutoCompressPruner.__name__

    def score(self, layer: Layer) -> Tensor:
        """Squared norms: (channels,)."""
        return layer.weight.double().flatten(1).square().sum(1)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Mask all others."""
        assert self.prices is not None
        groups = context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        items = list(self.prices.groups)
        scores = self.scores(items, module, groups, masking, context)
        aligned = self.granularity == "head_dim"
        ranking = Ranking.of(module, groups, masking, items, scores, aligned=aligned)
        context.masking = masking_of(self.kept, ranking, masking)
        return module


@dataclass(frozen=True)
class AutoCompressPruner(Pass):
    """Rounds of annealing and ADMM, each of which leaves a little less; then what they left out is removed.

    Liu et al. 2020, "AutoCompress", arXiv 1907.03141, section 4. Round r of n has the budget ``budget^(r / n)``:
    simulated annealing finds how many channels each group keeps, ADMM trains the weights towards that, and what it made
    zero is masked, so that the next round searches and trains what is left. Channels are removed once, after the last
    round: a masked model computes the same, and loses none of the freedom that groups of a convolution have while all
    their channels are there. Any layer type.

    Args:
        budget: what may be left in the end, as fractions of the caller's dense model.
        rounds: n.
        annealing: finds the widths; its budget is replaced. Its inner pruner says which layers are taken.
        admm: trains; what it projects on is what annealing found.
        include: name patterns, module types or predicates that choose layers, instead of those of annealing.
        exclude: layers to leave alone, instead of those of annealing; a group with one of them stays whole.

    Needs the task's score, batches, loss and optimizer. Follow with ``FineTune``.
    """

    budget: Budget
    rounds: int = 3
    annealing: SimulatedAnnealingPruner | None = None
    admm: ADMMPruner = field(default_factory=partial(ADMMPruner, 0.5, rho=1e-2, iterations=3, epochs=1))
    include: Selectors | None = field(default=None, kw_only=True)
    exclude: Selectors | None = field(default=None, kw_only=True)

    needs_inputs: ClassVar[bool] = True
    lifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("rounds", self.rounds)
        if self.annealing is not None and not isinstance(self.annealing, SimulatedAnnealingPruner):
            raise InputError(f"annealing is {self.annealing!r}; expected a SimulatedAnnealingPruner.")
        if not isinstance(self.admm, ADMMPruner):
            raise InputError(f"admm is {self.admm!r}; expected an ADMMPruner.")
        self.searching  # noqa: B018 - raises where the budget is none

    @property
    def searching(self) -> SimulatedAnnealingPruner:
        """The annealing, with the final budget."""
        annealing = SimulatedAnnealingPruner(self.budget) if self.annealing is None else self.annealing
        given = {name: getattr(self, name) for name in ("include", "exclude")}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(annealing, budget=self.budget, **chosen)

    @property
    def needs(self) -> tuple[Need, ...]:
        """A score, and what training and the pruner inside annealing need."""
        return tuple(dict.fromkeys((*self.searching.needs, *TRAINING)))

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Search and train round by round, then remove."""
        searching = self.searching
        terms = searching.terms(module, context)
        for number in range(1, self.rounds + 1):
            history = searching.search(module, context, terms, number, self.rounds, masks=False)
            assert history.taken is not None
            kept = history.taken.kept
            if history.interrupted:
                context.step(module, partial(self._mask, module, context, terms, kept))
                break
            self._trained(terms, kept).run(module, context)
        context.step(module, partial(self._end, module, context, terms))
        return module

    def _trained(self, terms: Terms, kept: tuple[int, ...]) -> ADMMPruner:
        """ADMM that projects on an allocation."""
        inner = self.searching.inner
        prices = terms.allowance.prices
        projection = _AllocatedPruner(
            0.5, reduce=inner.reduce, granularity=inner.granularity, kept=kept, prices=prices
        )  # fmt: skip
        return replace(
            self.admm, sparsity=None, include=None, exclude=None, scope="layer", granularity="element", inner=projection
        )  # fmt: skip

    def _mask(self, module: TracedModule, context: Context, terms: Terms, kept: tuple[int, ...]) -> None:
        """Mask what an allocation does not keep, without training: somebody interrupted."""
        self.searching.ground(module, context, terms).mask(kept)

    def _end(self, module: TracedModule, context: Context, terms: Terms) -> None:
        """See that the budget is met, and remove what is masked; verified like any removal."""
        ground = self.searching.ground(module, context, terms)
        taken = ground.mask(ground.most.tolist())
        if taken.kept != tuple(ground.most.tolist()):
            context.notes.append(f"corrected for what is left: {shown(taken, ground)}")
        run_pass(Speedup(), module, context, lays=False)
