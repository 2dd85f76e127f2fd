"""Train a small network, mask 60 % of its channels, fine-tune, remove them for real, and compare.

`make demo` runs this. The data are the 1,797 handwritten digits (8x8 pixels) that come with scikit-learn. The network
has what makes pruning channels hard: residual sums, depthwise convolutions, squeeze-excite gates. Nobody tells
fxcompress about them. With FXCOMPRESS_QUICK=1 it hardly trains, to see that everything runs.
"""

import copy
import io
import os
from collections.abc import Iterable
from functools import partial
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(width, width), conv_bn(width, width)

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
        self.expand = conv_bn(inputs, hidden, kernel=1)
        self.depthwise = conv_bn(hidden, hidden, stride=stride, groups=hidden)
        self.gate = SqueezeExcite(hidden, hidden // 4)
        self.project = conv_bn(hidden, outputs, kernel=1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.depthwise(F.silu(self.expand(x))))
        out = self.project(self.gate(hidden))
        return x + out if self.shortcut else out


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 40)
        self.stage1 = nn.Sequential(Residual(40), InvertedResidual(40, 80, 40, stride=1))
        self.stage2 = nn.Sequential(InvertedResidual(40, 160, 80, stride=2), Residual(80))
        self.stage3 = InvertedResidual(80, 240, 80, stride=1)
        self.classifier = nn.Linear(80, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(F.relu(self.stem(x)))))
        return self.classifier(x.mean(dim=(2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) around zero and labels (N,): to train on, and held out."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    train, test = train_test_split(range(len(labels)), test_size=500, random_state=0, stratify=labels)
    return images[train], torch.tensor(labels[train]), images[test], torch.tensor(labels[test])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """A plain training loop, the same for a masked module: masked channels stay masked."""
    steps = len(images) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: steps * 64].split(64):
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
    """The largest difference between two models' outputs, relative to the largest output."""
    expected, found = a(images), b(images)
    return float((expected - found).abs().max() / expected.abs().max())


def file_size(model: nn.Module) -> int:
    """Bytes of the saved state_dict."""
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def latencies(models: Iterable[nn.Module], batch: Tensor, rounds: int) -> list[float]:
    """Median seconds of a forward pass. The models take turns, so that a busy moment slows all of them."""
    once = partial(fxcompress.latency, example_inputs=batch, threads=1, min_run_time=0.2)
    measured = [[once(model).median for model in models] for _ in range(rounds)]
    return [median(times) for times in zip(*measured, strict=True)]


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, test_images, test_labels = digits()
    epochs, rounds = 8, 7
    if quick:
        images, labels, epochs, rounds = images[:320], labels[:320], 1, 2

    print(f"1. Train the dense network; epochs: {epochs}.")
    dense = Network()
    train(dense, images, labels, epochs)
    print("2. Mask 60 % of the channels in every group.")
    masked = fxcompress.compress(dense, [L1FilterPruner(0.6, round_to=8)], example_inputs=images[:2])
    print(f"   Right after, its accuracy is {accuracy(masked, test_images, test_labels):.1%}.")
    print(f"3. Fine-tune the masked network; epochs: {epochs}.")
    train(masked, images, labels, epochs)
    print("4. Remove what is masked.")
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=images[:2])
    for name in ("stage1.0.conv1.0.weight", "stage2.0.depthwise.0.weight", "stage2.0.gate.down.weight"):
        before, after = (tuple(model.get_parameter(name).shape) for model in (dense, removed))
        print(f"   {name}: {before} -> {after}")

    models = {"dense": dense, "masked, tuned": masked, "removed": removed}
    batch = test_images[:64]
    times = dict(zip(models, latencies(models.values(), batch, rounds), strict=True))
    scores = {name: accuracy(model, test_images, test_labels) for name, model in models.items()}
    table = Table("", "accuracy", "params", "MACs", "file", "latency", "speed", box=box.SIMPLE)
    for name, model in models.items():
        cost, speed = fxcompress.count(model, batch), times["dense"] / times[name]
        sizes = f"{cost.params:,}", f"{cost.macs:,}", f"{file_size(model) / 1e3:,.0f} kB"
        table.add_row(name, f"{scores[name]:.1%}", *sizes, f"{times[name] * 1e3:.1f} ms", f"{speed:.2f}x")
    Console().print(table)
    print(f"Accuracy: {len(test_images)} held-out images. Latency: a batch of {len(batch)}, one thread.")

    in_float32 = difference(masked, removed, test_images)
    wide_masked, wide_removed = copy.deepcopy(masked).double(), copy.deepcopy(removed).double()
    in_float64 = difference(wide_masked, wide_removed, test_images.double())
    print(f"Largest difference of masked and removed: {in_float64:.1e} in float64, {in_float32:.1e} in float32.")

    lost = scores["dense"] - scores["removed"]
    if quick:
        print("A quick run: too little training to compare accuracies, so that they are not checked.")
    elif lost > 0.02:
        raise SystemExit(f"Accuracy fell by {lost * 100:.1f} points; expected at most 2.")
    if times["removed"] >= times["dense"]:
        raise SystemExit("The removed network is not faster than the dense one.")
    if in_float64 > 1e-9 or in_float32 > 1e-5:
        raise SystemExit("Masked and removed network differ; expected at most 1e-9 (float64), 1e-5 (float32).")


if __name__ == "__main__":
    main(quick=os.environ.get("FXCOMPRESS_QUICK") == "1")
