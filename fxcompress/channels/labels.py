"""Labels: which channel every element of a tensor belongs to, and how a tensor shrinks when channels die.

A tensor's labels are a conjunction of *factors*. A factor is an integer tensor with the tensor's number of dimensions,
of size 1 along every dimension in which it does not vary; an element is live if all its factors' labels are. Most
tensors have one factor that varies along one dimension. A view of ``heads * size`` channels as ``(heads, size)`` has
one factor that varies along two, and an outer product has two factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Labels:
    """The labels of one tensor.

    Attributes:
        shape: the tensor's dense shape.
        factors: int64 tensors, see the module's docstring.
        const: derived from parameters and buffers alone.
        direct: a parameter, or a rearrangement of one: its masked elements are exact zeros.
        row_dims: dimensions along which a ragged live set is never compacted.
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, ...] = ()
    const: bool = False
    direct: bool = False
    row_dims: frozenset[int] = frozenset()

    def varying(self) -> frozenset[int]:
        """Dimensions along which some factor varies."""
        return frozenset(dim for factor in self.factors for dim in dims_of(factor))

    def expanded(self) -> list[Tensor]:
        """Every factor at the tensor's full shape (stride 0 where it does not vary)."""
        return [factor.expand(self.shape) for factor in self.factors]


def labels_in(value: Any) -> list[Labels]:
    """Every :class:`Labels` in a node's value: labels themselves most often, or a nest of them and numbers."""
    if isinstance(value, Labels):
        return [value]
    if value is None or isinstance(value, (int, float, str)):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Labels)]


def distinct(labels: IntArray) -> IntArray:
    """Sorted, each once. (numpy's own ``unique`` puts integers into a hash table, which takes ten times as long.)"""
    ordered = labels.reshape(-1)
    if (ordered[1:] > ordered[:-1]).all():  # as fresh labels are
        return ordered
    ordered = np.sort(ordered)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def dims_of(factor: Tensor) -> tuple[int, ...]:
    """The dimensions along which a factor varies."""
    return tuple([dim for dim, size in enumerate(factor.shape) if size > 1])


def canonical(factor: Tensor) -> Tensor | None:
    """A factor with size 1 where it does not vary; None where it varies nowhere."""
    for dim, size in enumerate(factor.shape):
        if size > 1:
            first = factor.narrow(dim, 0, 1)
            if factor.stride(dim) == 0 or bool((factor == first).all()):
                factor = first
    return factor if factor.numel() > 1 else None


def aligned(factor: Tensor, ndim: int) -> Tensor:
    """A factor with dimensions of size 1 put in front, as broadcasting does."""
    if factor.dim() == ndim:
        return factor
    return factor.reshape((1,) * (ndim - factor.dim()) + tuple(factor.shape))


def view_factor(factor: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """What ``view`` does to a factor: blocks of dimensions that merge or split are handled one by one.

    Only the blocks in which the factor varies are materialised; ``old`` and ``new`` are the dense shapes.
    """
    shape: list[int] = []  # of the factor, dimension by dimension of the result
    source: list[int] = []  # the factor's shape, block by block
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        left = right = 1
        while True:
            if left == right and (i > a or j > b) and left != 1:
                break
            if left <= right and i < len(old) and (left < right or left == 1):
                left *= old[i]
                i += 1
            elif j < len(new):
                right *= new[j]
                j += 1
            elif i < len(old):
                left *= old[i]
                i += 1
            else:
                break
        if any(factor.shape[d] > 1 for d in range(a, i)):
            source += old[a:i]
            shape += new[b:j]
        else:
            source += [1] * (i - a)
            shape += [1] * (j - b)
    return factor.expand(source).reshape(shape)


@dataclass(frozen=True)
class Cut:
    """How one block of dimensions shrinks: ``keep[i]`` are the indices kept of ``dims[i]``; then, where the rows of
    the block keep different columns, ``gather`` (over all dims of the block) are the columns kept along ``column``.
    """

    dims: tuple[int, ...]
    keep: tuple[IntArray, ...]
    column: int | None = None
    gather: IntArray | None = None

    def shape(self) -> tuple[int, ...]:
        """Sizes of ``dims`` after the cut."""
        if self.gather is not None:
            return tuple(self.gather.shape)
        return tuple(len(kept) for kept in self.keep)


def column_of(factor: Tensor, among: Sequence[int] | None = None) -> int:
    """The dimension along which a factor's labels follow each other most closely: along it rows may be ragged."""
    dims = dims_of(factor) if among is None else among

    def step(dim: int) -> float:
        steps = factor.diff(dim=dim).abs()
        return float(steps[steps > 0].min()) if (steps > 0).any() else float("inf")

    return min(dims, key=step)


def blocks_of(labels: Labels) -> list[tuple[tuple[int, ...], list[Tensor]]]:
    """Factors that share dimensions, together, with the dimensions along which they vary."""
    if len(labels.factors) == 1:
        return [(dims_of(labels.factors[0]), [labels.factors[0]])]
    blocks: list[tuple[set[int], list[Tensor]]] = []
    for factor in labels.factors:
        dims, members, apart = set(dims_of(factor)), [factor], []
        for block in blocks:
            if block[0] & dims:
                dims |= block[0]
                members = block[1] + members
            else:
                apart.append(block)
        blocks = [*apart, (dims, members)]
    return [(tuple(sorted(dims)), members) for dims, members in blocks]


def plan_cut(mask: BoolArray, dims: tuple[int, ...], column: int) -> Cut | None:
    """The cut that keeps the True elements of ``mask`` (one array dimension for each of ``dims``).

    The result is a rectangle, or rows that keep equally many elements of dimension ``dims[column]`` each. None where
    the kept elements are neither.
    """
    keep = tuple(np.flatnonzero(mask.any(axis=tuple(e for e in range(mask.ndim) if e != d))) for d in range(mask.ndim))
    block = mask[np.ix_(*keep)]
    if block.all():
        return Cut(dims, keep)
    rows = block.sum(axis=column)
    count = int(rows.flat[0])
    if not count or (rows != count).any():
        return None
    order = np.argsort(~np.moveaxis(block, column, -1), axis=-1, kind="stable")[..., :count]
    chosen = keep[column][order]
    return Cut(dims, keep, column, np.ascontiguousarray(np.moveaxis(chosen, -1, column)))


def plan_line(dims: tuple[int, ...], factors: Sequence[Tensor], live: BoolArray) -> Cut | None:
    """The cut along the one dimension in which all these factors vary; None where everything in it lives."""
    flags = live[factors[0].numpy().reshape(-1)]
    for factor in factors[1:]:
        flags = flags & live[factor.numpy().reshape(-1)]
    (kept,) = flags.nonzero()
    return Cut(dims, (kept,)) if len(kept) < len(flags) else None


def plan_cuts(labels: Labels, live: BoolArray) -> tuple[Cut, ...] | None:
    """One cut for each block of dimensions that some dead label touches; None if the live elements have no shape."""
    cuts = []
    for dims, factors in blocks_of(labels):
        if len(dims) == 1:
            line = plan_line(dims, factors, live)
            if line is not None:
                cuts.append(line)
            continue
        mask: BoolArray = np.ones((), dtype=bool)
        for factor in factors:
            mask = mask & live[factor.reshape([factor.shape[d] for d in dims]).numpy()]
        if mask.all():
            continue
        widest = max(factors, key=lambda factor: len(dims_of(factor)))
        full = np.ascontiguousarray(np.broadcast_to(mask, [labels.shape[d] for d in dims]))
        free = [dim for dim in dims_of(widest) if dim not in labels.row_dims]
        cut = plan_cut(full, dims, dims.index(column_of(widest, free or dims_of(widest))))
        if cut is None:
            return None
        cuts.append(cut)
    return tuple(cuts)


def live_elements(labels: Labels, live: BoolArray) -> int:
    """How many elements of a tensor live."""
    varying = labels.varying()
    count = math.prod(size for dim, size in enumerate(labels.shape) if dim not in varying)
    for dims, factors in blocks_of(labels):
        mask: BoolArray = np.ones([labels.shape[d] for d in dims], dtype=bool)
        for factor in factors:
            mask = mask & live[factor.reshape([factor.shape[d] for d in dims]).numpy()]
        count *= int(mask.sum())
    return count


def cut_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    """A dense shape after the cuts."""
    sizes = list(shape)
    for cut in cuts:
        for dim, size in zip(cut.dims, cut.shape(), strict=True):
            sizes[dim] = size
    return tuple(sizes)


#: Elements of a tensor that are cut along several dimensions at once: what lies between two cuts takes memory too.
_AT_ONCE = 2**22


def _cut_by_parts(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """The same for a large tensor, which is copied only once."""
    first, rest = cuts[0], cuts[1:]
    dim, rows = first.dims[0], torch.from_numpy(first.keep[0]).to(tensor.device)
    if len(first.dims) > 1:
        return cut_tensor(cut_tensor(tensor, [first]), rest)
    made = tensor.new_empty(cut_shape(tensor.shape, cuts))
    size = max(_AT_ONCE * tensor.shape[dim] // tensor.numel(), 1)
    for part, target in zip(rows.split(size), made.split(size, dim), strict=True):
        target.copy_(cut_tensor(tensor.index_select(dim, part), rest))
    return made


def cut_tensor(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """The live elements of a dense tensor, in dense order."""
    if len(cuts) > 1 and tensor.numel() > _AT_ONCE:
        return _cut_by_parts(tensor, cuts)
    for cut in cuts:
        for i, dim in enumerate(cut.dims):
            if i != cut.column and len(cut.keep[i]) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.from_numpy(cut.keep[i]).to(tensor.device))
        if cut.gather is not None and cut.column is not None:
            shape = [1] * tensor.dim()
            for dim, size in zip(cut.dims, cut.gather.shape, strict=True):
                shape[dim] = size
            index = torch.from_numpy(cut.gather).to(tensor.device).reshape(shape)
            dim = cut.dims[cut.column]
            sizes = list(tensor.shape)
            sizes[dim] = shape[dim]
            tensor = tensor.gather(dim, index.expand(sizes))
    return tensor
