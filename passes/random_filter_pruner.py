"""Pruning filters at random: the baseline that a criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxcompress.context import Context
from fxcompress.module import TracedModule
from fxcompress.passes.channel_pruner import ChannelPruner
from fxcompress.passes.scoring import Layer


@dataclass(frozen=True)
class RandomFilterPruner(ChannelPruner):
    """Uniformly random channel scores, the same for the same seed whatever else is random.

    Args:
        seed: of the scores; by default that of the run. Each layer draws its own from the seed and its name.

    Inserts masks; guarantees exactly ``int(N * s)`` channels fewer in every group (see :class:`ChannelPruner`).
    """

    seed: int | None = None

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Score, choose, and mask."""
        chosen = self if self.seed is not None else replace(self, seed=context.seed)
        return super(RandomFilterPruner, chosen).run(module, context)

    def score(self, layer: Layer) -> Tensor:
        """Random numbers in [0, 1): (channels,)."""
        seed = (
            (self.seed or 0) * 0x9E3779B1 + zlib.crc32(layer.name.encode())
        ) % 2**32  # torch reads 32 bits of a seed
        return torch.rand(layer.weight.shape[0], generator=torch.Generator().manual_seed(seed))
