"""Where a layer's own activation is: the value behind its BatchNorm, dropout and activation function.

From the call of the layer on, one reader at a time, as long as that reader only normalises (BatchNorm), drops or
copies; the first pointwise function that is not affine ends the way. A layer without one (in front of a residual sum,
say) is looked at where the way ends: behind its BatchNorm, or at its output. So folding a BatchNorm changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.channels import reductions, rules
from fxcompress.channels.groups import ChannelGroups, Slices
from fxcompress.channels.labels import IntArray, Labels, dims_of, labels_in
from fxcompress.channels.propagate import propagate
from fxcompress.channels.rules import Call, Rule
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule, owner, submodule

#: Operators that leave every value what it is in eval mode, but for its place in memory and its dtype.
_SAME = frozenset(
    "dropout native_dropout feature_dropout clone alias detach contiguous lift_fresh _to_copy copy".split()
)
#: Pointwise operators that are affine in one argument if the others are constants.
_AFFINE = frozenset("add sub rsub mul div neg lerp addcmul addcdiv masked_fill where fill zero".split())


@dataclass(frozen=True)
class Place:
    """Where the channels of some rows of a weight lie in the value of a node.

    Attributes:
        node: its name.
        leaf: which of the tensors in its value.
        dims: the dimensions that number channels: one most often, two for the states of a recurrent layer.
        index: for each row its position along these dimensions, taken together.
    """

    node: str
    leaf: int
    dims: tuple[int, ...]
    index: IntArray

    def read(self, value: Any) -> Tensor:
        """What the channels hold: (channels, positions), floating point."""
        tensor = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)][self.leaf].detach()
        lines = tensor.movedim(self.dims, tuple(range(len(self.dims)))).flatten(0, len(self.dims) - 1)
        index = torch.from_numpy(self.index).to(tensor.device)
        chosen = lines.reshape(len(lines), -1).index_select(0, index)
        return chosen if chosen.dtype in (torch.float32, torch.float64) else chosen.float()


class Activations:
    """Finds the activations of a model's layers.

    Args:
        module: a clean traced module.
        groups: its channel analysis.
        inputs: example inputs.
    """

    def __init__(self, module: TracedModule, groups: ChannelGroups, inputs: Inputs) -> None:
        self.module, self.channels = module, groups.channels
        self.values = groups.channels.facts.values
        watch = _Operators()
        propagate(module, inputs, watch)
        self.operators = watch.found

    def of(self, item: Slices) -> list[Place]:
        """Where the channels that a weight's rows produce can be seen: one place for each call of the layer.

        The units of a lower layer of an ``nn.LSTM`` show only in its last states.
        """
        places = []
        for node in self._calls(item.parameter):
            end = self._end(node)
            place = self._place(item, end) or self._place(item, node)
            if place is not None:
                places.append(place)
        return places

    def _calls(self, parameter: str) -> list[fx.Node]:
        """The nodes that compute an activation with a parameter, or with what is computed from parameters alone."""
        tensor = self.module.get_parameter(parameter)
        constant: set[fx.Node] = set()
        found = []
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                holder, name = owner(self.module, str(node.target))
                if getattr(holder, name) is tensor:
                    constant.add(node)
            elif node.op == "call_module":
                if any(own is tensor for own in submodule(self.module, str(node.target)).parameters()):
                    found.append(node)
            elif any(source in constant for source in node.all_input_nodes):
                value = self.values.get(node.name)
                if isinstance(value, Labels) and value.const:
                    constant.add(node)
                else:
                    found.append(node)
        return found

    def _end(self, node: fx.Node) -> fx.Node:
        """The node that holds the own activation of the layer that ``node`` calls."""
        while len(node.users) == 1:
            (user,) = node.users
            operators = self.operators.get(user.name, [])
            if not self._alone(node, user) or not all(_elementwise(rule, name) for name, rule in operators):
                break
            if all(name in _SAME or rule is reductions.batch_norm for name, rule in operators):
                node = user
                continue
            activates = any(rule is rules.pointwise and name not in _SAME | _AFFINE for name, rule in operators)
            return user if activates else node
        return node

    def _alone(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a reader reads this activation and no other, and gives as many values."""
        before, after = self.values.get(node.name), self.values.get(user.name)
        if not isinstance(before, Labels) or not isinstance(after, Labels) or before.shape != after.shape:
            return False
        others = [self.values.get(source.name) for source in user.all_input_nodes if source is not node]
        return user.op != "output" and all(labels.const for value in others for labels in labels_in(value))

    def _place(self, item: Slices, node: fx.Node) -> Place | None:
        """The rows' channels in a node's value; None if they are not all in one of its tensors."""
        facts = self.channels.facts
        (axis,) = [a for a in facts.ledger.axes if (a.name, a.dim) == (item.parameter, item.dim)]
        rows = item.rows + axis.start
        for leaf, labels in enumerate(labels_in(self.values.get(node.name))):
            for factor in labels.factors:
                found = factor.reshape(-1).numpy()
                index = _find(rows, found)  # coupled rows (rotary embeddings) have places of their own
                if index is None:
                    index = _find(self.channels.component[rows], self.channels.component[found])
                if index is not None:
                    return Place(node.name, leaf, dims_of(factor), index)
        return None


class _Operators:
    """Notes which operators run under every node."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[str, Rule | None]]] = {}

    def called(self, call: Call, rule: Rule | None, inplace: bool) -> None:
        """An operator ran on tensors."""
        if call.tensors:
            self.found.setdefault(call.ledger.node, []).append((call.name, rule))

    def closed(self, values: list[Any]) -> None:
        """A module ran whose inside nobody sees: it is a reader like any other that is not pointwise."""


def _elementwise(rule: Rule | None, name: str) -> bool:
    return rule is rules.pointwise or rule is reductions.batch_norm or name in _SAME


def _find(wanted: IntArray, among: IntArray) -> IntArray | None:
    """The first place of every number in an array; None if one of them is not there."""
    order = np.argsort(among, kind="stable")
    place = np.searchsorted(among[order], wanted).clip(max=len(among) - 1)
    found: IntArray = order[place]
    return found if (among[found] == wanted).all() else None
