"""Network slimming: channels are judged by the scale that their norm gives them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.groups import ChannelGroups, Group, Slices
from fxcompress.channels.labels import IntArray
from fxcompress.channels.row_sets import RowSet
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule, submodule
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.inner_pruner import TRAINING
from fxcompress.passes.scoring import Layer
from fxcompress.task import Need, require_count

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class SlimPruner(ChannelPruner):
    """Drives the scales of norms towards zero while it trains, then masks the channels with the smallest.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519, section 3:
    trains on loss + scale * sum abs(gamma) (equation 1), and ranks all channels together by abs(gamma). The gammas are
    those of the norms (batch, layer, group, instance, RMS) that scale a channel of a group, found by following channels
    through the graph, wherever they stand; a channel with several has their sum (``reduce``). Groups without a gamma
    are left alone, which is noted.

    Args:
        scale: weight of sum abs(gamma).
        epochs: how long the training is; the task's by default.

    The other options are those of :class:`ChannelPruner`; ``scope`` is ``"global"`` by default, and
    ``max_sparsity_per_group`` keeps a group from all but vanishing. Needs the task's batches, loss and optimizer.
    Follow with ``FineTune``.
    """

    scope: Literal["layer", "global"] = "global"
    scale: float = 1e-4
    epochs: int | None = None

    idempotent: ClassVar[bool] = False
    versioned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not 0 <= self.scale < math.inf:
            raise InputError(f"scale is {self.scale!r}; expected a number of at least 0, the weight of sum abs(gamma).")
        if self.epochs is not None:
            require_count("epochs", self.epochs)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What training needs."""
        return TRAINING

    def score(self, layer: Layer) -> Tensor:
        """abs(gamma): (channels,)."""
        return layer.weight.abs()

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Train until gammas are sparse, then choose and mask."""
        said = len(context.notes)
        chosen = self._choose(context.groups(module), module, context)
        if not chosen:
            return module
        del context.notes[said:]  # they are said once more when channels are masked
        penalty = _Sparsity(self.scale, module, [part for item, _ in chosen for part in item.slices])
        with context.laid(module, self.name):
            context.train(module, epochs=self.epochs, penalty=penalty, title=self.name)
        return super().run(module, context)

    def _choose(
        self, groups: ChannelGroups, module: TracedModule, context: Context
    ) -> list[tuple[Group | RowSet, float]]:
        """Those of the chosen groups that have gammas, with these as what is scored."""
        found: list[tuple[Group | RowSet, float]] = []
        bare = []
        for item, sparsity in super()._choose(groups, module, context):
            slices = tuple(gammas(item, groups, module))
            covered = np.unique(np.concatenate([part.channels for part in slices])) if slices else ()
            if len(covered) == item.width:
                found.append((replace(item, slices=slices), sparsity))
            else:
                bare.append(item.name)
        if bare:
            context.notes.append(f"no norm scales {', '.join(bare)}; left alone")
        if bare and not found:
            warnings.warn(f"{self.name} has nothing to prune: no norm scales {', '.join(bare)}", stacklevel=2)
        return found


def gammas(item: Group | RowSet, groups: ChannelGroups, module: TracedModule) -> Iterator[Slices]:
    """The elements of norms' weights that scale a group's channels (a set's rows), each norm's together."""
    channels = groups.channels
    numbers, own = (
        (channels.rows.row, item.numbers) if isinstance(item, RowSet) else (channels.component, item.components)
    )
    place: IntArray = np.full(int(numbers.max()) + 1, -1, dtype=np.int64)
    place[own] = np.arange(len(own))
    members = set(item.members)
    for axis in channels.facts.ledger.axes:
        if (axis.name, axis.dim) not in members or not axis.name.endswith(".weight"):
            continue
        holder = submodule(module, axis.name.rpartition(".")[0])
        if isinstance(holder, _NORMS) and module.get_parameter(axis.name).dim() == 1:
            mine = place[numbers[axis.start : axis.start + axis.size]]
            yield Slices(axis.name, axis.dim, np.flatnonzero(mine >= 0), mine[mine >= 0])


class _Sparsity:
    """scale * sum abs(gamma)."""

    def __init__(self, scale: float, module: TracedModule, slices: list[Slices]) -> None:
        self.scale = scale
        rows: dict[str, list[IntArray]] = {}
        for item in slices:
            rows.setdefault(item.parameter, []).append(item.rows)
        self.parts = [(module.get_parameter(n), torch.from_numpy(np.concatenate(r))) for n, r in rows.items()]

    def __call__(self) -> Tensor:
        total = torch.zeros(())
        for gamma, index in self.parts:
            total = total.to(gamma) + gamma[index.to(gamma.device)].abs().sum()
        return self.scale * total
