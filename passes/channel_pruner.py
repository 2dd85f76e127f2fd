"""Pruning whole channels: what all criteria share. A criterion is one method, ``score(layer)``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxcompress.channels.groups import ChannelGroups, Group, Slices
from fxcompress.channels.labels import BoolArray, distinct
from fxcompress.errors import InputError, PassError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule, modules_of, submodule
from fxcompress.pipeline import Context, Pass
from fxcompress.plan import settle
from fxcompress.select import Selection, Selectors, Sparsity

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """What a criterion sees of a layer that produces channels.

    Attributes:
        name: dotted name of the module that holds the weight.
        module: that module.
        weight: its producing slices, shape (channels, ...): dimension 0 is the channel, whatever the layer's own
            layout; masked elements are zero. Of a recurrent layer they are the rows of ``weight_ih`` and then those
            of ``weight_hh``, one for each gate of a hidden unit, whose scores are combined as coupled layers' are.
    """

    name: str
    module: nn.Module
    weight: Tensor


@dataclass(frozen=True)
class ChannelPruner(Pass):
    """Masks the channels that score lowest, in every group or over all of them.

    Args:
        sparsity: fraction of channels to remove, in [0, 1), or a mapping of name pattern to fraction (the last match
            counts; unmatched layers are not pruned).
        include: name patterns, module types or predicates that choose layers; all by default.
        exclude: layers to leave alone; a group with one of them stays whole.
        scope: ``"layer"``: every group loses ``int(width * sparsity)``; ``"global"``: one ranking over all groups.
        round_to: kept widths are rounded up to a multiple of this.
        reduce: how the scores of coupled layers are combined: ``"sum"``, ``"mean"`` or ``"max"``.

    A group is never emptied. Ties go by order in the graph, then by index.
    """

    sparsity: float | Mapping[str, float]
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    reduce: Literal["sum", "mean", "max"] = "sum"

    needs_inputs: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Sparsity.parse(self.sparsity)
        Selection(self.include, self.exclude)
        if self.scope not in ("layer", "global"):
            raise InputError(f"scope is {self.scope!r}; expected 'layer' or 'global'.")
        if self.scope == "global" and isinstance(self.sparsity, Mapping):
            raise InputError("scope='global' ranks all channels at once; expected one sparsity, found a mapping.")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise InputError(f"round_to is {self.round_to!r}; expected an integer of at least 1.")
        if self.reduce not in ("sum", "mean", "max"):
            raise InputError(f"reduce is {self.reduce!r}; expected 'sum', 'mean' or 'max'.")

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """How much each channel of a layer matters: shape (channels,), higher is kept."""

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Score, choose, and mask."""
        groups = context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        chosen = self._choose(list(groups), module, context)
        while True:  # what had to come back leaves room for others: every further round masks more, so this ends
            live = masking.live(groups.channels)
            kept, back = self._settled(chosen, module, groups, masking, live)
            if (kept == live).all():
                break
            context.masking = masking.with_live(groups.channels, kept)
            if not back:
                break
            masking = complete(module, context.masking, groups.channels)
        if back:
            context.notes.append(f"{back} channels stay so that coupled rows keep equal numbers")
        return module

    def _settled(
        self,
        chosen: list[tuple[Group, float]],
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        live: BoolArray,
    ) -> tuple[BoolArray, int]:
        """For every label whether it lives once the lowest have gone, and how many had to come back."""
        channels = groups.channels
        scores = [self._scores(group, module, masking) for group, _ in chosen]
        tables = [_Units(group, score, live) for (group, _), score in zip(chosen, scores, strict=True)]
        counts = self._counts(tables, [sparsity for _, sparsity in chosen])
        dead = [channels.component[~live]]
        rank: dict[int, float] = {}
        for units, count in zip(tables, counts, strict=True):
            dead.append(units.lowest(count))
            rank.update(units.rank())
        gone = distinct(np.concatenate(dead))
        kept = settle(module, groups, channels.live(gone), rank)
        return kept, int(kept[gone].sum())

    # ---- which groups ------------------------------------------------------------------------------------------

    def _choose(self, groups: list[Group], module: TracedModule, context: Context) -> list[tuple[Group, float]]:
        """The removable groups that the selection takes, each with its sparsity."""
        modules = modules_of(module)
        layers = {n: item for n, item in modules.items() if any(p is not None for p in item._parameters.values())}
        Selection(self.include, self.exclude).chosen(layers)  # raises where a selector matches nothing
        included = Selection(self.include).chosen(layers)
        excluded = frozenset() if self.exclude is None else Selection(self.exclude).chosen(layers)
        sparsities = Sparsity.parse(self.sparsity).sparsities(layers)
        taken = [g for g in groups if set(g.layers) & included and not set(g.layers) & excluded]
        removable = [group for group in taken if group.removable]
        if not removable:
            reasons = "; ".join(str(group) for group in taken[:5]) or "every group has an excluded layer"
            warnings.warn(f"{self.name} has nothing to prune: {reasons}", stacklevel=2)
        chosen = []
        for group in removable:
            wanted = {name: sparsities.get(name, 0.0) for name in group.layers}
            smallest = min(wanted.values())
            if smallest != max(wanted.values()):
                context.notes.append(f"the layers of group {group.name} disagree ({wanted}); taking {smallest}")
            chosen.append((group, smallest))
        return chosen

    # ---- scores ------------------------------------------------------------------------------------------------

    def _scores(self, group: Group, module: TracedModule, masking: Masking) -> FloatArray:
        """Scores of a group's channels, those of its layers combined: shape (width,)."""
        total = np.full(group.width, -np.inf) if self.reduce == "max" else np.zeros(group.width)
        seen = np.zeros(group.width)
        for item in group.slices:
            layer = _layer(item, module, masking)
            with torch.no_grad():
                score = self.score(layer)
            if not isinstance(score, Tensor) or score.shape != (len(item.rows),):
                found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise PassError(f"{self.name}.score({layer.name}) gave {found}; expected shape ({len(item.rows)},).")
            values = score.detach().double().cpu().numpy()
            if np.isnan(values).any():
                raise PassError(f"{self.name}.score({layer.name}) gave NaN; expected finite scores.")
            if self.reduce == "max":
                np.maximum.at(total, item.channels, values)
            else:
                total += np.bincount(item.channels, values, group.width)
                seen += np.bincount(item.channels, minlength=group.width)
        return total / seen if self.reduce == "mean" else total

    # ---- how many ----------------------------------------------------------------------------------------------

    def _counts(self, tables: list[_Units], sparsities: list[float]) -> list[int]:
        """How many units each group loses."""
        if self.scope == "layer":
            counts = [min(int(t.number * s), t.number - 1) for t, s in zip(tables, sparsities, strict=True)]
        else:
            counts = _global_counts(tables, sparsities[0] if sparsities else 0.0)
        return [self._rounded(units, count) for units, count in zip(tables, counts, strict=True)]

    def _rounded(self, units: _Units, count: int) -> int:
        kept = units.number - count
        while kept < units.number and kept * units.rows % self.round_to:
            kept += 1
        return units.number - kept


def _layer(item: Slices, module: TracedModule, masking: Masking) -> Layer:
    weight = module.get_parameter(item.parameter).detach()
    mask = masking.elements.get(item.parameter)
    if mask is not None:
        weight = weight * mask
    weight, rows = item.lines(weight), torch.from_numpy(item.rows).to(weight.device)
    if len(rows) != len(weight) or (item.rows[:-1] > item.rows[1:]).any():
        weight = weight.index_select(0, rows)
    return Layer(item.layer, submodule(module, item.layer), weight)


class _Units:
    """A group's channels as removable units: a channel, or where rows must stay equal one channel of every row."""

    def __init__(self, group: Group, scores: FloatArray, live: BoolArray) -> None:
        self.group, self.rows = group, group.rows
        alive = live[group.components]
        self.scores = np.where(alive, scores, -np.inf)  # what is masked already counts as removed
        lists = [np.flatnonzero(group.row_of == row) for row in range(group.rows)]
        ordered = [row[np.argsort(self.scores[row], kind="stable")] for row in lists]
        self.number = min(map(len, ordered))
        self.table = np.stack([row[: self.number] for row in ordered])  # (rows, units): lowest first
        with np.errstate(invalid="ignore"):
            self.unit_scores = self.scores[self.table].mean(axis=0)

    def lowest(self, count: int) -> npt.NDArray[np.int64]:
        """Components of the units with the lowest scores."""
        return self.group.components[self.table[:, :count].reshape(-1)]

    def rank(self) -> dict[int, float]:
        """Importance of every component of the group."""
        return dict(zip(self.group.components.tolist(), self.scores.tolist(), strict=True))


def _global_counts(tables: list[_Units], sparsity: float) -> list[int]:
    """The ``int(N * s)`` lowest units of all groups; a group's last one is skipped and replaced by the next lowest."""
    total = sum(units.number for units in tables)
    entries = [(score, g, i) for g, units in enumerate(tables) for i, score in enumerate(units.unit_scores)]
    entries.sort(key=lambda entry: entry[0])  # stable: ties by order in the graph, then index
    counts = [0] * len(tables)
    wanted = int(total * sparsity)
    for _, g, _ in entries:
        if wanted == 0:
            break
        if counts[g] < tables[g].number - 1:
            counts[g] += 1
            wanted -= 1
    return counts
