"""Counts that others have published: torchvision's metadata, and the pruned networks of Li et al. 2017, Table 1."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import model_zoo  # noqa: F401 - before torchvision
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import compress, count
from fxcompress.cost import Cost
from fxcompress.passes import L1FilterPruner, Speedup

# ---- torchvision -----------------------------------------------------------------------------------------------


def test_resnet50() -> None:
    found = count(torchvision.models.resnet50(), torch.randn(1, 3, 224, 224))
    assert (found.macs, found.params) == (4_089_184_256, 25_557_032)
    rows = {(row.name, row.kind): row for row in found.table}
    assert found.macs == sum(row.macs for row in found.table)
    assert rows["conv1", "Conv2d"].macs == 112 * 112 * 64 * 3 * 49
    assert rows["layer1.0", "Bottleneck"].elementwise == 56 * 56 * 256  # the residual addition
    assert {row.kind for row in found.table if row.macs} == {"Conv2d", "Linear"}
    assert sum(row.params for row in found.table if row.kind in ("Conv2d", "Linear")) == 25_503_912


MODELS = torchvision.models.list_models(module=torchvision.models)
FEW = ("resnet18", "densenet121", "mobilenet_v3_small", "regnet_y_400mf", "swin_t", "vit_b_32")
#: Every entry with weights: 115 of 80 models, at the resolution that each was evaluated at.
PUBLISHED = [(name, entry.name) for name in MODELS for entry in torchvision.models.get_model_weights(name)]


@pytest.mark.parametrize(
    "name, entry", [pytest.param(*case, marks=() if case[0] in FEW else pytest.mark.long) for case in PUBLISHED]
)
def test_figures_that_torchvision_publishes(name: str, entry: str) -> None:
    """Parameters exactly; what it calls GFLOPs are MACs, given with three digits."""
    weights = torchvision.models.get_model_weights(name)[entry]
    (side,) = weights.transforms().crop_size
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": name == "inception_v3"}
    # The meta device has shapes and no numbers. RegNet computes its widths as tensors.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, weights=None, **options).to("meta")
    found = count(model, torch.empty(1, 3, side, side, device="meta"))
    assert found.params == weights.meta["num_params"]
    assert round(found.macs / 1e9, 3) == weights.meta["_ops"]


def test_every_classification_model_is_among_them() -> None:
    assert len(MODELS) >= 80
    assert {name for name, _ in PUBLISHED} == set(MODELS)
    assert {name for name, _ in PUBLISHED} >= set(FEW)


# ---- Li et al. 2017, Table 1 -----------------------------------------------------------------------------------


class VGG16(nn.Sequential):
    """The VGG-16 with BatchNorm for CIFAR-10 that the paper describes."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        width = 3
        for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for out in block:
                layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                width = out
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10)]
        super().__init__(*layers)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters: every other position, and channels of zeros."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2)))


class ResNet(nn.Module):
    """A ResNet for CIFAR-10 of ``6 * blocks + 2`` layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.blocks = nn.Sequential(
            *(
                Block(widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if first and stage else 1)
                for stage in range(3)
                for first in [True] + [False] * (blocks - 1)
            )
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))
        return y


def vgg_16_a() -> dict[int, float]:
    """Half of convolution 1 and of convolutions 8 to 13."""
    return dict.fromkeys((1, *range(8, 14)), 0.5)


def first_of_blocks(blocks: int, shares: tuple[float, float, float], skipped: tuple[int, ...]) -> dict[int, float]:
    """A share of the first convolution of each block, stage by stage; convolutions are numbered from the stem = 1."""
    first = {2 + 2 * i: shares[i // blocks] for i in range(3 * blocks)}
    assert set(skipped) <= set(first)
    return {number: share for number, share in first.items() if share and number not in skipped}


@dataclass(frozen=True)
class Published:
    """A row of the table: figures as printed; ``pruned`` maps numbers of convolutions to the share that goes."""

    model: type[VGG16] | tuple[type[ResNet], int]
    macs: str
    params: str
    pruned: Mapping[int, float]
    removed: tuple[str, str] = ("", "")

    def build(self) -> nn.Module:
        return self.model() if isinstance(self.model, type) else self.model[0](self.model[1])


TABLE = {
    "VGG-16": Published(VGG16, "3.135e8", "1.498e7", {}),
    "VGG-16-A": Published(VGG16, "2.063e8", "5.391e6", vgg_16_a(), ("34.2", "64.0")),
    "ResNet-56": Published((ResNet, 9), "1.255e8", "8.49e5", {}),
    "ResNet-56-A": Published(
        (ResNet, 9), "1.124e8", "7.695e5", first_of_blocks(9, (0.1, 0.1, 0.1), (16, 20, 38, 54)), ("10.4", "9.4")
    ),
    "ResNet-56-B": Published(
        (ResNet, 9),
        "9.091e7",
        "7.32e5",
        first_of_blocks(9, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
        ("27.6", "13.8"),
    ),
    "ResNet-110-A": Published(
        (ResNet, 18), "2.128e8", "1.681e6", first_of_blocks(18, (0.5, 0, 0), (36,)), ("15.9", "2.3")
    ),
    "ResNet-110-B": Published(
        (ResNet, 18), "1.551e8", "1.162e6", first_of_blocks(18, (0.5, 0.4, 0.3), (36, 38, 74)), ("38.7", "32.5")
    ),
}


def figures(cost: Cost) -> tuple[int, int]:
    """MACs and params of the convolutions and linear layers."""
    rows = [row for row in cost.table if row.kind in ("Conv2d", "Linear")]
    return sum(row.macs for row in rows), sum(row.params for row in rows)


def printed(value: int, like: str) -> str:
    """A number with as many digits as the paper prints."""
    digits = len(like.partition("e")[0].partition(".")[2])
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def convolutions(model: nn.Module) -> Iterator[tuple[int, str, nn.Conv2d]]:
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    return ((number, name, layer) for number, (name, layer) in enumerate(found, start=1))


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_li_et_al_table_1(row: Published) -> None:
    model, x = row.build().eval(), torch.randn(1, 3, 32, 32)
    dense = figures(count(model, x))
    layers = {number: (name, layer.out_channels) for number, name, layer in convolutions(model)}
    assert set(row.pruned) <= set(layers)
    small: nn.Module = model
    if row.pruned:
        sparsity = {}
        for number, share in row.pruned.items():
            name, width = layers[number]
            kept = int(width * (1 - share))  # the paper's count; the pass removes int(width * s)
            sparsity[name] = (width - kept + 0.5) / width
        passes = [L1FilterPruner(sparsity), Speedup()]
        small = compress(model, passes, example_inputs=x, verify=False)
        for number, name, layer in convolutions(small):
            width = layers[number][1]
            assert layer.out_channels == int(width * (1 - row.pruned.get(number, 0))), name
    macs, params = figures(count(small, x))
    assert (printed(macs, row.macs), printed(params, row.params)) == (row.macs, row.params)
    if row.pruned:
        shares = (1 - macs / dense[0], 1 - params / dense[1])
        assert tuple(f"{100 * share:.1f}" for share in shares) == row.removed
