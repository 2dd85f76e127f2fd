"""The channel analysis as a user reads it: what is frozen and why, what is coupled and where."""

from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from channel_cases import CASES, IMAGE, OUTPUT, conv
from nets import Net, described
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import RandomFilterPruner
from fxcompress.testing import portrait


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


FROZEN: dict[str, tuple[Any, str]] = {
    "unknown operator": (lambda n, x: n.b(torch.fft.fft(n.a(x), dim=1).real), "aten::_fft_r2c"),
    "gather": (lambda n, x: n.b(n.a(x).gather(1, n.a(x).argsort(1))), "argsort"),
    "topk": (lambda n, x: n.c(n.a(x).topk(4, 1).values), "topk depends on the order"),
    "cumsum": (lambda n, x: n.b(n.a(x).cumsum(1)), "cumsum depends on the order"),
    "pooling over channels": (
        lambda n, x: n.c(F.avg_pool1d(n.a(x).flatten(2).mT, 2).mT.unflatten(2, (8, 8))),
        "spatial dimension",
    ),
    "convolution along channels": (
        lambda n, x: n.d(n.a(x).flatten(2).mT), "spatial dimension",
    ),
    "constant tensor": (
        lambda n, x: n.b(n.a(x) * torch.linspace(0, 1, 8).view(8, 1, 1)), "without channels of its own",
    ),
    "graph input": (lambda n, x: n.b(n.a(x) + x.repeat(1, 3, 1, 1)[:, :8]), "without channels of its own"),
    "chosen by data": (lambda n, x: n.b(n.a(x)[:, n.a(x)[0, :, 0, 0].long() * 0]), "index"),
    "output": (lambda n, x: (n.a(x), n.b(n.a(x))), OUTPUT),
}  # fmt: skip


@pytest.mark.parametrize("step, reason", FROZEN.values(), ids=FROZEN)
def test_what_cannot_be_proven_removable_stays_with_the_reason(step: Any, reason: str) -> None:
    net = Net(step, a=conv(3, 8), b=conv(8, 5), c=conv(4, 5), d=nn.Conv1d(64, 5, 3))
    groups = fxcompress.channel_groups(net, IMAGE)
    group = next(group for group in groups if "a.weight" in {name for name, _ in group.members} and not group.removable)
    assert reason in group.reason
    assert reason in groups.explain("a")
    assert groups.removable < 8
    with pytest.warns(UserWarning, match="nothing to prune"):
        masked = fxcompress.compress(net, [RandomFilterPruner(0.5, include="a")], example_inputs=IMAGE)
    assert fxcompress.masks(masked) == {}


def test_a_shortcut_padded_with_ones_freezes_what_it_meets() -> None:
    """Zeros would leave the convolution alone to decide; ones are something that cannot be taken away."""
    net = Net(
        lambda n, x: n.b(n.a(x) + F.pad(n.f(x), (0, 0, 0, 0, 2, 2), value=1.0)),
        a=conv(3, 8), f=conv(3, 4), b=conv(8, 5),
    )  # fmt: skip
    groups = [group for group in fxcompress.channel_groups(net, IMAGE) if "a" in group.layers]
    assert {(group.width, group.removable, frozenset(group.layers)) for group in groups} == {
        (4, True, frozenset({"a", "f"})),
        (4, False, frozenset({"a"})),
    }
    (reason,) = [group.reason for group in groups if not group.removable]
    assert "another value than zero" in reason


def test_an_opaque_submodule_freezes_what_enters_it() -> None:
    net = Net(lambda n, x: n.c(n.b(n.reads(n.a(x)))), a=conv(3, 8), reads=Reads(), b=conv(8, 4), c=conv(4, 5))
    with pytest.warns(UserWarning, match="reads"):
        groups = fxcompress.channel_groups(net, IMAGE)
    assert {group.name: group.removable for group in groups} == {"a": False, "b": True, "c": False}
    assert "reads" in groups["a"].reason


def test_a_layer_without_a_rule_is_one_operator() -> None:
    net = Net(
        lambda n, x: n.c(n.b(n.r(n.a(x), n.a(x)))), a=nn.Linear(3, 4), r=nn.Bilinear(4, 4, 6), b=nn.Linear(6, 5),
        c=nn.Linear(5, 2),
    )  # fmt: skip
    groups = fxcompress.channel_groups(net, torch.randn(7, 3))
    assert {group.name for group in groups if group.removable} == {"b"}
    assert "Bilinear" in groups["a"].reason
    assert "Bilinear" in groups.explain("r")


# ---- what a user reads --------------------------------------------------------------------------------------------


def test_explain_a_coupled_layer_names_the_nodes_that_couple_it() -> None:
    case = CASES["residual"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    text = groups.explain("c")
    assert "removable" in text
    (path,) = [line for line in text.splitlines() if "with a" in line]
    assert path.index("c.weight[0]") < path.index("=(add)=") < path.index("a.weight[0]")
    assert groups.explain("c", "a").count("=(add)=") == 1
    assert "share no channel" in groups.explain("b", "d")


def test_explain_a_frozen_layer_names_the_node_that_freezes_it() -> None:
    case = CASES["residual"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    assert "frozen at output: it is an output of the model" in groups.explain("d")
    net = Net(lambda n, x: n.b(n.a(x).cumsum(1).relu()), a=conv(3, 8), b=conv(8, 5))
    assert "frozen at cumsum: cumsum depends on the order" in fxcompress.channel_groups(net, IMAGE).explain("a")


def test_explain_a_layer_that_only_follows() -> None:
    case = CASES["squeeze and excite"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    assert groups.explain("bn").splitlines()[0] == groups.explain("a").splitlines()[0]


def test_explain_names_the_nodes_that_divide_channels_into_rows_and_tie_those() -> None:
    """Heads keep equally many channels because `reshape` makes them, and go whole with those that attention ties."""

    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], x.shape[1], 3, -1).transpose(1, 2) for f in (net.q, net.k, net.v))
        return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net = Net(step, q=nn.Linear(7, 15), k=nn.Linear(7, 15), v=nn.Linear(7, 12), o=nn.Linear(12, 2))
    groups = fxcompress.channel_groups(net, torch.randn(2, 6, 7))
    text = groups.explain("q")
    assert "  in 3 rows that keep equally many, or go whole: at reshape" in text.splitlines()
    (path,) = [line for line in text.splitlines() if line.startswith("  whole rows with v: ")]
    assert path.index("q.weight[0]") < path.index("=(scaled_dot_product_attention)=") < path.index("v.weight[0]")
    assert "whole rows with v" in groups.explain("q", "v")
    assert "share no channel" not in groups.explain("q", "v")
    assert "rows" not in groups.explain("o")


def test_explain_the_groups_of_a_convolution() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x)).relu()), a=conv(3, 15), b=conv(15, 10, groups=5), c=conv(10, 2))
    text = fxcompress.channel_groups(net, IMAGE).explain("b")
    assert "  in 5 rows that keep equally many, or go whole: at b" in text.splitlines()
    assert "  whole rows with a: b.weight[0] =(b)= b[0] =(b)= a.weight[0]" in text.splitlines()


def test_an_unknown_name_lists_near_ones() -> None:
    case = CASES["squeeze and excite"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    with pytest.raises(fxcompress.InputError, match=r"'dwn'.*near names: down"):
        groups.explain("dwn")
    with pytest.raises(fxcompress.InputError, match="'downs'"):
        groups["downs"]


def test_the_graph_of_groups() -> None:
    case = CASES["squeeze and excite"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    graph = groups.graph
    assert isinstance(graph, nx.DiGraph)
    assert {name: data["width"] for name, data in graph.nodes(data=True)} == {"a": 8, "down": 2, "b": 5}
    assert {name for name, data in graph.nodes(data=True) if not data["removable"]} == {"b"}
    assert {(u, v, data["layer"]) for u, v, data in graph.edges(data=True)} == {
        ("a", "down", "down"),
        ("down", "a", "up"),
        ("a", "b", "b"),
    }
    case = CASES["grouped"]
    graph = fxcompress.channel_groups(case.net(), case.x).graph
    assert set(graph.edges) == {("a", "g"), ("g", "b")}


def test_groups_are_a_collection_that_prints() -> None:
    case = CASES["residual"]
    groups = fxcompress.channel_groups(case.net(), case.x)
    assert len(groups) == len(list(groups)) == 3
    assert groups["c"] is groups["a"]
    text = str(groups)
    for part in ("a, c", "6", "4", "no: it is an output", "10 removable"):
        assert part in text


def test_looking_changes_nothing() -> None:
    net = CASES["squeeze and excite"].net().train()
    before = portrait(net)
    groups = fxcompress.channel_groups(net, IMAGE)
    assert str(groups)
    assert groups.graph
    assert groups.explain("a")
    assert portrait(net) == before


def test_masks_hide_no_group() -> None:
    case = CASES["squeeze and excite"]
    masked = fxcompress.compress(case.net(), [RandomFilterPruner(0.5)], example_inputs=case.x)
    text = str(masked.graph)
    groups = fxcompress.channel_groups(masked, case.x)
    assert [described(group) for group in groups] == [
        described(group) for group in fxcompress.channel_groups(case.net(), case.x)
    ]
    assert str(masked.graph) == text


def test_resnet18() -> None:
    """64 + 2 * 64 in the first stage; 128 + 2 * 128, 256 + 2 * 256, 512 + 2 * 512 in the others."""
    from model_zoo import build

    model, x = build("resnet18")
    groups = fxcompress.channel_groups(model, x)
    assert groups.removable == 64 + 2 * 64 + 128 + 2 * 128 + 256 + 2 * 256 + 512 + 2 * 512 == 2880
    assert set(groups["conv1"].layers) == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert set(groups["layer2.0.conv2"].layers) == {"layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"}
    assert [group.name for group in groups if not group.removable] == ["fc"]
    assert all(group.rows == 1 for group in groups)
    with pytest.raises(fxcompress.InputError, match=r"near names: .*layer1\.0\.conv1"):
        groups.explain("layer1.0.conv9")
