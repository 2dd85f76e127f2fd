"""What a propagation writes down: fresh labels, equalities, what is frozen and why, and which rows must stay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.labels import BoolArray, IntArray, Labels, column_of, dims_of, distinct

#: Where an axis comes from: a parameter, a buffer, or a tensor that the forward makes.
Kind = Literal["parameter", "buffer", "made"]
#: Fewer pairs of labels than this are kept as they are: looking for repeated ones takes longer than solving them.
_FEW = 4096


@dataclass(frozen=True)
class Axis:
    """A range of labels: ``size`` of them from ``start``, along dimension ``dim`` of the tensor called ``name``."""

    name: str
    dim: int
    start: int
    size: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True)
class Equality:
    """Labels that are one and the same channel, pair by pair, because of ``node``.

    ``spread``: one side has no rows and the other has, so that every row has a part of the channel of its own.
    """

    left: IntArray
    right: IntArray
    node: str
    spread: bool = False


@dataclass(frozen=True)
class RowTie:
    """Labels that stand for whole rows, pair by pair with the members of those, because of ``node``."""

    rows: IntArray
    members: IntArray
    node: str


@dataclass(frozen=True)
class Freeze:
    """Labels that cannot be removed because of what ``node`` does with them."""

    labels: IntArray
    reason: str
    node: str


@dataclass(frozen=True)
class Constraint:
    """The live elements of ``labels`` must form a rectangle or equal rows; ``pinned`` dimensions stay whole."""

    labels: Labels
    pinned: frozenset[int]
    node: str

    def rows(self) -> IntArray | None:
        """The labels as an array of rows that must stay equally long; None where two factors are conjoined.

        Labels follow each other most closely along a row: that is how the channels were numbered.
        """
        if len(self.labels.factors) != 1:
            return None
        (factor,) = self.labels.factors
        column = self._column(factor)
        if column is None:
            return factor.numpy().reshape(-1, 1)
        return np.moveaxis(factor.numpy(), column, -1).reshape(-1, factor.shape[column])

    def row_shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions that number the rows."""
        (factor,) = self.labels.factors
        column = self._column(factor)
        return tuple(size for dim, size in enumerate(factor.shape) if dim != column)

    def _column(self, factor: Tensor) -> int | None:
        """The dimension along which rows run; None where all dimensions number rows."""
        free = [dim for dim in dims_of(factor) if dim not in self.labels.row_dims]
        return column_of(factor, free) if free else None

    def distinct(self, cells: IntArray) -> Constraint:
        """The same constraint without slices that repeat others, where all repeat equally often (the batch does)."""
        if len(self.labels.factors) != 1:
            return self
        dims = dims_of(self.labels.factors[0])
        if len(dims) == 1 and not self.pinned:
            return self  # it only keeps the last one from going
        factor = self.labels.factors[0].numpy()
        for dim in dims:
            _, first, counts = np.unique(cells[factor], axis=dim, return_index=True, return_counts=True)
            if (counts == counts[0]).all():
                factor = factor.take(np.sort(first), axis=dim)
        made = torch.from_numpy(np.ascontiguousarray(factor))
        return Constraint(Labels(tuple(made.shape), (made,), row_dims=self.labels.row_dims), self.pinned, self.node)


@dataclass(frozen=True)
class Contraction:
    """Products that ``node`` sums: ``repeats`` times (positions, kernel) an index space with these labels.

    The space holds one product for each of its elements, those along the summed dimensions included.
    """

    node: str
    space: Labels
    repeats: int


@dataclass(frozen=True)
class Division:
    """An operator, at ``node``, takes the channels of a dimension in groups: ``labels`` are (groups, group size)."""

    labels: IntArray
    node: str


@dataclass(frozen=True)
class Excess:
    """Every row of ``more`` must keep more channels than ``less`` does: an operator tells them apart by their number.

    Both are labels ``[rows, channels]``, of which every row keeps equally many.
    """

    more: IntArray
    less: IntArray

    def missing(self, live: BoolArray) -> IntArray:
        """How many channels each row of ``more`` is short of."""
        least = live[self.less].sum(axis=1).max() + 1
        short: IntArray = np.maximum(least - live[self.more].sum(axis=1), 0)
        return short


def _lies_on(factor: Tensor, axis: Axis) -> bool:
    """Whether all labels of a factor are of an axis."""
    if not axis.start <= int(factor.reshape(-1)[0]) < axis.start + axis.size:
        return False
    return axis.start <= int(factor.min()) and int(factor.max()) < axis.start + axis.size


@dataclass
class Ledger:
    """Everything that a propagation found out, in the order in which it did."""

    axes: list[Axis] = field(default_factory=list)
    equalities: list[Equality] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    row_ties: list[RowTie] = field(default_factory=list)
    divisions: list[Division] = field(default_factory=list)
    excesses: list[Excess] = field(default_factory=list)
    produced: list[IntArray] = field(default_factory=list)
    layers: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    live_only: set[str] = field(default_factory=set)
    ended: list[Tensor] = field(default_factory=list)
    row_axes: list[Axis] = field(default_factory=list)
    copies: list[tuple[Axis, int, int]] = field(default_factory=list)
    node: str = ""
    next_label: int = 1

    def fresh(self, name: str, shape: Iterable[int], kind: Kind) -> tuple[Tensor, ...]:
        """New labels for a tensor: one factor for each dimension longer than 1."""
        shape = tuple(shape)
        factors = []
        for dim, size in enumerate(shape):
            if size > 1:
                labels = self.fresh_axis(name, dim, size, kind)
                factors.append(labels.reshape([size if d == dim else 1 for d in range(len(shape))]))
        return tuple(factors)

    def fresh_axis(self, name: str, dim: int, size: int, kind: Kind = "made") -> Tensor:
        """``size`` new labels, 1-D."""
        axis = Axis(name, dim, self.next_label, size, kind)
        self.axes.append(axis)
        self.next_label += size
        return torch.arange(axis.start, axis.start + size)

    def copies_along(self, dim: int, size: int) -> Tensor:
        """Labels for ``size`` copies along a dimension of the running node's value, 1-D."""
        fresh = self.fresh_axis(self.node, dim, size)
        self.copies.append((self.axes[-1], len(self.equalities), len(self.row_ties)))
        return fresh

    def unite(self, left: Tensor, right: Tensor, *, spread: bool = False) -> None:
        """The labels of two factors (broadcast against each other) are one and the same channel.

        Args:
            left, right: the factors.
            spread: along what only one of them has, rows may go one by one.
        """
        if left is right:
            return
        if left.shape != right.shape:
            left, right = torch.broadcast_tensors(left, right)
        a, b = left.reshape(-1).numpy(), right.reshape(-1).numpy()
        if a[0] == b[0] and (a == b).all():
            return
        self.equalities.append(Equality(*self._distinct(a, b), self.node, spread))

    def _distinct(self, a: IntArray, b: IntArray) -> tuple[IntArray, IntArray]:
        """Pairs of different labels; of many, each once: a batch or space merged into a dimension repeats them."""
        if len(a) <= _FEW:
            return a, b
        different = a != b
        pairs = np.sort(a[different] * self.next_label + b[different])
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        return pairs // self.next_label, pairs % self.next_label

    def stand_for(self, rows: Tensor, members: Tensor) -> None:
        """Every label of ``rows`` goes with the labels of ``members`` that it meets, and only with all of them."""
        rows, members = torch.broadcast_tensors(rows, members)
        pairs = self._distinct(rows.reshape(-1).numpy(), members.reshape(-1).numpy())
        self.row_ties.append(RowTie(*pairs, self.node))

    def rows_along(self, factor: Tensor, dims: Iterable[int]) -> Tensor:
        """New labels for the rows of a factor, which ``dims`` number: what remains of it when the others are summed."""
        dims = tuple(sorted(dims))
        sizes = [size if dim in dims else 1 for dim, size in enumerate(factor.shape)]
        lines = factor.movedim(dims, tuple(range(len(dims)))).reshape(math.prod(sizes), -1)
        weights = np.random.default_rng(0).integers(1, 2**62, lines.shape[1])
        with np.errstate(over="ignore"):  # rows are compared by hash: sorting whole ones takes ten times as long
            _, first, which = np.unique(lines.numpy() @ weights, return_index=True, return_inverse=True)
        fresh = self.fresh_axis(self.node, dims[0], len(first))
        self.row_axes.append(self.axes[-1])
        rows = fresh[torch.from_numpy(which.reshape(-1))].reshape(sizes)
        self.stand_for(rows, factor)
        return rows

    def are_rows(self, factor: Tensor) -> bool:
        """Whether the labels of a factor are of rows, as :meth:`rows_along` made them."""
        return any(_lies_on(factor, axis) for axis in self.row_axes)

    def copies_of(self, factor: Tensor) -> str | None:
        """The node that made the copies whose labels a factor holds; None if it holds others."""
        return next((axis.name for axis, _, _ in self.copies if _lies_on(factor, axis)), None)

    def are_alone(self, factor: Tensor) -> bool:
        """Whether the labels of a factor are of copies that have met nothing yet."""
        for axis, equalities, ties in self.copies:
            if _lies_on(factor, axis):
                met = [labels for e in self.equalities[equalities:] for labels in (e.left, e.right)]
                met += [labels for tie in self.row_ties[ties:] for labels in (tie.rows, tie.members)]
                return not any(((labels >= axis.start) & (labels < axis.start + axis.size)).any() for labels in met)
        return False

    def has_own_copies(self) -> bool:
        """Whether the running node has made copies."""
        return bool(self.copies) and self.copies[-1][0].name == self.node

    def are_own_copies(self, factor: Tensor) -> bool:
        """Whether a factor is one of copies, each once, that the running node made and that have met nothing yet."""
        own = (axis for axis, _, _ in self.copies if axis.name == self.node and axis.size == factor.numel())
        return any(_lies_on(factor, axis) for axis in own) and self.are_alone(factor)

    def freeze(self, factors: Iterable[Tensor], reason: str) -> None:
        """No channel in these factors can be removed."""
        for factor in factors:
            self.freezes.append(Freeze(distinct(factor.numpy()), reason, self.node))

    def pin(self, factor: Tensor, dims: Iterable[int], reason: str) -> None:
        """A factor's channels may go as long as none of ``dims`` gets shorter."""
        dims = frozenset(dims) & frozenset(dims_of(factor))
        if dims == frozenset(dims_of(factor)):
            self.freeze([factor], reason)
        elif dims:
            self.constrain(factor, dims)

    def constrain(self, factor: Tensor, pinned: Iterable[int] = (), rows: Iterable[int] = ()) -> None:
        """The live part of a factor must have a shape: a rectangle, or rows of equal length.

        Args:
            factor: the labels.
            pinned: dimensions that stay whole.
            rows: dimensions that number rows, which may go whole; without, rows run where labels follow each other.
        """
        labels = Labels(tuple(factor.shape), (factor,), row_dims=frozenset({*pinned, *rows}))
        self.constraints.append(Constraint(labels, frozenset(pinned), self.node))

    def divide(self, factor: Tensor, groups: int, pinned: Iterable[int] = ()) -> Tensor:
        """The running operator takes a factor's channels in groups, which must keep equally many: (groups, size)."""
        rows = factor.reshape(groups, -1)
        self.divisions.append(Division(rows.numpy(), self.node))
        self.constrain(rows, pinned, rows=(0,))
        return rows

    def exceed(self, more: Tensor, less: Tensor) -> None:
        """Every row of ``more [rows, channels]`` must keep more channels than the rows of ``less`` do."""
        self.excesses.append(Excess(more.numpy(), less.numpy()))

    def produce(self, factors: Iterable[Tensor]) -> None:
        """These labels are rows of a weight that produces channels: they are what gets scored."""
        self.produced.extend(distinct(factor.numpy()) for factor in factors)

    def contract(self, shape: Iterable[int], factors: Iterable[Tensor], repeats: int) -> None:
        """One product is computed for each live element of this index space, ``repeats`` times."""
        self.contractions.append(Contraction(self.node, Labels(tuple(shape), tuple(factors)), repeats))

    def end(self, factors: Iterable[Tensor]) -> None:
        """Every element of these factors goes into one result: the channels end here, and what they hold is read."""
        self.ended.extend(factors)

    def connect(self, consumed: Iterable[Tensor], produced: Iterable[Tensor]) -> None:
        """A weight reads these channels and produces those."""
        columns, rows = ([distinct(factor.numpy()) for factor in factors] for factors in (consumed, produced))
        if columns and rows:
            self.layers.append((np.concatenate(columns), np.concatenate(rows)))
