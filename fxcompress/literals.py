"""Integers written into a graph that count channels, and what they become when channels go.

One row for each family of functions. A row sees the plan (what lives) and the node, and returns its new arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from fxcompress.channels.labels import Labels
from fxcompress.errors import GraphError
from fxcompress.rewrite import describe

if TYPE_CHECKING:
    from fxcompress.plan import Plan


@dataclass(frozen=True)
class Scaled:
    """A size to be computed in the graph, because it also counts the batch or a resolution.

    Attributes:
        node: the number that it is computed from.
        numerator, denominator: ``node * numerator // denominator``.
        wanted: what that is on the example inputs.
    """

    node: fx.Node
    numerator: int
    denominator: int
    wanted: int


@dataclass(frozen=True)
class Literals:
    """How the arguments of one family of functions are rewritten.

    Attributes:
        rewrite: ``(plan, node) -> (args, kwargs)``.
        takes_sizes: numbers among the arguments are sizes, not values.
    """

    rewrite: Callable[[Plan, fx.Node], tuple[Any, Any]]
    takes_sizes: bool = True


Arguments = tuple[Any, Any]


def _shape(plan: Plan, node: fx.Node) -> Arguments:
    """``x.view(sizes)`` and everything else that is told the shape of its result."""
    wanted = plan.shape(plan.value(node))
    kwargs = dict(node.kwargs)
    for key in ("shape", "size"):
        if key in kwargs:
            given: Any = kwargs[key]
            return node.args, {**kwargs, key: _sizes(plan, given, wanted)}
    first = 1 if node.args and isinstance(node.args[0], fx.Node) and isinstance(plan.value(node.args[0]), Labels) else 0
    rest = _open(node)[first:]
    if rest and isinstance(rest[0], (tuple, list)):
        return (*node.args[:first], _sizes(plan, rest[0], wanted), *rest[1:]), kwargs
    return (*node.args[:first], *_sizes(plan, rest, wanted)), kwargs


def _sizes(plan: Plan, given: Sequence[Any], wanted: Sequence[int]) -> tuple[Any, ...]:
    return tuple(plan.size(item, size) for item, size in zip(given, wanted, strict=True))


def _unflatten(plan: Plan, node: fx.Node) -> Arguments:
    names = ("input", "dim", "sizes")
    source, dim, sizes = (_argument(node, i, name) for i, name in enumerate(names))
    shape = plan.shape(plan.value(node))
    start = dim % len(plan.value(source).shape)
    return (source, dim, _sizes(plan, sizes, shape[start : start + len(sizes)])), {}


def _split(plan: Plan, node: fx.Node) -> Arguments:
    """Pieces of what lives: sizes become a list where they are no longer equal."""
    source = node.args[0]
    dim = _argument(node, 2, "dim", 0)
    pieces = plan.value(node)
    dim %= len(pieces[0].shape)
    live = [plan.shape(piece)[dim] for piece in pieces]
    if live == [piece.shape[dim] for piece in pieces]:
        return node.args, node.kwargs
    return (source, live, dim), {}


def _narrow(plan: Plan, node: fx.Node) -> Arguments:
    source, dim, start, length = (_argument(node, i, n) for i, n in enumerate(("input", "dim", "start", "length")))
    kept = _kept(plan, plan.value(source), dim % len(plan.value(source).shape))
    if kept is None or not isinstance(start, int) or not isinstance(length, int):
        return node.args, node.kwargs
    inside = [i for i, old in enumerate(kept) if start <= old < start + length]
    return (source, dim, inside[0] if inside else 0, len(inside)), {}


class InexpressibleError(GraphError):
    """A node that cannot be rewritten for a live set."""

    def __init__(self, node: fx.Node, problem: str) -> None:
        super().__init__(f"{describe(node)} {problem}, which cannot be rewritten")
        self.node = node


def _setitem(plan: Plan, node: fx.Node) -> Arguments:
    """A write through an index: where its channels are now must be a plain range."""
    args, kwargs = _getitem(plan, node)
    old, new = (i if isinstance(i, tuple) else (i,) for i in (_open(node)[1], args[1]))
    labels = plan.value(_open(node)[0])
    for dim, (before, after) in enumerate(zip(old, new, strict=True)):
        kept = _kept(plan, labels, dim) if isinstance(labels, Labels) else None
        if kept is None or not isinstance(before, slice) or before == slice(None):
            continue
        chosen = range(labels.shape[dim])[before]
        if [kept[i] for i in range(len(kept))[after]] != [i for i in chosen if i in kept]:
            raise InexpressibleError(node, "writes into channels that are no range any more")
    return args, kwargs


def _getitem(plan: Plan, node: fx.Node) -> Arguments:
    """Slices and integers along a dimension that shrinks point at where their channels are now."""
    source, index, *rest = _open(node)
    labels = plan.value(source) if isinstance(source, fx.Node) else None
    if not isinstance(labels, Labels):
        return node.args, node.kwargs
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    dim, made = 0, []
    for item in items:
        if item is Ellipsis:
            dim += len(labels.shape) - consumed
        rows = [] if item is None or item is Ellipsis else _kept_rows(plan, labels, dim)
        pointed = [_point(item, kept, labels.shape[dim]) for kept in rows]
        made.append(pointed[0] if pointed and all(other == pointed[0] for other in pointed) else item)
        dim += item is not None and item is not Ellipsis
    return (source, tuple(made) if isinstance(index, (tuple, list)) else made[0], *rest), {}


def _point(item: Any, kept: list[int], size: int) -> Any:
    if isinstance(item, int):
        return kept.index(item % size) if item % size in kept else item
    if not isinstance(item, slice) or item == slice(None):
        return item
    if any(isinstance(bound, fx.Node) for bound in (item.start, item.stop, item.step)):
        return item
    chosen = set(range(size)[item])
    inside = [i for i, old in enumerate(kept) if old in chosen]
    if not inside:
        return item
    step = inside[1] - inside[0] if len(inside) > 1 else 1
    return slice(inside[0], inside[-1] + 1, step if step > 1 else None)


def _kept(plan: Plan, labels: Labels, dim: int) -> list[int] | None:
    """The indices kept of a dimension, or None where it does not shrink on its own."""
    for cut in plan.cuts(labels) or ():
        if cut.dims == (dim,):
            return [int(i) for i in cut.keep[0]]
    return None


def _kept_rows(plan: Plan, labels: Labels, dim: int) -> list[list[int]]:
    """The indices kept of a dimension, for each row that keeps others (the heads of an attention do)."""
    for cut in plan.cuts(labels) or ():
        if dim not in cut.dims:
            continue
        place = cut.dims.index(dim)
        if cut.gather is None or place != cut.column:
            return [[int(i) for i in cut.keep[place]]]
        rows = np.moveaxis(cut.gather, place, -1).reshape(-1, cut.gather.shape[place])
        return [[int(i) for i in row] for row in np.unique(rows, axis=0)]
    return []


def _pad(plan: Plan, node: fx.Node) -> Arguments:
    """Padding of a channel dimension shrinks with what was padded."""
    source, amounts, *rest = _open(node)
    before, after = plan.value(source), plan.value(node)
    ndim = len(after.shape)
    made = list(amounts)
    for i in range(0, len(amounts), 2):
        dim = ndim - 1 - i // 2
        kept = _kept(plan, after, dim)
        if kept is not None and (amounts[i] or amounts[i + 1]):
            front, width = amounts[i], before.shape[dim]
            made[i] = sum(old < front for old in kept)
            made[i + 1] = sum(old >= front + width for old in kept)
    return (source, type(amounts)(made), *rest), node.kwargs


def _convolution(groups: int) -> Callable[[Plan, fx.Node], Arguments]:
    def rewrite(plan: Plan, node: fx.Node) -> Arguments:
        """``groups`` of a depthwise convolution counts channels."""
        before = _argument(node, groups, "groups", 1)
        if before == 1:
            return node.args, node.kwargs
        source, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
        channels = plan.shape(plan.value(source))[1]
        if not getattr(node.target, "__name__", "").startswith("conv_transpose"):
            wanted = channels // plan.shape(plan.value(weight))[1]
        else:
            wanted = channels if plan.value(weight).shape[0] == before else before
        return _with(node, groups, "groups", wanted)

    return rewrite


def _layer_norm(plan: Plan, node: fx.Node) -> Arguments:
    old = _argument(node, 1, "normalized_shape")
    shape = plan.shape(plan.value(_argument(node, 0, "input")))
    return _with(node, 1, "normalized_shape", _sizes(plan, old, shape[len(shape) - len(old) :]))


def _group_norm(plan: Plan, node: fx.Node) -> Arguments:
    source = plan.value(_argument(node, 0, "input"))
    return _with(node, 1, "num_groups", live_groups(plan, source, _argument(node, 1, "num_groups")))


def live_groups(plan: Plan, labels: Labels, groups: int) -> int:
    """How many groups of a GroupNorm still have channels."""
    kept = _kept(plan, labels, 1)
    return groups if kept is None else len({old // (labels.shape[1] // groups) for old in kept})


def _attention(plan: Plan, node: fx.Node) -> Arguments:
    """The scale that the head size implied becomes explicit."""
    query = plan.value(_argument(node, 0, "query"))
    if plan.shape(query)[-1] == query.shape[-1] or node.kwargs.get("scale") is not None:
        return node.args, node.kwargs
    return node.args, {**node.kwargs, "scale": 1 / math.sqrt(query.shape[-1])}


def _open(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments; fx's own type for them says too little to work with."""
    return node.args


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _with(node: fx.Node, position: int, name: str, value: Any) -> Arguments:
    if position < len(node.args):
        return (*node.args[:position], value, *node.args[position + 1 :]), node.kwargs
    return node.args, {**node.kwargs, name: value}


_ROWS = {
    Literals(
        _shape
    ): """view reshape expand broadcast_to zeros ones full empty new_zeros new_ones new_full new_empty""",
    Literals(_unflatten): "unflatten",
    Literals(_split): "split chunk tensor_split split_with_sizes",
    Literals(_narrow): "narrow",
    Literals(_getitem): "getitem",
    Literals(_setitem): "setitem",
    Literals(_pad): "pad constant_pad_nd",
    Literals(_convolution(6), takes_sizes=False): """conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d""",
    Literals(_layer_norm): "layer_norm rms_norm",
    Literals(_group_norm): "group_norm",
    Literals(_attention): "scaled_dot_product_attention",
}
#: Rows by the name of the function or method.
LITERALS: dict[str, Literals] = dict(
    itertools.chain.from_iterable(((name, row) for name in names.split()) for row, names in _ROWS.items())
)
