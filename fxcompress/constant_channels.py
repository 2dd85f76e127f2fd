"""Removal of channels that hold a constant: which can go, what their readers' biases take over, and why others stay.

The constants of a channel that goes are folded into whoever reads it, ``b' = b + sum over the channel's columns of
W * constant``, where every position sees the same sum (design 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.channels.constants import Findings, Intake, Reading, Verdict, find_constants
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, IntArray, Labels, dims_of
from fxcompress.channels.solve import Channels
from fxcompress.errors import GraphError
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule
from fxcompress.plan import settle
from fxcompress.rewrite import Rewriter, rewriting
from fxcompress.shrink import shrink
from fxcompress.verify import Align

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_zero_slices(module: nn.Module) -> bool:
    """Whether some weight has a row or a column of zeros: without one no channel is constant that is not so already."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    for holder in module.modules():
        for name, parameter in holder.named_parameters(recurse=False):
            if name == "bias" or not parameter.is_floating_point():
                continue
            used = parameter.detach() != 0
            if bool(used.all()):
                continue
            for dim in range(1 if isinstance(holder, tables) else 0, min(used.dim(), 2)):
                others = [d for d in range(used.dim()) if d != dim]
                if used.shape[dim] > 1 and not bool((used.any(dim=others) if others else used).all()):
                    return True
    return False


@dataclass(frozen=True)
class Fold:
    """What the bias of a layer takes over: float64, one number for each of its dense outputs."""

    node: fx.Node
    amounts: Tensor


@dataclass(frozen=True)
class Decision:
    """Which channels go.

    Attributes:
        live: for every label whether it lives; satisfies the analysis' constraints.
        folds: what biases take over, one for each layer.
        notes: how many channels with zero weights stay, and why, one line for each group and reason.
    """

    live: BoolArray
    folds: tuple[Fold, ...]
    notes: tuple[str, ...]


def decide(module: TracedModule, groups: ChannelGroups, findings: Findings, worst: Verdict) -> Decision:
    """The channels of which every reading is at most ``worst``.

    Args:
        module: a clean traced module.
        groups: its channel analysis.
        findings: its constants.
        worst: ``Verdict.FOLDS``, or ``Verdict.INEXACT`` for those too whose constant some positions do not see.
    """
    channels = groups.channels
    if findings.labels != len(channels.component):
        raise GraphError("the constants were found by another analysis than the groups")
    readings = [*findings.readings, *_contradictions(module, findings.intakes)]
    verdicts = np.full(len(channels.component), -1, dtype=np.int64)
    for reading in readings:
        np.maximum.at(verdicts, channels.component[reading.labels], reading.verdicts)
    chosen = [
        group.components[(verdicts[group.components] >= 0) & (verdicts[group.components] <= worst)]
        for group in groups
        if group.removable
    ]
    dead = np.concatenate([np.empty(0, dtype=np.int64), *chosen])
    live = channels.live(dead)
    if len(dead):
        live = settle(module, channels, live)
    notes = _Notes(module, channels, [*findings.obstacles, *readings], verdicts, worst)
    lines = tuple(line for group in groups for line in notes.of(group, live))
    return Decision(live, tuple(_folds(module, findings.intakes, live)), lines)


def _calls(intakes: list[Intake]) -> dict[str, list[Intake]]:
    """The intakes of every layer, call by call."""
    found: dict[str, list[Intake]] = {}
    for intake in intakes:
        found.setdefault(str(intake.node.target), []).append(intake)
    return found


def _contradictions(module: TracedModule, intakes: list[Intake]) -> Iterator[Reading]:
    """Channels whose constants no bias can take: it would have to take two, or somebody else reads it."""
    names: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name, calls in _calls(intakes).items():
        layer = module.get_submodule(name)
        bias = layer._parameters.get("bias")
        shared = bias is not None and (names[id(bias)] > 1 or f"{name}.bias" in read)
        used = _used_columns(layer)
        first = np.nan_to_num(calls[0].values)
        for intake in calls:
            differs = used & (np.isfinite(intake.values) & (np.nan_to_num(intake.values) != first))
            bad = used & (np.nan_to_num(intake.values) != 0) if shared else differs
            reason = "constant {} enters " + name
            reason += ", whose bias is shared" if shared else ", which is called with another one elsewhere"
            for labels in intake.labels:
                if bad.any():
                    verdicts = np.where(bad, Verdict.STAYS, Verdict.HARMLESS)
                    yield Reading(labels, verdicts, intake.values, reason)


def _used_columns(layer: nn.Module) -> BoolArray:
    """Which inputs of a layer meet a weight that is not zero."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return (weight != 0).flatten(1).any(1).cpu().numpy()
    used = (weight != 0).reshape(*weight.shape[:2], -1).any(-1)
    groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
    return used.reshape(groups, -1, used.shape[1]).any(1).reshape(-1).cpu().numpy()


# ---- folding ---------------------------------------------------------------------------------------------------------


def _gone(intake: Intake, live: BoolArray) -> BoolArray:
    """Which columns of a layer go."""
    gone = np.zeros(len(intake.values), dtype=bool)
    for labels in intake.labels:
        gone |= ~live[labels]
    return gone


def _folds(module: TracedModule, intakes: list[Intake], live: BoolArray) -> Iterator[Fold]:
    """What every layer's bias takes over from the columns that go."""
    for name, calls in _calls(intakes).items():
        intake, layer = calls[0], module.get_submodule(name)
        if not intake.exact:
            continue  # nothing but zeros goes there
        constants = np.where(_gone(intake, live), np.nan_to_num(intake.values), 0.0)
        if constants.any():
            yield Fold(intake.node, contribution(layer, torch.from_numpy(constants)))


def contribution(layer: nn.Module, constants: Tensor) -> Tensor:
    """What constants at a layer's inputs add to its outputs, where the whole kernel sees them: float64 ``[out]``."""
    weight = layer.get_parameter("weight").detach()
    constants = constants.to(weight.device)
    taps = weight.reshape(*weight.shape[:2], -1).sum(-1, dtype=torch.float64)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return constants @ taps / float(np.prod(layer.stride))
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        entering = constants.reshape(layer.groups, 1, -1)
        return (taps.reshape(layer.groups, -1, taps.shape[1]) * entering).sum(-1).reshape(-1)
    return taps @ constants


def live_outputs(labels: Labels, live: BoolArray, dim: int) -> Tensor:
    """Which indices of a dimension stay."""
    kept = torch.ones(labels.shape[dim], dtype=torch.bool)
    for factor in labels.factors:
        if dims_of(factor) == (dim % len(labels.shape),):
            kept &= torch.from_numpy(live[factor.reshape(-1).numpy()])
    return kept


def fold(rewriter: Rewriter, node: fx.Node, amounts: Tensor, ndim: int) -> str:
    """Let a layer's bias take constants over; the running mean of the BatchNorm behind it where it has no bias.

    Args:
        rewriter: of the module.
        node: the call of the layer.
        amounts: float64, one number for each output.
        ndim: number of dimensions of the layer's output.

    Returns:
        A line for the notes.
    """
    name = str(node.target)
    layer = rewriter.module.get_submodule(name)
    bias = layer._parameters.get("bias")
    if bias is not None:
        rewriter.set_tensor(f"{name}.bias", _sum(bias, amounts))
        return f"{name}.bias"
    norm = _norm_behind(rewriter.module, node, ndim)
    if norm:
        mean = rewriter.module.get_buffer(f"{norm}.running_mean")
        rewriter.set_tensor(f"{norm}.running_mean", _sum(mean, -amounts))
        return f"{norm}.running_mean"
    weight = layer.get_parameter("weight")
    made = torch.zeros_like(amounts, dtype=weight.dtype)
    layer.register_parameter("bias", nn.Parameter(_sum(made, amounts), requires_grad=weight.requires_grad))
    rewriter.edits += 1
    return f"{name}.bias (added)"


def _sum(tensor: Tensor, amounts: Tensor) -> Tensor:
    return (tensor.detach().double() + amounts.to(tensor.device)).to(tensor.dtype)


def _norm_behind(module: TracedModule, node: fx.Node, ndim: int) -> str:
    """The BatchNorm that alone reads a layer's output, and only that; empty where there is none."""
    (user, *others) = node.users
    if others or user.op != "call_module" or user.args != (node,):
        return ""
    norm, layer = module.get_submodule(str(user.target)), module.get_submodule(str(node.target))
    targets = [str(other.target) for other in module.graph.nodes if other.op == "call_module"]
    read = {str(other.target).rpartition(".")[0] for other in module.graph.find_nodes(op="get_attr")}
    once = targets.count(str(user.target)) == targets.count(str(node.target)) == 1
    aligned = ndim == 2 or not isinstance(layer, nn.Linear)  # BatchNorm normalises dimension 1
    fits = isinstance(norm, _NORMS) and norm.running_mean is not None and once and aligned
    return str(user.target) if fits and str(user.target) not in read else ""


def remove(
    module: TracedModule, groups: ChannelGroups, decision: Decision, author: str, notes: list[str]
) -> Align:
    """Remove the channels that a decision names and fold their constants.

    Args:
        module: a clean traced module, changed in place.
        groups: its channel analysis.
        decision: about these groups.
        author: the pass, for provenance.
        notes: gets a line that lists what took constants over, if anything did.

    Returns:
        What a value of the module before is in the one after.
    """
    plan = shrink(module, groups, decision.live, author)
    told = []
    with rewriting(module, author) as rewriter:
        for item in decision.folds:
            labels = groups.channels.facts.values[item.node.name]
            layer = module.get_submodule(str(item.node.target))
            kept = live_outputs(labels, decision.live, -1 if isinstance(layer, nn.Linear) else 1)
            amounts = item.amounts[kept.to(item.amounts.device)]
            if amounts.any():
                told.append(fold(rewriter, item.node, amounts, len(labels.shape)))
    if told:
        notes.append(f"constants folded into {', '.join(told)}")
    return plan.align


def approximate(module: TracedModule, groups: ChannelGroups, inputs: Inputs, author: str) -> int:
    """Let layers whose constants do not arrive everywhere read nothing of them, and hold in their bias what arrives
    inside; returns how many channels become removable by it.

    The module is changed in place, and computes another function afterwards.
    """
    findings = find_constants(module, inputs, inexact=True)
    decision = decide(module, groups, findings, Verdict.INEXACT)
    with rewriting(module, author) as rewriter:
        for intake in findings.intakes:
            gone = _gone(intake, decision.live)
            if not intake.exact and np.nan_to_num(intake.values)[gone].any():
                flatten_channels(rewriter, intake, gone, len(groups.channels.facts.values[intake.node.name].shape))
    return sum(int((~decision.live[group.components]).sum()) for group in groups)


def flatten_channels(rewriter: Rewriter, intake: Intake, gone: BoolArray, ndim: int) -> None:
    """The approximation, as an edit: a layer no longer sees these columns, and its bias holds what they add inside."""
    layer = rewriter.module.get_submodule(str(intake.node.target))
    constants = np.where(gone, np.nan_to_num(intake.values), 0.0)
    fold(rewriter, intake.node, contribution(layer, torch.from_numpy(constants)), ndim)
    weight = layer.get_parameter("weight").detach().clone()
    columns = torch.from_numpy(gone).to(weight.device)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        weight[columns] = 0
    elif isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        grouped.masked_fill_(columns.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2)), 0)
    else:
        weight[:, columns] = 0
    rewriter.set_tensor(f"{intake.node.target}.weight", weight)


# ---- reasons ---------------------------------------------------------------------------------------------------------


class _Notes:
    """Why channels with zero weights stay."""

    def __init__(
        self, module: TracedModule, channels: Channels, readings: list[Reading], verdicts: IntArray, worst: Verdict
    ) -> None:
        self.module, self.channels, self.verdicts, self.worst = module, channels, verdicts, worst
        self.reason: dict[int, tuple[str, float]] = {}
        for reading in readings:
            bad = reading.verdicts > worst
            components = channels.component[reading.labels[bad]].tolist()
            for component, value in zip(components, reading.values[bad].tolist(), strict=True):
                known = self.reason.get(component)
                if known is None or (np.isnan(known[1]) and not np.isnan(value)):
                    self.reason[component] = (reading.reason, value)

    def of(self, group: Group, live: BoolArray) -> Iterator[str]:
        """One line for each reason."""
        empty, full = self._rows(group)
        lines: dict[str, list[float]] = {}
        for position in np.flatnonzero(empty & live[group.components]):
            reason, value = self._why(group, int(group.components[position]), full.get(int(position), ()))
            lines.setdefault(reason, []).append(value)
        for reason, found in lines.items():
            count = f"{len(found)} channel{'s' if len(found) > 1 else ''}"
            yield f"{count} of {group.name} stay{'' if len(found) > 1 else 's'}: {_with_values(reason, found)}"

    def _rows(self, group: Group) -> tuple[BoolArray, Mapping[int, tuple[str, ...]]]:
        """Which channels have a producing row of zeros; and who else produces them."""
        empty = np.zeros(group.width, dtype=bool)
        full: dict[int, tuple[str, ...]] = {}
        for item in group.slices:
            weight = self.module.get_parameter(item.parameter).detach()
            used = (weight != 0).movedim(item.dim, 0).flatten(1).any(1).cpu().numpy()[item.rows]
            empty[item.channels[~used]] = True
            for channel in item.channels[used].tolist():
                full[channel] = (*full.get(channel, ()), item.layer)
        return empty, full

    def _why(self, group: Group, component: int, others: tuple[str, ...]) -> tuple[str, float]:
        if not group.removable:
            return group.reason, float("nan")
        if 0 <= self.verdicts[component] <= self.worst:
            return "as many must stay in every row, and one at least", float("nan")
        reason, value = self.reason.get(component, ("nobody reads them", float("nan")))
        if np.isnan(value) and "{}" in reason:
            others = tuple(dict.fromkeys(others))
            reason = f"{others[0]} makes them too" if others else "what is read of them is no constant"
        return reason, value


def _with_values(reason: str, found: list[float]) -> str:
    if "{}" not in reason:
        return reason
    low, high = min(found), max(found)
    text = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    return reason.format(text)
