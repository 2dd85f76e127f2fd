"""Rules for recurrent operators: the channels of nn.LSTM, nn.GRU, nn.RNN and their cells.

One hidden unit is one channel: its row in every gate of the weights that read the input and the state, its biases, its
column in the weights that read the state, and its place in the output and in both states. A unit acts on others through
those columns alone, so that masking them is exact whatever the unit itself holds. With projections a unit's memory and
the projections are channels of their own: ``weight_hr [P, H]`` reads memories and produces projections.

These operators do not reach a dispatch mode as what they are (one kernel, or many small operators); the interpreter
shows them to the rules call by call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxcompress.channels.labels import Labels, dims_of
from fxcompress.channels.rules import Call
from fxcompress.recurrent import GATES, gates_of, operator_of, weight_names

_LAYER_ARGUMENTS = "input hx params has_biases num_layers dropout train bidirectional batch_first".split()
_CELL_ARGUMENTS = "input hx w_ih w_hh b_ih b_hh".split()
_NONE = "its input has no channels of its own"


def read_layer(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The operator that a recurrent module's call runs and its arguments by name; None where there is no rule for it.

    There is none for a ``PackedSequence``, whose rows are as long as values say.
    """
    operator = operator_of(layer)
    named = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    if operator is None or isinstance(named["input"], PackedSequence):
        return None
    weights = [layer._parameters[name] for name in weight_names(layer)]
    if isinstance(layer, nn.RNNBase):
        named |= {"params": weights, "num_layers": layer.num_layers}
        named |= {"bidirectional": layer.bidirectional, "has_biases": layer.bias}
    else:
        named |= dict(zip(_CELL_ARGUMENTS[2:], weights, strict=False))
    return operator, {name: value for name, value in named.items() if value is not None}


def read_function(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The same for a call of ``torch.lstm`` and its like; None where ``name`` is none, or its input is packed."""
    if name.removesuffix("_cell") not in GATES:
        return None
    if name.endswith("_cell"):
        return name, dict(zip(_CELL_ARGUMENTS, args, strict=False)) | kwargs
    named = dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs
    return (name, named) if isinstance(named.get("has_biases"), bool) else None


def operator_overload(name: str) -> Any:
    """The ATen operator of a recurrent call that is not packed."""
    packet = getattr(torch.ops.aten, name)
    return packet.default if name.endswith("_cell") else packet.input


@dataclass(frozen=True)
class Pass:
    """One layer of a recurrent operator in one direction: its weights as the operator is given them.

    Attributes:
        reads: ``[gates * H, I]``, of the input.
        recurs: ``[gates * H, P]``, of the state; P is H without projections.
        biases: ``[gates * H]`` each.
        projects: ``[P, H]``, None without projections.
    """

    reads: Tensor
    recurs: Tensor
    biases: tuple[Tensor, ...]
    projects: Tensor | None


def passes_of(call: Call) -> list[Pass]:
    """Layer by layer, forward before backward."""
    given = call.arguments
    if "params" not in given:
        return [Pass(given["w_ih"], given["w_hh"], tuple(given[n] for n in ("b_ih", "b_hh") if n in given), None)]
    number = given["num_layers"] * (2 if given["bidirectional"] else 1)
    each = len(given["params"]) // number
    made = []
    for start in range(0, len(given["params"]), each):
        reads, recurs, *rest = given["params"][start : start + each]
        biases = tuple(rest[:2]) if given["has_biases"] else ()
        made.append(Pass(reads, recurs, biases, rest[-1] if len(rest) > len(biases) else None))
    return made


def states_of(call: Call) -> list[Tensor]:
    """The initial states: of the hidden units, and of an LSTM's memories; none where they are zeros by default."""
    given = call.arguments.get("hx")
    return [] if given is None else [given] if isinstance(given, Tensor) else list(given)


def recurrent(call: Call) -> list[Labels | None]:
    """Layers and cells of every kind; returns the labels of the output (of a layer) and of the states."""
    weights = [item for step in passes_of(call) for item in (step.reads, step.recurs, *step.biases, step.projects)]
    factors = [factor for item in weights if item is not None for factor in call.of(item).factors]
    direct = all(item is None or call.of(item).direct for item in weights)
    if not direct or any(len(dims_of(factor)) > 1 for factor in factors):
        for tensor in call.tensors:
            call.ledger.freeze(call.of(tensor).factors, f"the weights of {call.name} are computed")
        return [None] * len(call.result)
    return _Recurrence(call).run()


class _Recurrence:
    """One call, pass by pass."""

    def __init__(self, call: Call) -> None:
        self.call, self.ledger = call, call.ledger
        x = call.arguments["input"]
        self.gates = gates_of(call.name)
        self.steps = math.prod(x.shape[:-1])
        self.cell = call.name.endswith("_cell")

    def run(self) -> list[Labels | None]:
        entering = self._input()
        passes = passes_of(self.call)
        directions = 2 if self.call.arguments.get("bidirectional") else 1
        memories, hidden = [], []
        for start in range(0, len(passes), directions):
            made = [self._pass(step, entering) for step in passes[start : start + directions]]
            memories += [memory for memory, _ in made]
            hidden += [unit for _, unit in made]
            entering = _joined([unit for _, unit in made])
        rows = self._stacked(hidden)
        kept = rows if passes[0].projects is None else self._stacked(memories)
        if passes[0].projects is not None and kept is not None:
            if rows is None:
                self.ledger.freeze([kept], "all of them are projected on one")
            else:
                self.ledger.exceed(kept, rows)
        for state, units in zip(states_of(self.call), (rows, kept), strict=False):
            self._start(state, units)
        last = [self._state(rows, index) for index in range(0 if self.cell else 1, len(self.call.result))]
        if self.call.name == "lstm":
            last[1] = self._state(kept, 2)
        return last if self.cell else [self._output(entering), *last]

    # ---- what enters ---------------------------------------------------------------------------------------------

    def _input(self) -> Tensor | None:
        """The labels of the input's features, 1-D; those that differ from step to step are tied."""
        found: list[Tensor] = []
        for factor in self.call.labels("input").factors:
            dims = dims_of(factor)
            if dims[-1] != factor.dim() - 1:
                self.ledger.freeze([factor], "it lies along the batch or the steps of a sequence")
                continue
            features = factor[(0,) * (factor.dim() - 1)]
            if len(dims) > 1:
                self.ledger.unite(factor, features)
            found.append(features)
        for other in found[1:]:
            self.ledger.unite(found[0], other)
        return found[0] if found else None

    def _start(self, state: Tensor, rows: Tensor | None) -> None:
        """An initial state ``[rows, N, units]`` (of a cell without rows): its last dimension are the units."""
        covered = False
        for factor in self.call.of(state).factors:
            dims = set(dims_of(factor))
            last = state.dim() - 1
            if rows is None or last not in dims or not dims <= ({last} if self.cell else {0, last}):
                self.ledger.freeze([factor], "it is no hidden unit of its own")
                continue
            self.ledger.unite(self._placed(rows, state.dim()), factor)
            covered = True
        if rows is not None and not covered:
            self.ledger.freeze([rows], "its initial state has no channels of its own")

    # ---- one pass ------------------------------------------------------------------------------------------------

    def _pass(self, step: Pass, entering: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The labels of a pass' memories ``[H]`` and of what it hands on ``[P]``; None for what cannot go."""
        rows = self._along(step.reads, 0)
        units = None if rows is None else rows[: len(rows) // self.gates]
        for tensor in (step.reads, step.recurs, *step.biases):
            mine = self._along(tensor, 0)
            if mine is not None and units is not None:
                self.ledger.unite(mine.reshape(self.gates, -1), units[None])
        if units is not None and len(units) == 1:
            self.ledger.freeze([units], "it is the only unit of its layer")
            units = None
        handed = units
        if step.projects is not None:
            handed = self._along(step.projects, 0)
            self._read(step.projects, units, handed)
        self._read(step.reads, entering, rows)
        self._read(step.recurs, handed, self._along(step.recurs, 0))
        return units, handed

    def _read(self, weight: Tensor, entering: Tensor | None, rows: Tensor | None) -> None:
        """``weight [rows, columns]`` times what enters, at every step."""
        columns = self._along(weight, 1)
        if columns is not None and entering is None:
            self.ledger.freeze([columns], _NONE)
        elif columns is not None and entering is not None:
            self.ledger.unite(entering, columns)
            self.ledger.end([columns])
        if rows is not None:
            self.ledger.produce([rows])
        if rows is not None and columns is not None and entering is not None:
            self.ledger.connect([entering], [rows])
        space = ([] if rows is None else [rows[:, None]]) + ([] if columns is None else [columns[None]])
        self.ledger.contract(weight.shape, space, self.steps)

    def _along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The labels along a dimension of a parameter, 1-D."""
        found = [factor.reshape(-1) for factor in self.call.of(tensor).factors if dims_of(factor) == (dim,)]
        return found[0] if found else None

    # ---- what leaves ---------------------------------------------------------------------------------------------

    def _stacked(self, units: Sequence[Tensor | None]) -> Tensor | None:
        """Units of all passes as rows ``[layers * directions, units]``, of which all must keep equally many."""
        found = [item for item in units if item is not None]
        if len(found) < len(units):
            return None
        rows = torch.stack(found)
        if len(rows) > 1:
            self.ledger.constrain(rows, (0,), (0,))
        return rows

    def _placed(self, rows: Tensor, ndim: int) -> Tensor:
        """Rows of units in a state of so many dimensions."""
        return rows.reshape(*([] if self.cell else [len(rows)]), *[1] * (ndim - (1 if self.cell else 2)), -1)

    def _state(self, rows: Tensor | None, index: int) -> Labels | None:
        if rows is None:
            return None
        return self.call.made([self._placed(rows, self.call.result[index].dim())], index)

    def _output(self, units: Tensor | None) -> Labels | None:
        if units is None:
            return None
        return self.call.made([units.reshape(*[1] * (self.call.result[0].dim() - 1), -1)], 0)


def _joined(units: Sequence[Tensor | None]) -> Tensor | None:
    """The output of one layer: its directions one behind the other."""
    found = [item for item in units if item is not None]
    return torch.cat(found) if len(found) == len(units) else None
