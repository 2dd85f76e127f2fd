"""Which BatchNorm can be folded into which layer, and by what its weight is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from fxcompress.module import TracedModule, submodule

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


def calls_of(module: TracedModule) -> dict[str, int]:
    """How often each module is called, open or not."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        name = str(node.target) if node.op == "call_module" else str(node.meta.get("layer", ""))
        found[name] = found.get(name, 0) + 1
    return found


def norm_source(
    node: fx.Node, module: TracedModule, calls: Mapping[str, int], ranks: Callable[[fx.Node], int]
) -> fx.Node | None:
    """The call of the layer, open or not, that a node's BatchNorm can be folded into.

    Args:
        node: any node.
        module: its module.
        calls: how often each module is called.
        ranks: number of dimensions of a node's value, 0 where that is not known; asked about linear layers.
    """
    if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    norm, source = submodule(module, str(node.target)), node.args[0]
    name = str(source.target) if source.op == "call_module" else str(source.meta.get("layer", ""))
    if not isinstance(norm, _NORMS) or norm.running_var is None or not name:
        return None
    layer = submodule(module, name)
    if type(layer) not in _PRODUCERS or len(source.users) != 1 or calls[str(node.target)] != 1 or calls[name] != 1:
        return None
    shared = [p for other in module.modules() if other is not layer for p in other._parameters.values()]
    if any(p is layer.weight for p in shared):
        return None  # tied
    if isinstance(layer, nn.Linear) and ranks(source) != 2:
        return None  # BatchNorm1d normalises dimension 1, Linear produces the last
    return source


def folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a layer's output channels are multiplied with when its BatchNorm is folded, and the bias: ``[channels]``."""
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        bias = layer._parameters.get("bias")
        return scale, shift if bias is None else shift + bias * scale


def scaled(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight with every output channel scaled."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (inputs, outputs / groups, ...)
        per_group = scale.reshape(layer.groups, 1, -1)
        grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
        return (grouped * per_group.unsqueeze(-1)).reshape(weight.shape)
    return weight * scale.reshape([-1] + [1] * (weight.dim() - 1))
