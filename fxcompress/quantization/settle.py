"""From a graph to train with to a graph to lower: BatchNorm folded, every weight on a plain grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.folding import calls_of, folded, norm_source, scaled
from fxcompress.layers import parameter_node
from fxcompress.module import MASKS, TracedModule, evaluating, owner, submodule
from fxcompress.quantization.fake_quantize import ROLE, AffineFakeQuantize, FakeQuantize, TransformedFakeQuantize, along
from fxcompress.quantization.gradients import GradientQuantize
from fxcompress.quantization.sites import Site, find_sites, find_tables
from fxcompress.quantization.spec import QuantSpec
from fxcompress.rewrite import Rewriter, rewriting


def settle(module: TracedModule, ranks: Callable[[fx.Node], int] | None = None, author: str = "settle") -> list[str]:
    """Fold BatchNorm behind quantized layers and give every quantized weight a plain, fixed grid, in place.

    The module computes the same in eval mode. Parameters hold the folded weights; the keys of folded BatchNorms go.

    Args:
        module: a traced module, masks in its graph or not.
        ranks: number of dimensions of a node's value; without it, no BatchNorm is folded into a linear layer.
        author: the pass, for provenance.

    Returns:
        What was done, a line each; and which rules have no regular grid, so that their layers stay as they are.
    """
    said: list[str] = []
    with rewriting(module, author) as rewriter, evaluating(module), torch.no_grad():
        _drop_gradients(rewriter)
        calls = calls_of(module)
        for site in [*find_sites(module), *find_tables(module)]:
            if site.quantized:
                said += _settle(rewriter, site, calls, ranks or _unknown)
        _drop_uncalled(rewriter, calls)
    return said


def _unknown(node: fx.Node) -> int:
    return 0


def _drop_gradients(rewriter: Rewriter) -> None:
    """What rounds gradients does nothing in eval mode."""
    for node in list(rewriter.graph.nodes):
        if node.op == "call_module" and isinstance(submodule(rewriter.module, str(node.target)), GradientQuantize):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            rewriter.replace(node, source)
            rewriter.erase(node)
            rewriter.drop_module(str(node.target))


def _drop_uncalled(rewriter: Rewriter, before: Mapping[str, int]) -> None:
    """Remove the modules, and their masks, that were called ``before`` and no longer are."""
    rewriter.sweep()
    for name in before.keys() - calls_of(rewriter.module).keys():
        for each in (name, f"{MASKS}.{name}"):
            if rewriter.has_module(each):
                rewriter.drop_module(each)


def _settle(rewriter: Rewriter, site: Site, calls: Mapping[str, int], ranks: Callable[[fx.Node], int]) -> list[str]:
    """One layer."""
    module = rewriter.module
    node = quantized_node(site)
    quantizer = submodule(module, str(node.target))
    assert isinstance(quantizer, FakeQuantize)
    norm = _norm_behind(module, site, calls, ranks)
    if norm is None and isinstance(quantizer, AffineFakeQuantize):
        return []
    source, *factor = (value_of(module, item) for item in node.args)
    step = _step(quantizer, source)
    if step is None:
        kind = type(getattr(quantizer, "rule", quantizer)).__name__
        return [f"{site.layer} stays as it is: the values of {kind} lie on no regular grid"]
    if _read_elsewhere(module, site, node):
        return [f"{site.layer} stays as it is: somebody else reads {site.weight} as well"]
    values = source * factor[0] if factor else value_of(module, _read(site))
    read = _read(site)
    said = [] if norm is None else [f"{norm.target} into {site.layer}"]
    bias = None
    if norm is not None:
        scale, bias = folded(submodule(module, site.layer), submodule(module, str(norm.target)))
        if not factor:
            values = scaled(submodule(module, site.layer), values, scale)
            step = (step * scale.abs()).clamp(min=torch.finfo(scale.dtype).tiny)
    # With a factor, the grid is that of the folded weight already.
    bits = quantizer.spec.bits if factor else _bits(values, step, site.axis)
    if bits > 8:
        return [f"{site.layer} stays as it is: around zero its values need {bits} bits"]
    spec = quantizer.spec.frozen() if factor else _plain_spec(quantizer.spec, bits, site.axis if step.dim() else None)
    if norm is not None and bias is not None:
        _fold(rewriter, site, norm, bias)
    made = AffineFakeQuantize(spec, len(step) if step.dim() else 0).to(values)
    made.scale.copy_(step)
    rewriter.set_tensor(site.weight, values)
    rewriter.put_module(str(node.target), made)
    if factor:
        rewriter.become(node, "call_module", node.target, node.args[:1])
        return said
    # Masks, and what lived, are in the values now.
    rewriter.become(node, "call_module", node.target, (_parameter(node),))
    if read is not node:
        rewriter.replace(read, node)
    return said


def _parameter(node: fx.Node) -> fx.Node:
    """The parameter that a fake-quant node rounds, behind a mask or not."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node


def _read_elsewhere(module: TracedModule, site: Site, node: fx.Node) -> bool:
    """Whether anybody but a fake-quant node reads the weight of a site, which then has to stay what it is."""
    whole = _parameter(node)
    weight = value_of(module, whole)
    for other in module.graph.nodes:
        if other.op == "get_attr" and other is not whole and value_of(module, other) is weight:
            return True
        if other.op == "call_module":
            called = submodule(module, str(other.target))
            if any(parameter is weight for parameter in called.parameters()):
                return True
    return len(whole.users) > 1


def _read(site: Site) -> fx.Node:
    """What the layer reads as its weight."""
    read = site.node.args[1] if len(site.node.args) > 1 else site.node.kwargs["weight"]
    assert isinstance(read, fx.Node)
    return read


def quantized_node(site: Site) -> fx.Node:
    """The fake-quant node of a site's weight, which a mask may follow."""
    node = _read(site)
    while ROLE not in node.meta:
        (node, *_) = node.all_input_nodes
    return node


def _norm_behind(
    module: TracedModule, site: Site, calls: Mapping[str, int], ranks: Callable[[fx.Node], int]
) -> fx.Node | None:
    """The BatchNorm that can be folded into a site's layer."""
    if len(site.node.users) != 1 or site.axis is None:
        return None
    (reader,) = site.node.users
    return reader if norm_source(reader, module, calls, ranks) is site.node else None


def value_of(module: TracedModule, item: Any) -> Any:
    """What a node computes from parameters and buffers."""
    if not isinstance(item, fx.Node):
        return item
    if item.op == "get_attr":
        holder, leaf = owner(module, str(item.target))
        return getattr(holder, leaf)
    args = [value_of(module, each) for each in item.args]
    if item.op == "call_module":
        return submodule(module, str(item.target))(*args)
    assert callable(item.target)
    return item.target(*args, **item.kwargs)


def _step(quantizer: FakeQuantize, source: Tensor) -> Tensor | None:
    """The distance of neighbouring values, 0-d or per channel; None if it is not the same everywhere."""
    if isinstance(quantizer, TransformedFakeQuantize):
        return quantizer.rule.step(source, quantizer.spec)
    grid = quantizer.grid()
    return None if grid is None or not quantizer.spec.symmetric else grid.scale


def _bits(values: Tensor, step: Tensor, axis: int | None) -> int:
    """Width of the smallest symmetric integers that hold these values."""
    largest = max(1, int((values / along(step, values, axis if step.dim() else None)).round().abs().max()))
    return largest.bit_length() + 1


def _plain_spec(spec: QuantSpec, bits: int, axis: int | None) -> QuantSpec:
    """A symmetric grid of so many bits."""
    return replace(spec.frozen(), bits=bits, signed=True, symmetric=True, narrow=True, axis=axis)


def _fold(rewriter: Rewriter, site: Site, norm: fx.Node, bias: Tensor) -> None:
    """Give a layer the bias that its BatchNorm becomes, and take that out; the weight is the caller's to scale."""
    layer = submodule(rewriter.module, site.layer)
    weight: Tensor = layer.get_parameter("weight")
    layer.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))
    read = parameter_node(rewriter, f"{site.layer}.bias", before=site.node)
    args = [*site.node.args[:2], read, *site.node.args[3:]]
    kwargs = {key: value for key, value in site.node.kwargs.items() if key != "bias"}
    # Under the BatchNorm's name: that is whose value it is.
    norm.meta["layer"] = site.node.meta["layer"]
    rewriter.become(norm, site.node.op, site.node.target, tuple(args), kwargs)
    rewriter.erase(site.node)
