"""Layers with fake-quantized weights: what they are, and the int8 layer that each becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.errors import GraphError
from fxcompress.lower.integers import ByteGrid
from fxcompress.lower.prepacked import FloatConvolution, FloatLinear, Geometry, PostOp, Prepacked
from fxcompress.lower.quantized import (
    IntegerWeight,
    QuantizedConvolution,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
)
from fxcompress.lower.stem import QuantizedStem
from fxcompress.module import TracedModule, owner, submodule
from fxcompress.quantization.fake_quantize import FakeQuantize
from fxcompress.rewrite import Rewriter

_DIMS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.linear: 0}
_OTHERS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.embedding)
#: What is counted in the notes.
LAYERS = ("convolutions", "linear layers")
#: What kernels apply to their results, by the dimensions of the weight.
_FUSED = {
    2: frozenset("relu hardtanh hardsigmoid hardswish swish gelu tanh leaky_relu".split()),
    3: frozenset(("relu",)),
    4: frozenset("relu hardtanh hardsigmoid hardswish swish".split()),
}


@dataclass(frozen=True)
class LayerSite:
    """One call of a layer whose weight is fake-quantized.

    Attributes:
        node: the call.
        parameter: its weight's name in the tree.
        weight: int8.
        scale: of each output channel, or 0-d.
        bias: or None.
        geometry: None for a linear layer, and for what has no int8 kernel.
        reason: why it has none, or None.
        edge: the fake-quant node of the weight.
    """

    node: fx.Node
    parameter: str
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    geometry: Geometry | None
    reason: str | None
    edge: fx.Node

    @property
    def name(self) -> str:
        """For messages."""
        return self.parameter.removesuffix("weight").rstrip("._") or self.parameter

    @property
    def x(self) -> fx.Node:
        """What enters, as the graph is now."""
        found = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(found, fx.Node)
        return found

    @property
    def kind(self) -> str:
        """For the notes."""
        return "linear layers" if self.node.target is F.linear else "convolutions"

    @property
    def adds(self) -> bool:
        """Whether the kernel can add a tensor to its result."""
        return self.weight.dim() in (2, 4)

    @property
    def gathers(self) -> bool:
        """Whether rows of the weight are picked, each with a scale, or all with one."""
        return self.node.target is F.embedding and self.scale.dim() < 2

    def fuses(self, post: PostOp) -> bool:
        """Whether the kernel can apply an activation."""
        return post.name in _FUSED.get(self.weight.dim(), ())


def sites_of(module: TracedModule) -> dict[fx.Node, LayerSite]:
    """The layers whose weights are fake-quantized, by their calls.

    Layers that read one parameter, by one name or several (an embedding and the head that is tied to it), hold one
    tensor where their integers are the same.
    """
    found: dict[fx.Node, LayerSite] = {}
    weights: dict[int, list[Tensor]] = {}
    for node in module.graph.nodes:
        site = _site_of(module, node)
        if site is not None:
            holder, leaf = owner(module, site.parameter)
            known = weights.setdefault(id(getattr(holder, leaf)), [])
            weight = next((item for item in known if torch.equal(item, site.weight)), site.weight)
            known.append(weight)
            found[node] = replace(site, weight=weight)
    return found


def _site_of(module: TracedModule, node: fx.Node) -> LayerSite | None:
    """The layer that a node is a call of, if its weight is fake-quantized."""
    if node.op != "call_function" or node.target not in (*_DIMS, *_OTHERS):
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    edge = given["weight"]
    if not isinstance(edge, fx.Node) or edge.op != "call_module" or len(edge.args) > 1:
        return None  # a factor: the grid is that of a folded weight, and nothing could be folded
    item = submodule(module, str(edge.target))
    if not isinstance(item, FakeQuantize):
        return None
    grid = item.grid()
    if grid is None:
        return None
    (kept,) = edge.all_input_nodes
    source = kept
    while source.op != "get_attr":  # masks
        source = source.all_input_nodes[0]
    weight = item.integers(constant(module, kept)).to(torch.int8)
    geometry, reason = None, None
    if node.target in _OTHERS or node.target is F.conv3d:
        reason = f"torch has no int8 kernel for {getattr(node.target, '__name__', node.target)}"
    elif node.target is not F.linear:
        geometry = _geometry(node, tuple(weight.shape[2:]))
        reason = "pads unevenly" if geometry is None else None
    raw = given.get("bias") if node.target is not F.embedding else None
    bias = None if raw is None else constant(module, raw)
    scale = grid.scale.clone()
    if item.spec.axis not in (None, 0):
        reason = reason or "its scales do not go along its outputs"
        scale = scale.reshape([-1 if dim == item.spec.axis else 1 for dim in range(weight.dim())])
    return LayerSite(node, str(source.target), weight, scale, bias, geometry, reason, edge)


def constant(module: TracedModule, value: Any) -> Tensor:
    """What parameters and masks come to, detached.

    Raises:
        GraphError: the value depends on activations.
    """
    if isinstance(value, fx.Node) and value.op == "get_attr":
        holder, leaf = owner(module, str(value.target))
        found: Tensor = getattr(holder, leaf)
        return found.detach()
    if isinstance(value, fx.Node) and value.op == "call_function":
        args = [constant(module, item) if isinstance(item, fx.Node) else item for item in value.args]
        with torch.no_grad():
            function: Any = value.target
            made: Tensor = function(*args, **value.kwargs)
        return made
    raise GraphError(f"{value} is no parameter; expected weights that do not depend on activations.")


def _geometry(node: fx.Node, kernel: tuple[int, ...]) -> Geometry | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    dims = len(kernel)
    stride, dilation = _each(given.get("stride", 1), dims), _each(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in both):
            return None
        padding = tuple(total // 2 for total in both)
    return Geometry(stride, _each(padding, dims), dilation, int(str(given.get("groups", 1))))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) if len(value) == dims else tuple(value) * dims


def int8_layer(
    site: LayerSite,
    post: PostOp,
    x_grid: ByteGrid,
    grid: ByteGrid | None,
    other_grid: ByteGrid | None,
    spends_other: bool,
    *,
    rounds: bool,
) -> QuantizedLayer:
    """The layer with an integer kernel; ``rounds``: it is given floats, which it rounds itself."""
    options: dict[str, Any] = {
        "post": post,
        "x_grid": x_grid,
        "grid": grid,
        "other_grid": other_grid,
        "spends_other": spends_other,
    }
    if site.geometry is None:
        return QuantizedLinear(site.weight, site.scale, site.bias, **options)
    kind = QuantizedStem if rounds else QuantizedConvolution
    return kind(site.weight, site.scale, site.bias, site.geometry, **options)


def gathered(rewriter: Rewriter, site: LayerSite, name: str) -> None:
    """An embedding, whose table stays integers."""
    rewriter.put_module(name, QuantizedEmbedding(site.weight, site.scale))
    rewriter.become(site.node, "call_module", name, (site.x,))


def weight_only(rewriter: Rewriter, site: LayerSite, name: str) -> None:
    """A layer that runs in float, of whose weight the integers are kept."""
    scale = site.scale if site.scale.dim() != 1 else site.scale.reshape([-1] + [1] * (site.weight.dim() - 1))
    packed: Prepacked | None = None
    if site.node.target is F.linear:
        packed = FloatLinear(site.weight, site.bias, PostOp(), scale)
    elif site.geometry is not None and site.weight.dim() == 4:
        packed = FloatConvolution(site.weight, site.bias, site.geometry, PostOp(), scale)
    if packed is not None:
        rewriter.put_module(name, packed)
        rewriter.become(site.node, "call_module", name, (site.x,))
        return
    rewriter.put_module(name, IntegerWeight(site.weight, scale, site.bias))
    weight = rewriter.insert_before(site.node, "call_module", name, ())
    rewriter.read(site.node, site.edge, weight)
