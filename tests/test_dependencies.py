"""Coupled layers, grouped layers and shared inputs against what one writes by hand; tables, CSV and graph files."""

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import model_zoo
import networkx as nx
import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import ChannelGroups
from fxcompress.errors import InputError
from fxcompress.passes import Speedup


def sets(found: Any) -> list[list[str]]:
    return [list(item.layers) for item in found]


@cache
def analysed(name: str) -> ChannelGroups:
    model, x = model_zoo.build(name)
    return fxcompress.channel_groups(model, x)


def blocks(prefix: str, count: int, leaf: str, start: int = 0) -> list[str]:
    return [f"{prefix}.{i}.{leaf}" for i in range(start, count)]


# ---- a small network, each dependency once ---------------------------------------------------------------------


def step(m: Net, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)  # two readers of the image; their sum couples them
    y = F.relu(a + b)
    y = m.norm(m.depthwise(y))  # coupled with a and b: passes each channel on
    u, v = m.u(y), m.v(y)  # share an input
    z = m.grouped(torch.cat((u, v), dim=1))
    z = z + F.conv2d(y, m.w)  # a layer that is no module
    return m.head(z.mean((2, 3)))


@pytest.fixture(scope="module")
def small() -> ChannelGroups:
    net = Net(
        step,
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(3, 8, 1),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        norm=nn.GroupNorm(2, 8),
        u=nn.Conv2d(8, 9, 1),
        v=nn.Conv2d(8, 3, 1),
        grouped=nn.Conv2d(12, 6, 1, groups=3),
        w=nn.Parameter(torch.randn(6, 8, 1, 1)),
        head=nn.Linear(6, 5),
    )
    return fxcompress.channel_groups(net, torch.randn(2, 3, 6, 6))


def test_coupled(small: ChannelGroups) -> None:
    assert sets(small.coupled) == [["a", "b", "depthwise"], ["grouped", "w"]]
    (first, second) = small.coupled
    assert (first.width, first.groups) == (8, ("a",))
    assert second.width == 6
    assert set(small[second.groups[0]].layers) == {"grouped", ""}


def test_grouped(small: ChannelGroups) -> None:
    """The norm has two groups of four, the convolution three; the depthwise one's groups are channels."""
    assert dict(small.grouped) == {"norm": 2, "grouped": 3}
    assert "depthwise" not in small.grouped
    with pytest.raises(KeyError):
        small.grouped["depthwise"]


def test_shared_inputs(small: ChannelGroups) -> None:
    assert sets(small.shared_inputs) == [["a", "b"], ["u", "v", "w"]]
    assert [item.width for item in small.shared_inputs] == [3, 8]
    assert [item.groups for item in small.shared_inputs] == [(), ("a",)]


def test_groups_of_single_channels_are_no_constraint() -> None:
    """GroupNorm with one channel in each group, and a depthwise multiplier: channels go one by one."""
    net = Net(
        lambda m, x: m.c(m.multiplied(m.norm(m.a(x)))),
        a=nn.Conv2d(3, 6, 1),
        norm=nn.GroupNorm(6, 6),
        multiplied=nn.Conv2d(6, 12, 3, groups=6),
        c=nn.Conv2d(12, 4, 1),
    )
    groups = fxcompress.channel_groups(net, torch.randn(2, 3, 6, 6))
    assert dict(groups.grouped) == {}
    assert sets(groups.coupled) == [["a", "multiplied"]]


def test_written_as_functions_it_is_the_same() -> None:
    """Labels decide, not layer types: an einsum is a layer, and a functional convolution has groups."""
    net = Net(
        lambda m, x: torch.einsum("bchw,oc->bohw", F.conv2d(m.a(x), m.g, groups=2) + m.b(x), m.e),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 6, 1),
        g=nn.Parameter(torch.randn(6, 4, 1, 1)),
        e=nn.Parameter(torch.randn(5, 6)),
    )
    groups = fxcompress.channel_groups(net, torch.randn(2, 3, 6, 6))
    assert dict(groups.grouped) == {"conv2d": 2}
    assert sets(groups.coupled) == [["g", "b"]]
    assert sets(groups.shared_inputs) == [["a", "b"]]


def test_tables_print_every_layer(small: ChannelGroups) -> None:
    text = str(small.coupled)
    assert "coupled layers: 2" in text
    assert "grouped layers: 2" in str(small.grouped)
    assert "a, b, depthwise" in text
    assert "norm" in str(small.grouped)
    assert "u, v, w" in str(small.shared_inputs)
    assert "shared inputs: 2" in str(small.shared_inputs)


# ---- real models -----------------------------------------------------------------------------------------------


def test_resnet18() -> None:
    groups = analysed("resnet18")
    assert sets(groups.coupled) == [
        ["conv1", "layer1.0.conv2", "layer1.1.conv2"],
        *([f"layer{i}.0.conv2", f"layer{i}.0.downsample.0", f"layer{i}.1.conv2"] for i in (2, 3, 4)),
    ]
    assert dict(groups.grouped) == {}
    assert sets(groups.shared_inputs) == [
        ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"],
        *([f"layer{i}.1.conv1", f"layer{i + 1}.0.conv1", f"layer{i + 1}.0.downsample.0"] for i in (2, 3)),
        ["layer4.1.conv1", "fc"],
    ]


def test_mobilenet_v2() -> None:
    """Depthwise convolutions are coupled with what they read; a residual chain couples its projections."""
    groups = analysed("mobilenet_v2")
    expected = {frozenset({"features.0.0", "features.1.conv.0.0"})}
    expected |= {frozenset({f"features.{i}.conv.0.0", f"features.{i}.conv.1.0"}) for i in range(2, 18)}
    chains = [(2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16)]
    expected |= {frozenset(f"features.{i}.conv.2" for i in chain) for chain in chains}
    found = [frozenset(item.layers) for item in groups.coupled]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert dict(groups.grouped) == {}
    assert sets(groups.shared_inputs) == [[f"features.{i + 1}.conv.0.0" for i in chain] for chain in chains]


@pytest.mark.long
def test_resnext50() -> None:
    groups = analysed("resnext50_32x4d")
    depths = {1: 3, 2: 4, 3: 6, 4: 3}
    assert dict(groups.grouped) == {f"layer{i}.{j}.conv2": 32 for i, depth in depths.items() for j in range(depth)}
    assert sets(groups.coupled) == [
        [f"layer{i}.0.conv3", f"layer{i}.0.downsample.0", *blocks(f"layer{i}", depth, "conv3", 1)]
        for i, depth in depths.items()
    ]
    text = str(groups.grouped)
    assert "layer1.0.conv1, layer1.0.conv2" in text
    assert groups["layer1.0.conv1"].rows == groups["layer1.0.conv2"].rows == 32


@pytest.mark.long
def test_densenet121() -> None:
    """Concatenation couples nothing; what reads the same concatenation would share an input, and nothing does."""
    groups = analysed("densenet121")
    assert sets(groups.coupled) == []
    assert dict(groups.grouped) == {}
    assert sets(groups.shared_inputs) == []
    readers = {source for source, target in groups.graph.edges if target == "features.denseblock1.denselayer3.conv1"}
    assert readers == {
        "features.conv0",
        "features.denseblock1.denselayer1.conv2",
        "features.denseblock1.denselayer2.conv2",
    }


def test_shufflenet() -> None:
    groups = analysed("shufflenet_v2_x1_0")
    inside = {
        frozenset({f"stage{s}.{i}.branch2.0", f"stage{s}.{i}.branch2.3"})
        for s, depth in ((2, 4), (3, 8), (4, 4))
        for i in range(depth)
    }
    found = {frozenset(item.layers) for item in groups.coupled}
    assert inside | {frozenset({"conv1.0", "stage2.0.branch1.0"})} <= found
    # The others are what the next stage's depthwise convolution passes on of each branch.
    rest = found - inside - {frozenset({"conv1.0", "stage2.0.branch1.0"})}
    assert rest == {
        frozenset({branch, f"stage{s + 1}.0.branch1.0"})
        for s, depth in ((2, 4), (3, 8))
        for branch in (f"stage{s}.0.branch1.2", *blocks(f"stage{s}", depth, "branch2.5"))
    }
    assert dict(groups.grouped) == {}
    assert sets(groups.shared_inputs) == [[f"stage{s}.0.branch1.2", f"stage{s}.0.branch2.0"] for s in (2, 3, 4)]


@pytest.mark.parametrize(
    "depth, heads, width", [(2, 4, 32), pytest.param(12, 12, 768, marks=pytest.mark.long)], ids=["small", "vit_b_16"]
)
def test_vision_transformer(depth: int, heads: int, width: int) -> None:
    model = torchvision.models.VisionTransformer(32, 16, depth, heads, width, 4 * width).eval()
    groups = fxcompress.channel_groups(model, torch.randn(1, 3, 32, 32))
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(depth)]
    writers = [f"{layer}.{leaf}" for layer in layers for leaf in ("self_attention.out_proj", "mlp.3")]
    readers = [f"{layer}.{leaf}" for layer in layers for leaf in ("self_attention", "mlp.0")]
    assert sets(groups.coupled) == [["conv_proj", *writers]]
    assert sets(groups.shared_inputs) == [[*readers, "heads.head"]]
    assert [item.width for item in groups.shared_inputs] == [width]
    assert dict(groups.grouped) == {}
    assert {group.rows for group in groups if group.layers == (f"{layers[0]}.self_attention",)} == {2 * heads}


# ---- files -----------------------------------------------------------------------------------------------------


def test_csv_says_what_the_table_says(small: ChannelGroups, tmp_path: Path) -> None:
    small.to_csv(tmp_path / "groups.csv")
    with (tmp_path / "groups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(small)
    for row, group in zip(rows, small, strict=True):
        assert list(row) == ["name", "width", "rows", "removable", "reason", "layers", "members"]
        assert row["name"] == group.name
        assert (int(row["width"]), int(row["rows"])) == (group.width, group.rows)
        assert row["removable"] == ("yes" if group.removable else "no")
        assert row["reason"] == group.reason
        assert tuple(row["layers"].split(";")) == group.layers
        assert row["members"].split(";") == [f"{name}[{dim}]" for name, dim in group.members]
    assert {row["removable"] for row in rows} == {"yes", "no"}


def _read_json(path: Path) -> Any:
    return nx.node_link_graph(json.loads(path.read_text()), edges="edges")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".graphml": nx.read_graphml,
    ".gml": nx.read_gml,
    ".gexf": nx.read_gexf,
    ".json": _read_json,
}


@pytest.mark.parametrize("suffix", _READERS)
def test_graph_files_are_read_back(small: ChannelGroups, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"groups{suffix}"
    small.to_graph(path)
    found, expected = _READERS[suffix](path), small.graph
    assert list(found.nodes) == list(expected.nodes)
    assert set(found.edges) == set(expected.edges)
    assert len(expected.edges) > 3
    for name, data in expected.nodes(data=True):
        other = found.nodes[name]
        layers = other["layers"] if suffix == ".json" else other["layers"].split(";")
        assert tuple(layers) == data["layers"]
        assert int(other["width"]) == data["width"]
        assert bool(other["removable"]) == data["removable"]
        assert other["reason"] == data["reason"]
    for source, target, data in expected.edges(data=True):
        assert found.edges[source, target]["layer"] == data["layer"]


def test_dot_is_graphviz_text(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    fxcompress.channel_groups(net, torch.randn(2, 4)).to_graph(tmp_path / "groups.DOT")
    assert (tmp_path / "groups.DOT").read_text() == "\n".join(
        [
            "digraph groups {",
            "  node [shape=box];",
            '  "a" [label="a\\n6 channels", tooltip="a"];',
            '  "b" [label="b\\n2 channels", style=dashed, tooltip="b"];',
            '  "a" -> "b" [label="b"];',
            "}",
            "",
        ]
    )


@pytest.mark.parametrize("name", ["groups", "groups.png", "groups.csv"])
def test_an_unknown_suffix_is_named_with_those_known(small: ChannelGroups, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.graphml, \.gml, \.gexf, \.json, \.dot"):
        small.to_graph(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["groups.csv", "groups.json", "groups.graphml"])
def test_what_cannot_be_written_is_an_os_error_and_leaves_nothing(
    small: ChannelGroups, name: str, tmp_path: Path
) -> None:
    write = small.to_csv if name.endswith(".csv") else small.to_graph
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")) as caught:
        write(tmp_path / "nowhere" / name)
    assert caught.value.filename == str(tmp_path / "nowhere" / name)
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name.replace(".", r"\.")):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not list((tmp_path / name).iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one(
    small: ChannelGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("before")

    def full(self: Any, row: Any) -> None:
        raise OSError(28, "No space left on device")

    class Writer:
        writerow = full

    monkeypatch.setattr(csv, "writer", lambda file: file.write("half") and Writer())
    with pytest.raises(OSError, match="No space left"):
        small.to_csv(path)
    monkeypatch.undo()
    assert path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["groups.csv"]
    small.to_csv(path)
    assert path.read_text().startswith("name,width")


def test_given_masks_that_conflict_are_reported() -> None:
    """Of two coupled layers one masks channels 1 and 3, the other 3 and 4: only 3 goes, and the others are named."""
    net = Net(lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 3))
    x = torch.randn(2, 4)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}
    for name, gone in (("a", [1, 3]), ("b", [3, 4])):
        masks[f"{name}.weight"][gone] = masks[f"{name}.bias"][gone] = False
    masks["c.weight"][:, 3] = False
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    assert small.get_parameter("a.weight").shape[0] == 5
    (note,) = (note for note in small.meta["history"][-1].notes if "disagree" in note)
    assert "disagree on 2 of the 6 channels of a (1, 4), which stay: a, b would lose them, a, b would not" in note
    masks["b.weight"][:] = masks["b.bias"][:] = True
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    (note,) = (note for note in small.meta["history"][-1].notes if "disagree" in note)
    assert "disagree on 2 of the 6 channels of a (1, 3), which stay: a would lose them, b would not" in note
