"""What changed between two versions of a model: the totals, and the layers whose shapes differ."""

from __future__ import annotations

import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from torch import nn

from fxcompress.cost import byte_count, count
from fxcompress.errors import InputError
from fxcompress.text import as_text, shown_shape


@dataclass(frozen=True)
class Total:
    """One figure of the whole model.

    Attributes:
        name: "params" (elements), "bytes" (of parameters and buffers), or "macs" (per sample).
        before: its value for the first model.
        after: its value for the second.
    """

    name: str
    before: int
    after: int


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
    """

    totals: tuple[Total, ...]
    rows: tuple[Change, ...]

    def __rich__(self) -> Group:
        totals = Table(box=box.SIMPLE)
        for header in ("", "before", "after", "kept"):
            totals.add_column(header, justify="right" if header else "left")
        for total in self.totals:
            totals.add_row(total.name, f"{total.before:,}", f"{total.after:,}", _share(total.before, total.after))
        if not self.rows:
            return Group(totals, "No layer changed its shape.")
        layers = Table(box=box.SIMPLE)
        layers.add_column("layer", overflow="fold")
        layers.add_column("kind")
        for header in ("weight before", "weight after", "params before", "params after", "kept"):
            layers.add_column(header, justify="right")
        for row in self.rows:
            layers.add_row(
                escape(row.name) or "(model)",
                row.kind,
                "(new)" if row.before is None else shown_shape(row.before) or "scalar",
                "(removed)" if row.after is None else shown_shape(row.after) or "scalar",
                *(f"{params:,}" for params in row.params),
                _share(*row.params),
            )
        return Group(totals, layers)

    def __str__(self) -> str:
        return as_text(self)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the tables to `path` as one HTML file that needs no other file."""
        console = Console(record=True, file=io.StringIO(), width=200)
        console.print(self)
        Path(path).write_text(console.export_html(), encoding="utf-8")


def report(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Report:
    """Compare two versions of a model, such as a model and what ``compress`` made of it.

    Layers are matched by name, so both must have kept their names. A layer has changed if the shape of one of
    its own parameters or buffers has; masked or quantized values in tensors of the same shape are no change.
    A module without parameters that only one of the models has is not listed.

    Args:
        before: the model that was there first.
        after: the model to compare it with. Neither is changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments that both models run
            on; without it MACs are not counted.

    Raises:
        InputError: one of the two is no module, or as for :func:`fxcompress.count`.
    """
    for role, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{role} is a {type(model).__name__}; expected a torch.nn.Module.")
    totals = [
        Total("params", _params(before), _params(after)),
        Total("bytes", byte_count(before), byte_count(after)),
    ]
    if example_inputs is not None:
        totals.append(Total("macs", count(before, example_inputs).macs, count(after, example_inputs).macs))
    return Report(tuple(totals), tuple(_changes(before, after)))


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


def _share(before: int, after: int) -> str:
    return f"{after / before:.1%}" if before else ""
