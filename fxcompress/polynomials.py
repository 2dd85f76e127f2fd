"""Live element counts as polynomials in the widths of channel groups.

How many elements of a tensor live is a product over the blocks of dimensions that its factors share. A block with one
factor counts its live labels, which is linear in the widths. Where several factors meet in one block, an element lives
if all of them do: pairs of channels are counted, each with the product of their widths. A convolution group's rows
keep equally many inputs each, so that there rows and inputs per row are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from torch import Tensor

from fxcompress.channels.groups import Group
from fxcompress.channels.labels import IntArray, Labels, blocks_of, dims_of
from fxcompress.channels.solve import Channels
from fxcompress.errors import GraphError


@dataclass(frozen=True)
class Product:
    """``coefficient * prod(factors) / denominator``: the live elements of a tensor, or the products of a contraction.

    The factors are polynomials with integer coefficients. At widths that a removal can leave, the denominator divides
    their product.
    """

    coefficient: int
    denominator: int = 1
    factors: tuple[Any, ...] = ()

    @classmethod
    def of(cls, coefficient: int, factors: Iterable[Product]) -> Product:
        """The product of a number and of other products."""
        parts = tuple(factors)
        return cls(
            coefficient * math.prod(part.coefficient for part in parts),
            math.prod(part.denominator for part in parts),
            tuple(symbol for part in parts for symbol in part.factors),
        )


@dataclass(frozen=True)
class Rows:
    """Rows that keep equally many channels, as long as none goes whole.

    Attributes:
        number: how many rows.
        total: their live channels, as a sympy expression: a multiple of ``number``.
        groups: names of the groups that they belong to.
    """

    number: int
    total: Any
    groups: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """Channels of one group that every parameter and contraction uses alike: only how many live counts.

    Attributes:
        name: the group's name; with ``:0``, ``:1``, ... behind it where the group has several cells.
        group: the group's name.
        components: the channels' numbers in the analysis.
        symbol: how many of them live.
    """

    name: str
    group: str
    components: IntArray
    symbol: Any


class Use:
    """One tensor or index space: which components its elements belong to, block by block.

    Args:
        labels: of the tensor.
        component: for every label its component, 0 where it cannot be removed.
    """

    def __init__(self, labels: Labels, component: IntArray) -> None:
        self.blocks = [_Block(dims, factors, component) for dims, factors in blocks_of(labels)]
        varying = labels.varying()
        self.rest = math.prod(size for dim, size in enumerate(labels.shape) if dim not in varying)


class _Block:
    """Factors that share dimensions.

    Attributes:
        tuples: components that meet in an element, smallest last, 0 for none: shape (at most factors, elements);
            equal columns once.
        counts: how many elements have them.
    """

    def __init__(self, dims: tuple[int, ...], factors: Sequence[Tensor], component: IntArray) -> None:
        self.sources = [(dims_of(factor), component[factor.numpy()]) for factor in factors]
        arrays = [parts.reshape([parts.shape[d] for d in dims]) for _, parts in self.sources]
        elements = np.stack([array.reshape(-1) for array in np.broadcast_arrays(*arrays)])
        if len(elements) > 1:
            elements = -np.sort(-elements, axis=0)
            elements[1:][elements[1:] == elements[:-1]] = 0  # the same channel twice counts once
            elements = -np.sort(-elements, axis=0)
            elements = elements[elements.any(axis=1)] if elements.any() else elements[:1]
        if len(elements) == 1:
            unique, self.counts = np.unique(elements[0], return_counts=True)
            self.tuples = unique[None]
        else:
            self.tuples, self.counts = np.unique(elements, axis=1, return_counts=True)

    def marginals(self) -> list[tuple[IntArray, IntArray]]:
        """Components and how often each occurs: in every factor, and in the elements."""
        found = [np.unique(parts, return_counts=True) for _, parts in self.sources]
        if len(self.tuples) > 1:
            parts, where = np.unique(self.tuples.reshape(-1), return_inverse=True)
            counts = np.zeros(len(parts), dtype=np.int64)
            np.add.at(counts, where.reshape(-1), np.tile(self.counts, len(self.tuples)))
            found.append((parts, counts))
        return found


class Counter:
    """Counts live elements.

    Args:
        channels: the analysis.
        groups: its groups.
        tensors: labels of everything that will be counted; they decide how groups fall into cells.
    """

    def __init__(self, channels: Channels, groups: Iterable[Group], tensors: Iterable[Labels]) -> None:
        removable = [group for group in groups if group.removable]
        owned = np.zeros(len(channels.component), dtype=bool)
        for group in removable:
            owned[group.components] = True
        self._component = np.where(owned[channels.component], channels.component, 0)
        self._uses = {id(labels): (labels, Use(labels, self._component)) for labels in tensors}
        self.cells = _cells(removable, [use for _, use in self._uses.values()], len(owned))
        self._cell = np.full(len(owned), -1, dtype=np.int64)
        for index, cell in enumerate(self.cells):
            self._cell[cell.components] = index
        ledger = channels.facts.ledger
        products = {item.node for item in ledger.contractions}
        self._equal = [
            self._component[factor.numpy()]
            for constraint in ledger.constraints
            for factor in constraint.labels.factors
            if constraint.labels.row_dims == {0} and factor.dim() == 2 and constraint.node in products
        ]

    def live(self, labels: Labels, repeats: int = 1, where: str = "") -> Product:
        """The live elements of one of the tensors, ``repeats`` times.

        Raises:
            GraphError: they depend on which channels live, not only on how many (``where`` names the tensor).
        """
        _, use = self._uses[id(labels)]
        return Product.of(use.rest * repeats, [self._block(block, where) for block in use.blocks])

    def _block(self, block: _Block, where: str) -> Product:
        if len(block.tuples) == 1:
            return self._linear(block.tuples[0], block.counts)
        found = self._pairs(block) or self._equal_rows(block)
        if found is None:
            raise GraphError(
                f"the size of {where} is no polynomial in the widths of its groups: it depends on which channels "
                "live. Remove the channels and count what is left."
            )
        return found

    def _linear(self, parts: IntArray, counts: IntArray) -> Product:
        """One factor: every live component has its elements."""
        cell = self._cell[parts]
        fixed = int(counts[cell < 0].sum())
        cell, counts = cell[cell >= 0], counts[cell >= 0]
        indices, first, which = np.unique(cell, return_index=True, return_inverse=True)
        if (counts != counts[first][which]).any() or len(cell) != sum(len(self.cells[i].components) for i in indices):
            raise GraphError("channels of one cell are used differently")
        return _polynomial(fixed, {(int(i),): int(counts[f]) for i, f in zip(indices, first, strict=True)}, self)

    def _pairs(self, block: _Block) -> Product | None:
        """Several factors, every combination of whose channels meets equally often."""
        cells = np.where(block.tuples > 0, self._cell[block.tuples], -1)
        cells = -np.sort(-cells, axis=0)
        kinds, where = np.unique(cells, axis=1, return_inverse=True)
        terms: dict[tuple[int, ...], int] = {}
        for index, kind in enumerate(kinds.T):
            mine = block.counts[where.reshape(-1) == index]
            involved = tuple(int(i) for i in kind if i >= 0)
            pairs = math.prod(len(self.cells[i].components) for i in involved)
            if len(set(involved)) != len(involved) or len(mine) != pairs or mine.min() != mine.max():
                return None
            terms[involved] = int(mine[0])
        return _polynomial(terms.pop((), 0), terms, self)

    def _equal_rows(self, block: _Block) -> Product | None:
        """Rows of one factor that keep equally many columns of the other: live rows times columns per row."""
        if len(block.sources) != 2:
            return None
        (outer, rows), (inner, columns) = sorted(block.sources, key=lambda source: len(source[0]))
        if not set(outer) < set(inner):
            return None
        lines = np.moveaxis(columns, outer, range(len(outer))).reshape(math.prod(rows.shape), -1)
        if not self._stay_equal(lines):
            return None
        one, two = (self._linear(*np.unique(parts, return_counts=True)) for parts in (rows, columns))
        common = math.gcd(two.coefficient, len(lines))
        per_row = Product(two.coefficient // common, len(lines) // common, two.factors)
        return Product.of(1, [one, per_row])

    def _stay_equal(self, lines: IntArray) -> bool:
        """Whether the analysis demands that these rows keep equally many (and none has gone whole)."""
        wanted = set(map(bytes, np.sort(lines, axis=1)))
        return any(wanted <= set(map(bytes, np.sort(rows, axis=1))) for rows in self._equal)

    def rows(self) -> tuple[Rows, ...]:
        """What the widths have to be multiples of."""
        found: dict[Any, Rows] = {}
        for lines in self._equal:
            parts, counts = np.unique(lines, return_counts=True)
            if (counts == 1).all() and parts[0] > 0:
                total = self._linear(parts, counts)
                names = tuple(dict.fromkeys(self.cells[i].group for i in np.unique(self._cell[parts])))
                for factor in total.factors:
                    found[len(lines), factor] = Rows(len(lines), factor * total.coefficient, names)
        return tuple(found.values())


def _polynomial(fixed: int, terms: Mapping[tuple[int, ...], int], counter: Counter) -> Product:
    """``fixed`` and multiples of products of cells' widths, with their common divisor in front."""
    if not terms:
        return Product(fixed)
    common = math.gcd(fixed, *terms.values())
    symbols = [cell.symbol for cell in counter.cells]
    parts = [sympy.Mul(count // common, *(symbols[i] for i in involved)) for involved, count in sorted(terms.items())]
    return Product(common, 1, (sympy.Add(fixed // common, *parts),))


def _cells(groups: Sequence[Group], uses: Sequence[Use], size: int) -> tuple[Cell, ...]:
    """Every group's channels, those together that occur equally often in every block."""
    occurrences = [found for use in uses for block in use.blocks for found in block.marginals()]
    weights = np.random.default_rng(0).integers(1, 2**62, len(occurrences))
    signature = np.zeros(size, dtype=np.int64)
    with np.errstate(over="ignore"):
        for (parts, counts), weight in zip(occurrences, weights, strict=True):
            signature[parts] += counts * weight
    made = []
    for group in groups:
        _, first, which = np.unique(signature[group.components], return_index=True, return_inverse=True)
        order = np.argsort(first)
        for number, index in enumerate(order):
            name = group.name if len(order) == 1 else f"{group.name}:{number}"
            chosen = group.components[which.reshape(-1) == index]
            sign = {"positive": True} if len(order) == 1 else {"nonnegative": True}
            made.append(Cell(name, group.name, chosen, sympy.Symbol(name, integer=True, **sign)))
    return tuple(made)
