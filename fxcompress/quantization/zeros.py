"""Weights removed one by one, in front of quantizers of whose values zero is none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxcompress.module import TracedModule, owner, submodule
from fxcompress.quantization.fake_quantize import ROLE, FakeQuantize
from fxcompress.rewrite import rewriting


def keep_zeros(module: TracedModule, masks: Mapping[str, Tensor], author: str) -> None:
    """Before masks are multiplied into weights: let fake-quant modules that move zero leave it, in place.

    The sign of 0 is +1, and a masked weight must stay 0. A kept weight that happens to be 0 becomes the smallest normal
    number, which every rule rounds as it does 0.

    Args:
        module: with or without its mask nodes.
        masks: of single elements, by parameter, True = keep.
        author: the pass, for provenance.
    """
    kept = {id(module.get_parameter(name)): mask for name, mask in masks.items() if not bool(mask.all())}
    with rewriting(module, author) as rewriter:
        for node in module.graph.nodes:
            if node.meta.get(ROLE) != "weight" or "mask" in node.meta:
                continue
            quantizer = submodule(module, str(node.target))
            source = node.all_input_nodes[0]
            while "mask" in source.meta and source.op != "get_attr":
                source = source.all_input_nodes[0]
            if source.op != "get_attr" or not isinstance(quantizer, FakeQuantize) or quantizer.keeps_zero:
                continue
            holder, leaf = owner(module, str(source.target))
            weight = getattr(holder, leaf)
            if id(weight) in kept:
                mask = kept[id(weight)].to(weight.device)
                tiny = torch.finfo(weight.dtype).tiny
                value = torch.where(mask & (weight.detach() == 0), tiny, weight.detach())
                rewriter.set_tensor(str(source.target), value)
                kept[id(getattr(holder, leaf))] = mask
                quantizer.keeps_zero = True
