"""Searches for widths against equal sparsities, on one small task: writes docs/search.json, and a table into a page.

    python examples/benchmarks/search.py            # what is not measured yet, then the table and its checks
    python examples/benchmarks/search.py --fresh    # forget what was measured

The residual network of examples/benchmarks/pruners.py is trained on handwritten digits, once for each seed, and cut to
30 % of its MACs. Searches score candidates on 400 images that are split off the training data; the accuracy in the
table is that of 500 images that no training and no search has seen. The exit code says whether every search beats
equal sparsities.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from pruners import EPOCHS, Network, digits, make_task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import fxcompress
from fxcompress import Budget, Pass, Task
from fxcompress.passes import (
    ADMMPruner,
    AutoCompressPruner,
    FineTune,
    L1FilterPruner,
    NetAdaptPruner,
    RecalibrateBatchNorm,
    SensitivityPruner,
    SimulatedAnnealingPruner,
    Speedup,
    TunedPruner,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = 0, 1, 2
BUDGET = Budget(macs=0.3)
TUNED = 3
BASELINE = "L1FilterPruner, uniform"
ANNEALING = SimulatedAnnealingPruner(BUDGET, cooling=0.7)
AUTOCOMPRESS = AutoCompressPruner(BUDGET, 2, ANNEALING, ADMMPruner(0.5, rho=1e-2, iterations=2, epochs=1))

SEARCHES: dict[str, tuple[Pass, Pass]] = {  # without fine-tuning, and with
    BASELINE: (L1FilterPruner(budget=BUDGET), L1FilterPruner(budget=BUDGET)),
    "NetAdaptPruner": (NetAdaptPruner(BUDGET, epochs=0), NetAdaptPruner(BUDGET, step=0.1, epochs=1)),
    "SimulatedAnnealingPruner": (ANNEALING, ANNEALING),
    "AutoCompressPruner": (AUTOCOMPRESS, AUTOCOMPRESS),
    "SensitivityPruner": (SensitivityPruner(BUDGET, rounds=4), SensitivityPruner(BUDGET, rounds=4, epochs=1)),
    "TunedPruner, TPE": (TunedPruner(BUDGET, trials=80), TunedPruner(BUDGET, trials=80)),
}


class Score:
    """The geometric mean of the probability that a model gives to the right label, once its BatchNorms have seen data.

    In (0, 1], and unlike an accuracy it tells candidates apart that are all bad.
    """

    def __init__(self, seen: Tensor, images: Tensor, labels: Tensor) -> None:
        self.seen, self.images, self.labels = seen, images, labels

    def __call__(self, model: nn.Module) -> float:
        trial = copy.deepcopy(model)
        for layer in trial.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean
                layer.train()
        trial(self.seen)
        trial.eval()
        return math.exp(-float(F.cross_entropy(trial(self.images), self.labels)))


class Bench:
    """The data in three parts, and the dense networks by seed."""

    def __init__(self) -> None:
        data, self.images, self.labels = digits()
        assert isinstance(data, TensorDataset)
        images, labels = data.tensors
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held, rest = order[:400], order[400:]
        score = Score(images[rest[:256]], images[held], labels[held])
        self.task: Task = dataclasses.replace(make_task(TensorDataset(images[rest], labels[rest])), score=score)
        self.example = self.images[:2]
        self.dense: dict[int, nn.Module] = {}

    def network(self, seed: int) -> nn.Module:
        if seed not in self.dense:
            torch.manual_seed(seed)
            self.dense[seed] = self.run(Network().eval(), [FineTune(EPOCHS)], seed)
        return self.dense[seed]

    def run(self, model: nn.Module, passes: list[Pass], seed: int) -> fxcompress.TracedModule:
        return fxcompress.compress(model, passes, example_inputs=self.example, task=self.task, seed=seed)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return float((model(self.images).argmax(dim=1) == self.labels).float().mean())

    def measure(self, item: Pass, seed: int, tuned: int) -> dict[str, float]:
        """One network cut by one pass, and trained for some epochs."""
        dense = self.network(seed)
        start = time.perf_counter()
        after: list[Pass] = [FineTune(tuned)] if tuned else [RecalibrateBatchNorm()]
        small = self.run(dense, [item, *after, Speedup()], seed)
        macs = [fxcompress.count(model, self.example).macs for model in (small, dense)]
        trials = sum(len(search.trials) for step in small.meta["history"] for search in step.searches)
        return {
            "dense": self.accuracy(dense),
            "accuracy": self.accuracy(small),
            "macs": macs[0] / macs[1],
            "trials": trials,
            "seconds": time.perf_counter() - start,
        }


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown, means over the seeds."""
    lines = [
        f"| 30 % of the MACs | accuracy, not fine-tuned | after {TUNED} epochs | MACs left | trials |",
        "|---|---|---|---|---|",
    ]
    for name in SEARCHES:
        plain, tuned = ([rows[f"{name}/{seed}/{epochs}"] for seed in SEEDS] for epochs in (0, TUNED))
        cells = [mean(row["accuracy"] for row in found) for found in (plain, tuned)]
        macs, trials = (mean(row[key] for row in plain) for key in ("macs", "trials"))
        lines.append(f"| {name} | {cells[0]:.1%} | {cells[1]:.1%} | {macs:.1%} | {trials:.0f} |")
    dense = mean(rows[f"{BASELINE}/{seed}/0"]["dense"] for seed in SEEDS)
    return "\n".join([*lines, "", f"The dense networks reach {dense:.1%}."])


def check(rows: dict[str, dict[str, float]]) -> list[str]:
    """Which searches do not beat equal sparsities."""
    wrong = []
    for epochs in (0, TUNED):
        means = {n: mean(rows[f"{n}/{seed}/{epochs}"]["accuracy"] for seed in SEEDS) for n in SEARCHES}
        wrong += [
            f"{name} reaches {found:.2%} after {epochs} epochs; {BASELINE} {means[BASELINE]:.2%}"
            for name, found in means.items()
            if name != BASELINE and found <= means[BASELINE]
        ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = DOCS / "search.json"
    rows: dict[str, dict[str, float]] = {}
    if path.exists() and not options.fresh:
        rows = json.loads(path.read_text())
    bench = Bench()
    for seed in SEEDS:
        for name, (plain, trained) in SEARCHES.items():
            for item, epochs in ((plain, 0), (trained, TUNED)):
                key = f"{name}/{seed}/{epochs}"
                if key not in rows:
                    rows[key] = bench.measure(item, seed, epochs)
                    path.write_text(json.dumps(rows, indent=1) + "\n")
                    print(key, rows[key], flush=True)
    page = DOCS / "search.md"
    marks = "<!-- table -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(marks[0])
    page.write_text(f"{before}{marks[0]}{table(rows)}\n{marks[1]}{rest.partition(marks[1])[2]}")
    wrong = check(rows)
    print(table(rows), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
