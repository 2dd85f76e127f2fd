"""Dtypes that a forward read off its own tensors, and a recording holds as literals.

``x.to(self.weight.dtype)`` is recorded as ``x.to(torch.float32)``, which would stay behind when the module moves to
another dtype, whereas ``x.to(torch.float32)`` is what its author wants in every dtype. A dtype is a constant to Python,
so one recording cannot tell them apart; a second one, of the same model in another dtype, can.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.arguments import leaves, mapped

#: What is read off ``torch.finfo(dtype)``; :data:`_ITSELF` stands for the dtype.
_FIELDS = ("min", "max", "eps", "tiny")
_ITSELF = ""
#: The name of the constant whose dtype is that of the model.
MARKER = "dtype"

#: Literals of a graph that follow the model's dtype: by their position among the leaves of a node's arguments, the
#: field of ``torch.finfo`` that each is, or :data:`_ITSELF`.
Followers = list[tuple[fx.Node, dict[int, str]]]


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The one floating-point dtype of all of a model's parameters; None if there is none, or several."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype for a second recording. Nobody treats these two as special, as many do float16 and bfloat16."""
    return torch.float32 if dtype == torch.float64 else torch.float64


def names_dtype(graph: fx.Graph, dtype: torch.dtype) -> bool:
    """Whether a graph holds literals that could have been read off a tensor of this dtype."""
    limits = {getattr(torch.finfo(dtype), field) for field in _FIELDS}
    return any(
        leaf == dtype if isinstance(leaf, torch.dtype) else type(leaf) is float and leaf in limits
        for node in graph.nodes
        for leaf in leaves((node.args, node.kwargs))
    )


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
        places: dict[int, str] = {}
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


def _field(a: Any, b: Any, dtype: torch.dtype, other: torch.dtype) -> str | None:
    """What of ``dtype`` the literal ``a`` is, if ``b`` is the same of ``other``."""
    if (a, b) == (dtype, other):
        return _ITSELF
    if type(a) is not float or type(b) is not float:
        return None
    limits, others = torch.finfo(dtype), torch.finfo(other)
    return next((f for f in _FIELDS if (a, b) == (getattr(limits, f), getattr(others, f))), None)


def follow(graph: fx.Graph, found: Followers, marker: str) -> None:
    """Read these literals off the tensor named ``marker`` from now on."""
    start = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(start):
        source = graph.create_node("get_attr", marker, name=marker.replace(".", "_"))
        made = {_ITSELF: graph.call_function(getattr, (source, "dtype"))}
        fields = [field for field in _FIELDS if any(field in places.values() for _, places in found)]
        limits = graph.call_function(torch.finfo, (made[_ITSELF],)) if fields else None
        made.update({field: graph.call_function(getattr, (limits, field)) for field in fields})
    for node, places in found:
        positions = itertools.count()

        def rewrite(value: Any, places: dict[int, str] = places, positions: Iterator[int] = positions) -> Any:
            field = places.get(next(positions))
            return value if field is None else made[field]

        node.args, node.kwargs = mapped(rewrite, node.args), mapped(rewrite, dict(node.kwargs))
