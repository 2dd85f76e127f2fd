"""AutoCompress: annealing finds the widths, ADMM trains towards them, removal makes room for the next round."""

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
        assert context.inputs is not None
        groups = context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        items = list(Prices(module, groups, context.inputs).groups)
        scores = self.scores(items, module, groups, masking, context)
        aligned = self.granularity == "head_dim"
        ranking = Ranking.of(module, groups, masking, items, scores, aligned=aligned)
        context.masking = masking_of(self.kept, ranking, masking)
        return module


@dataclass(frozen=True)
class AutoCompressPruner(Pass):
    """Rounds of annealing, ADMM and removal, each of which leaves a little less.

    Liu et al. 2020, "AutoCompress", arXiv 1907.03141, section 4. Round r of n has the budget ``budget^(r / n)``:
    simulated annealing finds how many channels each group keeps, ADMM trains the weights towards that, and what it made
    zero is removed, so that the next round searches and trains a smaller model. Any layer type.

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
        return tuple(dict.fromkeys((*self.searching.needs, *TRAINING, *self.searching.inner.needs)))

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Search, train and remove, round by round."""
        inner = self.searching.inner
        for number in range(1, self.rounds + 1):
            budget = Budget(**{name: ratio ** (number / self.rounds) for name, ratio in self.budget.ratios.items()})
            context.notes.append(f"round {number} of {self.rounds}: {budget}")
            history = self.searching.search(module, context, budget, f".{number}", masks=False)
            taken = history.taken
            assert taken is not None
            projection = _AllocatedPruner(0.5, reduce=inner.reduce, granularity=inner.granularity, kept=taken.kept)
            admm = replace(
                self.admm,
                sparsity=None,
                include=None,
                exclude=None,
                scope="layer",
                granularity="element",
                inner=projection,
            )
            admm.run(module, context)
            context.step(module, partial(_remove, module, context))
        return module


def _remove(module: TracedModule, context: Context) -> None:
    """Remove what is masked; verified like any removal."""
    run_pass(Speedup(), module, context, lays=False)
