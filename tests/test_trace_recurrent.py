"""Capture: recurrent layers that are no plain leaves, and modes that are given to operators of ATen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup

X = torch.randn(3, 4)


class Outputs(nn.LSTM):
    """A subclass, which is written out."""

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, hx)[0]
        return out


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    return First(layer)


def normed(layer: nn.Module) -> nn.Module:
    return First(parametrizations.weight_norm(layer, "weight_hh_l0"))


def normed_by_hook(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return First(nn.utils.weight_norm(layer, "weight_ih_l0"))


OPTIONS: dict[str, Any] = {"num_layers": 2, "dropout": 0.5, "batch_first": True}
RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Outputs(4, 6, **OPTIONS),
    "hook": lambda: hooked(nn.GRU(4, 6, **OPTIONS)),
    "hook of two directions": lambda: hooked(nn.RNN(4, 3, bidirectional=True, **OPTIONS)),
    "parametrized": lambda: normed(nn.GRU(4, 6, **OPTIONS)),
    "weight norm": lambda: normed_by_hook(nn.LSTM(4, 6, **OPTIONS)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_layers_that_are_written_out(make: Callable[[], nn.Module], training: bool) -> None:
    model = nn.Sequential(make(), nn.Linear(6, 2)).train(training)
    traced = fxcompress.trace(model, torch.randn(2, 3, 4))
    assert not traced.meta["opaque"]
    assert list(traced.state_dict()) == list(model.state_dict())
    for mode in (True, False, True):
        model.train(mode)
        traced.train(mode)
        x = torch.randn(3, 5, 4)
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        assert_same(expected, traced(x))


@pytest.mark.parametrize("make", list(RECURRENT.values())[:3], ids=list(RECURRENT)[:3])
def test_units_of_recurrent_layers_that_are_written_out(make: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(make(), nn.Linear(6, 2)).double().eval(), torch.randn(2, 3, 4).double()
    masked = fxcompress.compress(model, [L1FilterPruner(0.5)], example_inputs=x)
    removed: Any = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    assert removed.get_submodule("1").weight.shape[1] < 6
    x = torch.randn(4, 2, 4).double()
    torch.testing.assert_close(masked(x), removed(x), rtol=1e-9, atol=1e-9)


class Native(nn.Module):
    """Passes its mode to operators of ATen, which take nothing but a bool, next to a literal one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(self.fc(x), 0.5, self.training) + F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_a_mode_that_is_given_to_aten(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Native()).train(training)
    traced = fxcompress.trace(model, X)
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        torch.manual_seed(5)
        expected = model(X)
        torch.manual_seed(5)
        assert_same(expected, traced(X))
