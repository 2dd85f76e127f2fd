"""Recording a forward as often as it takes: what reads values stays as it is, unless it can be told not to look."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from fxcompress.compiling import compiling
from fxcompress.errors import FxCompressError, TraceError
from fxcompress.inputs import tensors_in
from fxcompress.module import modules_of, own_attributes
from fxcompress.recorder import Recorder, ValueReadError

#: Records a forward once: ``(names of the modules that stay as they are, ids of known tensors) -> recorder``.
Record = Callable[[set[str], frozenset[int]], Recorder]
#: What a forward is told about being captured.
Asked = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Attempt:
    """One recording of a forward.

    Attributes:
        recorder: what it recorded.
        reads: the modules that stay as they are, with what each of them read.
        asked: what the forward was told about being captured.
    """

    recorder: Recorder
    reads: dict[str, ValueReadError]
    asked: Asked

    @property
    def opaque(self) -> set[str]:
        """Names of the modules that stay as they are."""
        return set(self.reads)

    def hidden(self, work: nn.Module) -> int:
        """How many modules lie inside those that stay as they are."""
        return sum(any(f"{path}.".startswith(f"{name}.") for name in self.reads) for path in modules_of(work))


def best(record: Record, work: nn.Module, right: Callable[[Attempt], bool]) -> Attempt:
    """Record; where values are read, once more under the flag that libraries ask before they read any.

    What was recorded under the flag is kept if it leaves fewer modules as they are, and if it is ``right``: if it
    computes what the model does when nobody tells it anything.

    Raises:
        TraceError: the forward itself reads values, and under the flag it does so too, or computes something else.
    """
    found: Attempt | TraceError
    try:
        found = attempt(record, work, nullcontext)
        if not found.reads:
            return found
    except TraceError as error:
        found = error.with_traceback(None)  # whose frames, this one among them, would keep the model;
        found.__context__ = None  # so would those of what it was made of
    try:
        again = attempt(record, work, compiling)
    except FxCompressError:
        pass  # the first recording says what is the matter
    else:
        if (isinstance(found, TraceError) or again.hidden(work) < found.hidden(work)) and right(again):
            return again
    try:
        if isinstance(found, TraceError):
            raise found
        return found
    finally:
        del found


def attempt(record: Record, work: nn.Module, asked: Asked) -> Attempt:
    """Record, making the submodules that read values opaque one after the other (at most all of them)."""
    known = frozenset(map(id, _plain_tensors(work)))
    reads: dict[str, ValueReadError] = {}
    scanned = False
    while True:
        try:
            with asked():
                return Attempt(record(set(reads), known), reads, asked)
        except ValueReadError as read:
            if not scanned and read.what.startswith("a tensor appears"):
                known |= {id(item) for item in gc.get_objects() if issubclass(type(item), Tensor)}
                scanned = True
                continue
            if not read.scope or read.scope in reads:
                raise TraceError(
                    f"the model's forward cannot be recorded: {read.what}, at {read.line}. {read.why} Move that line "
                    "into a submodule (which then stays as it is, unpruned), or compute it outside the model."
                ) from None
            reads[read.scope] = read.with_traceback(None)  # whose frames would keep the whole forward


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors kept as ordinary attributes of modules: constants that no ``register_buffer`` knows."""
    for module in modules_of(model).values():
        for name in own_attributes(module):
            value = vars(module)[name]
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (dict, list, tuple)) and value:
                yield from tensors_in(value)
