"""Passes and the pipeline that runs them, contracts included (design 9)."""

from __future__ import annotations

import copy
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import fx

from fxcompress.context import Context, signature
from fxcompress.errors import FxCompressError, InputError, PassError
from fxcompress.masking import Masking, lift
from fxcompress.module import TracedModule, state_of
from fxcompress.rewrite import check
from fxcompress.task import Need
from fxcompress.verify import tolerance_of, verify


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
    rounding: ClassVar[bool] = False
    #: Its result can be trained, not only run.
    trainable: ClassVar[bool] = True
    #: Channels are looked at, so example inputs are needed.
    needs_inputs: ClassVar[bool] = False
    #: Running it again changes nothing.
    idempotent: ClassVar[bool] = False
    #: It is given the clean graph, with the masks in ``context.masking``, and leaves the new ones there: the pipeline
    #: lays them over the graph when something wants to see them there.
    lifts: ClassVar[bool] = False
    #: It replaces tensors, or writes into them where autograd's version counter sees it (not through ``.data``): that
    #: it changed nothing is known without reading every value.
    versioned: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Passes of users inherit no promise about how tensors are written."""
        super().__init_subclass__(**options)
        if "versioned" not in vars(cls) and not cls.__module__.startswith("fxcompress."):
            cls.versioned = False

    @property
    def claims(self) -> bool:
        """Whether this instance claims what its class preserves; an option may take the claim back."""
        return self.preserves

    @property
    def needs(self) -> tuple[Need, ...]:
        """What of a task it needs with its options: ``"batches"``, ``"loss"``, ``"score"``, ``"optimizer"``."""
        return ()

    @property
    def name(self) -> str:
        """The name in messages and in the history."""
        return type(self).__name__

    def requires(self, module: TracedModule, context: Context) -> None:
        """Raise if the pass cannot run on this module."""
        if self.needs_inputs and context.inputs is None:
            raise InputError(f"example_inputs is missing: {self.name} follows channels through a run of the model.")
        if self.needs:
            context.required_task(self.needs, self.name)

    @abstractmethod
    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Transform ``module``, in place or not, and return the result."""

    def ensures(self, module: TracedModule, context: Context) -> None:
        """Raise if the result is not what the pass promises; nothing more than a well-formed graph by default."""
        check(module)

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """What the result must equal where the pass preserves the function: by default the module as it came."""
        return context.masked(copy.deepcopy(module), self.name, like=module)

    def compare(self, reference: TracedModule, result: TracedModule, context: Context) -> float:
        """Raise :class:`VerificationError` unless the result keeps what the pass claims to preserve.

        Returns:
            The largest relative difference.
        """
        return check_claim(self, reference, result, context)


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
    """A module's printed graph, tensors and lifted masks, to tell afterwards whether a pass changed anything
    (``training`` aside).

    Args:
        module: the module.
        masking: its masks, if they are lifted.
        values: whether to read every value and print the graph, for passes that may write through ``.data`` or put
            another graph in its place. Without, tensors that are replaced need not live on.
    """

    def __init__(self, module: TracedModule, masking: Masking | None = None, *, values: bool = True) -> None:
        self.masking = masking
        self.graph: Any = str(module.graph) if values else signature(module.graph)
        self.state = {
            name: _Held(tensor if values else weakref.ref(tensor), tensor._version, _digest(tensor) if values else 0)
            for name, tensor in state_of(module, every_name=True).items()
        }

    def differs(self, now: Snapshot) -> bool:
        """Whether the module printed differently then, or held other tensors, other values or other masks."""
        if self.graph != now.graph or self.state.keys() != now.state.keys() or self.masking != now.masking:
            return True
        return not all(_same(old, now.state[name]) for name, old in self.state.items())


class _Held(NamedTuple):
    """A tensor in a snapshot: itself, or a weak reference to it; its version; and the digest of its values, or 0."""

    source: torch.Tensor | weakref.ref[torch.Tensor]
    version: int
    digest: int

    def tensor(self) -> torch.Tensor | None:
        return self.source() if isinstance(self.source, weakref.ref) else self.source


def _digest(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits: a write through ``.data`` leaves no new version."""
    if tensor.is_meta or tensor.is_complex():
        return 0
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = bits[: len(bits) // 8 * 8].view(torch.int64)
    return int(words.sum()) + int(bits[len(words) * 8 :].sum())


def _same(old: _Held, new: _Held) -> bool:
    before, after = old.tensor(), new.tensor()
    if before is None or after is None:
        return False  # it has been replaced
    if before is after:
        return old.version == new.version and old.digest == new.digest
    return before.dtype == after.dtype and before.shape == after.shape and torch.equal(before, after)


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
        tolerance=_rounding(result) if item.rounding or context.rounded else None,
        what=f"the result of {item.name}",
        align=context.align,
    ).difference


def run_pass(item: Pass, module: TracedModule, context: Context, *, lays: bool = True) -> PassResult:
    """Run one pass with its contract.

    Args:
        item: the pass.
        module: changed in place.
        context: for this module; its masks may be lifted.
        lays: put the masks into the graph afterwards; without, they stay in the context for the next pass.

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
        _hold(item, module, context)
        before = _snapshot(item, module, context)
        reference = item.reference(module, context) if checked else None
        result = item.run(module, context)
        item.ensures(result, context)
        after = Snapshot(result, context.masking, values=not item.versioned)
        modified = before.differs(after)
        if item.versioned:
            context._snapshot = result, after
        else:
            context.forget()
        if context.masking is not None and (lays or checked):
            context.masked(result, item.name)
            context.masking = None
        gap = None if reference is None else item.compare(reference, result, context)
        if item.claims and context.verify and context.inputs is None:
            context.notes.append("the claim to preserve the function was not checked: there are no example inputs")
    except FxCompressError as error:
        error.add_note(f"while running {item!r}")
        raise
    except Exception as error:
        raise PassError(f"{item.name} failed: {type(error).__name__}: {error} (options: {item!r})") from error
    return PassResult(result, modified, tuple(context.notes[said:]), time.perf_counter() - start, gap)


def _hold(item: Pass, module: TracedModule, context: Context) -> None:
    """Masks lifted, or laid, as the pass expects them."""
    if item.lifts and context.masking is None:
        context.masking = lift(module)
    elif not item.lifts and context.masking is not None:
        context.masked(module, "pipeline")
        context.masking = None


def _snapshot(item: Pass, module: TracedModule, context: Context) -> Snapshot:
    """The one that the pass before left, if it will do."""
    known, context._snapshot = context._snapshot, None
    if known is not None and item.versioned and known[0] is module and known[1].masking is context.masking is not None:
        return known[1]
    return Snapshot(module, context.masking, values=not item.versioned)
