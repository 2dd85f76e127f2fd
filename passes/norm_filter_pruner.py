"""What the pruners that rank filters by a norm share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.passes.channel_pruner import ChannelPruner, Layer

#: Elements of a weight that are looked at at once: their magnitudes take memory too.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class NormFilterPruner(ChannelPruner):
    """Ranks channels by a norm of the slices that produce them.

    Args:
        norm_by: for rankings over layers of different size: ``"none"``; ``"size"`` divides by the number of elements
            of a slice; ``"layer"`` divides by the layer's mean score.
    """

    norm_by: Literal["none", "size", "layer"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_by not in ("none", "size", "layer"):
            raise InputError(f"norm_by is {self.norm_by!r}; expected 'none', 'size' or 'layer'.")

    @abstractmethod
    def norm(self, slices: Tensor) -> Tensor:
        """``slices`` (channels, elements) -> (channels,)."""

    def score(self, layer: Layer) -> Tensor:
        """The norm of every channel's slice, normalised as asked: (channels,)."""
        slices = layer.weight.flatten(1)
        rows = max(_AT_ONCE // slices.shape[1], 1)
        parts = [self.norm(some) for some in slices.split(rows)]
        score = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.norm_by == "size":
            return score / slices.shape[1]
        if self.norm_by == "layer":
            return score / score.mean().clamp_min(1e-30)
        return score
