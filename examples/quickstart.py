"""Train a small network, mask 60 % of its channels, fine-tune, remove them for real, and compare.

    python examples/quickstart.py

The data are the 1,797 handwritten digits (8x8 pixels) that scikit-learn brings along. The network has what makes
channel pruning hard: residual sums, depthwise convolutions and squeeze-excite gates, none of which appears again
below `class Network`.
"""

import copy
import io
import os
import sys
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup


class ConvBN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(width, width), ConvBN(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean(dim=(2, 3)))))
        return x * torch.sigmoid(gate)[:, :, None, None]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvBN(inputs, hidden, kernel=1)
        self.depthwise = ConvBN(hidden, hidden, stride=stride, groups=hidden)
        self.gate = SqueezeExcite(hidden, hidden // 4)
        self.project = ConvBN(hidden, outputs, kernel=1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.depthwise(F.silu(self.expand(x))))
        out = self.project(self.gate(hidden))
        return x + out if self.shortcut else out


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 80)
        self.stage1 = nn.Sequential(Residual(80), InvertedResidual(80, 160, 80, stride=1))
        self.stage2 = nn.Sequential(InvertedResidual(80, 320, 160, stride=2), Residual(160))
        self.stage3 = InvertedResidual(160, 480, 160, stride=1)
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(F.relu(self.stem(x)))))
        return self.classifier(x.mean(dim=(2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) around zero and labels (N,): to train on, and held out."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=0, stratify=labels)
    return images[train], torch.tensor(labels[train]), images[test], torch.tensor(labels[test])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """A plain training loop. It knows nothing of fxcompress: a masked module trains like any other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(images) // 64))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).float().mean())


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    """The largest difference of two models' outputs, relative to the largest output."""
    expected, found = a(images), b(images)
    return float((expected - found).abs().max() / expected.abs().max())


def file_size(model: nn.Module) -> int:
    """Bytes of the saved state_dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = digits()

    dense = Network()
    train(dense, images, labels, epochs=2 if quick else 10, rate=3e-3)
    masked = fxcompress.compress(dense, [L1FilterPruner(0.6, round_to=8)], example_inputs=images[:2])
    pruned = accuracy(masked, test_images, test_labels)
    train(masked, images, labels, epochs=1 if quick else 8, rate=1e-3)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=images[:2])

    models = {"dense": dense, "masked, fine-tuned": masked, "removed": removed}
    batch = test_images[:64]
    rounds = [
        [fxcompress.latency(m, batch, threads=1, min_run_time=0.2).median for m in models.values()] for _ in range(7)
    ]
    times = dict(zip(models, map(median, zip(*rounds, strict=True)), strict=True))
    accuracies = {name: accuracy(model, test_images, test_labels) for name, model in models.items()}

    table = Table("", "accuracy", "params", "MACs", "file", "latency, batch 64", title="60 % of the channels")
    for name, model in models.items():
        cost = fxcompress.count(model, batch)
        table.add_row(
            name,
            f"{accuracies[name]:.1%}",
            f"{cost.params:,}",
            f"{cost.macs:,}",
            f"{file_size(model) / 1e6:.2f} MB",
            f"{times[name] * 1e3:.1f} ms ({times['dense'] / times[name]:.2f}x)",
        )
    console = Console()
    console.print(table)

    wide = [copy.deepcopy(model).double() for model in (masked, removed)]
    gaps = {"float64": difference(*wide, test_images.double()), "float32": difference(masked, removed, test_images)}
    console.print(f"right after masking, before fine-tuning: accuracy {pruned:.1%}")
    for name, gap in gaps.items():
        console.print(f"masked and removed differ by {gap:.1e} in {name}, over {len(test_images)} images")
    return gaps


if __name__ == "__main__":
    main(quick=os.environ.get("FXCOMPRESS_QUICK") == "1")
