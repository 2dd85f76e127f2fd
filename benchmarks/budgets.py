"""Budgets: how long 10,000 proposals take to be filled and priced, and how near latencies come to their targets.

One thread, on the wall. The latency of what is left is measured in turns with the dense model, once more than the pass
did, and that measurement is shown.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from model_zoo import build
from rich.table import Table

import fxcompress
from fxcompress import Budget, Context, latency_table
from fxcompress.channels.groups import analyse
from fxcompress.inputs import Inputs
from fxcompress.passes import L1FilterPruner, SimulatedAnnealingPruner, Speedup
from fxcompress.prices import Prices
from fxcompress.timings import Timings


@dataclass(frozen=True)
class Proposals:
    """Seconds for annealing's proposals of one model.

    Attributes:
        model: its name.
        proposals: how many.
        make: analysis, prices and ranking of a traced model.
        rounds: filling to half of the MACs, and pricing.
        one: a single proposal.
    """

    model: str
    proposals: int
    make: float
    rounds: tuple[float, ...]
    one: float

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.proposals:,} proposals filled to half of the MACs and priced in "
            f"{median(self.rounds):.2f} s (median of {len(self.rounds)} rounds, {min(self.rounds):.2f} to "
            f"{max(self.rounds):.2f} s), one alone in {self.one * 1e3:.1f} ms; analysis and prices {self.make:.2f} s"
        )


def proposals(name: str = "resnet50", number: int = 10_000, rounds: int = 5) -> Proposals:
    """Candidates as annealing proposes them at its first temperature; nothing is scored."""
    model, x = build(name)[0], torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pruner, module = SimulatedAnnealingPruner(Budget(macs=0.5)), fxcompress.trace(model, x)
    start = perf_counter()
    ground = pruner.ground(module, Context(inputs=Inputs.parse(x)))
    made = perf_counter() - start
    half = np.full(len(ground.free), 0.5)
    random, seconds, alone = np.random.default_rng(0), [], []
    for _ in range(rounds):
        for count, times in ((number, seconds), (1, alone)):
            start = perf_counter()
            found = ground.proposals(pruner.perturbed(half, 1.0, count, ground, random))
            times.append(perf_counter() - start)
            assert all(each.within({"macs": 0.5}) for each in found)
    return Proposals(name, number, made, tuple(seconds), median(alone))


def latencies(names: tuple[str, ...] = ("resnet18", "mobilenet_v2"), side: int = 160) -> Table:
    """Budgets of latency, and what is measured after removal."""
    table = Table(title=f"latency budgets, {side}x{side}, batch 1, one thread")
    for column in ("model", "budget", "left", "off by", "MACs left", "table's error", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in names:
        model = build(name)[0]
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        dense, inputs = fxcompress.trace(model, x), Inputs.parse(x)
        groups = analyse(dense, inputs)
        with tempfile.TemporaryDirectory() as folder:
            timings = Timings(Path(folder, "latency.sqlite"))
            error = latency_table.measure(
                dense, groups, inputs, Prices(dense, groups, inputs), round_to=8, timings=timings
            ).error
            timings.close()
        for ratio in (0.7, 0.5):
            start = perf_counter()
            passes = [L1FilterPruner(budget=Budget(latency=ratio), round_to=8), Speedup()]
            small = fxcompress.compress(model, passes, example_inputs=x, verify=False)
            assert isinstance(small, fxcompress.TracedModule)
            elapsed = perf_counter() - start
            before, after = latency_table.in_turns([dense, small], inputs)
            macs = fxcompress.count(small, x).macs / fxcompress.count(model, x).macs
            cells = (f"{ratio:.0%}", f"{after / before:.1%}", f"{after / before / ratio - 1:+.1%}", f"{macs:.1%}")
            table.add_row(name, *cells, f"{error:.1%}", f"{elapsed:.0f}")
    return table
