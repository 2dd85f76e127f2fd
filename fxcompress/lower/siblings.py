"""Linear layers that read the same integers become one: calling a kernel costs as much as a small product."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from fxcompress.lower.integers import ByteGrid
from fxcompress.lower.prepacked import PostOp
from fxcompress.lower.quantized import QuantizedLinear
from fxcompress.module import TracedModule, submodule
from fxcompress.quantization.sites import operation
from fxcompress.rewrite import Rewriter

Family = list[tuple[fx.Node, QuantizedLinear]]


def merge_siblings(rewriter: Rewriter) -> list[str]:
    """Merge int8 linear layers with one input and float results, such as attention's query, key and value.

    Only where every reader reshapes what it reads: parts of a row have strides that other readers may not take. The
    layers' nodes stay, as parts of the merged one's result.

    Returns:
        The merged layers' names.
    """
    module = rewriter.module
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    families: dict[tuple[fx.Node, ByteGrid, PostOp], Family] = {}
    for node in module.graph.nodes:
        layer = _alone(module, node)
        if layer is not None and calls[str(node.target)] == 1:
            families.setdefault((node.all_input_nodes[0], layer.x_grid, layer.post), []).append((node, layer))
    return [_merge(rewriter, family) for family in families.values() if len(family) > 1]


def _alone(module: TracedModule, node: fx.Node) -> QuantizedLinear | None:
    """The layer that a node calls, if it gives floats to be reshaped, and adds nothing."""
    layer = submodule(module, str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, QuantizedLinear) or layer.grid is not None or layer.affine or len(node.args) > 1:
        return None
    return layer if node.users and all(operation(module, user) == "reshape" for user in node.users) else None


def _merge(rewriter: Rewriter, family: Family) -> str:
    layers = [layer for _, layer in family]
    merged = QuantizedLinear(
        torch.cat([layer.weight for layer in layers]),
        torch.cat([layer.weight_scale.expand(len(layer.weight)) for layer in layers]),
        torch.cat([_bias(layer) for layer in layers]),
        post=layers[0].post,
        x_grid=layers[0].x_grid,
        grid=None,
    )
    names = [str(node.target) for node, _ in family]
    name = "_".join((names[0], *(item.rpartition(".")[2] for item in names[1:])))
    while rewriter.has_module(name):
        name += "_"
    rewriter.put_module(name, merged)
    first = family[0][0]
    whole = rewriter.insert_before(first, "call_module", name, first.args)
    start = 0
    for node, layer in family:
        width = len(layer.weight)
        rewriter.drop_module(str(node.target))
        rewriter.become(node, "call_function", torch.narrow, (whole, -1, start, width))
        start += width
    return name


def _bias(layer: QuantizedLinear) -> Tensor:
    return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
