"""Removal of channels that hold a constant: which can go, what their readers' biases take over, and why others stay.

The constants of a channel that goes are folded into whoever reads it, ``b' = b + sum over the channel's columns of
W * constant``, where every position sees the same sum (design 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.channels.constants import Affine, Findings, Intake, Reading, Verdict, find_constants
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, IntArray, Labels, dims_of
from fxcompress.channels.solve import Channels
from fxcompress.errors import GraphError
from fxcompress.inputs import Inputs
from fxcompress.module import TracedModule, modules_of
from fxcompress.plan import settle
from fxcompress.rewrite import Rewriter, rewriting
from fxcompress.shrink import shrink
from fxcompress.verify import Align

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_zero_slices(module: nn.Module) -> bool:
    """Whether some weight has a row or a column of zeros: without one no channel is constant that is not so already."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    for holder in modules_of(module).values():
        for name, parameter in holder._parameters.items():
            if parameter is None or name == "bias" or not parameter.is_floating_point() or bool(parameter.all()):
                continue
            used = parameter.detach() != 0
            for dim in range(1 if isinstance(holder, tables) else 0, min(used.dim(), 2)):
                others = [d for d in range(used.dim()) if d != dim]
                if used.shape[dim] > 1 and not bool((used.any(dim=others) if others else used).all()):
                    return True
    return False


@dataclass(frozen=True)
class Fold:
    """What the bias of an affine map takes over: float64, one number for each of its dense outputs."""

    reader: Affine
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
        live = settle(module, groups, live)
    notes = _Notes(module, channels, [readings, findings.obstacles], verdicts, worst)
    lines = tuple(line for group in groups for line in notes.of(group, live))
    return Decision(live, tuple(_folds(module, findings.intakes, live)), lines)


def _calls(intakes: list[Intake]) -> list[list[Intake]]:
    """The intakes of every bias (or weight without one), call by call."""
    found: dict[str, list[Intake]] = {}
    for intake in intakes:
        found.setdefault(intake.reader.bias or intake.reader.weight, []).append(intake)
    return list(found.values())


def _contradictions(module: TracedModule, intakes: list[Intake]) -> Iterator[Reading]:
    """Channels whose constants no bias can take: it would have to take two, or somebody else reads it."""
    for calls in _calls(intakes):
        reader = calls[0].reader
        name = reader.layer or reader.node.name
        shared = bool(reader.bias) and bool(
            users(module, reader.bias) - {item.reader.layer or item.reader.node for item in calls}
        )
        first = np.nan_to_num(calls[0].values)
        for intake in calls:
            values = np.nan_to_num(intake.values)
            used = _used_columns(module, intake)
            bad = used & ((values != 0) if shared else np.isfinite(intake.values) & (values != first))
            other = "whose bias is shared" if shared else "which is called with another one elsewhere"
            if bad.any():
                verdicts = np.where(bad, Verdict.STAYS, Verdict.HARMLESS)
                for labels in intake.labels:
                    yield Reading(labels, verdicts, intake.values, f"constant {{}} enters {name}, {other}")


def users(module: TracedModule, name: str) -> set[str | fx.Node]:
    """Who reads a parameter, under any of its names: layers by name, other nodes themselves."""
    tensor = module.get_parameter(name)
    names = {other for other, item in module.named_parameters(remove_duplicate=False) if item is tensor}
    users: set[str | fx.Node] = {other.rpartition(".")[0] for other in names}
    users &= {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in names:
            users |= set(node.users)
    return users


def _used_columns(module: TracedModule, intake: Intake) -> BoolArray:
    """Which inputs of an affine map meet a weight that is not zero."""
    weight = module.get_parameter(intake.reader.weight).detach()
    used = (weight != 0).reshape(*weight.shape[:2], -1).any(-1)
    if intake.transposed:
        return used.any(1).cpu().numpy()
    return used.reshape(intake.groups, -1, used.shape[1]).any(1).reshape(-1).cpu().numpy()


# ---- folding ---------------------------------------------------------------------------------------------------------


def _gone(intake: Intake, live: BoolArray) -> BoolArray:
    """Which columns of a layer go."""
    gone = np.zeros(len(intake.values), dtype=bool)
    for labels in intake.labels:
        gone |= ~live[labels]
    return gone


def _folds(module: TracedModule, intakes: list[Intake], live: BoolArray) -> Iterator[Fold]:
    """What every bias takes over from the columns that go."""
    for intake, *_ in _calls(intakes):
        gone = _gone(intake, live)
        if intake.exact and np.nan_to_num(intake.values)[gone].any():  # where it is not exact only zeros go
            yield Fold(intake.reader, _contribution(module, intake, gone))


def _contribution(module: TracedModule, intake: Intake, gone: BoolArray) -> Tensor:
    """What the constants of columns add to an affine map where the whole kernel sees them: float64 ``[out]``."""
    weight = module.get_parameter(intake.reader.weight).detach()
    columns = np.flatnonzero(gone & (np.nan_to_num(intake.values) != 0))
    constants = torch.from_numpy(intake.values[columns]).to(weight.device)
    index = torch.from_numpy(columns).to(weight.device)
    if intake.transposed:
        return constants @ weight[index].flatten(2).sum(-1, dtype=torch.float64) / intake.apart
    if intake.groups == 1:
        taps = weight[:, index].reshape(len(weight), len(columns), -1)
        return taps.sum(-1, dtype=torch.float64) @ constants
    taps = weight.reshape(intake.groups, -1, *weight.shape[1:])
    entering = weight.new_zeros(len(intake.values), dtype=torch.float64)
    entering[index] = constants
    by_group = taps.flatten(3).sum(-1, dtype=torch.float64) if taps.dim() > 3 else taps.double()
    return (by_group * entering.reshape(intake.groups, 1, -1)).sum(-1).reshape(-1)


def live_outputs(labels: Labels, live: BoolArray, dim: int) -> Tensor:
    """Which indices of a dimension stay."""
    kept = torch.ones(labels.shape[dim], dtype=torch.bool)
    for factor in labels.factors:
        if dims_of(factor) == (dim % len(labels.shape),):
            kept &= torch.from_numpy(live[factor.reshape(-1).numpy()])
    return kept


def output_dim(module: TracedModule, reader: Affine) -> int:
    """The dimension of the output that the bias lies along."""
    name = getattr(reader.node.target, "__name__", "")
    linear = isinstance(module.get_submodule(reader.layer), nn.Linear) if reader.layer else name == "linear"
    return -1 if linear else 1


def fold(rewriter: Rewriter, reader: Affine, amounts: Tensor, ndim: int) -> str:
    """Let a bias take constants over; the running mean of the BatchNorm behind it where there is none.

    Args:
        rewriter: of the module.
        reader: the affine map.
        amounts: float64, one number for each output.
        ndim: number of dimensions of its output.

    Returns:
        The tensor that did, for the notes.
    """
    if reader.bias:
        rewriter.set_tensor(reader.bias, _sum(rewriter.module.get_parameter(reader.bias), amounts))
        return reader.bias
    norm = _norm_behind(rewriter.module, reader.node, ndim)
    if norm:
        mean = rewriter.module.get_buffer(f"{norm}.running_mean")
        rewriter.set_tensor(f"{norm}.running_mean", _sum(mean, -amounts))
        return f"{norm}.running_mean"
    layer, weight = rewriter.module.get_submodule(reader.layer), rewriter.module.get_parameter(reader.weight)
    made = _sum(torch.zeros_like(amounts, dtype=weight.dtype), amounts)
    layer.register_parameter("bias", nn.Parameter(made, requires_grad=weight.requires_grad))
    rewriter.edits += 1
    return f"{reader.layer}.bias (added)"


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
    if not isinstance(norm, _NORMS) or norm.running_mean is None:
        return ""
    owners = [other for other in modules_of(module).values() for b in other._buffers.values() if b is norm.running_mean]
    fits = once and aligned and len(owners) == 1
    return str(user.target) if fits and str(user.target) not in read else ""


def remove(module: TracedModule, groups: ChannelGroups, decision: Decision, author: str) -> tuple[Align, list[str]]:
    """Remove the channels that a decision names and fold their constants.

    Args:
        module: a clean traced module, changed in place.
        groups: its channel analysis.
        decision: about these groups.
        author: the pass, for provenance.

    Returns:
        What a value of the module before is in the one after; and the tensors that took constants over.
    """
    plan = shrink(module, groups, decision.live, author)
    told = []
    with rewriting(module, author) as rewriter:
        for item in decision.folds:
            labels = groups.channels.facts.values[item.reader.node.name]
            kept = live_outputs(labels, decision.live, output_dim(module, item.reader))
            amounts = item.amounts[kept.to(item.amounts.device)]
            if amounts.any():
                told.append(fold(rewriter, item.reader, amounts, len(labels.shape)))
    return plan.align, told


def approximate(module: TracedModule, groups: ChannelGroups, inputs: Inputs, author: str) -> int:
    """Let layers whose constants do not arrive everywhere read nothing of them, and hold in their bias what arrives
    inside; returns how many channels become removable by it.

    The module is changed in place, and computes another function afterwards.
    """
    findings = find_constants(module, inputs, inexact=True)
    decision = decide(module, groups, findings, Verdict.INEXACT)
    with rewriting(module, author) as rewriter:
        for intake, *calls in _calls(findings.intakes):
            readers = {item.reader.layer or item.reader.node for item in (intake, *calls)}
            gone = _gone(intake, decision.live)
            if intake.exact or users(module, intake.reader.weight) - readers:
                continue
            if np.nan_to_num(intake.values)[gone].any():
                _blind(rewriter, intake, gone, len(groups.channels.facts.values[intake.reader.node.name].shape))
    return sum(int((~decision.live[group.components]).sum()) for group in groups)


def _blind(rewriter: Rewriter, intake: Intake, gone: BoolArray, ndim: int) -> None:
    """An affine map no longer sees these columns; its bias holds what they add inside."""
    module, reader = rewriter.module, intake.reader
    fold(rewriter, reader, _contribution(module, intake, gone), ndim)
    weight = module.get_parameter(reader.weight).detach().clone()
    columns = torch.from_numpy(gone).to(weight.device)
    if intake.transposed:
        weight[columns] = 0
    else:
        grouped = weight.view(intake.groups, -1, *weight.shape[1:])
        grouped.masked_fill_(columns.reshape(intake.groups, 1, -1, *[1] * (weight.dim() - 2)), 0)
    rewriter.set_tensor(reader.weight, weight)


# ---- reasons ---------------------------------------------------------------------------------------------------------


class _Notes:
    """Why channels with zero weights stay."""

    def __init__(
        self,
        module: TracedModule,
        channels: Channels,
        findings: list[list[Reading]],
        verdicts: IntArray,
        worst: Verdict,
    ) -> None:
        """``findings`` are the readings, and the obstacles that explain why what is read is no constant."""
        self.module, self.channels, self.verdicts, self.worst = module, channels, verdicts, worst
        self.reasons, self.obstacles = (self._by_component(readings) for readings in findings)

    def _by_component(self, readings: list[Reading]) -> dict[int, tuple[str, float]]:
        """The reason of the worst reading of every component, one with a constant before one without."""
        found: dict[int, tuple[tuple[int, bool], str, float]] = {}
        for reading in readings:
            bad = reading.verdicts > self.worst
            components = self.channels.component[reading.labels[bad]].tolist()
            told = zip(components, reading.verdicts[bad].tolist(), reading.values[bad].tolist(), strict=True)
            for component, verdict, value in told:
                rank = (verdict, not np.isnan(value))
                if component not in found or found[component][0] < rank:
                    found[component] = (rank, reading.reason, value)
        return {component: (reason, value) for component, (_, reason, value) in found.items()}

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
            used = item.lines(weight != 0).flatten(1).any(1).cpu().numpy()[item.rows]
            empty[item.channels[~used]] = True
            for channel in item.channels[used].tolist():
                full[channel] = (*full.get(channel, ()), item.layer)
        return empty, full

    def _why(self, group: Group, component: int, others: tuple[str, ...]) -> tuple[str, float]:
        if not group.removable:
            return group.reason, float("nan")
        if 0 <= self.verdicts[component] <= self.worst:
            return "as many must stay in every row, and one at least", float("nan")
        reason, value = self.reasons.get(component, ("nobody reads them", float("nan")))
        if np.isnan(value) and "{}" in reason and component in self.obstacles:
            return self.obstacles[component]
        if np.isnan(value) and "{}" in reason:
            others = tuple(dict.fromkeys(others))
            reason = "what is read of them is no constant"
            if others:
                reason = f"{', '.join(others)} produce{'s' if len(others) == 1 else ''} them too"
        return reason, value


def _with_values(reason: str, found: list[float]) -> str:
    if "{}" not in reason:
        return reason
    low, high = min(found), max(found)
    text = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    return reason.format(text)


@dataclass(frozen=True)
class Removal:
    """What :func:`remove_constants` did.

    Attributes:
        align: what a value of the module before is in the one after; None if nothing went.
        folded: the tensors that took constants over.
        staying: how many channels with zero weights stay, and why, one line for each group and reason.
    """

    align: Align | None
    folded: tuple[str, ...]
    staying: tuple[str, ...]


def remove_constants(
    module: TracedModule, inputs: Inputs, author: str, groups_of: Callable[[TracedModule], ChannelGroups]
) -> Removal:
    """Remove every channel that is constant or unread where that is exact.

    Args:
        module: a clean traced module, changed in place.
        inputs: example inputs.
        author: the pass, for provenance.
        groups_of: gives the channel analysis of a module.
    """
    align: Align | None = None
    folded: list[str] = []
    while has_zero_slices(module):  # rows that went may have been all that read a channel: every round shrinks
        groups = groups_of(module)
        decision = decide(module, groups, find_constants(module, inputs), Verdict.FOLDS)
        if decision.live.all():
            return Removal(align, tuple(folded), decision.notes)
        step, names = remove(module, groups, decision, author)
        align = step if align is None else composed(align, step)
        folded += names
    return Removal(align, tuple(folded), ())


def composed(first: Align, second: Align) -> Align:
    """What a value is after two removals."""
    return lambda name, value: second(name, first(name, value))
