"""Training by Lightning's Trainer in the place of the built-in loop. Needs the extra ``lightning``."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.errors import InputError
from fxcompress.module import modules_of
from fxcompress.processes import unwrapped
from fxcompress.task import Need, Task
from fxcompress.trainers import Batches, TrainerTask, Watched


def _library() -> Any:
    """``lightning.pytorch``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lightning.pytorch
    except ImportError as error:
        raise InputError(
            f"LightningTask needs lightning, which cannot be imported ({error}). Install it: "
            "pip install 'fxcompress[lightning]'."
        ) from error
    return lightning.pytorch


@dataclass(frozen=True, kw_only=True)
class LightningTask(TrainerTask):
    """A task that Lightning's Trainer trains.

    Give ``loss`` and ``optimizer`` as to any task, or a ``module``: then its ``training_step`` is the loss, and its
    ``configure_optimizers`` and other hooks are what they always are. The module is copied, with the model that is
    trained in the place of its attribute ``network``. The Trainer reads the task's ``batches``; devices, precision,
    clipping and stopping early are its own. A training is one step of a run with ``checkpoint=``: if it is interrupted,
    it is repeated as a whole.

    Args:
        trainer: ``trainer(max_epochs=...)`` gives a ``lightning.Trainer``, a new one for every training, such as
            ``functools.partial(lightning.Trainer, accelerator="cpu", logger=False)``.
        module: a LightningModule that optimizes automatically, or None.
        network: name of the model that is compressed in ``module``.

    Raises:
        InputError: lightning is not installed; an option is the Trainer's; the module has no such attribute.
    """

    trainer: Callable[..., Any] | None = None
    module: nn.Module | None = None
    network: str = "model"

    left: ClassVar[Mapping[str, str]] = {
        "device": "accelerator= and devices=",
        "precision": "precision=",
        "clip": "gradient_clip_val=",
        "patience": "the callback EarlyStopping",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        library = _library()
        if not callable(self.trainer):
            raise InputError(
                f"trainer is a {type(self.trainer).__name__}; expected a function trainer(max_epochs=...) that returns "
                "a lightning.Trainer, such as functools.partial(lightning.Trainer, logger=False)."
            )
        if self.module is None:
            return
        if not isinstance(self.module, library.LightningModule):
            raise InputError(f"module is a {type(self.module).__name__}; expected a lightning.LightningModule or None.")
        if not self.network or self.network not in modules_of(self.module, every_name=True):
            raise InputError(
                f"module has nothing called {self.network!r}; expected network= to name the model that is compressed: "
                f"one of {', '.join(self.module._modules)}."
            )
        if not self.module.automatic_optimization:
            raise InputError(
                "module.automatic_optimization is False; expected True: a penalty has no way into an optimization that "
                "is written out."
            )
        if self.loss is None:
            object.__setattr__(self, "loss", _StepLoss(self.module, self.network))

    def lacking(self, needs: Iterable[Need]) -> list[Need]:
        """What of ``needs`` was not given; a module brings its optimizer."""
        return [need for need in super().lacking(needs) if need != "optimizer" or self.module is None]

    def accumulated(self, model: nn.Module, epochs: int) -> int:
        """The Trainer's ``accumulate_grad_batches``."""
        return int(self._trainer(epochs).accumulate_grad_batches)

    def _trainer(self, epochs: int) -> Any:
        assert self.trainer is not None
        trainer = self.trainer(max_epochs=epochs)
        if not isinstance(trainer, _library().Trainer):
            raise InputError(f"trainer(max_epochs=...) gave a {type(trainer).__name__}; expected a lightning.Trainer.")
        return trainer

    def fit(self, model: nn.Module, watched: Watched) -> None:
        """Let a Trainer train, with the task's loss and batches."""
        library = _library()
        trainer = self._trainer(watched.training.epochs)
        hooks = library.Callback()
        hooks.on_train_epoch_start = lambda *_: watched.begin_epoch()
        hooks.on_train_batch_end = lambda trainer, *_: watched.stepped(trainer.global_step)
        hooks.on_train_epoch_end = lambda *_: watched.end_epoch()
        trainer.callbacks.insert(0, hooks)
        if self.module is None:
            whole = library.LightningModule()
            whole.network = model
        else:
            whole = _holding(self.module, self.network, model)
        whole.training_step = partial(_training_step, self, model, whole, watched)
        if self.optimizer is not None:
            whole.configure_optimizers = partial(self._optimizers, whole)
        trainer.fit(whole, train_dataloaders=Batches.of(self))

    def _optimizers(self, whole: nn.Module) -> Any:
        assert self.optimizer is not None
        optimizer = self.optimizer([p for p in whole.parameters() if p.requires_grad])
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"optimizer(parameters) gave a {type(optimizer).__name__}; expected an Optimizer.")
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "epoch"}}


@dataclass
class _Running:
    """The LightningModule whose step is under way.

    Attributes:
        whole: the module.
        model: the model in it.
        index: of the batch.
        said: what its ``training_step`` returned.
    """

    whole: Any
    model: nn.Module
    index: int
    said: Any = None


#: Set while a Trainer takes a step.
_RUNNING: ContextVar[_Running | None] = ContextVar("running", default=None)


def _training_step(task: Task, model: nn.Module, whole: nn.Module, watched: Watched, batch: Any, batch_idx: int) -> Any:
    """What the Trainer calls: the task's loss with the penalty on it, and whatever else the user's step returned."""
    running = _Running(whole, model, batch_idx)
    token = _RUNNING.set(running)
    try:
        total = watched.add_penalty(task.objective(model, batch))
    finally:
        _RUNNING.reset(token)
    return {**running.said, "loss": total} if isinstance(running.said, Mapping) else total


@dataclass(frozen=True)
class _StepLoss:
    """The ``training_step`` of a LightningModule as the loss of a task, with any model in the place of its network."""

    module: nn.Module
    network: str

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        running = _RUNNING.get()
        if running is None or running.model is not unwrapped(model):
            running = _Running(_holding(self.module, self.network, model), model, 0)
        kind = type(running.whole)
        takes_index = len(inspect.signature(kind.training_step).parameters) > 2
        with warnings.catch_warnings():
            # It logs, and where a pass looks at gradients there is no Trainer.
            warnings.filterwarnings("ignore", message="You are trying to `self.log\\(\\)`")
            said = kind.training_step(running.whole, batch, *([running.index] if takes_index else []))
        running.said = said
        loss = said.get("loss") if isinstance(said, Mapping) else said
        if not isinstance(loss, Tensor):
            raise InputError(
                f"training_step of {type(self.module).__name__} gave {loss!r}; expected a scalar tensor, or a mapping "
                "with one called 'loss'."
            )
        return loss


def _holding(module: nn.Module, network: str, model: nn.Module) -> Any:
    """A copy of a LightningModule with another model in the place of its network, wherever it refers to that."""
    return copy.deepcopy(module, {id(module.get_submodule(network)): model})
