"""Solving a ledger: which labels are one channel, which channels are frozen, and what may be removed together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.channels.labels import BoolArray, IntArray, Labels, blocks_of, dims_of, distinct, labels_in, plan_cuts
from fxcompress.channels.ledger import Constraint
from fxcompress.channels.propagate import Facts


def connected(size: int, pairs: Iterable[tuple[IntArray, IntArray]]) -> IntArray:
    """The smallest member of each label's connected component, by pointer jumping over whole arrays.

    Args:
        size: labels are ``0 .. size - 1``.
        pairs: arrays of equal labels.
    """
    chunks = list(pairs)
    if not chunks:
        return np.arange(size, dtype=np.int64)
    narrow = np.int32 if size < 2**31 else np.int64  # there are many more pairs than labels
    root = np.arange(size, dtype=narrow)
    left = np.concatenate([pair[0] for pair in chunks], dtype=narrow, casting="same_kind")
    right = np.concatenate([pair[1] for pair in chunks], dtype=narrow, casting="same_kind")
    while len(left):
        low, high = np.minimum(root[left], root[right]), np.maximum(root[left], root[right])
        apart = low != high
        left, right, low, high = left[apart], right[apart], low[apart], high[apart]
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
    return root.astype(np.int64)


@dataclass(frozen=True)
class Channels:
    """A solved ledger.

    Attributes:
        component: for every label the component it belongs to (its smallest label).
        frozen: for every component number whether something freezes it.
        constraints: on the live set, in terms of components.
        soft: names of nodes whose value need not have a shape of its own when it shrinks, because everything that
            reads it is a rearrangement back to one dimension (a channel shuffle).
    """

    facts: Facts
    component: IntArray
    frozen: BoolArray
    constraints: tuple[Constraint, ...]
    soft: frozenset[str]

    def live(self, dead: IntArray) -> BoolArray:
        """For every label whether it lives, given the dead components."""
        alive: BoolArray = np.ones(len(self.component), dtype=bool)
        alive[dead] = False
        lives: BoolArray = alive[self.component]
        return lives

    def repair(self, live: BoolArray, rank: Mapping[int, float] | None = None) -> BoolArray:
        """The labels that live once every constraint holds: components are only brought back, best ranked first.

        Args:
            live: bool, one for every label, uniform over components.
            rank: importance of components; without it earlier channels come back first.
        """
        live = live.copy()
        changed = True
        while changed:  # every round brings at least one component back, so this ends
            changed = False
            for constraint in self.constraints:
                if _holds(constraint, live):
                    continue
                back = _bring_back(constraint, live, self.component, rank or {})
                alive = np.zeros(len(self.component), dtype=bool)
                alive[back] = True
                live |= alive[self.component]
                changed = True
            for excess in self.facts.ledger.excesses:
                short = excess.missing(live)
                for row, count in zip(self.component[excess.more], short, strict=True):
                    alive = np.zeros(len(self.component), dtype=bool)
                    alive[_best(row[~live[row]], int(count), rank or {})] = True
                    live |= alive[self.component]
                changed = changed or bool(short.any())
        return live


def _holds(constraint: Constraint, live: BoolArray) -> bool:
    cuts = plan_cuts(constraint.labels, live)
    if cuts is None:
        return False
    for cut in cuts:
        if 0 in cut.shape():
            return False
        for i, dim in enumerate(cut.dims):
            if dim in constraint.pinned and (i == cut.column or len(cut.keep[i]) != constraint.labels.shape[dim]):
                return False
    return True


def _bring_back(constraint: Constraint, live: BoolArray, component: IntArray, rank: Mapping[int, float]) -> IntArray:
    """Components to bring back so that the rows of a constraint become equal (all of them, if no rows are found)."""
    everything = np.concatenate([component[factor.numpy().reshape(-1)] for factor in constraint.labels.factors])
    everything = distinct(everything)
    dead: IntArray = everything[~live[everything]]
    if len(constraint.labels.factors) != 1:
        return dead
    rows = constraint.rows()
    if rows is None:
        return dead
    alive = live[rows].sum(axis=1)
    must_live = bool(constraint.pinned) or len(dims_of(constraint.labels.factors[0])) != 2
    target = max(int(alive.max()), 1)
    back: list[int] = []
    for row, count in zip(rows, alive, strict=True):
        if count == target or (count == 0 and not must_live):
            continue
        back += _best(component[row[~live[row]]], target - int(count), rank)
    return np.array(sorted(set(back)), dtype=np.int64) if back else dead


def _best(components: IntArray, count: int, rank: Mapping[int, float]) -> list[int]:
    """The first ``count`` of some components, best ranked first."""
    return sorted(dict.fromkeys(components.tolist()), key=lambda c: (-rank.get(c, 0.0), c))[:count]


def solve(facts: Facts, graph: fx.Graph) -> Channels:
    """Components, freezes and constraints of a propagation."""
    ledger = facts.ledger
    component = connected(ledger.next_label, ((e.left, e.right) for e in ledger.equalities))
    soft = _soft_nodes(facts, graph)
    constraints = _constraints(facts, graph, component, soft)
    frozen = np.zeros(ledger.next_label, dtype=bool)
    for freeze in ledger.freezes:
        frozen[component[freeze.labels]] = True
    for constraint in constraints:
        frozen[_stuck(constraint, component)] = True
    _hold_rows(constraints, component, frozen)
    return Channels(facts, component, frozen, constraints, soft)


def _stuck(constraint: Constraint, component: IntArray) -> IntArray:
    """Components that fill a whole pinned row: they can never go."""
    if not constraint.pinned or len(constraint.labels.factors) != 1:
        return np.empty(0, dtype=np.int64)
    factor = constraint.labels.factors[0].numpy()
    other = tuple(d for d in range(factor.ndim) if d not in constraint.pinned)
    rows = component[factor]
    whole = rows.min(axis=other) == rows.max(axis=other)
    return distinct(rows.min(axis=other)[whole])


def _hold_rows(constraints: Sequence[Constraint], component: IntArray, frozen: BoolArray) -> None:
    """Freeze the rows that must keep as many channels as a row of frozen ones."""
    held = [rows for c in constraints if c.pinned and (rows := c.rows()) is not None and rows.shape[1] > 1]
    changed = True
    while changed:  # every round freezes a row at least, so this ends
        changed = False
        for rows in held:
            flags = frozen[component[rows]]
            if flags.all(axis=1).any() and not flags.all():
                frozen[component[rows]] = changed = True


def _multi(labels: Labels) -> bool:
    """Whether some factor varies along several dimensions."""
    return any(factor.numel() != max(factor.shape) for factor in labels.factors)


def _soft_nodes(facts: Facts, graph: fx.Graph) -> frozenset[str]:
    """Nodes on a chain of rearrangements that starts and ends with channels along one dimension of the same shape."""
    soft: set[str] = set()
    ends: dict[str, Sequence[Labels]] = {}
    for node in reversed(graph.nodes):
        value = facts.values.get(node.name)
        if node.name not in facts.moves or not isinstance(value, Labels) or not _multi(value):
            continue
        if not node.users or len(value.factors) != 1:
            continue
        final: list[Labels] = []
        for user in node.users:
            after = facts.values.get(user.name)
            if user.name not in facts.moves or not isinstance(after, Labels) or _tensors_into(user, facts) != 1:
                break
            if _multi(after) and user.name not in soft:
                break
            final += ends[user.name] if user.name in soft else [after]
        else:
            soft.add(node.name)
            ends[node.name] = final
    return frozenset(name for name in soft if _returns(name, graph, facts, soft, ends))


def _returns(name: str, graph: fx.Graph, facts: Facts, soft: set[str], ends: Mapping[str, Sequence[Labels]]) -> bool:
    """Whether the chain through a soft node comes back to the shape it started from."""
    nodes = {node.name: node for node in graph.nodes}
    node = nodes[name]
    while node.name in soft:
        if not _tensors_into(node, facts):
            return False  # it is one of several results
        node = source_of(node, facts)
    start = facts.values[node.name]
    if not isinstance(start, Labels) or [dims_of(f) for f in start.factors] != [dims_of(start.factors[0])]:
        return False
    (dim, *more) = dims_of(start.factors[0])
    return not more and all(
        end.shape == start.shape and [dims_of(f) for f in end.factors] == [(dim,)] for end in ends[name]
    )


def _tensors_into(node: fx.Node, facts: Facts) -> int:
    return sum(isinstance(facts.values.get(source.name), Labels) for source in node.all_input_nodes)


def source_of(node: fx.Node, facts: Facts) -> fx.Node:
    """The one tensor that a rearrangement reads."""
    return next(s for s in node.all_input_nodes if isinstance(facts.values.get(s.name), Labels))


def _blocks(labels: Labels, node: str) -> Iterator[Constraint]:
    for dims, factors in blocks_of(labels):
        shape = tuple(size if d in dims else 1 for d, size in enumerate(labels.shape))
        yield Constraint(Labels(shape, tuple(factors), rows=labels.rows), frozenset(), node)


def _constraints(facts: Facts, graph: fx.Graph, component: IntArray, soft: frozenset[str]) -> tuple[Constraint, ...]:
    """What rules asked for, and that every value that is not soft keeps a shape and an element; no duplicates."""
    found = list(facts.ledger.constraints)
    for name, labels in facts.state.items():
        if _multi(labels):
            found += [block for block in _blocks(labels, name) if _multi(block.labels)]
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for node in graph.nodes:
        if node.name in soft or node.op in ("get_attr", "output"):
            continue
        for labels in labels_in(facts.values.get(node.name)):
            if len(labels.factors) == 1 and not labels.rows:  # most often the very factor that the node before had
                (factor,) = labels.factors
                key = (factor.data_ptr(), factor.shape, factor.stride())
                if key in seen:
                    continue
                seen.add(key)
            found += _blocks(labels, node.name)
    distinct: dict[Any, Constraint] = {}
    for constraint in found:
        constraint = constraint.distinct(component)
        factors = constraint.labels.factors
        content = tuple((tuple(f.shape), component[f.numpy()].tobytes()) for f in factors)
        distinct.setdefault((constraint.pinned, content), constraint)
    return tuple(distinct.values())
