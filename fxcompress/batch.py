"""Literals of a recording that count the batch, found by a second one at another batch size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from fxcompress.arguments import leaves, mapped
from fxcompress.nodes import scale_size

#: Functions whose integers are sizes, where a literal may stand for the batch.
_SHAPED = frozenset(
    """
    view reshape expand repeat tile unflatten split narrow arange zeros ones full empty rand randn new_zeros
    new_ones new_full new_empty broadcast_to
    """.split()
)


#: Functions that take a dimension apart, over which Python may then have looped.
_TAKEN_APART = frozenset(("unbind", "select", "chunk", "split", "tensor_split"))


def looks_like_batch(node: fx.Node, batch: int) -> bool:
    """Whether a node holds a literal that may stand for the batch, or may have taken the batch apart."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    if name in _TAKEN_APART or (name == "getitem" and _first_index(node.args[1])):
        return True
    if name not in _SHAPED:
        return False
    return any(type(leaf) is int and leaf > 0 and leaf % batch == 0 for leaf in leaves((node.args, node.kwargs)))


def _first_index(index: Any) -> bool:
    """Whether an index picks one element, or a fixed range, of dimension 0."""
    first = index[0] if isinstance(index, (tuple, list)) and index else index
    if isinstance(first, slice):
        return any(type(bound) is int for bound in (first.start, first.stop))
    return type(first) is int


def replace_scaled(first: fx.Graph, second: fx.Graph, batch: int, other: int, source: fx.Node) -> bool:
    """Turn the literals that scale with the batch into sizes of ``source``; False if the graphs do not correspond."""
    pairs = list(zip(first.nodes, second.nodes, strict=False))
    if len(first.nodes) != len(second.nodes):
        return False
    scaled: list[tuple[fx.Node, set[int]]] = []
    for node, twin in pairs:
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        here, there = leaves((node.args, node.kwargs)), leaves((twin.args, twin.kwargs))
        if len(here) != len(there):
            return False
        found = set()
        for index, (a, b) in enumerate(zip(here, there, strict=True)):
            if isinstance(a, (fx.Node, Tensor)) or a == b:
                continue
            if type(a) is not int or type(b) is not int or a * other != b * batch:
                return False
            found.add(index)
        if found:
            scaled.append((node, found))
    if scaled:
        _write_sizes(first, scaled, batch, source)
    return True


def _write_sizes(graph: fx.Graph, scaled: list[tuple[fx.Node, set[int]]], batch: int, source: fx.Node) -> None:
    with graph.inserting_after(source):
        size = graph.call_method("size", (source, 0))
    for node, indices in scaled:
        places = itertools.count()

        def rewrite(
            value: Any, node: fx.Node = node, indices: set[int] = indices, places: Iterator[int] = places
        ) -> Any:
            if next(places) not in indices:
                return value
            if value == batch:
                return size
            with graph.inserting_before(node):
                return graph.call_function(scale_size, (size, value, batch))

        node.args, node.kwargs = mapped(rewrite, node.args), mapped(rewrite, dict(node.kwargs))
