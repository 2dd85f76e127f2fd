"""What calibration repairs after rounding, by the equations: columns, AdaRound, bias correction, equalization."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import Task, compress
from fxcompress.passes import PTQQuantizer
from fxcompress.quantization.columns import Product
from fxcompress.quantization.equalize import equalize
from fxcompress.quantization.sites import find_sites


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(7, 5), (3, 4, 7)),
    (nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), (3, 6, 9)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 7, 8)),
    (nn.Conv2d(4, 4, (4, 3), padding="same", groups=4), (2, 4, 7, 8)),
    (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(1, 0, 1)), (2, 2, 4, 5, 3)),
    (nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 3)),
]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda item: str(item) if isinstance(item, nn.Module) else "")
def test_columns_times_matrix_is_what_the_layer_gives(layer: nn.Module, shape: tuple[int, ...]) -> None:
    made = compress(nn.Sequential(layer).eval(), [PTQQuantizer()], example_inputs=values(*shape))
    (site,) = find_sites(made)
    weight, x = layer.get_parameter("weight").detach(), values(*shape, seed=1)
    product = Product.of(site, weight)
    found = product.columns(x, 10_000, torch.Generator().manual_seed(0))
    assert found.shape[::2] == (product.groups, product.length)
    with torch.no_grad():
        wanted = layer(x) - (layer(torch.zeros_like(x)))
    linear = isinstance(layer, nn.Linear)
    channels = wanted.movedim(-1 if linear else 1, 0).flatten(1)  # [channels, positions]
    mine = torch.bmm(found, product.matrix(weight)).movedim(1, 2).reshape(len(channels), -1)
    order = [np.lexsort(item.round(decimals=4).numpy()) for item in (channels, mine)]  # positions come in any order
    torch.testing.assert_close(mine[:, order[1]], channels[:, order[0]], rtol=1e-3, atol=2e-4)
    assert product.columns(x, 3, torch.Generator()).shape[1] == 3


class Pair(nn.Module):
    """Two convolutions and a classifier, without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2, groups=1, bias=False)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


X = values(12, 3, 9, 9).cumsum(-1)  # neighbours alike: of white noise, rounding to nearest is best


def outputs(made: nn.Module, name: str, x: Tensor) -> Tensor:
    class Stop(torch.fx.Interpreter):
        found: Any = None

        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.name == name:
                self.found = result
            return result

    interpreter = Stop(made)  # type: ignore[arg-type]
    interpreter.run(x)
    assert isinstance(interpreter.found, Tensor)
    return interpreter.found


@pytest.mark.parametrize("batch", [12, 5])
def test_bias_correction_takes_the_mean_error_out(batch: int) -> None:
    model = Pair().eval()
    task = Task(batches=list(X.split(batch)))
    plain = compress(model, [PTQQuantizer(3, None)], example_inputs=X, task=task)
    made = compress(model, [PTQQuantizer(3, None, bias_correction=True)], example_inputs=X, task=task)
    with torch.no_grad():
        for name, reads in (("first", X), ("second", F.relu(outputs(plain, "first", X)))):
            weight = model.get_parameter(f"{name}.weight")
            rounded = plain.get_submodule(f"_quant.{name}.weight")(weight)
            stride = 2 if name == "second" else 1
            error = F.conv2d(reads, rounded - weight, stride=stride).double().numpy().mean((0, 2, 3))
            bias = dict(model.named_parameters()).get(f"{name}.bias")
            before = np.zeros(5) if bias is None else bias.double().numpy()
            np.testing.assert_allclose(made.get_parameter(f"{name}.bias").numpy(), before - error, atol=1e-5)
    assert "adds second.bias" in " ".join(made.meta["history"][-1].notes)


def test_biases_are_corrected_for_what_adaround_changed() -> None:
    model, task = Pair().eval(), Task(batches=[X])
    options: Any = {"adaround": True, "iterations": 20}
    plain = compress(model, [PTQQuantizer(3, None, **options)], example_inputs=X, task=task)
    made = compress(model, [PTQQuantizer(3, None, **options, bias_correction=True)], example_inputs=X, task=task)
    with torch.no_grad():
        for name, reads in (("first", X), ("second", F.relu(outputs(plain, "first", X)))):
            weight, rounded = model.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight")
            error = F.conv2d(reads, rounded - weight, stride=2 if name == "second" else 1).double().mean((0, 2, 3))
            bias = dict(model.named_parameters()).get(f"{name}.bias", torch.zeros(5))
            assert float(error.abs().max()) > 1e-3
            torch.testing.assert_close(made.get_parameter(f"{name}.bias").double(), bias - error, rtol=0, atol=1e-5)
            assert torch.equal(made.get_parameter(f"{name}.weight"), rounded)


def test_adaround_rounds_up_or_down_and_better_than_to_nearest() -> None:
    model = Pair().eval()
    task = Task(batches=[X])
    plain = compress(model, [PTQQuantizer(3, None)], example_inputs=X, task=task)
    made = compress(model, [PTQQuantizer(3, None, adaround=True, iterations=400)], example_inputs=X, task=task)
    with torch.no_grad():
        for name in ("first", "second", "last"):
            quantizer = made.get_submodule(f"_quant.{name}.weight")
            scale = quantizer.grid().scale.reshape(-1, *[1] * (model.get_parameter(f"{name}.weight").dim() - 1))  # type: ignore[operator]
            steps = (model.get_parameter(f"{name}.weight") / scale).numpy()
            learned = (made.get_parameter(f"{name}.weight") / scale).numpy()
            np.testing.assert_allclose(learned, np.rint(learned), atol=1e-4)
            assert bool((np.abs(learned - steps) < 1 + 1e-4).all())
        weight = model.get_parameter("first.weight")
        errors = [
            float(
                (
                    F.conv2d(X, m.get_submodule("_quant.first.weight")(m.get_parameter("first.weight")) - weight) ** 2
                ).mean()
            )
            for m in (plain, made)
        ]
    assert errors[1] < 0.75 * errors[0]


def test_equalization_is_the_equation_and_changes_nothing() -> None:
    model = Pair().eval()
    with torch.no_grad():
        model.first.weight.mul_(torch.logspace(-2, 2, 6).reshape(-1, 1, 1, 1))
        model.second.weight[:, 2] = 0.0
        wanted = model(X)
    traced = fxcompress.trace(model, X)
    one, two = (traced.get_parameter(f"{name}.weight").detach().double().numpy() for name in ("first", "second"))
    assert equalize(traced, "test") == 1
    ranges = np.abs(one).max((1, 2, 3)), np.abs(two).max((0, 2, 3))
    scale = np.array([np.sqrt(a / b) if b else 1.0 for a, b in zip(*ranges, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(traced(X), wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            traced.get_parameter("first.weight").numpy(), one / scale[:, None, None, None], rtol=1e-5
        )
        np.testing.assert_allclose(traced.get_parameter("second.weight").numpy(), two * scale[:, None, None], rtol=1e-5)


@pytest.mark.parametrize(
    "layers, shape, pairs",
    [
        ((nn.Linear(8, 8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 4)), (5, 8), 0),
        ((nn.Linear(8, 8), nn.MaxPool1d(2), nn.Linear(4, 2)), (5, 8), 0),
        ((nn.Linear(8, 8), nn.AdaptiveAvgPool1d(8), nn.Linear(8, 4)), (5, 3, 8), 0),
        ((nn.Linear(8, 6), nn.LeakyReLU(0.2), nn.Dropout(), nn.Identity(), nn.Linear(6, 4)), (5, 8), 1),
        ((nn.Conv1d(3, 6, 3), nn.MaxPool1d(2), nn.ReLU(), nn.Conv1d(6, 4, 1)), (5, 3, 9), 1),
        ((nn.Conv1d(3, 6, 3), nn.MaxPool2d(3, 1, 1), nn.Conv1d(6, 4, 1)), (5, 3, 9), 0),  # over channels as well
        ((nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 6, 1, groups=6)), (5, 3, 9, 9), 1),
    ],
    ids=lambda item: (
        "-".join(type(layer).__name__ for layer in item)
        if isinstance(item, tuple) and isinstance(item[0], nn.Module)
        else ""
    ),
)
def test_equalization_follows_what_keeps_channels_apart(
    layers: tuple[nn.Module, ...], shape: tuple[int, ...], pairs: int
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*layers).eval(), values(*shape)
    with torch.no_grad():
        first = model[0].get_parameter("weight")
        first.copy_(values(*first.shape, seed=1))
        first.mul_(torch.logspace(-2, 2, len(first)).reshape(-1, *[1] * (first.dim() - 1)))
        wanted = model(x)
        traced = fxcompress.trace(model, x)
        assert equalize(traced, "test") == pairs
        torch.testing.assert_close(traced(x), wanted, rtol=1e-4, atol=1e-5)
    made = compress(model, [PTQQuantizer(equalize=True)], example_inputs=x)
    assert f"{pairs} pairs of layers equalized" in made.meta["history"][-1].notes
