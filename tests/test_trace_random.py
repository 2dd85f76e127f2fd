"""Capture: random paths, of which some are dropped for the time of a step."""

import random
from collections.abc import Callable
from typing import Any

import model_zoo  # noqa: F401  torchvision is importable after it
import numpy as np
import pytest
import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup


class Floored(nn.Module):
    """Stochastic depth by a floor of random numbers, the batch's size by ``x.shape[0]``."""

    def forward(self, x: Tensor) -> Tensor:
        keep = 0.6 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x / 0.6 * keep.floor_() if self.training else x


class Residual(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.drop, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), drop, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.drop(self.body(x)))
        return out


PATHS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: DropPath(0.5),
    "timm unscaled": lambda: DropPath(0.3, scale_by_keep=False),
    "torchvision rows": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
    "torchvision batch": lambda: torchvision.ops.StochasticDepth(0.5, "batch"),
    "floor": Floored,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("make", PATHS.values(), ids=PATHS)
def test_a_random_path_is_recorded_as_what_it_computes(make: Callable[[], nn.Module], batch: int) -> None:
    model, example = Residual(make()).train(), torch.randn(batch, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"asks for self\.training"):
        traced = fxcompress.trace(model, example)
    assert traced.meta["batched"] == ("x",)
    with pytest.warns(UserWarning, match=r"asks for self\.training"):
        pruned: Any = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=example)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 3, 2, 2)
        torch.manual_seed(rows)
        expected = model(x)
        torch.manual_seed(rows)
        torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
        assert pruned(x).shape == expected.shape
    assert pruned.stem.weight.shape[0] == 2


def test_a_path_that_python_chooses_is_named() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if random.random() < 0.5 else x * float(np.random.rand())  # noqa: NPY002

    before = random.getstate()
    with pytest.warns(UserWarning, match=r"draws numbers from .*Draw from torch"):
        fxcompress.trace(nn.Sequential(nn.Linear(4, 4), Chosen()), torch.randn(3, 4))
    assert random.getstate() == before
