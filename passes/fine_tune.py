"""Training between other passes."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.context import Context
from fxcompress.module import TracedModule
from fxcompress.pipeline import Pass
from fxcompress.task import Need, require_count


@dataclass(frozen=True)
class FineTune(Pass):
    """Trains the model as it is on the task: masked weights stay zero, fake-quantized ones quantized.

    Args:
        epochs: how many; the task's by default.

    Needs the task's batches, loss and optimizer. Changes weights and running statistics, nothing else.
    """

    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None:
            require_count("epochs", self.epochs)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What training needs."""
        return "batches", "loss", "optimizer"

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Train."""
        context.train(module, epochs=self.epochs, title="fine-tuning")
        return module
