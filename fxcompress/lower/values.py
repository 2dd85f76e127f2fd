"""What a graph computes on the example inputs, as far as lowering must know it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.inputs import Inputs, positional
from fxcompress.module import TracedModule, evaluating


class _Shapes(fx.Interpreter):
    """Runs a graph and remembers the shapes and dtypes of tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name], self.dtypes[n.name] = tuple(value.shape), value.dtype
        return value


def shapes_of(module: TracedModule, inputs: Inputs) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Shape and dtype of the tensor that each node gives on the example inputs in eval mode, by node name."""
    shapes = _Shapes(module)
    with torch.no_grad(), evaluating(module):
        shapes.run(*positional(module, inputs.map(Tensor.clone)))
    return shapes.shapes, shapes.dtypes
