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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxcompress.checkpoint import Kept, Stateful
from fxcompress.errors import InputError, TrainingError
from fxcompress.processes import averages, averaging, in_step, share_statistics
from fxcompress.task import Task

Result = TypeVar("Result")


@dataclass(frozen=True)
class Epoch:
    """One pass over the batches.

    Attributes:
        loss: mean over the batches and the processes, penalty left out.
        penalty: mean over the batches.
        score: the task's, or None if it has none.
        steps: this epoch's, one for each batch; one whose gradients overflowed in float16 counts, and changes nothing.
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
        after_step: called without gradients after every step with the number of steps so far, from 1.
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
        self.device = parameters[0].device
        assert task.optimizer is not None
        self.optimizer = task.optimizer(parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise InputError(
                f"optimizer(parameters) gave a {type(self.optimizer).__name__}; expected a torch.optim.Optimizer."
            )
        self.schedule = None if task.schedule is None else task.schedule(self.optimizer)
        scaled = task.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.best = Kept(value=-math.inf, state=None, waited=0)
        self.runner: Callable[..., Any] = averaging(model)
        kept: list[Any] = [self.optimizer, self.best, *([self.schedule] if self.schedule else [])]
        self.releases = [training.keep(item) for item in [*kept, *([self.scaler] if scaled else [])]]

    def close(self) -> None:
        """Nothing of this training stays: neither what it kept nor gradients."""
        for release in self.releases:
            release()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # it may have parameters besides the model's, and not all of these
        self.model.zero_grad(set_to_none=True)

    def run(self) -> tuple[Epoch, ...]:
        done: list[Epoch] = []
        patience = self.task.patience
        with _shown(self.training, self.task.length) as bar:
            for number in range(self.training.epochs):
                before = sum(epoch.steps for epoch in done)
                epoch, waited = self.training.step(partial(self._epoch, number, before, bar))
                done.append(epoch)
                if patience is not None and waited >= patience:
                    break
        if patience is not None:
            self.training.step(self._restore_best)
        return tuple(done)

    def _epoch(self, number: int, before: int, bar: _Bar) -> tuple[Epoch, int]:
        start = time.perf_counter()
        bar.begin(number)
        losses, penalties = [], []
        updated = False
        batches = in_step(self.task.read(device=self.device), f"epoch {number + 1}", self.device)
        for step, batch in enumerate(batches, 1):
            loss, penalty, stepped = self._step(batch, f"epoch {number + 1}, step {step}")
            losses.append(loss)
            penalties.append(penalty)
            updated |= stepped
            if self.training.after_step is not None:
                with torch.no_grad():
                    self.training.after_step(before + step)
            bar.advance(number, step, loss)
        bar.end(number, len(losses))
        self._check_weights(number)
        share_statistics(self.model)
        score = None
        if self.task.score is not None:
            (score,) = averages([self.task.measure(self.model)], self.device)
        loss = math.fsum(losses) / len(losses)
        if updated:  # else float16 overflowed in all steps, and the optimizer has not begun
            self._adjust_rate(loss, score)
        waited = self._judge(-loss if score is None else score)
        seconds = time.perf_counter() - start
        return Epoch(loss, math.fsum(penalties) / len(penalties), score, len(losses), seconds), waited

    def _step(self, batch: Any, place: str) -> tuple[float, float, bool]:
        """Loss and penalty, each the mean over the processes, and whether the optimizer took its step."""
        self._forget_gradients()
        loss = self.task.objective(self.runner, batch)  # type: ignore[arg-type]  # DDP around the module
        penalty = loss.new_zeros(()) if self.training.penalty is None else self.training.penalty()
        found, added = averages([float(loss.detach()), float(penalty.detach())], self.device)
        require_finite(found + added, place, self.training.title)
        self.scaler.scale(loss + penalty).backward()
        if self.task.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], self.task.clip
            )
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return found, added, self.scaler.get_scale() >= scale  # it is lowered where a step was left out

    def _check_weights(self, number: int) -> None:
        """A gradient may be no number although the loss was one; such weights are not stored."""
        if not math.isfinite(nn.utils.get_total_norm(self.model.parameters())):
            raise TrainingError(
                f"weights became NaN or infinite in epoch {number + 1} of {self.training.title}, at finite losses; "
                "expected finite ones. Look for a gradient that does not exist (sqrt at 0), or lower the learning rate."
            )

    def _adjust_rate(self, loss: float, score: float | None) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(score if self.schedule.mode == "max" and score is not None else loss)
        elif self.schedule is not None:
            self.schedule.step()

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


def require_finite(total: float, place: str, title: str) -> None:
    """Raise :class:`TrainingError` unless a loss, penalty included, is a finite number."""
    if not math.isfinite(total):
        raise TrainingError(
            f"the loss is {total} at {place} of {title}; expected a finite one. Lower the learning rate, clip "
            "gradients (Task(clip=1.0)), or look at that batch."
        )


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


@dataclass
class _Bar:
    """The epochs done, the loss and the time left.

    Attributes:
        progress: the display.
        row: its one row, counted in epochs.
        title: what is trained.
        length: steps in an epoch; 0 until that is known.
    """

    progress: Progress
    row: TaskID
    title: str
    length: int

    def begin(self, epoch: int) -> None:
        """Where a run goes on, the epochs before took no time of this one."""
        if epoch and not self.progress.tasks[0].completed:
            self.progress.reset(self.row, completed=epoch)

    def advance(self, epoch: int, step: int, loss: float) -> None:
        """One step was taken."""
        shown = min(step / self.length, 1.0) if self.length else 0.0
        self.progress.update(self.row, completed=epoch + shown, description=f"{self.title}: loss {loss:.4g}")

    def end(self, epoch: int, steps: int) -> None:
        """An epoch was as long as this."""
        self.length = steps
        self.progress.update(self.row, completed=epoch + 1)


@contextmanager
def _shown(training: Training, length: int | None) -> Iterator[_Bar]:
    """A bar on the console; ``length``: steps in an epoch, if that is known before the first has ended."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=training.console, transient=True, disable=training.console.quiet) as progress:
        yield _Bar(progress, progress.add_task(training.title, total=training.epochs), training.title, length or 0)


def summary(epochs: tuple[Epoch, ...]) -> str:
    """One line for a note."""
    first, last = epochs[0], epochs[-1]
    text = f"trained {len(epochs)} epochs: loss {first.loss:.4g} -> {last.loss:.4g}"
    return text if last.score is None else f"{text}, score {last.score:.4g}"
