"""Live channels of a dimension into which space was merged (``x.flatten(1)``): found while the model runs.

Where a dimension holds channels alone, or the batch in front of them, the places of the live ones are known when masks
are laid. Behind a channel there may also be positions, as many as the image has: then only the forward itself knows.
So it does what the analysis does: where the channels still had a dimension of their own, every element is told whether
it is dead, and that goes through the same rearrangements as the values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.channels.labels import BoolArray, Cut, Labels, dims_of
from fxcompress.nodes import live_index, select_live
from fxcompress.plan import Plan
from fxcompress.rewrite import Rewriter

#: What lays tensors side by side.
_JOINS = frozenset((torch.cat, torch.concat, torch.concatenate, torch.stack))
#: A selection along one dimension: the dimension, the node of the index, and the length of one period of it.
Step = tuple[int, fx.Node, fx.Node | int]


def run_length(labels: Labels, dim: int) -> int:
    """How many equal labels follow each other along a dimension; 0 if not always equally many."""
    runs = []
    for factor in labels.factors:
        if dim in dims_of(factor):
            same = (factor.diff(dim=dim) == 0).movedim(dim, 0).reshape(factor.shape[dim] - 1, -1)
            breaks = torch.cat((torch.zeros(1, dtype=torch.long), (~same.all(dim=1)).nonzero().reshape(-1) + 1))
            lengths = torch.cat((breaks, torch.tensor([factor.shape[dim]]))).diff()
            if not bool((lengths == lengths[0]).all()):
                return 0
            runs.append(int(lengths[0]))
    return math.gcd(*runs) or 1


def _runs(labels: Labels) -> int:
    return math.prod(run_length(labels, dim) for dim in labels.varying())


def _unmasked(node: fx.Node) -> fx.Node:
    """The node of the dense graph that mask nodes stand for."""
    while "mask" in node.meta:
        (node, *_) = node.all_input_nodes
    return node


class Merged:
    """Writes the nodes that find live channels at run time.

    Args:
        rewriter: of the module that masks are laid over.
        plan: which elements of its values live.
    """

    def __init__(self, rewriter: Rewriter, plan: Plan) -> None:
        self.rewriter, self.plan = rewriter, plan
        self._dead: dict[fx.Node, fx.Node | None] = {}
        self._constants = 0

    def steps(self, source: fx.Node, labels: Labels, cut: Cut, holder: str) -> list[Step] | None:
        """A cut of ``source`` as selections; None where the places are constant, or cannot be found at run time.

        Args:
            source: a node of the dense graph.
            labels: of its value.
            cut: one of its cuts.
            holder: name of the module that keeps constants.
        """
        if all(run_length(labels, dim) == 1 for dim in cut.dims) or self._repeats_by_literals(source):
            return None
        dead = self._dead_elements(source, holder)
        if dead is None:
            return None
        steps: list[Step] = []
        for i, dim in enumerate(cut.dims):
            if i != cut.column and len(cut.keep[i]) != labels.shape[dim]:
                steps.append(self._step(dead, labels, dim, len(cut.keep[i]), ()))
                dead = self._after(steps[-1][1], "call_function", select_live, (dead, *steps[-1]))
        if cut.gather is not None and cut.column is not None:
            dim = cut.dims[cut.column]
            rows = tuple(d for d in cut.dims if d != dim)
            steps.append(self._step(dead, labels, dim, cut.gather.shape[cut.column], rows))
        return steps

    def _step(self, dead: fx.Node, labels: Labels, dim: int, kept: int, rows: tuple[int, ...]) -> Step:
        whole = self._after(dead, "call_method", "size", (dead, dim))
        size = labels.shape[dim]
        if not run_length(labels, dim):
            kept = 0  # maps of two resolutions side by side: what fraction lives differs from image to image
        common = math.gcd(kept, size)
        index = self._after(whole, "call_function", live_index, (dead, dim, kept // common, size // common, rows))
        return dim, index, whole

    def _dead_elements(self, node: fx.Node, holder: str) -> fx.Node | None:
        """A node that computes 1 where an element of ``node``'s value is dead and 0 elsewhere; None if none can."""
        if node not in self._dead:
            self._dead[node] = self._derive(node, holder)
        return self._dead[node]

    def _derive(self, node: fx.Node, holder: str) -> fx.Node | None:
        labels = self.plan.value(node)
        if not isinstance(labels, Labels) or not labels.factors:
            return None
        if _runs(labels) == 1:
            return self._spread(node, labels, holder)
        node = _unmasked(node)
        if node.target in _JOINS:
            return self._joined(node, holder)
        source = self._source(node)
        dead = None if source is None else self._dead_elements(source, holder)
        if dead is None or node.name not in self.plan.channels.facts.moves:
            return dead
        args: Any = fx.map_arg(node.args, lambda item: dead if item is source else item)
        kwargs: Any = fx.map_arg(dict(node.kwargs), lambda item: dead if item is source else item)
        return self._after(node, node.op, node.target, args, kwargs)

    def _joined(self, node: fx.Node, holder: str) -> fx.Node | None:
        """The same for a concatenation, of which every piece is told; None if some piece cannot be."""
        pieces: dict[fx.Node, fx.Node] = {}
        for source in node.all_input_nodes:
            labels = self.plan.value(source)
            if not isinstance(labels, Labels):
                continue  # a number
            dead = self._dead_elements(source, holder) if labels.factors else self._spread(source, labels, holder)
            if dead is None:
                return None
            pieces[source] = dead
        args: Any = fx.map_arg(node.args, lambda item: pieces.get(item, item))
        kwargs: Any = fx.map_arg(dict(node.kwargs), lambda item: pieces.get(item, item))
        return self._after(node, node.op, node.target, args, kwargs)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The one input whose elements ``node`` rearranges, or of which it computes each element's successor."""
        labels = self.plan.value(node)
        sources = [item for item in node.all_input_nodes if isinstance(self.plan.value(item), Labels)]
        if node.name in self.plan.channels.facts.moves:
            return sources[0] if len(sources) == 1 else None
        for source in sources:
            other = self.plan.value(source)
            if other.shape == labels.shape and np.array_equal(self._mask(other), self._mask(labels)):
                return source
        return None

    def _repeats_by_literals(self, node: fx.Node) -> bool:
        """Whether equal labels follow each other only because a number in the graph says how often to repeat them."""
        copies, found = 1, _runs(self.plan.value(node))
        while copies != found:  # towards the inputs, so this ends
            node = _unmasked(node)
            source = self._source(node)
            if source is None:
                return False
            more, left = divmod(math.prod(self.plan.value(node).shape), math.prod(self.plan.value(source).shape))
            if left or (more > 1 and more not in pytree.tree_leaves((node.args, dict(node.kwargs)))):
                return False
            copies, node = copies * more, source
        return True

    def _mask(self, labels: Labels) -> BoolArray:
        mask: BoolArray = np.ones((1,) * len(labels.shape), dtype=bool)
        for factor in labels.factors:
            mask = mask & self.plan.live[factor.numpy()]
        return mask

    def _spread(self, node: fx.Node, labels: Labels, holder: str) -> fx.Node:
        """What is dead where channels have a dimension of their own, as a constant seen at the value's size."""
        dead = torch.from_numpy((~self._mask(labels)).astype(np.int64))
        name = f"{holder}.d{self._constants}"
        self._constants += 1
        device = next((p.device for p in self.rewriter.module.parameters()), torch.device("cpu"))
        self.rewriter.add_buffer(name, dead.to(device), persistent=False)
        constant = self._after(node, "get_attr", name, ())
        return self._after(constant, "call_method", "expand_as", (constant, node))

    def _after(
        self, place: fx.Node, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        made = self.rewriter.insert_after(place, op, target, args, kwargs)
        made.meta["mask"] = True
        return made
