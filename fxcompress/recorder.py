"""Recording a running forward, call by call, as an fx graph.

:class:`Recorder` is a torch function mode: while it is active every call that touches a tensor comes past it, runs for
real, and leaves a node behind. Control flow is not its business, because Python executes it.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import base_types as BASE_TYPES
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

from fxcompress.arguments import leaves, mapped
from fxcompress.callers import user_line
from fxcompress.errors import TraceError
from fxcompress.gradients import Detached, computing
from fxcompress.inputs import tensors_in
from fxcompress.modes import TrainingFlag, WhileTraining, with_mode
from fxcompress.module import OwnedGraph, state_of
from fxcompress.nodes import require_recorded
from fxcompress.outputs import making
from fxcompress.sizes import TRACED, Expression, TracedInt, plain

#: Calls whose *result* is decided by values, so that what Python does next cannot be recorded.
VALUE_READS = frozenset(
    """
    item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ equal allclose
    is_nonzero nonzero argwhere unique unique_consecutive masked_select bincount _pack_padded_sequence
    """.split()
)
_SIZES = frozenset(("size", "shape", "numel", "nelement"))
_SHAPED_LIKE = frozenset(("view_as", "reshape_as", "expand_as"))
_REFLECTED = frozenset(
    f"__r{name}__" for name in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
)
#: What makes a tensor of numbers in the code.
_FROM_DATA = frozenset(("tensor", "as_tensor", "asarray", "from_numpy"))
_RANDOM = frozenset(
    """
    rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal
    """.split()
)

#: Methods of Tensor by the id of their function: ``x ** 2`` comes past as a function called ``pow``, which it is not.
_METHODS = {id(getattr(Tensor, name)): name for name in dir(Tensor) if callable(getattr(Tensor, name))}

MODE_HOLDER = "_mode"
CONSTANTS = "_constants"


#: Why a forward cannot be recorded that reads values, or casts in places.
_VALUES = "What happens next depends on values, which a graph cannot express."
_DEVICES = ("cpu", "cuda")
_AUTOCAST = "A graph does not say where its operators cast (autocast around the call of the model works)."


class ValueReadError(Exception):
    """A tensor's value was read, or another thing was done that no graph says: the running submodule stays as it is."""

    def __init__(self, scope: str, what: str, line: str, why: str = _VALUES) -> None:
        super().__init__(f"{what} at {line}")
        self.scope, self.what, self.line, self.why = scope, what, line, why


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments, so that it must stay although nobody uses its result."""
    return bool(node.meta.get("mutates")) or node.op in ("placeholder", "output")


class Recorder(TorchFunctionMode):
    """Records what runs under it into :attr:`graph`.

    Args:
        model: the module that runs; its parameters and buffers become ``get_attr`` nodes.
        known: ids of tensors that existed before the run and may be recorded as constants.
        computes: layers compute what they make of activations; without, only its shape is right.
    """

    def __init__(self, model: nn.Module, known: frozenset[int], *, computes: bool = True) -> None:
        super().__init__()
        self.computes = computes
        self.graph: fx.Graph = OwnedGraph()
        self.detached = Detached(self.graph)
        self.plain: set[str] = set()  # scopes whose mode is an ordinary bool
        self.constants: dict[str, Tensor] = {}
        self.scopes: list[str] = [""]
        self.reached: set[str] = {""}
        self.quiet = 0
        self.known = known
        self.training = model.training
        self.cast = _autocast()
        self.branches: list[str] = []
        self.drawn: set[str] = set()  # generators other than torch's
        self.device: torch.device | None = None
        self._device_node: fx.Node | None = None
        self._first_input: fx.Node | None = None
        self._mode_node: fx.Node | None = None
        self._node_of: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}  # an id may be used again
        self._literals: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.inputs: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        self._dynamic: set[fx.Node] = set()
        self._attributes: dict[int, str] = {}
        self.state = state_of(model)
        for name, tensor in self.state.items():
            self._attributes.setdefault(id(tensor), name)

    # ---- what comes past -----------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.quiet:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return func(*args, **kwargs)  # what runs there says so itself
        if name in ("__get__", "__set__"):
            return self._property(func, args, is_set=name == "__set__")
        if name in _SIZES and args and isinstance(args[0], Tensor):
            return self._size(name, *args, **kwargs)
        if name in _SHAPED_LIKE:  # the sizes of another tensor are sizes like any other
            func = getattr(Tensor, name.removesuffix("_as"))
            return self.__torch_function__(func, types, (args[0], *self._size("shape", args[1])))
        if name == "scaled_dot_product_attention" and self.training and kwargs.get("dropout_p"):
            # Written ``p if self.training else 0``: the branch was taken, the mode must stay a switch.
            kwargs = {**kwargs, "dropout_p": WhileTraining(float(kwargs["dropout_p"]), training=True)}
        if name == "view" and not isinstance(args[1], torch.dtype):
            func, name = (
                Tensor.reshape,
                "reshape",
            )  # masking and removal change strides; where it can, this is a view
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._index(args[1], args[0].device), *args[2:])
        if self.scopes[-1] in self.plain:
            args, kwargs = with_mode(func, args, kwargs, self.training)
        tensors = list(tensors_in((args, kwargs)))
        if name in _FROM_DATA and not tensors and not _is_traced((args, kwargs)):
            made = func(*args, **kwargs)
            if not made.is_floating_point() and not made.is_complex():
                return self._constant(made)  # positions, which are rewritten when channels go
        if self._reads_values(name, args, kwargs) and any(map(self._is_dynamic, tensors)):
            raise ValueReadError(self.scopes[-1], f"{name.strip('_')}() reads the values of a tensor", user_line())
        return self.record(func, name, args, kwargs, tensors)

    def record(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: list[Tensor],
        module: str | None = None,
        trains: bool = False,
    ) -> Any:
        """Run one call and leave a node for it (``module``: of a leaf module, which ``trains`` parameters)."""
        self.quiet += 1  # nothing that is read or run from here on is the user's
        try:
            self.detached.look()
            if _autocast() != self.cast:
                raise ValueReadError(self.scopes[-1], "autocast is switched inside the forward", user_line(), _AUTOCAST)
            versions = [tensor._version for tensor in tensors]
            nodes = self.argument(args), self.argument(dict(kwargs))
            if kwargs or not all(isinstance(arg, Tensor) for arg in args):
                args, kwargs = pytree.tree_map(_concrete, (args, dict(kwargs)), is_leaf=_is_number)
            with computing(), _pop_mode_temporarily() if module is not None else nullcontext():
                result = func(*args, **kwargs)  # where it is a function, torch has taken this mode off
            written = any(tensor._version != version for tensor, version in zip(tensors, versions, strict=True))
            if not written and not _has_tensor(result):
                return result
            if module is not None:
                node = self.graph.create_node("call_module", module, *nodes)
            else:
                node = self._call(func, name, *nodes)
            node.meta["scope"], node.meta["source"] = self.scopes[-1], user_line()
            if written:
                node.meta["mutates"] = True
            if name in _RANDOM or any(source in self._dynamic for source in node.all_input_nodes):
                self._dynamic.add(node)
            inputs = {id(tensor) for tensor in tensors}
            if not trains:
                self.detached.made(node)
            return self._bind(result, node, inputs, fresh=not written)
        finally:
            self.quiet -= 1

    def _call(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> fx.Node:
        if name in _REFLECTED:
            forward = "__truediv__" if name == "__rdiv__" else f"__{name[3:]}"
            return self.graph.call_function(getattr(operator, forward), (args[1], args[0]))
        name = _METHODS.get(id(func), name)
        if id(func) in _METHODS or getattr(func, "__objclass__", None) is torch._C.TensorBase:
            if name.startswith("__") and hasattr(operator, name):
                return self.graph.call_function(getattr(operator, name), args, kwargs)
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _property(self, func: Any, args: tuple[Any, ...], *, is_set: bool) -> Any:
        name = func.__self__.__name__
        if is_set and name != "requires_grad":
            raise ValueReadError(self.scopes[-1], f"assigning to .{name} of a tensor", user_line())
        if is_set:
            return func(*args)
        if name == "shape":
            return self._size("shape", args[0])
        return self.record(getattr, "getattr", (args[0], name), {}, [args[0]])

    def _index(self, value: Any, device: torch.device) -> Any:
        """An index with constants in place of arrays and of sequences of numbers."""
        items = value if isinstance(value, tuple) else (value,)
        made = tuple(self._positions(item, device) if _lists_positions(item) else item for item in items)
        return made if isinstance(value, tuple) else made[0]

    def _positions(self, listed: Any, device: torch.device) -> Tensor:
        found = np.asarray(listed)
        if found.dtype == bool and found.ndim == 1:
            (found,) = found.nonzero()
        return self._constant(torch.as_tensor(found, device=device))

    def _constant(self, tensor: Tensor) -> Tensor:
        """A tensor that is made of numbers in the code; what it holds now is what it is made of."""
        self._literals[id(tensor)] = tensor, tensor.clone(), tensor._version
        return tensor

    def _reads_values(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if name in VALUE_READS:
            return True
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            return len(args) > 1 and isinstance(args[1], Tensor)
        if name == "__getitem__":
            return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in pytree.tree_leaves(args[1]))
        return False

    def _size(self, name: str, tensor: Tensor, dim: int | None = None) -> Any:
        node = self.node(tensor)
        if node.op == "get_attr":
            return (
                tensor.numel() if name in ("numel", "nelement") else tensor.shape if dim is None else tensor.size(dim)
            )
        sizes = [TracedInt(size, Expression("size", node, d)) for d, size in enumerate(tensor.shape)]
        if name in ("numel", "nelement"):
            return TracedInt(tensor.numel(), Expression("numel", node))
        return torch.Size(sizes) if dim is None else sizes[dim]

    # ---- tensors, numbers and containers as fx arguments -----------------------------------------------------

    def placeholder(self, name: str, value: Any, optional: bool) -> fx.Node:
        """Declare one input of the graph; ``value`` may be any nest of tensors, and is the default of one without."""
        default = inspect.Signature.empty if not optional else None if _has_tensor(value) else value
        node = self.graph.placeholder(name, default_value=default)
        if isinstance(value, Tensor) and self._first_input is None:
            self._first_input, self.device = node, value.device
        self._dynamic.add(node)
        self._bind(value, node, set(), fresh=False)
        if not _has_tensor(value):
            guard = self.graph.call_function(require_recorded, (node, name, value))
            guard.meta["mutates"] = True  # it stays although nobody reads it
        self.inputs.update({self.node(tensor).name: tensor for tensor in tensors_in(value)})
        return node

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that produced ``tensor``; parameters, buffers and constants get one on first use."""
        known = self._node_of.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        name = self._attributes.get(id(tensor))
        if name is None:
            if id(tensor) not in self.known and id(tensor) not in self._literals:
                raise ValueReadError(self.scopes[-1], "a tensor appears that no recorded call made", user_line())
            key = f"c{len(self.constants)}"
            self.constants[key] = self._literals[id(tensor)][1] if id(tensor) in self._literals else tensor
            name = f"{CONSTANTS}.{key}"
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self._remember(tensor, node)
        return node

    def argument(self, value: Any) -> Any:
        """``value`` with its tensors and traced numbers replaced by nodes."""
        return mapped(self._argument, value)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.detached.entering(self.node(value), value)
        if isinstance(value, TRACED):
            return self._number(value)
        if isinstance(value, TrainingFlag):
            return self._training_node() if int(value) == self.training else int(value) != 0
        if isinstance(value, WhileTraining):
            return self.graph.call_function(operator.mul, (self._training_node(), value.probability))
        if isinstance(value, torch.device) and value == self.device:
            return self._device()
        if value is None or value is Ellipsis or isinstance(value, BASE_TYPES):
            return value
        if isinstance(value, torch.Generator):
            return None
        raise ValueReadError(self.scopes[-1], f"a {type(value).__name__} is passed to a tensor operation", user_line())

    def _number(self, number: Any) -> fx.Node:
        made = number.expression
        if made.node is None and isinstance(made.function, str):
            made.node = self._size_node(made)
        elif made.node is None:
            made.node = self.graph.call_function(made.function, tuple(map(self.argument, made.operands)))
            self._dynamic.add(made.node)
        node: fx.Node = made.node
        return node

    def _size_node(self, made: Expression) -> fx.Node:
        source, *dims = made.operands
        for user in source.users:
            if user.op == "call_method" and user.target == made.function and user.args == (source, *dims):
                known: fx.Node = user  # already asked for
                return known
        with self.graph.inserting_after(source):
            node = self.graph.call_method(str(made.function), (source, *dims))
        self._dynamic.add(node)
        return node

    def _training_node(self) -> fx.Node:
        if self._mode_node is None:
            holder = self.graph.create_node("get_attr", MODE_HOLDER)
            self._mode_node = self.graph.call_function(getattr, (holder, "training"))
        return self._mode_node

    def _device(self) -> fx.Node:
        if self._device_node is None:
            assert self._first_input is not None
            with self.graph.inserting_after(self._first_input):
                self._device_node = self.graph.call_function(getattr, (self._first_input, "device"))
        return self._device_node

    # ---- results ---------------------------------------------------------------------------------------------

    def _bind(self, value: Any, node: fx.Node, inputs: set[int], *, fresh: bool) -> Any:
        """Remember which node stands for every tensor in ``value``; return what the user's code gets."""
        if isinstance(value, Tensor):
            if not fresh and id(value) in inputs and self.detached.is_outside(self.node(value)):
                return value  # written into without gradients: it keeps its own
            if fresh and id(value) in inputs:
                # Handed back as it came (an Identity, or a dropout that is off): another object, so that later uses
                # of the input are not mistaken for uses of the output.
                value = value.detach()
            self._remember(value, self.detached.leaving(node, value))
            return value
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._bind_item(value, key, item, node, inputs)
            return value
        if isinstance(value, (tuple, list)):
            items = [self._bind_item(value, key, item, node, inputs) for key, item in enumerate(value)]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _bind_item(self, container: Any, key: Any, item: Any, node: fx.Node, inputs: set[int]) -> Any:
        if not _has_tensor(item):
            return item
        child = self.graph.call_function(operator.getitem, (node, key))
        child.meta["scope"], child.meta["source"] = node.meta.get("scope", ""), node.meta.get("source", "")
        if node in self._dynamic:
            self._dynamic.add(child)
        self.detached.part(node, child)
        return self._bind(item, child, inputs, fresh=True)

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._node_of[id(tensor)] = weakref.ref(tensor), node

    def depends_on_inputs(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of these tensors was made of the inputs (or of random numbers)."""
        return any(map(self._is_dynamic, tensors))

    def _is_dynamic(self, tensor: Tensor) -> bool:
        return self.node(tensor) in self._dynamic

    def output(self, value: Any) -> None:
        """Finish the graph with the forward's result and remove what nothing needs."""
        self.detached.look()
        self.graph.output(self._result(value))
        for tensor, made, version in self._literals.values():
            key = next((key for key, constant in self.constants.items() if constant is made), None)
            if tensor._version != version and key is not None:
                for node in self.graph.find_nodes(op="get_attr", target=f"{CONSTANTS}.{key}"):
                    self._made_anew(node)
        self.graph.eliminate_dead_code(is_impure_node=mutates)

    @property
    def literals(self) -> list[Tensor]:
        """The constants that are made of numbers in the code, in their order."""
        return [made for _, made, _ in self._literals.values()]

    def _made_anew(self, constant: fx.Node) -> None:
        """Let a forward that writes into a constant of its code write into a copy."""
        with self.graph.inserting_after(constant):
            copy = self.graph.call_method("clone", (constant,))
        constant.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)

    def _result(self, value: Any) -> Any:
        if hasattr(type(value), "__dataclass_fields__") or (isinstance(value, Mapping) and type(value) is not dict):
            return self._object(value)
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items_ = map(self._result, value)
            return type(value)(*items_) if hasattr(value, "_fields") else type(value)(items_)
        if isinstance(value, Mapping):
            return {key: self._result(item) for key, item in value.items()}
        try:
            return self.argument(value)
        except ValueReadError:
            raise TraceError(
                f"the model returns a {type(value).__name__}, which a graph cannot hold; expected tensors, numbers, "
                "tuples, lists, dicts or dataclasses of them. Have it left out (a cache of keys and values by "
                "use_cache=False in the call or the model's config), or return tensors and wrap them outside the model."
            ) from None

    def _object(self, value: Any) -> fx.Node:
        """A result of a class of its own, made by its class or, where that makes another thing of it, by copying."""
        made = making(value)
        if made is None:
            raise TraceError(
                f"the model returns a {type(value).__name__}, which neither its class makes of what it holds nor "
                "copy.copy; expected a class that does. Return a dict or a tuple and wrap it outside the model."
            )
        fields = getattr(type(value), "__dataclass_fields__", {})
        if made.kwargs is None:
            return self.graph.call_function(made.target, tuple(map(self._result, made.args)))
        found = {name: self._field(fields[name], item) for name, item in made.kwargs.items()}
        return self.graph.call_function(made.target, (), {k: item for k, item in found.items() if item is not None})

    def _field(self, field: dataclasses.Field[Any], value: Any) -> Any:
        """A field of a result; None, which is as good, for an optional one that a graph cannot hold."""
        try:
            return self._result(value)
        except TraceError:
            if field.default is not None:
                raise
            self.left_out[field.name] = type(value).__name__
            return None


def _lists_positions(item: Any) -> bool:
    """Whether an index is an array, or a sequence of numbers, which torch would make a tensor of."""
    if isinstance(item, (np.ndarray, range)):
        return True
    return isinstance(item, (list, tuple)) and bool(item) and all(type(number) in (int, bool) for number in item)


def _autocast() -> tuple[Any, ...]:
    """Whether operators cast what they are given, and to which dtype, on each kind of device that is usual."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if torch.is_autocast_enabled(kind))


def _is_traced(value: Any) -> bool:
    """Whether a number in it was computed from sizes."""
    return any(isinstance(leaf, TRACED) for leaf in leaves(value))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_has_tensor, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (torch.Size, slice))


def _concrete(value: Any) -> Any:
    if isinstance(value, TrainingFlag):
        return int(value) != 0
    if isinstance(value, WhileTraining):
        return float(value)
    if isinstance(value, torch.Size):
        return torch.Size(map(plain, value))
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return plain(value)
