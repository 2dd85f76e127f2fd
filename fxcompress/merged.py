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

from fxcompress.channels.labels import BoolArray, Cut, Labels, dims_of
from fxcompress.nodes import live_index, select_live
from fxcompress.plan import Plan
from fxcompress.rewrite import Rewriter

#: A selection along one dimension: the dimension, the node of the index, and the length of one period of it.
Step = tuple[int, fx.Node, fx.Node | int]


def repeats_within(labels: Labels, dim: int) -> bool:
    """Whether labels along a dimension come in runs of equal ones, all equally long and longer than 1."""
    runs = []
    for factor in labels.factors:
        if dim in dims_of(factor):
            same = (factor.diff(dim=dim) == 0).movedim(dim, 0).reshape(factor.shape[dim] - 1, -1)
            breaks = torch.cat((torch.zeros(1, dtype=torch.long), (~same.all(dim=1)).nonzero().reshape(-1) + 1))
            lengths = torch.cat((breaks, torch.tensor([factor.shape[dim]]))).diff()
            runs.append(int(lengths.min()) if bool((lengths == lengths[0]).all()) else 1)
    return math.gcd(*runs) > 1


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
        if not any(repeats_within(labels, dim) for dim in cut.dims):
            return None
        dead = self._dead_elements(source, holder)
        if dead is None:
            return None
        steps: list[Step] = []
        for i, dim in enumerate(cut.dims):
            if i != cut.column and len(cut.keep[i]) != labels.shape[dim]:
                steps.append(self._step(dead, dim, len(cut.keep[i]), labels.shape[dim], ()))
                dead = self._after(steps[-1][1], "call_function", select_live, (dead, *steps[-1]))
        if cut.gather is not None and cut.column is not None:
            dim = cut.dims[cut.column]
            rows = tuple(d for d in cut.dims if d != dim)
            steps.append(self._step(dead, dim, cut.gather.shape[cut.column], labels.shape[dim], rows))
        return steps

    def _step(self, dead: fx.Node, dim: int, kept: int, size: int, rows: tuple[int, ...]) -> Step:
        whole = self._after(dead, "call_method", "size", (dead, dim))
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
        if not any(repeats_within(labels, dim) for dim in labels.varying()):
            return self._spread(node, labels, holder)
        clean = node
        while "mask" in clean.meta:
            (clean, *_) = clean.all_input_nodes
        sources = [item for item in clean.all_input_nodes if isinstance(self.plan.value(item), Labels)]
        if clean.name in self.plan.channels.facts.moves:
            if len(sources) != 1 or (dead := self._dead_elements(sources[0], holder)) is None:
                return None

            def read(item: fx.Node, old: fx.Node = sources[0], new: fx.Node = dead) -> fx.Node:
                return new if item is old else item

            args: Any = fx.map_arg(clean.args, read)
            kwargs: Any = fx.map_arg(dict(clean.kwargs), read)
            return self._after(clean, clean.op, clean.target, args, kwargs)
        for source in sources:
            other = self.plan.value(source)
            if other.shape == labels.shape and np.array_equal(self._mask(other), self._mask(labels)):
                return self._dead_elements(source, holder)
        return None

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
