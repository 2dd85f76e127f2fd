"""Training by the Trainer of transformers in the place of the built-in loop. Needs the extra ``transformers``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompress.checkpoint import seeded
from fxcompress.errors import InputError
from fxcompress.task import Need, Task
from fxcompress.trainers import Batches, TrainerTask, Watched, lent


def _library() -> Any:
    """``transformers``, able to train.

    Raises:
        InputError: it is not installed, or accelerate is not.
    """
    try:
        import accelerate  # noqa: F401  without it the Trainer cannot be made
        import transformers
    except ImportError as error:
        raise InputError(
            f"TransformersTask needs transformers and accelerate; one cannot be imported ({error}). Install them: "
            "pip install 'fxcompress[transformers]'."
        ) from error
    return transformers


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers returns for a batch with labels, a mapping of its keyword arguments.

    Raises:
        InputError: the batch is no mapping, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"batch is a {type(batch).__name__}; expected a mapping of the model's keyword arguments. Give the task a "
            "loss(model, batch) for others."
        )
    output = model(**batch)
    if isinstance(output, tuple):
        loss = output[0]
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"the model returned no loss for a batch of {', '.join(batch)}; expected batches with labels, and example "
            "inputs with them too. Or give the task a loss(model, batch)."
        )
    return loss


@dataclass(frozen=True, kw_only=True)
class TransformersTask(TrainerTask):
    """A task that the Trainer of transformers trains.

    The Trainer reads the task's ``batches``, which are mappings of keyword arguments with labels unless there is a
    ``loss``. The number of epochs is the pass's; all else is the Trainer's: devices, precision, clipping, its optimizer
    (unless the task has one) and its schedule. The loss of a batch counts as its mean when gradients are accumulated.
    A training is one step of a run with ``checkpoint=``: if it is interrupted, it is repeated as a whole.

    Args:
        trainer: ``trainer(model)`` gives a ``transformers.Trainer``, a new one for every training, such as
            ``lambda model: Trainer(model, TrainingArguments("out", save_strategy="no", report_to=[]))``.

    Raises:
        InputError: transformers or accelerate is not installed; an option is the Trainer's.
    """

    trainer: Callable[[nn.Module], Any] | None = None

    left: ClassVar[Mapping[str, str]] = {
        "device": "its arguments use_cpu= or the environment",
        "precision": "its arguments bf16= or fp16=",
        "clip": "its argument max_grad_norm=",
        "patience": "the callback EarlyStoppingCallback",
        "schedule": "its argument lr_scheduler_type=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _library()
        if not callable(self.trainer):
            raise InputError(
                f"trainer is a {type(self.trainer).__name__}; expected a function trainer(model) that returns a "
                "transformers.Trainer."
            )
        if self.loss is None:
            object.__setattr__(self, "loss", own_loss)

    def lacking(self, needs: Iterable[Need]) -> list[Need]:
        """What of ``needs`` was not given; a Trainer has an optimizer."""
        return [need for need in super().lacking(needs) if need != "optimizer"]

    def accumulated(self, model: nn.Module, epochs: int) -> int:
        """The Trainer's ``gradient_accumulation_steps``."""
        with lent(model), seeded(0):
            return int(self._trainer(model).args.gradient_accumulation_steps)

    def _trainer(self, model: nn.Module) -> Any:
        """A Trainer, which seeds everything by its own arguments."""
        assert self.trainer is not None
        trainer = self.trainer(model)
        if not isinstance(trainer, _library().Trainer):
            raise InputError(f"trainer(model) gave a {type(trainer).__name__}; expected a transformers.Trainer.")
        return trainer

    def fit(self, model: nn.Module, watched: Watched) -> None:
        """Let a Trainer train, with the task's loss and batches."""
        library = _library()
        seed = int(torch.randint(2**31, ()))
        trainer = self._trainer(model)
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            raise InputError("the Trainer has a loss of its own; expected it in the task: TransformersTask(loss=...).")
        trainer.args = copy.copy(trainer.args)
        trainer.args.num_train_epochs, trainer.args.max_steps = watched.training.epochs, -1
        if self.optimizer is not None:
            trainer.optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad])
        trainer.get_train_dataloader = partial(Batches.of, self)
        trainer.compute_loss = partial(_compute_loss, self, watched)
        trainer.loss_is_scaled_for_ga = False  # a mean over the batch
        hooks = library.TrainerCallback()
        hooks.on_epoch_begin = lambda *_, **__: watched.begin_epoch()
        hooks.on_step_end = lambda arguments, state, *_, **__: watched.stepped(state.global_step)
        hooks.on_epoch_end = lambda *_, **__: watched.end_epoch()
        trainer.callback_handler.callbacks.insert(0, hooks)
        with seeded(seed):
            trainer.train()


def _compute_loss(
    task: Task, watched: Watched, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
) -> Any:
    """What the Trainer calls: the task's loss with the penalty on it."""
    loss = watched.add_penalty(task.objective(model, inputs))
    return (loss, None) if return_outputs else loss
