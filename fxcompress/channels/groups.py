"""Channel groups: what a user sees of the channel analysis."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from rich.table import Table
from torch import Tensor, fx, nn

from fxcompress.channels.dependencies import (
    GroupedLayers,
    LayerSets,
    Place,
    coupled,
    grouped,
    shared_inputs,
    write_csv,
    write_graph,
)
from fxcompress.channels.explaining import explanation
from fxcompress.channels.labels import BoolArray, IntArray, dims_of, distinct
from fxcompress.channels.ledger import Axis, Ledger
from fxcompress.channels.propagate import propagate
from fxcompress.channels.row_sets import RowSet, row_sets
from fxcompress.channels.row_tables import in_rows, numbered, row_tables, rows_among
from fxcompress.channels.solve import Channels, solve, stuck
from fxcompress.errors import InputError
from fxcompress.exclusive import exclusive
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule
from fxcompress.text import as_text


@dataclass(frozen=True)
class Slices:
    """Rows of one weight that produce channels of a group.

    Attributes:
        parameter: the weight's name.
        dim: the dimension that the rows lie along.
        rows: their indices.
        channels: for each row the channel of the group (0 .. width - 1) that it belongs to.
        groups: of a grouped transposed convolution, whose weight is (inputs, outputs / groups, ...): they count as
            lying side by side along ``dim``. 1 for all others.
    """

    parameter: str
    dim: int
    rows: IntArray
    channels: IntArray
    groups: int = 1

    @property
    def layer(self) -> str:
        """Name of the module that holds the weight."""
        return self.parameter.rpartition(".")[0]

    def lines(self, weight: Tensor) -> Tensor:
        """Everything along ``dim`` of the parameter (or of its mask) as dimension 0; :attr:`rows` are indices of it."""
        if self.groups == 1:
            return weight.movedim(self.dim, 0)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.movedim(self.dim + 1, 1).flatten(0, 1)


@dataclass(frozen=True)
class Group:
    """Channels produced by the same set of parameter axes: each stands or falls with all its slices.

    Attributes:
        name: the first layer that produces the channels, with a number behind it where several groups share it.
        width: number of channels.
        members: every ``(parameter or buffer, dimension)`` that loses a slice when a channel goes.
        removable: whether channels may go.
        reason: why not, where they may not.
        rows: number of rows that must keep equally many channels; 1 where there is no such constraint.
        layers: names of the layers whose weights produce the channels, in the order of the graph.
        components: the channels' numbers in the analysis, in order.
        slices: the producing rows, for scoring.
        row_of: for each channel the row that it lies in.
        crossed: where a channel shuffle crosses two divisions into rows, for each channel its row in either.
    """

    name: str
    width: int
    members: tuple[tuple[str, int], ...]
    removable: bool
    reason: str
    rows: int
    layers: tuple[str, ...]
    components: IntArray
    slices: tuple[Slices, ...]
    row_of: IntArray
    crossed: tuple[IntArray, ...] = ()

    def __str__(self) -> str:
        kind = "removable" if self.removable else f"frozen: {self.reason}"
        return f"{self.name}: {self.width} channels of {', '.join(self.layers)} ({kind})"


class ChannelGroups:
    """The channel groups of a model, in the order of its graph. Iterable; ``groups["name"]`` finds one."""

    def __init__(
        self, groups: tuple[Group, ...], channels: Channels, places: Mapping[str, Place] | None = None
    ) -> None:
        self._groups = groups
        self.channels = channels
        self._places = places or {}
        #: The plan that was made last for these channels, for who asks for it again (:meth:`fxcompress.plan.Plan.of`).
        self.planned: Any = None

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, name: str) -> Group:
        for group in self._groups:
            if group.name == name:
                return group
        return self.groups_of(name)[0]

    @property
    def removable(self) -> int:
        """Number of channels that may go, over all groups."""
        return sum(group.width for group in self._groups if group.removable)

    @property
    def graph(self) -> nx.DiGraph[str]:
        """Groups as nodes (``width``, ``removable``, ``reason``, ``layers``); an edge where a layer reads one group
        and produces another (``layer``)."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for group in self._groups:
            graph.add_node(
                group.name,
                width=group.width,
                removable=group.removable,
                reason=group.reason,
                layers=group.layers,
            )
        owner = self.owners()
        for consumed, produced in self.channels.facts.ledger.layers:
            sources, targets = (
                set(owner[self.channels.component[labels]].tolist()) - {-1} for labels in (consumed, produced)
            )
            layer = self.axes_of(produced)[0].name.rpartition(".")[0]
            for source, target in itertools.product(sorted(sources), sorted(targets)):
                if source != target:
                    graph.add_edge(self._groups[source].name, self._groups[target].name, layer=layer)
        return graph

    @property
    def coupled(self) -> LayerSets:
        """Sets of several layers that produce the same channels, each of which stands or falls in all of them."""
        return coupled(self)

    @property
    def grouped(self) -> GroupedLayers:
        """Layers that take channels in groups (grouped convolutions, GroupNorm), and in how many: of the channels that
        enter or leave, every group keeps equally many. A depthwise convolution is none: its groups are single
        channels, each of which goes with the one that it reads. Heads of attention are ``rows`` of their group.
        """
        return grouped(self, self._places)

    @property
    def shared_inputs(self) -> LayerSets:
        """Sets of layers that read the same channels, and lose the same columns (where the input has no channels, as an
        image has not: that read the same tensor). What passes every channel on, as a depthwise convolution does, reads
        none."""
        return shared_inputs(self, self._places)

    @property
    def row_sets(self) -> tuple[RowSet, ...]:
        """Sets of rows that may go whole: attention heads, groups of convolutions and of GroupNorms."""
        return row_sets(self, self.channels)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row for each group: name, width, rows, removable, reason, layers, members (``;`` between items).

        Raises:
            OSError: the file cannot be written; one that was there is as before.
        """
        write_csv(self, path)

    def to_graph(self, path: str | os.PathLike[str]) -> None:
        """Write :attr:`graph`. The suffix says how: .graphml, .gml, .gexf, .json (node-link), .dot (Graphviz).

        Raises:
            InputError: another suffix.
            OSError: the file cannot be written; one that was there is as before.
        """
        write_graph(self, path)

    def explain(self, name: str, other: str | None = None) -> str:
        """Why a layer's channels are coupled with other layers', or frozen: the path of nodes that says so.

        Args:
            name: a layer, a parameter or a group.
            other: only the path to this layer or parameter.

        Raises:
            InputError: nothing of that name has channels.
        """
        return explanation(self, name, other)

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self)} channel groups, {self.removable} removable channels")
        for column in ("group", "width", "rows", "layers", "removable"):
            table.add_column(column, justify="right" if column in ("width", "rows") else "left")
        for group in self._groups:
            kind = "yes" if group.removable else f"no: {group.reason}"
            table.add_row(group.name, str(group.width), str(group.rows), ", ".join(group.layers), kind)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def groups_of(self, name: str) -> list[Group]:
        """The groups that a name is of: their own, a layer's or a parameter's.

        Raises:
            InputError: nothing of that name has channels.
        """
        found = [
            group
            for group in self._groups
            if name == group.name or name in group.layers or any(name == s.parameter for s in group.slices)
        ]
        if not found:  # not a producer: a norm, say
            found = [
                group
                for group in self._groups
                if any(name in (member, member.rpartition(".")[0]) for member, _ in group.members)
            ]
        if not found:
            names = sorted({layer for group in self._groups for layer in group.layers})
            near = ", ".join(difflib.get_close_matches(name, names, 3, 0.3)) or "none"
            raise InputError(f"no channel group contains {name!r}; near names: {near}.")
        return found

    def owners(self) -> IntArray:
        """For every component the index of its group, or -1."""
        owner = np.full(len(self.channels.component), -1, dtype=np.int64)
        for index, group in enumerate(self._groups):
            owner[group.components] = index
        return owner

    def axes_of(self, labels: IntArray) -> list[Axis]:
        """The axes that labels lie on."""
        axes = self.channels.facts.ledger.axes
        starts = np.array([axis.start for axis in axes])
        return [axes[i] for i in distinct(np.searchsorted(starts, labels, side="right") - 1)]


@exclusive
def channel_groups(model: nn.Module, example_inputs: Any = None) -> ChannelGroups:
    """Which channels of a model stand or fall together, and which cannot be removed and why.

    Args:
        model: any module; it is traced unless fxcompress made it, and not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
    """
    from fxcompress.masking import clean  # masks hide nothing: the analysis is of the dense graph
    from fxcompress.trace import trace

    if example_inputs is None:
        raise InputError("example_inputs is missing: channels are followed through a run of the model. Pass a batch.")
    traced = clean(trace(model, example_inputs))
    return analyse(traced, Inputs.parse(example_inputs))


def analyse(module: TracedModule, inputs: Inputs) -> ChannelGroups:
    """The groups of a traced model without mask nodes."""
    facts = propagate(module, inputs)
    channels = solve(facts, module.graph)
    places = {
        node.name: Place(str(node.target), node.args[0].name)
        for node in module.graph.find_nodes(op="call_module")
        if node.args and isinstance(node.args[0], fx.Node)
    }
    return ChannelGroups(tuple(_groups(channels)), channels, places)


def _groups(channels: Channels) -> Iterator[Group]:
    ledger, component = channels.facts.ledger, channels.component
    if not ledger.produced:
        return
    labels = distinct(np.concatenate(ledger.produced))
    starts = np.array([axis.start for axis in ledger.axes])
    axis_of = np.searchsorted(starts, labels, side="right") - 1
    parameters = np.array([axis.kind == "parameter" for axis in ledger.axes])
    labels, axis_of = labels[parameters[axis_of]], axis_of[parameters[axis_of]]
    parts = component[labels]
    keys = _keys(parts, axis_of, channels.frozen, len(component), len(starts))
    number = numbered(keys[parts] * 2 + in_rows(channels)[parts])
    order = np.argsort(number, kind="stable")
    blocks = np.split(order, np.searchsorted(number[order], np.arange(1, number.max() + 1)))
    sets = [_in_order(parts[block]) for block in blocks]
    position = np.zeros(len(component), dtype=np.int64)
    for chosen in sets:
        position[chosen] = np.arange(len(chosen))
    reasons, tables = _reasons(channels), row_tables(channels)
    places = _graph_order(ledger, starts)
    taken: dict[str, int] = {}
    for chosen, block, member in zip(sets, blocks, _members(channels, sets), strict=True):
        slices = _slices(channels, position, labels[block], axis_of[block], places)
        layers = tuple(dict.fromkeys(item.layer for item in slices))
        name = layers[0]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}[{taken[name] - 1}]"
        removable = not channels.frozen[chosen[0]]
        reason = "" if removable else reasons.get(int(chosen[0]), "its row cannot be cut")
        row_of, crossed = rows_among(tables, chosen)
        rows = int(row_of.max()) + 1
        yield Group(name, len(chosen), member, removable, reason, rows, layers, chosen, slices, row_of, crossed)


def _graph_order(ledger: Ledger, starts: IntArray) -> IntArray:
    """For every axis the place at which the graph first uses it to produce channels."""
    firsts = np.array([produced[0] for produced in ledger.produced])
    order = np.full(len(starts), len(firsts), dtype=np.int64)
    np.minimum.at(order, np.searchsorted(starts, firsts, side="right") - 1, np.arange(len(firsts)))
    return order


def _in_order(values: IntArray) -> IntArray:
    """Each once, in the order in which they appear."""
    found, first = np.unique(values, return_index=True)
    return found[np.argsort(first, kind="stable")]


def _members(channels: Channels, sets: list[IntArray]) -> list[tuple[tuple[str, int], ...]]:
    """For every set of components the parameter axes that have slices in it."""
    owner = np.full(len(channels.component), -1, dtype=np.int64)
    for index, chosen in enumerate(sets):
        owner[chosen] = index
    owner = np.append(owner[channels.component], -1)
    found: list[list[tuple[str, int]]] = [[] for _ in sets]
    axes = [axis for axis in channels.facts.ledger.axes if axis.kind != "made"]
    numbers = {(axis.name, axis.dim): number for number, axis in enumerate(axes)}
    bounds = np.array([(axis.start, axis.start + axis.size) for axis in axes], dtype=np.int64).reshape(-1)
    lowest, highest = (end.reduceat(owner, bounds)[::2].tolist() for end in (np.minimum, np.maximum))
    for name, labels in channels.facts.state.items():
        for factor in labels.factors:
            dims = dims_of(factor)
            number = numbers[name, dims[0]] if len(dims) == 1 else None
            if number is None:  # a grouped weight carries the labels of what it reads
                mine = distinct(owner[factor.reshape(-1).numpy()]).tolist()
            elif lowest[number] == highest[number]:  # most often
                mine = [lowest[number]]
            else:
                axis = axes[number]
                mine = distinct(owner[axis.start : axis.start + axis.size]).tolist()
            for index in mine:
                if index >= 0:  # columns of a grouped weight differ from row to row: the last dimension is theirs
                    found[index].append((name, dims[-1]))
    return list(map(tuple, found))


def _keys(parts: IntArray, axis_of: IntArray, frozen: BoolArray, size: int, axes: int) -> IntArray:
    """For every component a number that is equal for components produced by the same axes (and equally frozen)."""
    pairs = distinct(parts * axes + axis_of)
    weights = np.random.default_rng(0).integers(1, 2**62, axes)
    keys = np.zeros(size, dtype=np.int64)
    with np.errstate(over="ignore"):
        np.add.at(keys, pairs // axes, weights[pairs % axes])
    return keys * 2 + frozen


def _reasons(channels: Channels) -> dict[int, str]:
    """Why frozen components are frozen: the first reason that was found."""
    reasons: dict[int, str] = {}
    for constraint in reversed(channels.constraints):
        text = f"its row cannot be cut ({constraint.node})"
        reasons.update(dict.fromkeys(stuck(constraint, channels.component).tolist(), text))
    for freeze in reversed(channels.facts.ledger.freezes):
        text = f"{freeze.reason} ({freeze.node})"
        reasons.update(dict.fromkeys(channels.component[freeze.labels].tolist(), text))
    return reasons


def _slices(
    channels: Channels, position: IntArray, labels: IntArray, axis_of: IntArray, order: IntArray
) -> tuple[Slices, ...]:
    """The weight rows that produce a group's channels; ``position``: every component's place in its group; ``order``:
    every axis' in the graph."""
    made = []
    for index in sorted(distinct(axis_of).tolist(), key=order.__getitem__):
        axis = channels.facts.ledger.axes[index]
        mine = labels[axis_of == index]
        groups = axis.size // channels.facts.state[axis.name].shape[axis.dim]
        made.append(Slices(axis.name, axis.dim, mine - axis.start, position[channels.component[mine]], groups))
    return tuple(made)
