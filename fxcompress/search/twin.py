"""One traced module that takes mask after mask: nothing is traced, and no model is built, for a candidate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxcompress.channels.groups import ChannelGroups
from fxcompress.masking import Masking, complete, lay, lift
from fxcompress.module import TracedModule, submodule
from fxcompress.plan import Plan


class Twin:
    """A clean traced module, and its parameters as they are without masks.

    Where masked channels are zero all by themselves once their slices of all parameters are, a mask is multiplied into
    the parameters for as long as it is wanted. Where an operator reads the live channels alone (statistics, softmax),
    mask nodes are laid over the graph instead.

    Args:
        module: a clean traced module; the twin's own.
        groups: its channel analysis.
    """

    def __init__(self, module: TracedModule, groups: ChannelGroups) -> None:
        self.module, self.groups = module, groups
        self.parameters = dict(module.named_parameters())
        self.laid = 0  # how often nodes had to be laid

    @contextmanager
    def masked(self, masking: Masking, *, trained: bool = False) -> Iterator[TracedModule]:
        """The module with this masking meanwhile; afterwards graph and parameters are as before.

        Args:
            masking: what is masked; its dead channels satisfy the analysis' constraints.
            trained: masks must hold while weights change, so that they are nodes in any case.
        """
        channels = self.groups.channels
        live = masking.live(channels)
        if trained or not self._by_parameters(Plan.of(self.module, self.groups, live), masking):
            self.laid += 1
            lay(self.module, masking, self.groups if masking.dead else None, "search")
            try:
                yield self.module
            finally:
                lift(self.module)
            return
        dense: dict[str, Tensor] = {}
        try:
            for name, mask in complete(self.module, masking, channels).elements.items():
                dense[name] = self.parameters[name].data
                self.parameters[name].data = torch.where(mask, dense[name], torch.zeros_like(dense[name]))
            yield self.module
        finally:
            for name, values in dense.items():
                self.parameters[name].data = values

    def _by_parameters(self, plan: Plan, masking: Masking) -> bool:
        """Whether zeros in the parameters alone do what the masking means."""
        if not masking.dead:
            return True
        live_only = self.groups.channels.facts.ledger.live_only
        for node in self.module.graph.nodes:
            if node.name in live_only and plan.touched(node):
                return False
            if node.op == "call_module" and _leaks(submodule(self.module, str(node.target))) and plan.touched(node):
                return False
        return True


def _leaks(layer: nn.Module) -> bool:
    """Whether a layer turns zeros into something else although its own slices are zero: a norm without an affine."""
    statistics = isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
    return statistics and (layer.weight is None or layer.bias is None)
