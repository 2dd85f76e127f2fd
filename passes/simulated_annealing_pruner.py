"""Widths found by simulated annealing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.labels import FloatArray, IntArray
from fxcompress.errors import InputError
from fxcompress.passes.searching_pruner import Ground, SearchingPruner, require_dense
from fxcompress.search.history import SearchHistory
from fxcompress.search.relative import scale_of
from fxcompress.search.search import Search
from fxcompress.task import require_count


@dataclass(frozen=True)
class SimulatedAnnealingPruner(SearchingPruner):
    """Perturbs the sparsities of all groups, and takes worse ones with a probability that falls with the temperature.

    The search of AutoCompress, Liu et al. 2020, arXiv 1907.03141, section 4.2. At temperature T = ``start``,
    ``start * cooling``, .. while it is above ``stop``, sparsities s become s + U(-m, m) with m = ``perturbation`` *
    T / ``start``, scaled so that the budget is met (water-filling). A candidate whose score is lower than the current
    one's by dE, as a fraction of the dense score, is accepted with probability exp(-dE / T). The best one is masked.
    (Where the dense score is next to nothing, dE is a fraction of how much lower that of the uniform allocation is.)

    The candidates of a temperature are perturbations of the same sparsities, and accepted or not in their order.

    Args:
        budget: what may be left, as fractions of the caller's dense model.
        inner: in which order channels go, and which layers are taken.
        start: the first temperature.
        stop: no temperature is this low.
        cooling: each temperature as a fraction of the one before.
        perturbation: the largest change of a sparsity at the first temperature.
        trials_per_temperature: how many candidates each temperature tries.
    """

    start: float = 1.0
    stop: float = 0.02
    cooling: float = 0.9
    perturbation: float = 0.35
    trials_per_temperature: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("start", 0.0, math.inf), ("stop", 0.0, self.start), ("cooling", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                raise InputError(f"{name} is {value!r}; expected a number above {low:g} and below {high:g}.")
        given = self.perturbation
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= 1:
            raise InputError(f"perturbation is {self.perturbation!r}; expected a change of sparsities in (0, 1].")
        require_count("trials_per_temperature", self.trials_per_temperature)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """From ``start`` down, above ``stop``."""
        count = math.ceil(math.log(self.stop / self.start) / math.log(self.cooling) - 1e-9)
        return tuple(self.start * self.cooling**power for power in range(count))

    def expected(self, ground: Ground) -> int:
        """The dense model, the uniform allocation, and the candidates of every temperature."""
        return 2 + len(self.temperatures) * self.trials_per_temperature

    def perturbed(
        self, sparsities: FloatArray, temperature: float, count: int, ground: Ground, rng: np.random.Generator
    ) -> IntArray:
        """Candidates near some sparsities, (groups,), that meet the budget: kept units, (count, groups)."""
        largest = self.perturbation * temperature / self.start
        moved = sparsities + rng.uniform(-largest, largest, (count, len(sparsities)))
        return ground.fill(np.clip(moved, 0.0, 1.0))

    def look(self, ground: Ground, search: Search) -> SearchHistory:
        """Anneal from the uniform allocation."""
        units = ground.prices.units
        uniform = ground.fill(np.ones(len(units)))
        dense, *begun = require_dense(search, search.evaluate(ground.proposals(np.stack([ground.most, uniform]))))
        assert dense.score is not None
        current = begun[0] if begun and begun[0].done else dense
        scale = scale_of(dense.score, [trial.score for trial in begun])
        for number, temperature in enumerate(self.temperatures):
            if search.interrupted:
                break
            rng = np.random.default_rng([*search.seeds, number])
            sparsities = 1 - np.array(current.proposal.kept) / units
            kept = self.perturbed(sparsities, temperature, self.trials_per_temperature, ground, rng)
            draws = rng.random(len(kept)).tolist()
            worse = accepted = 0
            for trial, draw in zip(
                search.evaluate(ground.proposals(kept, temperature=temperature)), draws, strict=False
            ):
                if trial.score is None or current.score is None:
                    continue
                drop = (current.score - trial.score) / scale
                worse += drop > 0
                if drop <= 0 or draw < math.exp(-drop / temperature):
                    accepted += drop > 0
                    current = trial
            ground.context.notes.append(
                f"temperature {temperature:.4g}: {accepted} of {worse} worse candidates accepted, at score "
                f"{current.score:.6g}"
            )
        best = search.best(ground.meets)
        return ground.history(search, best=best.number, dense=dense.score)
