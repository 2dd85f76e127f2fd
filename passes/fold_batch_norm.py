"""Folding BatchNorm into the convolution or linear layer in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, fx, nn

from fxcompress.channels.labels import Labels
from fxcompress.context import Context
from fxcompress.folding import calls_of, folded, norm_source, scaled
from fxcompress.masking import Masking
from fxcompress.module import TracedModule, submodule
from fxcompress.pipeline import Pass
from fxcompress.rewrite import Rewriter, rewriting


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Multiplies BatchNorm's affine map into the layer in front of it: ``W' = W * gamma / sqrt(var + eps)`` per output
    channel, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``.

    Jacob et al. 2018, "Quantization and Training of Neural Networks", arXiv 1712.05877, section 3.2. Holds in eval
    mode, where the statistics are fixed. A layer that is called twice, or whose output somebody else reads, keeps its
    BatchNorm. The BatchNorm's ``state_dict`` keys go, and a layer without a bias gains one; both are listed.
    """

    preserves: ClassVar[bool] = True
    rounding: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Fold every pair."""
        folded = fold_norms(module, partial(_rank, module, context), self.name)
        if folded:
            context.notes.append(f"folded {', '.join(folded)}")
            masking, left = context.masking or Masking(), dict(module.named_parameters())
            context.masking = Masking({n: mask for n, mask in masking.elements.items() if n in left}, masking.dead)
        return module


def fold_norms(module: TracedModule, ranks: Callable[[fx.Node], int], author: str) -> list[str]:
    """Fold every pair of a graph without masks, in place.

    Args:
        module: layers may be open; those keep their BatchNorm.
        ranks: number of dimensions of a node's value, 0 where that is not known; asked about linear layers.
        author: the pass, for provenance.

    Returns:
        A line for each.
    """
    calls = calls_of(module)
    folded: list[str] = []
    with rewriting(module, author) as rewriter:
        for node in list(module.graph.nodes):
            producer = _producer(node, module, calls, ranks)
            if producer is not None:
                folded.append(_fold(rewriter, producer, node))
    return folded


def _rank(module: TracedModule, context: Context, node: fx.Node) -> int:
    if context.inputs is None:
        return 0
    labels = context.groups(module).channels.facts.values.get(node.name)
    return len(labels.shape) if isinstance(labels, Labels) else 0


def _producer(
    node: fx.Node, module: TracedModule, calls: Mapping[str, int], ranks: Callable[[fx.Node], int]
) -> fx.Node | None:
    """The layer that a node's BatchNorm can be folded into."""
    source = norm_source(node, module, calls, ranks)
    if source is None or source.op != "call_module":
        return None
    read = {str(other.target).rpartition(".")[0] for other in module.graph.find_nodes(op="get_attr")}
    return None if {str(node.target), str(source.target)} & read else source


def _fold(rewriter: Rewriter, producer: fx.Node, node: fx.Node) -> str:
    """Fold one pair; returns a line for the notes."""
    module = rewriter.module
    layer, norm = submodule(module, str(producer.target)), submodule(module, str(node.target))
    weight: Tensor = layer.get_parameter("weight")
    scale, shift = folded(layer, norm)
    rewriter.set_tensor(f"{producer.target}.weight", scaled(layer, weight.detach(), scale))
    added = layer._parameters.get("bias") is None
    layer.register_parameter("bias", nn.Parameter(shift, requires_grad=weight.requires_grad))
    rewriter.replace(node, producer)
    rewriter.erase(node)
    rewriter.drop_module(str(node.target))
    return f"{node.target} into {producer.target}" + (f" (adds {producer.target}.bias)" if added else "")
