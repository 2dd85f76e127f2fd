"""The channel analysis on convolutional structures: which slices stand or fall together."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from channel_cases import CASES, IMAGE, conv
from nets import Case, Net, described
from torch import Tensor

import fxcompress
from fxcompress.passes import ChannelPruner, Layer, RandomFilterPruner, Speedup


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups(case: Case) -> None:
    groups = fxcompress.channel_groups(case.net(), case.x)
    assert {group.name: described(group) for group in groups if group.removable} == {
        name: expected.of(name) for name, expected in case.groups.items()
    }
    frozen = {group.name: group.reason for group in groups if not group.removable}
    assert set(frozen) == set(case.frozen)
    for name, reason in case.frozen.items():
        assert reason in frozen[name]
    assert groups.removable == sum(expected.width for expected in case.groups.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_removal(case: Case) -> None:
    """What the groups promise can be done: half of every group goes, and the function is that of the masked model."""
    net = case.net()
    masked = fxcompress.compress(net, [RandomFilterPruner(0.5)], example_inputs=case.x)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=case.x)
    kept = dict(small.named_parameters())
    for name, expected in case.groups.items():
        dims = {dim for parameter, dim in expected.of(name)[1] if parameter == f"{name}.weight"}
        for dim in dims:
            assert kept[f"{name}.weight"].shape[dim] < net.get_parameter(f"{name}.weight").shape[dim]


class InOrder(ChannelPruner):
    """The first channels of every group go."""

    def score(self, layer: Layer) -> Tensor:
        return torch.arange(float(len(layer.weight)))


@pytest.mark.parametrize(
    "name, parameter, dim, dead",
    [
        ("conv, norm, flatten", "fc.weight", 1, range(2 * 64)),  # 2 of 4 channels, each of 8 x 8 positions
        ("cat of unequal parts", "c.weight", 1, [0, 1, 4, 5, 6]),  # 2 of a's 4, 3 of b's 6
        ("halves multiplied", "a.weight", 0, [0, 1, 4, 5]),
        ("gated linear unit", "a.bias", 0, [0, 1, 4, 5]),
        ("channel shuffle", "b.weight", 1, [0, 2, 4, 6]),  # channel g * 4 + i goes to i * 2 + g
        ("pixel shuffle", "a.weight", 0, range(8)),
        ("pixel shuffle", "b.weight", 1, [0, 1]),
        ("space to depth", "b.weight", 1, range(8)),
        ("space to depth by hand", "b.weight", 1, range(8)),
        ("squeeze and excite", "up.weight", 0, range(4)),
        ("squeeze and excite", "up.weight", 1, [0]),
        ("squeeze and excite", "down.weight", 1, range(4)),
        ("depthwise with multiplier 2", "dw.weight", 0, range(4)),
        ("depthwise with multiplier 2", "b.weight", 1, range(4)),
        ("grouped", "a.weight", 0, [0, 2, 4, 6]),  # one of every group's 2 inputs
        ("grouped", "g.weight", 1, [0]),
        ("grouped", "g.weight", 0, [0, 3, 6, 9]),  # int(3 * .5) of every group's outputs
        ("grouped", "b.weight", 1, [0, 3, 6, 9]),
        ("transposed", "t.weight", 0, [0, 1, 2]),
        ("transposed", "t.weight", 1, [0, 1]),
        ("dense", "d.weight", 1, [0, 1, 2, 6, 7, 10]),
        ("a layer used twice", "b.weight", 0, [0, 1, 2]),
        ("a layer used twice", "b.weight", 1, [0, 1, 2]),
        ("zero-padded shortcut", "a.weight", 0, [0, 1]),
        ("zero-padded shortcut", "b.weight", 0, [0, 1, 2, 3]),  # 2 of the padded ones, 2 of the shortcut's
        ("zero-padded shortcut", "c.weight", 1, [0, 1, 2, 3]),
        ("padded with ones", "b.weight", 1, [1, 2, 3, 4]),
        ("group norm", "gn.weight", 0, [0, 1, 4, 5, 8, 9]),
        ("activation with a slope for each channel", "p.weight", 0, [0, 1, 2]),
        ("standardized weights", "b.weight", 1, [0, 1, 2]),
        ("parameters outside layers", "scale", 0, [0, 1, 2]),
    ],
)
def test_which_slices_go(name: str, parameter: str, dim: int, dead: Any) -> None:
    case = CASES[name]
    masked = fxcompress.compress(case.net(), [InOrder(0.5)], example_inputs=case.x)
    mask = fxcompress.masks(masked)[parameter].movedim(dim, 0)
    assert (~mask.reshape(len(mask), -1).any(1)).nonzero().flatten().tolist() == list(dead)


def test_a_piece_of_a_split_is_never_emptied() -> None:
    case = CASES["split into unequal parts"]
    masked = fxcompress.compress(case.net(), [InOrder(0.9)], example_inputs=case.x)
    masks = fxcompress.masks(masked)
    assert masks["a.bias"].tolist() == [False, False, False, True] + [False] * 5 + [True]  # 9 asked for, one stays


CHOICES = {
    "list": [0, 2, 4, 5, 1],
    "tuple": (0, 2, 4, 5, 1),
    "array": np.array([0, 2, 4, 5, 1]),
    "tensor": torch.tensor([0, 2, 4, 5, 1]),
    "range": range(1, 6),
    "flags": [True, False, True, True, False, True, True, False],
}


@pytest.mark.parametrize("name", CHOICES)
def test_channels_chosen_by_numbers_in_the_code(name: str) -> None:
    """Channels 0 and 2 of eight go: who read both keeps three of five, and the range, which began at 1, four."""
    net = Net(lambda n, x: n.b(n.a(x)[:, CHOICES[name]]), a=conv(3, 8), b=conv(5, 4))
    (group,) = [group for group in fxcompress.channel_groups(net, IMAGE) if "a" in group.layers]
    assert (group.width, group.removable) == (8, True)
    keep = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor([0, 2]), value=False)
    masks = {"a.weight": keep[:, None, None, None].expand(8, 3, 1, 1), "a.bias": keep}
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=IMAGE)
    assert small.get_submodule("a").out_channels == 6
    assert small.get_submodule("b").in_channels == (4 if name == "range" else 3)


def test_a_tensor_of_numbers_made_in_the_forward() -> None:
    net = Net(
        lambda n, x: n.b(n.a(x).index_select(1, torch.tensor([6, 0, 3], device=x.device))), a=conv(3, 8), b=conv(3, 4)
    )
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=IMAGE)
    assert small.get_submodule("a").out_channels == 4


def test_a_border_that_no_maximum_sees() -> None:
    """Padding that is no number a position could have."""
    net = Net(
        lambda n, x: n.b(F.max_pool2d(F.pad(n.a(x), (1, 1, 1, 1), value=-math.inf), 3, 2)), a=conv(3, 8), b=conv(8, 4)
    )
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=IMAGE)
    assert small.get_submodule("a").out_channels == small.get_submodule("b").in_channels == 4
