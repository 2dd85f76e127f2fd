"""Capture: what a forward did, on sizes, inputs and outputs other than the example's."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exact import assert_same
from torch import Tensor, nn

import fxcompress

Step = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A convolution, a linear layer over its channels, and a forward that each test writes for itself."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 6)
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(self, x)


def check(model: nn.Module, shape: Sequence[int], *others: Sequence[int]) -> fxcompress.TracedModule:
    """Trace at one shape; equal there and at every other shape."""
    model.eval()
    traced = fxcompress.trace(model, torch.randn(*shape))
    for each in (shape, *others):
        x = torch.randn(*each)
        assert_same(model(x), traced(x))
    return traced


def tokens(net: Net, x: Tensor) -> Tensor:
    b, c, h, w = net.conv(x).shape
    return net.fc(net.conv(x).view(b, c, h * w).transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)


def windows(net: Net, x: Tensor) -> Tensor:
    """Padding up to windows of 4, partition, and back again."""
    x = net.conv(x).permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % 4, 0, -h % 4))
    down, across = x.shape[1] // 4, x.shape[2] // 4
    x = x.view(b, down, 4, across, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    x = net.fc(x).view(b, down, across, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, down * 4, across * 4, c)[:, :h, :w]


def coordinates(net: Net, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float()
    return net.conv(torch.cat((x[:, :1], grid.expand(x.shape[0], 2, h, w) / h), 1))


def divmods(net: Net, x: Tensor) -> Tensor:
    half, odd = divmod(x.shape[-1], 2)
    return net.conv(x)[..., : half + odd]


def iterated(net: Net, x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], 1, *x.shape[2:])
    for i, plane in enumerate(net.conv(x).unbind(1)):
        total = total + plane.unsqueeze(1) * (i + 1)
    for i in range(net.conv(x).shape[1]):
        total[:, 0] += net.conv(x)[:, i]
    return total


SIZED: dict[str, Step] = {
    "view": lambda net, x: net.conv(x).view(x.shape[0], 6, -1),
    "len": lambda net, x: net.conv(x).reshape(len(x), -1).sum(1),
    "size method": lambda net, x: net.conv(x).reshape(x.size(0), 6, x.size(2) * x.size(-1)),
    "unpacked": tokens,
    "numel": lambda net, x: net.conv(x).reshape(x.numel() // 3 * 6),
    "prod": lambda net, x: net.conv(x).reshape(x.shape[0], 6, math.prod(x.shape[2:])),
    "sum of sizes": lambda net, x: torch.zeros(sum(x.shape)),
    "power": lambda net, x: net.conv(x)[..., :1].expand(-1, -1, -1, x.shape[3] ** 2),
    "shift": lambda net, x: net.conv(x)[..., : x.shape[3] >> 1],
    "round": lambda net, x: torch.zeros(round(x.shape[2] * 0.75)),
    "flatten": lambda net, x: net.fc(net.conv(x).flatten(2).mean(2)),
    "interpolate": lambda net, x: F.interpolate(F.avg_pool2d(net.conv(x), 2), size=x.shape[2:]),
    "slice": lambda net, x: net.conv(x)[:, :, : x.shape[2] // 2, -(x.shape[3] // 3) :],
    "ceil": lambda net, x: net.conv(x)[:, :, : math.ceil(x.shape[2] / 3)],
    "windows": windows,
    "arange": coordinates,
    "divmod": divmods,
    "iteration": iterated,
    "negative": lambda net, x: net.conv(x)[:, :, : -(-x.shape[2] // 2)],
    "expand": lambda net, x: net.fc(net.fc.bias.expand(x.shape[0], x.shape[2], 6)),
    "new_zeros": lambda net, x: torch.cat((x.new_zeros(x.shape[0], 1, *x.shape[2:]), net.conv(x)), 1),
    "split": lambda net, x: net.conv(x).split(x.shape[2] // 2, dim=2)[0],
    "unflatten": lambda net, x: net.conv(x).flatten(2).unflatten(2, (x.shape[2], x.shape[3])),
    "expand_as": lambda net, x: net.conv(x).mean(1, keepdim=True).expand_as(x) + x,
    "view_as": lambda net, x: net.conv(x).flatten(1).view_as(net.conv(x)),
    "narrow": lambda net, x: net.conv(x).narrow(2, 1, x.shape[2] - 2),
    "roll": lambda net, x: net.conv(x).roll((x.shape[2] // 2, -1), (2, 3)),
    "index": lambda net, x: net.conv(x)[torch.arange(x.shape[0]), 0, x.shape[2] - 1],
    "tensor of a size": lambda net, x: net.conv(x) / torch.tensor([x.shape[2], 1.0]).sum(),
    "tensor of sizes": lambda net, x: net.conv(x) / torch.tensor(x.shape[2:]).prod(),
    "eye": lambda net, x: net.conv(x).flatten(2) @ torch.eye(x.shape[2] * x.shape[3]),
    "mean by hand": lambda net, x: net.conv(x).sum((2, 3)) / (x.shape[2] * x.shape[3]),
}


@pytest.mark.parametrize("step", SIZED.values(), ids=SIZED)
def test_sizes_stay_symbolic(step: Step) -> None:
    traced = check(Net(step), (2, 3, 8, 8), (5, 3, 8, 8), (1, 3, 8, 8), (3, 3, 12, 10))
    assert traced.meta["batched"] == ("x",)


BATCH_LITERAL: dict[str, Step] = {
    "int": lambda net, x: net.conv(x).reshape(int(x.shape[0]), -1),
    "len": lambda net, x: net.conv(x).view(len(x), 6, 64),
    "multiple": lambda net, x: net.fc(net.conv(x).permute(0, 2, 3, 1).reshape(int(x.shape[0]) * 64, 6)),
    "product": lambda net, x: net.conv(x).reshape(int(x.shape[0] * 2), -1),
    "zeros": lambda net, x: net.conv(x) + torch.zeros(int(x.size(0)), 1, 1, 1),
    "index": lambda net, x: net.conv(x)[torch.arange(int(x.shape[0])), 0],
    "list of sizes": lambda net, x: net.conv(x).reshape([int(n) for n in net.conv(x).shape]),
    "keyword": lambda net, x: net.fc.bias.expand(size=(int(x.shape[0]), 6)),
}


@pytest.mark.parametrize("step", BATCH_LITERAL.values(), ids=BATCH_LITERAL)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_batch_that_became_a_plain_integer_is_found_again(step: Step, batch: int) -> None:
    traced = check(Net(step), (batch, 3, 8, 8), (5, 3, 8, 8), (3, 3, 8, 8))
    assert traced.meta["batched"] == ("x",)


def test_literals_that_equal_the_batch_by_chance_stay() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        return net.conv(x).view(int(x.shape[0]), 2, 3, 8, 8).sum(1).repeat(1, 2, 1, 1)

    traced = check(Net(step), (2, 3, 8, 8), (3, 3, 8, 8), (6, 3, 8, 8))
    assert traced.meta["batched"] == ("x",)


def unrolled(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.fc(net.conv(row[None]).mean((2, 3)))[0] for row in x])


def quotient(net: Net, x: Tensor) -> Tensor:
    """Needs a batch that four divides, so that it fails at the next one."""
    pairs = net.conv(x).reshape(int(x.shape[0]) // 4, 4, 6, 64).mean(1)
    return net.fc(pairs.mean(2))


@pytest.mark.parametrize("step, batch", [(unrolled, 2), (quotient, 8)])
def test_where_dimension_0_is_no_batch_nothing_claims_it_is(step: Step, batch: int) -> None:
    traced = check(Net(step), (batch, 3, 8, 8))
    assert traced.meta["batched"] == ()


def test_a_second_recording_leaves_no_state_behind() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        return net.fc(net.conv(x).mean((2, 3))).view(int(x.shape[0]), 6)

    model = nn.Sequential(nn.BatchNorm2d(3), Net(step))
    traced = fxcompress.trace(model, torch.randn(2, 3, 8, 8))
    assert_same(model.state_dict(), traced.state_dict())


# ---- control flow -------------------------------------------------------------------------------------------------


def branches(net: Net, x: Tensor) -> Tensor:
    assert x.dim() == 4
    assert x.shape[1] == 3, f"{x.shape}"
    if x.shape[-1] > 100 or x.ndim != 4:
        raise ValueError("too wide")
    x = net.conv(x)
    while x.shape[-1] > 4:
        x = F.max_pool2d(x, 2)
    known = {3: 1.0, 6: 2.0}
    if isinstance(x.shape[1], int) and x.shape == x.clone().shape and x.dtype.is_floating_point:
        x = x * known[x.shape[1]]
    return [x, -x][x.shape[1] - 6]


def flags(net: Net, x: Tensor) -> Tensor:
    if x.is_cuda or x.requires_grad or x.is_sparse or x.device.type != "cpu":
        return x
    if net.training or torch._C._get_tracing_state() is not None or torch.is_grad_enabled() is None:
        return x
    return net.conv(x) if hasattr(net, "conv") and x.is_contiguous() else x


@pytest.mark.parametrize("step", [branches, flags])
def test_control_flow_is_not_recorded(step: Step) -> None:
    traced = check(Net(step), (2, 3, 8, 8), (3, 3, 8, 8))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv"]


def test_nothing_that_was_not_needed_is_left() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        _ = x.shape[0] * x.shape[1] + len(x)
        assert x.numel() > 1
        net.fc(torch.zeros(6))
        return net.conv(x)

    traced = check(Net(step), (2, 3, 8, 8))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


# ---- outputs ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


def test_outputs_in_containers() -> None:
    def step(net: Net, x: Tensor) -> Any:
        y = net.conv(x)
        return y, [y + 1, {"a": y * 2, "b": (x, None)}], Pair(y - 1, None), OrderedDict(z=y), 7, "name", x.shape[0]

    model, x = Net(step).eval(), torch.randn(2, 3, 8, 8)
    traced = fxcompress.trace(model, x)
    for given in (x, torch.randn(4, 3, 8, 8)):
        expected, found = model(given), traced(given)
        assert_same(expected[0], found[0])
        assert_same(expected[1][0], found[1][0])
        assert_same(expected[1][1]["a"], found[1][1]["a"])
        assert_same(expected[1][1]["b"][0], found[1][1]["b"][0])
        assert found[1][1]["b"][1] is None
        assert type(found[2]) is Pair
        assert found[2].second is None
        assert_same(expected[2].first, found[2].first)
        assert type(found[3]) is OrderedDict
        assert_same(expected[3]["z"], found[3]["z"])
        assert found[4:] == expected[4:] == (7, "name", len(given))


def test_outputs_in_a_dataclass() -> None:
    def step(net: Net, x: Tensor) -> Result:
        y = net.conv(x)
        return Result(logits=net.fc(y.mean((2, 3))), hidden=(x, y))

    model, x = Net(step).eval(), torch.randn(2, 3, 8, 8)
    traced = fxcompress.trace(model, x)
    for given in (x, torch.randn(4, 3, 8, 8)):
        expected, found = model(given), traced(given)
        assert type(found) is Result
        assert found.loss is None
        assert_same(expected.logits, found.logits)
        assert_same(expected.hidden, found.hidden)


def test_a_dataclass_inside_the_forward() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Result:
            return Result(x + 1, (x * 2,))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            result = self.inner(x)
            assert result.hidden is not None
            return result.logits * result.hidden[0]

    check(Outer(), (2, 3), (5, 3))


# ---- writes -------------------------------------------------------------------------------------------------------


def write_slice(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    x[:, :2] = x[:, 2:4] * 2
    x[:, 0, 1:3] += 1
    x[:, -1] = 0.5
    return x


def write_view(net: Net, x: Tensor) -> Tensor:
    x = net.conv(x)
    half = x[:, :3]
    F.relu_(half)
    half.mul_(3)
    x.flatten(2)[..., 0].zero_()
    return x


def write_made(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[0], 6, x.shape[2], x.shape[3])
    mask[:, :, : x.shape[2] // 2] = 1
    mask[:, 0].fill_(2)
    for i, part in enumerate((slice(0, 3), slice(3, 6))):
        mask[:, part] += i
    return net.conv(x) * mask


def write_out(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = torch.empty_like(y)
    torch.add(y, 1, out=z)
    y += z
    y.masked_fill_(y > 1, 0.25)
    y.index_add_(1, torch.tensor([0, 1]), y[:, 2:4].clone())
    return y


def write_input(net: Net, x: Tensor) -> Tensor:
    x += 1
    return net.conv(x)


def write_operator(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.conv(x)
    z = y
    z *= 2
    z -= 1
    z /= 3
    return y, z


@pytest.mark.parametrize("step", [write_slice, write_view, write_made, write_out, write_input, write_operator])
def test_writes(step: Step) -> None:
    model = Net(step).eval()
    traced = fxcompress.trace(model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for shape in ((2, 3, 8, 8), (3, 3, 6, 10)):
            x = torch.randn(*shape)
            given, other = x.clone(), x.clone()
            assert_same(model(given), traced(other))
            assert_same(given, other)


def test_an_activation_in_place() -> None:
    check(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Hardswish(inplace=True)), (2, 3, 4, 4), (3, 3, 4, 4)
    )


def test_the_example_is_not_written() -> None:
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    fxcompress.trace(Net(write_input), x)
    assert_same(before, x)
