"""Dtypes that a forward read off its own tensors, and a recording holds as literals.

``x.to(self.weight.dtype)`` is recorded as ``x.to(torch.float32)``, which would stay behind when the module moves to
another dtype, whereas ``x.to(torch.float32)`` is what its author wants in every dtype. A dtype is a constant to Python,
so one recording cannot tell them apart; a second one, of the same model in another dtype, can.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.arguments import leaves, mapped

#: What is read off ``torch.finfo(dtype)``; :data:`_ITSELF` stands for the dtype.
_FIELDS = ("min", "max", "eps", "tiny")
_ITSELF = ""
#: Multiples and fractions of ``eps`` that somebody may write.
_SIMPLE = 1000
#: The name of the constant whose dtype is that of the model; of a second dtype, with its number behind.
MARKER = "dtype"


@dataclass(frozen=True)
class Follower:
    """What of the model's dtype a literal is.

    Attributes:
        field: of ``torch.finfo``, or :data:`_ITSELF`.
        function: what the code did with it, ``function(limit, operand)``; None for the limit as it is.
        operand: a number.
    """

    field: str
    function: Callable[[float, float], float] | None = None
    operand: float = 0.0


#: Literals of a graph that follow a dtype, by their position among the leaves of a node's arguments.
Followers = list[tuple[fx.Node, dict[int, Follower]]]


def dtypes_of(model: nn.Module) -> list[torch.dtype]:
    """The floating-point dtypes of a model's parameters, in the order in which they come."""
    return list(dict.fromkeys(each.dtype for each in model.parameters() if each.is_floating_point()))


def moved(model: nn.Module, dtype: torch.dtype, other: torch.dtype) -> nn.Module:
    """The model with what is ``dtype`` in ``other``, changed in place; all of it, if it has no second dtype."""
    if len(dtypes_of(model)) == 1:
        return model.to(other)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == dtype:
            tensor.data = tensor.data.to(other)
    return model


def other_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """A dtype for a second recording, none of these; nobody treats the first two as special, as many do the others."""
    choices = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return next((dtype for dtype in choices if dtype not in dtypes), torch.float64)


def names_dtype(graph: fx.Graph, dtype: torch.dtype) -> bool:
    """Whether a graph holds literals that could have been read off a tensor of this dtype."""
    return any(
        leaf == dtype if isinstance(leaf, torch.dtype) else type(leaf) is float and _near_limit(leaf, dtype)
        for node in graph.nodes
        for leaf in leaves((node.args, node.kwargs))
    )


def _near_limit(number: float, dtype: torch.dtype) -> bool:
    """Whether a number is a limit of a dtype, a simple multiple or fraction of one, or its root."""
    limits, size = torch.finfo(dtype), abs(number)
    if not 0 < size < math.inf:
        return False
    ratio = max(size / limits.eps, limits.eps / size)
    simple = ratio < _SIMPLE and math.isclose(ratio, round(ratio), rel_tol=1e-12)
    far = size >= math.sqrt(limits.max) or size <= math.sqrt(limits.tiny)
    return far or simple or math.isclose(size * size, limits.eps, rel_tol=1e-12)


def followers(first: fx.Graph, second: fx.Graph, dtype: torch.dtype, other: torch.dtype) -> Followers:
    """The literals that are ``dtype`` in one recording and ``other`` in another; none if the graphs do not correspond.

    Args:
        first: the recording in ``dtype``.
        second: the recording of the same model, on the same inputs, in ``other``.
    """
    if len(first.nodes) != len(second.nodes):
        return []
    found: Followers = []
    for node, twin in zip(first.nodes, second.nodes, strict=True):
        here, there = leaves((node.args, node.kwargs)), leaves((twin.args, twin.kwargs))
        if (node.op, node.target) != (twin.op, twin.target) or len(here) != len(there):
            return []
        places: dict[int, Follower] = {}
        for index, (a, b) in enumerate(zip(here, there, strict=True)):
            if isinstance(a, (fx.Node, Tensor)) or a == b:
                continue
            field = _field(a, b, dtype, other)
            if field is not None:
                places[index] = field
            elif type(a) is not float or type(b) is not float:
                return []
        if places:
            found.append((node, places))
    return found


def _field(a: Any, b: Any, dtype: torch.dtype, other: torch.dtype) -> Follower | None:
    """What of ``dtype`` the literal ``a`` is, if ``b`` is the same of ``other``."""
    if (a, b) == (dtype, other):
        return Follower(_ITSELF)
    if type(a) is not float or type(b) is not float:
        return None
    limits, others = torch.finfo(dtype), torch.finfo(other)
    pairs = [(field, float(getattr(limits, field)), float(getattr(others, field))) for field in _FIELDS]
    for field, here, there in pairs:
        if (a, b) == (here, there):
            return Follower(field)
    found = (_derived(field, a, b, here, there) for field, here, there in pairs)
    return next((follower for follower in found if follower is not None), None)


def _derived(field: str, a: float, b: float, here: float, there: float) -> Follower | None:
    """How both numbers are made of a limit in the same way: by one operation, with one operand, to the last bit."""
    trials: list[tuple[Callable[[float, float], float], float]] = [
        (operator.mul, a / here),
        (operator.truediv, here / a if a else 0.0),
        (operator.add, a - here),
        (operator.pow, math.log(a) / math.log(here) if a > 0 and here > 0 else 0.0),
    ]
    for function, exact in trials:
        for operand in (exact, round(exact, 9)):
            if operand and math.isfinite(operand) and function(here, operand) == a and function(there, operand) == b:
                return Follower(field, function, operand)
    return None


def follow(graph: fx.Graph, found: Followers, marker: str) -> None:
    """Read these literals off the tensor named ``marker`` from now on."""
    start = next(node for node in graph.nodes if node.op != "placeholder")
    wanted = list(dict.fromkeys(follower for _, places in found for follower in places.values()))
    with graph.inserting_before(start):
        source = graph.create_node("get_attr", marker, name=marker.replace(".", "_"))
        dtype = graph.call_function(getattr, (source, "dtype"))
        made = {Follower(_ITSELF): dtype}
        fields = [field for field in _FIELDS if any(each.field == field for each in wanted)]
        limits = graph.call_function(torch.finfo, (dtype,)) if fields else None
        made.update({Follower(field): graph.call_function(getattr, (limits, field)) for field in fields})
        for each in wanted:
            if each.function is not None:
                made[each] = graph.call_function(each.function, (made[Follower(each.field)], each.operand))
    for node, places in found:
        positions = itertools.count()

        def rewrite(value: Any, places: dict[int, Follower] = places, positions: Iterator[int] = positions) -> Any:
            follower = places.get(next(positions))
            return value if follower is None else made[follower]

        node.args, node.kwargs = mapped(rewrite, node.args), mapped(rewrite, dict(node.kwargs))
