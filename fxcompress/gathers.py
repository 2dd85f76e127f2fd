"""Rearrangements that no literals can express any more, as one selection of live positions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.channels.labels import IntArray


@dataclass(frozen=True)
class Gather:
    """A rearrangement written as a selection of positions: ``source`` along ``dim``, of ``size`` live positions.

    ``index`` is 1-D, or has a dimension for each of the value's where rows select others (the heads of an attention).
    """

    source: fx.Node
    dim: int
    index: Tensor
    size: int


def selection(given: Tensor, wanted: Tensor, labelled: Collection[int]) -> tuple[int, Tensor] | None:
    """The dimension along which ``given`` has all that ``wanted`` holds at a place, and where: ``(dim, index)``.

    Args:
        given: numbers, each once.
        wanted: some of them, in another order.
        labelled: dimensions along which order may differ.

    Returns:
        int64 index, see :class:`Gather`; None where more than one dimension would have to be gathered along.
    """
    if given.dim() != wanted.dim():
        return None
    first, some = given, wanted
    for dim in set(range(given.dim())) - set(labelled):  # what holds at their first index is checked at all of them
        first, some = first.narrow(dim, 0, 1), some.narrow(dim, 0, 1)
    numbers = first.numpy().reshape(-1)
    order = np.argsort(numbers)
    places = order[np.searchsorted(numbers, some.numpy(), sorter=order).clip(max=len(order) - 1)]
    if (numbers[places] != some.numpy()).any():
        return None
    coordinates = np.unravel_index(places, tuple(first.shape))
    for dim in sorted(labelled):
        index = _compact(torch.from_numpy(coordinates[dim].astype(np.int64)), dim)
        if _gathers(given, wanted, dim, coordinates):
            return dim, index.reshape(-1) if index.numel() == index.shape[dim] else index
    return None


def _gathers(given: Tensor, wanted: Tensor, dim: int, coordinates: tuple[IntArray, ...]) -> bool:
    """Whether everything lies where it lay, but for its place along ``dim``."""
    sizes = [(a, b) for d, (a, b) in enumerate(zip(given.shape, wanted.shape, strict=True)) if d != dim]
    if any(a != b for a, b in sizes):
        return False
    index = torch.from_numpy(coordinates[dim].astype(np.int64)).expand(wanted.shape)
    return torch.equal(given.gather(dim, index), wanted)


def _compact(index: Tensor, dim: int) -> Tensor:
    """Without rows that repeat others: all of them, or every period (of heads, in a dimension that has the batch)."""
    for other in set(range(index.dim())) - {dim}:
        size = index.shape[other]
        for period in (p for p in range(1, size) if size % p == 0):
            if torch.equal(index.narrow(other, 0, size - period), index.narrow(other, period, size - period)):
                index = index.narrow(other, 0, period)
                break
    return index.contiguous()
