"""Pruning whole channels: what all criteria share. A criterion is one method, ``score(layer)``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from fxcompress.budget import Budget
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, FloatArray
from fxcompress.channels.propagate import OUTPUT
from fxcompress.channels.row_sets import RowSet
from fxcompress.channels.solve import Channels
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.masking import Masking, complete
from fxcompress.module import TracedModule, modules_of
from fxcompress.passes.allowance import Allowance
from fxcompress.passes.scoring import NEEDS, Criterion, Layer, Reads, elements, normalised
from fxcompress.pipeline import Pass
from fxcompress.ranking import Ranking
from fxcompress.removable_units import Units, channel_units, row_units
from fxcompress.select import Selection, Selectors, Sparsity
from fxcompress.task import Need, require_count


@dataclass(frozen=True)
class ChannelPruner(Pass):
    """Masks the channels that score lowest, in every group or over all of them.

    Args:
        sparsity: fraction of channels to remove, in [0, 1), or a mapping of name pattern to fraction (the last match
            counts; unmatched layers are not pruned). With a budget: in which proportions, all alike by default.
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
        budget: what is left may cost so much of the caller's dense model: sparsities are scaled until it does.

    N counts what may go on its own: with ``"head"`` the heads of an attention, else the channels of a row. A group is
    never emptied. Ties go by order in the graph, then by index.
    """

    sparsity: float | Mapping[str, float] | None = None
    include: Selectors | None = None
    exclude: Selectors | None = None
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    reduce: Literal["sum", "mean", "max"] = "sum"
    granularity: Literal["channel", "head_dim", "head"] = "channel"
    norm_by: Literal["none", "size", "layer"] = "none"
    max_sparsity_per_group: float | None = None
    batches: int | None = None
    budget: Budget | None = None

    #: What the criterion looks at: :attr:`Layer.weight` alone, or :attr:`Layer.activation` or :attr:`Layer.gradient`
    #: too, which are measured on the task's batches.
    reads: ClassVar[Reads] = "weight"
    needs_inputs: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sparsity is None and self.budget is None:
            raise InputError("sparsity is missing: give the fraction of channels to remove, in [0, 1), or a budget.")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise InputError(f"budget is {self.budget!r}; expected a Budget, such as Budget(macs=0.5).")
        if self.budget is not None and self.granularity == "head":
            raise InputError("what whole heads cost is not priced; expected granularity 'channel' or 'head_dim'.")
        if self.budget is not None and self.scope == "global" and self.sparsity is not None:
            raise InputError("scope='global' ranks all channels at once; give a sparsity or a budget, not both.")
        Sparsity.parse(self._shares)
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
        if self.norm_by not in ("none", "size", "layer"):
            raise InputError(f"norm_by is {self.norm_by!r}; expected 'none', 'size' or 'layer'.")
        cap = self.max_sparsity_per_group
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 0 <= cap < 1):
            raise InputError(f"max_sparsity_per_group is {cap!r}; expected a fraction in [0, 1).")
        if self.reads not in NEEDS:
            raise InputError(f"{self.name}.reads is {self.reads!r}; expected 'weight', 'activation' or 'gradient'.")
        if self.batches is not None:
            require_count("batches", self.batches)
            if self.reads == "weight":
                raise InputError(f"batches is {self.batches}, and {self.name} looks at weights alone; leave it out.")

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the criterion looks at must come from somewhere."""
        return NEEDS[self.reads]

    @abstractmethod
    def score(self, layer: Layer) -> Tensor:
        """How much each channel of a layer matters: shape (channels,), higher is kept.

        Where :attr:`reads` says that it looks at data, it is asked once for each batch, and the scores are averaged.
        """

    @property
    def _shares(self) -> float | Mapping[str, float]:
        """The sparsity; all alike where there is a budget alone."""
        return 0.5 if self.sparsity is None else self.sparsity

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Score, choose, and mask."""
        groups = context.groups(module)
        masking = complete(module, context.masking or Masking(), groups.channels)
        chosen = self._choose(groups, module, context)
        allowance = None if self.budget is None else Allowance.of(self.budget, module, groups, context, self.round_to)
        if allowance is not None:
            chosen = allowance.parts(chosen)
        while True:  # what had to come back leaves room for others: every further round masks more, so this ends
            live = masking.live(groups.channels)
            kept, uneven, stuck, problems = self._settled(chosen, module, groups, masking, context, allowance)
            if (kept == live).all():
                break
            context.masking = masking.with_live(groups.channels, kept)
            if not uneven and not stuck:
                break
            masking = complete(module, context.masking, groups.channels)
        what = "heads" if self.granularity == "head" else "channels"
        if uneven:
            context.notes.append(f"{uneven} {what} stay so that coupled rows keep equal numbers")
        if stuck:
            context.notes.append(f"{stuck} {what} stay: {'; '.join(problems)}")
        context.notes += _reasons(groups)
        return module

    def _settled(
        self,
        chosen: list[tuple[Group | RowSet, float]],
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        context: Context,
        allowance: Allowance | None,
    ) -> tuple[BoolArray, int, int, tuple[str, ...]]:
        """For every label whether it lives once the lowest have gone, how many had to come back for the sake of rows,
        and how many at nodes that could not be rewritten, with those."""
        channels, ranking = groups.channels, self._ranking(chosen, module, groups, masking, context)
        tables = list(ranking.tables)
        if allowance is None:
            counts = self._counts(tables, [sparsity for _, sparsity in chosen])
            found = ranking.without(counts)
        else:
            counts, found = allowance.met(ranking, partial(self._affordable, tables, chosen))
        components, whole = ranking.lowest(counts)
        uneven, back = (
            int(channels.alive(kept)[components].sum()) + int(channels.rows.living(kept)[whole].sum())
            for kept in (found.repaired, found.live)
        )
        return found.live, uneven, back - uneven, found.problems

    def _ranking(
        self,
        chosen: list[tuple[Group | RowSet, float]],
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        context: Context,
    ) -> Ranking:
        """What may go of the chosen groups, lowest scores first."""
        channels, live = groups.channels, masking.live(groups.channels)
        alive, rows = channels.alive(live), channels.rows.living(live)
        scores = self.scores([item for item, _ in chosen], module, groups, masking, context)
        tables = (
            self._units(item, score, channels, alive, rows) for (item, _), score in zip(chosen, scores, strict=True)
        )
        return Ranking(module, groups, live, tuple(tables))

    def _affordable(
        self, tables: list[Units], chosen: list[tuple[Group | RowSet, float]], allowance: Allowance
    ) -> list[int]:
        """How many units each group loses for a budget."""
        names, most = [item.name for item, _ in chosen], self._most(tables)
        if self.scope == "global":
            return allowance.ranked(names, tables, most, self.round_to)
        return allowance.shared(names, tables, most, [share for _, share in chosen], self.round_to)

    def _units(
        self, item: Group | RowSet, scores: FloatArray, channels: Channels, alive: BoolArray, rows: BoolArray
    ) -> Units:
        """What may go of a group, or of a set of rows; for every component and row whether it lives."""
        if isinstance(item, RowSet):
            return row_units(item, scores, rows[item.numbers])
        row = channels.rows.row[item.components]
        return channel_units(item, scores, alive[item.components], row, aligned=self.granularity == "head_dim")

    # ---- which groups ------------------------------------------------------------------------------------------

    def _choose(
        self, groups: ChannelGroups, module: TracedModule, context: Context
    ) -> list[tuple[Group | RowSet, float]]:
        """The removable groups, or sets of rows, that the selection takes, each with its sparsity."""
        rows = groups.row_sets if self.granularity == "head" else ()
        covered = {name for item in rows for name in item.groups}
        return self.selected([*rows, *(group for group in groups if group.name not in covered)], module, context)

    def selected(
        self, items: Sequence[Group | RowSet], module: TracedModule, context: Context
    ) -> list[tuple[Group | RowSet, float]]:
        """Those of some groups, or sets of rows, that are removable and that the selection takes, with sparsities."""
        modules = modules_of(module)
        layers = {n: item for n, item in modules.items() if any(p is not None for p in item._parameters.values())}
        sparsities = Sparsity.parse(self._shares).sparsities(layers)
        taken = Selection(self.include, self.exclude).coupled(items, layers)
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

    def scores(
        self,
        items: Sequence[Group | RowSet],
        module: TracedModule,
        groups: ChannelGroups,
        masking: Masking,
        context: Context,
    ) -> list[FloatArray]:
        """For every group (set of rows) the scores of its channels (rows), those of its layers combined: (width,)."""
        slices = [item for group in items for item in group.slices]
        criterion = Criterion(self.name, self.score, self.reads, self.batches)
        found = iter(criterion.scores(slices, module, masking, groups, context))
        made = []
        for group in items:
            parts = [next(found) for _ in group.slices]
            if self.norm_by != "none":
                sizes = [elements(item, module) for item in group.slices]
                parts = [normalised(part, self.norm_by, size) for part, size in zip(parts, sizes, strict=True)]
            made.append(self._combined(group, parts))
        return made

    def _combined(self, group: Group | RowSet, parts: Sequence[FloatArray]) -> FloatArray:
        total = np.full(group.width, -np.inf) if self.reduce == "max" else np.zeros(group.width)
        for item, values in zip(group.slices, parts, strict=True):
            if self.reduce == "max":
                np.maximum.at(total, item.channels, values)
            else:
                total += np.bincount(item.channels, values, group.width)
        if self.reduce != "mean":
            return total
        return total / sum(np.bincount(item.channels, minlength=group.width) for item in group.slices)

    # ---- how many ----------------------------------------------------------------------------------------------

    def _counts(self, tables: list[Units], sparsities: list[float]) -> list[int]:
        """How many units each group loses."""
        most = self._most(tables)
        if self.scope == "layer":
            counts = [min(int(t.number * s), n) for t, s, n in zip(tables, sparsities, most, strict=True)]
        else:
            counts = _global_counts(tables, most, sparsities[0] if sparsities else 0.0)
        return [units.rounded(count, self.round_to) for units, count in zip(tables, counts, strict=True)]

    def _most(self, tables: list[Units]) -> list[int]:
        """How many units each group may lose at most."""
        most = [len(t.scores) for t in tables]  # the last unit of a group is not among them
        if self.max_sparsity_per_group is None:
            return most
        cap = self.max_sparsity_per_group
        return [min(n, max(int(t.number * cap), t.gone)) for n, t in zip(most, tables, strict=True)]


def _global_counts(tables: list[Units], most: list[int], sparsity: float) -> list[int]:
    """The ``int(N * s)`` lowest units of all groups; those that a group must keep are replaced by the next lowest."""
    entries = [(score, g) for g, units in enumerate(tables) for score in units.scores[: most[g]]]
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
