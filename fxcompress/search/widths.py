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
from fxcompress.channels.labels import FloatArray
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.ranking import Ranking
from fxcompress.removable_units import Units
from fxcompress.search.trial import Proposal
from fxcompress.search.twin import Twin
from fxcompress.task import Task
from fxcompress.training import Training, placed
from fxcompress.undisturbed import restored


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


def masking_of(kept: Sequence[int], ranking: Ranking, masking: Masking) -> Masking:
    """The masking that keeps so many units of each group, and masks what was masked before.

    Channels come back where rows would not stay equal or a node could not be rewritten.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every candidate again; the notes of the pass say what came back
        found = ranking.keeping(np.array(kept, dtype=np.int64))
    return masking.with_live(ranking.groups.channels, found.live)


@dataclass
class WidthSubject:
    """A model whose groups lose units: what a trial of a pruning search is about.

    Attributes:
        module: a clean traced module, the subject's own.
        inputs: the example inputs.
        task: scores, and trains.
        masking: what was masked before.
        tables: units of the groups that proposals list.
        epochs: of training before a candidate is scored.
        known: the analysis, where it has been made.
    """

    module: TracedModule
    inputs: Inputs
    task: Task
    masking: Masking
    tables: tuple[Units, ...]
    epochs: int = 0
    known: ChannelGroups | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the analysis is made again where it arrives, and what only training needs stays here."""
        state = {name: value for name, value in vars(self).items() if name not in ("twin", "ranking")}
        state["known"] = None
        if not self.epochs and type(self.task) is Task:
            state["task"] = replace(self.task, batches=None, loss=None, optimizer=None, schedule=None)
        return state

    @cached_property
    def twin(self) -> Twin:
        """The module that takes the masks."""
        return Twin(self.module, analyse(self.module, self.inputs) if self.known is None else self.known)

    @cached_property
    def ranking(self) -> Ranking:
        """In which order units go."""
        groups = self.twin.groups
        return Ranking(self.module, groups, self.masking.live(groups.channels), self.tables)

    def score(self, proposal: Proposal) -> float:
        """The score with so many units, after ``epochs`` of training."""
        masking = masking_of(proposal.kept, self.ranking, self.masking)
        with self.twin.masked(masking, trained=self.epochs > 0) as module, restored(module):
            if self.epochs:
                self.task.train(module, Training(epochs=self.epochs, title="a trial"))
            with placed(module, self.task.device):
                return self.task.measure(module)
