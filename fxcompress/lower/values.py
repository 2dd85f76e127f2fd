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


class _Following(fx.Interpreter):
    """Runs a graph in a dtype, and casts what comes out in float32 all the same."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.dtype = dtype
        self.found: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        calls = n.op in ("call_function", "call_method", "call_module")
        if calls and isinstance(value, Tensor) and value.dtype == torch.float32:
            self.found.append(n)
            return value.to(self.dtype)
        return value


def staying_float32(module: TracedModule, inputs: Inputs, dtype: torch.dtype) -> list[fx.Node]:
    """Nodes that give float32 in a graph whose inputs and parameters have another dtype: integers times a number, say.

    Each is found with those before it cast.
    """
    following = _Following(module, dtype)
    with torch.no_grad(), evaluating(module):
        following.run(*positional(module, inputs.map(Tensor.clone)))
    return following.found
