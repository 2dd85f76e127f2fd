"""What every group and every layer of a model means for its score."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from fxcompress.channels.groups import Group
from fxcompress.compress import parse_executor
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.exclusive import exclusive
from fxcompress.fingerprint import fingerprint
from fxcompress.inputs import Inputs, check_devices
from fxcompress.masking import Masking, complete, lay, lift
from fxcompress.module import TracedModule
from fxcompress.ranking import Ranking
from fxcompress.search.journal import Journal
from fxcompress.search.search import Search
from fxcompress.search.sweep import Curve, sweep
from fxcompress.search.trial import Proposal
from fxcompress.search.weight_bits import WeightBitsSubject, weight_sites
from fxcompress.search.widths import WidthSubject, norms
from fxcompress.task import Task, missing
from fxcompress.text import as_text
from fxcompress.trace import trace

SPARSITIES = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9
BITS = 8, 6, 4, 3, 2


@dataclass(frozen=True)
class SensitivityRow:
    """One measurement of a :class:`Sensitivity`.

    Attributes:
        name: the group or layer.
        kind: ``"sparsity"`` or ``"bits"``.
        value: the sparsity, or the bits.
        score: the task's; None where the trial failed.
        drop: how much lower that is than the dense score, as a fraction of it; None where the trial failed.
        layers: the layers that lose channels together.
    """

    name: str
    kind: Literal["sparsity", "bits"]
    value: float
    score: float | None
    drop: float | None
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The score against the sparsity of every removable group, and against the bits of every layer's weight.

    Attributes:
        dense: the score of the model as it came.
        curves: of groups, in the order of the graph, then of layers.
        interrupted: whether the measurement was ended by hand.
    """

    dense: float
    curves: tuple[Curve, ...]
    interrupted: bool = False

    @property
    def groups(self) -> tuple[Curve, ...]:
        """The curves of groups."""
        return tuple(curve for curve in self.curves if curve.kind == "sparsity")

    @property
    def layers(self) -> tuple[Curve, ...]:
        """The curves of layers."""
        return tuple(curve for curve in self.curves if curve.kind == "bits")

    @property
    def table(self) -> tuple[SensitivityRow, ...]:
        """A row for each measurement."""
        scale = max(abs(self.dense), 1e-12)
        return tuple(
            SensitivityRow(
                curve.name,
                curve.kind,
                point.value,
                point.score,
                None if point.score is None else (self.dense - point.score) / scale,
                curve.layers,
            )
            for curve in self.curves
            for point in curve.points
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves into a file; the suffix says which kind (.png, .svg, .pdf).

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plots need matplotlib; install fxcompress[plot].") from error
        kinds = [(curves, label) for curves, label in ((self.groups, "sparsity"), (self.layers, "bits")) if curves]
        figure = Figure(figsize=(8, 5 * max(len(kinds), 1)), layout="constrained")
        for number, (curves, label) in enumerate(kinds, 1):
            axes = figure.add_subplot(len(kinds), 1, number)
            axes.axhline(self.dense, color="0.6", linestyle=":", label="dense")
            for curve in curves:
                if curve.measured:
                    axes.plot(*zip(*curve.measured, strict=True), marker=".", label=curve.name)
            axes.set_xlabel(f"{label} of one group" if label == "sparsity" else "bits of one layer's weight")
            axes.set_ylabel("score")
            if label == "bits":
                axes.invert_xaxis()
            if len(curves) <= 25:
                axes.legend(fontsize="x-small", ncols=1 + len(curves) // 13)
        figure.savefig(os.fspath(path))

    def __rich__(self) -> Table:
        values = {kind: sorted({p.value for c in self.curves if c.kind == kind for p in c.points}) for kind in _KINDS}
        columns = [("sparsity", value) for value in values["sparsity"]] + [("bits", v) for v in values["bits"][::-1]]
        table = Table(title=f"score, {self.dense:.6g} as it came", box=box.SIMPLE)
        table.add_column("")
        for kind, value in columns:
            table.add_column(f"{value:g}" if kind == "sparsity" else f"{value:g} bits", justify="right")
        for curve in self.curves:
            known = {(curve.kind, point.value): point for point in curve.points}
            cells = [_cell(known[column].score) if column in known else "" for column in columns]
            table.add_row(curve.name, *cells)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


_KINDS: tuple[Literal["sparsity", "bits"], ...] = ("sparsity", "bits")


def _cell(score: float | None) -> str:
    return "failed" if score is None else f"{score:.4g}"


@exclusive
def sensitivity(
    model: nn.Module,
    task: Task,
    *,
    example_inputs: Any = None,
    sparsities: Sequence[float] = SPARSITIES,
    bits: Sequence[int] = BITS,
    drop: float | None = None,
    executor: Executor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure the score against the sparsity of every removable group, and against the bits of every layer's weight.

    A group loses the channels whose weights have the smallest L1 norms, in all its layers at once: what is measured is
    what really removing them gives. Weights are rounded symmetrically, per output channel, one layer at a time.

    Args:
        model: any module, or what ``compress`` returned; never changed.
        task: its score is measured, in eval mode.
        example_inputs: as for :func:`fxcompress.compress`.
        sparsities: fractions of a group's units that go; each is measured for all groups before the next larger one.
        bits: of weights, likewise from many to few; empty to leave them out.
        drop: a group (layer) whose score has fallen by more than this fraction of the dense one is not tried at larger
            sparsities (fewer bits); by default all are.
        executor: any ``concurrent.futures.Executor``; by default trials run here.
        checkpoint: a journal of the trials. The same call goes on from there after it was killed.
        seed: for whatever is random in the score.
        progress: show how far it is; by default where stderr is a terminal.

    Raises:
        InputError: an argument is unusable.
        SearchError: no trial has a score.
        CheckpointError: ``checkpoint`` is damaged, of another call, or cannot be written.
    """
    values, widths = _parse(model, task, sparsities, bits, drop)
    parse_executor(executor)
    inputs = Inputs.parse(_given(example_inputs))
    check_devices(model, inputs)
    console = Console(stderr=True, quiet=not (sys.stderr.isatty() if progress is None else progress))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = trace(model, inputs) if not isinstance(model, TracedModule) else copy.deepcopy(model)
        masking = lift(module)
        context = Context(inputs=inputs, task=task)
        groups = [group for group in context.groups(module) if group.removable]
        known = fingerprint(module, inputs.shapes(), values, widths, drop, seed, type(task), task.score, masking)
        journal = Journal(checkpoint, "" if checkpoint is None else known)
        sweeps = _Sweeps(module, context, task, masking, groups, drop)
        total = 1 + len(values) * len(groups) + len(widths) * len(weight_sites(module))
        with Search("sensitivity", total, (seed,), journal, executor, console) as search:
            return sweeps.measure(search, values, widths)


class _Sweeps:
    """The curves of a model."""

    def __init__(
        self,
        module: TracedModule,
        context: Context,
        task: Task,
        masking: Masking,
        groups: Sequence[Group],
        drop: float | None,
    ) -> None:
        self.module, self.task, self.items, self.drop = module, task, groups, drop
        self.context = context
        analysis = context.groups(module)
        self.masking = complete(module, masking, analysis.channels)
        self.ranking = Ranking.of(module, analysis, self.masking, groups, norms(groups, module, self.masking))
        self.dense = 0.0

    def measure(self, search: Search, sparsities: Sequence[float], bits: Sequence[int]) -> Sensitivity:
        """Measure all of them."""
        tables = self.ranking.tables
        search.about(self._widths)
        search.evaluate([Proposal(self._kept(0, 0.0))])
        self.dense = search.best().score or 0.0
        curves = []
        points = sweep(search, len(tables), sparsities, self._propose, self._goes_on)
        for group, units, found in zip(self.items, tables, points, strict=True):
            curves.append(Curve(group.name, "sparsity", group.layers, units.number, tuple(found)))
        if bits and not search.interrupted:
            sites = weight_sites(self.module)
            search.about(self._bits)
            rounding = sweep(search, len(sites), bits, partial(_one, len(sites)), self._goes_on)
            for site, found in zip(sites, rounding, strict=True):
                curves.append(Curve(site.layer, "bits", (site.layer,), site.elements, tuple(found)))
        return Sensitivity(self.dense, tuple(curves), search.interrupted)

    def _kept(self, item: int, sparsity: float) -> tuple[int, ...]:
        """Kept units where one group loses a fraction of its own."""
        kept = [units.number - units.gone for units in self.ranking.tables]
        units = self.ranking.tables[item] if self.ranking.tables else None
        if units is not None:
            kept[item] = min(kept[item], units.number - min(int(units.number * sparsity), len(units.scores)))
        return tuple(kept)

    def _propose(self, item: int, sparsity: float) -> Proposal:
        return Proposal(self._kept(item, sparsity))

    def _goes_on(self, score: float) -> bool:
        return self.drop is None or score >= self.dense - self.drop * abs(self.dense)

    def _widths(self) -> WidthSubject:
        assert self.context.inputs is not None
        groups = self.ranking.groups
        module = copy.deepcopy(self.module)
        return WidthSubject(module, self.context.inputs, self.task, self.masking, self.ranking.tables, known=groups)

    def _bits(self) -> WeightBitsSubject:
        module = copy.deepcopy(self.module)
        sites = weight_sites(module)
        lay(module, self.masking, self.ranking.groups, "sensitivity")
        return WeightBitsSubject(module, self.task, sites)


def _one(count: int, item: int, bits: float) -> Proposal:
    """One layer of several rounded to some bits."""
    return Proposal(bits=tuple(int(bits) if index == item else 0 for index in range(count)))


def _given(example_inputs: Any) -> Any:
    if example_inputs is None:
        raise InputError("example_inputs is missing: channels are followed through a run of the model. Pass a batch.")
    return example_inputs


def _parse(
    model: Any, task: Any, sparsities: Sequence[float], bits: Sequence[int], drop: float | None
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The values to measure, in order; what is wrong with the arguments raises."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(task, Task):
        raise InputError(f"task is a {type(task).__name__}; expected a fxcompress.Task with a score.")
    if task.score is None:
        raise InputError(missing(["score"], "sensitivity"))
    for value in sparsities:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise InputError(f"sparsities holds {value!r}; expected fractions in (0, 1).")
    for width in bits:
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= 8:
            raise InputError(f"bits holds {width!r}; expected integers from 2 to 8.")
    if drop is not None and (isinstance(drop, bool) or not isinstance(drop, (int, float)) or not drop >= 0):
        raise InputError(f"drop is {drop!r}; expected a fraction of the dense score, such as 0.1, or None.")
    return tuple(sorted(set(sparsities))), tuple(sorted(set(bits), reverse=True))
