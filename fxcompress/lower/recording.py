"""What a function of tensors ran, as a function of TorchScript.

The operators that one call runs are written down as torch's dispatcher meets them, below all Python: sizes and other
numbers are literals by then, so what is written holds for inputs of the same shapes and layouts, whatever their
values. A call that looks at a value, draws random numbers, or writes into what it did not make is not recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit._fuser import optimized_execution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

#: TorchScript takes the dtype of ``x.view(dtype)`` for a size.
_LIBRARY = torch.library.Library("fxcompress", "FRAGMENT")
_LIBRARY.define("bits(Tensor(a) x, ScalarType dtype) -> Tensor(a)")
_LIBRARY.impl("bits", lambda x, dtype: x.view(dtype), "CPU")

_NAMES = {"aten.view.dtype": "fxcompress.bits"}
#: Read a value into Python, or bring one from there.
_LOOKING = frozenset(("aten._local_scalar_dense.default", "aten.lift_fresh.default", "aten.equal.default"))
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_WORDS = (torch.dtype, torch.memory_format, torch.layout)


@dataclass(frozen=True)
class Recording:
    """What a call ran, for other values.

    Attributes:
        unit: holds the function.
        held: the tensors that it reads beside its inputs.
    """

    unit: torch.jit.CompilationUnit
    held: list[Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results of the same operators."""
        # The optimizing executor would take two slow runs to specialize, and be hardly faster.
        with torch.no_grad(), optimized_execution(False):
            made: list[Tensor] = self.unit.replay(list(inputs), self.held)
        return made


def record(
    function: Callable[[], Any], inputs: Sequence[Tensor], results: Callable[[Any], list[Tensor]]
) -> tuple[Any, Recording | None]:
    """Call a function, and write down what it runs.

    Args:
        function: takes nothing, and runs without gradients.
        inputs: the tensors that will be others.
        results: finds the tensors in what the function gives.

    Returns:
        what the function gives, and the recording; None if there can be none.
    """
    drawn = torch.random.get_rng_state()
    writer = _Writer(inputs)
    with writer:
        made = function()
    if not writer.fits or not torch.equal(drawn, torch.random.get_rng_state()):
        return made, None
    found = results(made)
    try:
        return made, writer.recording(found)
    except RuntimeError:  # TorchScript does not know an operator, or a form of its arguments
        return made, None


class _Unfit(Exception):  # noqa: N818 - it is no error
    """An operator that cannot be written down."""


class _Writer(TorchDispatchMode):
    """Writes a line for each operator that runs inside of it.

    Attributes:
        fits: whether every operator could be written down.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.fits = True
        self._inputs, self._held, self._lines = list(inputs), list[Tensor](), list[str]()
        self._names = WeakTensorKeyDictionary()
        self._outside: set[int] = set()  # memory that was there before the call
        self._count = 0
        for place, item in enumerate(inputs):
            self._outside.add(_memory(item))
            self._names[item] = f"x{place}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, call = kwargs or {}, ""
        if self.fits:
            try:
                call = self._call(func, args, kwargs)
            except _Unfit:
                self.fits = False
        made = func(*args, **kwargs)
        if self.fits:
            self._keep(call, made)
        return made

    def recording(self, results: Sequence[Tensor]) -> Recording:
        """What was written, as a function that gives ``results``."""
        given = ", ".join([self._name(item) for item in results])
        lines = [f"x{place} = inputs[{place}]" for place in range(len(self._inputs))]
        lines += [f"h{place} = held[{place}]" for place in range(len(self._held))]
        body = "\n    ".join([*lines, *self._lines, f"return [{given}]"])
        text = f"def replay(inputs: List[Tensor], held: List[Tensor]) -> List[Tensor]:\n    {body}\n"
        return Recording(torch.jit.CompilationUnit(text), self._held)

    def _call(self, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The call of an operator."""
        formals = {formal.name: formal for formal in op._schema.arguments}
        given = [*zip(formals.values(), args, strict=False), *((formals[name], item) for name, item in kwargs.items())]
        _require_same_for_all_values(op, given)
        words = [self._text(item, str(formal.type)) for formal, item in given]
        for formal, item in given:
            if formal.alias_info is not None and formal.alias_info.is_write:
                written = item if isinstance(item, (list, tuple)) else [item]
                if not self._outside.isdisjoint(_memory(tensor) for tensor in written if tensor is not None):
                    raise _Unfit
        named = [f"{name}={word}" for name, word in zip(kwargs, words[len(args) :], strict=True)]
        name = _NAMES.get(str(op), op._schema.name.replace("::", "."))
        return f"torch.ops.{name}({', '.join(words[: len(args)] + named)})"

    def _keep(self, call: str, made: Any) -> None:
        """Write a call down, with names for what it made."""
        if isinstance(made, Tensor):
            # What was written into keeps its name, and is what the call gives: not all operators say that they write.
            name = self._name(made) if made in self._names else self._new(made)
            self._lines.append(f"{name} = {call}")
        elif isinstance(made, list):
            self._count += 1
            several = f"l{self._count}"
            self._lines.append(f"{several} = {call}")
            self._lines += [f"{self._new(item)} = {several}[{place}]" for place, item in enumerate(made)]
        elif isinstance(made, tuple) and all(isinstance(item, Tensor) for item in made):
            self._lines.append(f"{', '.join(self._new(item) for item in made)} = {call}")
        else:
            self.fits = made is None and self.fits
            self._lines.append(call)

    def _new(self, item: Tensor) -> str:
        self._count += 1
        name = self._names[item] = f"v{self._count}"
        return name

    def _name(self, item: Tensor) -> str:
        """The name of a tensor; one that was there before is held from now on."""
        if item not in self._names:
            self._names[item] = f"h{len(self._held)}"
            self._held.append(item)
            self._outside.add(_memory(item))
        name: str = self._names[item]
        return name

    def _text(self, value: Any, kind: str) -> str:
        """An argument of a type of TorchScript, as code."""
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, (list, tuple)):
            self._count += 1
            name, items = f"a{self._count}", ", ".join(self._text(item, "") for item in value)
            self._lines.append(f"{name}: {kind.replace('SymInt', 'int')} = [{items}]")
            return name
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if isinstance(value, torch.device):
            return f"torch.device('{value}')"
        if value is None or type(value) in (bool, int, float, str):
            return repr(value)
        if isinstance(value, _WORDS):
            return str(value)
        raise _Unfit


def _require_same_for_all_values(op: torch._ops.OpOverload, given: list[tuple[Any, Any]]) -> None:
    """No value decides what runs or of which shape results are."""
    unlike = set(op.tags) & _TAGS
    if op == torch.ops.aten.index.Tensor:  # only masks do
        indices = given[1][1]
        unlike = {item.dtype for item in indices if item is not None} & {torch.bool, torch.uint8}
    # Writes into statistics that its schema does not tell of.
    trains = "batch_norm" in op._schema.name and any("train" in formal.name and item for formal, item in given)
    if str(op) in _LOOKING or unlike or trains:
        raise _Unfit


def _memory(item: Tensor) -> int:
    return item.untyped_storage()._cdata if item.layout is torch.strided else id(item)
