"""The built-in training loop: epochs that can be resumed, with the hooks through which algorithms reach in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxcompress.checkpoint import Kept, Stateful
from fxcompress.errors import InputError, TrainingError
from fxcompress.task import Task

Result = TypeVar("Result")


@dataclass(frozen=True)
class Epoch:
    """One pass over the batches.

    Attributes:
        loss: mean over the batches, penalty left out.
        penalty: mean over the batches.
        score: the task's, or None if it has none.
        steps: of the optimizer, this epoch's.
        seconds: how long it took.
    """

    loss: float
    penalty: float
    score: float | None
    steps: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """One training of a module, for a task to carry out.

    Attributes:
        epochs: how many.
        step: takes a step of the run: ``step(work)`` is ``work()``, once (:mod:`fxcompress.checkpoint`).
        keep: has the state of an optimizer, or the like, stored with every step; returns what takes it out again.
        penalty: an algorithm's addition to the loss, a scalar tensor.
        after_step: called after every step of the optimizer with the number of steps so far, from 1.
        console: where progress is shown.
        title: what is trained, for progress and messages.
    """

    epochs: int
    step: Callable[[Callable[[], Any]], Any] = lambda work: work()
    keep: Callable[[Stateful], Callable[[], None]] = lambda item: lambda: None
    penalty: Callable[[], Tensor] | None = None
    after_step: Callable[[int], None] | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))
    title: str = "training"

    def run(self, task: Task, model: nn.Module) -> tuple[Epoch, ...]:
        """Train with the built-in loop, in train mode; afterwards every module is in its own mode again.

        Raises:
            TrainingError: the loss is no finite number, at which step.
        """
        if self.epochs == 0:
            return ()
        with placed(model, task.device), training_mode(model):
            loop = _Loop(self, task, model)
            try:
                return loop.run()
            finally:
                loop.close()


class _Loop:
    """A training under way."""

    def __init__(self, training: Training, task: Task, model: nn.Module) -> None:
        self.training, self.task, self.model = training, task, model
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError("no parameter of the model requires gradients; there is nothing to train.")
        assert task.optimizer is not None
        self.optimizer = task.optimizer(parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise InputError(
                f"optimizer(parameters) gave a {type(self.optimizer).__name__}; expected a torch.optim.Optimizer."
            )
        self.schedule = None if task.schedule is None else task.schedule(self.optimizer)
        scaled = task.precision is torch.float16
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=scaled)
        self.best = Kept(value=-math.inf, state=None, waited=0)
        kept: list[Any] = [self.optimizer, self.best, *([self.schedule] if self.schedule else [])]
        self.releases = [training.keep(item) for item in [*kept, *([self.scaler] if scaled else [])]]
        self.runner: Callable[..., Any] = distributed(model)

    def close(self) -> None:
        """Nothing of this training stays: neither what it kept nor gradients."""
        for release in self.releases:
            release()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self) -> tuple[Epoch, ...]:
        done: list[Epoch] = []
        patience = self.task.patience
        with _progress(self.training) as advance:
            for number in range(self.training.epochs):
                before = sum(epoch.steps for epoch in done)
                epoch, waited = self.training.step(partial(self._epoch, number, before, advance))
                done.append(epoch)
                if patience is not None and waited >= patience:
                    break
        if patience is not None:
            self.training.step(self._restore_best)
        return tuple(done)

    def _epoch(self, number: int, before: int, advance: Callable[..., None]) -> tuple[Epoch, int]:
        start = time.perf_counter()
        losses, penalties = [], []
        for step, batch in enumerate(self.task.read(), 1):
            loss, penalty = self._step(batch, f"epoch {number + 1}, step {step}")
            losses.append(loss)
            penalties.append(penalty)
            if self.training.after_step is not None:
                with torch.no_grad():
                    self.training.after_step(before + step)
            advance(number, step, loss)
        if self.schedule is not None:
            self.schedule.step()
        score = None if self.task.score is None else self.task.measure(self.model)
        loss = math.fsum(losses) / len(losses)
        waited = self._judge(-loss if score is None else score)
        seconds = time.perf_counter() - start
        return Epoch(loss, math.fsum(penalties) / len(penalties), score, len(losses), seconds), waited

    def _step(self, batch: Any, place: str) -> tuple[float, float]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.objective(self.runner, batch)  # type: ignore[arg-type]  # DDP around the module
        penalty = loss.new_zeros(()) if self.training.penalty is None else self.training.penalty()
        total = loss + penalty
        if not bool(torch.isfinite(total)):
            raise TrainingError(
                f"the loss is {float(total.detach())} at {place} of {self.training.title}; expected a finite one. Lower "
                "the learning rate, clip gradients (Task(clip=1.0)), or look at that batch."
            )
        self.scaler.scale(total).backward()
        if self.task.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], self.task.clip
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.detach()), float(penalty.detach())

    def _judge(self, value: float) -> int:
        """How many epochs there have been since the best one."""
        if self.task.patience is None:
            return 0
        if value > self.best["value"]:
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best.values = {"value": value, "state": state, "waited": 0}
        else:
            self.best["waited"] += 1
        waited: int = self.best["waited"]
        return waited

    def _restore_best(self) -> None:
        state: Mapping[str, Tensor] | None = self.best["state"]
        if state is not None:
            self.model.load_state_dict(state)


def distributed(model: nn.Module) -> Callable[..., Any]:
    """The model as one of several processes trains it: gradients are averaged; alone, the model itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return model
    return DistributedDataParallel(model)


@contextmanager
def placed(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The model on another device meanwhile."""
    home = next((p.device for p in model.parameters()), None)
    if device is None or home is None or torch.device(device) == home:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model in train mode meanwhile."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _progress(training: Training) -> Iterator[Callable[..., None]]:
    """A bar with the epochs done, the loss and the time left; yields what moves it on."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=training.console, transient=True, disable=training.console.quiet) as progress:
        bar = progress.add_task(training.title, total=training.epochs)
        longest = [1]

        def advance(epoch: int, step: int, loss: float) -> None:
            longest[0] = max(longest[0], step)
            shown = min(step / longest[0], 1.0) if epoch else 0.0  # how long an epoch is shows after the first
            progress.update(bar, completed=epoch + shown, description=f"{training.title}: loss {loss:.4g}")

        yield advance


def summary(epochs: tuple[Epoch, ...]) -> str:
    """One line for a note."""
    first, last = epochs[0], epochs[-1]
    text = f"trained {len(epochs)} epochs: loss {first.loss:.4g} -> {last.loss:.4g}"
    return text if last.score is None else f"{text}, score {last.score:.4g}"
