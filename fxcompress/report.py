"""What changed between two versions of a model: the totals, and the layers whose shapes differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import fx, nn

from fxcompress import report_plots
from fxcompress.channels.groups import ChannelGroups
from fxcompress.cost import byte_count, count, unmasked
from fxcompress.errors import InputError
from fxcompress.inputs import Inputs
from fxcompress.latency import Latency, merged
from fxcompress.latency import latency as measure
from fxcompress.replacing import replacing
from fxcompress.report_page import Section, Tile, page
from fxcompress.report_plots import Curves
from fxcompress.search.history import SearchHistory
from fxcompress.text import as_text, shown_shape


@dataclass(frozen=True)
class Total:
    """One figure of the whole model.

    Attributes:
        name: "params" (elements), "bytes" (of parameters and buffers), or "macs" (per sample).
        before: its value for the first model.
        after: its value for the second.
        removed: its value for the second once ``Speedup`` has removed what is masked; None where nothing is.
    """

    name: str
    before: int
    after: int
    removed: int | None = None


@dataclass(frozen=True)
class Change:
    """A layer whose parameters or buffers have other shapes than before.

    Attributes:
        name: dotted name of the module; "" is the model itself.
        kind: class of the module, as it is after the change if it is still there.
        before: shape of its weight, or of its first tensor if it has no weight; None if it is new.
        after: the same after the change; None if it was removed.
        params: elements of its own parameters, before and after.
    """

    name: str
    kind: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    params: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; prints as tables.

    Attributes:
        totals: params and bytes, and macs if there were inputs to count them with.
        rows: the changed layers, in the order in which the first model holds them; new ones last.
        latency: the measured time of both models; None if it was not measured.
        notes: what the passes that made the second model had to say: what stays, and why.
        searches: what was searched to make it.
        sensitivity: what was given.
        groups: the channel groups of the first model, if they were given.
    """

    totals: tuple[Total, ...]
    rows: tuple[Change, ...]
    latency: tuple[Latency, Latency] | None = None
    notes: tuple[str, ...] = ()
    searches: tuple[SearchHistory, ...] = ()
    sensitivity: Curves | None = field(default=None, repr=False)
    groups: ChannelGroups | None = field(default=None, repr=False)

    @property
    def slower(self) -> bool:
        """Whether the second model was measured to be slower, beyond doubt about the medians."""
        return self._gained() < 0

    @property
    def faster(self) -> bool:
        """Whether the second model was measured to be faster, beyond doubt about the medians."""
        return self._gained() > 0

    def _gained(self) -> float:
        """Seconds that the second model saves; 0 where the notches of the medians overlap."""
        if self.latency is None:
            return 0.0
        before, after = self.latency
        saved = before.median - after.median
        return saved if abs(saved) > _notch(before) + _notch(after) else 0.0

    def __rich__(self) -> Group:
        return Group(self._totals(), *self._verdict(), self._layers(), *map(escape, self.notes))

    def _totals(self) -> Table:
        masked = any(total.removed is not None for total in self.totals)
        table = Table(box=box.SIMPLE)
        for header in ("", "before", "after", "kept", *(("after Speedup", "kept") if masked else ())):
            table.add_column(header, justify="right" if header else "left")
        for total in self.totals:
            cells = [f"{total.before:,}", f"{total.after:,}", _share(total.before, total.after)]
            if total.removed is not None:
                cells += [f"{total.removed:,}", _share(total.before, total.removed)]
            table.add_row(total.name, *cells)
        if self.latency is not None:
            before, after = self.latency
            times = [f"{each.median * 1e3:.3f} ms" for each in self.latency]
            table.add_row("latency", *times, _share(before.median, after.median))
            table.add_row("  IQR", *(f"{each.iqr * 1e3:.3f} ms" for each in self.latency))
        return table

    def _verdict(self) -> list[str]:
        """What the latencies say, in words."""
        if self.latency is None:
            return []
        before, after = self.latency
        how = f"medians of {before.runs} and {after.runs} runs, batch {after.batch}, {_threads(after.threads)}"
        if not (self.slower or self.faster):
            return [f"No difference in time that the measurements could tell ({how})."]
        if self.faster:
            return [f"{before.median / after.median:.2f} times as fast ({how})."]
        lines = [f"SLOWER: it takes {after.median / before.median:.2f} times as long as before ({how})."]
        if any(total.removed is not None for total in self.totals):
            lines.append("It is masked: masks cost time, and only what Speedup removes saves any.")
        return lines

    def _layers(self) -> Table | str:
        if not self.rows:
            return "No layer changed its shape."
        layers = Table(box=box.SIMPLE)
        layers.add_column("layer", overflow="fold")
        layers.add_column("kind")
        for header in ("weight before", "weight after", "params before", "params after", "kept"):
            layers.add_column(header, justify="right")
        for row in self.rows:
            name, *others = _cells(row)
            layers.add_row(escape(name), *others)
        return layers

    def __str__(self) -> str:
        return as_text(self)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report to `path` as one HTML file that needs no other file, no network and no script.

        The widths before and after, the latencies, the searches that made the second model (history and Pareto front),
        the sensitivity and the graph of channel groups; what there is nothing of is left out.

        Raises:
            InputError: matplotlib or jinja2 is not installed.
            OSError: the file cannot be written; one that was there is as before.
        """
        text = page("Compression report", tuple(self._tiles()), tuple(self._sections()))
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")

    def _tiles(self) -> Iterator[Tile]:
        for total in self.totals:
            after = total.after if total.removed is None else total.removed
            detail = f"{total.before:,} → {after:,}" + ("" if total.removed is None else " after Speedup")
            yield Tile(
                total.name, _share(total.before, after), detail, None if after == total.before else after < total.before
            )
        if self.latency is not None:
            old, new = (each.median for each in self.latency)
            good = self.faster if self.faster or self.slower else None
            yield Tile("speed", f"{old / new:.2f}×", f"{old * 1e3:.2f} → {new * 1e3:.2f} ms", good)

    def _sections(self) -> Iterator[Section]:
        if self.latency is not None:
            yield Section("Latency", " ".join(self._verdict()), (report_plots.latencies(*self.latency),))
        cut = [
            row for row in self.rows if row.before and row.after and len(row.before) > 1
        ]  # norms follow their layers
        bars = [(row.name, row.before[0], row.after[0]) for row in cut if row.before and row.after]
        if (plot := report_plots.widths(bar for bar in bars if bar[1] != bar[2])) is not None:
            yield Section("Widths", "Of the layers whose width changed: what is left of their channels.", (plot,))
        for search in self.searches:
            plots = tuple(plot for plot in (report_plots.history(search), report_plots.front(search)) if plot)
            failed = f", {len(search.failed)} of them failed" if search.failed else ""
            trials = f"{len(search.trials)} trial{'s' if len(search.trials) > 1 else ''}"
            yield Section(f"Search: {search.name}", f"{trials}{failed}.", plots)
        if self.sensitivity is not None:
            kinds = [report_plots.sensitivity(self.sensitivity, kind) for kind in ("sparsity", "bits")]
            if any(kinds):
                text = (
                    "What the score falls to if one group loses its channels, or one layer its bits, and nothing else."
                )
                yield Section("Sensitivity", text, tuple(plot for plot in kinds if plot))
        if self.groups is not None and (plot := report_plots.groups(self.groups.graph)) is not None:
            text = "Channels that stand or fall together, before compression: blue ones may be removed, grey ones stay."
            yield Section("Channel groups", text, (plot,))
        if self.rows:
            head = ("layer", "kind", "weight before", "weight after", "params before", "params after", "kept")
            yield Section("Layers", "", (), head, tuple(_cells(row) for row in self.rows))
        if self.notes:
            yield Section("Notes", rows=tuple((note,) for note in self.notes), head=("what the passes had to say",))


def report(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any = None,
    *,
    latency: bool = True,
    sensitivity: Curves | None = None,
    groups: ChannelGroups | None = None,
) -> Report:
    """Compare two versions of a model, such as a model and what ``compress`` made of it.

    Layers are matched by name, so both must have kept their names. A layer has changed if the shape of one of
    its own parameters or buffers has; masked or quantized values in tensors of the same shape are no change.
    A module without parameters that only one of the models has is not listed.

    A masked model is shown with both figures: as it is, and as it will be after ``Speedup``.

    Args:
        before: the model that was there first.
        after: the model to compare it with. Neither is changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments that both models run
            on; without it MACs are not counted and time is not measured.
        latency: measure how long a forward pass of each takes, as :func:`fxcompress.latency` does; not done on the
            meta device.
        sensitivity: of the first model (:func:`fxcompress.sensitivity`), for the page.
        groups: of the first model (:func:`fxcompress.channel_groups`), for the page.

    Raises:
        InputError: one of the two is no module, or as for :func:`fxcompress.count`.
    """
    for role, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{role} is a {type(model).__name__}; expected a torch.nn.Module.")
    rows = tuple(_changes(before, after))
    history = after.meta.get("history", ()) if isinstance(after, fx.GraphModule) else ()
    notes = tuple(dict.fromkeys(f"{step.name}: {note}" for step in history for note in step.notes))
    searches = tuple(search for step in history for search in step.searches)
    if example_inputs is None:
        old, new = unmasked(before), unmasked(after)
        sizes = Total("params", _params(old), _params(new)), Total("bytes", byte_count(old), byte_count(new))
        return Report(sizes, rows, None, notes, searches, sensitivity, groups)
    costs = count(before, example_inputs), count(after, example_inputs)
    removed = costs[1].after
    totals = [
        Total(name, getattr(costs[0], name), getattr(costs[1], name), getattr(removed, name, None))
        for name in ("params", "bytes", "macs")
    ]
    timed = latency and not any(tensor.is_meta for tensor in Inputs.parse(example_inputs).tensors())
    times = _in_turns(before, after, example_inputs) if timed else None
    return Report(tuple(totals), rows, times, notes, searches, sensitivity, groups)


def _in_turns(before: nn.Module, after: nn.Module, example_inputs: Any) -> tuple[Latency, Latency]:
    """Both latencies, measured in turns, so that a machine that slows down does so for both."""
    turns = [[measure(model, example_inputs, min_run_time=0.25) for model in (before, after)] for _ in range(3)]
    first, second = (merged(each) for each in zip(*turns, strict=True))
    return first, second


def _notch(latency: Latency) -> float:
    """Half the interval of confidence of a median, in seconds (McGill, Tukey and Larsen 1978, 1.57 IQR / sqrt(n)).

    Two medians whose intervals do not overlap differ with 95 % confidence.
    """
    return 1.57 * latency.iqr / math.sqrt(max(len(latency.times), 1))


def _cells(row: Change) -> tuple[str, ...]:
    """A row of the table of layers."""
    return (
        row.name or "(model)",
        row.kind,
        "(new)" if row.before is None else shown_shape(row.before) or "scalar",
        "(removed)" if row.after is None else shown_shape(row.after) or "scalar",
        *(f"{params:,}" for params in row.params),
        _share(*row.params),
    )


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _params(model: nn.Module, *, recurse: bool = True) -> int:
    return sum(parameter.numel() for parameter in model.parameters(recurse))


def _changes(before: nn.Module, after: nn.Module) -> list[Change]:
    old, new = dict(before.named_modules()), dict(after.named_modules())
    absent = nn.Identity()
    changes = []
    for name in {**old, **new}:
        left, right = old.get(name, absent), new.get(name, absent)
        was, now = _shapes(left), _shapes(right)
        params = _params(left, recurse=False), _params(right, recurse=False)
        if was == now or (not (was and now) and params == (0, 0)):
            continue
        kind = type(right if name in new else left).__name__
        changes.append(Change(name, kind, _weight(was), _weight(now), params))
    return changes


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor.shape for name, tensor in own}


def _weight(shapes: dict[str, torch.Size]) -> tuple[int, ...] | None:
    """The shape that stands for the layer; None if it has no tensor."""
    shape = shapes.get("weight", next(iter(shapes.values()), None))
    return None if shape is None else tuple(shape)


def _share(before: float, after: float) -> str:
    return f"{after / before:.1%}" if before else ""
