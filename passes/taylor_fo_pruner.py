"""Pruning the channels without which the loss would change least, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer, Reads


@dataclass(frozen=True)
class TaylorFOPruner(ChannelPruner):
    """Channel score ``s_i = (sum_j g_i,j * w_i,j)^2``, averaged over batches: the squared change of the loss.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8 with the
    joint importance of a set of parameters. g is the gradient of a batch's loss; with several processes the gradients
    are averaged before they are multiplied and squared.

    Args:
        per: ``"slice"`` squares the sum over the slice that produces the channel; ``"element"`` sums the squares
            ``(g_i,j * w_i,j)^2`` (equation 9).

    Needs the task's batches and loss. Inserts masks; guarantees exactly ``int(N * s)`` channels fewer in every group
    (see :class:`ChannelPruner`).
    """

    per: Literal["slice", "element"] = "slice"

    reads: ClassVar[Reads] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("slice", "element"):
            raise InputError(f"per is {self.per!r}; expected 'slice' or 'element'.")

    def score(self, layer: Layer) -> Tensor:
        """The importance of every channel in one batch: (channels,)."""
        change = (layer.gradient.double() * layer.weight.double()).flatten(1)
        return change.sum(dim=1).square() if self.per == "slice" else change.square().sum(dim=1)
