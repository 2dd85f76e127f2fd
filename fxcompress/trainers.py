"""What the trainers of other libraries have in common: a training as one step, with the hooks of algorithms in it."""

from __future__ import annotations

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

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


@dataclass(frozen=True, kw_only=True)
class TrainerTask(Task, ABC):
    """A task that a trainer of another library trains, a training as one step of a run.

    Attributes:
        left: options that are the trainer's, and what to give it instead.
    """

    left: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = Task()
        for name, instead in self.left.items():
            if getattr(self, name) != getattr(defaults, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected it to be left to the trainer. Give the trainer "
                    f"{instead}."
                )

    @abstractmethod
    def fit(self, model: nn.Module, watched: Watched) -> None:
        """Let the trainer train a model in place, and tell ``watched``."""

    @abstractmethod
    def accumulated(self, model: nn.Module, epochs: int) -> int:
        """How many batches the trainer takes for one step of the optimizer."""

    def steps(self, model: nn.Module, epochs: int) -> int:
        """How many steps the optimizer takes: the trainer may accumulate gradients, each epoch by itself."""
        return math.ceil(Batches.of(self).length / self.accumulated(model, epochs)) * epochs

    def train(self, model: nn.Module, training: Training) -> tuple[Epoch, ...]:
        """Train a model in place.

        Raises:
            TrainingError: the loss is no finite number, at which step.
        """
        if training.epochs == 0:
            return ()
        return training.step(partial(self._train, model, training))  # type: ignore[no-any-return]

    def _train(self, model: nn.Module, training: Training) -> tuple[Epoch, ...]:
        watched = Watched(training, self, model)
        with lent(model):
            self.fit(model, watched)
        return tuple(watched.done)
