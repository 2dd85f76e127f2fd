"""Networks whose compressed forms must be ordinary modules, masked and removed, and how they were compressed."""

import copy
from collections.abc import Callable
from functools import cache

import model_zoo
import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

import fxcompress
from fxcompress.module import TracedModule
from fxcompress.passes import L1FilterPruner, LevelPruner, Speedup


class Residual(nn.Module):
    """Convolutions with BatchNorm, a depthwise block with a squeeze-excite gate, residual sums; odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 14, 3, 2, 1, bias=False), nn.BatchNorm2d(14)
        self.expand, self.expand_norm = nn.Conv2d(14, 22, 1, bias=False), nn.BatchNorm2d(22)
        self.depthwise, self.depthwise_norm = nn.Conv2d(22, 22, 3, 1, 1, groups=22), nn.BatchNorm2d(22)
        self.squeeze, self.excite = nn.Conv2d(22, 6, 1), nn.Conv2d(6, 22, 1)
        self.project, self.project_norm = nn.Conv2d(22, 14, 1, bias=False), nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.hardswish(self.expand_norm(self.expand(x)))
        y = F.silu(self.depthwise_norm(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project_norm(self.project(y))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shuffle(nn.Module):
    """A channel shuffle between a grouped and a depthwise convolution, a split and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 16, 3, 1, 1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.branch = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.norm(self.stem(x)))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        left, right = F.relu(self.depthwise(x)).chunk(2, dim=1)
        x = torch.cat((left, F.relu(self.branch(right))), dim=1)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patches with a class token; one block with ``nn.MultiheadAttention``, one with fused projections; no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 26), nn.Linear(26, 16)
        self.qkv, self.out = nn.Linear(16, 3 * 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norms[2](x)).reshape(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return self.head(self.norms[3](x)[:, 0])


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=7)


_SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (Residual, 16),
    "shuffle": (Shuffle, 16),
    "transformer": (Transformer, 16),
    "vit": (_vit, 32),
}
FAST = ("residual", "shuffle", "transformer")
LARGE = ("vit", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0")
FORMS = ("masked", "removed")


def cases(*quick: tuple[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with ``name, form`` for every network, masked and removed: these always, others in long sweeps."""
    params = [
        pytest.param(name, form, id=f"{name}-{form}", marks=() if (name, form) in quick else pytest.mark.long)
        for name in (*FAST, *LARGE)
        for form in FORMS
    ]
    return pytest.mark.parametrize("name, form", params)


every_case = cases(*((name, form) for name in FAST for form in FORMS))


@cache
def _built(name: str) -> tuple[nn.Module, Tensor]:
    if name not in _SMALL:
        return model_zoo.build(name)
    kind, side = _SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
    model_zoo.randomize(model, 0)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    model_zoo.calibrate(model, x)
    return model, x


@cache
def _compressed(name: str, form: str) -> TracedModule:
    model, x = _built(name)
    if form == "masked":
        return fxcompress.compress(model, [L1FilterPruner(0.5), LevelPruner(0.1)], example_inputs=x)
    return fxcompress.compress(_compressed(name, "masked"), [Speedup()], example_inputs=x)


def dense(name: str) -> nn.Module:
    """A fresh copy of a network in eval mode, weights and statistics away from their defaults."""
    return copy.deepcopy(_built(name)[0])


def compressed(name: str, form: str) -> TracedModule:
    """A fresh copy of the network with half its channels and some of its weights ``"masked"``, or ``"removed"``."""
    return copy.deepcopy(_compressed(name, form))


def images(name: str, batch: int, seed: int = 1) -> Tensor:
    """A batch, (batch, 3, side, side)."""
    return torch.randn(batch, *_built(name)[1].shape[1:], generator=torch.Generator().manual_seed(seed))


def example(name: str) -> Tensor:
    """The batch that the network was compressed with, (2, 3, side, side)."""
    return _built(name)[1]
