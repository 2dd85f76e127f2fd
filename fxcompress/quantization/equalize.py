"""Cross-layer equalization: ranges of neighbouring layers' channels are made alike, which changes no result."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxcompress.module import TracedModule, submodule
from fxcompress.quantization.sites import Site, find_sites, operation
from fxcompress.rewrite import rewriting

#: ``f(s x) = s f(x)`` for every ``s > 0``, element by element.
_HOMOGENEOUS = frozenset("relu leakyrelu identity dropout".split())
#: Likewise over the positions of a channel of so many dimensions; of other layers they may mix channels.
_POOLING: dict[type[nn.Module], frozenset[str]] = {
    nn.Conv1d: frozenset("maxpool1d avgpool1d adaptiveavgpool1d".split()),
    nn.Conv2d: frozenset("maxpool2d avgpool2d adaptiveavgpool2d adaptivemaxpool2d".split()),
    nn.Conv3d: frozenset("maxpool3d avgpool3d adaptiveavgpool3d".split()),
}
_ROUNDS = 20
_CLOSE = 1e-3


def equalize(module: TracedModule, author: str) -> int:
    """Scale the channels between two layers so that both weights have the same range there, in place.

    Nagel et al. 2019, arXiv 1906.04721, equations 8 to 11: ``s_i = sqrt(r1_i / r2_i)``, ``W1_i / s_i``, ``b1_i / s_i``,
    ``W2_i * s_i``, with ``r`` the largest magnitude of a channel, repeated until nothing changes. Pairs are layers with
    nothing but positively homogeneous functions in between, which nobody else reads.

    Returns:
        The number of pairs.
    """
    pairs = _pairs(module)
    with rewriting(module, author) as rewriter, torch.no_grad():
        for _ in range(_ROUNDS):
            change = 0.0
            for first, second in pairs:
                change = max(change, _equalize(first, second))
            if change < _CLOSE:
                break
        rewriter.edits += len(pairs)
    return len(pairs)


def _pairs(module: TracedModule) -> list[tuple[nn.Module, nn.Module]]:
    sites = {site.node: site for site in find_sites(module) if site.node.op == "call_module"}
    calls = [site.layer for site in sites.values()]
    pairs = []
    for site in sites.values():
        reader = _reader(module, site, sites)
        if reader is None or calls.count(site.layer) > 1 or calls.count(reader.layer) > 1:
            continue
        first, second = submodule(module, site.layer), submodule(module, reader.layer)
        if _matches(first, second) and not _shared(module, first, second):
            pairs.append((first, second))
    return pairs


def _reader(module: TracedModule, site: Site, sites: dict[fx.Node, Site]) -> Site | None:
    """The one layer that reads a layer's channels."""
    node = site.node
    between = _HOMOGENEOUS | _POOLING.get(type(submodule(module, site.layer)), frozenset())
    while len(node.users) == 1:
        (node,) = node.users
        if node in sites:
            return sites[node]
        if node.op == "output" or operation(module, node) not in between:
            return None
    return None


def _matches(first: nn.Module, second: nn.Module) -> bool:
    """Whether outputs of the one are inputs of the other, one by one."""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.out_features == second.in_features
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if not isinstance(first, plain) or not isinstance(second, plain) or type(second) is not type(first):
        return False
    if first.out_channels != second.in_channels:
        return False
    return second.groups == 1 or (second.groups == second.in_channels == second.out_channels)


def _shared(module: nn.Module, *layers: nn.Module) -> bool:
    own = {id(p) for layer in layers for p in layer.parameters()}
    return any(id(p) in own for other in module.modules() if other not in layers for p in other._parameters.values())


def _ranges(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).flatten(1).abs().amax(1)


def _equalize(first: nn.Module, second: nn.Module) -> float:
    """One pair, once; by how much the scales differ from 1 at most."""
    before, after = first.get_parameter("weight"), second.get_parameter("weight")
    dim = 0 if getattr(second, "groups", 1) > 1 else 1
    one, two = _ranges(before, 0), _ranges(after, dim)
    scale = torch.where((one > 0) & (two > 0), (one / two).sqrt(), 1.0)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    before.div_(scale.reshape([-1] + [1] * (before.dim() - 1)))
    bias = first._parameters.get("bias")
    if bias is not None:
        bias.div_(scale)
    after.mul_(scale.reshape([-1 if d == dim else 1 for d in range(after.dim())]))
    return float((scale - 1).abs().max())
