"""Pruning a little at a time, with training in between: what all schedules share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule
from fxcompress.passes.inner_pruner import AroundPruner, prune, require_pruner, sparsities_of, with_sparsity
from fxcompress.pipeline import Pass
from fxcompress.task import require_count


@dataclass(frozen=True)
class ScheduledPruner(AroundPruner):
    """Lets a pruner mask in n iterations, each with a sparsity on a curve, and trains after each.

    In iteration t = 1 .. n the pruner masks s_t = s_f + (s_i - s_f) * :meth:`remaining` (t / n), scores taken anew, and
    the module is trained with these masks. s_n is s_f exactly.

    Args:
        inner: any pruner; its sparsity, a float or a mapping, is the final one, s_f.
        initial: s_i, where the curve starts; at most the smallest final sparsity.
        iterations: n.
        epochs_per_iteration: how long each training is.

    Needs the task's batches, loss and optimizer, and what the inner pruner needs. Masks only grow.
    """

    inner: Pass
    initial: float = 0.0
    iterations: int = 10
    epochs_per_iteration: int = 1

    def __post_init__(self) -> None:
        require_pruner(self.inner, self.name)
        require_count("iterations", self.iterations)
        require_count("epochs_per_iteration", self.epochs_per_iteration)
        lowest = min(sparsities_of(self.inner))
        if isinstance(self.initial, bool) or not isinstance(self.initial, (int, float)) or not 0 <= self.initial < 1:
            raise InputError(f"initial is {self.initial!r}; expected a number in [0, 1), the sparsity at the start.")
        if self.initial > lowest:
            raise InputError(
                f"initial is {self.initial!r}, above the inner pruner's sparsity of {lowest!r}; expected no more than "
                "that: masks only grow. To leave layers alone, exclude them."
            )

    @property
    def pruner(self) -> Pass:
        """What masks."""
        return self.inner

    @abstractmethod
    def remaining(self, progress: float) -> float:
        """How much of the way from the initial to the final sparsity is left: 1 at progress 0, 0 at progress 1."""

    def sparsity_at(self, iteration: int, final: float) -> float:
        """s_t for t = ``iteration`` in 0 .. n, with s_f = ``final``."""
        if iteration == self.iterations:
            return final
        return final + (self.initial - final) * self.remaining(iteration / self.iterations)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Mask and train, n times."""
        for iteration in range(1, self.iterations + 1):
            inner = with_sparsity(self.inner, partial(self.sparsity_at, iteration))
            context.step(module, partial(prune, inner, module, context))
            place = f"iteration {iteration} of {self.iterations}"
            context.notes.append(f"{place}: sparsity {', '.join(f'{each:.6g}' for each in sparsities_of(inner))}")
            with context.laid(module, self.name):
                context.train(module, epochs=self.epochs_per_iteration, title=f"{self.name}, {place}")
        return module
