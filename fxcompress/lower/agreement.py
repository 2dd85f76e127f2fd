"""How far a lowered graph is from the simulation, node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.inputs import Inputs, positional
from fxcompress.lower.integers import ByteGrid
from fxcompress.module import TracedModule, evaluating
from fxcompress.outputs import tensors_of
from fxcompress.verify import difference

#: ``node.meta``: the grid of a node that gives integers.
GRID = "grid"


@dataclass(frozen=True)
class NodeAgreement:
    """One node, given what the simulation computed as its inputs.

    Attributes:
        name: of the node, in both graphs.
        steps: largest difference in quantization steps; None for a float node.
        share: of elements that differ.
        difference: of a float node: ``max abs(a - b) / max abs(a)``; inf where the shapes differ.
        elements: how many were compared.
    """

    name: str
    steps: int | None
    share: float
    difference: float
    elements: int


class _Values(fx.Interpreter):
    """Runs a graph and keeps a copy of every tensor on the way."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = value.detach().clone()
        return value


class _Comparing(fx.Interpreter):
    """Runs a lowered graph, each node on what the simulation computed."""

    def __init__(self, module: fx.GraphModule, simulated: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.simulated = simulated
        self.found: list[NodeAgreement] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        right = self.simulated.get(n.name)
        if n.op not in ("call_module", "call_function", "call_method") or not isinstance(value, Tensor):
            return value
        if right is None or not value.numel():
            return value
        if right.shape != value.shape:
            self.found.append(NodeAgreement(n.name, None, 1.0, float("inf"), value.numel()))
            return right.clone()
        grid = n.meta.get(GRID)
        if grid is None:
            gap, size = float((value.float() - right).abs().max()), float(right.abs().max())
            self.found.append(NodeAgreement(n.name, None, 0.0, gap / size if size else gap, value.numel()))
            return right.clone()
        integers = as_integers(right, grid)
        away = (value.int() - integers.int()).abs()
        share = float((away > 0).float().mean())
        self.found.append(NodeAgreement(n.name, int(away.max()), share, 0.0, value.numel()))
        return integers.contiguous(memory_format=_layout(value))


def as_integers(x: Tensor, grid: ByteGrid) -> Tensor:
    """The integers of values that lie on a grid."""
    return ((x / grid.scale).round() + grid.zero_point).to(torch.uint8)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def agreement(simulated: TracedModule, lowered: TracedModule, inputs: Inputs) -> list[NodeAgreement]:
    """Compare every node that both graphs have.

    Each node of the lowered graph is given the simulation's values, so that what is found is its own error: over a
    whole network, one step here becomes several there. The result comes last, as ``output``.
    """
    right = _Values(simulated)
    with torch.no_grad(), evaluating(simulated), evaluating(lowered):
        expected = right.run(*positional(simulated, inputs.map(Tensor.clone)))
        comparing = _Comparing(lowered, right.seen)
        found = comparing.run(*positional(lowered, inputs.map(Tensor.clone)))
    elements = sum(item.numel() for _, item in tensors_of(found))
    return [*comparing.found, NodeAgreement("output", None, 0.0, difference(expected, found), elements)]
