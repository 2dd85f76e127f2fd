"""A flat function for inputs like earlier ones, run without Python.

A call of a small kernel costs as much to describe as to run, a third of it in Python. Between inputs of the same
shapes nothing differs but values: what one call ran (:mod:`fxcompress.lower.recording`) is what the next one runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from fxcompress.lower.recording import Recording, record

Key = tuple[Any, ...]
Table = Mapping[str, Tensor | None]

#: Recordings that a module makes in its life, and shapes that it remembers to have seen once.
MOST, SEEN = 64, 256
_DTYPES = frozenset(
    getattr(torch, name) for name in "float64 float32 bfloat16 float16 int64 int32 int16 int8 uint8 bool".split()
)
_PLAIN = frozenset((bool, int, str, type(None)))
#: Packages whose functions hold no state of their own.
_PACKAGES = frozenset(("torch", "torchvision", "fxcompress", "_operator", "builtins", "math"))
_LAYERS = ("torch.nn.modules.", "fxcompress.lower.")


def recordable(module: fx.GraphModule) -> bool:
    """Whether a graph calls functions and layers of torch and ours alone: others may do different things every time."""
    return all(_is_known(module, node) for node in module.graph.nodes)


def _is_known(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__module__.startswith(_LAYERS)
    if node.op != "call_function" or node.target in pytree.SUPPORTED_NODES:  # the latter pack results
        return True
    home = getattr(node.target, "__module__", None) or "torch"  # its functions in C++ have none
    return home.partition(".")[0] in _PACKAGES


class Replayed:
    """A flat function that records what it runs when inputs of the same shapes come for the second time.

    A recording is run on the inputs and on others before it is used, and must give what the function gives. Inputs
    beside plain tensors on the CPU, numbers and strings run the function, as does everything while something else
    watches what Python does (hooks, modes, tracing, compiling, autocast). So does what cannot be recorded.

    Whatever layers and tensors are replaced is noticed, and whether layers train; other attributes of layers that
    were not lowered are not looked at.

    Args:
        function: takes and gives what the module does; runs without gradients.
        module: has the graph that the function runs.
    """

    def __init__(self, function: Callable[..., Any], module: fx.GraphModule) -> None:
        self.function = function
        self._sources = _Sources(module)
        self._state: _State | None = None
        self._recordings: dict[Key, _Replay | None] = {}  # None: left to the function
        self._seen: set[Key] = set()
        self._left = MOST
        self._lock = threading.Lock()

    @property
    def recordings(self) -> int:
        """For how many shapes of inputs there is one."""
        return sum(item is not None for item in list(self._recordings.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if self._sources.hooked() else _key(args, kwargs)
        if key is not None:
            replay = self._recordings.get(key)
            if replay is not None and self._sources.are(self._state):
                try:
                    return replay(args, kwargs)
                except RuntimeError:
                    pass  # the function says what is wrong; nothing was written into
            elif (replay is not None or key not in self._recordings) and self._lock.acquire(blocking=False):
                try:
                    return self._record(key, args, kwargs)
                finally:
                    self._lock.release()
        return self.function(*args, **kwargs)

    def _record(self, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function, and record the call if it is time to."""
        if not self._sources.are(self._state):
            self._recordings.clear()  # they would keep what they were made of
            self._seen.clear()
        if key not in self._seen:
            if len(self._seen) < SEEN:
                self._seen.add(key)
            result = self.function(*args, **kwargs)
            self._state = self._sources.state()  # packed by now
            return result
        if not self._left:
            return self.function(*args, **kwargs)
        self._left -= 1
        inputs = _tensors(args, kwargs)
        result, recording = record(lambda: self.function(*args, **kwargs), inputs, _leaves)
        self._recordings[key] = None if recording is None else self._checked(recording, result, args, kwargs)
        return result

    def _checked(
        self, recording: Recording, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Replay | None:
        """The recording, if it gives what the function gives: for these inputs, and for others."""
        values, structure = pytree.tree_flatten(result)
        places = [place for place, item in enumerate(values) if isinstance(item, Tensor)]
        replay = _Replay(recording, [None if isinstance(item, Tensor) else item for item in values], places, structure)
        generator = torch.Generator().manual_seed(0)
        try:
            others = iter([_other(item, generator) for item in _tensors(args, kwargs)])
            more = [next(others) if isinstance(item, Tensor) else item for item in args]
            named = {name: next(others) if isinstance(item, Tensor) else item for name, item in kwargs.items()}
            same = _same(_leaves(replay(args, kwargs)), _leaves(result)) and _same(
                _leaves(replay(tuple(more), named)), _leaves(self.function(*more, **named))
            )
        except Exception:  # noqa: BLE001 - other values may be none that the model takes
            return None
        return replay if same else None


@dataclass(frozen=True)
class _Replay:
    """A recording in place of a function.

    Attributes:
        recording: gives the tensors.
        values: what the function gives beside them, flat.
        places: of the tensors among the values.
        structure: of what the function gives.
    """

    recording: Recording
    values: list[Any]
    places: list[int]
    structure: pytree.TreeSpec

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self.recording(_tensors(args, kwargs))
        if self.structure.is_leaf():
            return made[0]
        values = list(self.values)
        for place, item in zip(self.places, made, strict=True):
            values[place] = item
        return pytree.tree_unflatten(values, self.structure)


@dataclass(frozen=True)
class _State:
    """Kernels, modes of other layers, and tensors, in the order of their sources."""

    kernels: list[Any]
    modes: list[bool]
    tensors: list[Tensor | None]


class _Sources:
    """What a graph's function reads beside its arguments. It does not hold the module."""

    def __init__(self, module: fx.GraphModule) -> None:
        called = [module.get_submodule(str(node.target)) for node in module.graph.find_nodes(op="call_module")]
        self._packed = [layer for layer in called if hasattr(layer, "_kernel")]
        self._plain = [part for layer in called if not hasattr(layer, "_kernel") for part in layer.modules()]
        self._slots: list[tuple[Table, str]] = []
        for node in module.graph.find_nodes(op="get_attr"):
            path, _, leaf = str(node.target).rpartition(".")
            holder = module.get_submodule(path)
            self._slots += [(table, leaf) for table in (holder._parameters, holder._buffers) if leaf in table]
        for part in self._plain:
            self._slots += [(table, name) for table in (part._parameters, part._buffers) for name in table]

    def hooked(self) -> bool:
        """Whether somebody wants to be told of calls."""
        return _has_any_global_hook() or any(part._forward_hooks or part._forward_pre_hooks for part in self._plain)

    def _kernels(self) -> Iterator[Any]:
        return (layer._kernel for layer in self._packed)

    def _modes(self) -> Iterator[bool]:
        return (part.training for part in self._plain)

    def _tensors(self) -> Iterator[Tensor | None]:
        return (table.get(name) for table, name in self._slots)

    def state(self) -> _State:
        """As they are now."""
        return _State(list(self._kernels()), list(self._modes()), list(self._tensors()))

    def are(self, state: _State | None) -> bool:
        """Whether they are what they were; the values of tensors may be others."""
        return (
            state is not None
            and all(map(is_, self._kernels(), state.kernels))
            and all(map(is_, self._modes(), state.modes))
            and all(map(is_, self._tensors(), state.tensors))
        )


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
    """What must be the same for a recording to do; None for what is not recorded."""
    if (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return None
    found: list[Any] = [len(args), *kwargs]
    for item in (*args, *kwargs.values()):
        kind = type(item)
        if kind is Tensor:
            if item.layout is not torch.strided or item.is_nested or item.dtype not in _DTYPES or not item.is_cpu:
                return None
            found.append((item.dtype, item.shape, item.stride()))
        elif kind is float:
            found.append(item.hex())  # two zeros are equal
        elif kind in _PLAIN:
            found.append((kind, item))
        else:
            return None
    return tuple(found)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]


def _leaves(result: Any) -> list[Tensor]:
    return [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]


def _other(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other values in the same layout: drawn, or for integers and masks taken from among those there are."""
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    if x.is_floating_point():
        return made.copy_(torch.randn(x.shape, generator=generator))
    values = x.flatten()
    return made.copy_(values[torch.randint(max(1, len(values)), x.shape, generator=generator)])


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether tensors have the same values, NaN where NaN is, in the same layout."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip
