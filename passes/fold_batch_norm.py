"""Folding BatchNorm into the convolution or linear layer in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompress.channels.labels import Labels
from fxcompress.context import Context
from fxcompress.masking import Masking
from fxcompress.module import TracedModule, submodule
from fxcompress.pipeline import Pass
from fxcompress.rewrite import Rewriter, rewriting

_PRODUCERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Multiplies BatchNorm's affine map into the layer in front of it: ``W' = W * gamma / sqrt(var + eps)`` per output
    channel, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``.

    Jacob et al. 2018, "Quantization and Training of Neural Networks", arXiv 1712.05877, section 3.2. Holds in eval
    mode, where the statistics are fixed. A layer that is called twice, or whose output somebody else reads, keeps its
    BatchNorm. The BatchNorm's ``state_dict`` keys go, and a layer without a bias gains one; both are listed.
    """

    preserves: ClassVar[bool] = True
    rounding: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Fold every pair."""
        calls: dict[str, int] = {}
        for node in module.graph.nodes:
            if node.op == "call_module":
                calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        folded: list[str] = []
        with rewriting(module, self.name) as rewriter:
            for node in list(module.graph.nodes):
                producer = _producer(node, module, calls, context)
                if producer is not None:
                    folded.append(_fold(rewriter, producer, node))
        if folded:
            context.notes.append(f"folded {', '.join(folded)}")
            masking, left = context.masking or Masking(), dict(module.named_parameters())
            context.masking = Masking({n: mask for n, mask in masking.elements.items() if n in left}, masking.dead)
        return module


def _producer(node: fx.Node, module: TracedModule, calls: dict[str, int], context: Context) -> fx.Node | None:
    """The layer that a node's BatchNorm can be folded into."""
    if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    norm, source = submodule(module, str(node.target)), node.args[0]
    if not isinstance(norm, _NORMS) or norm.running_var is None or source.op != "call_module":
        return None
    layer = submodule(module, str(source.target))
    if (
        type(layer) not in _PRODUCERS
        or len(source.users) != 1
        or calls[str(node.target)] != 1
        or calls[str(source.target)] != 1
    ):
        return None
    read = {str(other.target).rpartition(".")[0] for other in module.graph.find_nodes(op="get_attr")}
    if {str(node.target), str(source.target)} & read:
        return None
    shared = [p for other in module.modules() if other is not layer for p in other._parameters.values()]
    if any(p is layer.weight for p in shared):
        return None  # tied
    if isinstance(layer, nn.Linear):  # BatchNorm1d normalises dimension 1, Linear produces the last
        if context.inputs is None:
            return None
        labels = context.groups(module).channels.facts.values.get(source.name)
        if not isinstance(labels, Labels) or len(labels.shape) != 2:
            return None
    return source


def _fold(rewriter: Rewriter, producer: fx.Node, node: fx.Node) -> str:
    """Fold one pair; returns a line for the notes."""
    module = rewriter.module
    layer, norm = submodule(module, str(producer.target)), submodule(module, str(node.target))
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight: Tensor = layer.get_parameter("weight")
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        bias = layer._parameters.get("bias")
        if bias is not None:
            shift = shift + bias * scale
        rewriter.set_tensor(f"{producer.target}.weight", _scaled(layer, weight, scale))
        added = bias is None
        layer.register_parameter("bias", nn.Parameter(shift, requires_grad=weight.requires_grad))
    rewriter.replace(node, producer)
    rewriter.erase(node)
    rewriter.drop_module(str(node.target))
    return f"{node.target} into {producer.target}" + (f" (adds {producer.target}.bias)" if added else "")


def _scaled(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with every output channel scaled."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (inputs, outputs / groups, ...)
        per_group = scale.reshape(layer.groups, 1, -1)
        grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
        return (grouped * per_group.unsqueeze(-1)).reshape(weight.shape)
    return weight * scale.reshape([-1] + [1] * (weight.dim() - 1))
