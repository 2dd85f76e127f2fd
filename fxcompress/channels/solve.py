"""Solving a ledger: which labels are one channel, which channels are frozen, and what may be removed together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.channels.labels import (
    BoolArray,
    FloatArray,
    IntArray,
    Labels,
    blocks_of,
    dims_of,
    distinct,
    labels_in,
    plan_cuts,
)
from fxcompress.channels.ledger import Constraint, Ledger, RowTie
from fxcompress.channels.propagate import Facts
from fxcompress.channels.rows import Rows, rows_of


def connected(size: int, pairs: Iterable[tuple[IntArray, IntArray]]) -> IntArray:
    """The smallest member of each label's connected component, by pointer jumping over whole arrays.

    Args:
        size: labels are ``0 .. size - 1``.
        pairs: arrays of equal labels.
    """
    chunks = list(pairs)
    if not chunks:
        return np.arange(size, dtype=np.int64)
    root = np.arange(size, dtype=np.intp)  # numpy copies indices of any other type
    left, right = (np.concatenate([pair[side] for pair in chunks]) for side in (0, 1))
    while True:
        low, high = root[left], root[right]
        apart = np.flatnonzero(low != high)
        if not len(apart):
            return root.astype(np.int64, copy=False)
        if len(apart) < len(left):
            left, right, low, high = left[apart], right[apart], low[apart], high[apart]
        np.minimum.at(root, np.maximum(low, high), np.minimum(low, high))
        while not np.array_equal(up := root[root], root):
            root = up


@dataclass(frozen=True)
class Channels:
    """A solved ledger.

    Attributes:
        component: for every label the component it belongs to (its smallest label).
        frozen: for every component number whether something freezes it.
        constraints: on the live set, in terms of components.
        rows: rows that may go whole, and what goes with them.
        soft: names of nodes whose value need not have a shape of its own when it shrinks, because everything that
            reads it is a rearrangement back to one dimension (a channel shuffle).
    """

    facts: Facts
    component: IntArray
    frozen: BoolArray
    constraints: tuple[Constraint, ...]
    soft: frozenset[str]
    rows: Rows

    def live(self, dead: IntArray, rows: IntArray | None = None) -> BoolArray:
        """For every label whether it lives, given the dead components and the numbers of dead rows."""
        alive: BoolArray = np.ones(len(self.component), dtype=bool)
        alive[dead] = False
        lives: BoolArray = alive[self.component]
        if rows is not None and len(rows):
            lives &= ~np.isin(self.rows.row, rows)
        return self.rows.product(lives, self.component, alive)

    def without(self, gone: BoolArray) -> BoolArray:
        """For every label whether it lives, given labels that are gone: all that is one element by element with them
        goes, and a component does of which every row has lost its part, or that lost a part which lies in no row."""
        dead = np.zeros(len(self.component), dtype=bool)
        dead[self.rows.part[gone]] = True
        live: BoolArray = ~dead[self.rows.part]
        return self.rows.product(live, self.component, self.alive(live))

    def alive(self, live: BoolArray) -> BoolArray:
        """For every component whether it lives: a part in some row does, and none died that lies in no row."""
        alive = np.ones(len(self.component), dtype=bool)
        alive[self.component[~live]] = False
        in_rows = self.rows.row > 0
        alive[self.component[live & in_rows]] = True
        alive[self.component[~live & ~in_rows]] = False
        return alive

    def revived(self, live: BoolArray, labels: IntArray) -> BoolArray:
        """What lives once the components and rows of some labels do."""
        channels, row = self.alive(live), self.rows.row
        channels[self.component[labels]] = True
        alive = self.rows.living(live)
        alive[row[labels]] = True
        lives: BoolArray = live | (channels[self.component] & alive[row])
        return self.rows.product(lives, self.component, channels)

    def repair(self, live: BoolArray, rank: FloatArray | None = None) -> BoolArray:
        """The labels that live once every constraint holds: components are only brought back, best ranked first.

        Args:
            live: bool, one for every label, uniform over components.
            rank: importance of every component, by number; without it earlier channels come back first.
        """
        live = self.without(~live)
        changed = True
        while changed:  # every round brings at least one label back, so this ends
            changed = False
            for constraint in self.constraints:
                if _holds(constraint, live):
                    continue
                back = _bring_back(constraint, live, self.component, rank)
                live = self.revived(live, back)
                changed = True
            for excess in self.facts.ledger.excesses:
                for row, count in zip(excess.more, excess.missing(live), strict=True):
                    more = _best(row[~live[row]], int(count), self.component, rank)
                    live = self.revived(live, np.array(more, dtype=np.int64))
                    changed = changed or bool(more)
            for tie in self.rows.ties:
                empty = self.rows.empty(tie, live)
                if len(empty):
                    live = self.revived(live, _best_members(tie, empty, live, self.component, rank))
                    changed = True
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


def _bring_back(constraint: Constraint, live: BoolArray, component: IntArray, rank: FloatArray | None) -> IntArray:
    """Labels to bring back so that the rows of a constraint become equal (all of them, if no rows are found)."""
    everything = np.concatenate([factor.numpy().reshape(-1) for factor in constraint.labels.factors])
    dead: IntArray = distinct(everything[~live[everything]])
    rows = constraint.rows()
    if rows is None:
        return dead
    alive = live[rows].sum(axis=1)
    target = max(int(alive.max()), 1)
    back: list[int] = []
    for row, count, stays in zip(rows, alive, _must_live(constraint, alive), strict=True):
        if count < target and stays:
            back += _best(row[~live[row]], target - int(count), component, rank)
    return np.array(sorted(set(back)), dtype=np.int64) if back else dead


def _must_live(constraint: Constraint, alive: IntArray) -> BoolArray:
    """For every row of a constraint whether it cannot stay empty: what lives is a product of row dimensions."""
    sizes = constraint.row_shape()
    grid = (alive > 0).reshape(sizes)
    stays: BoolArray = np.ones(sizes, dtype=bool)
    if constraint.pinned or not grid.any():  # all that a value has never goes
        return stays.reshape(-1)
    for dim in range(grid.ndim):
        others = tuple(d for d in range(grid.ndim) if d != dim)
        stays &= grid.any(axis=others, keepdims=True)
    return stays.reshape(-1)


def _best(gone: IntArray, count: int, component: IntArray, rank: FloatArray | None) -> list[int]:
    """The best ranked of some labels, one for each component."""
    one_of: dict[int, int] = {}
    for label in gone.tolist():
        one_of.setdefault(int(component[label]), label)
    ranked = sorted(one_of) if rank is None else sorted(one_of, key=lambda c: (-rank[c], c))
    return [one_of[c] for c in ranked[:count]]


def _best_members(
    tie: RowTie, empty: IntArray, live: BoolArray, component: IntArray, rank: FloatArray | None
) -> IntArray:
    """For rows that live without a member: as many of those as the fullest row has, and one at least."""
    lives = live[tie.members]
    counts = np.unique(tie.rows[lives], return_counts=True)[1] if lives.any() else np.ones(1, dtype=np.int64)
    best = [_best(distinct(tie.members[tie.rows == row]), int(counts.max()), component, rank) for row in empty]
    return np.array(sorted(set(itertools.chain.from_iterable(best))), dtype=np.int64)


def solve(facts: Facts, graph: fx.Graph) -> Channels:
    """Components, freezes and constraints of a propagation."""
    ledger = facts.ledger
    component = connected(ledger.next_label, ((e.left, e.right) for e in ledger.equalities))
    rows = _rows(ledger, component, [])
    soft = _soft_nodes(facts, graph)
    cells = component * rows.number + rows.row  # two labels with one number always live and die together
    constraints = _constraints(facts, graph, cells, soft)
    bonds = [bond for constraint in constraints if (bond := _bond(constraint, rows)) is not None]
    if bonds:
        rows = _rows(ledger, component, bonds)
    frozen = np.zeros(ledger.next_label, dtype=bool)
    for freeze in ledger.freezes:
        frozen[component[freeze.labels]] = True
    for constraint in constraints:
        frozen[stuck(constraint, component)] = True
        rows.frozen[stuck(constraint, rows.row)] = True
    _hold_rows(constraints, component, frozen)
    frozen[component[rows.carried & rows.frozen[rows.row]]] = True
    return Channels(facts, component, frozen, constraints, soft, rows)


def _rows(ledger: Ledger, component: IntArray, bonds: Sequence[tuple[IntArray, IntArray]]) -> Rows:
    """The rows that may go whole; ``bonds`` are pairs of labels whose rows go together."""
    if not ledger.row_ties:
        return Rows.none(component)
    part = component
    if any(e.spread for e in ledger.equalities):
        part = connected(len(component), ((e.left, e.right) for e in ledger.equalities if not e.spread))
    pairs = [(part[tie.rows], part[tie.members]) for tie in ledger.row_ties]
    tied = distinct(np.concatenate([side for pair in pairs for side in pair]))
    pairs += [(part[left], part[right]) for left, right in bonds]
    return rows_of(ledger.row_ties, part, ledger.freezes, (connected(len(component), pairs), tied))


def _bond(constraint: Constraint, rows: Rows) -> tuple[IntArray, IntArray] | None:
    """Labels whose rows go together because those of a value that two dimensions number must stay a rectangle: where a
    fused projection has lost a head's queries, it has lost its values. None where they do so anyway."""
    lines = constraint.rows() if rows.ties and not constraint.pinned else None
    if lines is None or len(shape := [size for size in constraint.row_shape() if size > 1]) < 2:
        return None
    numbers = rows.row[lines]
    if numbers.min() == 0 or (numbers != numbers[:, :1]).any():
        return None
    grid = numbers[:, 0].reshape(shape)
    for dim in range(grid.ndim):
        slabs = np.moveaxis(grid, dim, 0).reshape(shape[dim], -1)
        if (slabs == slabs[:, :1]).all():
            return None
    labels = lines[:, 0].reshape(-1, shape[-1])
    return labels[1:].reshape(-1), np.broadcast_to(labels[:1], labels[1:].shape).reshape(-1)


def stuck(constraint: Constraint, number: IntArray) -> IntArray:
    """Numbers (of components, or of rows) that fill a whole pinned row: they can never go."""
    if not constraint.pinned or len(constraint.labels.factors) != 1:
        return np.empty(0, dtype=np.int64)
    factor = constraint.labels.factors[0].numpy()
    other = tuple(d for d in range(factor.ndim) if d not in constraint.pinned)
    rows = number[factor]
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
        yield Constraint(Labels(shape, tuple(factors), row_dims=labels.row_dims), frozenset(), node)


def _constraints(facts: Facts, graph: fx.Graph, cells: IntArray, soft: frozenset[str]) -> tuple[Constraint, ...]:
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
            if len(labels.factors) == 1 and not labels.row_dims:  # most often the very factor that the node before had
                (factor,) = labels.factors
                key = (factor.data_ptr(), factor.shape, factor.stride())
                if key in seen:
                    continue
                seen.add(key)
            found += _blocks(labels, node.name)
    distinct: dict[Any, Constraint] = {}
    for constraint in found:
        constraint = constraint.distinct(cells)
        factors = constraint.labels.factors
        content = tuple((tuple(f.shape), cells[f.numpy()].tobytes()) for f in factors)
        distinct.setdefault((constraint.pinned, content), constraint)
    return tuple(distinct.values())
