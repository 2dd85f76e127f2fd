"""Candidates that say how many units each channel group keeps, and what they score."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fxcompress.channels.groups import ChannelGroups, Group, analyse
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.channels.solve import Channels
from fxcompress.errors import InputError
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.plan import settled
from fxcompress.removable_units import channel_units
from fxcompress.search.trial import Proposal
from fxcompress.search.twin import Twin
from fxcompress.task import Task
from fxcompress.training import Training, placed


@dataclass(frozen=True)
class Ladder:
    """In which order the units of a group go.

    Attributes:
        name: of the group.
        units: how many it has.
        gone: how many of these are masked already.
        components: (components, units that may go), lowest first: what goes with each of them.
        rows: (rows, units that may go): numbers of whole rows, likewise.
        ranked: the group's components.
        importance: of each of those, for what has to come back.
    """

    name: str
    units: int
    gone: int
    components: IntArray
    rows: IntArray
    ranked: IntArray
    importance: FloatArray

    @property
    def least(self) -> int:
        """How many units stay at least."""
        most: int = max(self.components.shape[1], self.rows.shape[1])
        return self.units - most


def ladders(
    items: Sequence[Group], scores: Sequence[FloatArray], channels: Channels, live: BoolArray, *, aligned: bool = False
) -> tuple[Ladder, ...]:
    """For every group in which order its units go: what is gone already first, then the lowest scores.

    Args:
        items: the groups.
        scores: for each of them its channels', (width,).
        channels: the analysis.
        live: for every label whether it lives.
        aligned: the channels of a unit have the same position in every row; else they are every row's lowest.
    """
    alive = channels.alive(live)
    made = []
    for group, values in zip(items, scores, strict=True):
        row = channels.rows.row[group.components]
        units = channel_units(group, values, alive[group.components], row, aligned=aligned)
        made.append(
            Ladder(group.name, units.number, units.gone, units.components, units.rows, units.ranked, units.importance)
        )
    return tuple(made)


def norms(items: Sequence[Group], module: TracedModule, masking: Masking) -> list[FloatArray]:
    """For every group the L1 norms of its channels' slices, those of coupled layers added up: (width,)."""
    made = []
    for group in items:
        total = np.zeros(group.width)
        for item in group.slices:
            weight = module.get_parameter(item.parameter).detach()
            mask = masking.elements.get(item.parameter)
            lines = item.lines(weight if mask is None else weight * mask)
            values = lines[torch.from_numpy(item.rows)].abs().flatten(1).double().sum(1)
            total += np.bincount(item.channels, values.cpu().numpy(), group.width)
        made.append(total)
    return made


def masking_of(
    kept: Sequence[int], ladders: Sequence[Ladder], module: TracedModule, groups: ChannelGroups, masking: Masking
) -> Masking:
    """The masking that keeps so many units of each group, and masks what was masked before.

    Channels come back where rows would not stay equal or a node could not be rewritten.

    Raises:
        InputError: a group would keep fewer units than it must.
    """
    channels = groups.channels
    rank = np.zeros(len(channels.component))
    components, rows = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for number, ladder in zip(kept, ladders, strict=True):
        if not ladder.least <= number <= ladder.units:
            raise InputError(
                f"{number} units of {ladder.name} are kept; expected {ladder.least} to {ladder.units} of them."
            )
        rank[ladder.ranked] = ladder.importance
        components.append(ladder.components[:, : ladder.units - number].reshape(-1))
        rows.append(ladder.rows[:, : ladder.units - number].reshape(-1))
    live = masking.live(channels) & channels.live(np.concatenate(components), np.concatenate(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every candidate again; the one that is taken says so
        found = settled(module, groups, live, rank).live
    return masking.with_live(channels, found)


@dataclass
class WidthSubject:
    """A model whose groups lose units: what a trial of a pruning search is about.

    Attributes:
        module: a clean traced module.
        inputs: the example inputs.
        task: scores, and trains.
        masking: what was masked before.
        ladders: of the groups that proposals list.
        epochs: of training before a candidate is scored.
    """

    module: TracedModule
    inputs: Inputs
    task: Task
    masking: Masking
    ladders: tuple[Ladder, ...]
    epochs: int = 0
    known: ChannelGroups | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the analysis is made again where it arrives."""
        state = {name: value for name, value in vars(self).items() if name not in ("known", "twin")}
        if not self.epochs and type(self.task) is Task:
            state["task"] = replace(self.task, batches=None, loss=None, optimizer=None, schedule=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.known = None

    @cached_property
    def twin(self) -> Twin:
        """The module that takes the masks."""
        return Twin(self.module, analyse(self.module, self.inputs) if self.known is None else self.known)

    def score(self, proposal: Proposal) -> float:
        """The score with so many units, after ``epochs`` of training."""
        masking = masking_of(proposal.kept, self.ladders, self.module, self.twin.groups, self.masking)
        if not self.epochs:
            with self.twin.masked(masking) as module, placed(module, self.task.device):
                return self.task.measure(module)
        state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        try:
            with self.twin.masked(masking, trained=True) as module:
                self.task.train(module, Training(epochs=self.epochs, title="a trial"))
                with placed(module, self.task.device):
                    return self.task.measure(module)
        finally:
            self.module.load_state_dict(state)
