"""Sending labels through a model: an interpreter over the graph that watches ATen operators go by."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.channels.labels import Labels, dims_of
from fxcompress.channels.ledger import Kind, Ledger
from fxcompress.channels.operators import operator_name, read_arguments, rule_for
from fxcompress.channels.rules import Call, Rule
from fxcompress.inputs import Inputs, positional
from fxcompress.layers import understood
from fxcompress.module import TracedModule, evaluating


@dataclass(frozen=True)
class Facts:
    """What one propagation found.

    Attributes:
        ledger: labels, equalities, freezes and constraints.
        values: for every node by name, its value with tensors replaced by their :class:`Labels` and numbers kept.
        state: labels of every parameter and buffer, by name.
        moves: names of the nodes that only rearrange elements.
    """

    ledger: Ledger
    values: dict[str, Any]
    state: dict[str, Labels]
    moves: frozenset[str]


_MOVES = frozenset(
    """
    view _unsafe_view reshape _reshape_alias expand permute transpose t numpy_T select slice split
    split_with_sizes unbind squeeze unsqueeze unfold roll flip repeat pixel_shuffle pixel_unshuffle
    channel_shuffle alias detach clone native_channel_shuffle narrow movedim contiguous index index_select
    constant_pad_nd chunk
    """.split()
)


#: Why nothing inside an opaque module, or a layer with an operator of its own, can be removed.
WHOLE = "is one operator with all its channels"


_RECURRENT = frozenset(f"{kind}{form}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("", "_cell"))


#: Operators with something to say about tensors without labels.
_MAKES_LABELS = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty expand".split())


#: Operators that are not finite, or have no finite gradient, at zero: from which of their arguments on.
_SINGULAR = {"div": 1, "fmod": 1, "remainder": 1} | dict.fromkeys(
    ("reciprocal", "rsqrt", "sqrt", "log", "log2", "log10", "pow"), 0
)


class Observer(Protocol):
    """What wants to see every operator go by, after its labels were found."""

    def called(self, call: Call, rule: Rule | None, inplace: bool) -> None:
        """An operator ran; ``rule`` is what gave its results their labels, None for an unknown one."""

    def closed(self, values: list[Any]) -> None:
        """A module ran whose inside nobody sees, on these values."""


class _Watch(TorchDispatchMode):
    """Gives every tensor that an operator makes its labels."""

    def __init__(self, ledger: Ledger, observer: Observer | None) -> None:
        super().__init__()
        self.ledger = ledger
        self.observer = observer
        self.table = WeakTensorKeyDictionary()
        self.parameters: dict[int, str] = {}
        self.values_only = True
        self.moves_only = True
        self.asleep = False

    def of(self, tensor: Tensor) -> Labels:
        found = self.table.get(tensor)
        return Labels(tuple(tensor.shape)) if found is None else found

    def relabel(self, tensor: Tensor, labels: Labels) -> bool:
        if id(tensor) not in self.parameters:
            return False
        self.table[tensor] = labels
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        silent = self.asleep or func.namespace == "prim" or _restrides(func, args)
        result = func(*args, **kwargs)
        if silent:
            return result
        name, inplace = operator_name(func)
        self.moves_only = self.moves_only and name in _MOVES and not inplace
        self.asleep = True
        try:
            self._apply(func, name, inplace, read_arguments(func, args, kwargs), result)
        finally:
            self.asleep = False
        return result

    def _apply(self, func: Any, name: str, inplace: bool, arguments: dict[str, Any], result: Any) -> None:
        risky = list(arguments.values())[_SINGULAR[name] :] if name in _SINGULAR else []
        if any(isinstance(tensor, Tensor) and self.of(tensor).factors for tensor in risky):
            self.ledger.live_only.add(self.ledger.node)  # 0 / 0 on a dead channel would poison its consumers
        call = Call(name, func, arguments, result, self.ledger, self.of, self.relabel, self.values_only)
        tensors = call.tensors()
        rule = rule_for(func, name, arguments)
        before = self.of(tensors[0]) if inplace else None
        if rule is None:
            for tensor in tensors:
                self.ledger.freeze(self.of(tensor).factors, f"nothing is known about {func._schema.name}")
            made: Any = [call.made(()) if isinstance(result, Tensor) else None]
        elif name in _MAKES_LABELS or any(self.of(tensor).factors for tensor in tensors):
            made = rule(call)
        else:
            made = None
        self._assign(call, result, made)
        if self.observer is not None:
            self.observer.called(call, rule, inplace)
        if before is not None:
            self._written(before, tensors[0])

    def _assign(self, call: Call, result: Any, made: Any) -> None:
        results = (
            [result] if isinstance(result, Tensor) else list(result or ()) if isinstance(result, (tuple, list)) else []
        )
        const = call.const() and call.name not in (
            "rand",
            "randn",
            "randint",
            "randperm",
            "bernoulli",
            "arange",
        )
        labels = made if isinstance(made, list) else [made]
        labels = (labels + [None] * len(results))[: len(results)]
        for tensor, item in zip(results, labels, strict=True):
            if isinstance(tensor, Tensor):
                self.table[tensor] = item if item is not None else Labels(tuple(tensor.shape), (), const)

    def _written(self, before: Labels, target: Tensor) -> None:
        """A write into a tensor that others may see: what it did not know before is frozen."""
        if id(target) in self.parameters:
            self.ledger.freeze(self.of(target).factors, "the forward writes into it")
        known = [set(dims_of(factor)) for factor in before.factors]
        for factor in self.of(target).factors:
            if not any(set(dims_of(factor)) <= dims for dims in known):
                self.ledger.freeze([factor], "it is written into a tensor without channels of its own")


def _restrides(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call only rewrites the strides of dimensions of size 1 (pooling does, to keep a memory format)."""
    if func is not torch.ops.aten.as_strided_.default:
        return False
    tensor, size, stride = args[:3]
    moved = any(n > 1 and old != new for n, old, new in zip(size, tensor.stride(), stride, strict=False))
    return list(size) == list(tensor.shape) and not moved


class _Interpreter(fx.Interpreter):
    def __init__(self, module: TracedModule, watch: _Watch, opaque: Iterable[str]) -> None:
        super().__init__(module)
        self.watch, self.opaque = watch, frozenset(opaque)
        self.values: dict[str, Any] = {}
        self.moves: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        watch = self.watch
        watch.ledger.node = n.name
        watch.values_only = all(user.target is operator.getitem and user.args[1] == 0 for user in n.users)
        watch.moves_only = True
        reason = self._closed(n)
        watch.asleep = bool(reason)
        try:
            result = super().run_node(n)
        finally:
            watch.asleep = False
        if reason:
            self._freeze(n, reason)
        if reason and watch.observer is not None:
            watch.observer.closed([self.env[source] for source in n.all_input_nodes])
        if n.op == "output":
            for labels in _labels_in(pytree.tree_map(self._describe, result)):
                watch.ledger.freeze(labels.factors, "it is an output of the model")
        if n.op in ("call_function", "call_method", "call_module") and watch.moves_only:
            self.moves.add(n.name)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and watch.of(tensor).copied:  # the next node is told its size by number
                watch.table[tensor] = replace(watch.of(tensor), copied=frozenset())
        self.values[n.name] = pytree.tree_map(self._describe, result)
        return result

    def _closed(self, node: fx.Node) -> str:
        """Why labels do not enter a node's module; empty where they do."""
        if getattr(node.target, "__name__", "") in _RECURRENT:
            return f"{getattr(node.target, '__name__', '')} {WHOLE}"
        if node.op != "call_module":
            return ""
        if str(node.target) in self.opaque:
            return f"{node.target} is opaque and {WHOLE}"
        layer = self.fetch_attr(str(node.target))
        return "" if understood(layer) else f"{type(layer).__name__} {WHOLE}"

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for labels in _labels_in([self.values[source.name] for source in node.all_input_nodes]):
            self.watch.ledger.freeze(labels.factors, reason)
        for tensor in self.fetch_attr(str(node.target)).parameters() if node.op == "call_module" else ():
            self.watch.ledger.freeze(self.watch.of(tensor).factors, reason)

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.watch.of(value)
        return value if isinstance(value, (int, float, bool, str, type(None))) else None


def _labels_in(value: Any) -> list[Labels]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Labels)]


def propagate(module: TracedModule, inputs: Inputs, observer: Observer | None = None) -> Facts:
    """Run a traced model on ``inputs`` in eval mode and follow every channel through it.

    The module's mode and buffers are as before afterwards. An observer is shown every operator with its labels.
    """
    ledger = Ledger()
    watch = _Watch(ledger, observer)
    state = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in state:
        ledger.node = name
        kind: Kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        factors = ledger.fresh(name, tensor.shape, kind) if tensor.is_floating_point() else ()
        watch.table[tensor] = Labels(tuple(tensor.shape), factors, const=True, direct=True)
        watch.parameters[id(tensor)] = name
    interpreter = _Interpreter(module, watch, module.meta["opaque"])
    fresh = inputs.map(Tensor.clone)
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    with evaluating(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watch:
        interpreter.run(*positional(module, fresh))
    for buffer, version, value in before:  # a forward may write into its buffers
        if buffer._version != version:
            buffer.copy_(value)
    labels = {name: watch.of(tensor) for name, tensor in state}
    values = interpreter.values
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in labels:
            values[node.name] = labels[node.target]
    return Facts(ledger, values, labels, frozenset(interpreter.moves))
