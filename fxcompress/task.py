"""What a model is for: its batches, its loss, its score (design 15)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler

from fxcompress.errors import InputError, TrainingError
from fxcompress.inputs import Inputs

if TYPE_CHECKING:
    from fxcompress.training import Epoch, Training

#: What a pass may need of a task.
Need = Literal["batches", "loss", "score", "optimizer"]
_WHAT = {
    "batches": "an iterable of batches, such as a DataLoader, or a function that returns one",
    "loss": "a function loss(model, batch) that returns a scalar tensor",
    "score": "a function score(model) that returns a float, higher is better",
    "optimizer": "a function from parameters to an optimizer, such as lambda p: torch.optim.SGD(p, lr=0.01)",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is for. Only what the chosen passes need must be given.

    Args:
        batches: an iterable that can be read again and again (a list, a DataLoader), or a function that returns one;
            read once per epoch. The order of a shuffling DataLoader follows the seed of ``compress``.
        loss: ``loss(model, batch)`` gives a scalar tensor.
        score: ``score(model)`` gives a float, higher is better; called in eval mode without gradients.
        optimizer: a function from parameters to an optimizer; called for every training anew.
        epochs: how long a training takes; a pass may say otherwise.
        schedule: a function from an optimizer to a learning rate schedule, stepped after every epoch
            (``ReduceLROnPlateau`` is given the loss, or the score if its mode is ``"max"``).
        device: where to train and to calibrate; by default where the model is. The model comes back afterwards.
        precision: ``torch.bfloat16`` or ``torch.float16`` for automatic mixed precision; gradients are scaled for the
            latter.
        clip: the largest norm of all gradients together; by default they are not clipped.
        patience: stop after this many epochs without a better score (a smaller loss, if there is no score), and go back
            to the best; by default all epochs run and the last one counts.

    Raises:
        InputError: a value of the wrong kind; batches that can be read only once.
    """

    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    score: Callable[[nn.Module], float] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    epochs: int = 1
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    device: torch.device | str | None = None
    precision: torch.dtype | None = None
    clip: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "score", "optimizer", "schedule"):
            value = getattr(self, name)
            if isinstance(value, Optimizer):
                raise InputError(
                    "optimizer is an optimizer over one model's parameters; expected a function that makes one for any "
                    "model's, such as lambda p: torch.optim.SGD(p, lr=0.01)."
                )
            if isinstance(value, nn.modules.loss._Loss):
                raise InputError(
                    f"{name} is {value!r}, which takes outputs and targets; expected a function of model and batch, "
                    "such as lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])."
                )
            if value is not None and not callable(value):
                raise InputError(f"{name} is a {type(value).__name__}; expected {_WHAT.get(name, 'a function')}.")
        given = self.batches
        if given is not None and not callable(given):
            if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
                raise InputError(f"batches is a {type(given).__name__}; expected {_WHAT['batches']}.")
            if isinstance(given, Iterator):
                raise InputError(
                    f"batches is a {type(given).__name__}, which can be read only once; expected {_WHAT['batches']}."
                )
        require_count("epochs", self.epochs, least=0)
        if self.patience is not None:
            require_count("patience", self.patience)
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is {self.clip!r}; expected the largest norm of the gradients, above 0.")
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise InputError(f"precision is {self.precision!r}; expected torch.bfloat16, torch.float16 or None.")

    def lacking(self, needs: Iterable[Need]) -> list[Need]:
        """What of ``needs`` was not given."""
        return [need for need in needs if getattr(self, need) is None]

    @property
    def length(self) -> int | None:
        """How many batches there are, if that is known without reading them."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None

    def read(self, count: int | None = None, device: torch.device | None = None) -> Iterator[Any]:
        """Batches, all or the first ``count``, their tensors on the task's device (by default ``device``).

        Raises:
            InputError: there are none, or fewer than ``count``.
        """
        if self.batches is None:
            raise InputError(missing(["batches"], "the task"))
        source = self.batches() if callable(self.batches) else self.batches
        _reshuffle(source)
        number = 0
        for batch in islice(source, count):
            number += 1
            yield self.placed(batch, device)
        if not number:
            raise InputError("batches gave no batch; expected at least one each time they are read.")
        if count is not None and number < count:
            raise InputError(f"batches gave {number} batches; expected {count}. Ask for fewer, or give more.")

    def placed(self, batch: Any, device: torch.device | None = None) -> Any:
        """A batch with its tensors on the task's device, by default on ``device``."""
        target = device if self.device is None else torch.device(self.device)
        if target is None:
            return batch
        # Towards the host a copy that nobody waits for may be read before it is there.
        move = partial(Tensor.to, device=target, non_blocking=target.type != "cpu")
        return pytree.tree_map_only(Tensor, move, batch)

    def objective(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, in the task's precision: a scalar.

        Raises:
            InputError: the loss is no scalar tensor.
        """
        if self.loss is None:
            raise InputError(missing(["loss"], "the task"))
        device = next((p.device.type for p in model.parameters()), "cpu")
        # Without a precision of its own it runs in that of whoever calls, such as another library's trainer.
        with nullcontext() if self.precision is None else torch.autocast(device, self.precision):
            value = self.loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(f"loss(model, batch) gave {found}; expected a scalar tensor.")
        return value.reshape(())

    def feed(self, model: nn.Module, batch: Any) -> None:
        """Run the model on a batch: through the loss if there is one, else the batch is the model's inputs."""
        if self.loss is not None:
            self.objective(model, batch)
        else:
            Inputs.parse(batch).run(model)

    def measure(self, model: nn.Module) -> float:
        """The score of a model, which is in eval mode meanwhile.

        Raises:
            TrainingError: it is no finite number.
        """
        if self.score is None:
            raise InputError(missing(["score"], "the task"))
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                found = self.score(model)
        finally:
            for module, mode in modes.items():
                module.training = mode
        value = float(found)
        if not math.isfinite(value):
            raise TrainingError(f"score(model) gave {value}; expected a finite number, higher is better.")
        return value

    def begun_with(self, dense: nn.Module) -> Task:
        """This task in a run of ``compress`` that begins with the model ``dense``, which stays as it is."""
        return self

    def with_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Task:
        """What trains as this task does, on another loss."""
        return replace(self, loss=loss)

    def without_patience(self) -> Task:
        """This task, all epochs of which run."""
        return replace(self, patience=None)

    def steps(self, model: nn.Module, epochs: int) -> int:
        """How many steps the optimizer takes in a training: the batches are counted if their number is not known."""
        source = self.batches() if callable(self.batches) else self.batches
        return epochs * (len(source) if isinstance(source, Sized) else sum(1 for _ in self.read()))

    def train(self, model: nn.Module, training: Training) -> tuple[Epoch, ...]:
        """Train a model in place; trainers of other libraries take this method's place."""
        return training.run(self, model)


def _reshuffle(source: Any) -> None:
    """Let the order of a DataLoader follow the seed of the run, whatever its samplers drew before."""
    sampler = getattr(source, "sampler", None)
    inner = getattr(getattr(source, "batch_sampler", None), "sampler", None)
    generators = {id(g): g for item in (source, sampler, inner) if (g := getattr(item, "generator", None)) is not None}
    for generator in generators.values():
        if isinstance(generator, torch.Generator):
            generator.manual_seed(int(torch.randint(2**31, ())))
    for item in {id(item): item for item in (sampler, inner)}.values():
        if isinstance(item, DistributedSampler):
            item.set_epoch(int(torch.randint(2**31, ())))


def missing(needs: Iterable[Need], who: str) -> str:
    """The message for what a task lacks."""
    return "; ".join(f"{need} is missing, which {who} needs: {_WHAT[need]}" for need in needs) + "."


def require_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise :class:`InputError` unless an option is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {least}.")
