"""Why channels are coupled, lie in rows, or are frozen: the nodes of the model that say so."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from fxcompress.channels.labels import BoolArray, IntArray
from fxcompress.channels.propagate import WHOLE
from fxcompress.channels.row_tables import lines_of

if TYPE_CHECKING:
    from fxcompress.channels.groups import ChannelGroups, Group
    from fxcompress.channels.row_sets import RowSet


def explanation(groups: ChannelGroups, name: str, other: str | None = None) -> str:
    """What :meth:`fxcompress.ChannelGroups.explain` says."""
    lines = _own_freezes(groups, name)
    sets = [] if lines else groups.row_sets
    for group in [] if lines else groups.groups_of(name):
        mine = _of(groups, group.components)
        paths = _couplings(groups, mine)
        lines.append(str(group))
        starts = [s for s in group.slices if name in (s.layer, s.parameter)] or list(group.slices[:1])
        start = f"{starts[0].parameter}[{starts[0].dim}]"
        for target in group.slices:
            if target is starts[0] or (other is not None and other not in (target.layer, target.parameter)):
                continue
            lines.append(f"  with {target.layer}: " + _path(paths, start, f"{target.parameter}[{target.dim}]"))
        lines += _equal_rows(groups, group) if other is None else []
        for rows in sets:
            if group.name in rows.groups:
                lines += _whole_rows(groups, group, rows, start, other)
        lines += _freezes(groups, group, paths, start)
    if other is not None and not any(line.startswith(("  with", "  whole rows with")) for line in lines):
        lines.append(f"  {name} and {other} share no channel")
    return "\n".join(lines)


def _of(groups: ChannelGroups, components: IntArray) -> BoolArray:
    """For every label whether it is of these components."""
    mine = np.zeros(len(groups.channels.component), dtype=bool)
    mine[components] = True
    found: BoolArray = mine[groups.channels.component]
    return found


def _own_freezes(groups: ChannelGroups, name: str) -> list[str]:
    """Why a layer that produces no group has no channels: it is one operator, or opaque."""
    if any(name in (group.name, *group.layers) for group in groups):
        return []
    return [
        f"{name} is frozen at {freeze.node}: {freeze.reason}"
        for freeze in groups.channels.facts.ledger.freezes
        if any(axis.name.startswith(f"{name}.") for axis in groups.axes_of(freeze.labels))
        and freeze.reason.endswith(WHOLE)
    ][:1]


def _couplings(groups: ChannelGroups, mine: BoolArray, *, rows: bool = False) -> nx.Graph[str]:
    """Axes as nodes, an edge where a node of the model makes two of them one channel (or ties their ``rows``).

    Args:
        groups: the analysis.
        mine: for every label whether it is looked at.
        rows: with the ties of rows.
    """
    ledger = groups.channels.facts.ledger
    pairs: Iterable[tuple[IntArray, IntArray, str]] = ((e.left, e.right, e.node) for e in ledger.equalities)
    if rows:
        pairs = itertools.chain(pairs, ((tie.rows, tie.members, tie.node) for tie in ledger.row_ties))
    axes, starts = ledger.axes, np.array([axis.start for axis in ledger.axes])
    graph: nx.Graph[str] = nx.Graph()
    for left, right, node in pairs:
        inside = mine[left] & mine[right]
        if inside.any():
            ends = np.searchsorted(starts, np.stack([left[inside], right[inside]]), side="right") - 1
            for a, b in np.unique(ends, axis=1).T:
                if not graph.has_edge(str(axes[a]), str(axes[b])):
                    graph.add_edge(str(axes[a]), str(axes[b]), node=node)
    return graph


def _equal_rows(groups: ChannelGroups, group: Group) -> Iterator[str]:
    """The nodes that want rows of a group to keep equally many channels: for each number of rows the first."""
    seen = set()
    for constraint, lines in lines_of(groups.channels):
        members = np.isin(lines, group.components).any(axis=1)
        if (count := int(members.sum())) > 1 and count not in seen:
            seen.add(count)
            yield f"  in {count} rows that keep equally many, or go whole: at {constraint.node}"


def _whole_rows(groups: ChannelGroups, group: Group, rows: RowSet, start: str, other: str | None) -> Iterator[str]:
    """What goes with a whole row of a group besides its own layers, and the nodes that say so."""
    graph = _couplings(groups, np.isin(groups.channels.rows.row, rows.numbers), rows=True)
    for item in rows.slices:
        if item.layer not in group.layers and other in (None, item.layer, item.parameter):
            yield f"  whole rows with {item.layer}: " + _path(graph, start, f"{item.parameter}[{item.dim}]")


def _freezes(groups: ChannelGroups, group: Group, paths: nx.Graph[str], start: str) -> list[str]:
    if group.removable:
        return []
    mine = _of(groups, group.components)
    for freeze in groups.channels.facts.ledger.freezes:
        labels = freeze.labels[mine[freeze.labels]]
        if len(labels):
            axis = groups.axes_of(labels)[0]
            way = "" if str(axis) == start else " by " + _path(paths, start, str(axis))
            return [f"  frozen at {freeze.node}: {freeze.reason}{way}"]
    return [f"  frozen: {group.reason}"]


def _path(graph: nx.Graph[str], start: str, end: str) -> str:
    if start == end:
        return start
    try:
        nodes: list[str] = nx.shortest_path(graph, start, end)
    except (nx.NetworkXNoPath, nx.NodeNotFound):
        return f"{start} and {end} by way of a constraint"
    steps = [f" =({graph.edges[a, b]['node']})= {b}" for a, b in itertools.pairwise(nodes)]
    return nodes[0] + "".join(steps)
