"""What each class of ATen operator does to labels (design 7).

A rule takes a :class:`Call` and returns the labels of the results. There are few rules because ATen has few classes of
operators; an operator without a rule freezes what enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.channels.labels import Labels, aligned, canonical, column_of, dims_of, view_factor
from fxcompress.channels.ledger import Ledger


@dataclass
class Call:
    """One ATen call: the operator, its arguments by name, its result, and the labels of its tensors."""

    name: str
    func: Any
    arguments: dict[str, Any]
    result: Any
    ledger: Ledger
    of: Callable[[Tensor], Labels]
    relabel: Callable[[Tensor, Labels], bool]
    name_of: Callable[[Tensor], str | None]  # of a parameter or buffer
    values_only: bool  # the result's second part (indices) is not used
    tensors: list[Tensor]  # every tensor argument, in order
    const: bool  # the result depends on parameters and buffers alone

    def labels(self, name: str) -> Labels:
        """The labels of the tensor argument called ``name``."""
        return self.of(self.arguments[name])

    def made(self, factors: Iterable[Tensor], index: int | None = None, direct: bool = False) -> Labels:
        """Labels for (part ``index`` of) the result."""
        tensor = self.result if index is None else self.result[index]
        return Labels(tuple(tensor.shape), tuple(factors), self.const, direct)


Rule = Callable[[Call], Any]
#: A shape and the factors in it.
Operand = tuple[tuple[int, ...], Sequence[Tensor]]


# ---- joining operands: the heart of pointwise operators and contractions --------------------------------------------


def join(ledger: Ledger, operands: Sequence[Operand], reason: str) -> list[Tensor]:
    """Tie the factors of operands that meet in one index space (equal number of dimensions, size 1 = broadcast).

    Elements that meet are one channel. Where an operand extends along a labelled dimension without labels of its own,
    nothing may be cut there. Returns the distinct factors that remain.
    """
    if all(len(factors) == 1 for _, factors in operands):
        first, *others = [factors[0] for _, factors in operands]
        if all(dims_of(factor) == dims_of(first) for factor in others):  # most often: nothing extends without labels
            for factor in others:
                ledger.unite(first, factor)
            return [first]
    sides = [(shape, {id(f): (f, dims_of(f)) for f in factors}) for shape, factors in operands]
    pins: list[tuple[Tensor, set[int]]] = []
    frozen = True
    while frozen:  # what is frozen is dense from here on, which may freeze more: every round takes a factor away
        pins, frozen = [], False
        bare = [_bare_dims(shape, factors.values()) for shape, factors in sides]
        for i, (_, factors) in enumerate(sides):
            elsewhere = set().union(*bare[:i], *bare[i + 1 :])
            for factor, dims in list(factors.values()) if elsewhere else ():
                dense = elsewhere.intersection(dims)
                if len(dense) == len(dims):
                    ledger.freeze([factor], reason)
                    del factors[id(factor)]
                    frozen = True
                elif dense:
                    pins.append((factor, dense))
    for factor, dense in pins:
        ledger.pin(factor, dense, reason)
    kept: list[tuple[Tensor, tuple[int, ...]]] = []
    implied: set[int] = set()
    for _, factors in sides:
        before = list(kept)
        for dims in dict.fromkeys(dims for _, dims in factors.values()):
            mine = [factor for factor, own in factors.values() if own == dims]
            same = [factor for factor, own in before if own == dims]
            if len(mine) == len(same):
                for left, right in zip(same, mine, strict=True):
                    ledger.unite(left, right)
                continue
            if same:
                _conjoin(ledger, *((same, mine) if len(same) > len(mine) else (mine, same)))
            for other, own in before:
                if own != dims and not set(own).isdisjoint(dims):
                    implied |= {id(less) for factor in mine if (less := meet(ledger, other, factor)) is not None}
            if not same:
                kept += [(factor, dims) for factor in mine]
    return [factor for factor, _ in kept if id(factor) not in implied]


def meet(ledger: Ledger, left: Tensor, right: Tensor) -> Tensor | None:
    """Tie two factors that share some of the dimensions along which they vary; returns one that follows from the other.

    What extends along rows alone stands for them; what extends along the channels of a row is one with those. Rows that
    meet channels along some of their dimensions (several heads of queries that share one of values) stand for all that
    they meet.
    """
    small, large = sorted((left, right), key=lambda factor: len(dims_of(factor)))
    inside = set(dims_of(small)) < set(dims_of(large))
    standing = next(filter(ledger.are_rows, (left, right)), None)
    if inside and column_of(large) not in dims_of(small):
        ledger.stand_for(small, large)
    elif not inside and standing is not None:
        ledger.stand_for(standing, right if standing is left else left)
        return standing
    else:
        ledger.unite(left, right, spread=True)
    return small if inside else None


def _conjoin(ledger: Ledger, many: Sequence[Tensor], few: Sequence[Tensor]) -> None:
    """Tie the labels of a merged dimension with factors that were merged into it (heads times channels that all heads
    share): those that change fastest are its channels, the others its rows."""
    fastest = max(many, key=_changes)
    for factor in many:
        for merged in few:
            if factor is fastest or len(few) > 1:
                ledger.unite(factor, merged, spread=True)
            else:
                ledger.stand_for(factor, merged)


def _changes(factor: Tensor) -> int:
    """How often labels differ from those before them, over all dimensions."""
    return sum(int((factor.diff(dim=dim) != 0).sum()) for dim in dims_of(factor))


def _bare_dims(shape: tuple[int, ...], factors: Iterable[tuple[Tensor, tuple[int, ...]]]) -> set[int]:
    """Dimensions along which an operand extends without labels."""
    labelled = {dim for _, dims in factors for dim in dims}
    return {dim for dim, size in enumerate(shape) if size > 1 and dim not in labelled}


def pointwise(call: Call) -> Any:
    """Aligned elements are one and the same channel."""
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    ndim = max((tensor.dim() for tensor in [*call.tensors, *results]), default=0)
    operands: list[Operand] = []
    for tensor in call.tensors:
        factors = [aligned(factor, ndim) for factor in call.of(tensor).factors]
        operands.append(((1,) * (ndim - tensor.dim()) + tuple(tensor.shape), factors))
    if len(operands) > 1 and call.ledger.has_own_copies():
        beside = [[other for other in operands if other is not one] for one in operands]
        operands = [_not_copied(call.ledger, *each) for each in zip(operands, beside, strict=True)]
    factors = join(call.ledger, operands, "it meets a tensor without channels of its own")
    if isinstance(call.result, (tuple, list)):
        return [call.made(factors, i) for i in range(len(call.result))]
    return call.made(factors)


def _not_copied(ledger: Ledger, operand: Operand, others: Sequence[Operand]) -> Operand:
    """An operand as it was before the running node copied it to meet another: broadcasting would have done the same."""
    shape, factors = list(operand[0]), operand[1]
    for copies in [factor for factor in factors if ledger.are_own_copies(factor)]:
        (dim,) = dims_of(copies)
        if any(other[dim] > 1 for other, _ in others):
            factors = [factor for factor in factors if factor is not copies]
            shape[dim] = 1
    return tuple(shape), factors


# ---- movement: run the operator on the labels ---------------------------------------------------------------------


def movement(call: Call) -> Any:
    """The operator itself, run on every factor of its first argument."""
    return _moved(call, call.of(next(iter(call.arguments.values()))))


def _moved(call: Call, labels: Labels) -> Any:
    """The operator itself, run on every factor of what stands for its first argument."""
    rest = list(call.arguments.items())[1:]
    parts: list[list[Tensor]] = []
    for factor, expanded in zip(labels.factors, labels.expanded(), strict=True):
        moved = call.func(expanded, **dict(rest))
        pieces = list(moved) if isinstance(moved, (tuple, list)) else [moved]
        parts.append([piece if piece.numel() else _empty_piece(piece, factor, labels.shape) for piece in pieces])
    many = isinstance(call.result, (tuple, list))
    made = []
    for i in range(len(call.result) if many else 1):
        factors = []
        for part in parts:
            varying = canonical(part[i])
            if varying is not None:
                factors.append(varying)
            elif part[i].numel():
                call.ledger.freeze([part[i].reshape(-1)[:1]], "it is picked out on its own")
        made.append(call.made(factors, i if many else None, labels.direct))
    return made if many else made[0]


def pixel_shuffle(call: Call) -> Any:
    """Channels become positions: all that make one channel of the result are one, as no size can leave some out."""
    source, labels = call.arguments["self"], call.labels("self")
    channel, each = source.dim() - 3, call.arguments["upscale_factor"] ** 2
    factors = []
    for factor in labels.factors:
        if factor.shape[channel] > 1:
            sets = factor.unflatten(channel, (-1, each))
            first = sets.narrow(channel + 1, 0, 1)
            call.ledger.unite(sets, first)
            factor = first.expand_as(sets).flatten(channel, channel + 1)
        factors.append(factor)
    return _moved(call, Labels(labels.shape, tuple(factors), labels.const, labels.direct))


def _empty_piece(piece: Tensor, factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The factor of a piece without elements (``x[:, :0]``): there are channels along the dimensions it left alone."""
    if piece.dim() != len(shape):
        return piece
    untouched = all(new == old for new, old, size in zip(piece.shape, shape, factor.shape, strict=True) if size > 1)
    return factor if untouched else piece


def permutation(call: Call) -> Labels:
    """Dimensions in another order, or new ones of size 1: the operator itself, run on the factors as they are."""
    (_, source), *rest = call.arguments.items()
    labels = call.of(source)
    return call.made([call.func(factor, **dict(rest)) for factor in labels.factors], direct=labels.direct)


def view(call: Call) -> Labels:
    """A reshape: only the blocks of dimensions in which labels vary are touched."""
    labels = call.labels("self")
    shape = tuple(call.result.shape)
    factors = [view_factor(factor, labels.shape, shape) for factor in labels.factors]
    kept = [f for factor in factors if (f := canonical(factor)) is not None]
    if len(kept) > 1:  # copies that are merged with channels (a key's of several heads) are numbered by those
        kept = [f for f in kept if not (call.ledger.are_alone(f) and _beside(f, kept))]
    return call.made(kept, direct=labels.direct)


def _beside(factor: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether another factor varies along a dimension of this one."""
    return any(other is not factor and not set(dims_of(other)).isdisjoint(dims_of(factor)) for other in others)


def expand(call: Call) -> Labels:
    """Broadcasting makes copies, of which there may be any number: each has a label of its own."""
    labels = call.labels("self")
    shape = tuple(call.result.shape)
    before = (1,) * (len(shape) - len(labels.shape)) + labels.shape
    factors = [aligned(f, len(shape)) for f in labels.factors]
    for dim, (old, new) in enumerate(zip(before, shape, strict=True)):
        if old < new:
            copies = call.ledger.copies_along(dim, new)
            factors.append(copies.reshape([new if d == dim else 1 for d in range(len(shape))]))
    return Labels(shape, tuple(factors), labels.const, labels.direct)


def same(call: Call) -> Labels:
    """Identity: clone, alias, contiguous."""
    labels = call.labels("self")
    return call.made(labels.factors, direct=labels.direct)


def cat(call: Call) -> Labels:
    """Labels are laid end to end along the dimension, and tied along the others."""
    pieces = [tensor for tensor in call.arguments["tensors"] if tensor.dim() > 1 or tensor.numel()]
    dim = call.arguments.get("dim", 0) % call.result.dim()
    labels = [call.of(piece) for piece in pieces]
    beside = [
        (tuple(piece.shape), [f for f in item.factors if f.shape[dim] == 1])
        for piece, item in zip(pieces, labels, strict=True)
    ]
    shapes = [(tuple(1 if d == dim else size for d, size in enumerate(shape)), factors) for shape, factors in beside]
    kept = join(call.ledger, shapes, "it is concatenated with a tensor without channels of its own")
    if any(factor.shape[dim] > 1 for item in labels for factor in item.factors):
        kept.append(_lay_out(call, pieces, labels, dim))
    return call.made(kept, direct=all(item.direct for item in labels))


def _lay_out(call: Call, pieces: Sequence[Tensor], labels: Sequence[Labels], dim: int) -> Tensor:
    parts = []
    for piece, item in zip(pieces, labels, strict=True):
        along = [factor for factor in item.factors if factor.shape[dim] > 1]
        if len(along) == 1:
            parts.append(along[0])
            continue
        call.ledger.freeze(along, "two kinds of channels share a concatenated dimension")
        size = piece.shape[dim]
        fresh = call.ledger.fresh_axis(call.ledger.node, dim, size)
        call.ledger.freeze([fresh], "a concatenated tensor has no channels of its own here")
        parts.append(fresh.reshape([size if d == dim else 1 for d in range(piece.dim())]))
    wide = [max(part.shape[d] for part in parts) for d in range(parts[0].dim())]
    return torch.cat([part.expand([*wide[:dim], part.shape[dim], *wide[dim + 1 :]]) for part in parts], dim)


def stack(call: Call) -> Labels:
    """A new dimension over tensors whose channels are tied."""
    dim = call.arguments.get("dim", 0) % call.result.dim()
    operands = [
        (tuple(t.unsqueeze(dim).shape), [f.unsqueeze(dim) for f in call.of(t).factors])
        for t in call.arguments["tensors"]
    ]
    return call.made(join(call.ledger, operands, "it is stacked on a tensor without channels of its own"))


def pad(call: Call) -> Labels:
    """Positions that padding adds get labels of their own: free where the pad is zero, frozen where it is not."""
    amounts = list(call.arguments["pad"])
    ndim = call.result.dim()
    labels = call.labels("self")
    padded = {ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    factors = []
    for factor in labels.factors:
        dims = padded & set(dims_of(factor))
        if not dims:
            factors.append(factor)
            continue
        sizes = [labels.shape[d] if d in dims else factor.shape[d] for d in range(ndim)]
        local = [amount if ndim - 1 - i // 2 in dims else 0 for i, amount in enumerate(amounts)]
        grown = torch.constant_pad_nd(factor.expand(sizes), local, 0)
        for dim in sorted(dims):
            fresh = call.ledger.fresh_axis(call.ledger.node, dim, grown.shape[dim])
            if call.arguments.get("value", 0) != 0:
                call.ledger.freeze([fresh], "padding with another value than zero")
            grown = torch.where(grown == 0, fresh.reshape([-1 if d == dim else 1 for d in range(ndim)]), grown)
        factors.append(grown)
    return call.made(factors)


def index(call: Call) -> Labels:
    """Advanced indexing: movement where the indices are constants."""
    source = call.arguments["self"]
    labels = call.of(source)
    given = (
        call.arguments["indices"]
        if call.name == "index"
        else [None] * (call.arguments["dim"] % source.dim()) + [call.arguments["index"]]
    )
    indices = list(given) + [None] * (source.dim() - len(given))
    for item in indices:
        if item is not None:
            call.ledger.freeze(call.of(item).factors, "it is an index")
    moved = {dim for dim, item in enumerate(indices) if item is not None}
    chosen_by_data = any(item is not None and not call.of(item).const for item in indices)
    factors = []
    for factor in labels.factors:
        if chosen_by_data and moved & set(dims_of(factor)):
            call.ledger.freeze([factor], "the input, one of its sizes or a write decides which index is read")
            continue
        taken = canonical(torch.ops.aten.index.Tensor(factor.expand(labels.shape), given))
        if taken is not None:
            factors.append(taken)
    return call.made(factors)


def im2col(call: Call) -> Labels:
    """``unfold``: every channel becomes a run of kernel positions."""
    window = call.arguments["kernel_size"]
    repeats = window[0] * window[1]
    kept = []
    for factor in call.labels("self").factors:
        if dims_of(factor) == (1,):
            kept.append(factor.reshape(1, -1, 1).repeat_interleave(repeats, 1))
        else:
            call.ledger.freeze([factor], "it lies in a spatial dimension")
    return call.made(kept)
