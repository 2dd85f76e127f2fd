"""Candidates that say with how many bits each layer's weight is stored, and what they score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxcompress.module import TracedModule
from fxcompress.quantization.sites import Site, find_sites
from fxcompress.quantization.spec import weight_spec
from fxcompress.search.trial import Proposal
from fxcompress.task import Task
from fxcompress.training import placed
from fxcompress.undisturbed import restored


@dataclass(frozen=True)
class WeightSite:
    """A weight that can be rounded.

    Attributes:
        layer: the module that holds it.
        weight: its name.
        axis: along which each index has a scale of its own; None for one scale.
        elements: how many it has.
    """

    layer: str
    weight: str
    axis: int | None
    elements: int


def weight_sites(module: TracedModule, tables: Iterable[Site] = ()) -> tuple[WeightSite, ...]:
    """The weights of convolutions and linear layers in the order of the graph, and of some tables, each once."""
    found: dict[str, WeightSite] = {}
    for site in (*find_sites(module), *tables):
        if not site.quantized and site.weight not in found:
            elements = module.get_parameter(site.weight).numel()
            found[site.weight] = WeightSite(site.layer, site.weight, site.axis, elements)
    return tuple(found.values())


@torch.no_grad()
def rounded(weight: Tensor, bits: int, axis: int | None) -> Tensor:
    """A weight on the grid of ``bits`` signed integers around 0 that its extremes span, per index of ``axis``."""
    spec = weight_spec(bits, axis=axis)
    other = tuple(dim for dim in range(weight.dim()) if dim != axis)
    low, high = (getattr(weight, name)(dim=other, keepdim=True) for name in ("amin", "amax"))
    scale, _ = spec.grid(low, high)
    return (weight / scale).round().clamp(spec.quant_min, spec.quant_max) * scale


@dataclass
class WeightBitsSubject:
    """A model whose weights are rounded, nothing else: what a trial is about.

    Attributes:
        module: a traced module, the subject's own; its masks stay.
        task: scores.
        sites: the weights that proposals list; 0 bits leave one as it is.
    """

    module: TracedModule
    task: Task
    sites: tuple[WeightSite, ...]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: what only training needs stays here."""
        state = dict(vars(self))
        if type(self.task) is Task:
            state["task"] = replace(self.task, batches=None, loss=None, optimizer=None, schedule=None)
        return state

    def score(self, proposal: Proposal) -> float:
        """The score with weights of so many bits."""
        chosen = [(site, bits) for site, bits in zip(self.sites, proposal.bits, strict=True) if bits]
        return _scored(self.module, self.task, chosen)


def _scored(module: TracedModule, task: Task, chosen: Iterable[tuple[WeightSite, int]]) -> float:
    dense: dict[str, Tensor] = {}
    try:
        for site, bits in chosen:
            parameter = module.get_parameter(site.weight)
            dense[site.weight] = parameter.data
            parameter.data = rounded(parameter.data, bits, site.axis)
        with restored(module), placed(module, task.device):
            return task.measure(module)
    finally:
        for name, values in dense.items():
            module.get_parameter(name).data = values
