"""``torch.nn`` layers opened into functional calls and closed again, and their attributes kept in agreement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.module import submodule
from fxcompress.recurrent import agree_recurrent, closed_arguments, open_recurrent, operator_of, weight_names
from fxcompress.rewrite import Rewriter

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_TRANSPOSED: dict[type[nn.Module], Callable[..., Any]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_Options = tuple[Any, ...]


def functional(layer: nn.Module, x: Any, weight: Any, bias: Any) -> _Call | None:
    """The functional call that a layer stands for, or None for a layer that has no such form."""
    kind: type[nn.Module]
    for kind, function in _CONVOLUTIONS.items():
        if type(layer) is kind and isinstance(layer, nn.modules.conv._ConvNd):
            if layer.padding_mode != "zeros":
                return None
            options: _Options = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return function, (x, weight, bias, *options), {}
    for kind, function in _TRANSPOSED.items():
        if type(layer) is kind and isinstance(layer, nn.modules.conv._ConvTransposeNd):
            options = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
            return function, (x, weight, bias, *options), {}
    if isinstance(layer, nn.Linear):
        return F.linear, (x, weight, bias), {}
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm, (x, layer.normalized_shape, weight, bias, layer.eps), {}
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm, (x, tuple(layer.normalized_shape), weight, layer.eps), {}
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm, (x, layer.num_groups, weight, bias, layer.eps), {}
    if isinstance(layer, nn.PReLU):
        return F.prelu, (x, weight), {}
    if isinstance(layer, nn.Embedding) and layer.max_norm is None:
        options = (layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, layer.sparse)
        return F.embedding, (x, weight, *options), {}
    return None


def understood(layer: nn.Module) -> bool:
    """Whether the channels of a leaf layer's own parameters can be masked and removed."""
    if all(parameter is None for parameter in layer._parameters.values()):
        return True
    return isinstance(layer, nn.modules.batchnorm._NormBase) or opens(layer)


def opens(layer: nn.Module) -> bool:
    """Whether a leaf layer can be written as a functional call that is given its parameters."""
    return operator_of(layer) is not None or functional(layer, None, None, None) is not None


def is_open(node: fx.Node) -> bool:
    """Whether a node is an opened layer."""
    return "layer" in node.meta


def closes(node: fx.Node) -> bool:
    """Whether a node is an opened layer without a fake-quant node on one of its weights."""
    return is_open(node) and not any(source.meta.get("quant") == "weight" for source in node.all_input_nodes)


def open_layer(rewriter: Rewriter, node: fx.Node) -> bool:
    """Write a ``call_module`` node as ``get_attr`` weight and bias and a functional call under the same name.

    The module stays in the tree as the holder of its parameters. Returns False for a layer that cannot be opened.
    """
    layer = submodule(rewriter.module, str(node.target))
    if operator_of(layer):
        node.meta["layer"] = target = str(node.target)
        weights = [parameter_node(rewriter, f"{target}.{name}", before=node) for name in weight_names(layer)]
        open_recurrent(rewriter, node, weights)
        return True
    x = node.args[0] if node.args else node.kwargs["input"]
    names = dict(layer.named_parameters(recurse=False))
    if functional(layer, x, None, None) is None:
        return False
    made: dict[str, fx.Node | None] = {"weight": None, "bias": None}
    for name in names:
        made[name] = parameter_node(rewriter, f"{node.target}.{name}", before=node)
    target = str(node.target)
    call = functional(layer, x, made["weight"], made["bias"])
    assert call is not None
    rewriter.become(node, "call_function", *call)
    node.meta["layer"] = target
    return True


def close_layer(rewriter: Rewriter, node: fx.Node) -> None:
    """The inverse of :func:`open_layer`; the parameter nodes must read the layer's own parameters."""
    target = node.meta.pop("layer")
    recurrent = operator_of(submodule(rewriter.module, target))
    rewriter.become(node, "call_module", target, closed_arguments(node) if recurrent else (node.args[0],))


def parameter_node(rewriter: Rewriter, name: str, *, before: fx.Node) -> fx.Node:
    """The ``get_attr`` node of a parameter, early enough for ``before``; one for the whole graph."""
    found: list[fx.Node] = list(rewriter.graph.find_nodes(op="get_attr", target=name))
    if not found:
        return rewriter.insert_before(before, "get_attr", name, ())
    if not found[0] < before:
        before.prepend(found[0])
    return found[0]


def agree(layer: nn.Module, *, inputs: tuple[int, ...] | None = None, groups: int | None = None) -> None:
    """Let a layer's attributes say what its tensors' shapes are.

    Args:
        layer: the module, its parameters and buffers already cut.
        inputs: shape of what enters it now, where that matters (norms without affine, grouped convolutions).
        groups: number of groups of a GroupNorm now.
    """
    weight = getattr(layer, "weight", None)
    if operator_of(layer):
        agree_recurrent(layer)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        assert isinstance(weight, torch.Tensor)
        channels = (inputs or (0,))[1 if inputs and len(inputs) == layer.weight.dim() else 0]
        if layer.transposed:
            if layer.groups == layer.in_channels:  # depthwise
                layer.groups = weight.shape[0]
            layer.in_channels, layer.out_channels = weight.shape[0], weight.shape[1] * layer.groups
        else:
            layer.groups = channels // weight.shape[1] if layer.groups > 1 else 1
            layer.in_channels, layer.out_channels = weight.shape[1] * layer.groups, weight.shape[0]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, (nn.modules.batchnorm._NormBase)):
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        found = [tensor for tensor in tensors if tensor is not None and tensor.dim() == 1]
        layer.num_features = found[0].shape[0] if found else (inputs or (0, layer.num_features))[1]
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        if inputs is not None:
            layer.normalized_shape = tuple(inputs[len(inputs) - len(layer.normalized_shape) :])
    elif isinstance(layer, nn.GroupNorm):
        if inputs is not None:
            layer.num_channels = inputs[1]
        layer.num_groups = groups if groups is not None else layer.num_groups
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.shape[0]
