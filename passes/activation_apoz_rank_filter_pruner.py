"""Pruning the channels that are zero most of the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer, Reads


@dataclass(frozen=True)
class ActivationAPoZRankFilterPruner(ChannelPruner):
    """Channel score ``1 - APoZ_i``, ``APoZ_i = sum_k sum_j (O_i,j(k) == 0) / (N * M)`` over N samples, M positions.

    Hu et al. 2016, "Network Trimming", arXiv 1607.03250, equation 1. O is the layer's own activation (see
    :attr:`Layer.activation`). Behind a function that is never zero (GELU, sigmoid) all channels score 1 and the first
    ones go. Needs the task's batches. Inserts masks; guarantees exactly ``int(N * s)`` channels fewer in every group
    (see :class:`ChannelPruner`).
    """

    reads: ClassVar[Reads] = "activation"

    def score(self, layer: Layer) -> Tensor:
        """The fraction of positions that are not zero: (channels,)."""
        return (layer.activation != 0).double().mean(dim=1)
