"""Neither a recording nor an analysis needs the values of products: with and without them they find the same."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from model_zoo import build
from removal import NETWORKS
from torch import Tensor, nn

import fxcompress
from fxcompress.channels import propagate
from fxcompress.testing import Spec, inputs, network

TRACE = import_module("fxcompress.trace")


def computing(patch: pytest.MonkeyPatch, *, computes: bool | None = None) -> list[bool]:
    """What recordings and analyses are told about computing from now on; what they were asked to do is replaced."""
    told: list[bool] = []

    def spy(right: Any, *args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["computes"])
        return right(*args, **(kwargs if computes is None else {**kwargs, "computes": computes}))

    for module, name in ((TRACE, "_record_with"), (propagate, "_propagate")):
        patch.setattr(module, name, partial(spy, getattr(module, name)))
    return told


def found(model: nn.Module, x: Any) -> tuple[str, str, list[str], list[str]]:
    """The recorded graph, the groups, and the ledger's equalities and freezes."""
    traced = fxcompress.trace(model, x)
    groups = fxcompress.channel_groups(traced, x)
    ledger = groups.channels.facts.ledger
    equalities = [f"{e.node} {e.left.tolist()} {e.right.tolist()}" for e in ledger.equalities]
    return traced.code, str(groups), equalities, [f"{f.node} {f.reason}" for f in ledger.freezes]


MODELS = ["resnet18", "mobilenet_v2", "densenet121", "efficientnet_v2_s", "convnext_tiny", "shufflenet_v2_x1_0"]


@pytest.mark.parametrize("name", [*MODELS[:2], *(pytest.param(name, marks=pytest.mark.long) for name in MODELS[2:])])
def test_real_models_need_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name)
    told = computing(monkeypatch)
    without = found(model, x)
    assert told
    assert not any(told), "nothing had to be computed"
    monkeypatch.undo()
    computing(monkeypatch, computes=True)
    assert found(model, x) == without


@given(spec=NETWORKS)
def test_generated_networks_need_no_values(spec: Spec) -> None:
    model, x = network(spec), inputs(spec)
    without = found(model, x)
    with pytest.MonkeyPatch.context() as patch:
        computing(patch, computes=True)
        assert found(model, x) == without


class Chooses(nn.Module):
    """A submodule that looks at values, behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 5, 3), Gate(), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.conv(x)))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.abs().mean()) > 1e6 else x + 1


def test_a_module_that_looks_at_values_is_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Chooses().eval(), torch.randn(2, 3, 6, 6)
    told = computing(monkeypatch)
    with pytest.warns(UserWarning, match="gate stays as it is"):
        traced = fxcompress.trace(model, x)
    assert told == [False, True] * 2, "the first recording met the read, and so did the one under the compiling flag"
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


def test_what_does_not_fit_fails_as_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    told = computing(monkeypatch)
    with pytest.raises(fxcompress.InputError, match="to have 3 channels, but got 4"):
        fxcompress.trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), torch.randn(2, 4, 6, 6))
    with pytest.raises(fxcompress.InputError, match="mat1 and mat2"):
        fxcompress.trace(nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2)), torch.randn(2, 3))
    assert told == [False, True, False, True]
