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
        levels: for each of them its values in a grid; the first and the last are the bounds, for all samplers.
        directions: ``"maximize"`` or ``"minimize"`` for each objective.
        seed: of the sampler.

    Attributes:
        left: how many points it can still suggest; of a grid those that it has not, else infinity.
    """

    def __init__(
        self,
        sampler: str,
        names: Sequence[str],
        levels: Sequence[Sequence[float]],
        directions: Sequence[str],
        seed: int,
    ) -> None:
        optuna = _optuna()
        grid = dict(zip(names, map(list, levels), strict=True))
        self._fail = optuna.trial.TrialState.FAIL
        self._asked: list[Any] = []
        self._space = {
            name: optuna.distributions.FloatDistribution(values[0], values[-1]) for name, values in grid.items()
        }
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


def grid_levels(count: int, dimensions: int, low: float, high: float) -> list[float]:
    """Equally many levels of each dimension, so that a grid has at most ``count`` points.

    Raises:
        InputError: two levels of each are more.
    """
    levels = math.floor(count ** (1 / max(dimensions, 1)) + 1e-9)
    if levels < 2:
        raise InputError(
            f"trials is {count}; a grid with two levels of each of {dimensions} dimensions has {2**dimensions:,} "
            "points. Give more trials, include fewer layers, or take another sampler."
        )
    found: list[float] = np.linspace(low, high, levels).tolist()
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
