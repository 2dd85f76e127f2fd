"""Pruning filters by the L2 norm of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxcompress.passes.norm_filter_pruner import NormFilterPruner


@dataclass(frozen=True)
class L2FilterPruner(NormFilterPruner):
    """Channel score ``s_i = sqrt(sum_j W_i,j^2)`` over the slice that produces channel i.

    The L2 variant of Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710. Inserts masks;
    guarantees exactly ``int(N * s)`` channels fewer in every group (see :class:`ChannelPruner`).
    """

    def norm(self, slices: Tensor) -> Tensor:
        """``slices`` (channels, elements) -> (channels,)."""
        return slices.square().sum(dim=1).sqrt()
