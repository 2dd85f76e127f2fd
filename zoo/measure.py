"""What becomes of one model."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

import fxcompress
from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import BoolArray
from fxcompress.inputs import Inputs, other_batch
from fxcompress.module import TracedModule
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.passes.removable_units import channel_units
from fxcompress.plan import settle
from fxcompress.verify import default_dtype, difference, precise

CONTRACTIONS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass
class Record:
    """One row of the table.

    Attributes:
        name: ``library/model``.
        params: of the dense model.
        traced: whether the recording equals the model, at another batch size too.
        batches: whether it holds at batch sizes other than the example's.
        removable: share of the parameters of linear and convolution layers that lie in removable groups.
        macs: share of the multiply-accumulates that half the channels of every group took with them.
        left: share of the parameters that is left then.
        difference: largest relative difference of masked and removed in float64, at two batch sizes.
        seconds: of masking and removing, unverified.
        opaque: modules that run as their author wrote them.
        frozen: reasons, with the number of channels that each keeps.
        notes: what the passes had to say.
        error: what stopped it, or nothing.
    """

    name: str
    params: int = 0
    traced: bool = False
    batches: bool = False
    removable: float = 0.0
    macs: float = 0.0
    left: float = 1.0
    difference: float = float("nan")
    seconds: float = float("nan")
    opaque: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""


def measure(name: str) -> Record:
    """Trace a model (``library/model``), prune half the channels of every group, remove them, and compare."""
    from zoo.catalogue import build

    record = Record(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = build(name)
        record.params = sum(parameter.numel() for parameter in sample.model.parameters())
        try:
            _measure(record, sample.model, Inputs.parse(sample.inputs))
        except Exception as error:  # whatever a model meets is what the sweep is to find out
            record.error = f"{type(error).__name__}: {error}"
    return record


def _measure(record: Record, model: nn.Module, inputs: Inputs) -> None:
    traced = fxcompress.trace(model, inputs)
    record.opaque, record.batches = list(traced.meta["opaque"]), bool(traced.meta["batched"])
    trials = [inputs, inputs.rebatched(other_batch(inputs.batch))] if record.batches else [inputs]
    gap = _gap(model, traced, trials)
    record.traced = gap <= 1e-5
    if not record.traced:
        raise AssertionError(f"the recording differs from the model by {gap:.3g}")
    groups = fxcompress.channel_groups(traced, inputs)
    record.removable = removable_share(traced, groups)
    record.frozen = _reasons(groups)
    del traced, groups
    start = time.process_time()
    masked = fxcompress.compress(model, [L1FilterPruner(0.5)], example_inputs=inputs, verify=False)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=inputs, verify=False)
    record.seconds = time.process_time() - start
    record.notes = [note for step in removed.meta["history"] for note in step.notes]
    before, after = (fxcompress.count(item, inputs) for item in (model, removed))
    record.macs, record.left = 1 - after.macs / max(before.macs, 1), after.params / before.params
    del model
    one, other = precise(masked), precise(removed)
    del masked, removed
    with default_dtype(torch.float64):
        record.difference = _gap(one, other, [_widened(trial) for trial in trials])


@torch.no_grad()
def _gap(one: nn.Module, other: nn.Module, trials: list[Inputs]) -> float:
    """The largest relative difference of two models' outputs."""
    return max(difference(trial.run(one), trial.run(other)) for trial in trials)


def _widened(inputs: Inputs) -> Inputs:
    return inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def removable_share(module: TracedModule, groups: ChannelGroups) -> float:
    """The share of the parameters of linear and convolution layers that go if their group's channels go.

    A group counts if some of its channels do go where half of all are to: what is announced, and then comes back
    because a node cannot be rewritten without, does not.
    """
    channels = groups.channels
    loses = _going(module, groups)[channels.component]
    parameters = dict(module.named_parameters())
    layers = [layer for layer in module.modules() if isinstance(layer, CONTRACTIONS)]
    weights = [layer.weight for layer in layers if isinstance(layer.weight, nn.Parameter)]
    names = {id(parameters[name]): name for name in channels.facts.state if name in parameters}
    total = removable = 0
    for weight in {id(weight): weight for weight in weights}.values():
        labels = channels.facts.state[names[id(weight)]]
        keeps = np.ones(weight.shape, dtype=bool)
        for factor in labels.factors:
            keeps &= ~loses[np.broadcast_to(factor.numpy(), weight.shape)]
        total += weight.numel()
        removable += int((~keeps).sum())
    return removable / max(total, 1)


def _going(module: TracedModule, groups: ChannelGroups) -> BoolArray:
    """For every component whether its group loses channels where half of every group are to go."""
    channels, removable = groups.channels, [group for group in groups if group.removable]
    going: BoolArray = np.zeros(len(channels.component), dtype=bool)
    if not removable:
        return going
    half = []
    for group in removable:
        alive, row = np.ones(group.width, dtype=bool), channels.rows.row[group.components]
        units = channel_units(group, np.arange(group.width, dtype=float), alive, row, aligned=False)
        half.append(units.lowest(max(units.number // 2, 1))[0])
    live = channels.alive(settle(module, groups, channels.live(np.concatenate(half))))
    for group in removable:
        whole = group.width == group.rows > 1  # rows of one channel go with others, as rows
        going[group.components] = whole or not live[group.components].all()
    return going


def _reasons(groups: ChannelGroups) -> dict[str, int]:
    found: Counter[str] = Counter()
    for group in groups:
        if not group.removable:
            found[group.reason] += group.width
    return dict(found.most_common())
