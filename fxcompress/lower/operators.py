"""Operators as a recording holds them.

torch's recorder (:func:`torch.jit.trace`) takes neither a packed weight for a constant nor a list of optional numbers
nor a view of other bits: packed weights become attributes of what is recorded, and the operators that take such lists
are called through functions of TorchScript.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: What watches the calls of operators in this thread.
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)

_LIBRARY = torch.library.Library("fxcompress", "FRAGMENT")
_LIBRARY.define("bits(Tensor(a) x, ScalarType dtype) -> Tensor(a)")
_LIBRARY.impl("bits", lambda x, dtype: x.view(dtype), "CPU")


@dataclass
class Watcher:
    """Told of every call of an :class:`Operator`.

    Attributes:
        tracing: torch records what is called.
        packed: the packed weights that were read, by their ``id``.
        units: of the functions in TorchScript that a recording calls, and does not keep alive.
    """

    tracing: bool = False
    packed: dict[int, Tensor] = field(default_factory=dict)
    units: list[torch.jit.CompilationUnit] = field(default_factory=list)

    def call(self, op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
        tensors = [item for item in args if isinstance(item, Tensor)]
        if not self.tracing:
            self.packed.update((id(item), item) for item in tensors if item.is_mkldnn)
            return op(*args)
        unit = _scripted(op, args)
        self.units.append(unit)
        return unit.call(*tensors)


class Operator:
    """An operator that takes packed weights.

    Args:
        op: called with its arguments by position.
    """

    def __init__(self, op: torch._ops.OpOverload) -> None:
        self.op = op

    def __call__(self, *args: Any) -> Any:
        watcher = _WATCHER.get()
        return self.op(*args) if watcher is None else watcher.call(self.op, args)


def bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.view(dtype)``; the recorder takes the dtype for a size."""
    watcher = _WATCHER.get()
    if watcher is None or not watcher.tracing:
        return x.view(dtype)
    made: Tensor = torch.ops.fxcompress.bits(x, dtype)
    return made


def _scripted(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> torch.jit.CompilationUnit:
    """A function of TorchScript, ``call``, that takes the tensors among the arguments and has the rest written in."""
    numbers, given = "[]", []
    for place, (item, formal) in enumerate(zip(args, op._schema.arguments, strict=False)):
        if str(formal.type) == "List[Optional[number]]":
            numbers = repr(item)
            given.append("numbers")
        else:
            given.append(f"x{place}" if isinstance(item, Tensor) else str(item) if _is_dtype(item) else repr(item))
    inputs = ", ".join(f"x{place}: Tensor" for place, item in enumerate(args) if isinstance(item, Tensor))
    name = op._schema.name.replace("::", ".")
    return torch.jit.CompilationUnit(
        f"def call({inputs}):\n    numbers: List[Optional[number]] = {numbers}\n"
        f"    return torch.ops.{name}({', '.join(given)})\n"
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


@contextmanager
def watching(watcher: Watcher) -> Iterator[Watcher]:
    """While this lasts, ``watcher`` is told."""
    token = _WATCHER.set(watcher)
    try:
        yield watcher
    finally:
        _WATCHER.reset(token)
