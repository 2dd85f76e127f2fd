"""Pruning the filters nearest the geometric median of their layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer


@dataclass(frozen=True)
class FPGMPruner(ChannelPruner):
    """Channel score ``s_i = sum_j norm2(W_i - W_j)``: filters near the geometric median are replaceable and go.

    He et al. 2019, "Filter Pruning via Geometric Median", arXiv 1811.00250, equation 5. Inserts masks; guarantees
    exactly ``int(N * s)`` channels fewer in every group (see :class:`ChannelPruner`).
    """

    def score(self, layer: Layer) -> Tensor:
        """Sum of the distances to every other filter of the layer: (channels,)."""
        filters = layer.weight.flatten(1).double()  # distances by a matrix product lose half the digits
        return torch.cdist(filters, filters, compute_mode="use_mm_for_euclid_dist").sum(dim=1)
