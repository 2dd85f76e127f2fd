"""Sending labels through a model: an interpreter over the graph that watches ATen operators go by."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxcompress.arguments import leaves
from fxcompress.channels.labels import Labels, dims_of, labels_in
from fxcompress.channels.ledger import Kind, Ledger
from fxcompress.channels.operators import is_pointwise, operator_name, read_arguments, rule_for
from fxcompress.channels.recurrence import operator_overload, read_function, read_layer
from fxcompress.channels.rules import Call, Rule
from fxcompress.channels.stand_ins import stand_in
from fxcompress.inputs import Inputs, positional, tensors_in
from fxcompress.layers import understood
from fxcompress.module import TracedModule, evaluating, state_of, submodule
from fxcompress.nodes import batch_norm_factor
from fxcompress.outputs import tensors_of
from fxcompress.quantization.fake_quantize import FakeQuantize, fake_quant_of
from fxcompress.recurrent import GATES, operator_of


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
OUTPUT = "it is an output of the model"
WHOLE = "is one operator with all its channels"


#: Operators with something to say about tensors without labels.
_MAKES_LABELS = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty expand".split())


#: Operators whose result is no constant although it depends on no input.
_RANDOM = frozenset("rand randn randint randperm bernoulli".split())


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

    def __init__(self, ledger: Ledger, observer: Observer | None, *, computes: bool) -> None:
        super().__init__()
        self.ledger = ledger
        self.observer = observer
        self.computes = computes
        self.table: dict[int, tuple[weakref.ref[Tensor], Labels]] = {}  # an id may be used again
        self.parameters: dict[int, str] = {}
        self.quantized: dict[int, Tensor] = {}
        self.values_only = True
        self.moves_only = True
        self.finite = False
        self.fixed = False  # the running node reads parameters, buffers and literals alone: no size, no input
        self.asleep = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is ever compiled; guarding against that would double the price of an operator."""
        return False

    def of(self, tensor: Tensor) -> Labels:
        """A tensor's labels; one that no operator made is made of numbers in the code (``x[:, [0, 2]]``)."""
        found = self.table.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else Labels(tuple(tensor.shape), const=True)

    def varies(self, value: Any) -> None:
        """Note that the tensors in a value depend on the inputs, and have no channels that are known."""
        for tensor in tensors_in(value):
            self.label(tensor, Labels(tuple(tensor.shape)))

    def label(self, tensor: Tensor, labels: Labels) -> None:
        self.table[id(tensor)] = weakref.ref(tensor), labels

    def name_of(self, tensor: Tensor) -> str | None:
        return self.parameters.get(id(tensor))

    def relabel(self, tensor: Tensor, labels: Labels) -> bool:
        if id(tensor) not in self.parameters:
            return False
        self.label(tensor, labels)
        if id(tensor) in self.quantized:
            return self.relabel(self.quantized[id(tensor)], labels)
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.asleep or func.namespace == "prim" or _restrides(func, args):
            return func(*args, **kwargs)
        name, inplace = operator_name(func)
        result = None
        if not self.computes:
            result = stand_in(name, args, self.of, inplace=inplace, pointwise=is_pointwise(func, name))
        if result is None:
            result = func(*args, **kwargs)
        self.moves_only = self.moves_only and name in _MOVES and not inplace
        self.asleep = True
        try:
            self._apply(func, name, inplace, read_arguments(func, args, kwargs), result)
        finally:
            self.asleep = False
        return result

    def ran(self, name: str, arguments: dict[str, Any], results: list[Any]) -> None:
        """Label the results of a recurrent operator, which no dispatch mode sees as what it is."""
        self.moves_only = False
        self.asleep = True
        try:
            self._apply(operator_overload(name), name, False, arguments, results)
        finally:
            self.asleep = False

    def _apply(self, func: Any, name: str, inplace: bool, arguments: dict[str, Any], result: Any) -> None:
        if name in _SINGULAR and not self.finite:
            risky = list(arguments.values())[_SINGULAR[name] :]
            if any(isinstance(tensor, Tensor) and self.of(tensor).factors for tensor in risky):
                self.ledger.live_only.add(self.ledger.node)  # 0 / 0 on a dead channel would poison its consumers
        tensors = _tensors(arguments)
        labels = [self.of(tensor) for tensor in tensors]
        const = all(item.const for item in labels)
        call = Call(
            name,
            func,
            arguments,
            result,
            self.ledger,
            self.of,
            self.relabel,
            self.name_of,
            self.values_only,
            tensors,
            const,
        )
        rule = rule_for(func, name, arguments)
        before = self.of(tensors[0]) if inplace else None
        if rule is None:
            for tensor in tensors:
                self.ledger.freeze(self.of(tensor).factors, f"nothing is known about {func._schema.name}")
            made: Any = None
        elif name in _MAKES_LABELS or any(item.factors for item in labels):
            made = rule(call)
        else:
            made = None
        self._assign(call, result, made, inplace=inplace)
        if self.observer is not None:
            self.observer.called(call, rule, inplace)
        if before is not None:
            self._written(before, tensors[0])

    def _assign(self, call: Call, result: Any, made: Any, *, inplace: bool) -> None:
        results = (
            [result] if isinstance(result, Tensor) else list(result or ()) if isinstance(result, (tuple, list)) else []
        )
        const = call.const and call.name not in _RANDOM
        fixed = const and self.fixed and not inplace  # integers may become an index, which must be known
        labels = made if isinstance(made, list) else [made]
        labels = (labels + [None] * len(results))[: len(results)]
        for tensor, item in zip(results, labels, strict=True):
            if not isinstance(tensor, Tensor):
                continue
            if item is None:
                item = Labels(tuple(tensor.shape), (), const if tensor.is_floating_point() else fixed)
            elif fixed and not tensor.is_floating_point() and not call.tensors:
                item = replace(item, const=True)  # made of one number
            self.label(tensor, item)

    def _written(self, before: Labels, target: Tensor) -> None:
        """A write into a tensor that others may see: what it did not know before is frozen."""
        if id(target) in self.parameters:
            self.ledger.freeze(self.of(target).factors, "the forward writes into it")
        if before.const and not self.of(target).const:
            self._varied(target)
        known = [set(dims_of(factor)) for factor in before.factors]
        for factor in self.of(target).factors:
            if not any(set(dims_of(factor)) <= dims for dims in known):
                self.ledger.freeze([factor], "it is written into a tensor without channels of its own")

    def _varied(self, written: Tensor) -> None:
        """What shares the memory of a tensor that was written into is no constant any more."""
        memory = written.untyped_storage()._cdata
        for found, labels in list(self.table.values()):
            tensor = found()
            if labels.const and tensor is not None and tensor.untyped_storage()._cdata == memory:
                self.label(tensor, replace(labels, const=False))


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def _restrides(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call only rewrites the strides of dimensions of size 1 (pooling does, to keep a memory format)."""
    if func is not torch.ops.aten.as_strided_.default:
        return False
    tensor, size, stride = args[:3]
    moved = any(n > 1 and old != new for n, old, new in zip(size, tensor.stride(), stride, strict=False))
    return list(size) == list(tensor.shape) and not moved


class _Interpreter:
    """Runs a graph node by node and notes what labels every value carries; values are freed after their last use."""

    def __init__(self, module: TracedModule, watch: _Watch, opaque: Iterable[str]) -> None:
        self.module, self.watch, self.opaque = module, watch, frozenset(opaque)
        self.values: dict[str, Any] = {}
        self.moves: set[str] = set()
        self.fixed: set[fx.Node] = set()  # whose value follows from parameters, buffers and literals
        self.weights: dict[str, Tensor] = {}  # fake-quantized ones, whose labels their readers may still change

    def run(self, inputs: Sequence[Any]) -> None:
        given = iter(inputs)
        results: dict[fx.Node, Any] = {}
        last = {source: node for node in self.module.graph.nodes for source in node.all_input_nodes}
        for node in self.module.graph.nodes:
            self.watch.ledger.node = node.name
            if node.op == "placeholder":
                result = next(given)
                self.watch.varies(result)
            elif node.op == "get_attr":
                result = self._attribute(str(node.target))
                self.fixed.add(node)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], results.__getitem__)
                self._finish(result)
            else:
                result = self._call(node, results.__getitem__)
            self._settle(node, result)
            results[node] = result
            for source in node.all_input_nodes:
                if last[source] is node:
                    del results[source]

    def _call(self, node: fx.Node, fetch: Callable[[fx.Node], Any]) -> Any:
        watch = self.watch
        args, kwargs = fx.map_arg(node.args, fetch), fx.map_arg(node.kwargs, fetch)
        watch.values_only = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        watch.moves_only = True
        watch.fixed = self.fixed.issuperset(node.all_input_nodes)
        watch.finite = self._is_finite(node)
        recurrence = self._recurrence(node, args, kwargs)
        reason = "" if recurrence else self._closed(node)
        watch.asleep = bool(recurrence or reason)
        try:
            if node.op == "call_module":
                result = submodule(self.module, str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                result = node.target(*args, **kwargs)
        finally:
            watch.asleep = False
        if watch.finite and isinstance(result, Tensor):
            self._keep_direct(node, result, args[0])
        if recurrence:
            watch.ran(*recurrence, pytree.tree_leaves(result))
        if reason:
            self._freeze(node, reason)
            self.watch.varies(result)
            if watch.observer is not None:
                watch.observer.closed([fetch(source) for source in node.all_input_nodes])
        if watch.moves_only:
            self.moves.add(node.name)
        if watch.fixed or isinstance(result, (torch.device, torch.dtype)):
            self.fixed.add(node)
        return result

    def _attribute(self, name: str) -> Any:
        path, _, leaf = name.rpartition(".")
        return getattr(submodule(self.module, path), leaf)

    def _finish(self, result: Any) -> None:
        for _, tensor in tensors_of(result):
            self.watch.ledger.freeze(self.watch.of(tensor).factors, OUTPUT)

    def _settle(self, node: fx.Node, result: Any) -> None:
        if self.watch.ledger.has_own_copies():
            self.watch.asleep = True
            for tensor in tensors_in(result):
                self._count_copies(node, tensor)
            self.watch.asleep = False
        self.values[node.name] = self._describe(result)

    def _count_copies(self, node: fx.Node, tensor: Tensor) -> None:
        """Of the copies that a node made, those stay channels of which it says itself, by a literal, how many."""
        ledger, labels = self.watch.ledger, self.watch.of(tensor)
        copies = [factor for factor in labels.factors if ledger.copies_of(factor) == node.name]
        if not self.watch.moves_only:
            ledger.freeze(copies, "it has met copies, of which there are as many as an operator makes")
            return
        sizes = leaves(node.args[1:]) if node.target == "expand" else []
        fixed = [factor for factor in copies if len(sizes) < factor.dim() or type(sizes[dims_of(factor)[0]]) is not int]
        kept = tuple(factor for factor in labels.factors if not any(factor is item for item in fixed))
        self.watch.label(tensor, replace(labels, factors=kept))

    def _recurrence(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any]] | None:
        """The recurrent operator that a node runs, and its arguments."""
        if node.op == "call_function":
            return read_function(getattr(node.target, "__name__", ""), args, kwargs)
        if node.op != "call_module" or str(node.target) in self.opaque:
            return None
        return read_layer(submodule(self.module, str(node.target)), args, kwargs)

    def _keep_direct(self, node: fx.Node, result: Tensor, given: Any) -> None:
        """A fake-quantized parameter is as zero as the parameter where that is masked, and stands for it."""
        watch = self.watch
        if watch.of(given).direct and result is not given:
            watch.label(result, replace(watch.of(result), direct=True))
            name = watch.name_of(given)
            if name is not None:
                watch.parameters[id(result)], watch.quantized[id(result)] = name, given
                self.weights[node.name] = result

    def _is_finite(self, node: fx.Node) -> bool:
        """Whether a node of ours never divides by what may be zero on a dead channel."""
        return node.target is batch_norm_factor or fake_quant_of(self.module, node) is not None

    def _closed(self, node: fx.Node) -> str:
        """Why labels do not enter a node's module or function; empty where they do."""
        if node.op == "call_function" and getattr(node.target, "__name__", "") in GATES:
            return f"{getattr(node.target, '__name__', '')} of a PackedSequence {WHOLE}"
        if node.op != "call_module":
            return ""
        if str(node.target) in self.opaque:
            return f"{node.target} is opaque and {WHOLE}"
        layer = submodule(self.module, str(node.target))
        if operator_of(layer):
            return f"{type(layer).__name__} of a PackedSequence {WHOLE}"
        if isinstance(layer, FakeQuantize):
            return ""
        return "" if understood(layer) else f"{type(layer).__name__} {WHOLE}"

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for labels in labels_in([self.values[source.name] for source in node.all_input_nodes]):
            self.watch.ledger.freeze(labels.factors, reason)
        if node.op == "call_module":
            for tensor in submodule(self.module, str(node.target)).parameters():
                self.watch.ledger.freeze(self.watch.of(tensor).factors, reason)

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.watch.of(value)
        if value is None or isinstance(value, (int, float, bool, str)):
            return value
        return pytree.tree_map(self._describe_leaf, value)

    def _describe_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.watch.of(leaf)
        return leaf if isinstance(leaf, (int, float, bool, str, type(None))) else None


def propagate(module: TracedModule, inputs: Inputs, observer: Observer | None = None) -> Facts:
    """Run a traced model on ``inputs`` in eval mode and follow every channel through it.

    Products are not computed: their values decide nothing, unless user code reads them (an opaque module), or an
    operator refuses the ones that stand in for them. The module's mode and buffers are as before afterwards. An
    observer is shown every operator with its labels.
    """
    if not module.meta["opaque"] and observer is None:
        try:
            return _propagate(module, inputs, None, computes=False)
        except Exception:  # noqa: BLE001 - whatever an operator raises over its operands' values
            pass
    return _propagate(module, inputs, observer, computes=True)


def _propagate(module: TracedModule, inputs: Inputs, observer: Observer | None, *, computes: bool) -> Facts:
    ledger = Ledger()
    watch = _Watch(ledger, observer, computes=computes)
    state = state_of(module)
    interpreter = _Interpreter(module, watch, module.meta["opaque"])
    before = []
    for name, tensor in state.items():
        ledger.node = name
        kind: Kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if kind == "buffer":
            before.append((tensor, tensor.clone()))
        factors = ledger.fresh(name, tensor.shape, kind) if tensor.is_floating_point() else ()
        watch.label(tensor, Labels(tuple(tensor.shape), factors, const=True, direct=True))
        watch.parameters[id(tensor)] = name
    try:
        with evaluating(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watch:
            interpreter.run(positional(module, inputs.map(Tensor.clone)))
    finally:
        for buffer, value in before:  # a forward may write into its buffers, BatchNorm without a new version
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # nor does this make one
    labels = {name: watch.of(tensor) for name, tensor in state.items()}
    values = interpreter.values
    values.update({name: watch.of(tensor) for name, tensor in interpreter.weights.items()})
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in labels:
            # A buffer that is written into after it was read was a constant then.
            values[node.name] = replace(labels[node.target], const=values[node.name].const)
    return Facts(ledger, values, labels, frozenset(interpreter.moves))
