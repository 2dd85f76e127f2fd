"""Masked models whose statistics run over channels merged with space hold at resolutions they were not masked at."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import masks, trace
from fxcompress.masking import lift
from fxcompress.nodes import live_index
from fxcompress.passes import L1FilterPruner, RandomFilterPruner, Speedup

Statistic = Callable[[Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    """Softmax over 4 channels and all positions of each of 3 rows; rows lose different channels."""
    batch, channels, height, width = x.shape
    y = x.reshape(batch, 3, channels // 3 * height * width).softmax(2)
    return y.reshape(batch, channels, height, width) * height * width


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """``x`` times a number for each image."""
    return x * by.reshape(-1, 1, 1, 1)


STATISTICS: dict[str, Statistic] = {
    "norm": lambda x: scaled(x, x.flatten(1).norm(dim=1)),
    "mean": lambda x: scaled(x, x.flatten(1).mean(1)),
    "variance behind an activation": lambda x: scaled(x, F.relu(x.flatten(1) + 1).var(1)),
    "sum of exponentials": lambda x: scaled(x, x.reshape(x.shape[0], -1).exp().mean(1)),
    "softmax, and back": lambda x: x.flatten(1).softmax(1).reshape(x.shape) * x.shape[2] * x.shape[3],
    "maximum, space first": lambda x: scaled(x, x.permute(0, 2, 3, 1).flatten(1).amax(1)),
    "product with itself": lambda x: scaled(x, torch.einsum("bi,bi->b", x.exp().flatten(1), x.flatten(1))),
    "padded space": lambda x: scaled(x, F.pad(x, (1, 1)).flatten(1).std(1)),
    "rows of channels": heads,
    "batch in front, space behind": lambda x: (1 / (x.reshape(-1, x.shape[3]).abs() + 1)).reshape(x.shape),
}


def network(statistic: Statistic) -> Net:
    return Net(
        lambda m, x: m.head(statistic(m.norm(m.stem(x))).mean((2, 3))),
        stem=nn.Conv2d(3, 12, 3, 2, 1),
        norm=nn.BatchNorm2d(12),
        head=nn.Linear(12, 5),
    )


@torch.no_grad()
def evaluated(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    assert isinstance(result, Tensor)
    return result


def by_hand(model: Net, statistic: Statistic, live: Tensor) -> nn.Module:
    """The network with its dead channels left out by indexing."""
    made = copy.deepcopy(model)
    made.step = lambda m, x: F.linear(
        statistic(m.norm(m.stem(x))[:, live]).mean((2, 3)), m.head.weight[:, live], m.head.bias
    )
    return made


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", STATISTICS)
def test_other_resolutions(name: str, batch: int) -> None:
    model = network(STATISTICS[name]).double()
    example = torch.randn(batch, 3, 8, 10).double()
    masked = fxcompress.compress(model, [RandomFilterPruner(0.4)], example_inputs=example)
    kept = masks(masked)["norm.weight"]
    assert 0 < int(kept.sum()) < 12
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=example)
    right = by_hand(model, STATISTICS[name], kept.nonzero().reshape(-1))
    for shape in ((batch, 3, 8, 10), (5, 3, 8, 10), (3, 3, 14, 6), (1, 3, 5, 5)):
        x = torch.randn(shape).double()
        expected = evaluated(right, x)
        torch.testing.assert_close(evaluated(masked, x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(evaluated(removed, x), expected, rtol=1e-9, atol=1e-9)


SIDE_BY_SIDE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "one resolution": lambda m, x: torch.cat((m.a(x).flatten(1), m.b(x).flatten(1)), 1),
    "two resolutions": lambda m, x: torch.cat((m.a(x).flatten(1), m.b(F.avg_pool2d(x, 2)).flatten(1)), dim=1),
    "around the image": lambda m, x: torch.concat([m.a(x).flatten(1), x.flatten(1), m.b(x).flatten(1)], 1),
    "twice": lambda m, x: torch.cat((m.a(x).flatten(1), m.a(x).flatten(1).exp()), 1),
    "behind an activation": lambda m, x: torch.cat((m.a(x).relu().flatten(1), m.b(x).flatten(1)), 1).sigmoid(),
    "stacked": lambda m, x: torch.stack((m.a(x).flatten(1), m.c(x).flatten(1)), 1).flatten(1),
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_maps_side_by_side(name: str) -> None:
    """Of 7 channels 2 go, of 9 in the other map 3, so that with two resolutions no one fraction of elements lives."""
    join = SIDE_BY_SIDE[name]
    net = Net(
        lambda m, x: torch.stack((join(m, x).norm(dim=1), join(m, x).softmax(1).square().sum(1))),
        a=nn.Conv2d(3, 7, 1), b=nn.Conv2d(3, 9, 1), c=nn.Conv2d(3, 7, 1),
    ).double()  # fmt: skip
    example = torch.randn(2, 3, 8, 10).double()
    masked = fxcompress.compress(net, [RandomFilterPruner(0.34)], example_inputs=example)
    assert int(masks(masked)["a.bias"].sum()) == 5
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=example)
    for shape in ((5, 3, 8, 10), (3, 3, 14, 6), (1, 3, 5, 5), (1, 3, 16, 20)):
        x = torch.randn(shape).double()
        torch.testing.assert_close(evaluated(masked, x), evaluated(removed, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave", "expand to the image"])
def test_what_a_literal_repeats_has_constant_places(repeat: str) -> None:
    """As keys and values are, that several heads share; what a size repeats has not."""

    def step(m: Net, x: Tensor) -> Tensor:
        y = m.stem(x)
        if repeat == "expand":
            wide = y.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2)
        elif repeat == "repeat_interleave":
            wide = y.repeat_interleave(3, dim=1)
        else:
            wide = y.mean((2, 3))[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3]).flatten(1)[:, :, None, None]
        return m.head((y * wide.exp().norm(dim=1, keepdim=True)).mean((2, 3)))

    model = Net(step, stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 5)).double()
    example, x = torch.randn(2, 3, 8, 10).double(), torch.randn(3, 3, 7, 6).double()
    masked = fxcompress.compress(model, [RandomFilterPruner(0.5)], example_inputs=example)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=example)
    torch.testing.assert_close(evaluated(masked, x), evaluated(removed, x), rtol=1e-9, atol=1e-9)
    searched = any(node.target is live_index for node in masked.graph.nodes)
    assert searched == (repeat == "expand to the image")


@pytest.mark.parametrize("name", STATISTICS)
def test_masks_come_off_without_a_trace(name: str) -> None:
    model, example = network(STATISTICS[name]), torch.randn(2, 3, 8, 10)
    masked = fxcompress.compress(model, [RandomFilterPruner(0.4)], example_inputs=example)
    lift(masked)
    clean = trace(model, example)
    assert str(masked.graph) == str(clean.graph)
    assert masked.state_dict().keys() == clean.state_dict().keys()
    assert [key for key, _ in masked.named_buffers()] == [key for key, _ in clean.named_buffers()]


def test_gradients_reach_live_channels_alone() -> None:
    model, example = network(STATISTICS["norm"]).double(), torch.randn(2, 3, 8, 10).double()
    masked = fxcompress.compress(model, [L1FilterPruner(0.5)], example_inputs=example)
    kept = masks(masked)["norm.weight"]
    right, x = by_hand(model, STATISTICS["norm"], kept.nonzero().reshape(-1)), torch.randn(3, 3, 12, 6).double()
    for item in (masked, right):
        item(x).square().sum().backward()
    for (key, one), (_, other) in zip(masked.named_parameters(), right.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    "name, form",
    [
        ("softmax, and back", "masked"),
        pytest.param("softmax, and back", "removed", marks=pytest.mark.long),
        pytest.param("norm", "masked", marks=pytest.mark.long),
        pytest.param("rows of channels", "masked", marks=pytest.mark.long),
    ],
)
def test_exports_with_a_dynamic_resolution(name: str, form: str) -> None:
    model, example = network(STATISTICS[name]), torch.randn(2, 3, 8, 10)
    passes = [L1FilterPruner(0.5)] if form == "masked" else [L1FilterPruner(0.5), Speedup()]
    made = fxcompress.compress(model, passes, example_inputs=example)
    dynamic = {0: torch.export.Dim("batch"), 2: 2 * torch.export.Dim("height"), 3: 2 * torch.export.Dim("width")}
    exported = torch.export.export(made, (example,), dynamic_shapes=(dynamic,), strict=False)
    for shape in ((3, 3, 8, 10), (1, 3, 14, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(evaluated(exported.module(), x), evaluated(made, x))


@pytest.mark.parametrize(
    "dead, dim, kept, size, rows, expected",
    [
        ([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1]], 1, 1, 3, (), [2, 3]),
        ([[0, 1, 0], [1, 1, 1]], 0, 1, 2, (), [0]),
        ([[1, 0, 0, 1], [0, 1, 1, 0]], 1, 1, 2, (0,), [[1, 2], [0, 3]]),
        ([[0, 0, 0]], 1, 1, 1, (), [0, 1, 2]),
        ([[1, 0, 0, 1, 0]], 1, 0, 1, (), [1, 2, 4]),
    ],
)
def test_live_index(
    dead: list[list[int]], dim: int, kept: int, size: int, rows: tuple[int, ...], expected: list[Any]
) -> None:
    assert live_index(torch.tensor(dead), dim, kept, size, rows).tolist() == expected
