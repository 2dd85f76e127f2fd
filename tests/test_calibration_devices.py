"""What calibration makes lies where what it sees does. Tests have no second device that computes: tensors that are made
without saying where go to the meta device, which mixes with no other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from quantized_cases import X, small_network, values
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxcompress import Context, Task, TracedModule, compress
from fxcompress.passes import MSE, Entropy, LSQQuantizer, MinMax, MovingAverage, Percentile, PTQQuantizer, QATQuantizer
from fxcompress.passes.quantizer import Quantizer
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.observers import Observer
from fxcompress.quantization.spec import activation_spec, weight_spec

SEEN = [values(6, 500, seed=1) ** 3, values(6, 500, seed=2) ** 3 * 3]


def ranges(observer: Observer, axis: int | None, weight: bool) -> tuple[Tensor, ...]:
    """A calibrator's whole life."""
    spec = weight_spec(4, axis=axis, observer=observer) if weight else activation_spec(4, observer)
    calibrator = Calibrator("here", spec)
    for place, batch in enumerate(SEEN * 2):
        calibrator.see(batch, place % 2)
    return *calibrator.range(), calibrator.magnitude


@pytest.mark.parametrize("axis, weight", [(None, False), (None, True), (0, True)])
@pytest.mark.parametrize(
    "observer", [MinMax(), MovingAverage(), Percentile(99.0), Entropy(), MSE(20)], ids=lambda o: type(o).__name__
)
def test_observers_stay_where_their_values_are(observer: Observer, axis: int | None, weight: bool) -> None:
    wanted = ranges(observer, axis, weight)
    with torch.device("meta"):
        found = ranges(observer, axis, weight)
    assert all(tensor.device == SEEN[0].device for tensor in found)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_sums_of_half_precision_hold_many_values() -> None:
    calibrator = Calibrator("here", activation_spec(8, MinMax()))
    for _ in range(2):
        calibrator.see(torch.full((70_000,), 2.0, dtype=torch.float16))
    assert float(calibrator.magnitude) == 2


FACTORIES = {
    getattr(torch, name) for name in "zeros ones full empty arange tensor eye rand randn randint randperm".split()
}


class Elsewhere(TorchFunctionMode):
    """Sends what ``fxcompress.quantization`` makes without saying where to the meta device.

    Fake-quant modules are made on the host, and moved as a whole.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        mine = caller.startswith("fxcompress.quantization.") and not caller.endswith(".fake_quantize")
        if mine and func in FACTORIES and "device" not in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class Kinds(nn.Module):
    """A convolution with groups, a transposed one, a linear layer; two without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, groups=3, bias=False)
        self.second, self.last = nn.ConvTranspose2d(6, 4, 2), nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return made


REPAIRED: dict[str, Any] = {"adaround": True, "iterations": 8, "bias_correction": True}


@pytest.mark.parametrize(
    "item",
    [
        PTQQuantizer(4, **REPAIRED, equalize=True),
        PTQQuantizer(4, observer="entropy", weight_observer="mse", **REPAIRED),
        PTQQuantizer(4, observer="mse", weight_observer="entropy", per_channel=False),
        QATQuantizer(4),
        LSQQuantizer(4),
    ],
    ids=lambda item: type(item).__name__,
)
@pytest.mark.parametrize("make", [Kinds, small_network], ids=lambda make: make.__name__)
def test_quantizers_say_where_they_make_tensors(item: Quantizer, make: Any) -> None:
    task = Task(batches=[X, X * 2])
    plain = compress(make().eval(), [item], example_inputs=X, task=task).state_dict()
    with Elsewhere():
        made = compress(make().eval(), [item], example_inputs=X, task=task).state_dict()
    assert plain.keys() == made.keys()
    assert [name for name, tensor in plain.items() if not torch.equal(tensor, made[name])] == []


def test_layers_are_repaired_where_the_batches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def placed(module: nn.Module, device: object) -> Iterator[None]:
        said.append(f"to {device}")
        yield
        said.append("back")

    class Noting(PTQQuantizer):
        def finish(self, module: TracedModule, context: Context, seen: dict[str, Calibrator]) -> None:
            said.append("repaired")
            super().finish(module, context, seen)

    monkeypatch.setattr("fxcompress.passes.quantizer.placed", placed)
    compress(Kinds().eval(), [Noting(4, **REPAIRED)], example_inputs=X, task=Task(batches=[X], device="cpu"))
    assert said == ["to cpu", "repaired", "back"]
