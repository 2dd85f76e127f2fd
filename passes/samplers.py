"""Optuna's samplers, asked for generations of candidates and told their scores."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fxcompress.channels.labels import FloatArray
from fxcompress.errors import InputError
from fxcompress.search.search import GENERATION, Search
from fxcompress.search.trial import Proposal, Trial

Sampler = Literal["tpe", "cmaes", "nsga2", "random", "grid"]


@dataclass(frozen=True)
class Kind:
    """A sampler.

    Attributes:
        make: from Optuna's samplers and a seed to a sampler.
        several: whether it takes several objectives.
    """

    make: Callable[[Any, int], Any]
    several: bool = True


SAMPLERS: dict[str, Kind] = {
    "tpe": Kind(lambda samplers, seed: samplers.TPESampler(seed=seed)),
    "cmaes": Kind(lambda samplers, seed: samplers.CmaEsSampler(seed=seed), several=False),
    "nsga2": Kind(lambda samplers, seed: samplers.NSGAIISampler(seed=seed, population_size=16)),
    "random": Kind(lambda samplers, seed: samplers.RandomSampler(seed=seed)),
    "grid": Kind(lambda samplers, seed: samplers.RandomSampler(seed=seed), several=False),  # of points in a queue
}


def require_sampler(name: Any) -> None:
    """Raise :class:`InputError` unless this is the name of a sampler that can be made."""
    if name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}; expected one of {', '.join(map(repr, SAMPLERS))}.")
    _optuna()
    if name == "cmaes":
        try:
            import cmaes  # noqa: F401 - Optuna imports it late
        except ImportError as error:
            raise InputError("the 'cmaes' sampler needs the package cmaes; install fxcompress[search].") from error


class Suggestions:
    """A study of Optuna: points in a box come out, values go in. In memory; a journal is what lasts.

    Args:
        sampler: one of :data:`SAMPLERS`.
        names: of the dimensions.
        largest: their upper bound; the lower one is 0.
        trials: how many points will be asked for: a grid has at most as many.
        seeds: of the sampler.
        directions: ``"maximize"`` or ``"minimize"`` for each objective.

    Attributes:
        left: how many points it can still suggest; of a grid those that it has not, else infinity.

    Raises:
        InputError: a grid has more points than there are trials.
    """

    def __init__(
        self,
        sampler: str,
        names: Sequence[str],
        largest: float,
        trials: int,
        seeds: Sequence[int],
        directions: Sequence[str] = ("maximize",),
    ) -> None:
        levels = _grid_levels(trials, len(names), largest) if sampler == "grid" else [0.0, largest]
        seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
        optuna = _optuna()
        grid = dict.fromkeys(names, levels)
        self._fail = optuna.trial.TrialState.FAIL
        self._asked: list[Any] = []
        self._space = {name: optuna.distributions.FloatDistribution(0.0, largest) for name in names}
        made = SAMPLERS[sampler].make(optuna.samplers, seed)
        self._study = optuna.create_study(sampler=made, directions=list(directions))
        self.left = math.inf
        if sampler == "grid":
            points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
            for index in np.random.default_rng(seed).permutation(len(points)).tolist():
                self._study.enqueue_trial(points[index])
            self.left = len(points)

    def ask(self, count: int) -> FloatArray:
        """A generation: (count, dimensions), or what is left of a grid."""
        count = int(min(count, self.left))
        self.left -= count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of samplers that fall back to random ones
            self._asked = [self._study.ask(self._space) for _ in range(count)]
        return np.array([[trial.params[name] for name in self._space] for trial in self._asked])

    def tell(self, values: Sequence[Sequence[float] | None]) -> None:
        """What came of the generation, in its order; None for what failed. What is left out was not tried."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trial, found in zip(self._asked, values, strict=False):
                self._study.tell(trial, **({"state": self._fail} if found is None else {"values": list(found)}))


def tuned(
    search: Search,
    study: Suggestions,
    trials: int,
    propose: Callable[[FloatArray], Sequence[Proposal]],
    values: Callable[[Trial], list[float]],
) -> None:
    """Ask, try, tell, a generation at a time, until there are as many trials, or no points, or somebody interrupts.

    Args:
        search: whose trials these are.
        study: says what to try.
        trials: how many at most.
        propose: candidates for points, (count, dimensions).
        values: what a trial that has a score says of each objective.
    """
    while trials and study.left and not search.interrupted:
        asked = study.ask(min(trials, GENERATION))
        trials -= len(asked)
        found = search.evaluate(propose(asked))
        study.tell([None if trial.score is None else values(trial) for trial in found])


def _grid_levels(count: int, dimensions: int, largest: float) -> list[float]:
    """Equally many levels of each dimension, so that a grid has at most ``count`` points.

    Raises:
        InputError: two levels of each are more.
    """
    levels = math.floor(count ** (1 / max(dimensions, 1)) + 1e-9)  # the root of a power may be a little less
    if levels < 2:
        raise InputError(
            f"trials is {count}; a grid with two levels of each of {dimensions} dimensions has {2**dimensions:,} "
            "points. Give more trials, include fewer layers, or take another sampler."
        )
    found: list[float] = np.linspace(0.0, largest, levels).tolist()
    return found


def _optuna() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("tuning needs optuna; install fxcompress[search].") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
