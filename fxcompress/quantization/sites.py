"""Where a graph reads weights that can be rounded: convolutions, linear layers and embedding tables, as modules or as
functional calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxcompress.module import TracedModule, owner, submodule
from fxcompress.quantization.fake_quantize import ROLE

_CONVOLUTIONS = frozenset("conv1d conv2d conv3d".split())
_TRANSPOSED = frozenset("convtranspose1d convtranspose2d convtranspose3d".split())
_RESIZES = frozenset("interpolate upsample upsamplingnearest2d".split())
_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear,  # in nn.MultiheadAttention
)


@dataclass(frozen=True)
class Site:
    """One call of a layer that multiplies by weights, or picks rows of them.

    Attributes:
        node: the call; of a layer or of a function.
        layer: name of the module that holds the weight, by which it is selected.
        weight: the parameter's name.
        data: what is multiplied; the integers that choose rows of a table.
        axis: dimension of the weight along which output channels lie; None where it has no such dimension.
        quantized: whether its weight already has a fake-quant node.
        table: whether rows are picked and nothing is multiplied.
    """

    node: fx.Node
    layer: str
    weight: str
    data: fx.Node
    axis: int | None
    quantized: bool = False
    table: bool = False


def operation(module: nn.Module, node: fx.Node) -> str:
    """What a node computes, whoever wrote it how: ``relu`` for a module, a function or a method."""
    if node.op == "call_module":
        name = type(submodule(module, str(node.target))).__name__
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    else:
        name = str(node.target) if node.op == "call_method" else ""
    return name.lower().replace("_", "")


def repeats(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node resizes by taking the nearest elements: its values are its input's."""
    if operation(module, node) not in _RESIZES:
        return False
    if node.op == "call_module":
        layer = submodule(module, str(node.target))
        mode: object = layer.mode if isinstance(layer, nn.Upsample) else None
    else:
        given = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False)) | node.kwargs
        mode = given.get("mode", "nearest")
    return mode in ("nearest", "nearest-exact")


def find_sites(module: TracedModule) -> Iterator[Site]:
    """Every convolution and linear layer whose weight is a parameter as it is, in the order of the graph."""
    for node in module.graph.nodes:
        made = _layer(module, node) if node.op == "call_module" else _function(module, node)
        if made is not None:
            yield made


def find_tables(module: TracedModule) -> Iterator[Site]:
    """Every embedding whose weight is a parameter as it is, in the order of the graph.

    Tables with ``max_norm``, which writes into them, or with sparse gradients, which no fake-quant node passes on, are
    none.
    """
    for node in module.graph.nodes:
        made = _table(module, node)
        if made is not None:
            yield made


def _table(module: TracedModule, node: fx.Node) -> Site | None:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    layer = submodule(module, str(node.target)) if node.op == "call_module" else None
    held: tuple[str, str, bool] | None = None
    given: Mapping[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if type(layer) is nn.Embedding:
        given = {**given, "max_norm": layer.max_norm, "sparse": layer.sparse}
        held = str(node.target), f"{node.target}.weight", False
    elif node.op == "call_function" and node.target is F.embedding:
        held = _held(module, given.get("weight"))
    data = given.get("input")
    if held is None or not isinstance(data, fx.Node) or given.get("max_norm") is not None or given.get("sparse"):
        return None
    name, weight, quantized = held
    return Site(node, name, weight, data, 0, quantized, table=True)


def _held(module: TracedModule, weight: object) -> tuple[str, str, bool] | None:
    """Of a parameter that a function reads, behind masks and fake-quant nodes: its layer, its name, and whether there
    is a fake-quant node; None for other values."""
    if not isinstance(weight, fx.Node):
        return None
    quantized = False
    while ROLE in weight.meta or "mask" in weight.meta:
        quantized = quantized or ROLE in weight.meta
        weight = weight.all_input_nodes[0]
    if weight.op != "get_attr":
        return None
    name = str(weight.target)
    holder, leaf = owner(module, name)
    if not isinstance(holder._parameters.get(leaf), nn.Parameter):
        return None
    return name.rpartition(".")[0], name, quantized


def _layer(module: TracedModule, node: fx.Node) -> Site | None:
    layer = submodule(module, str(node.target))
    if type(layer) not in _LAYERS or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    data = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(data, fx.Node) or node.target == "":
        return None
    groups = getattr(layer, "groups", 1)
    return Site(node, str(node.target), f"{node.target}.weight", data, _axis(operation(module, node), groups))


def _function(module: TracedModule, node: fx.Node) -> Site | None:
    name = operation(module, node) if node.op == "call_function" else ""
    if name not in _CONVOLUTIONS | _TRANSPOSED | {"linear"}:
        return None
    given = dict(zip(("input", "weight"), node.args, strict=False)) | node.kwargs
    data, held = given.get("input"), _held(module, given.get("weight"))
    if not isinstance(data, fx.Node) or held is None:
        return None
    layer, weight, quantized = held
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    return Site(node, layer, weight, data, _axis(name, groups if isinstance(groups, int) else 0), quantized)


def ends(module: TracedModule, sites: list[Site]) -> frozenset[str]:
    """The layers that no other one comes before, or none behind, on any way from the inputs to the outputs."""
    calls = {site.node: site for site in sites}
    behind: set[fx.Node] = set()
    before: set[fx.Node] = set()
    found = set()
    for node in module.graph.nodes:
        if node in calls and calls[node].data not in behind:
            found.add(calls[node].layer)
        if node in calls or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    for node in reversed(module.graph.nodes):
        if node in calls and node not in before:
            found.add(calls[node].layer)
        if node in calls or node in before:
            before.update(node.all_input_nodes)
    return frozenset(found)


def _axis(name: str, groups: int) -> int | None:
    """A transposed convolution holds ``[in, out / groups, ...]``: with groups, no dimension is that of the outputs."""
    if name not in _TRANSPOSED:
        return 0
    return 1 if groups == 1 else None
