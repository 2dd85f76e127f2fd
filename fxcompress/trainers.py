"""What the trainers of other libraries have in common: a training as one step, with the hooks of algorithms in it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import InputError
from fxcompress.task import Task
from fxcompress.training import Epoch, Training, require_finite, training_mode


@dataclass
class Watched:
    """What happens in somebody else's loop, as the built-in one tells it.

    Attributes:
        training: what is carried out.
        task: says what the score is.
        model: what is trained.
        done: the epochs that have ended.
        steps: of the optimizer, so far.
    """

    training: Training
    task: Task
    model: nn.Module
    done: list[Epoch] = field(default_factory=list)
    steps: int = 0
    _losses: list[float] = field(default_factory=list)
    _penalties: list[float] = field(default_factory=list)
    _start: float = 0.0

    def begin_epoch(self) -> None:
        """Another pass over the batches begins."""
        self._start = time.perf_counter()
        self._losses.clear()
        self._penalties.clear()

    def add_penalty(self, loss: Tensor) -> Tensor:
        """The loss of a batch with the penalty on it.

        Raises:
            TrainingError: it is no finite number.
        """
        penalty = loss.new_zeros(()) if self.training.penalty is None else self.training.penalty()
        found, added = float(loss.detach()), float(penalty.detach())
        place = f"epoch {len(self.done) + 1}, step {len(self._losses) + 1}"
        require_finite(found + added, place, self.training.title)
        self._losses.append(found)
        self._penalties.append(added)
        return loss + penalty

    def stepped(self, steps: int) -> None:
        """The optimizer has taken as many steps in all; the hook is called for one that is new."""
        while self.steps < steps:
            self.steps += 1
            if self.training.after_step is not None:
                with torch.no_grad():
                    self.training.after_step(self.steps)

    def end_epoch(self) -> None:
        """The pass over the batches has ended."""
        score = None if self.task.score is None else self.task.measure(self.model)
        count = max(len(self._losses), 1)
        before = sum(epoch.steps for epoch in self.done)
        seconds = time.perf_counter() - self._start
        loss, penalty = math.fsum(self._losses) / count, math.fsum(self._penalties) / count
        self.done.append(Epoch(loss, penalty, score, self.steps - before, seconds))


@dataclass(frozen=True)
class Batches:
    """A task's batches as a trainer reads them: again and again, and it may ask how many there are."""

    task: Task
    device: torch.device | None
    length: int

    @classmethod
    def of(cls, task: Task, device: torch.device | None = None) -> Batches:
        """All of them; where their number is not known they are read once to count them."""
        known = task.length
        return cls(task, device, sum(1 for _ in task.read()) if known is None else known)

    def __iter__(self) -> Iterator[Any]:
        return self.task.read(device=self.device)

    def __len__(self) -> int:
        return self.length


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """A model that somebody else trains: afterwards it is on its device and in its mode, without gradients, and without
    what was hung onto it (accelerate replaces ``forward``)."""
    home = next(model.parameters()).device
    own = set(vars(model))
    with training_mode(model):
        try:
            yield
        finally:
            for name in vars(model).keys() - own:
                del model.__dict__[name]
            model.to(home)
            model.zero_grad(set_to_none=True)
            gc.collect()  # trainers, their loops and connectors keep one another alive, and with them the model


def leave_to_trainer(task: Task, options: dict[str, str]) -> None:
    """Raise :class:`InputError` where a task gives what a trainer is given: option of the task to what to say there."""
    defaults = Task()
    for name, instead in options.items():
        if getattr(task, name) != getattr(defaults, name):
            raise InputError(
                f"{name} is {getattr(task, name)!r}; expected it to be left to the trainer. Give the trainer {instead}."
            )
