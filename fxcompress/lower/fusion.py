"""What a kernel can take over from the nodes behind its layer: an addition and an activation."""

from __future__ import annotations

import inspect
import operator
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.lower.prepacked import NOTHING, PostOp, Prepacked
from fxcompress.module import TracedModule, submodule
from fxcompress.quantization.fake_quantize import FakeQuantize

#: How the arguments of an activation become a post-op; by torch.nn layer, and by function or method.
_LAYERS: dict[type[nn.Module], Callable[[Any], PostOp]] = {
    nn.ReLU: lambda layer: PostOp("relu"),
    nn.ReLU6: lambda layer: PostOp("hardtanh", (0.0, 6.0)),
    nn.Hardtanh: lambda layer: PostOp("hardtanh", (float(layer.min_val), float(layer.max_val))),
    nn.LeakyReLU: lambda layer: PostOp("leaky_relu", (float(layer.negative_slope),)),
    nn.Hardswish: lambda layer: PostOp("hardswish"),
    nn.Hardsigmoid: lambda layer: PostOp("hardsigmoid"),
    nn.SiLU: lambda layer: PostOp("swish"),
    nn.Sigmoid: lambda layer: PostOp("sigmoid"),
    nn.Tanh: lambda layer: PostOp("tanh"),
    nn.GELU: lambda layer: PostOp("gelu", (), layer.approximate),
}
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.silu: nn.SiLU,
    F.sigmoid: nn.Sigmoid,
    F.tanh: nn.Tanh,
    F.gelu: nn.GELU,
}
_METHODS = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "sigmoid_": nn.Sigmoid,
    "tanh": nn.Tanh,
    "tanh_": nn.Tanh,
}
#: Functions whose signature Python does not know.
_BUILTIN = {F.gelu: ("input", "approximate")}
#: Their results share memory with nothing else.
FRESH = (
    Prepacked,
    FakeQuantize,
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def post_op(module: TracedModule, node: fx.Node) -> PostOp | None:
    """The activation that a node applies to its first argument, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        layer = submodule(module, str(node.target))
        made = _LAYERS.get(type(layer))
        return None if made is None else made(layer)
    kind = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target)
    if kind is None:
        return None
    options = dict(node.kwargs)
    if len(node.args) > 1:
        function: Any = node.target
        names = _BUILTIN.get(function) or tuple(inspect.signature(function).parameters)
        options |= dict(zip(names[1:], node.args[1:], strict=False))
    options.pop("inplace", None)
    if any(isinstance(value, fx.Node) for value in options.values()):
        return None
    return _LAYERS[kind](kind(**options))


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a node adds, or None: it adds something else, or with a factor."""
    method = node.op == "call_method" and node.target in ("add", "add_")
    function = node.op == "call_function" and node.target in _ADDITIONS
    if not (method or function) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


@dataclass(frozen=True)
class Chain:
    """A layer's node and what its kernel takes over, in order.

    Attributes:
        nodes: the layer, then at most an addition, then at most an activation.
        other: what is added.
        post: the activation.
    """

    nodes: tuple[fx.Node, ...]
    other: fx.Node | None
    post: PostOp

    @property
    def last(self) -> fx.Node:
        """Where the kernel's result is."""
        return self.nodes[-1]


class Chains:
    """Finds chains in one module; see :meth:`behind`.

    Args:
        module: not to be edited meanwhile.
        shapes: of the value of every node that is a tensor, by name.
    """

    def __init__(self, module: TracedModule, shapes: dict[str, tuple[int, ...]]) -> None:
        self.module = module
        self.shapes = shapes
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._writes = [place for node, place in self._order.items() if node.meta.get("mutates")]

    def behind(self, layer: fx.Node, *, unary: Any, binary: Any = None) -> Chain:
        """What the kernel of a layer may take over.

        Args:
            layer: the node.
            unary: ``PostOp -> bool``: activations that the kernel can apply.
            binary: ``PostOp -> bool``: those that it can apply behind an addition; None = it cannot add.
        """
        nodes, other, post = [layer], None, NOTHING
        following = self._only_user(layer)
        if binary is not None and following is not None and (added := self._added(layer, following)) is not None:
            nodes.append(following)
            other = added
            following = self._only_user(following)
        applies = unary if other is None else binary
        if following is not None:
            found = post_op(self.module, following)
            if found is not None and applies is not None and applies(found):
                nodes.append(following)
                post = found
        while len(nodes) > 1 and self.disturbed(nodes):
            if nodes.pop() is not nodes[0] and len(nodes) == 1:
                other = None
            post = NOTHING
        return Chain(tuple(nodes), other, post)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _added(self, layer: fx.Node, node: fx.Node) -> fx.Node | None:
        """What ``node`` adds to the layer's result, of the same shape."""
        pair = addends(node)
        if pair is None or pair[0] is pair[1]:
            return None
        other = pair[1] if pair[0] is layer else pair[0]
        if self.shapes.get(layer.name) is None or self.shapes.get(other.name) != self.shapes[layer.name]:
            return None
        # The sum may have been written into what is added, if nobody notices that it no longer is.
        written = node.meta.get("mutates") and pair[0] is not layer
        return None if written and not self._spent(other, node) else other

    def _spent(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether a node makes a tensor of its own that nobody reads after ``at``."""
        if node.op != "call_module" or node.meta.get("mutates"):
            return False
        fresh = isinstance(submodule(self.module, str(node.target)), FRESH)
        return fresh and all(self._order.get(user, -1) <= self._order[at] for user in node.users)

    def disturbed(self, nodes: list[fx.Node]) -> bool:
        """Whether something writes into a tensor between the first and the last node: the kernel runs at the last."""
        first, last = self._order[nodes[0]], self._order[nodes[-1]]
        own = {self._order[node] for node in nodes}
        between = self._writes[bisect_right(self._writes, first) : bisect_right(self._writes, last)]
        return any(place not in own for place in between)
