"""Proof by evaluation: two models that must compute the same function, run side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import VerificationError
from fxcompress.inputs import Inputs, other_batch, positional
from fxcompress.module import TracedModule, evaluating
from fxcompress.outputs import tensors_of

#: Models with fewer bytes of state than this are compared in float64.
SMALL = 2**29
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


#: What the value of a node in one module should be in another: ``(node name, value) -> value``.
Align = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        difference: largest ``max abs(a - b) / max abs(a)`` over outputs and batch sizes.
        dtype: in which it was computed.
        batches: the batch sizes that were compared.
    """

    difference: float
    dtype: torch.dtype
    batches: tuple[int, ...]


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two results may differ that were computed in this dtype."""
    return TOLERANCE.get(dtype, 16 * torch.finfo(dtype).eps)


def difference(expected: Any, found: Any) -> float:
    """``max abs(a - b) / max abs(a)`` over every tensor of two results of the same structure; inf where they differ."""
    left, right = dict(tensors_of(expected)), dict(tensors_of(found))
    if left.keys() != right.keys():
        return float("inf")
    worst = 0.0
    for path, a in left.items():
        b = right[path]
        if a.shape != b.shape:
            return float("inf")
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        gap, scale = float((a - b).abs().max()), float(a.abs().max())
        if gap != gap:
            same = torch.equal(torch.isnan(a), torch.isnan(b))
            gap, scale = float((a - b).nan_to_num(0, 0, 0).abs().max()) if same else float("inf"), 1.0
        worst = max(worst, gap / scale if scale else gap)
    return worst


def run_seeded(model: Callable[..., Any], inputs: Inputs) -> Any:
    """``model`` applied to ``inputs``, drawing the random numbers that every model here draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return inputs.run(model)


def precise(model: nn.Module) -> nn.Module:
    """A float64 copy of a model, dtype literals in its graph included, so that two copies differ by rounding alone."""
    made = copy.deepcopy(model).double()
    if isinstance(made, TracedModule):
        for node in made.graph.nodes:
            args, kwargs = pytree.tree_map(_widen, (node.args, dict(node.kwargs)), is_leaf=_is_dtype)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs = args, kwargs
            if node.op == "call_method" and node.target == "float":
                node.target = "double"
        made.recompile()
    return made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A default dtype for what a forward makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, (torch.dtype, fx.Node, slice))


def _widen(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


def verify(
    expected: nn.Module,
    found: nn.Module,
    inputs: Inputs,
    *,
    batched: bool = True,
    tolerance: float | None = None,
    what: str = "the removed model",
    align: Align | None = None,
    raised: bool = True,
) -> Verification:
    """Check that two models compute the same function in eval mode.

    Args:
        expected: the model that is right.
        found: the model that must agree with it.
        inputs: example inputs.
        batched: whether dimension 0 is a batch, so that a second batch size is compared too.
        tolerance: on ``max abs(a - b) / max abs(a)`` of each output; 1e-9 in float64, 1e-5 in float32 by default.
        what: the name of ``found`` in messages.
        align: for naming the first node that differs: what a node's value in ``expected`` should be in ``found``,
            ``(node name, value) -> value``.
        raised: compare in float64 where the models are small enough; kernels for one dtype run in that one only.

    Raises:
        VerificationError: they differ; names the first node that does, where both are traced.
    """
    size = sum(t.numel() * t.element_size() for t in [*expected.parameters(), *expected.buffers()])
    dtype = torch.float32
    if (
        raised
        and size < SMALL
        and any(t.is_floating_point() and t.dtype != torch.float64 for t in expected.parameters())
    ):
        expected, found, dtype = precise(expected), precise(found), torch.float64
        inputs = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    elif any(t.dtype == torch.float64 for t in expected.parameters()):
        dtype = torch.float64
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    batches, worst = [inputs.batch], 0.0
    trials = [inputs] + ([inputs.rebatched(other_batch(inputs.batch))] if batched else [])
    with torch.no_grad(), evaluating(expected), evaluating(found), default_dtype(dtype):
        for trial in trials:
            gap = difference(run_seeded(expected, trial), run_seeded(found, trial))
            worst = max(worst, gap)
            if not gap <= bound:
                node = _first_difference(expected, found, trial, bound, align)
                where = f", first at node {node}" if node else ""
                raise VerificationError(
                    f"{what} differs from what it must equal by {gap:.3g} (max abs(a - b) / max abs(a), expected at "
                    f"most {bound:g}, {dtype}, shapes {trial.shapes()}){where}. This is an error in fxcompress or in "
                    "a pass; verify=False skips the check.",
                    node=node,
                    difference=gap,
                )
        batches += [other_batch(inputs.batch)] if batched else []
    return Verification(worst, dtype, tuple(batches))


class _Recording(fx.Interpreter):
    """Runs a graph and keeps a copy of every tensor on the way."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = value.clone()
        return value


def _first_difference(
    expected: nn.Module, found: nn.Module, inputs: Inputs, bound: float, align: Align | None
) -> str | None:
    """The first node whose value differs, among those that both graphs have."""
    if not isinstance(expected, TracedModule) or not isinstance(found, TracedModule):
        return None
    right, left = _Recording(expected), _Recording(found)
    for recording, module in ((right, expected), (left, found)):
        fresh = inputs.map(Tensor.clone)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                recording.run(*positional(module, fresh))
        except RuntimeError:
            break  # what ran before the failure is compared all the same
    for node in found.graph.nodes:
        if node.name not in right.seen or node.name not in left.seen:
            continue
        wanted = right.seen[node.name]
        try:
            wanted = wanted if align is None else align(node.name, wanted)
        except (RuntimeError, IndexError):
            continue  # a batch is merged into the dimension that shrank
        if difference(wanted, left.seen[node.name]) > bound:
            return str(node.name)
    return None
