"""What is known of a recurrent operator whatever it is given: units that stay zero, and columns that read nothing.

A unit whose rows and biases are zero in every gate computes tanh(0) or relu(0), and a memory that starts from zero
stays zero whatever its gates are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.labels import BoolArray, IntArray, dims_of
from fxcompress.channels.recurrence import passes_of, states_of
from fxcompress.channels.rules import Call
from fxcompress.recurrent import gates_of

Known = Tensor | None
Of = Callable[[Tensor], Known]


@dataclass(frozen=True)
class Columns:
    """Channels that a weight reads at every step: their labels, and which of them make no difference."""

    labels: IntArray
    harmless: BoolArray


@dataclass(frozen=True)
class Zeros:
    """What is zero in a call.

    Attributes:
        results: the constants of its results: 0, and NaN where nothing is known.
        columns: of each weight that reads channels.
    """

    results: list[Known]
    columns: list[Columns]

    @classmethod
    def of(cls, call: Call, of: Of) -> Zeros:
        """Read a call of a recurrent operator."""
        passes, states = passes_of(call), states_of(call)
        directions = 2 if call.arguments.get("bidirectional") else 1
        starts = [_starts(state, of, len(passes)) for state in states]
        entering = _zero(of(call.arguments["input"]), call.arguments["input"].shape, call.arguments["input"].dim() - 1)
        columns: list[Columns] = []
        memories: list[BoolArray] = []
        hidden: list[BoolArray] = []
        for index, step in enumerate(passes):
            still = np.ones(step.reads.shape[0] // gates_of(call.name), dtype=bool)
            for tensor in (step.reads, step.recurs, *step.biases):
                still &= _zero(of(tensor), tensor.shape, 0).reshape(-1, len(still)).all(0)
            for start in starts[-1:]:  # of an LSTM the memory
                still &= start[index]
            handed = still
            if step.projects is not None:
                handed = _product_is_zero(of(step.projects), step.projects, still)
                columns += _columns(call, step.projects, of, still)
            for start in starts[:1]:
                handed = handed & start[index]
            layer = index // directions
            reads = entering if layer == 0 else np.concatenate(hidden[(layer - 1) * directions : layer * directions])
            columns += _columns(call, step.reads, of, reads)
            columns += _columns(call, step.recurs, of, handed)
            memories.append(still)
            hidden.append(handed)
        state = [hidden, memories] if call.name.startswith("lstm") else [hidden]
        made = [] if call.name.endswith("_cell") else [np.concatenate(hidden[-directions:])]
        made += [rows[0] if call.name.endswith("_cell") else np.stack(rows) for rows in state]
        return cls([_constants(zero, item.dim()) for zero, item in zip(made, call.result, strict=True)], columns)


def _starts(state: Tensor, of: Of, rows: int) -> BoolArray:
    """Which units an initial state, ``[rows, N, units]`` or of a cell ``[N, units]``, starts from zero."""
    known = of(state)
    zero = torch.zeros((1,) * state.dim(), dtype=torch.bool) if known is None else known == 0
    zero = zero.expand(state.shape).reshape(rows, -1, state.shape[-1])
    found: BoolArray = zero.all(1).numpy()
    return found


def _zero(known: Known, shape: Sequence[int], dim: int) -> BoolArray:
    """For every index along a dimension whether all elements there are exact zeros."""
    zero = torch.zeros((1,) * len(shape), dtype=torch.bool) if known is None else known == 0
    others = [d for d in range(len(shape)) if d != dim]
    found: BoolArray = (zero.all(dim=others) if others else zero).expand(shape[dim]).numpy()
    return found


def _product_is_zero(known: Known, weight: Tensor, zero: BoolArray) -> BoolArray:
    """For every row of a weight whether it reads only zeros."""
    if known is None:
        return np.zeros(weight.shape[0], dtype=bool)
    found: BoolArray = ((known == 0) | torch.from_numpy(zero)).all(1).numpy()
    return found


def _columns(call: Call, weight: Tensor, of: Of, entering: BoolArray) -> list[Columns]:
    harmless = _zero(of(weight), weight.shape, 1) | entering
    factors = [factor for factor in call.of(weight).factors if dims_of(factor) == (1,)]
    return [Columns(factor.reshape(-1).numpy(), harmless) for factor in factors]


def _constants(zero: BoolArray, ndim: int) -> Known:
    """0 and NaN along the last dimension (and the first, where ``zero`` has rows) of a tensor."""
    if not zero.any():
        return None
    known = torch.where(torch.from_numpy(zero), 0.0, torch.nan).double()
    shape = [1] * (ndim - zero.ndim)
    return known.reshape(*shape, -1) if zero.ndim == 1 else known.reshape(len(zero), *shape, -1)
