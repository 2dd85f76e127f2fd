"""Which elements of every tensor hold the same number whatever the model is given, and who reads them (design 6).

A channel whose producing weights are zero is not zero for its readers: behind BatchNorm and an activation it holds
f(beta'). While labels go through the model, :class:`Constants` sends these numbers along, for each tensor a float64
tensor of size 1 wherever it does not vary, NaN = unknown. They come from parameters and buffers by the operators'
rules, never from the data that the model runs on; an operator without a rule makes its result unknown.

Where labels end (a contraction, a statistic), a :class:`Reading` notes for each of them whether its channel could go:
nothing is read there, or a constant that a bias can take, or why not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.channels import constant_values as values
from fxcompress.channels import contractions, recurrence, reductions, rules
from fxcompress.channels.constant_values import Known, Product, Window
from fxcompress.channels.labels import FloatArray, IntArray, dims_of
from fxcompress.channels.propagate import propagate
from fxcompress.channels.recurrent_constants import Zeros
from fxcompress.channels.rules import Call, Rule
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule, owner


class Verdict(IntEnum):
    """What removing a channel does to one of its readers, from best to worst."""

    HARMLESS = 0  # its weights for the channel are zero, or the channel is
    FOLDS = 1  # it reads a constant that its bias can take
    INEXACT = 2  # the constant arrives at some positions only
    STAYS = 3


@dataclass(frozen=True)
class Reading:
    """What a node reads of some channels.

    Attributes:
        labels: of the channels; ``verdicts`` and ``values`` (the constants, NaN = none) have the same length.
        reason: why those stay that are not harmless; ``{}`` stands for the constant.
    """

    labels: IntArray
    verdicts: IntArray
    values: FloatArray
    reason: str


@dataclass(frozen=True)
class Affine:
    """A contraction with a parameter whose bias could take something over.

    Attributes:
        node: the call.
        weight: the parameter's name.
        bias: its name; empty for a layer that has none and could be given one.
    """

    node: fx.Node
    weight: str
    bias: str

    @property
    def layer(self) -> str:
        """The module that the node calls; empty for a functional call."""
        return str(self.node.target) if self.node.op == "call_module" else ""


@dataclass(frozen=True)
class Intake:
    """The constants that enter an affine map, column by column.

    Attributes:
        reader: the map.
        labels: for every factor of the columns their labels.
        values: the constants, NaN = unknown.
        exact: whether the bias can take them exactly.
        groups: of a convolution.
        transposed: whether the weight is ``[in, out, ...]``.
        apart: of a transposed convolution the product of its strides.
    """

    reader: Affine
    labels: tuple[IntArray, ...]
    values: FloatArray
    exact: bool
    groups: int = 1
    transposed: bool = False
    apart: int = 1


@dataclass
class Findings:
    """What one propagation of constants found.

    Attributes:
        readings: in the order of the graph, every label that ends in one at least.
        obstacles: where a constant stops being one, for the reasons.
        intakes: what could be folded, and where.
        labels: how many labels the propagation gave out.
    """

    readings: list[Reading] = field(default_factory=list)
    obstacles: list[Reading] = field(default_factory=list)
    intakes: list[Intake] = field(default_factory=list)
    labels: int = 0


def find_constants(module: TracedModule, inputs: Inputs, *, inexact: bool = False) -> Findings:
    """Send constants through a clean traced module.

    Args:
        module: not changed.
        inputs: example inputs; their values make no difference.
        inexact: behind zero padding a constant counts as what it is in the interior.
    """
    written: frozenset[str] = frozenset()
    while True:  # what the forward writes into is no constant: every round knows one such tensor more
        constants = Constants(module, inexact, written)
        facts = propagate(module, inputs, constants)
        if constants.written <= written:
            constants.findings.labels = facts.ledger.next_label
            return constants.findings
        written |= constants.written


class Constants:
    """Sees every operator go by and notes which elements of its result are known."""

    def __init__(self, module: TracedModule, inexact: bool, unknown: frozenset[str]) -> None:
        self.module, self.inexact = module, inexact
        self.findings = Findings()
        self.written: frozenset[str] = frozenset()
        self.nodes = {node.name: node for node in module.graph.nodes}
        self._table = WeakTensorKeyDictionary()
        self._state: dict[int, str] = {}
        self._ended = 0
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            self._state[tensor.untyped_storage()._cdata] = name
            if name not in unknown and not tensor.is_complex():
                self._table[tensor] = tensor.detach()

    # ---- what the propagation shows ------------------------------------------------------------------------------

    def called(self, call: Call, rule: Rule | None, inplace: bool) -> None:
        """Find the constants of an operator's results, and what it reads of channels that end in it."""
        window = self._window(call) if rule is contractions.convolution else None
        made = self._made(call, rule, inplace) if window is None else self._convolved(call, window)
        results = list(call.result) if isinstance(call.result, (tuple, list)) else [call.result]
        if inplace:
            self.closed([call.tensors[0]])
        known = made if isinstance(made, list) else [made]
        for tensor, value in zip(results, known, strict=False):
            if isinstance(tensor, Tensor) and value is not None:
                self._table[tensor] = value
        if window is not None:
            self._take_in(call, window)
        ended = call.ledger.ended[self._ended :]
        self._ended = len(call.ledger.ended)
        if ended:
            self._read(call, rule, window, ended)

    def closed(self, values: Iterable[Any]) -> None:
        """These tensors, and everything that shares their memory, may have been written into."""
        for tensor in values:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                memory = tensor.untyped_storage()._cdata
                for other in [other for other in self._table if other.untyped_storage()._cdata == memory]:
                    del self._table[other]
                if memory in self._state:
                    self.written |= {self._state[memory]}

    def of(self, tensor: Tensor) -> Known:
        """A tensor's constants, None where nothing is known."""
        found: Known = self._table.get(tensor)
        return found

    # ---- constants -----------------------------------------------------------------------------------------------

    def _made(self, call: Call, rule: Rule | None, inplace: bool) -> Any:
        """The constants of the results, or of the first, None where nothing is known."""
        if rule is recurrence.recurrent:  # of which dropout is random, but not in eval mode
            return Zeros.of(call, self.of).results
        if rule is None or torch.Tag.nondeterministic_seeded in call.func.tags:
            return None
        made: Any = None
        if rule is contractions.matmul:  # whose weights may be zero where nothing is known of what they meet
            made = self._product(call).result(call, self.of)
        elif rule is reductions.factory or rule is reductions.like:
            made = values.factory(call)
        elif rule is reductions.batch_norm:
            made = values.VALUES[rule](call, self.of)
        elif all(self.of(tensor) is None for tensor in call.tensors):
            return None
        elif rule is rules.pointwise:
            made = values.pointwise(call, self.of, inplace)
        elif rule in values.VALUES and not inplace:
            made = values.VALUES[rule](call, self.of)
        if rule not in values.MOVEMENT and self._sized(self.nodes[call.ledger.node]):
            kept = made if isinstance(made, list) else [made]
            made = [None if value is None else torch.where(value == 0, 0.0, torch.nan) for value in kept]
        return made

    def _sized(self, node: fx.Node) -> bool:
        """Whether a node computes with a size, which may be the batch's: what depends on it is no constant."""
        return any(_is_size(source) for source in node.all_input_nodes)

    def _convolved(self, call: Call, window: Window) -> Known:
        bias = call.arguments.get("bias")
        known = None if bias is None else self.of(bias)
        if bias is not None and known is None:
            return None
        made, stopped = window.result(known, self.inexact)
        if made is None:
            return None
        verdicts = np.where(torch.isfinite(stopped).numpy(), Verdict.INEXACT, Verdict.HARMLESS)
        for factor in call.of(call.result).factors:
            if factor.numel() == len(verdicts):
                self.findings.obstacles.append(_reading(factor, verdicts, self._entering(call), stopped.numpy()))
        return values.compact(made.reshape([1, -1] + [1] * (call.result.dim() - 2)))

    def _window(self, call: Call) -> Window:
        return Window.of(call, self.of(call.arguments["input"]), self.of(call.arguments["weight"]))

    def _product(self, call: Call) -> Product:
        first, second, _ = contractions.operands_of(call)
        return Product.of(call.arguments[first], call.arguments[second], self.of)

    # ---- readings ------------------------------------------------------------------------------------------------

    def _read(self, call: Call, rule: Rule | None, window: Window | None, ended: list[Tensor]) -> None:
        """Note what an operator reads of the labels that end in it; those that no rule speaks of stay."""
        told = [np.empty(0, dtype=np.int64)]
        made: list[Reading] = []
        if window is not None:
            made = self._read_window(call, window, ended)
        elif rule is contractions.matmul:
            made = self._read_product(call)
        elif rule is recurrence.recurrent:
            for columns in Zeros.of(call, self.of).columns:
                verdicts = np.where(columns.harmless, Verdict.HARMLESS, Verdict.STAYS)
                reason = f"{self._place(call)[1]} reads them at every step"
                made.append(_reading(torch.from_numpy(columns.labels), verdicts, reason))
        elif call.name in ("sum", "nansum"):
            (source, *_) = call.tensors
            for factor in ended:
                zero = values.zero_along(self.of(source), tuple(source.shape), dims_of(factor))
                made.append(_reading(factor, np.where(zero, Verdict.HARMLESS, Verdict.STAYS), self._statistic(call)))
        told += [reading.labels for reading in made]
        rest = np.concatenate([factor.reshape(-1).numpy() for factor in ended])
        rest = rest[~np.isin(rest, np.concatenate(told))]
        if len(rest):
            made.append(_reading(torch.from_numpy(rest), np.full(len(rest), Verdict.STAYS), self._statistic(call)))
        self.findings.readings += made

    def _statistic(self, call: Call) -> str:
        return f"{self._place(call)[1]} takes a statistic over channels"

    def _read_window(self, call: Call, window: Window, ended: list[Tensor]) -> list[Reading]:
        known = Verdict.STAYS
        if self._affine(self._place(call)[0]):
            known = Verdict.INEXACT if window.varies else Verdict.FOLDS
        verdicts = window.verdicts(known, Verdict.HARMLESS, Verdict.STAYS)
        reason = self._entering(call)
        columns = [factor for factor in ended if factor.numel() == len(verdicts)]
        return [_reading(factor, verdicts, reason, window.inputs.numpy()) for factor in columns]

    def _entering(self, call: Call) -> str:
        node, name = self._place(call)
        if not self._affine(node):
            return f"constant {{}} enters {name}, which is no layer with a bias"
        kind = "transposed" if call.arguments["transposed"] else "zero-padded"
        return f"constant {{}} enters the {kind} convolution {name}"

    def _take_in(self, call: Call, window: Window) -> None:
        """Remember what enters a convolution layer, in case its bias is to take it."""
        reader = self._affine(self._place(call)[0])
        columns = tuple(_along(factor, 1) for factor in call.labels("input").factors if factor.shape[1] > 1)
        if columns and window.used is not None and reader is not None:
            exact, transposed = not window.varies, bool(call.arguments["transposed"])
            values, apart = window.inputs.numpy(), math.prod(call.arguments["stride"])
            intake = Intake(reader, columns, values, exact, call.arguments["groups"], transposed, apart)
            self.findings.intakes.append(intake)

    def _read_product(self, call: Call) -> list[Reading]:
        product = self._product(call)
        node, name = self._place(call)
        first, second, _ = contractions.operands_of(call)
        left, right = call.arguments[first], call.arguments[second]
        reader = self._affine(node) if call.of(right).const and not call.of(left).const else None
        reason = f"{name} multiplies it with other activations"
        if call.of(right).const:
            reason = f"constant {{}} enters {name}, which is no layer with a bias"
        constants = product.columns()
        columns, made = [], []
        for operand, summed in ((left, left.dim() - 1), (right, max(right.dim() - 2, 0))):
            for factor in call.of(operand).factors:
                if factor.shape[summed] == 1:
                    continue
                zero = product.harmless(factor, operand is left)
                verdicts = np.where(zero, Verdict.HARMLESS, Verdict.STAYS)
                if dims_of(factor) != (summed,):
                    made.append(_reading(factor, verdicts, reason))
                    continue
                known = np.isfinite(constants).reshape(verdicts.shape)
                verdicts = np.where(~zero & known & (reader is not None), Verdict.FOLDS, verdicts)
                made.append(_reading(factor, verdicts, reason, constants))
                if operand is left:
                    columns.append(factor.reshape(-1).numpy())
        if reader is not None and columns:
            self.findings.intakes.append(Intake(reader, tuple(columns), constants, True))
        return made

    def _place(self, call: Call) -> tuple[fx.Node, str]:
        """The node that runs, and its name for messages: the layer's, if it is one."""
        node = self.nodes[call.ledger.node]
        return node, str(node.target) if node.op == "call_module" else node.name

    def _affine(self, node: fx.Node) -> Affine | None:
        return affine_of(self.module, node)


_AFFINE = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())


def affine_of(module: TracedModule, node: fx.Node) -> Affine | None:
    """What a node multiplies with a parameter and adds a bias to, or could; None if it does not."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            return None
        return Affine(node, f"{node.target}.weight", f"{node.target}.bias" if layer.bias is not None else "")
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in _AFFINE:
        return None
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    weight, bias = named.get("weight"), named.get("bias")
    if not (_is_parameter(weight, module) and _is_parameter(bias, module)):
        return None
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    return Affine(node, str(weight.target), str(bias.target))


def _is_parameter(value: Any, module: nn.Module) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    holder, name = owner(module, str(value.target))
    return name in holder._parameters


def _along(factor: Tensor, dim: int) -> IntArray:
    """A factor's labels along one dimension, at the first index of all others."""
    for other in range(factor.dim()):
        if other != dim:
            factor = factor.narrow(other, 0, 1)
    return factor.reshape(-1).numpy()


def _reading(labels: Tensor, verdicts: Any, reason: str, constants: FloatArray | None = None) -> Reading:
    flat = labels.reshape(-1).numpy()
    found = np.full(len(flat), np.nan) if constants is None else constants.reshape(-1)
    return Reading(flat, np.asarray(verdicts).reshape(-1), found, reason)


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a tensor, or computed from sizes alone."""
    if node.target in ("size", "numel") or (node.target is getattr and node.args[1] == "shape"):
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(map(_is_size, sources))
