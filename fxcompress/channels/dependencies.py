"""What depends on what, for people and for other programs: coupled layers, grouped layers, shared inputs, files.

Everything is read off the labels of an analysis. No type of layer is looked at, so that a convolution written as
``F.conv2d`` or an ``einsum`` has the same dependencies as ``nn.Conv2d``.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import networkx as nx
import numpy as np
from rich.table import Table

from fxcompress.errors import InputError
from fxcompress.replacing import replacing
from fxcompress.text import as_text

if TYPE_CHECKING:
    from fxcompress.channels.groups import ChannelGroups, Group
    from fxcompress.channels.labels import IntArray


@dataclass(frozen=True)
class Place:
    """Where in the model a node is.

    Attributes:
        layer: name of the module that it calls.
        reads: name of the node whose value enters.
    """

    layer: str
    reads: str


@dataclass(frozen=True)
class LayerSet:
    """Layers that depend on each other through channels.

    Attributes:
        layers: their names, in the order of the graph.
        groups: names of the channel groups through which they do.
        width: how many channels those have.
    """

    layers: tuple[str, ...]
    groups: tuple[str, ...]
    width: int


class LayerSets(Sequence[LayerSet]):
    """Sets of layers, in the order of the graph. Prints as a table."""

    def __init__(self, title: str, sets: tuple[LayerSet, ...]) -> None:
        self._title, self._sets = title, sets

    @overload
    def __getitem__(self, index: int) -> LayerSet: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerSet]: ...
    def __getitem__(self, index: int | slice) -> LayerSet | Sequence[LayerSet]:
        return self._sets[index]

    def __len__(self) -> int:
        return len(self._sets)

    def __rich__(self) -> Table:
        table = Table(title=f"{self._title}: {len(self)}")
        for column in ("layers", "channels", "of group"):
            table.add_column(column, justify="right" if column == "channels" else "left")
        for item in self._sets:
            table.add_row(", ".join(item.layers), str(item.width), ", ".join(item.groups))
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


class GroupedLayers(Mapping[str, int]):
    """Layers that take channels in groups, by name, and in how many. Prints as a table."""

    def __init__(self, counts: Mapping[str, int], sources: Mapping[str, tuple[str, ...]]) -> None:
        self._counts, self._sources = counts, sources

    def __getitem__(self, layer: str) -> int:
        return self._counts[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __rich__(self) -> Table:
        table = Table(title=f"grouped layers: {len(self)}")
        for column in ("layer", "groups", "keep equally many channels of"):
            table.add_column(column, justify="right" if column == "groups" else "left")
        for layer, count in self._counts.items():
            table.add_row(layer, str(count), ", ".join(self._sources[layer]))
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def coupled(groups: ChannelGroups) -> LayerSets:
    """Sets of several layers that produce the same channels."""
    order: dict[str, int] = {}
    for labels in groups.channels.facts.ledger.produced:
        order.setdefault(_layer(groups, labels), len(order))
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        layers = sorted({_name(item.parameter) for item in group.slices}, key=order.__getitem__)
        if len(layers) > 1:
            found.setdefault(tuple(layers), []).append(group)
    sets = [
        LayerSet(layers, tuple(item.name for item in same), sum(item.width for item in same))
        for layers, same in found.items()
    ]
    sets.sort(key=lambda item: [order[layer] for layer in item.layers])
    return LayerSets("coupled layers", tuple(sets))


def grouped(groups: ChannelGroups, places: Mapping[str, Place]) -> GroupedLayers:
    """Layers whose operator divides channels into groups that must keep equally many each."""
    component, owner = groups.channels.component, groups.owners()
    counts: dict[str, int] = {}
    sources: dict[str, set[int]] = {}
    for division in groups.channels.facts.ledger.divisions:
        rows = component[division.labels]
        if (rows == rows[:, :1]).all():
            continue  # a row is one channel, and goes whole
        layer = places[division.node].layer if division.node in places else division.node
        counts[layer] = max(len(rows), counts.get(layer, 0))
        sources.setdefault(layer, set()).update(_known(owner[rows]))
    names = [group.name for group in groups]
    return GroupedLayers(counts, {layer: tuple(names[i] for i in sorted(found)) for layer, found in sources.items()})


def shared_inputs(groups: ChannelGroups, places: Mapping[str, Place]) -> LayerSets:
    """Sets of several layers that read the same channels, or the same tensor where that has no channels."""
    component, ledger, owner = groups.channels.component, groups.channels.facts.ledger, groups.owners()
    names = [group.name for group in groups]
    reads = {place.layer: place.reads for place in places.values()}
    found: dict[bytes, tuple[list[str], tuple[str, ...], int]] = {}
    for consumed, produced in ledger.layers:
        layer, channels = _layer(groups, produced), np.unique(component[consumed])
        owners = tuple(names[i] for i in _known(owner[channels]))
        if not owners and layer not in reads:
            continue  # what it reads has no channels and no name
        key = channels.tobytes() if owners else reads[layer].encode()
        layers, _, _ = found.setdefault(key, ([], owners, len(channels)))
        if layer not in layers:
            layers.append(layer)
    sets = (LayerSet(tuple(layers), owners, width) for layers, owners, width in found.values() if len(layers) > 1)
    return LayerSets("shared inputs", tuple(sets))


def _name(parameter: str) -> str:
    """The layer that holds a parameter; a parameter of the model itself stands for itself."""
    return parameter.rpartition(".")[0] or parameter


def _layer(groups: ChannelGroups, produced: IntArray) -> str:
    """The layer that produces some labels."""
    return _name(groups.axes_of(produced)[0].name)


def _known(owner: IntArray) -> list[int]:
    """Indices of the groups that own some components, in order."""
    return [index for index in np.unique(owner).tolist() if index >= 0]


# ---- files -----------------------------------------------------------------------------------------------------


def write_csv(groups: ChannelGroups, path: str | os.PathLike[str]) -> None:
    """One row for each group, with a header; lists are separated by ``;``."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "width", "rows", "removable", "reason", "layers", "members"))
        for group in groups:
            members = ";".join(f"{name}[{dim}]" for name, dim in group.members)
            removable = "yes" if group.removable else "no"
            layers = ";".join(group.layers)
            writer.writerow((group.name, group.width, group.rows, removable, group.reason, layers, members))


def _flat(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The graph with tuples as text: the formats hold scalars."""
    made: nx.DiGraph[str] = nx.DiGraph()
    for name, attributes in graph.nodes(data=True):
        made.add_node(name, **{k: ";".join(v) if isinstance(v, tuple) else v for k, v in attributes.items()})
    made.add_edges_from(graph.edges(data=True))
    return made


def _write_json(graph: nx.DiGraph[str], path: Path) -> None:
    path.write_text(json.dumps(nx.node_link_data(graph, edges="edges"), indent=1) + "\n", encoding="utf-8")


def _quoted(text: object) -> str:
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _write_dot(graph: nx.DiGraph[str], path: Path) -> None:
    lines = ["digraph groups {", "  node [shape=box];"]
    for name, data in graph.nodes(data=True):
        style = "" if data["removable"] else ", style=dashed"
        label = f"{name}\n{data['width']} channels"
        lines.append(
            f"  {_quoted(name)} [label={_quoted(label)}{style}, tooltip={_quoted(', '.join(data['layers']))}];"
        )
    for source, target, data in graph.edges(data=True):
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(data['layer'])}];")
    path.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")


_FORMATS: dict[str, Callable[[nx.DiGraph[str], Path], None]] = {
    ".graphml": lambda graph, path: nx.write_graphml(_flat(graph), path),
    ".gml": lambda graph, path: nx.write_gml(_flat(graph), path),
    ".gexf": lambda graph, path: nx.write_gexf(_flat(graph), path),
    ".json": _write_json,
    ".dot": _write_dot,
}


def write_graph(groups: ChannelGroups, path: str | os.PathLike[str]) -> None:
    """The graph of groups in the format that the suffix names."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            f"path ends in {suffix or 'no suffix'!r}; expected one of {', '.join(_FORMATS)}, which says the format of "
            "the graph file."
        )
    with replacing(path) as draft:
        _FORMATS[suffix](groups.graph, draft)
