"""Passes and the pipeline that runs them, contracts included (design 9)."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch
from torch import fx

from fxcompress.channels.groups import ChannelGroups, analyse
from fxcompress.errors import FxCompressError, InputError, PassError
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule
from fxcompress.rewrite import check
from fxcompress.verify import Align, tolerance_of, verify


@dataclass
class Context:
    """What a pass may ask for while it runs.

    Attributes:
        inputs: the example inputs, or None.
        seed: for whatever is random.
        verify: whether claims are checked by running models.
        notes: what the passes had to say, for the history.
        align: set by a pass that changes shapes: what a value of the module before it is in the one after it.
        rounded: set by a pass that computed new weights in this run although it seldom does; see ``Pass.rounds``.
    """

    inputs: Inputs | None = None
    seed: int = 0
    verify: bool = True
    notes: list[str] = field(default_factory=list)
    align: Align | None = None
    rounded: bool = False
    _analyses: dict[str, ChannelGroups] = field(default_factory=dict)

    def groups(self, module: TracedModule) -> ChannelGroups:
        """The channel groups of a clean traced module; analysed once for each graph.

        Raises:
            InputError: there are no example inputs.
        """
        if self.inputs is None:
            raise InputError(
                "example_inputs is missing: channels are followed through a run of the model. Pass a batch."
            )
        shapes = [(name, tuple(t.shape)) for name, t in module.named_parameters(remove_duplicate=False)]
        key = f"{module.graph}{shapes}"
        if key not in self._analyses:
            self._analyses[key] = analyse(module, self.inputs)
        return self._analyses[key]


@dataclass(frozen=True)
class PassResult:
    """What running a pass gave.

    Attributes:
        module: the module afterwards.
        modified: whether its graph or its state differ from before; derived, not declared.
        notes: what the pass had to say.
        seconds: how long it took, checks included.
        difference: largest relative difference that a claim to preserve the function left, or None.
    """

    module: TracedModule
    modified: bool
    notes: tuple[str, ...]
    seconds: float
    difference: float | None


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of a traced model. Subclasses are frozen dataclasses whose fields are their options.

    The contract is executed: :meth:`requires` before, :meth:`run`, then :meth:`ensures` on the result.
    """

    #: The result computes the same function in eval mode; the pipeline checks it.
    preserves: ClassVar[bool] = False
    #: It computes new weights, which are rounded to their dtype: the claim holds to that dtype's tolerance.
    rounds: ClassVar[bool] = False
    #: Channels are looked at, so example inputs are needed.
    needs_inputs: ClassVar[bool] = False
    #: Running it again changes nothing.
    idempotent: ClassVar[bool] = False

    @property
    def claims(self) -> bool:
        """Whether this instance claims what its class preserves; an option may take the claim back."""
        return self.preserves

    @property
    def name(self) -> str:
        """The name in messages and in the history."""
        return type(self).__name__

    def requires(self, module: TracedModule, context: Context) -> None:
        """Raise if the pass cannot run on this module."""
        if self.needs_inputs and context.inputs is None:
            raise InputError(f"example_inputs is missing: {self.name} follows channels through a run of the model.")

    @abstractmethod
    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Transform ``module``, in place or not, and return the result."""

    def ensures(self, module: TracedModule, context: Context) -> None:
        """Raise if the result is not what the pass promises; nothing more than a well-formed graph by default."""
        check(module)

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """What the result must equal where the pass preserves the function: by default the module as it came."""
        return copy.deepcopy(module)


@dataclass(frozen=True, repr=False)
class FunctionPass(Pass):
    """A function on a GraphModule as a pass; see :func:`graph_pass`."""

    function: Callable[[fx.GraphModule], fx.GraphModule | None]

    def __repr__(self) -> str:
        claim = "preserves=True" if self.preserves else ""
        return f"graph_pass({claim})({self.name})"

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Call the function; None means that it worked in place."""
        result = self.function(module)
        if result is None:
            module.recompile()
            return module
        if not isinstance(result, TracedModule):
            raise PassError(
                f"{self.name} returned a {type(result).__name__}; expected the module that it was given, or None. "
                "Edit module.graph in place."
            )
        return result


@overload
def graph_pass(function: Callable[[fx.GraphModule], fx.GraphModule | None]) -> Pass: ...
@overload
def graph_pass(*, preserves: bool) -> Callable[[Callable[[fx.GraphModule], fx.GraphModule | None]], Pass]: ...
def graph_pass(function: Any = None, *, preserves: bool = False) -> Any:
    """Make a pass of a function on a GraphModule, which edits ``module.graph`` in place.

    Args:
        function: ``module -> None`` (or the module).
        preserves: the function claims to keep what the model computes, and is checked.

    Example::

        @graph_pass(preserves=True)
        def drop_identities(module):
            for node in module.graph.find_nodes(op="call_module", target="drop"):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
    """
    kind = _PreservingFunctionPass if preserves else FunctionPass
    if function is None:
        return lambda given: kind(given)
    return kind(function)


@dataclass(frozen=True, repr=False)
class _PreservingFunctionPass(FunctionPass):
    preserves: ClassVar[bool] = True


def parse_passes(passes: Any) -> tuple[Pass, ...]:
    """The passes of a pipeline.

    Raises:
        InputError: not a list, empty, or with something in it that is no pass.
    """
    if isinstance(passes, Pass) or not isinstance(passes, Sequence) or isinstance(passes, str):
        raise InputError(
            f"passes is a {type(passes).__name__}; expected a list of passes, such as [L1FilterPruner(0.5)]."
        )
    if not passes:
        raise InputError("passes is empty; expected at least one pass, such as L1FilterPruner(0.5).")
    for index, item in enumerate(passes):
        if isinstance(item, type) and issubclass(item, Pass):
            raise InputError(
                f"passes[{index}] is the class {item.__name__}; expected an instance: {item.__name__}(...)."
            )
        if not isinstance(item, Pass):
            raise InputError(
                f"passes[{index}] is {item!r}, a {type(item).__name__}; expected a Pass. Decorate a function with "
                "@fxcompress.graph_pass, or subclass fxcompress.Pass."
            )
    return tuple(passes)


class Snapshot:
    """A module's printed graph and tensors, to tell afterwards whether a pass changed anything (``training`` aside)."""

    def __init__(self, module: TracedModule) -> None:
        self.graph = str(module.graph)
        self.state = {
            name: (tensor, _digest(tensor))
            for name, tensor in [
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ]
        }

    def differs(self, module: TracedModule) -> bool:
        """Whether the module now prints differently, or holds other tensors or other values."""
        now = Snapshot(module)
        if self.graph != now.graph or self.state.keys() != now.state.keys():
            return True
        return not all(_same(old, now.state[name]) for name, old in self.state.items())


def _digest(tensor: torch.Tensor) -> tuple[int, int]:
    """The tensor's version, and the sum of its bits: a write through ``.data`` leaves no new version."""
    if tensor.is_meta or tensor.is_complex():
        return tensor._version, 0
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = bits[: len(bits) // 8 * 8].view(torch.int64)
    return tensor._version, int(words.sum()) + int(bits[len(words) * 8 :].sum())


def _same(old: tuple[torch.Tensor, tuple[int, int]], new: tuple[torch.Tensor, tuple[int, int]]) -> bool:
    if old[0] is new[0]:
        return old[1] == new[1]
    return old[0].dtype == new[0].dtype and old[0].shape == new[0].shape and torch.equal(old[0], new[0])


def _rounding(module: TracedModule) -> float:
    return max((tolerance_of(p.dtype) for p in module.parameters() if p.is_floating_point()), default=1e-5)


def check_claim(item: Pass, reference: TracedModule, result: TracedModule, context: Context) -> float:
    """The largest relative difference between what a pass gave and what it promised to keep.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    assert context.inputs is not None
    return verify(
        reference,
        result,
        context.inputs,
        batched=bool(result.meta["batched"]),
        tolerance=_rounding(result) if item.rounds or context.rounded else None,
        what=f"the result of {item.name}",
        align=context.align,
    ).difference


def run_pass(item: Pass, module: TracedModule, context: Context) -> PassResult:
    """Run one pass with its contract.

    Raises:
        PassError: the pass failed or broke its contract (the cause is attached); errors of fxcompress' own family
            come through with the pass added to their text.
    """
    start = time.perf_counter()
    said = len(context.notes)
    checked = item.claims and context.verify and context.inputs is not None
    try:
        context.align, context.rounded = None, False
        item.requires(module, context)
        before = Snapshot(module)
        reference = item.reference(module, context) if checked else None
        result = item.run(module, context)
        item.ensures(result, context)
        gap = None if reference is None else check_claim(item, reference, result, context)
        if item.claims and context.verify and context.inputs is None:
            context.notes.append("the claim to preserve the function was not checked: there are no example inputs")
    except FxCompressError as error:
        error.add_note(f"while running {item!r}")
        raise
    except Exception as error:
        raise PassError(f"{item.name} failed: {type(error).__name__}: {error} (options: {item!r})") from error
    return PassResult(result, before.differs(result), tuple(context.notes[said:]), time.perf_counter() - start, gap)
