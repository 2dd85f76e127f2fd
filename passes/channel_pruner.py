"""Pruning whole channels: what all criteria share. A criterion is one method, ``score(layer)``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.groups import ChannelGroups, Group, Slices
from fxcompress.channels.labels import BoolArray
from fxcompress.channels.propagate import OUTPUT
from fxcompress.channels.row_sets import RowSet
from fxcompress.channels.solve import Channels
from fxcompress.context import Context
from fxcompress.errors import InputError, PassError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule, modules_of, submodule
from fxcompress.passes.removable_units import FloatArray, Units, channel_units, row_units
from fxcompress.pipeline import Pass
from fxcompress.plan import settle
from fxcompress.select import Selection, Selectors, Sparsity

_NONE = np.empty(0, dtype=np.int64)


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
        round_to: kept widths, or kept numbers of rows, are rounded up to a multiple of this.
        reduce: how the scores of coupled layers, and those of the channels of a head, are combined: ``"sum"``,
            ``"mean"`` or ``"max"``.
        granularity: what goes of channels that lie in rows (attention heads, groups of a convolution or GroupNorm).
            ``"channel"``: every row loses equally many channels, those that score lowest in it; ``"head_dim"``: every
            row loses the channels at the same positions; ``"head"``: rows go whole, a head with its queries, keys,
            values and all that reads them, and those that stay keep their width. Channels without rows go one by one.

    N counts what may go on its own: with ``"head"`` the heads of an attention, else the channels of a row. A group is
    never emptied. Ties go by order in the graph, then by index.
    """

    sparsity: float | Mapping[str, float]
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    reduce: Literal["sum", "mean", "max"] = "sum"
    granularity: Literal["channel", "head_dim", "head"] = "channel"

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
        if self.granularity not in ("channel", "head_dim", "head"):
            raise InputError(f"granularity is {self.granularity!r}; expected 'channel', 'head_dim' or 'head'.")

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """How much each channel of a layer matters: shape (channels,), higher is kept."""

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Score, choose, and mask."""
        groups = context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        chosen = self._choose(groups, module, context)
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
            what = "heads" if self.granularity == "head" else "channels"
            context.notes.append(f"{back} {what} stay so that coupled rows keep equal numbers")
        context.notes += _reasons(groups)
        return module

    def _settled(
        self,
        chosen: list[tuple[Group | RowSet, float]],
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        live: BoolArray,
    ) -> tuple[BoolArray, int]:
        """For every label whether it lives once the lowest have gone, and how many had to come back."""
        channels = groups.channels
        tables = [self._units(item, module, channels, masking, live) for item, _ in chosen]
        counts = self._counts(tables, [sparsity for _, sparsity in chosen])
        rank: dict[int, float] = {}
        for units in tables:
            rank.update(units.rank)
        gone = [units.lowest(count) for units, count in zip(tables, counts, strict=True)]
        components, rows = (
            np.concatenate([_NONE, *parts]) for parts in (zip(*gone, strict=True) if gone else ((), ()))
        )
        kept = settle(module, groups, live & channels.live(components, rows), rank)
        back = int(channels.alive(kept)[components].sum()) + int(channels.rows.living(kept)[rows].sum())
        return kept, back

    def _units(
        self, item: Group | RowSet, module: TracedModule, channels: Channels, masking: Masking, live: BoolArray
    ) -> Units:
        """What may go of a group, or of a set of rows, with scores."""
        scores = self._scores(item, module, masking)
        if isinstance(item, RowSet):
            return row_units(item, scores, channels.rows.living(live)[item.numbers])
        alive, row = channels.alive(live)[item.components], channels.rows.row[item.components]
        return channel_units(item, scores, alive, row, aligned=self.granularity == "head_dim")

    # ---- which groups ------------------------------------------------------------------------------------------

    def _choose(
        self, groups: ChannelGroups, module: TracedModule, context: Context
    ) -> list[tuple[Group | RowSet, float]]:
        """The removable groups, or sets of rows, that the selection takes, each with its sparsity."""
        modules = modules_of(module)
        layers = {n: item for n, item in modules.items() if any(p is not None for p in item._parameters.values())}
        Selection(self.include, self.exclude).chosen(layers)  # raises where a selector matches nothing
        included = Selection(self.include).chosen(layers)
        excluded = frozenset() if self.exclude is None else Selection(self.exclude).chosen(layers)
        sparsities = Sparsity.parse(self.sparsity).sparsities(layers)
        rows = groups.row_sets if self.granularity == "head" else ()
        covered = {name for item in rows for name in item.groups}
        items: list[Group | RowSet] = [*rows, *(group for group in groups if group.name not in covered)]
        taken = [item for item in items if set(item.layers) & included and not set(item.layers) & excluded]
        removable = [item for item in taken if isinstance(item, RowSet) or item.removable]
        if not removable:
            reasons = "; ".join(str(group) for group in taken[:5]) or "every group has an excluded layer"
            warnings.warn(f"{self.name} has nothing to prune: {reasons}", stacklevel=2)
        chosen = []
        for item in removable:
            wanted = {name: sparsities.get(name, 0.0) for name in item.layers}
            smallest = min(wanted.values())
            if smallest != max(wanted.values()):
                context.notes.append(f"the layers of group {item.name} disagree ({wanted}); taking {smallest}")
            chosen.append((item, smallest))
        return chosen

    # ---- scores ------------------------------------------------------------------------------------------------

    def _scores(self, group: Group | RowSet, module: TracedModule, masking: Masking) -> FloatArray:
        """Scores of a group's channels (a set's rows), those of its layers combined: shape (width,)."""
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

    def _counts(self, tables: list[Units], sparsities: list[float]) -> list[int]:
        """How many units each group loses."""
        if self.scope == "layer":
            counts = [min(int(t.number * s), len(t.scores)) for t, s in zip(tables, sparsities, strict=True)]
        else:
            counts = _global_counts(tables, sparsities[0] if sparsities else 0.0)
        return [units.rounded(count, self.round_to) for units, count in zip(tables, counts, strict=True)]


def _layer(item: Slices, module: TracedModule, masking: Masking) -> Layer:
    weight = module.get_parameter(item.parameter).detach()
    mask = masking.elements.get(item.parameter)
    if mask is not None:
        weight = weight * mask
    weight, rows = item.lines(weight), torch.from_numpy(item.rows).to(weight.device)
    if len(rows) != len(weight) or (item.rows[:-1] > item.rows[1:]).any():
        weight = weight.index_select(0, rows)
    return Layer(item.layer, submodule(module, item.layer), weight)


def _global_counts(tables: list[Units], sparsity: float) -> list[int]:
    """The ``int(N * s)`` lowest units of all groups; a group's last one is skipped and replaced by the next lowest."""
    entries = [(score, g) for g, units in enumerate(tables) for score in units.scores]
    entries.sort(key=lambda entry: entry[0])  # stable: ties by order in the graph, then index
    counts = [0] * len(tables)
    for _, g in entries[: int(sum(units.number for units in tables) * sparsity)]:
        counts[g] += 1
    return counts


def _reasons(groups: ChannelGroups) -> list[str]:
    """Why channels stay that are no outputs of the model: one line for each reason."""
    kept: dict[str, list[Group]] = {}
    for group in groups:
        if not group.removable and OUTPUT not in group.reason:
            kept.setdefault(group.reason, []).append(group)
    return [
        f"{sum(group.width for group in same)} channels of {', '.join(group.name for group in same)} stay: {reason}"
        for reason, same in kept.items()
    ]
