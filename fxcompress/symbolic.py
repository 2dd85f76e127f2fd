"""What a model costs as polynomials in the widths of its channel groups.

The channel analysis knows which labels every parameter has, and in which index space every contraction multiplies.
Counting their live elements (:mod:`fxcompress.polynomials`) gives parameters, bytes and MACs without removing anything.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import sympy

from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import BoolArray, live_elements
from fxcompress.errors import GraphError, InputError
from fxcompress.module import TracedModule
from fxcompress.polynomials import Cell, Counter, Product, Rows


class Figures(NamedTuple):
    """What :meth:`Symbolic.evaluate` gives: numbers, or arrays with one for each allocation."""

    macs: Any
    params: Any
    bytes: Any


class DenseRow(Protocol):
    """What is read of a row of :func:`fxcompress.count`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def macs(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Sum:
    """``ceiling(sum(products) / samples)``: products counted over a batch and divided among its samples."""

    products: tuple[Product, ...] = ()
    samples: int = 1

    @classmethod
    def of(cls, products: Iterable[Product], samples: int = 1) -> Sum:
        """The sum in lowest terms: where every product is done for each sample, nothing is left to round."""
        terms = tuple(product for product in products if product.coefficient)
        common = math.gcd(samples, *(term.coefficient for term in terms))
        reduced = (Product(t.coefficient // common, t.denominator, t.factors) for t in terms)
        return cls(tuple(reduced), samples // common)

    @cached_property
    def denominator(self) -> int:
        """The smallest number by which the sum is a polynomial with integer coefficients."""
        return math.lcm(*(product.denominator for product in self.products))

    @cached_property
    def numerator(self) -> Any:
        """The sum times its denominator, before it is divided among samples: a sympy expression."""
        terms = (
            sympy.Mul(product.coefficient * (self.denominator // product.denominator), *product.factors)
            for product in self.products
        )
        return sympy.Add(*terms)

    @cached_property
    def expression(self) -> Any:
        """The sum as a sympy expression."""
        value = self.numerator / self.denominator / self.samples
        return value if self.samples == 1 else sympy.ceiling(value)


@dataclass(frozen=True)
class SymbolicRow:
    """The cost of one layer, or of what one fx node computes by itself, as sympy expressions.

    Attributes:
        name: as in :class:`fxcompress.cost.Row`; rows of one name are one row here.
        kind: class of the module or name of the function.
    """

    name: str
    kind: str
    _figures: tuple[Sum, Sum, Sum] = field(repr=False)

    @property
    def macs(self) -> Any:
        """Multiply-accumulates per sample."""
        return self._figures[0].expression

    @property
    def params(self) -> Any:
        """Elements of the parameters."""
        return self._figures[1].expression

    @property
    def bytes(self) -> Any:
        """Size of parameters and buffers."""
        return self._figures[2].expression


@dataclass(frozen=True, repr=False, eq=False)
class Symbolic:
    """Polynomials in the widths of a model's removable channel groups; ``symbolic["layer1.0.conv1"]`` is a width.

    A group whose channels are not all used alike (``cat([x, x[:, :4]])``) falls into several cells, whose widths are
    symbols of their own: ``name:0``, ``name:1``, in the order of their first channels.

    Attributes:
        table: a row for each layer that has a cost.
        symbols: for every cell its sympy symbol, an integer.
        widths: for every cell how many channels it has.
        current: for every cell how many channels live; less than ``widths`` where the model is masked.
    """

    table: tuple[SymbolicRow, ...]
    symbols: Mapping[str, Any]
    widths: Mapping[str, int]
    current: Mapping[str, int]
    _cells: tuple[Cell, ...]
    _rows: tuple[Rows, ...]
    _fixed: Mapping[str, int]

    @property
    def macs(self) -> Any:
        """Multiply-accumulates per sample: a sympy expression."""
        return self._totals[0]

    @property
    def params(self) -> Any:
        """Elements of all parameters: a sympy expression."""
        return self._totals[1]

    @property
    def bytes(self) -> Any:
        """Size of parameters and buffers: a sympy expression."""
        return self._totals[2]

    def __getitem__(self, name: str) -> Any:
        """The width of a group (or cell): a symbol, the sum of its cells' symbols, or a number where it is frozen.

        Raises:
            InputError: there is no group of that name.
        """
        if name in self.symbols:
            return self.symbols[name]
        mine = [cell.symbol for cell in self._cells if cell.group == name]
        if mine:
            return sympy.Add(*mine)
        if name in self._fixed:
            return sympy.Integer(self._fixed[name])
        raise self._unknown(name)

    def __repr__(self) -> str:
        return f"Symbolic({len(self.symbols)} widths, {len(self.table)} rows)"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What the symbols count, in the same order."""
        return self._cells

    def sums(self, figure: str) -> list[Sum]:
        """The terms of a figure ("macs", "params", "bytes"), row by row."""
        return [row._figures[Figures._fields.index(figure)] for row in self.table]

    def at(self, live: BoolArray) -> dict[str, int]:
        """The width of every cell, given for every label of the analysis whether it lives (all rows do)."""
        return {cell.name: int(live[cell.components].sum()) for cell in self._cells}

    def evaluate(self, widths: Mapping[str, Any] | None = None) -> Figures:
        """MACs, params and bytes at given widths, for one allocation or many.

        Args:
            widths: by name of a group (or cell) how many of its channels are kept: an integer, or an array of integers
                with one element for each allocation. Arrays are broadcast. What is not named stays whole.

        Returns:
            Integers, or arrays of the shape that the given ones have together: int64, or Python's integers (dtype
            object) where those would not fit.

        Raises:
            InputError: an unknown name, no integers, a width outside the group, or widths that no removal can leave
                (where rows keep equally many channels, a multiple of their number).
        """
        given = self._parsed(widths or {})
        function, parts = self._compiled
        shape = np.broadcast_shapes(*(np.shape(value) for value in given))
        totals: list[Any] = [0, 0, 0]
        values = function(*given)
        self._check_rows(values[len(parts) :])
        for (figure, denominator, samples), value in zip(parts, values[: len(parts)], strict=True):
            totals[figure] = totals[figure] + -(-(value // denominator) // samples)
        if shape:
            return Figures(*(np.broadcast_to(total, shape).astype(self._dtype) for total in totals))
        return Figures(*map(int, totals))

    # ---- inside ------------------------------------------------------------------------------------------------

    @cached_property
    def _totals(self) -> tuple[Any, Any, Any]:
        macs, params, size = (sympy.Add(*(row._figures[i].expression for row in self.table)) for i in range(3))
        return macs, params, size

    @cached_property
    def _compiled(self) -> tuple[Callable[..., Sequence[Any]], list[tuple[int, int, int]]]:
        """One function of all widths in integer arithmetic: parts of figures, then what rows keep. For each part the
        figure that it belongs to, what it has to be divided by, and for how many samples it was counted."""
        sums: dict[tuple[int, int, int, int], list[Any]] = {}
        for number, row in enumerate(self.table):
            for figure, total in enumerate(row._figures):
                alone = number if total.samples > 1 else -1  # those are rounded up row by row
                sums.setdefault((figure, total.denominator, total.samples, alone), []).append(total.numerator)
        symbols = [cell.symbol for cell in self._cells]
        values = [sympy.Add(*numerators) for numerators in sums.values()] + [rows.total for rows in self._rows]
        function = sympy.lambdify(symbols, values, modules="numpy", cse=True)
        return function, [key[:3] for key in sums]

    @cached_property
    def _dtype(self) -> type:
        """What arrays of widths are computed in: int64, or Python's integers where a product would not fit."""
        function, _ = self._compiled
        largest = max(map(abs, function(*(len(cell.components) for cell in self._cells))), default=0)
        return np.int64 if largest < 2**63 else object

    def _parsed(self, widths: Mapping[str, Any]) -> list[Any]:
        """A width for every cell: Python's integers for single numbers, int64 arrays for many."""
        for name in widths:
            if name not in self.symbols:
                raise self._unusable(name)
        found: list[Any] = []
        for cell in self._cells:
            value, most = widths.get(cell.name, len(cell.components)), len(cell.components)
            array = np.asarray(value)
            if not np.issubdtype(array.dtype, np.integer):
                raise InputError(f"widths[{cell.name!r}] holds {array.dtype}; expected integers from 1 to {most}.")
            least = 1 if cell.name == cell.group else 0
            if array.size and (array.min() < least or array.max() > most):
                wrong = array[(array < least) | (array > most)].flat[0] if array.ndim else array
                raise InputError(f"widths[{cell.name!r}] holds {wrong}; expected integers from {least} to {most}.")
            found.append(array.astype(self._dtype) if array.ndim else int(array))
        return found

    def _unusable(self, name: str) -> InputError:
        cells = [cell.name for cell in self._cells if cell.group == name]
        if cells:
            return InputError(f"the channels of {name} are not all used alike; give the widths of {', '.join(cells)}.")
        if name in self._fixed:
            return InputError(f"group {name} is frozen: its {self._fixed[name]} channels stay. Leave it out of widths.")
        return self._unknown(name)

    def _unknown(self, name: str) -> InputError:
        near = difflib.get_close_matches(name, [*self.symbols, *self._fixed], 3, 0.3)
        return InputError(f"there is no channel group {name!r}; near names: {', '.join(near) or 'none'}.")

    def _check_rows(self, totals: Iterable[Any]) -> None:
        for rows, total in zip(self._rows, totals, strict=True):
            wrong = np.atleast_1d(total)[np.atleast_1d(total) % rows.number > 0]
            if len(wrong):
                raise InputError(
                    f"the widths of {', '.join(rows.groups)} sum up to {wrong[0]}, which no removal can leave: "
                    f"{rows.number} convolution groups keep equally many channels each. Expected multiples of "
                    f"{rows.number}."
                )


def derive(
    module: TracedModule, groups: ChannelGroups, table: Iterable[DenseRow], samples: int, live: BoolArray
) -> Symbolic:
    """The symbolic figures of a traced module without mask nodes.

    What the analysis did not follow (opaque modules, packed sequences) costs what it costs in the dense model.

    Args:
        module: a clean traced module.
        groups: its channel analysis.
        table: what :func:`fxcompress.count` found for it.
        samples: the batch size of the inputs of both.
        live: for every label whether it lives now.
    """
    channels = groups.channels
    state, contractions = channels.facts.state, channels.facts.ledger.contractions
    counter = Counter(channels, groups, [*state.values(), *(item.space for item in contractions)])
    found: dict[str, tuple[list[Product], list[Product], list[Product]]] = {}
    kinds: dict[str, str] = {}
    dense: dict[str, list[int]] = {}
    for row in table:
        found[row.name] = [], [], []
        kinds.setdefault(row.name, row.kind)
        sums = dense.setdefault(row.name, [0, 0, 0])
        for i, figure in enumerate((row.macs * samples, row.params, row.bytes)):
            sums[i] += figure
    targets = {n.name: str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for item in contractions:
        row_of = found[targets.get(item.node, item.node)]
        row_of[0].append(counter.live(item.space, item.repeats, f"the product at {item.node}"))
    parameters = dict(module.named_parameters())
    for name, tensor in [*parameters.items(), *module.named_buffers()]:
        if not tensor.numel():
            continue
        elements, row_of = counter.live(state[name], 1, name), found[name.rpartition(".")[0]]
        if name in parameters:
            row_of[1].append(elements)
        row_of[2].append(Product.of(tensor.element_size(), [elements]))
    full = {cell.symbol: len(cell.components) for cell in counter.cells}
    rows = []
    for name, products in found.items():
        macs, params, size = (
            [*terms, Product(_rest(terms, dense[name][i], samples if i == 0 else 1, full))]
            for i, terms in enumerate(products)
        )
        if macs[-1].coefficient < 0 or params[-1].coefficient < 0:  # bytes may be: tensors can share storage
            raise GraphError(f"{name or 'the model'} has more products or parameters than were counted")
        rows.append(SymbolicRow(name, kinds[name], (Sum.of(macs, samples), Sum.of(params), Sum.of(size))))
    frozen = {group.name: group.width for group in groups if not group.removable}
    cells = counter.cells
    alive = channels.alive(live)
    if not channels.rows.living(live).all():
        _check_counts(counter, {cell.symbol: int(alive[cell.components].sum()) for cell in cells}, module, groups, live)
    return Symbolic(
        tuple(rows),
        MappingProxyType({cell.name: cell.symbol for cell in cells}),
        MappingProxyType({cell.name: len(cell.components) for cell in cells}),
        MappingProxyType({cell.name: int(alive[cell.components].sum()) for cell in cells}),
        cells,
        counter.rows(),
        MappingProxyType(frozen),
    )


def _check_counts(
    counter: Counter, widths: Mapping[Any, int], module: TracedModule, groups: ChannelGroups, live: BoolArray
) -> None:
    """Refuse a model without whole rows where the widths alone do not say what it costs."""
    facts = groups.channels.facts
    tensors = {name: facts.state[name] for name, _ in module.named_parameters()}
    for name, labels in [*tensors.items(), *((item.node, item.space) for item in facts.ledger.contractions)]:
        if _value(counter.live(labels, 1, name), widths) != live_elements(labels, live):
            raise GraphError(
                f"whole rows (attention heads, groups of a convolution) are masked, and what {name} costs depends on "
                "their number, which no width tells. Remove the channels and count what is left."
            )


def _rest(terms: Sequence[Product], dense: int, samples: int, full: Mapping[Any, int]) -> int:
    """What of a row's dense figure the products do not account for: a constant."""
    have = sum(_value(term, full) for term in terms)
    return 0 if -(-have // samples) * samples == dense else dense - have


def _value(product: Product, full: Mapping[Any, int]) -> int:
    """A product at dense widths."""
    factors = math.prod(int(sympy.sympify(factor).xreplace(full)) for factor in product.factors)
    return product.coefficient * factors // product.denominator
