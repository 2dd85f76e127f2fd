"""Regions of a forward without gradients: ``torch.no_grad``, ``torch.set_grad_enabled``, ``torch.inference_mode``.

A graph has no regions, and passes move nodes. So it says the same by ``detach``: what enters a region enters detached,
so that nothing made of it has a gradient; and so does what a layer inside makes of its own parameters. Writes in place
reach the storage that both share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx


class Detached:
    """What of a recording lies in the region without gradients that is running, if one is.

    Attributes:
        active: whether the user's code runs without gradients.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.active = False
        self._inside: set[fx.Node] = set()
        self._entered: dict[fx.Node, fx.Node] = {}

    def look(self) -> None:
        """See in which mode the next call runs."""
        active = not torch.is_grad_enabled()  # inference mode says so too
        if self.active and not active:
            self._inside.clear()
            self._entered.clear()
        self.active = active

    def entering(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        """What a call in the region reads in place of ``node``, whose value is ``tensor``."""
        if not self.active or node in self._inside or not _differentiable(tensor):
            return node
        if node.op == "get_attr" and not tensor.requires_grad:
            return node
        if node not in self._entered:
            self._entered[node] = self.graph.call_method("detach", (node,))
        return self._entered[node]

    def made(self, node: fx.Node) -> None:
        """A call whose operands had all entered made ``node``."""
        if self.active:
            self._inside.add(node)

    def part(self, node: fx.Node, part: fx.Node) -> None:
        """``part`` is one of the values that ``node`` made."""
        if node in self._inside:
            self._inside.add(part)

    def is_outside(self, node: fx.Node) -> bool:
        """Whether the region reads ``node`` detached: what writes into it there leaves its gradient as it was."""
        return self.active and node in self._entered

    def leaving(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        """What stands for a result ``tensor`` of ``node``: of a layer that trains parameters, a detached one."""
        if not self.active or node in self._inside or not _differentiable(tensor):
            return node
        made = self.graph.call_method("detach", (node,))
        self._inside.add(made)
        return made


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def differentiating() -> Iterator[None]:
    """What a forward finds that is run for training, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def computing() -> Iterator[None]:
    """No gradients while a call runs for its values; nor tensors without version, by which writes are seen."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
        return
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        yield
    finally:
        torch._C._set_grad_enabled(before)
