"""Masks into weights, fake-quant nodes to quantize and dequantize operators: the graph that is exported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.export.grid_operators import dequantize, quantize
from fxcompress.module import TracedModule
from fxcompress.nodes import apply_mask, learned_mask, rows_of
from fxcompress.quantization.fake_quantize import ROLE, FakeQuantize, fake_quant_nodes, require_kernels
from fxcompress.quantization.settle import settle, value_of
from fxcompress.quantization.spec import Grid
from fxcompress.rewrite import Rewriter, rewriting

#: Under it lie integer weights, scales and zero points.
GRIDS = "_grids"
#: Under it lie masked weights.
_MASKED = "_masked"


def store_masked(module: TracedModule, author: str) -> None:
    """Let the graph read masked parameters as buffers with their masks applied, in place; masks of activations stay."""
    with rewriting(module, author) as rewriter, torch.no_grad():
        for node in list(module.graph.nodes):
            source = node.args[0] if node.target in (apply_mask, learned_mask) else None
            if isinstance(source, fx.Node) and source.op == "get_attr":
                name = f"{_MASKED}.{node.name}"
                rewriter.add_buffer(name, value_of(module, node), persistent=True)
                rewriter.become(node, "get_attr", name, ())
                node.meta.pop("mask", None)
        rewriter.sweep()


def write_operators(module: TracedModule, author: str) -> list[str]:
    """Replace every fake-quant node of a module in eval mode by operators, in place; returns notes.

    Activations become uint8 (a signed grid is shifted by 128), weights int8.

    Raises:
        PassError: ONNX's 8-bit grids cannot hold a spec.
    """
    notes = settle(module, author=author)
    require_kernels(module, "an ONNX runtime", _limit)
    nodes = fake_quant_nodes(module)
    with rewriting(module, author) as rewriter, torch.no_grad():
        for node, item in nodes:
            if item.grid() is None:
                notes.append(f"{node.target} lies on no fixed grid and is written as it computes, in float")
            elif item.spec.role == "weight":
                _weight(rewriter, node, item)
            else:
                _activation(rewriter, node, item)
        rewriter.sweep()
    return notes


def _limit(node: fx.Node, item: FakeQuantize, grid: Grid) -> str | None:
    """ONNX's QuantizeLinear saturates at the ends of 8 bits, and nowhere else."""
    if grid.scale.dtype != torch.float32:
        return f"float32 scales, and this one is {grid.scale.dtype}; convert the model with .float()"
    if item.spec.role == "activation" and item.spec.quant_max - item.spec.quant_min != 255:
        return "activations of 8 bits over all 256 integers; quantize with activation_bits=8"
    return None


def _weight(rewriter: Rewriter, node: fx.Node, item: FakeQuantize) -> None:
    """Integers in the place of a weight, its mask and its fake-quant node; and of a mask behind it."""
    module, last = rewriter.module, node
    while len(last.users) == 1 and "mask" in next(iter(last.users)).meta:
        (last,) = last.users
    grid, axis = item.grid(), item.spec.axis
    assert grid is not None
    values: Tensor = value_of(module, last)
    along = grid.scale
    if axis is not None and along.dim():
        along = along.reshape([-1 if dim == axis % values.dim() else 1 for dim in range(values.dim())])
    integers = (values / along).round().to(torch.int8)
    stored = _constant(rewriter, last, f"{node.name}.integers", integers)
    scale = _constant(rewriter, last, f"{node.name}.scale", grid.scale.clone())
    for reader in list(last.users):
        if reader.target is F.embedding and axis in (None, 0):  # a table is not dequantized to pick a few rows
            rewriter.become(reader, "call_function", rows_of, (reader.args[0], stored, scale))
    args = (
        stored,
        scale,
        _constant(rewriter, last, f"{node.name}.zero_point", grid.zero_point.to(torch.int8)),
        (axis or 0) % values.dim(),
    )
    rewriter.become(last, "call_function", dequantize, args)
    last.meta.pop(ROLE, None)
    last.meta.pop("mask", None)


def _activation(rewriter: Rewriter, node: fx.Node, item: FakeQuantize) -> None:
    grid = item.grid()
    assert grid is not None
    scale = _constant(rewriter, node, f"{node.name}.scale", grid.scale.reshape(()).clone())
    shifted = (grid.zero_point - item.spec.quant_min).reshape(()).to(torch.uint8)
    zero_point = _constant(rewriter, node, f"{node.name}.zero_point", shifted)
    made = rewriter.insert_before(node, "call_function", quantize, (node.args[0], scale, zero_point, node.name))
    rewriter.become(node, "call_function", dequantize, (made, scale, zero_point, 0))


def _constant(rewriter: Rewriter, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer, and the node that reads it."""
    rewriter.add_buffer(f"{GRIDS}.{name}", value, persistent=True)
    return rewriter.insert_before(before, "get_attr", f"{GRIDS}.{name}", ())
