"""What every group and every layer of a model means for its score."""

from __future__ import annotations

import copy
import math
import numbers
import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
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
from fxcompress.module import TracedModule, modules_of
from fxcompress.ranking import Ranking
from fxcompress.search.journal import Journal
from fxcompress.search.relative import scale_of
from fxcompress.search.search import Search
from fxcompress.search.sweep import Curve, sweep
from fxcompress.search.trial import Proposal
from fxcompress.search.weight_bits import WeightBitsSubject, WeightSite, weight_sites
from fxcompress.search.widths import WidthSubject, norms
from fxcompress.select import Selection, Selectors
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
        drop: how much lower that is than the dense score, as a fraction of :attr:`Sensitivity.scale`; None where the
            trial failed.
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
        scale: what drops are fractions of: the size of the dense score, or where that is next to nothing, how far the
            score falls.
    """

    dense: float
    curves: tuple[Curve, ...]
    interrupted: bool = False
    scale: float = 1.0

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
        return tuple(
            SensitivityRow(
                curve.name,
                curve.kind,
                point.value,
                point.score,
                None if point.score is None else (self.dense - point.score) / self.scale,
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
    include: Selectors | None = None,
    exclude: Selectors | None = None,
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
            sparsities (fewer bits); by default all are. (Of a dense score that is next to nothing no fraction says
            anything: then it is one of how far the score falls where all are cut at once.)
        include: name patterns, module types or predicates that choose layers; all by default.
        exclude: layers to leave out; a group with one of them is not measured.
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
    selection = Selection(include, exclude)
    parse_executor(executor)
    inputs = Inputs.parse(_given(example_inputs))
    check_devices(model, inputs)
    console = Console(stderr=True, quiet=not (sys.stderr.isatty() if progress is None else progress))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = trace(model, inputs) if not isinstance(model, TracedModule) else copy.deepcopy(model)
        masking = lift(module)
        context = Context(inputs=inputs, task=task)
        modules = modules_of(module)
        layers = {n: item for n, item in modules.items() if any(p is not None for p in item._parameters.values())}
        groups = [group for group in selection.coupled(context.groups(module), layers) if group.removable]
        chosen = selection.chosen(layers)
        sites = [site for site in weight_sites(module) if site.layer in chosen]
        measured = [group.name for group in groups], [site.weight for site in sites]
        options = values, widths, drop, measured, seed, type(task), task.score, masking
        journal = Journal(checkpoint, "" if checkpoint is None else fingerprint(module, inputs.shapes(), *options))
        sweeps = _Sweeps(module, context, task, masking, groups, sites, drop)
        total = 1 + len(values) * len(groups) + len(widths) * len(sites) + (drop is not None) * 2
        with Search("sensitivity", total, (seed,), journal, executor, console, lambda trial: False) as search:
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
        sites: Sequence[WeightSite],
        drop: float | None,
    ) -> None:
        self.module, self.task, self.items, self.sites, self.drop = module, task, groups, tuple(sites), drop
        self.context = context
        analysis = context.groups(module)
        self.masking = complete(module, masking, analysis.channels)
        self.ranking = Ranking.of(module, analysis, self.masking, groups, norms(groups, module, self.masking))
        self.dense, self.limit = 0.0, -math.inf

    def measure(self, search: Search, sparsities: Sequence[float], bits: Sequence[int]) -> Sensitivity:
        """Measure all of them."""
        search.about(self._widths)
        search.evaluate([Proposal(self._kept([], 0.0))])
        self.dense = search.best().score or 0.0
        pairs = zip(self.items, self.ranking.tables, strict=True)
        blank = [Curve(group.name, "sparsity", group.layers, units.number) for group, units in pairs]
        if sparsities and blank:
            self._lower_limit(search, Proposal(self._kept(range(len(blank)), sparsities[-1])))
        curves = sweep(search, blank, sparsities, self._pruned, self._goes_on)
        if bits and self.sites and not search.interrupted:
            search.about(self._bits)
            self._lower_limit(search, self._rounded(range(len(self.sites)), bits[-1]))
            blank = [Curve(site.layer, "bits", (site.layer,), site.elements) for site in self.sites]
            curves += sweep(search, blank, bits, lambda item, width: self._rounded([item], width), self._goes_on)
        scale = scale_of(self.dense, [trial.score for trial in search.trials])
        return Sensitivity(self.dense, curves, search.interrupted, scale)

    def _lower_limit(self, search: Search, furthest: Proposal) -> None:
        """How low a score may be for an item to be tried further, where there is such a limit."""
        if self.drop is not None:
            search.evaluate([furthest])
            self.limit = self.dense - self.drop * scale_of(self.dense, [trial.score for trial in search.trials])

    def _kept(self, items: Collection[int], sparsity: float) -> tuple[int, ...]:
        """Kept units where some groups lose a fraction of their own."""
        tables = self.ranking.tables
        kept = [units.number - units.gone for units in tables]
        for item in items:
            units = tables[item]
            kept[item] = min(kept[item], units.number - min(int(units.number * sparsity), len(units.scores)))
        return tuple(kept)

    def _pruned(self, item: int, sparsity: float) -> Proposal:
        return Proposal(self._kept([item], sparsity))

    def _rounded(self, items: Collection[int], bits: float) -> Proposal:
        return Proposal(bits=tuple(int(bits) if index in items else 0 for index in range(len(self.sites))))

    def _goes_on(self, score: float) -> bool:
        return score >= self.limit

    def _widths(self) -> WidthSubject:
        assert self.context.inputs is not None
        groups = self.ranking.groups
        module = copy.deepcopy(self.module)
        return WidthSubject(module, self.context.inputs, self.task, self.masking, self.ranking.tables, known=groups)

    def _bits(self) -> WeightBitsSubject:
        module = copy.deepcopy(self.module)
        lay(module, self.masking, self.ranking.groups, "sensitivity")
        return WeightBitsSubject(module, self.task, self.sites)


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
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
            raise InputError(f"sparsities holds {value!r}; expected fractions in (0, 1).")
    for width in bits:
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= 8:
            raise InputError(f"bits holds {width!r}; expected integers from 2 to 8.")
    if drop is not None and (isinstance(drop, bool) or not isinstance(drop, numbers.Real) or not drop >= 0):
        raise InputError(f"drop is {drop!r}; expected a fraction of the dense score, such as 0.1, or None.")
    return tuple(sorted({float(value) for value in sparsities})), tuple(sorted(set(bits), reverse=True))
