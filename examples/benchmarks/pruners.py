"""Every pruning algorithm on one small task: writes docs/pruners.md.

    python examples/benchmarks/pruners.py                     # what is not measured yet, then the page and its checks
    python examples/benchmarks/pruners.py --only AGPPruner    # these rows alone, and no page
    python examples/benchmarks/pruners.py --write             # the page of what is measured so far
    python examples/benchmarks/pruners.py --fresh             # forget what was measured

A residual network is trained on handwritten digits, once for each seed; each algorithm removes 50 % and 80 % of its
channels (or of its weights) and trains the rest. Every finished row is kept in docs/pruners.json, so that a run that
was stopped goes on. The exit code says whether the checks hold. All of it takes about a quarter of an hour on one
thread.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import fxcompress
from fxcompress import Pass, Task
from fxcompress.passes import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ADMMPruner,
    AGPPruner,
    FineTune,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    MovementPruner,
    RandomFilterPruner,
    RecalibrateBatchNorm,
    SlimPruner,
    Speedup,
    TaylorFOPruner,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = 0, 1, 2
SPARSITIES = 0.5, 0.8
EPOCHS = 20


# ---- the network and its data ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Network(nn.Module):
    """A residual network of 33,000 parameters for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 32, stride=2), Block(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """The digits that come with scikit-learn: to train on, and 500 images (N, 1, 8, 8) and labels (N,) held out."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=0, stratify=labels)
    return TensorDataset(images[train], labels[train]), images[test], labels[test]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_task(data: TensorDataset) -> Task:
    """AdamW with a rate that falls in every training; 20 batches of 64."""
    return Task(
        batches=DataLoader(data, 64, shuffle=True, drop_last=True),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.5),
        schedule=lambda optimizer: ExponentialLR(optimizer, 0.85),
    )


# ---- the algorithms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One algorithm.

    Attributes:
        make: the pass at a sparsity.
        kind: ``"criterion"`` (masks at once), ``"training"``.
        spent: epochs that the pass itself trains.
        tuned: epochs of fine-tuning after it.
        elements: whether single weights go.
    """

    make: Callable[[float], Pass]
    kind: str = "criterion"
    spent: int = 0
    tuned: int = EPOCHS
    elements: bool = False


def trained(make: Callable[[float], Pass], spent: int = 6, elements: bool = False) -> Entry:
    return Entry(make, "training", spent, elements=elements)


ALGORITHMS: dict[str, Entry] = {
    "RandomFilterPruner": Entry(RandomFilterPruner),
    "L1FilterPruner": Entry(L1FilterPruner),
    "L2FilterPruner": Entry(L2FilterPruner),
    "FPGMPruner": Entry(FPGMPruner),
    "ActivationAPoZRankFilterPruner": Entry(ActivationAPoZRankFilterPruner),
    "ActivationMeanRankFilterPruner": Entry(ActivationMeanRankFilterPruner),
    "TaylorFOPruner": Entry(TaylorFOPruner),
    "SlimPruner": trained(lambda s: SlimPruner(s, epochs=6, scale=1e-3, max_sparsity_per_group=(1 + s) / 2)),
    "AGPPruner(L1)": trained(lambda s: AGPPruner(L1FilterPruner(s), iterations=6)),
    "LinearPruner(L1)": trained(lambda s: LinearPruner(L1FilterPruner(s), iterations=6)),
    "LotteryTicketPruner(L1)": trained(lambda s: LotteryTicketPruner(L1FilterPruner(s), rounds=2, epochs=5), spent=10),
    "ADMMPruner, channels": trained(lambda s: ADMMPruner(s, granularity="channel", rho=1e-2, iterations=3, epochs=2)),
    "MovementPruner, channels": trained(lambda s: MovementPruner(s, granularity="channel", epochs=6)),
    "LevelPruner": Entry(LevelPruner, elements=True),
    "ADMMPruner": trained(lambda s: ADMMPruner(s, rho=1e-2, iterations=3, epochs=2), elements=True),
    "MovementPruner": trained(lambda s: MovementPruner(s, epochs=6), elements=True),
}
BASELINE = "RandomFilterPruner"
CRITERIA = [n for n, entry in ALGORITHMS.items() if entry.kind == "criterion" and not entry.elements and n != BASELINE]


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The data, and the dense networks by seed, trained when they are first asked for."""

    def __init__(self, quick: bool) -> None:
        self.data, self.images, self.labels = digits()
        self.task, self.quick = make_task(self.data), quick
        self.example = self.images[:2]
        self.dense: dict[int, nn.Module] = {}

    def network(self, seed: int) -> nn.Module:
        if seed not in self.dense:
            torch.manual_seed(seed)
            self.dense[seed] = self.run(Network().eval(), [FineTune(1 if self.quick else EPOCHS)], seed)
        return self.dense[seed]

    def run(self, model: nn.Module, passes: list[Pass], seed: int) -> nn.Module:
        return fxcompress.compress(model, passes, example_inputs=self.example, task=self.task, seed=seed)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return float((model(self.images).argmax(dim=1) == self.labels).float().mean())

    def ratio(self, dense: nn.Module, small: nn.Module) -> float:
        """Latency of a batch of 64 as a fraction of the dense network's; both are timed in turns."""
        times = [
            [
                fxcompress.latency(model, self.images[:64], threads=1, min_run_time=0.05).median
                for model in (dense, small)
            ]
            for _ in range(5)
        ]
        before, after = (median(found) for found in zip(*times, strict=True))
        return after / before

    def measure(self, entry: Entry, sparsity: float, seed: int) -> dict[str, float]:
        """One row."""
        dense = self.network(seed)
        masked = self.run(dense, [entry.make(sparsity)], seed)
        recalibrated = self.run(masked, [RecalibrateBatchNorm()], seed)
        tuned = self.run(masked, [FineTune(1 if self.quick else entry.tuned)], seed)
        small = self.run(tuned, [Speedup()], seed)
        cost, whole = (fxcompress.count(model, self.example) for model in (small, dense))
        zeros = sum(int((p == 0).sum()) for p in small.parameters())
        return {
            "dense": self.accuracy(dense), "before": self.accuracy(masked), "recalibrated": self.accuracy(recalibrated),
            "after": self.accuracy(small), "macs": cost.macs / whole.macs,
            "params": (cost.params - zeros) / whole.params, "latency": self.ratio(dense, small),
        }  # fmt: skip


# ---- the page --------------------------------------------------------------------------------------------------------


Rows = dict[str, dict[str, float]]


def key(name: str, sparsity: float, seed: int) -> str:
    return f"{name} | {sparsity} | {seed}"


def measured(rows: Rows, name: str, sparsity: float) -> list[dict[str, float]]:
    """The finished rows of an algorithm, one for each seed."""
    return [rows[key(name, sparsity, seed)] for seed in SEEDS if key(name, sparsity, seed) in rows]


def average(rows: Rows, name: str, sparsity: float, field: str) -> float:
    """Over the seeds; not a number where there are none."""
    return mean(row[field] for row in measured(rows, name, sparsity)) if measured(rows, name, sparsity) else math.nan


def checks(rows: Rows) -> list[tuple[str, bool]]:
    """What shall hold, and whether it does."""
    points = {
        (name, sparsity, field): 100 * average(rows, name, sparsity, field)
        for name in ALGORITHMS
        for sparsity in SPARSITIES
        for field in ("dense", "before", "recalibrated", "after")
    }
    found: list[tuple[str, bool]] = []
    lost = {n: points[n, 0.5, "dense"] - points[n, 0.5, "after"] for n, e in ALGORITHMS.items() if e.kind == "training"}
    worst = max(lost, key=lambda name: lost[name])
    text = f"algorithms that train lose at most 1.5 points at 50 %: at most {lost[worst]:.1f} ({worst})"
    found.append((text, lost[worst] <= 1.5))
    gradual, once = points["AGPPruner(L1)", 0.8, "after"], points["L1FilterPruner", 0.8, "after"]
    text = f"AGP at 80 % is better than its criterion at once: {gradual:.1f} and {once:.1f}"
    found.append((text, gradual > once))
    for name in CRITERIA:
        for field, how in (("before", "masks alone"), ("recalibrated", "recalibrated")):
            ours, random = (points[each, 0.5, field] for each in (name, BASELINE))
            text = f"{name} at 50 % is better than random before fine-tuning, {how}: {ours:.1f} and {random:.1f}"
            found.append((text, ours > random))
    return found


def page(rows: Rows) -> str:
    """The table, and what holds."""
    dense = 100 * average(rows, "L1FilterPruner", 0.5, "dense")
    lines = [
        "# Pruners on one small task", "",
        "Mean over seeds. A residual network (33,000 parameters) on the 8x8 digits of scikit-learn;",
        f"accuracy on 500 held-out images, dense: {dense:.1f} %. Fine-tuning takes 20 epochs, as the dense network's",
        "training; those that train themselves take 6 before it, tickets two rounds of 5. Right after: masks alone,",
        "and with BatchNorm's statistics measured again. MACs, parameters other than zero, and latency (a batch of 64,",
        "one thread, timed in turns with the dense network) are fractions of the dense network's, after `Speedup`.",
        "Written by [examples/benchmarks/pruners.py](../examples/benchmarks/pruners.py).",
    ]  # fmt: skip
    for sparsity in SPARSITIES:
        for elements in (False, True):
            what = "weights" if elements else "channels"
            lines += ["", f"## {sparsity:.0%} of the {what}", ""]
            lines.append("| algorithm | seeds | right after | recalibrated | fine-tuned | MACs | params | latency |")
            lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
            for name, entry in ALGORITHMS.items():
                if entry.elements != elements:
                    continue
                if not measured(rows, name, sparsity):
                    lines.append(f"| {name} | 0 |  |  |  |  |  |  |")
                    continue
                accuracies = (
                    f"{100 * average(rows, name, sparsity, f):.1f}" for f in ("before", "recalibrated", "after")
                )
                fractions = (f"{average(rows, name, sparsity, f):.2f}" for f in ("macs", "params", "latency"))
                seeds = len(measured(rows, name, sparsity))
                lines.append(f"| {name} | {seeds} | {' | '.join(accuracies)} | {' | '.join(fractions)} |")
    lines += ["", NOTES, "", "## What is checked", ""]
    wanted = len(ALGORITHMS) * len(SPARSITIES) * len(SEEDS)
    if len(rows) < wanted:
        lines += [f"Nothing yet: {len(rows)} of {wanted} rows are measured."]
    else:
        lines += [f"- {'Holds' if holds else '**Does not hold**'}: {text}." for text, holds in checks(rows)]
    return "\n".join(lines) + "\n"


NOTES = """Masks of single weights make nothing faster: MACs and latency are those of dense kernels. Right after pruning
a ticket is a network that has not been trained."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the algorithms whose names contain this; writes no page")
    parser.add_argument("--results", type=Path, default=DOCS / "pruners.json", help="the rows that are finished")
    parser.add_argument("--page", type=Path, default=DOCS / "pruners.md")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the page of what is there")
    parser.add_argument("--quick", action="store_true", help="one epoch and one seed, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: Rows = {} if options.fresh or not options.results.exists() else json.loads(options.results.read_text())
    if options.write:
        options.page.write_text(page(rows))
        return 0
    bench = Bench(options.quick)
    wanted = [name for name in ALGORITHMS if not options.only or options.only in name]
    seeds = SEEDS[:1] if options.quick else SEEDS
    for seed, sparsity, name in itertools.product(seeds, SPARSITIES, wanted):
        if key(name, sparsity, seed) in rows:
            continue
        row = rows[key(name, sparsity, seed)] = bench.measure(ALGORITHMS[name], sparsity, seed)
        shown = ", ".join(f"{field} {value:.3f}" for field, value in row.items())
        print(f"{key(name, sparsity, seed)}: {shown}", flush=True)
        options.results.write_text(json.dumps(rows, indent=1) + "\n")
    if options.only or options.quick:
        return 0
    options.page.write_text(page(rows))
    failed = [text for text, holds in checks(rows) if not holds]
    for text in failed:
        print(f"Does not hold: {text}", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
