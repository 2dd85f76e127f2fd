"""What calibration data can repair after rounding: biases, and which way each weight is rounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.layers import parameter_node
from fxcompress.module import TracedModule, evaluating, owner, submodule
from fxcompress.quantization.columns import Product
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize, along
from fxcompress.quantization.settle import quantized_node, value_of
from fxcompress.quantization.sites import Site, find_sites
from fxcompress.rewrite import rewriting

_WATCH = "_watch"
#: Of AdaRound's stretched sigmoid (equation 23).
_GAMMA, _ZETA = -0.1, 1.1
#: Columns of one layer, the elements they may have, and the elements of those layers that are learned together.
_COLUMNS, _OF_A_LAYER, _TOGETHER = 16_384, 1 << 25, 1 << 27
#: Columns of one step, and its learning rate.
_BATCH, _RATE = 256, 3e-2
#: Weight of what makes decisions binary, where the error of rounding to nearest is 1. With less, many of them are still
#: open at the end of a thousand steps, and then fall at random.
_BINARY = 30.0


class _Watcher(nn.Module, ABC):
    """Looks at what a layer reads, at most about ``most`` samples."""

    def __init__(self, product: Product, most: int) -> None:
        super().__init__()
        self.product, self.most = product, most
        self.samples = 0

    def forward(self, x: Tensor) -> Tensor:
        left = self.most - self.samples
        if left > 0:
            batch = self.product.batched(x.detach())[:left]
            self.samples += len(batch)
            self.see(batch)
        return x

    @abstractmethod
    def see(self, x: Tensor) -> None:
        """A batch of at least one sample."""


class _Mean(_Watcher):
    """Keeps the sum over the samples, by their shape: all that a linear function's mean depends on."""

    def __init__(self, product: Product, most: int) -> None:
        super().__init__(product, most)
        self.sums: dict[torch.Size, tuple[Tensor, int]] = {}

    def see(self, x: Tensor) -> None:
        total, count = self.sums.get(x.shape[1:], (torch.zeros_like(x[:1]), 0))
        self.sums[x.shape[1:]] = total + x.sum(0, keepdim=True), count + len(x)


class _Columns(_Watcher):
    """Keeps what the weight is multiplied with at random positions, as many of every sample."""

    def __init__(self, product: Product, most: int) -> None:
        super().__init__(product, most)
        self.kept: list[Tensor] = []
        self.wanted = columns_of(product)
        self.generator = torch.Generator().manual_seed(0)

    def see(self, x: Tensor) -> None:
        count = -(-self.wanted * len(x) // self.most)
        self.kept.append(self.product.columns(x, count, self.generator))


def columns_of(product: Product) -> int:
    """How many columns are kept of a layer."""
    return max(1, min(_COLUMNS, _OF_A_LAYER // (product.length * product.groups)))


def _watch(
    module: TracedModule,
    watchers: Mapping[fx.Node, tuple[Site, _Watcher]],
    batches: Iterable[Any],
    run: Callable[[Any], object],
) -> None:
    """Let watchers see what their layers read, until they have seen enough."""
    nodes: list[tuple[fx.Node, fx.Node, fx.Node]] = []
    with rewriting(module, "watch") as rewriter:
        for number, (site, watcher) in enumerate(watchers.values()):
            rewriter.put_module(f"{_WATCH}.w{number}", watcher)
            node = rewriter.insert_before(site.node, "call_module", f"{_WATCH}.w{number}", (site.data,))
            site.node.args = (node, *site.node.args[1:])
            nodes.append((site.node, node, site.data))
    with evaluating(module), torch.no_grad():
        for batch in batches:
            run(batch)
            if all(watcher.samples >= watcher.most for _, watcher in watchers.values()):
                break
    with rewriting(module, "watch") as rewriter:
        for reader, node, data in nodes:
            rewriter.read(reader, node, data)
            rewriter.erase(node)
        rewriter.drop_module(_WATCH)


def _open_sites(module: TracedModule) -> list[Site]:
    """Layers with a fake-quantized weight, written so that bias and options follow in place."""
    return [site for site in find_sites(module) if site.quantized and not site.node.kwargs and len(site.node.args) > 2]


def _call(site: Site, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias."""
    assert callable(site.node.target)
    result: Tensor = site.node.target(x, weight, None, *site.node.args[3:])
    return result


def correct_biases(
    module: TracedModule,
    batches: Iterable[Any],
    run: Callable[[Any], object],
    samples: int,
    author: str,
    wanted: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Take the mean error that rounding weights makes out of each bias, in place; layers without one get one.

    Nagel et al. 2019, arXiv 1906.04721, section 4.2, the empirical form: ``b -= E[(W_q - W) x]`` per output channel,
    over what the quantized model feeds the layer. ``W`` is the stored weight, or what ``wanted`` has under its name:
    what it was before :func:`learn_rounding`. Returns the biases that are new.
    """
    new: list[str] = []
    wanted = {} if wanted is None else wanted
    watchers: dict[fx.Node, tuple[Site, _Mean]] = {}
    for site in _open_sites(module):
        weight = value_of(module, quantized_node(site).args[0])
        watchers[site.node] = site, _Mean(Product.of(site, weight), samples)
    _watch(module, watchers, batches, run)
    with rewriting(module, author) as rewriter, evaluating(module), torch.no_grad():
        for site, seen in watchers.values():
            if not seen.sums:
                continue
            node = quantized_node(site)
            weight = wanted[site.weight] if site.weight in wanted else value_of(module, node.args[0])
            rounded = value_of(module, node)
            shift = _mean_output(site, seen, rounded - weight)
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
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Any], object],
    *,
    samples: int,
    iterations: int,
    author: str,
) -> dict[str, Tensor]:
    """AdaRound: each weight goes up or down so that its layer's output changes least, in place.

    Nagel et al. 2020, arXiv 2004.10568, equations 20 to 24: ``W_q = s clamp(floor(W / s) + h(V))``, ``h(V) =
    clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, minimising ``norm(W x - W_q x)^2 + lambda sum(1 - abs(2 h(V) -
    1)^beta)`` with ``beta`` going from 20 to 2 after a fifth of the steps, over what the quantized model feeds a layer.

    The error counts as a fraction of that of rounding to nearest. Instead of whole feature maps, at most 16,384
    positions at random are compared, 256 a step. Layers are learned in the order of the graph, as many together as
    memory allows: later ones see the earlier ones' result.

    Returns what the weights were, masked as they are, by name.
    """
    before: dict[str, Tensor] = {}
    rest = _open_sites(module)
    while rest:
        watchers: dict[fx.Node, tuple[Site, _Columns]] = {}
        room = _TOGETHER
        while rest and (room > 0 or not watchers):
            site = rest.pop(0)
            seen = _Columns(Product.of(site, value_of(module, quantized_node(site).args[0])), samples)
            watchers[site.node] = site, seen
            room -= seen.wanted * seen.product.length * seen.product.groups
        _watch(module, watchers, batches(), run)
        with rewriting(module, author) as rewriter, evaluating(module):
            for site, seen in watchers.values():
                node = quantized_node(site)
                quantizer = submodule(module, str(node.target))
                if seen.kept and isinstance(quantizer, AffineFakeQuantize):
                    with torch.no_grad():
                        weight = value_of(module, node.args[0]).detach()
                    columns, seen.kept = torch.cat(seen.kept, 1), []
                    before.setdefault(site.weight, weight)
                    rewriter.set_tensor(site.weight, _rounded(weight, quantizer, seen.product, columns, iterations))
    return before


def _mean_output(site: Site, seen: _Mean, weight: Tensor) -> Tensor:
    """``[channels]``: the mean of what a layer with this weight makes of what was seen."""
    linear = site.node.target is torch.nn.functional.linear
    total, positions = weight.new_zeros(()), 0
    for inputs, count in seen.sums.values():
        made = _call(site, inputs, weight)
        made = made.movedim(made.dim() - 1 if linear else 1, 0).flatten(1)
        total, positions = total + made.sum(1), positions + count * made.shape[1]
    return total / positions


def _rounded(weight: Tensor, quantizer: FakeQuantize, product: Product, columns: Tensor, iterations: int) -> Tensor:
    """The weight on its grid, every element rounded the way that was learned."""
    grid, spec = quantizer.grid(), quantizer.spec
    assert grid is not None
    scale = along(grid.scale, weight, spec.axis)
    floor = (weight / scale).floor()
    rest = (weight / scale - floor).clamp(1e-4, 1 - 1e-4)
    variable = torch.logit((rest - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=_RATE)
    kept = weight != 0  # masked weights stay zero
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        nearest = (weight / scale).round().clamp(spec.quant_min, spec.quant_max) * scale
        first = torch.bmm(columns, product.matrix(nearest - weight)).square().mean()
    if not bool(first > 0):
        return nearest
    count = columns.shape[1]
    for step in range(iterations):
        places = torch.randint(count, (min(_BATCH, count),), generator=generator, device=generator.device)
        chosen = columns[:, places.to(columns.device)]
        progress = step / max(1, iterations)
        with torch.enable_grad():
            up = (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
            soft = ((floor + up).clamp(spec.quant_min, spec.quant_max) * scale) * kept
            loss = torch.bmm(chosen, product.matrix(soft - weight)).square().mean() / first
            if progress > 0.2:
                beta = 20 - 18 * (progress - 0.2) / 0.8
                loss = loss + _BINARY * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        up = (torch.sigmoid(variable) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        return (floor + (up >= 0.5)).clamp(spec.quant_min, spec.quant_max) * scale * kept
