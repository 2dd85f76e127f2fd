"""Masks multiplied for good into what they mask: the graph that is lowered has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.layers import close_layer, closes
from fxcompress.masking import LIVE
from fxcompress.module import MASKS, TracedModule, owner, submodule
from fxcompress.nodes import apply_mask, learned_mask, restore_live, select_live
from fxcompress.quantization.fake_quantize import ROLE, FakeQuantize
from fxcompress.rewrite import Rewriter, rewriting

_MASKING = (apply_mask, learned_mask)
_SELECTING = (select_live, restore_live)


def fold_masks(module: TracedModule, author: str) -> None:
    """Multiply the masks in a module's graph into its parameters, in place; it computes the same in eval mode.

    A mask of a parameter, in front of its fake-quant node or behind, goes into the parameter; one behind a BatchNorm
    into its weight and bias. Layers that were opened for their masks are closed. What reads live channels only (norms,
    softmax) stays as it is, as do masks behind rules that move zero.

    Args:
        module: a traced module with its masks laid.
        author: the pass, for provenance.
    """
    with rewriting(module, author) as rewriter:
        for node in list(module.graph.nodes):
            if node.target in _MASKING and (_into_parameter(rewriter, node) or _behind_quantizer(rewriter, node)):
                rewriter.replace(node, node.all_input_nodes[0])
                rewriter.erase(node)
        for nodes in _behind_norms(module).values():
            _into_norm(rewriter, nodes)
        rewriter.sweep()
        for node in list(module.graph.nodes):
            if closes(node) and _reads_whole_parameters(node):
                close_layer(rewriter, node)
        rewriter.sweep()
        read = {str(node.target).partition(".")[0] for node in module.graph.find_nodes(op="get_attr")}
        for holder in {MASKS, LIVE} - read:
            rewriter.drop_module(holder)


def forget_masks(module: TracedModule) -> None:
    """Let what is left be no masks to any later pass."""
    for node in module.graph.nodes:
        node.meta.pop("mask", None)
        node.meta.pop("dense", None)
    module.meta.pop("dead", None)


def _mask_of(module: TracedModule, node: fx.Node) -> Tensor:
    """The constant that a mask node multiplies with."""
    buffer = node.args[1]
    assert isinstance(buffer, fx.Node)
    holder, leaf = owner(module, str(buffer.target))
    found: Tensor = getattr(holder, leaf)
    return found


def _into_parameter(rewriter: Rewriter, node: fx.Node) -> bool:
    """Multiply a mask into the parameter in front of it; every use of a parameter has the same one."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    holder, leaf = owner(rewriter.module, str(source.target))
    tensor: Tensor = getattr(holder, leaf)
    rewriter.set_tensor(str(source.target), tensor.detach() * _mask_of(rewriter.module, node))
    return True


def _behind_quantizer(rewriter: Rewriter, node: fx.Node) -> bool:
    """Whether a mask is that of a weight which a fake-quant node leaves zero where it was."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.meta.get(ROLE) != "weight":
        return False
    quantizer = submodule(rewriter.module, str(source.target))
    return isinstance(quantizer, FakeQuantize) and quantizer.keeps_zero


def _behind_norms(module: TracedModule) -> dict[str, list[fx.Node]]:
    """Masks of channels behind BatchNorms with weight and bias, by layer: nothing else reads what these give."""
    found: dict[str, list[fx.Node]] = {}
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = submodule(module, str(node.target))
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.weight is None or layer.bias is None:
            continue
        calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        if len(node.users) == 1 and (reader := next(iter(node.users))).target in _MASKING:
            found.setdefault(str(node.target), []).append(reader)
    return {name: nodes for name, nodes in found.items() if len(nodes) == calls[name]}


def _into_norm(rewriter: Rewriter, nodes: list[fx.Node]) -> None:
    """Multiply the mask behind all calls of a BatchNorm into its weight and bias."""
    module = rewriter.module
    masks = [_mask_of(module, node) for node in nodes]
    mask = masks[0]
    called = nodes[0].all_input_nodes[0]
    layer: Any = submodule(module, str(called.target))
    channels = layer.num_features
    if mask.dim() < 2 or mask.shape[1] != channels or mask.numel() != channels:
        return
    if not all(torch.equal(mask, other) for other in masks[1:]):
        return
    for leaf in ("weight", "bias"):
        rewriter.set_tensor(f"{called.target}.{leaf}", getattr(layer, leaf).detach() * mask.reshape(-1))
    for node in nodes:  # under the mask's name: that is whose value it is
        norm = node.args[0]
        assert isinstance(norm, fx.Node)
        rewriter.become(node, "call_module", str(called.target), norm.args, dict(norm.kwargs))
        rewriter.erase(norm)


def _reads_whole_parameters(node: fx.Node) -> bool:
    """Whether an opened layer computes what the layer does: no parameter in part, no literal rewritten."""
    return "dense" not in node.meta and not any(
        source.target in (*_MASKING, *_SELECTING) and _of_state(source) for source in node.all_input_nodes
    )


def _of_state(node: fx.Node) -> bool:
    """Whether a value is made of parameters and buffers alone."""
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if item.op in ("placeholder", "call_method") or (item.op == "call_module" and item.meta.get(ROLE) != "weight"):
            return False
        waiting += item.all_input_nodes
    return True
