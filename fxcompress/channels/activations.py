"""Where a layer's own activation is: the value behind its BatchNorm, dropout and activation function.

From the call of the layer on, one reader at a time, as long as that reader only normalises (BatchNorm), drops or
copies; the first pointwise function that is not affine ends the way. A layer without one (in front of a residual sum,
say) is looked at where the way ends: behind its BatchNorm, or at its output. So folding a BatchNorm changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        rows: which of the rows it shows: all of them most often; of a weight that is cut up into queries, keys and
            values before it is used, some.
        dims: the dimensions that number channels: one most often, two for the states of a recurrent layer.
        index: for each of ``rows`` its position along these dimensions, taken together.
    """

    node: str
    leaf: int
    rows: IntArray
    dims: tuple[int, ...]
    index: IntArray

    def read(self, value: Any) -> Tensor:
        """What the channels of :attr:`rows` hold: (channels, positions), floating point."""
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
        """Where the channels that a weight's rows produce can be seen, each row once for each call that it is used in.

        The units of a lower layer of an ``nn.LSTM`` show only in its last states.
        """
        along = item.parameter, item.dim
        # Groups of a transposed convolution that lie side by side get their axis after that of one of them.
        *_, axis = [a for a in self.channels.facts.ledger.axes if (a.name, a.dim) == along]
        rows, component = item.rows + axis.start, self.channels.component
        ends = list(map(self._end, self._calls(item.parameter)))
        own = [_find(rows, self._labels(end)) for end in ends]  # coupled rows have places of their own
        shown = np.zeros(len(rows), dtype=bool)
        for found in own:
            shown |= found[0] >= 0
        places: list[Place] = []
        for end, (part, index) in zip(ends, own, strict=True):
            others, other_index = _find(component[rows], [component[labels] for labels in self._labels(end)])
            part, index = np.where(shown, part, others), np.where(shown, index, other_index)
            places += self._places(end, part, index)
        return places

    def _labels(self, node: fx.Node) -> list[IntArray]:
        """The labels of every factor of every tensor in a node's value."""
        return [factor.reshape(-1).numpy() for _, factor in self._factors(node)]

    def _factors(self, node: fx.Node) -> list[tuple[int, Tensor]]:
        values = labels_in(self.values.get(node.name))
        return [(leaf, factor) for leaf, labels in enumerate(values) for factor in labels.factors]

    def _places(self, node: fx.Node, part: IntArray, index: IntArray) -> Iterator[Place]:
        for number, (leaf, factor) in enumerate(self._factors(node)):
            rows = np.flatnonzero(part == number)
            if len(rows):
                yield Place(node.name, leaf, rows, dims_of(factor), index[rows])

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
                labels = labels_in(value)
                if labels and all(each.const for each in labels):
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
        """Whether a reader reads this activation and no other, and gives as many values with the same channels."""
        before, after = self.values.get(node.name), self.values.get(user.name)
        if not isinstance(before, Labels) or not isinstance(after, Labels) or before.shape != after.shape:
            return False
        if len(before.factors) != len(after.factors):
            return False
        others = [self.values.get(source.name) for source in user.all_input_nodes if source is not node]
        return user.op != "output" and all(labels.const for value in others for labels in labels_in(value))


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


def _find(wanted: IntArray, among: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """For every number the first of some arrays that holds it, and its first place there; -1 for none."""
    which, where = np.full(len(wanted), -1), np.full(len(wanted), -1)
    for number, values in enumerate(among):
        order = np.argsort(values, kind="stable")
        place = order[np.searchsorted(values[order], wanted).clip(max=len(values) - 1)]
        new = (values[place] == wanted) & (which < 0)
        which[new], where[new] = number, place[new]
    return which, where
