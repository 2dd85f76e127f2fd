"""Float layers to packed kernels with fused additions and activations."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.inputs import Inputs
from fxcompress.lower.fusion import Chain, Chains
from fxcompress.lower.naming import Names
from fxcompress.lower.prepacked import FloatBatchNorm, FloatConvolution, FloatLinear, Geometry, PostOp, Prepacked
from fxcompress.lower.values import shapes_of, staying_float32
from fxcompress.module import TracedModule, state_of, submodule
from fxcompress.rewrite import Rewriter, rewriting

#: Below this many multiply-accumulates a call of a packed kernel (40 us, of which most is spent describing the call to
#: onednn) takes longer than torch's own (8 us and the work).
SMALLEST = 250_000
_FUSED = frozenset("none relu hardtanh leaky_relu hardswish hardsigmoid swish sigmoid tanh gelu".split())
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)


@dataclass
class Left:
    """Layers that stay, by the reason."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        self.reasons.setdefault(reason, []).append(name)

    def notes(self) -> list[str]:
        return [f"stays as it is, {reason}: {', '.join(names)}" for reason, names in self.reasons.items()]


def lower_float(module: TracedModule, inputs: Inputs, dtype: torch.dtype, author: str) -> list[str]:
    """Lower convolutions and linear layers of a module in eval mode, in place; returns notes.

    Args:
        module: BatchNorm folded.
        inputs: of the size that speed matters at.
        dtype: float32 or bfloat16; what enters and leaves stays float32.
        author: for the nodes' provenance.
    """
    with rewriting(module, author) as rewriter:
        drop_idle(rewriter)
    shapes, dtypes = shapes_of(module, inputs)
    lowered, left, fused = 0, Left(), Counter[str]()
    moved: list[str] = []
    with rewriting(module, author) as rewriter:
        if dtype != torch.float32:
            _cast(rewriter, dtype, dtypes, inputs)
        chains = Chains(module, shapes)
        names = Names(module, _functional(module))
        calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        for node in list(module.graph.nodes):
            if dtype == torch.float32 and _batch_norm(rewriter, chains, node, calls):
                fused["BatchNorms"] += 1
                continue
            layer = _layer_of(module, node)
            if layer is None:
                continue
            reason = _unsuited(layer, shapes, node)
            if reason:
                left.add(layer.name, reason)
                continue
            single = node.op != "call_module" or calls[str(node.target)] == 1
            chain = _chain(chains, node, layer) if single else Chain((node,), None, PostOp())
            name = layer.name if layer.module is not None else names.take(layer.parameter)
            _replace(rewriter, layer, name, chain, dtype)
            if layer.parameter and layer.parameter != f"{name}.weight":
                moved.append(f"{layer.parameter} is {name}.weight now")
            lowered += 1
            fused.update(additions=int(chain.other is not None), activations=int(chain.post.name != "none"))
    total = lowered + sum(map(len, left.reasons.values()))
    done = f"{lowered} of {total} convolutions and linear layers have packed weights"
    with_them = f"with {fused['activations']} activations and {fused['additions']} additions fused"
    norms = [f"{fused['BatchNorms']} BatchNorms are one multiplication and addition"] if fused["BatchNorms"] else []
    return [f"{done}, {with_them}", *norms, *moved, *left.notes()]


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer, however it is written: a module, or a functional call on parameters."""

    name: str
    module: nn.Module | None
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None
    parameter: str = ""


def _layer_of(module: TracedModule, node: fx.Node) -> _Layer | None:
    if node.op == "call_module":
        layer = submodule(module, str(node.target))
        if isinstance(layer, nn.Linear):
            return _Layer(str(node.target), layer, layer.weight, layer.bias, None)
        if isinstance(layer, nn.modules.conv._ConvNd):
            return _Layer(str(node.target), layer, layer.weight, layer.bias, geometry_of(layer))
    if node.op == "call_function" and node.target is F.linear:
        state = state_of(module, every_name=True)
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and _is_state(bias):
            tensor = state[str(bias.target)] if isinstance(bias, fx.Node) else None
            parameter = str(weight.target)
            return _Layer(
                parameter.removesuffix("weight").rstrip("._"), None, state[parameter], tensor, None, parameter
            )
    return None


def _functional(module: TracedModule) -> dict[fx.Node, fx.Node]:
    """Calls of layers that are written as functions, and what enters each."""
    found: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        layer = _layer_of(module, node)
        if layer is not None and layer.module is None and isinstance(x := node.args[0], fx.Node):
            found[node] = x
    return found


def _is_state(value: Any) -> bool:
    return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")


def geometry_of(layer: nn.modules.conv._ConvNd) -> Geometry | None:
    """The geometry of a convolution that pads with zeros, as much on both sides; or None."""
    if layer.transposed or layer.padding_mode != "zeros":
        return None
    padding = layer.padding
    if padding == "valid":
        padding = (0,) * len(layer.kernel_size)
    elif isinstance(padding, str):
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(total % 2 for total in both):
            return None
        padding = tuple(total // 2 for total in both)
    return Geometry(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)


def _unsuited(layer: _Layer, shapes: dict[str, tuple[int, ...]], node: fx.Node) -> str | None:
    """Why a layer keeps torch's own kernel, or None."""
    if layer.module is not None and type(layer.module).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return "no packed kernel"
    if isinstance(layer.module, nn.Conv2d) and layer.geometry is None:
        return "pads unevenly or not with zeros"
    if layer.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{layer.weight.dtype} weights"
    shape = shapes[node.name]
    per_output = layer.weight[0].numel()
    grouped = layer.geometry is not None and layer.geometry.groups > 1  # torch's own calls onednn as well
    if math.prod(shape) * per_output < SMALLEST and not grouped:
        return f"fewer than {SMALLEST:,} MACs (calling the packed kernel costs more)"
    if layer.geometry is not None and math.prod(shape[2:]) == 1:
        return "on a single position (a packed weight is read no faster)"
    return None


def _chain(chains: Chains, node: fx.Node, layer: _Layer) -> Chain:
    def unary(post: PostOp) -> bool:
        return post.name in _FUSED

    def binary(post: PostOp) -> bool:
        return post.name == "relu"

    # A linear layer without activation has a faster kernel (of MKL) than one with a fused addition, and for a grouped
    # convolution torch itself adds afterwards.
    adds = layer.geometry is not None and layer.geometry.groups == 1
    return chains.behind(node, unary=unary, binary=binary if adds else None)


def _replace(rewriter: Rewriter, layer: _Layer, name: str, chain: Chain, dtype: torch.dtype) -> None:
    """A packed layer under a name, called where the chain's result is."""
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    packed: Prepacked
    if layer.geometry is None:
        packed = FloatLinear(weight, bias, chain.post)
    else:
        packed = FloatConvolution(weight, bias, layer.geometry, chain.post)
    rewriter.put_module(name, packed)
    x = chain.nodes[0].args[0] if chain.nodes[0].args else chain.nodes[0].kwargs["input"]
    arguments = (x,) if chain.other is None else (x, chain.other)
    chain.last.meta.pop("mutates", None)
    rewriter.become(chain.last, "call_module", name, arguments)
    for node in reversed(chain.nodes[:-1]):
        rewriter.erase(node)


def _batch_norm(rewriter: Rewriter, chains: Chains, node: fx.Node, calls: Counter[str]) -> bool:
    """A BatchNorm that could not be folded, with the ReLU behind it."""
    name = str(node.target)
    layer = submodule(rewriter.module, name) if node.op == "call_module" and calls[name] == 1 else None
    if type(layer) not in _BATCH_NORMS or len(node.args) != 1 or node.kwargs:
        return False
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    if layer.running_mean is None or layer.running_mean.dtype != torch.float32:
        return False
    chain = chains.behind(node, unary=lambda post: post.name == "relu")
    rewriter.put_module(name, FloatBatchNorm(layer, relu=chain.last is not node))
    chain.last.meta.pop("mutates", None)
    rewriter.become(chain.last, "call_module", name, (node.args[0],))
    if chain.last is not node:
        rewriter.erase(node)
    return True


def drop_idle(rewriter: Rewriter) -> None:
    """Remove what does nothing in eval mode."""
    for node in list(rewriter.graph.nodes):
        if node.op == "call_module" and isinstance(submodule(rewriter.module, str(node.target)), _IDLE):
            rewriter.replace(node, node.args[0])
            rewriter.erase(node)


def _cast(rewriter: Rewriter, dtype: torch.dtype, dtypes: dict[str, torch.dtype], inputs: Inputs) -> None:
    """Inputs to ``dtype`` and outputs back; everything between follows, with parameters and buffers of that dtype."""
    module = rewriter.module
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and dtypes.get(node.name) == torch.float32:
            first = node
            cast = rewriter.insert_after(first, "call_method", "to", (node, dtype))
            rewriter.replace(node, cast)
    module.to(dtype)
    for node in staying_float32(module, inputs, dtype):
        rewriter.replace(node, rewriter.insert_after(node, "call_method", "to", (node, dtype)))
    (output,) = rewriter.graph.find_nodes(op="output")
    for source in output.all_input_nodes:
        original = source.args[0] if source.target == "to" and source.name not in dtypes else source
        if isinstance(original, fx.Node) and dtypes.get(original.name) == torch.float32:
            rewriter.read(output, source, rewriter.insert_before(output, "call_method", "to", (source, torch.float32)))
