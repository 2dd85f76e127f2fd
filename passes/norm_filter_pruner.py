"""What the pruners that rank filters by a norm share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer

#: Elements of a weight that are looked at at once: their magnitudes take memory too.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class NormFilterPruner(ChannelPruner):
    """Ranks channels by a norm of the slices that produce them."""

    @abstractmethod
    def norm(self, slices: Tensor) -> Tensor:
        """``slices`` (channels, elements) -> (channels,)."""

    def score(self, layer: Layer) -> Tensor:
        """The norm of every channel's slice: (channels,)."""
        slices = layer.weight.flatten(1)
        rows = max(_AT_ONCE // slices.shape[1], 1)
        parts = [self.norm(some) for some in slices.split(rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
