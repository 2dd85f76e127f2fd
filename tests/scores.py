"""Criteria that say which channels go, for tests that are not about criteria."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompress.passes import ChannelPruner, Layer


@dataclass(frozen=True)
class InOrder(ChannelPruner):
    """The first channels of every group go; ties between layers leave that as it is."""

    def score(self, layer: Layer) -> Tensor:
        return torch.arange(float(len(layer.weight)))


@dataclass(frozen=True)
class Chosen(ChannelPruner):
    """The channels in ``dead[layer]`` go first; unlisted layers have no say.

    ``sparsity`` still says how many.
    """

    dead: dict[str, list[int]] = field(default_factory=dict)

    def score(self, layer: Layer) -> Tensor:
        score = torch.zeros(len(layer.weight))
        score[self.dead.get(layer.name, [])] = -1.0
        return score


def choose(widths: dict[str, int], dead: dict[str, list[int]]) -> Chosen:
    """A pruner that removes exactly ``dead[layer]`` from the groups of those layers."""
    return Chosen({name: len(gone) / widths[name] for name, gone in dead.items()}, dead=dead)
