"""Rules for operators that take statistics over dimensions, or look at neighbours along them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fxcompress.channels.labels import Labels, aligned, column_of, dims_of
from fxcompress.channels.rules import Call, join


def reduced_dims(call: Call, ndim: int) -> frozenset[int]:
    """The dimensions that an operator's ``dim`` argument names; all of them where it names none."""
    given = call.arguments.get("dim")
    if given is None or given == []:
        return frozenset(range(ndim))
    return frozenset(dim % max(ndim, 1) for dim in ([given] if isinstance(given, int) else given))


def _reduce(call: Call, factors: Iterable[Tensor], dims: frozenset[int]) -> list[Tensor]:
    """What remains of the factors after a statistic over ``dims``, dimensions kept."""
    ledger = call.ledger
    remaining = []
    for factor in factors:
        mine = set(dims_of(factor))
        if not mine & dims:
            remaining.append(factor)
        elif mine <= dims or column_of(factor) in dims:
            ledger.end([factor])
            ledger.live_only.add(ledger.node)
            if mine - dims:
                remaining.append(ledger.rows_along(factor, mine - dims))
        else:  # a sum over rows: columns that meet are one channel
            first = factor
            for dim in sorted(mine & dims):
                first = first.narrow(dim, 0, 1)
            ledger.unite(factor, first)
            remaining.append(first)
    return remaining


def reduction(call: Call) -> Any:
    """sum, mean, max, norm, ...: labels along the reduced dimensions end, and only the live ones count."""
    source = call.tensors[0]
    dims = reduced_dims(call, source.dim())
    kept = _reduce(call, call.of(source).factors, dims)
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    if first.dim() < source.dim():
        for dim in sorted(dims, reverse=True):
            kept = [factor.squeeze(dim) for factor in kept]
    if isinstance(call.result, (tuple, list)):
        return [call.made(kept, i) for i in range(len(call.result))]
    return call.made(kept)


def extremum(call: Call) -> Any:
    """``max`` and ``min`` along a dimension: a reduction if nobody asks where the extremum was."""
    return reduction(call) if call.values_only else along(call)


def softmax(call: Call) -> Labels:
    """A statistic over a dimension that keeps it."""
    labels = call.labels("self")
    _reduce_keeping(call, labels, reduced_dims(call, len(labels.shape)))
    return call.made(labels.factors)


def _reduce_keeping(call: Call, labels: Labels, dims: frozenset[int]) -> None:
    for factor in labels.factors:
        mine = set(dims_of(factor))
        if mine & dims:
            call.ledger.live_only.add(call.ledger.node)
            call.ledger.end([factor])
            if not mine <= dims:
                call.ledger.constrain(factor, rows=mine - dims)


def layer_norm(call: Call) -> Any:
    """LayerNorm and RMSNorm: statistics over the last dimensions, then a pointwise affine."""
    labels = call.labels("input")
    ndim = len(labels.shape)
    dims = frozenset(range(ndim - len(call.arguments["normalized_shape"]), ndim))
    _reduce_keeping(call, labels, dims)
    return [call.made(_affine(call, labels, ndim - 1), 0), *_without(call, labels, dims)]


def weight_norm(call: Call) -> list[Labels]:
    """``g * v / norm(v)``, with a norm for each index of one dimension: a statistic over all the others."""
    v, g = call.labels("v"), call.labels("g")
    ndim = len(v.shape)
    dims = frozenset(range(ndim)) - {call.arguments.get("dim", 0) % ndim}
    _reduce_keeping(call, v, dims)
    if v.factors:
        call.ledger.live_only.add(call.ledger.node)  # 0 / 0 where a norm is that of nothing
    kept = join(call.ledger, ((v.shape, v.factors), (g.shape, g.factors)), "its norms have no channels of their own")
    return [call.made(kept, 0), *_without(call, v, dims)]


def group_norm(call: Call) -> Any:
    """GroupNorm: statistics over rows of ``channels / groups``, which must stay equal in number."""
    labels, groups = call.labels("input"), call.arguments["group"]
    for factor in labels.factors:
        if dims_of(factor) == (1,):
            if 1 < groups < factor.numel():
                call.ledger.rows_along(call.ledger.divide(factor, groups), (0,))
            elif groups > 1:
                call.ledger.divide(factor, groups)
            call.ledger.live_only.add(call.ledger.node)
            call.ledger.end([factor])
        else:
            call.ledger.freeze([factor], "group statistics run over its positions")
    made = call.made(_affine(call, labels, 1), 0)
    return [made, *(call.made((), i) for i in range(1, len(call.result)))]


def batch_norm(call: Call) -> Any:
    """BatchNorm: pointwise in its channels, statistics over everything else."""
    labels = call.labels("input")
    for factor in labels.factors:
        if dims_of(factor) != (1,):
            call.ledger.freeze([factor], "batch statistics run over its positions")
    factors = _affine(call, labels, 1)
    return [call.made(factors, 0), *(call.made((), i) for i in range(1, len(call.result)))]


def _affine(call: Call, labels: Labels, dim: int) -> list[Tensor]:
    """Join an input with per-channel parameters that lie along ``dim`` (and, for LayerNorm, the ones before)."""
    ndim = len(labels.shape)
    operands: list[tuple[tuple[int, ...], Sequence[Tensor]]] = [(labels.shape, labels.factors)]
    behind = (1,) * (ndim - 1 - dim)
    for tensor in call.tensors[1:]:
        item = call.of(tensor)
        before = (1,) * (ndim - len(item.shape) - len(behind))
        factors = [factor.reshape(before + tuple(factor.shape) + behind) for factor in item.factors]
        operands.append((before + item.shape + behind, factors))
    return join(call.ledger, operands, "its affine parameters meet a tensor without channels of its own")


def _without(call: Call, labels: Labels, dims: frozenset[int]) -> list[Labels]:
    """Labels of saved statistics: what does not vary along the reduced dimensions."""
    kept = [factor for factor in labels.factors if not dims & set(dims_of(factor))]
    return [call.made(kept, i) for i in range(1, len(call.result))]


def positions_of(name: str, ndim: int) -> range:
    """The spatial dimensions of a pooling or interpolation, by the operator's name."""
    found = re.search(r"(\d)d", name)
    return range(ndim - (int(found.group(1)) if found else 0), ndim)


def spatial(call: Call) -> Any:
    """Pooling and interpolation: channels pass, positions do not."""
    source = call.tensors[0]
    labels = call.of(source)
    trailing = set(positions_of(call.name, source.dim()))
    kept = []
    for factor in labels.factors:
        if trailing & set(dims_of(factor)):
            call.ledger.freeze([factor], "it lies in a spatial dimension")
        else:
            kept.append(factor)
    if isinstance(call.result, (tuple, list)):
        return [call.made(kept, i) for i in range(len(call.result))]
    return call.made(kept)


def along(call: Call) -> Any:
    """Operators that depend on the order along a dimension (sort, cumsum, argmax, tril): that dimension freezes."""
    source = call.tensors[0]
    labels = call.of(source)
    dims = reduced_dims(call, source.dim()) if "dim" in call.arguments else frozenset(range(source.dim()))
    if call.name in ("tril", "triu"):
        dims = frozenset({source.dim() - 1, source.dim() - 2})
    kept = []
    for factor in labels.factors:
        if dims & set(dims_of(factor)):
            call.ledger.freeze([factor], f"{call.name} depends on the order of its elements")
        else:
            kept.append(factor)
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    if results[0].dim() < source.dim():
        for dim in sorted(dims, reverse=True):
            kept = [factor.squeeze(dim) for factor in kept]
    if isinstance(call.result, (tuple, list)):
        return [call.made(kept, i) for i in range(len(results))]
    return call.made(kept)


def glu(call: Call) -> Labels:
    """The first half gated by the second: two halves of a dimension, joined."""
    labels = call.labels("self")
    dim = call.arguments.get("dim", -1) % len(labels.shape)
    half = labels.shape[dim] // 2
    shape = tuple(call.result.shape)
    halves: list[list[Tensor]] = [[], []]
    for factor in labels.factors:
        for i in range(2):
            halves[i].append(factor.narrow(dim, i * half, half) if factor.shape[dim] > 1 else factor)
    return call.made(join(call.ledger, [(shape, halves[0]), (shape, halves[1])], "its gate has no channels"))


def embedding(call: Call) -> Labels:
    """A table's columns are produced channels; its rows are chosen by the input."""
    weight, ndim = call.labels("weight"), call.result.dim()
    kept = []
    for factor in weight.factors:
        if dims_of(factor) == (1,):
            kept.append(aligned(factor, ndim))
            call.ledger.produce([factor])
        else:
            call.ledger.freeze([factor], "the input decides which row is read")
    return call.made(kept)


def like(call: Call) -> Labels:
    """A tensor of constants in another's shape shrinks with it."""
    return Labels(tuple(call.result.shape), call.of(call.tensors[0]).factors, False, False)


def factory(call: Call) -> Labels:
    """A tensor of one constant can have any size: its labels are free. It is no constant, as it may be written into."""
    shape = tuple(call.result.shape)
    return Labels(shape, call.ledger.fresh(call.ledger.node, shape, "made"))
