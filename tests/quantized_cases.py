"""Networks and numbers of the quantizers' tests."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress.quantization.fake_quantize import FakeQuantize

Array = NDArray[Any]


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).float()


X = values(4, 3, 6, 6)


class Network(nn.Module):
    """Residual, depthwise and grouped convolutions, a concatenation, odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.norm1 = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.BatchNorm2d(10)
        self.grouped, self.norm2 = nn.Conv2d(10, 10, 1, groups=2), nn.BatchNorm2d(10)
        self.side = nn.Conv2d(10, 7, 1)
        self.last = nn.Linear(17, 5)
        generator = torch.Generator().manual_seed(3)
        for norm in (self.norm, self.norm1, self.norm2):
            norm.running_mean = torch.randn(10, generator=generator) * 0.3
            norm.running_var = torch.rand(10, generator=generator) + 0.5
            norm.weight.data = torch.rand(10, generator=generator) + 0.5
            norm.bias.data = torch.randn(10, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm1(self.depthwise(x)).relu()
        x = (self.norm2(self.grouped(y)) + x).relu()
        return self.last(torch.cat([x, self.side(x).relu()], 1).mean((2, 3)))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


def normed() -> nn.Module:
    """A convolution with a BatchNorm of which some factors are negative, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 4)).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(values(7, seed=1) * 0.3)
        norm.running_var.copy_(values(7, seed=2).abs() + 0.5)
        norm.weight.copy_(values(7, seed=3))
        norm.bias.copy_(values(7, seed=4))
    return model


def quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    return {name: item for name, item in module.named_modules() if isinstance(item, FakeQuantize)}


def module_of(made: nn.Module, name: str) -> FakeQuantize:
    found = made.get_submodule(f"_quant.{name}")
    assert isinstance(found, FakeQuantize)
    return found
