"""Accuracy of every quantizer on handwritten digits: a residual CNN and a small vision transformer, three seeds.

    python examples/benchmarks/quantizers.py                 # what is not measured yet, then the table
    python examples/benchmarks/quantizers.py --only BNN      # these rows alone
    python examples/benchmarks/quantizers.py --write         # the table of what is measured so far
    python examples/benchmarks/quantizers.py --fresh         # forget what was measured

Each network is trained in float, then quantized from there. Every finished row is kept in docs/quantization.json, so
that a run that was stopped goes on; the table goes into docs/quantization.md, between its two marks. The exit code
says whether every row keeps its promise. All of it takes about a quarter of an hour on one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fxcompress
from fxcompress import Distill, Pass, Task
from fxcompress.passes import (
    BNNQuantizer,
    DoReFaQuantizer,
    FineTune,
    L1FilterPruner,
    LSQQuantizer,
    PTQQuantizer,
    QATQuantizer,
    Speedup,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
SEEDS = 0, 1, 2


# ---- the networks ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A stem, two residual blocks and a classifier; reads images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1, self.block2 = Block(16, 24, 1), Block(24, 40, 2)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class Layer(nn.Module):
    """One transformer layer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyViT(nn.Module):
    """Patches of 2 x 2, two layers, mean over the tokens."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.layers = nn.Sequential(Layer(width, 4), Layer(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
        make: builds it.
        epochs: of training in float.
        rate: largest learning rate in float; quantized networks start trained, and take a half of it.
        decay: weight decay of AdamW.
        magnitude: of binary weights; the mean where no BatchNorm follows the layers.
    """

    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float
    magnitude: Literal["one", "mean"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        passes: for a network, given how many epochs each training takes.
        promise: how many points below float the mean may end; or the least accuracy, where above 50.
        epochs: of each training, by network: transformers take longer.
        rate: of the learning rate in float, this much.
        distill: whether the float network teaches.
    """

    passes: Callable[[Network, int], list[Pass]]
    promise: float
    epochs: tuple[int, int]
    rate: float = 0.5
    distill: bool = False


NETWORKS = {
    "residual CNN": Network(ResidualCNN, epochs=20, rate=6e-3, decay=0.05, magnitude="one"),
    "tiny ViT": Network(TinyViT, epochs=60, rate=3e-3, decay=0.5, magnitude="mean"),
}
ROWS = {
    "8-bit PTQ": Row(lambda network, epochs: [PTQQuantizer()], 0.5, (0, 0)),
    "8-bit QAT": Row(lambda network, epochs: [QATQuantizer(epochs=epochs)], 0.5, (5, 5), rate=0.1),
    "4-bit QAT": Row(lambda network, epochs: [QATQuantizer(4, 4, epochs=epochs)], 1.5, (15, 25)),
    "4-bit LSQ": Row(lambda network, epochs: [LSQQuantizer(4, 4, epochs=epochs)], 1.5, (15, 25)),
    "DoReFa 4/4": Row(
        lambda network, epochs: [DoReFaQuantizer(4, 4, epochs=epochs)], 2.0, (20, 60), rate=1.0, distill=True
    ),
    "BNN": Row(
        lambda network, epochs: [BNNQuantizer(epochs=epochs, magnitude=network.magnitude)],
        90.0, (30, 80), rate=1.0, distill=True,
    ),
    "50 % pruned, 8-bit QAT": Row(
        lambda network, epochs: [L1FilterPruner(0.5), FineTune(epochs), QATQuantizer(epochs=epochs), Speedup()],
        1.5, (10, 25),
    ),
}  # fmt: skip
BATCH = 64


class Bench:
    """The data, and the float networks by seed, trained when they are first asked for."""

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick
        pixels, answers = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        labels = torch.tensor(answers)
        train, test = train_test_split(range(len(labels)), test_size=500, random_state=0, stratify=labels)
        self.data = TensorDataset(images[train], labels[train])
        self.images, self.labels = images[test], labels[test]
        self.float: dict[tuple[str, int], nn.Module] = {}

    def task(self, network: Network, epochs: int, rate: float) -> Task:
        """AdamW; the rate rises for a third of the training and then falls to nothing."""
        steps = max(1, epochs)

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=network.decay)

        return Task(
            batches=DataLoader(self.data, BATCH, shuffle=True, drop_last=True),
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1),
            optimizer=optimizer,
            schedule=lambda made: OneCycleLR(made, rate, total_steps=steps + 1, pct_start=0.3),
            epochs=epochs,
        )

    def trained(self, name: str, seed: int) -> nn.Module:
        """The float network."""
        if (name, seed) not in self.float:
            network = NETWORKS[name]
            torch.manual_seed(seed)
            epochs = 1 if self.quick else network.epochs
            made = self.run(network.make(), [FineTune()], self.task(network, epochs, network.rate), seed)
            self.float[name, seed] = made
        return self.float[name, seed]

    def run(self, model: nn.Module, passes: list[Pass], task: Task, seed: int) -> nn.Module:
        example = self.images[:2]
        return fxcompress.compress(model, passes, example_inputs=example, task=task, seed=seed, progress=False)

    def measure(self, name: str, row: str | None, seed: int) -> float:
        """Accuracy in percent, of a row or (None) in float."""
        made = self.trained(name, seed)
        if row is not None:
            network, entry = NETWORKS[name], ROWS[row]
            epochs = 1 if self.quick else entry.epochs[list(NETWORKS).index(name)]
            task = self.task(network, epochs, entry.rate * network.rate)
            if entry.distill:
                task = Distill(task, made, temperature=4.0, weight=0.5)
            made = self.run(made, entry.passes(network, epochs), task, seed)
        with torch.no_grad():
            return 100 * float((made.eval()(self.images).argmax(1) == self.labels).float().mean())


# ---- the table -------------------------------------------------------------------------------------------------------

Found = dict[str, float]


def key(name: str, row: str | None, seed: int) -> str:
    return f"{name} | {row or 'float'} | {seed}"


def runs(found: Found, name: str, row: str | None) -> list[float]:
    """What the seeds gave."""
    return [found[key(name, row, seed)] for seed in SEEDS if key(name, row, seed) in found]


def holds(found: Found, name: str, row: str) -> bool:
    """Whether a row keeps its promise; only once it has all its seeds."""
    made, dense = runs(found, name, row), runs(found, name, None)
    if len(made) < len(SEEDS) or len(dense) < len(SEEDS):
        return False
    promise = ROWS[row].promise
    return mean(made) >= (promise if promise > 50 else mean(dense) - promise) - 1e-6


def table(found: Found) -> str:
    """In Markdown: the mean of the seeds, and each of them."""
    lines = ["| | " + " | ".join(NETWORKS) + " | promised |", "|---|" + "---|" * (len(NETWORKS) + 1)]
    for row in (None, *ROWS):
        cells = []
        for name in NETWORKS:
            made = runs(found, name, row)
            if not made:
                cells.append("")
                continue
            text = f"{mean(made):.1f} ({', '.join(f'{value:.1f}' for value in made)})"
            missed = row is not None and len(made) == len(SEEDS) and not holds(found, name, row)
            cells.append(f"**{text}**, below" if missed else text)
        promise = "" if row is None else f"float - {ROWS[row].promise}"
        if row is not None and ROWS[row].promise > 50:
            promise = f"at least {ROWS[row].promise:.0f}"
        lines.append(f"| {row or 'float'} | " + " | ".join(cells) + f" | {promise} |")
    return "\n".join(lines)


def write(found: Found, page: Path) -> None:
    """Put the table into the page."""
    text = page.read_text()
    before, rest = text.split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the rows whose names contain this")
    parser.add_argument("--network", default="", help="the networks whose names contain this")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    parser.add_argument("--results", type=Path, default=DOCS / "quantization.json", help="the rows that are finished")
    parser.add_argument("--page", type=Path, default=DOCS / "quantization.md")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the table of what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: Found = {} if options.fresh or not options.results.exists() else json.loads(options.results.read_text())
    bench = Bench(options.quick)
    for seed in () if options.write else options.seeds:
        for name in (name for name in NETWORKS if options.network in name):
            for row in (None, *(row for row in ROWS if options.only in row)):
                place = key(name, row, seed)
                if place not in found:
                    found[place] = round(bench.measure(name, row, seed), 2)
                    print(f"{place}: {found[place]:.1f}", file=sys.stderr, flush=True)
                    options.results.write_text(json.dumps(found, indent=1) + "\n")
    write(found, options.page)
    print(table(found))
    return not all(holds(found, name, row) for name in NETWORKS for row in ROWS)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
