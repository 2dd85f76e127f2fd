"""Which elements of every value in a graph live, and what each node has to become to compute just those.

The invariant of removal: every live tensor is its dense tensor without the dead elements, in dense order. From it
follows what each node's literals must be. Nodes whose literals cannot say it (a channel shuffle that lost unequal
numbers) become a gather.
"""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.arguments import mapped
from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import (
    BoolArray,
    Cut,
    FloatArray,
    Labels,
    cut_shape,
    cut_tensor,
    dims_of,
    distinct,
    labels_in,
    plan_cuts,
    plan_line,
)
from fxcompress.channels.solve import Channels, source_of
from fxcompress.errors import GraphError
from fxcompress.gathers import Gather, selection
from fxcompress.literals import LITERALS, InexpressibleError, Scaled
from fxcompress.module import TracedModule, evaluating, submodule

#: Positions are numbered in a dtype that holds what a padding may be filled with.
_NUMBERS = torch.float64


@dataclass(frozen=True)
class Call:
    """A node's new target and arguments (in which a :class:`Scaled` stands for a size to be computed)."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


#: Methods that at most change a dtype: they name no sizes.
_CASTS = frozenset("to type_as type float double half bfloat16".split())


class Plan:
    """A live set laid over a clean graph.

    Args:
        module: the clean traced module.
        channels: its channel analysis.
        live: for every label whether it lives; must satisfy the analysis' constraints.
    """

    def __init__(self, module: TracedModule, channels: Channels, live: BoolArray) -> None:
        self.module, self.channels, self.live = module, channels, live
        self.graph = module.graph
        self._cuts: dict[int, tuple[Labels, tuple[Cut, ...] | None]] = {}
        self._simple: dict[int, tuple[Tensor, tuple[Cut, ...] | None]] = {}
        self._numbers: dict[str, Any] = {}
        self._collapsed: set[fx.Node] = set()
        self._steps: dict[fx.Node, Call | Gather | None] = {}
        self._masked = False  # sizes are those of a masked graph: dense

    @classmethod
    def of(cls, module: TracedModule, groups: ChannelGroups, live: BoolArray) -> Plan:
        """The plan of a live set; of the one that was asked for last, the same plan."""
        last: Plan | None = groups.planned
        if last is None or last.graph is not module.graph or not np.array_equal(last.live, live):
            last = groups.planned = cls(module, groups.channels, live)
        return last

    # ---- values ------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        """A node's dense value: labels for tensors, numbers as they are. A mask node stands for what it masks."""
        while "mask" in node.meta and node.op == "call_function":
            (node, *_) = node.all_input_nodes
        if node.op == "get_attr" and node.name not in self.channels.facts.values:  # an opened layer's parameter
            return self.channels.facts.state.get(str(node.target))
        return self.channels.facts.values.get(node.name)

    def cuts(self, labels: Labels) -> tuple[Cut, ...] | None:
        """How a tensor with these labels shrinks; None where what is left has no shape (inside a shuffle)."""
        found = self._cuts.get(id(labels))
        if found is None:
            found = self._cuts[id(labels)] = labels, self._plan_cuts(labels)
        return found[1]

    def _plan_cuts(self, labels: Labels) -> tuple[Cut, ...] | None:
        if len(labels.factors) != 1:
            return plan_cuts(labels, self.live)
        (factor,) = labels.factors  # most often the very one that the node before had
        known = self._simple.get(id(factor))
        if known is not None:
            return known[1]
        dims = dims_of(factor)
        if len(dims) != 1:
            return plan_cuts(labels, self.live)
        cut = plan_line(dims, [factor], self.live)
        self._simple[id(factor)] = factor, () if cut is None else (cut,)
        return self._simple[id(factor)][1]

    def shape(self, labels: Labels) -> tuple[int, ...]:
        """A tensor's live shape."""
        cuts = self.cuts(labels)
        if cuts is None:
            raise GraphError(f"the live part of a tensor of shape {labels.shape} has no shape")
        return cut_shape(labels.shape, cuts)

    def touched(self, node: fx.Node) -> bool:
        """Whether the node reads or makes a tensor that shrinks, or reads a number that changes."""
        if any(self.is_number(source) and self.number(source) != self.value(source) for source in node.all_input_nodes):
            return True
        values = [self.value(node), *map(self.value, node.all_input_nodes)]
        return any(self.cuts(labels) != () for value in values for labels in labels_in(value))

    def number(self, node: fx.Node) -> Any:
        """The value that a size node, or arithmetic on sizes, has in the live graph."""
        if node.name not in self._numbers:
            self._numbers[node.name] = self._evaluate_number(node)
        return self._numbers[node.name]

    def _evaluate_number(self, node: fx.Node) -> Any:
        if node.op == "call_method" and node.target in ("size", "numel"):
            labels = self.value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            if isinstance(labels, Labels) and self.cuts(labels) is not None:
                shape = self.shape(labels)
                dim = node.args[1] if len(node.args) > 1 else None
                return shape[dim] if isinstance(dim, int) else math.prod(shape)
            return self.value(node)
        if node.op == "call_function" and callable(node.target) and node.target is not getattr:
            args = fx.map_arg(node.args, self.number)
            return node.target(*args)
        return self.value(node)

    def is_number(self, value: Any) -> bool:
        """Whether an argument is a node that computes a number."""
        return (
            isinstance(value, fx.Node)
            and isinstance(self.value(value), (int, float))
            and not isinstance(self.value(value), bool)
        )

    def size(self, given: Any, wanted: int) -> Any:
        """A size argument that must be ``wanted`` in the live graph: itself, a literal, or a rescaled node."""
        if not isinstance(given, fx.Node):
            return given if given == -1 else wanted
        have = self.value(given) if self._masked else self.number(given)
        if have == wanted:
            return given
        return self._scaled(given, wanted, have) if self._grows(given) and not self._masked else wanted

    def _scaled(self, given: fx.Node, wanted: int, have: int) -> Scaled:
        """``wanted``, computed from a number that is now ``have``; a divisor that counted channels is replaced."""
        if given.target is operator.floordiv and isinstance(given.args[0], fx.Node) and wanted:
            whole = self.number(given.args[0])
            if whole % wanted == 0:
                return Scaled(given.args[0], 1, whole // wanted, wanted)
        return Scaled(given, wanted, have, wanted)

    def dense_number(self, given: fx.Node) -> Any:
        """A number that flows into values: it stays what it was in the dense graph."""
        have, dense = self.number(given), self.value(given)
        if have == dense:
            return given
        return self._scaled(given, dense, have) if self._grows(given) and isinstance(dense, int) else dense

    def _grows(self, node: fx.Node) -> bool:
        """Whether a number depends on a size that is not a channel count (the batch, say)."""
        if node.op == "call_method" and node.target in ("size", "numel") and isinstance(node.args[0], fx.Node):
            labels = self.value(node.args[0])
            assert isinstance(labels, Labels)
            counted = {d % len(labels.shape) for d in node.args[1:] if isinstance(d, int)} or range(len(labels.shape))
            return not set(counted) <= labels.varying()
        return any(self._grows(source) for source in node.all_input_nodes)

    def align(self, name: str, value: Tensor) -> Tensor:
        """The live part of a node's dense value."""
        labels = self.channels.facts.values.get(name)
        return cut_tensor(value, self.cuts(labels) or ()) if isinstance(labels, Labels) else value

    # ---- nodes -------------------------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> Call:
        """What a node becomes so that it computes the live part of its value from live inputs."""
        args, kwargs = self._literals(node)
        if not self.is_number(node) and any(map(self.is_number, node.all_input_nodes)):
            sizes_kept = _name(node) in LITERALS and LITERALS[_name(node)].takes_sizes
            if not sizes_kept:
                args, kwargs = pytree.tree_map(
                    lambda item: self.dense_number(item) if self.is_number(item) else item,
                    (args, kwargs),
                    is_leaf=lambda item: isinstance(item, (fx.Node, Scaled, slice)),
                )
        target, op = node.target, node.op
        if _name(node) in ("split", "chunk", "tensor_split", "split_with_sizes") and (args, kwargs) != (
            node.args,
            node.kwargs,
        ):
            op, target = "call_function", torch.split
        return Call(op, target, tuple(args), dict(kwargs))

    def _literals(self, node: fx.Node) -> tuple[Any, Any]:
        row = LITERALS.get(_name(node))
        if row is None or not self.touched(node):
            return node.args, node.kwargs
        return row.rewrite(self, node)

    def live_arguments(self, node: fx.Node) -> tuple[Any, Any] | None:
        """New literals for a node that reads live inputs in a graph whose sizes are dense; None where none change."""
        row = LITERALS.get(_name(node))
        self._masked = True
        made = None if row is None else row.rewrite(self, node)
        self._masked = False
        return None if made is None or made == (node.args, node.kwargs) else made

    def steps(self) -> dict[fx.Node, Call | Gather | None]:
        """What every node becomes: a call, a gather, or None for the inside of a shuffle that collapses.

        Raises:
            InexpressibleError: a node cannot compute the live part of its value.
        """
        if not self._steps:
            self._collapsed.clear()
            with evaluating(self.module):
                nodes = [node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr")]
                self._steps = {node: self._step(node) for node in nodes}
        return self._steps

    def _step(self, node: fx.Node) -> Call | Gather | None:
        """For the nodes in the order of the graph."""
        made = self.value(node)
        if node.name not in self.channels.facts.moves or not self.touched(node) or not isinstance(made, Labels):
            return self.call(node)
        sources = [s for s in node.all_input_nodes if isinstance(self.value(s), Labels)]
        moved = [s for s in sources if self.value(s).factors and not self._is_index(node, s)]
        if len(moved) != 1 or any(source not in moved and not self.value(source).const for source in sources):
            return self.call(node)  # what the input points at does not move
        for source in sources:
            if source not in moved:
                self._check_index(node, source)
        if moved[0] not in self._collapsed and self.cuts(made) is not None:
            call = self.call(node)
            if node.target in _CASTS or self._agrees(node, moved[0], call):
                return call
        if node.name in self.channels.soft:
            self._collapsed.add(node)
            return None
        if self._written(node):
            raise InexpressibleError(node, "is written into and would become a copy")
        return self._gather(node)

    def _written(self, node: fx.Node) -> bool:
        """Whether something writes into a value, or into a view of it."""
        return bool(self._writers(node))

    def _writers(self, node: fx.Node) -> set[fx.Node]:
        moves = self.channels.facts.moves
        viewed = [self._writers(user) for user in node.users if user.name in moves and not user.meta.get("mutates")]
        return {user for user in node.users if user.meta.get("mutates")}.union(*viewed)

    def _check_index(self, node: fx.Node, index: fx.Node) -> None:
        """Raise if an index is not what the nodes that it is read from make it: something else writes into it."""
        waiting = [(node, index)]
        while waiting:
            reader, read = waiting.pop()
            if self._writers(read) - {reader}:
                raise InexpressibleError(node, f"is given an index that is written into ({read})")
            waiting += [(read, source) for source in read.all_input_nodes]

    def _is_index(self, node: fx.Node, source: fx.Node) -> bool:
        return bool(node.args) and source is not node.args[0] and node.target is not torch.cat

    def _agrees(self, node: fx.Node, source: fx.Node, call: Call) -> bool:
        """Whether the rewritten call, run on the positions of the live elements, gives those it should."""
        before, after = self.value(source), self.value(node)
        cuts = self.cuts(before)
        varying = before.varying()
        positions = torch.arange(math.prod(before.shape[d] for d in varying), dtype=_NUMBERS)
        positions = positions.reshape([n if d in varying else 1 for d, n in enumerate(before.shape)])
        positions = positions.expand(before.shape)
        wanted = cut_tensor(
            self._run(
                node,
                Call(node.op, node.target, node.args, dict(node.kwargs)),
                {source: positions},
                live=False,
            ),
            self.cuts(after) or (),
        )
        try:
            found = self._run(node, call, {source: cut_tensor(positions, cuts or ())}, live=True)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False  # the literals cannot express it
        return found.shape == wanted.shape and bool((found == wanted).all())

    def _run(self, node: fx.Node, call: Call, given: dict[fx.Node, Tensor], *, live: bool) -> Any:
        def fetch(source: Any) -> Any:
            if isinstance(source, Scaled):
                return source.wanted
            if not isinstance(source, fx.Node):
                return source
            if source in given:
                return given[source]
            if source.op == "get_attr":
                return _attribute(self.module, str(source.target))
            if isinstance(self.value(source), Labels):  # an index that was made from buffers
                return self._run(
                    source, Call(source.op, source.target, source.args, dict(source.kwargs)), {}, live=False
                )
            return self.number(source) if live else self.value(source)

        args, kwargs = mapped(fetch, list(call.args)), mapped(fetch, dict(call.kwargs))
        if call.op == "call_method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        if call.op == "call_module":
            return submodule(self.module, str(call.target))(*args, **kwargs)
        return call.target(*args, **kwargs)

    def _gather(self, node: fx.Node) -> Gather:
        """The chain of rearrangements that ends in ``node``, as one selection along one dimension."""
        chain = [node]
        start = source_of(node, self.channels.facts)
        while start.name in self.channels.soft:
            chain.append(start)
            start = source_of(start, self.channels.facts)
        before, after = self.value(start), self.value(node)
        cuts = self.cuts(before)
        if cuts is None:
            raise InexpressibleError(node, "rearranges what has no shape of its own")
        positions = torch.arange(1, math.prod(before.shape) + 1, dtype=_NUMBERS).reshape(before.shape)  # 0: padding
        value: Any = positions
        for item in reversed(chain):
            source = source_of(item, self.channels.facts)
            value = self._run(
                item, Call(item.op, item.target, item.args, dict(item.kwargs)), {source: value}, live=False
            )
        given, wanted = cut_tensor(positions, cuts), cut_tensor(value, self.cuts(after) or ())
        found = selection(given, wanted, before.varying() | after.varying())
        if found is None:
            raise InexpressibleError(node, "rearranges channels over several dimensions")
        dim, index = found
        return Gather(start, dim, index, given.shape[dim])


@dataclass(frozen=True)
class Settled:
    """What remains of a wanted live set.

    Attributes:
        live: for every label whether it lives.
        repaired: the same as far as constraints alone bring it back.
        problems: the nodes that could not be rewritten, at which the rest came back, and why.
    """

    live: BoolArray
    repaired: BoolArray
    problems: tuple[str, ...]


def settled(module: TracedModule, groups: ChannelGroups, live: BoolArray, rank: FloatArray | None = None) -> Settled:
    """The live set closest to ``live`` whose removal can be written down as a graph.

    Constraints are repaired, and channels come back at which a node could not be rewritten (the node is named in the
    warning); best ranked components come back first.
    """
    channels, problems = groups.channels, []
    live = repaired = channels.repair(live, rank)
    while True:  # every round brings components back, so this ends
        plan = Plan.of(module, groups, live)
        try:
            plan.steps()
        except InexpressibleError as problem:
            values = [plan.value(node) for node in (problem.node, *problem.node.all_input_nodes)]
            factors = [factor for labels in labels_in(values) for factor in labels.factors]
            back = channels.revived(live, distinct(np.concatenate([f.numpy().reshape(-1) for f in factors])))
            warnings.warn(f"{problem}; its channels stay", stacklevel=3)
            if (back == live).all():
                raise
            problems.append(str(problem))
            live = channels.repair(back, rank)
        else:
            return Settled(live, repaired, tuple(problems))


def settle(module: TracedModule, groups: ChannelGroups, live: BoolArray, rank: FloatArray | None = None) -> BoolArray:
    """The live set alone of :func:`settled`."""
    return settled(module, groups, live, rank).live


def _attribute(module: TracedModule, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(submodule(module, path), leaf)


def _name(node: fx.Node) -> str:
    """The name under which the table of literals knows a node."""
    if node.op == "call_method":
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
