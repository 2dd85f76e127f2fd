"""What allocations cost, and which allocation meets a budget, without building a model (design 10)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fxcompress.allocation import Allocatable, numbered_cells, unit_count, unit_size
from fxcompress.budget import Budget
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.cost import count
from fxcompress.errors import InputError
from fxcompress.figures import Exact, Figure, Polynomial
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule
from fxcompress.symbolic import derive
from fxcompress.water_filling import Limits, fill, smallest

#: Where a module's ``meta`` says what the caller's dense model cost, in a run before.
DENSE = "dense_cost"

_EXACT = ("params", "macs", "bytes")


@dataclass(frozen=True)
class DenseCost:
    """What a dense model cost, and on what that was counted.

    Attributes:
        figures: params, macs (of a sample) and bytes; the latency (of a batch) where it was measured.
        sample: shapes of the example inputs without their batch dimension.
        batch: samples in the batch.
    """

    figures: Mapping[str, float]
    sample: tuple[tuple[int, ...], ...]
    batch: int

    @classmethod
    def of(cls, module: TracedModule, inputs: Inputs) -> DenseCost:
        """Of a module as it is, on some inputs."""
        cost = count(module, inputs)
        return cls({name: float(getattr(cost, name)) for name in _EXACT}, inputs.sample(), inputs.batch)

    def measured(self, latency: float, inputs: Inputs) -> DenseCost:
        """With a latency, unless there is one."""
        return DenseCost({"latency": latency, **self.figures}, self.sample, inputs.batch)

    def elsewhere(self, inputs: Inputs) -> tuple[str, ...]:
        """The figures that are others on these inputs."""
        if self.sample != inputs.sample():
            return ("macs", "latency")
        return () if self.batch == inputs.batch or "latency" not in self.figures else ("latency",)


def dense_cost(module: TracedModule, inputs: Inputs, budget: Budget | None = None) -> DenseCost:
    """What the caller's dense model costs: of what the module was before anything was removed from it.

    Args:
        module: without mask nodes; remembers what it costs, if nothing is remembered.
        inputs: to count with. What was counted on others is counted again while nothing has been removed.
        budget: of what it costs, if that has to be known.

    Raises:
        InputError: the budget is of figures that were counted on inputs of another size, before something was removed.
    """
    known: DenseCost | None = module.meta.get(DENSE)
    wrong = () if known is None else known.elsewhere(inputs)
    if known is None or (wrong and DenseCost.of(module, inputs).figures["params"] == known.figures["params"]):
        module.meta[DENSE] = known = DenseCost.of(module, inputs)
        return known
    for name in () if budget is None else sorted(set(wrong) & set(budget.ratios)):
        raise InputError(
            f"the budget is of the {name} of the dense model, known for inputs of {_sizes(known.sample, known.batch)}; "
            f"found {_sizes(inputs.sample(), inputs.batch)}, and channels have been removed since. Expected example "
            "inputs of the same size, a budget of params or bytes, or the dense model."
        )
    kept = {name: value for name, value in known.figures.items() if name not in wrong}
    return DenseCost(kept, known.sample, known.batch)


def _sizes(sample: tuple[tuple[int, ...], ...], batch: int) -> str:
    return f"{', '.join(map(str, sample))} in batches of {batch}"


class Prices:
    """Prices allocations: how many units are kept of every group.

    Made once from a model; nothing is built, traced or run after that. Figures are exact: those that
    :func:`fxcompress.count` finds once ``Speedup`` has removed the rest.

    Args:
        module: a clean traced module.
        groups: its channel analysis.
        inputs: that the analysis was made with.

    Attributes:
        groups: what may be cut, in the order of the graph. A group whose channels are not all used alike is here in
            parts, called ``name:0``, ``name:1`` and so on; groups that have to keep equally many channels of rows that
            they share are here as one, called ``name+name``.
        units: (groups,): how many units each has, which are channels that have to go together: one, or one of every
            row (head, group of a convolution).
        sizes: (groups,): how many channels a unit has.
        dense: what the module costs: params, macs and bytes.
    """

    def __init__(self, module: TracedModule, groups: ChannelGroups, inputs: Inputs) -> None:
        cost = count(module, inputs)
        everything = np.ones(len(groups.channels.component), dtype=bool)
        self._symbolic = derive(module, groups, cost.table, inputs.batch, everything)
        self._allocatable = Allocatable(groups, self._symbolic.cells)
        self.groups = self._allocatable.groups
        self.units: IntArray = np.array([unit_count(group) for group in self.groups], dtype=np.int64)
        self.sizes: IntArray = np.array([unit_size(group) for group in self.groups], dtype=np.int64)
        self.dense: Mapping[str, float] = MappingProxyType({name: float(getattr(cost, name)) for name in _EXACT})
        self._widths, self._fixed = self._cells()
        self._integers: dict[str, Exact] = {}
        self._figures: dict[str, Figure] = {}

    def _cells(self) -> tuple[IntArray, IntArray]:
        """For every cell how wide it gets with each unit of every group, (cells, groups), and without any, (cells,)."""
        cells = self._symbolic.cells
        units = np.zeros((len(cells), len(self.groups)), dtype=np.int64)
        cell = numbered_cells(cells)
        for column, group in enumerate(self.groups):
            units[:, column] = np.bincount(cell[group.components], minlength=len(cells)) // self.units[column]
        widths = np.array([len(cell.components) for cell in cells], dtype=np.int64)
        return units, widths - units @ self.units

    def add(self, name: str, figure: Figure, dense: float) -> None:
        """Price a further figure, such as a latency (:func:`fxcompress.latency_table.measure`).

        Args:
            name: "latency".
            figure: what allocations cost.
            dense: what the module costs.
        """
        self._figures[name] = figure
        self.dense = MappingProxyType({**self.dense, name: dense})

    def rounded(self, kept: FloatArray, round_to: int = 1) -> IntArray:
        """The next allocation upwards of which every width is a multiple, or whole."""
        found: IntArray = self._limits(round_to, 1, None).rounded(np.floor(kept)).astype(np.int64)
        return found

    def of(self, kept: npt.ArrayLike) -> Mapping[str, FloatArray]:
        """What allocations cost.

        Args:
            kept: integers, (allocations, groups) or (groups,): how many units each group keeps, at least one.

        Returns:
            params, macs and bytes, and what was added, each (allocations,), or a number of shape ().

        Raises:
            InputError: another shape, or numbers outside the groups.
        """
        allocation = self._checked(kept)
        widths = np.atleast_2d(allocation @ self._widths.T + self._fixed)
        found = {name: self._exact(name).value(widths) for name in _EXACT}
        units = np.atleast_2d(allocation).astype(np.float64)
        found |= {name: self._figures[name].value(units) for name in self.dense if name not in _EXACT}
        return {name: values.reshape(allocation.shape[:-1]) for name, values in found.items()}

    def price(self, live: BoolArray) -> Mapping[str, float]:
        """What is left costs, given for every label of the analysis whether it lives (all rows do)."""
        widths = np.array([[live[cell.components].sum() for cell in self._symbolic.cells]], dtype=np.int64)
        return {name: float(self._exact(name).value(widths)[0]) for name in _EXACT}

    def parts(self, chosen: Iterable[Group]) -> list[tuple[Group, tuple[str, ...]]]:
        """Some of the model's removable groups as they are priced, each with the names of those that it is of."""
        return self._allocatable.parts(chosen)

    def fill(
        self,
        sparsities: npt.ArrayLike,
        budget: Budget,
        round_to: int = 1,
        *,
        least: npt.ArrayLike = 1,
        most: npt.ArrayLike | None = None,
        dense: Mapping[str, float] | None = None,
    ) -> IntArray:
        """Allocations that meet a budget: at most what it allows, and at most 0.5 % less where units are that small.

        The sparsities are scaled by one factor, each up to what its group can lose (water-filling); groups with a
        sparsity of 0 stay whole, unless the others cannot meet the budget.

        Args:
            sparsities: the fraction of its units that each group loses, relative to the others': (groups,) or
                (allocations, groups), in [0, 1].
            budget: what to meet.
            round_to: kept channels are a multiple of it, where the group does not stay as it is.
            least: the fewest units that a group keeps: a number, or (groups,).
            most: the most, where some are gone already: (groups,); all by default.
            dense: what the budget is a fraction of; :attr:`dense` by default.

        Returns:
            Kept units, of the shape of the sparsities.

        Raises:
            InputError: another shape, numbers out of range, or a budget below what is left when every group has lost
                all it can, which the message names.
        """
        shares = np.asarray(sparsities, dtype=np.float64)
        if shares.ndim not in (1, 2) or shares.shape[-1] != len(self.groups):
            raise InputError(
                f"sparsities have the shape {shares.shape}; expected ({len(self.groups)},), one for each group, or "
                f"(allocations, {len(self.groups)})."
            )
        if not ((shares >= 0) & (shares <= 1)).all():
            raise InputError("sparsities hold numbers outside [0, 1]; expected fractions.")
        limits = self._limits(round_to, least, most)
        figures = [self._figure(name) for name in budget.ratios]
        whole = self.dense if dense is None else dense
        targets = [ratio * whole[name] * (1 + 1e-12) for name, ratio in budget.ratios.items()]
        bottom = smallest(limits)[None]
        for name, figure, target in zip(budget.ratios, figures, targets, strict=True):
            reached = float(figure.value(bottom)[0])
            if reached > target:
                raise InputError(
                    f"the budget allows {budget.ratios[name]:.2%} of the {name}; {reached / whole[name]:.2%} is the "
                    "least that can be reached, with every group as narrow as it may get."
                )
        kept = fill(figures, targets, np.atleast_2d(shares), limits).astype(np.int64)
        return kept.reshape(shares.shape)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _exact(self, name: str) -> Exact:
        if name not in self._integers:
            symbols = {cell.symbol: index for index, cell in enumerate(self._symbolic.cells)}
            self._integers[name] = Exact(self._symbolic.sums(name), symbols)
        return self._integers[name]

    def _figure(self, name: str) -> Figure:
        if name not in self._figures:
            if name not in _EXACT:
                raise InputError(
                    f"these prices do not know the {name}; expected a budget of {', '.join(_EXACT)}, or a table of "
                    "latencies to be measured first (fxcompress.latency_table.measure)."
                )
            units, fixed = self._widths.astype(np.float64), self._fixed.astype(np.float64)
            self._figures[name] = Polynomial.of(self._exact(name).terms, units, fixed)
        return self._figures[name]

    def _checked(self, kept: npt.ArrayLike) -> IntArray:
        array: Any = np.asarray(kept)
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"kept holds {array.dtype}; expected integers.")
        if array.ndim not in (1, 2) or array.shape[-1] != len(self.groups):
            raise InputError(
                f"kept has the shape {array.shape}; expected ({len(self.groups)},), one for each group, or "
                f"(allocations, {len(self.groups)})."
            )
        if (array < 1).any() or (array > self.units).any():
            column = int(np.argwhere((array < 1) | (array > self.units))[0, -1])
            raise InputError(
                f"kept asks for {array[..., column].min()} to {array[..., column].max()} units of "
                f"{self.groups[column].name}; expected 1 to {self.units[column]}."
            )
        made: IntArray = array.astype(np.int64)
        return made

    def _limits(self, round_to: int, least: npt.ArrayLike, most: npt.ArrayLike | None) -> Limits:
        step = np.array([round_to // math.gcd(round_to, int(size)) for size in self.sizes], dtype=np.int64)
        largest = self.units if most is None else np.broadcast_to(np.asarray(most, dtype=np.int64), self.units.shape)
        fewest = np.broadcast_to(np.asarray(least, dtype=np.int64), self.units.shape)
        return Limits(self.units, np.clip(fewest, 1, largest), largest, step)
