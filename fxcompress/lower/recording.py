"""A flat function for inputs like earlier ones, run without Python.

A call of a small kernel costs as much to describe as to run, a third of it in Python. Between inputs of the same
shapes nothing differs but values, so the operators that one call ran are recorded (:func:`torch.jit.trace`), and
later calls replay them in one go. What is replayed is the same operators on the same tensors: results are the same
bits, which is checked before a recording is used, on the inputs and on others.
"""

from __future__ import annotations

import operator
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit._fuser import optimized_execution
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from fxcompress.lower.operators import Watcher, watching

Key = tuple[Any, ...]
Table = Mapping[str, Tensor | None]

#: Recordings that one module keeps, and shapes that it remembers to have seen once.
KEPT, SEEN = 8, 64
_PLAIN = (bool, int, float, str, type(None))
#: Where functions and layers come from that look at no value, so that the same operators run for all.
_FUNCTIONS = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn")
_LAYERS = ("torch.nn.modules.", "fxcompress.lower.")
#: What looks at values all the same, gives a shape that depends on them, or makes a tensor that a recording would hold
#: in place of making it.
_LOOKING = frozenset(
    "item tolist numpy is_nonzero equal allclose __bool__ __int__ __float__ __index__ __len__ __array__ truth not_ "
    "index contains countOf indexOf length_hint nonzero argwhere masked_select unique unique_consecutive "
    "repeat_interleave bincount tensor as_tensor from_numpy asarray scalar_tensor".split()
)

# ---- what may be recorded --------------------------------------------------------------------------------------------


def looks_at_no_value(module: fx.GraphModule) -> bool:
    """Whether the same operators run for all inputs of the same shapes, as far as can be told from a graph."""
    return all(_looks_at_no_value(module, node) for node in module.graph.nodes)


def _looks_at_no_value(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__module__.startswith(_LAYERS)
    if node.op == "call_method":
        return node.target not in _LOOKING
    if node.op != "call_function":
        return True
    function = node.target
    name, home = getattr(function, "__name__", ""), getattr(function, "__module__", None)
    if name in _LOOKING:
        return False
    if function is getattr or getattr(operator, name, None) is function or function in pytree.SUPPORTED_NODES:
        return True  # the last: what a result is packed into
    if home is None:
        return isinstance(function, types.BuiltinMethodType | types.MethodDescriptorType)  # torch's own, in C++
    return home in _FUNCTIONS or str(home).startswith(("torch._ops.", "fxcompress.lower."))


# ---- recordings ------------------------------------------------------------------------------------------------------


class Recorded:
    """A flat function that records what it runs when inputs of the same shapes come for the second time.

    Inputs beside plain tensors on the CPU, numbers and strings run the function, as does everything while something
    else watches what Python does (tracing, compiling, autocast, hooks). So does what cannot be recorded.

    Args:
        function: takes and gives what the module does; runs without gradients.
        layers: what it calls.
        tables: where it looks tensors up, by name.
    """

    def __init__(self, function: Callable[..., Any], layers: Sequence[nn.Module], tables: Sequence[Table]) -> None:
        self.function = function
        self._sources = _Sources(layers, tables)
        self._known: OrderedDict[Key, _Recording | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if self._sources.hooked() else _signature(args, kwargs)
        if key is None:
            return self.function(*args, **kwargs)
        try:
            recording = self._known[key]
        except KeyError:
            self._remember(key, None)
            return self.function(*args, **kwargs)
        if recording is not None and recording.state.holds():
            return recording.run(args, kwargs)
        if not self._lock.acquire(blocking=False):  # another thread records
            return self.function(*args, **kwargs)
        try:
            result, recording = self._record(args, kwargs)
            self._remember(key, recording)
        finally:
            self._lock.release()
        return result

    @property
    def recordings(self) -> int:
        """For how many shapes of inputs there is a recording."""
        return sum(item is not None and item.replays for item in list(self._known.values()))

    def _remember(self, key: Key, recording: _Recording | None) -> None:
        self._known[key] = recording
        if recording is not None:
            made = [other for other, item in list(self._known.items()) if item is not None]
            for other in made[:-KEPT]:
                self._known.pop(other, None)
        while len(self._known) > SEEN:
            self._known.popitem(last=False)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, _Recording]:
        """What the function gives, and what to run from now on."""
        versions = self._sources.versions()
        with watching(Watcher()) as watcher:
            result = self.function(*args, **kwargs)
        state = self._sources.state()
        tensors = [item.clone() for item in _tensors(args, kwargs)]
        leaves, structure = pytree.tree_flatten(result)
        plain = _Recording(state, lambda args, kwargs: self.function(*args, **kwargs))
        if self._sources.versions() != versions or not all(type(leaf) is Tensor for leaf in leaves):
            return result, plain

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            made = self.function(
                *(next(given) if isinstance(item, Tensor) else item for item in args),
                **{name: next(given) if isinstance(item, Tensor) else item for name, item in kwargs.items()},
            )
            return tuple(pytree.tree_leaves(made))

        try:
            with torch.random.fork_rng(devices=[]):
                replay = _recorded(call, tensors, [*watcher.packed.values(), *self._sources.parameters()])
                others = [_other(item) for item in tensors]
                same = _same(replay(*tensors), leaves) and _same(replay(*others), call(*others))
        except Exception:  # noqa: BLE001 - whatever torch's recorder cannot do, the function can
            return result, plain
        if not same:
            return result, plain

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            made = replay(*_tensors(args, kwargs))
            return made[0] if structure.is_leaf() else pytree.tree_unflatten(made, structure)

        return result, _Recording(state, run, replays=True)


@dataclass(frozen=True)
class _Recording:
    """What runs in place of a function.

    Attributes:
        state: what it was recorded of.
        run: takes the arguments and the keyword arguments.
        replays: whether this is not just the function.
    """

    state: _State
    run: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    replays: bool = False


class _Sources:
    """What a flat function reads beside its arguments."""

    def __init__(self, layers: Sequence[nn.Module], tables: Sequence[Table]) -> None:
        self.packed = [layer for layer in layers if hasattr(layer, "_kernel")]
        self.plain = [part for layer in layers if not hasattr(layer, "_kernel") for part in layer.modules()]
        inside = [table for part in self.plain for table in (part._parameters, part._buffers) if table]
        self.tables = [*tables, *inside]

    def hooked(self) -> bool:
        """Whether somebody wants to be told of calls."""
        return _has_any_global_hook() or any(part._forward_hooks or part._forward_pre_hooks for part in self.plain)

    def _held(self) -> Iterator[Tensor]:
        for table in self.tables:
            yield from (tensor for tensor in table.values() if tensor is not None)

    def parameters(self) -> list[Tensor]:
        """What requires gradients, which no constant may."""
        return [tensor for tensor in self._held() if tensor.requires_grad]

    def versions(self) -> list[int]:
        """Counts of the writes into the tensors."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self._held()]

    def state(self) -> _State:
        """As they are now."""
        return _State(
            kernels=[(layer, layer._kernel) for layer in self.packed],
            modes=[(layer, layer.training) for layer in self.plain],
            tensors=[(table, name, tensor) for table in self.tables for name, tensor in table.items()],
        )


@dataclass(frozen=True)
class _State:
    """What a recording was made of: kernels, modes of other layers, and tensors, whose values may change."""

    kernels: list[tuple[nn.Module, Any]]
    modes: list[tuple[nn.Module, bool]]
    tensors: list[tuple[Table, str, Tensor | None]]

    def holds(self) -> bool:
        """Whether the function would still call and read the same."""
        return (
            all(layer._kernel is kernel for layer, kernel in self.kernels)
            and all(layer.training is mode for layer, mode in self.modes)
            and all(table.get(name) is tensor for table, name, tensor in self.tensors)
        )


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]


def _other(x: Tensor) -> Tensor:
    """Other values of the same kind: what a function may take in place of ``x``."""
    turned = x.flip(tuple(range(x.dim())))
    return -turned if x.is_floating_point() else ~turned if x.dtype == torch.bool else turned


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
    """What must be the same for a recording to do; None for what is not recorded."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu"):
        return None
    found: list[Any] = [len(args), *kwargs]
    for item in (*args, *kwargs.values()):
        if type(item) is Tensor and item.layout is torch.strided and item.device.type == "cpu":
            found.append((item.dtype, item.shape, item.stride()))
        elif type(item) in _PLAIN:
            found.append((type(item), item))
        else:
            return None
    return tuple(found)


def _recorded(
    function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], held: list[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """The operators that a function of tensors runs, as a function; ``held``: what it reads and no constant can be."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for place, tensor in enumerate(held):
                self.register_buffer(f"held{place}", tensor)

        def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            made = function(*tensors)
            return made if len(made) > 1 else made[0]  # the recorder loses a tuple of one

    watcher = Watcher(tracing=True)
    with warnings.catch_warnings(), watching(watcher), torch.no_grad():
        warnings.simplefilter("ignore")  # that recording is deprecated, and that shapes become constants
        recording = torch.jit.trace(Holder().eval(), tuple(tensors), check_trace=False).forward

    def replay(*tensors: Tensor) -> tuple[Tensor, ...]:
        # The optimizing executor would specialize for shapes for a while, and be no faster.
        with torch.no_grad(), optimized_execution(False):
            made = recording(*tensors)
        return made if isinstance(made, tuple) else (made,)

    replay.units = watcher.units  # type: ignore[attr-defined]  # alive as long as the recording
    return replay


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether results are the same bits, in the same layout."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape and _equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal values, NaN where NaN is."""
    return bool(((one == other) | ((one != one) & (other != other))).all())
