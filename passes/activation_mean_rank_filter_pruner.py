"""Pruning the channels whose activation is small on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer, Reads


@dataclass(frozen=True)
class ActivationMeanRankFilterPruner(ChannelPruner):
    """Channel score ``s_i = mean of a_i`` over samples and positions of the layer's own activation.

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440,
    section 2.2. The mean is signed: a channel that is mostly negative (a layer without ReLU) scores low. Needs the
    task's batches. Inserts masks; guarantees exactly ``int(N * s)`` channels fewer in every group (see
    :class:`ChannelPruner`).
    """

    reads: ClassVar[Reads] = "activation"

    def score(self, layer: Layer) -> Tensor:
        """The mean of every channel: (channels,)."""
        return layer.activation.double().mean(dim=1)
