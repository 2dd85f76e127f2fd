"""How long pricing takes: 100,000 random allocations of resnet50 through one compiled polynomial.

One thread, 224x224, batch 1. Counting, the analysis and the polynomials are measured once, pricing in rounds whose
median is shown; all on the wall.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from model_zoo import build

import fxcompress

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pricing:
    """Seconds that each step took.

    Attributes:
        model: name of the model.
        allocations: how many allocations a round prices.
        widths: how many widths an allocation has.
        count: the dense model, counted.
        derive: its trace, analysis and polynomials.
        compile: the first evaluation, which compiles them.
        rounds: every round of pricing.
    """

    model: str
    allocations: int
    widths: int
    count: float
    derive: float
    compile: float
    rounds: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.allocations:,} allocations of {self.widths} widths priced in "
            f"{median(self.rounds):.3f} s (median of {len(self.rounds)} rounds, {min(self.rounds):.3f} to "
            f"{max(self.rounds):.3f} s). Before that, once: count {self.count:.2f} s, trace, analysis and polynomials "
            f"{self.derive:.2f} s, compiling them {self.compile:.2f} s."
        )


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds on the wall that a call takes, and what it gives."""
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


def price(name: str = "resnet50", allocations: int = 100_000, rounds: int = 5) -> Pricing:
    """Price random allocations of a model of the zoo; every round draws its own, outside the measured time."""
    model = build(name)[0]
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    counting, cost = timed(lambda: fxcompress.count(model, x))
    deriving, symbolic = timed(lambda: cost.symbolic)
    compiling, dense = timed(symbolic.evaluate)
    assert (dense.macs, dense.params, dense.bytes) == (cost.macs, cost.params, cost.bytes)
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(rounds):
        drawn = {name: generator.integers(1, width + 1, allocations) for name, width in symbolic.widths.items()}
        elapsed, figures = timed(partial(symbolic.evaluate, drawn))
        assert figures.macs.shape == (allocations,)
        seconds.append(elapsed)
    return Pricing(name, allocations, len(symbolic.widths), counting, deriving, compiling, tuple(seconds))
