"""Pruning filters by the L1 norm of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxcompress.passes.norm_filter_pruner import NormFilterPruner


@dataclass(frozen=True)
class L1FilterPruner(NormFilterPruner):
    """Channel score ``s_i = sum_j abs(W_i,j)`` over the slice that produces channel i.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.1. Inserts masks; guarantees
    exactly ``int(N * s)`` channels fewer in every group (see :class:`ChannelPruner` for rows and rounding).
    """

    def norm(self, slices: Tensor) -> Tensor:
        """``slices`` (channels, elements) -> (channels,)."""
        return slices.abs().sum(dim=1)
