"""Accuracy of every quantizer on handwritten digits: a residual CNN and a small vision transformer, 3 seeds.

    PYTHONPATH=. OMP_NUM_THREADS=1 python examples/benchmarks/quantizers.py [seeds] > table.md

Prints the table of docs/quantization.md. Each network is trained in float, then quantized from there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcompress
from fxcompress import Pass, Task
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
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.block1, self.block2 = Block(24, 32, 1), Block(32, 48, 2)
        self.head = nn.Linear(48, 10)

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


#: Name, passes, and how far below float it may end, in points of accuracy (or the least accuracy, where above 50).
ROWS: list[tuple[str, Callable[[], list[Pass]], float]] = [
    ("8-bit PTQ", lambda: [PTQQuantizer()], 0.5),
    ("8-bit QAT", lambda: [QATQuantizer(epochs=5)], 0.5),
    ("4-bit QAT", lambda: [QATQuantizer(4, 4, epochs=20)], 1.5),
    ("4-bit LSQ", lambda: [LSQQuantizer(4, 4, epochs=20)], 1.5),
    ("DoReFa 4/4", lambda: [DoReFaQuantizer(4, 4, epochs=20)], 2.0),
    ("BNN", lambda: [BNNQuantizer(epochs=40)], 90.0),
    (
        "50 % pruned, 8-bit QAT",
        lambda: [L1FilterPruner(0.5), FineTune(epochs=15), QATQuantizer(epochs=10), Speedup()],
        1.5,
    ),
]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and 500 held out."""
    pixels, answers = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(answers)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[500:], labels[500:], images[:500], labels[:500]


def task(epochs: int) -> Task:
    """Digits, with Adam."""
    images, labels, held, answers = data()

    def batches() -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images))
        return [(images[part], labels[part]) for part in order.split(64)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def score(model: nn.Module) -> float:
        return float((model(held).argmax(1) == answers).float().mean())

    return Task(
        batches=batches,
        loss=loss,
        score=score,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        epochs=epochs,
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )


def run(kind: type[nn.Module], seed: int) -> dict[str, float]:
    """Accuracy in percent, by row."""
    torch.manual_seed(seed)
    example = torch.randn(2, 1, 8, 8)
    training = task(25)
    dense = fxcompress.compress(kind(), [FineTune()], example_inputs=example, task=training, seed=seed, progress=False)
    found = {"float": 100 * training.measure(dense)}
    for name, passes, _ in ROWS:
        made = fxcompress.compress(dense, passes(), example_inputs=example, task=training, seed=seed, progress=False)
        found[name] = 100 * training.measure(made)
        print(f"{kind.__name__} seed {seed} {name}: {found[name]:.1f}", file=sys.stderr, flush=True)
    return found


def main(seeds: int = 3) -> bool:
    """Print the table; whether every row keeps its promise."""
    kinds = (ResidualCNN, TinyViT)
    results = {kind.__name__: [run(kind, seed) for seed in range(seeds)] for kind in kinds}
    means = {name: {row: statistics.mean(r[row] for r in runs) for row in runs[0]} for name, runs in results.items()}
    print("| | " + " | ".join(means) + " | promised |\n|---|" + "---|" * (len(means) + 1))
    print("| float | " + " | ".join(f"{found['float']:.1f}" for found in means.values()) + " | |")
    kept = True
    for name, _, bound in ROWS:
        floors = [bound if bound > 50 else found["float"] - bound for found in means.values()]
        kept &= all(found[name] >= floor - 1e-6 for found, floor in zip(means.values(), floors, strict=True))
        promise = f"at least {bound:.0f}" if bound > 50 else f"float - {bound}"
        print(f"| {name} | " + " | ".join(f"{found[name]:.1f}" for found in means.values()) + f" | {promise} |")
    return kept


if __name__ == "__main__":
    sys.exit(not main(*map(int, sys.argv[1:2])))
