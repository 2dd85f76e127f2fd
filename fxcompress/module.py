"""The GraphModule that fxcompress hands out: an ordinary one, whose copies and pickles keep all of it."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import operator
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.arguments import mapped
from fxcompress.errors import GraphError, InputError
from fxcompress.lower.flat import FLAT, flattened

MASKS = "_masks"
#: What a module holds, by the names of its attributes.
_HELD = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training")


class OwnedGraph(fx.Graph):
    """A graph that does not keep the module alive that it belongs to.

    In torch.fx each keeps the other, so that a module nobody wants any more, with all its weights, stays until the
    garbage collector looks at the oldest things there are.
    """

    _owner: weakref.ref[fx.GraphModule] | None = None

    @property
    def owning_module(self) -> fx.GraphModule | None:
        """The module that runs the graph, while there is one."""
        return None if self._owner is None else self._owner()

    @owning_module.setter
    def owning_module(self, mod: fx.GraphModule | None) -> None:
        self._owner = None if mod is None else weakref.ref(mod)

    def eliminate_dead_code(self, is_impure_node: Callable[[fx.Node], bool] | None = None) -> bool:
        """Remove what nobody reads; whether there was anything. Who says what stays says it of a graph in order, which
        torch.fx checks node by node before it starts (that takes as long as everything else here)."""
        if is_impure_node is None:
            return super().eliminate_dead_code()
        before = len(self.nodes)
        for node in reversed(self.nodes):
            if not node.users and not is_impure_node(node):
                self.erase_node(node)
        return len(self.nodes) < before


class TracedModule(fx.GraphModule):
    """A model as a graph over the caller's own modules and ``state_dict`` keys.

    ``meta`` holds what is known about it: ``history`` (the passes that ran), ``batched`` (names of the inputs whose
    dimension 0 is the batch), ``opaque`` and ``unreached`` (names of modules).

    Pickling a plain GraphModule traces its generated code again, which loses in-place writes and ``node.meta``
    (measured; design 15); this one stores the nodes.
    """

    @classmethod
    def build(cls, tree: nn.Module, graph: fx.Graph, meta: dict[str, Any], *, waiting: bool = False) -> TracedModule:
        """A module that runs ``graph`` over the submodules, parameters and buffers of ``tree`` (taken, not copied)."""
        token = _EMPTY.set(True)  # the empty graph never runs
        made = cls(nn.Module(), OwnedGraph())
        _EMPTY.reset(token)
        if waiting:
            made.wait()
        for name in _HELD:
            made.__dict__[name] = tree.__dict__[name]
        made.meta = meta
        made.graph = graph
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        tree = nn.Module()
        for name in _HELD:
            value = self.__dict__[name]
            children = name == "_modules"
            tree.__dict__[name] = _copy_children(value, memo) if children else copy.deepcopy(value, memo)
        made = TracedModule.build(tree, copy_graph(self.graph), copy.deepcopy(self.meta, memo))
        memo[id(self)] = made
        return made

    def __copy__(self) -> TracedModule:
        tree = nn.Module()
        for name in _HELD:
            tree.__dict__[name] = copy.copy(self.__dict__[name])
        return TracedModule.build(tree, copy_graph(self.graph), dict(self.meta))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            InputError: the call has other arguments than the example inputs had, which alone the graph knows.
        """
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            problem = None if torch.compiler.is_compiling() else self._misfit(args, kwargs)
            if problem is None:
                raise
        raise InputError(problem)

    def _misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What is wrong with the arguments of a call; None if they are those that the graph has."""
        nodes = self.graph.find_nodes(op="placeholder")
        parameters = [
            inspect.Parameter(
                str(node.target),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=node.args[0] if node.args else inspect.Parameter.empty,
            )
            for node in nodes
        ]
        try:
            inspect.Signature(parameters).bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(str(node.target) for node in nodes)
            return (
                f"the traced model's inputs do not fit the call: {error}; expected {names}, which the example inputs "
                "held when it was traced. An input that they left out keeps its default and is none of the graph's: "
                "trace the model again with all of them in example_inputs."
            )
        return None

    def recompile(self) -> Any:
        """Make code of the graph; while the module is waiting, only when it is called."""
        if self.__dict__.get("_waiting") or _EMPTY.get():
            type(self).forward = _compile_and_run
            return None
        made = super().recompile()
        flat = flattened(self) if self.__dict__.get("meta", {}).get(FLAT) else None
        if flat is not None:
            self.__dict__["_flat"] = flat  # of the instance: a class would keep the layers alive
            type(self).forward = _runs_flat(type(self).forward)
            del type(self).__call__  # torch.fx's, which explains errors in the code that it made
        return made

    def wait(self) -> None:
        """Make no code of the graph from now on: between two passes it mostly does not run."""
        self.__dict__["_waiting"] = True

    def ready(self) -> None:
        """Make code of the graph again, now and whenever it changes: somebody may look at it."""
        if self.__dict__.pop("_waiting", False):
            self.recompile()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in ``nn.Module``, but a masked module refuses other masks than its own.

        Masks decide more of the graph than their buffers hold (which channels statistics run over).

        Raises:
            InputError: ``state_dict`` holds masks that differ.
        """
        for name, buffer in self.named_buffers():
            given = state_dict.get(name) if name.startswith(f"{MASKS}.") else None
            if given is not None and not torch.equal(given.to(buffer.device), buffer):
                raise InputError(
                    f"{name} in the state_dict differs from this module's mask; expected the same masks, because they "
                    "are part of the graph. Copy or pickle the masked module itself, or prune again with them."
                )
        return super().load_state_dict(state_dict, strict, assign)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        tree = nn.Module()
        for name in _HELD:
            tree.__dict__[name] = self.__dict__[name]
        return _rebuild, (tree, [_Record.of(node) for node in self.graph.nodes], self.meta)


#: While a module is made of an empty graph.
_EMPTY = ContextVar("empty", default=False)


def _runs_flat(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module that runs as a flat function, with the signature of the one that torch.fx made."""

    @functools.wraps(forward)
    def run(module: TracedModule, /, *args: Any, **kwargs: Any) -> Any:
        return module.__dict__["_flat"](*args, **kwargs)

    return run


def _compile_and_run(module: TracedModule, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose graph has no code yet."""
    fx.GraphModule.recompile(module)
    return type(module).forward(module, *args, **kwargs)


#: Kinds of tables that every module has, most of them empty.
_TABLES = frozenset((dict, OrderedDict, set))
#: What a copy of a module may share with the original.
_IMMUTABLE = frozenset((int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type))


def copied(model: nn.Module, *, plainly: bool = False) -> nn.Module:
    """A deep copy; tensors that hooks compute from parameters (pruned, weight-normalised) are copied by value.

    What ``copy.deepcopy`` gives, several times as fast: a model is mostly empty dictionaries of hooks. ``plainly``
    leaves it to ``copy.deepcopy``, for checks of what the fast way gave.
    """
    memo: dict[int, Any] = {}
    for module in modules_of(model).values():
        for name in own_attributes(module):
            value = vars(module)[name]
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    if plainly:
        return copy.deepcopy(model, memo)
    state = list(state_of(model).values())
    storages = Counter(_storage(tensor) for tensor in state)
    for tensor in state:
        # What shares its storage, or does not fill it, is for deepcopy, which knows and is slow.
        if storages[_storage(tensor)] == 1 and tensor.is_contiguous() and not vars(tensor):
            if type(tensor) is nn.Parameter:
                memo[id(tensor)] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            elif type(tensor) is torch.Tensor and not tensor.requires_grad:
                memo[id(tensor)] = tensor.clone()
    return _copy_module(model, memo)


def _storage(tensor: torch.Tensor) -> int:
    """Which storage a tensor is in; a number of its own for one without."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else -id(tensor)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    kind: Any = type(module)
    if hasattr(kind, "__deepcopy__") or kind.__reduce_ex__ is not object.__reduce_ex__ or _keeps_state(kind):
        return copy.deepcopy(module, memo)
    made: nn.Module = kind.__new__(kind)
    memo[id(module)] = made
    attributes = vars(made)
    for key, value in vars(module).items():
        if type(value) in _TABLES and not value and key in _STANDARD:  # others may be shared, or known to somebody
            attributes[key] = type(value)()
        elif type(value) in _IMMUTABLE or _is_immutable_tuple(value):
            attributes[key] = value
        elif key in ("_parameters", "_buffers"):
            attributes[key] = type(value)((name, _copy_tensor(tensor, memo)) for name, tensor in value.items())
        elif key == "_modules":
            attributes[key] = _copy_children(value, memo)
        else:
            attributes[key] = copy.deepcopy(value, memo)
    return made


def _is_immutable_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in _IMMUTABLE for item in value)


def _copy_children(modules: dict[str, nn.Module | None], memo: dict[int, Any]) -> dict[str, nn.Module | None]:
    copies = ((name, child if child is None else _copy_module(child, memo)) for name, child in modules.items())
    return type(modules)(copies)


def _copy_tensor(tensor: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    known: torch.Tensor | None = memo.get(id(tensor))
    return copy.deepcopy(tensor, memo) if known is None else known


@functools.cache
def _keeps_state(kind: Any) -> bool:
    """Whether a class outside torch has its own idea of what its state is."""
    return any(
        name in vars(base)
        for base in kind.__mro__
        if not base.__module__.startswith("torch.nn.modules") or issubclass(base, nn.RNNBase)
        for name in ("__getstate__", "__setstate__", "__reduce__", "__copy__", "__getnewargs__")
        if base is not object
    )


def submodule(module: nn.Module, name: str) -> nn.Module:
    """``module.get_submodule(name)``, several times as fast."""
    for part in name.split(".") if name else ():
        found = module._modules.get(part)
        if found is None:
            raise GraphError(f"there is no module {name!r}: nothing called {part!r} in a {type(module).__name__}.")
        module = found
    return module


def owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return submodule(module, path), leaf


#: What every module has, empty or not: its tables, its hooks and its mode.
_STANDARD = frozenset(vars(nn.Module()))


def own_attributes(module: nn.Module) -> set[str]:
    """Names of the attributes that a module has beyond those of every module."""
    return vars(module).keys() - _STANDARD


def modules_of(module: nn.Module, *, every_name: bool = False) -> dict[str, nn.Module]:
    """``dict(module.named_modules())``, without its generators inside generators.

    Args:
        module: the root.
        every_name: a module that has several names is listed under all of them, not only the first.
    """
    found: dict[str, nn.Module] = {"": module}
    _add_children(module, "", found, None if every_name else {id(module)})
    return found


def _add_children(module: nn.Module, prefix: str, found: dict[str, nn.Module], seen: set[int] | None) -> None:
    """Note every module below one, before its own children; those in ``seen`` not again."""
    for key, child in module._modules.items():
        if child is None:
            continue
        if seen is not None:
            if id(child) in seen:
                continue
            seen.add(id(child))
        name = prefix + key
        found[name] = child
        if child._modules:
            _add_children(child, f"{name}.", found, seen)


def state_of(module: nn.Module, *, every_name: bool = False) -> dict[str, torch.Tensor]:
    """All parameters, then all buffers, by name; tied ones under their first name, or ``every_name``."""
    modules = modules_of(module, every_name=every_name).items()
    parameters = [(name, item._parameters) for name, item in modules if item._parameters]
    buffers = [(name, item._buffers) for name, item in modules if item._buffers]
    found: dict[str, torch.Tensor] = {}
    for tables in (parameters, buffers):
        seen: set[int] = set()
        for name, own in tables:
            for key, tensor in own.items():
                if tensor is not None and (every_name or id(tensor) not in seen):
                    seen.add(id(tensor))
                    found[f"{name}.{key}" if name else key] = tensor
    return found


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; every submodule's mode as before afterwards."""
    modes = [(vars(item), item.training) for item in modules_of(module).values()]
    for attributes, _ in modes:
        attributes["training"] = False
    try:
        yield
    finally:
        for attributes, mode in modes:
            attributes["training"] = mode


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph, node names and meta kept."""
    made = OwnedGraph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        twin = made.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, twins.__getitem__),
            fx.map_arg(node.kwargs, twins.__getitem__),
            node.name,
        )
        twin.meta = dict(node.meta)
        twins[node] = twin
    return made


@dataclass(frozen=True)
class _Reference:
    name: str


@dataclass(frozen=True)
class _Record:
    """One node, without the graph around it."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> _Record:
        target = _qualified(node.target) if node.op == "call_function" else node.target
        return cls(
            node.name, node.op, target, mapped(_refer, node.args), mapped(_refer, dict(node.kwargs)), dict(node.meta)
        )


def _refer(value: Any) -> Any:
    return _Reference(value.name) if isinstance(value, fx.Node) else value


def _qualified(target: Any) -> tuple[str, str] | Any:
    """Where to import a function from, where pickle itself does not know it."""
    name = getattr(target, "__name__", "")
    for place in (torch, torch.nn.functional, torch.special, torch.fft, torch.linalg, operator):
        if getattr(place, name, None) is target:
            return (place.__name__, name)
    return target


def _find(target: Any) -> Any:
    if not isinstance(target, tuple):
        return target
    place, name = target
    parts = place.split(".")
    found: Any = importlib.import_module(parts[0])
    for part in parts[1:]:
        found = getattr(found, part)
    return getattr(found, name)


def _rebuild(tree: nn.Module, records: list[_Record], meta: dict[str, Any]) -> TracedModule:
    graph = OwnedGraph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for record in records:
        target = _find(record.target) if record.op == "call_function" else record.target
        args, kwargs = mapped(resolve, record.args), mapped(resolve, record.kwargs)
        node = graph.create_node(record.op, target, args, kwargs, record.name)
        node.meta = dict(record.meta)
        nodes[record.name] = node
    return TracedModule.build(tree, graph, meta)
