"""What calibration data can repair after rounding: biases, and which way each weight is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.layers import parameter_node
from fxcompress.module import TracedModule, evaluating, owner, submodule
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize
from fxcompress.quantization.settle import quantized_node, value_of
from fxcompress.quantization.sites import Site, find_sites
from fxcompress.rewrite import rewriting

_WATCH = "_watch"
#: Of AdaRound's stretched sigmoid (equation 23).
_GAMMA, _ZETA = -0.1, 1.1


class _Watcher(nn.Module):
    """Keeps what a layer reads."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if sum(len(item) for item in self.kept) < self.most:
            self.kept.append(x.detach())
        return x


def _inputs(
    module: TracedModule, sites: list[Site], batches: Iterable[Any], run: Callable[[Any], object], most: int
) -> dict[fx.Node, Tensor]:
    """What each layer reads, at most about ``most`` samples."""
    watchers = {site.node: _Watcher(most) for site in sites}
    nodes: list[tuple[fx.Node, fx.Node, fx.Node]] = []
    with rewriting(module, "watch") as rewriter:
        for number, site in enumerate(sites):
            rewriter.put_module(f"{_WATCH}.w{number}", watchers[site.node])
            node = rewriter.insert_before(site.node, "call_module", f"{_WATCH}.w{number}", (site.data,))
            site.node.args = (node, *site.node.args[1:])
            nodes.append((site.node, node, site.data))
    with evaluating(module), torch.no_grad():
        for batch in batches:
            run(batch)
    with rewriting(module, "watch") as rewriter:
        for reader, node, data in nodes:
            rewriter.read(reader, node, data)
            rewriter.erase(node)
        rewriter.drop_module(_WATCH)
    return {node: torch.cat(watcher.kept)[:most] for node, watcher in watchers.items() if watcher.kept}


def _open_sites(module: TracedModule) -> list[Site]:
    """Layers with a fake-quantized weight, written so that bias and options follow in place."""
    return [site for site in find_sites(module) if site.quantized and not site.node.kwargs and len(site.node.args) > 2]


def _call(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias."""
    assert callable(site.node.target)
    result: Tensor = site.node.target(x, weight, None, *site.node.args[3:])
    return result


def correct_biases(
    module: TracedModule, batches: Iterable[Any], run: Callable[[Any], object], samples: int, author: str
) -> list[str]:
    """Take the mean error that rounding weights makes out of each bias, in place; layers without one get one.

    Nagel et al. 2019, arXiv 1906.04721, section 4.2, the empirical form: ``b -= E[(W_q - W) x]`` per output channel,
    over what the quantized model feeds the layer. Returns the biases that are new.
    """
    new: list[str] = []
    sites = _open_sites(module)
    inputs = _inputs(module, sites, batches, run, samples)
    with rewriting(module, author) as rewriter, evaluating(module), torch.no_grad():
        for site in sites:
            if site.node not in inputs:
                continue
            node = quantized_node(site)
            weight, rounded = value_of(module, node.args[0]), value_of(module, node)
            error = _call(site, inputs[site.node], rounded - weight)
            linear = site.node.target is torch.nn.functional.linear
            channels = error.dim() - 1 if linear else 1
            shift = error.movedim(channels, 0).flatten(1).mean(1)
            read = site.node.args[2]
            if isinstance(read, fx.Node) and read.op == "get_attr":
                holder, leaf = owner(module, str(read.target))
                rewriter.set_tensor(str(read.target), getattr(holder, leaf).detach() - shift)
            elif read is None and str(site.node.meta.get("layer", "")) == site.layer:
                submodule(module, site.layer).register_parameter("bias", nn.Parameter(-shift))
                new.append(f"{site.layer}.bias")
                added = parameter_node(rewriter, f"{site.layer}.bias", before=site.node)
                rewriter.become(
                    site.node,
                    site.node.op,
                    site.node.target,
                    (*site.node.args[:2], added, *site.node.args[3:]),
                )
    return new


def learn_rounding(
    module: TracedModule,
    batches: Iterable[Any],
    run: Callable[[Any], object],
    *,
    samples: int,
    iterations: int,
    author: str,
) -> None:
    """AdaRound: each weight goes up or down so that its layer's output changes least, in place.

    Nagel et al. 2020, arXiv 2004.10568, equations 20 to 24: ``W_q = s clamp(floor(W / s) + h(V))``, ``h(V) =
    clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, minimising ``norm(W x - W_q x)^2 + lambda sum(1 - abs(2 h(V) -
    1)^beta)`` with ``beta`` going from 20 to 2 after a fifth of the steps, over what the quantized model feeds
    the layer.
    """
    sites = _open_sites(module)
    inputs = _inputs(module, sites, batches, run, samples)
    with rewriting(module, author) as rewriter, evaluating(module):
        for site in sites:
            node = quantized_node(site)
            quantizer = submodule(module, str(node.target))
            if site.node in inputs and isinstance(quantizer, AffineFakeQuantize):
                with torch.no_grad():
                    weight = value_of(module, node.args[0]).detach()
                rewriter.set_tensor(site.weight, _rounded(site, weight, quantizer, inputs[site.node], iterations))


def _rounded(site: Site, weight: Tensor, quantizer: FakeQuantize, inputs: Tensor, iterations: int) -> Tensor:
    """The weight on its grid, every element rounded the way that was learned."""
    grid, spec = quantizer.grid(), quantizer.spec
    assert grid is not None
    shape = [-1 if dim == spec.axis else 1 for dim in range(weight.dim())]
    scale = grid.scale if spec.axis is None else grid.scale.reshape(shape)
    floor = (weight / scale).floor()
    rest = (weight / scale - floor).clamp(1e-4, 1 - 1e-4)
    start = torch.logit((rest - _GAMMA) / (_ZETA - _GAMMA))
    variable = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=1e-2)
    kept = weight != 0  # masked weights stay zero
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = _call(site, inputs, weight)
    size = min(32, len(inputs))
    for step in range(iterations):
        chosen = torch.randperm(len(inputs), generator=generator)[:size]
        up = (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        soft = ((floor + up).clamp(spec.quant_min, spec.quant_max) * scale) * kept
        with torch.enable_grad():
            error = (_call(site, inputs[chosen], soft) - target[chosen]).square().mean()
            progress = step / max(1, iterations)
            loss = error / target.square().mean().clamp(min=1e-12)
            if progress > 0.2:
                beta = 20 - 18 * (progress - 0.2) / 0.8
                loss = loss + 0.01 * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        up = (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        return (floor + (up >= 0.5)).clamp(spec.quant_min, spec.quant_max) * scale * kept
