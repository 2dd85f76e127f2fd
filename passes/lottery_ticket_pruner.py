"""The lottery ticket hypothesis: iterative pruning with rewinding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxcompress.checkpoint import Kept
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule, state_of
from fxcompress.passes.inner_pruner import AroundPruner, prune, require_pruner, with_sparsity
from fxcompress.pipeline import Pass
from fxcompress.processes import share_statistics
from fxcompress.task import require_count


@dataclass(frozen=True)
class LotteryTicketPruner(AroundPruner):
    """Finds a sparse network that trains well from its own initial values.

    Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 1 and appendix B, around any
    pruner. In each of n rounds the module is trained, with an optimizer and a schedule of its own, and the pruner then
    masks as much as leaves (1 - s)^(i/n) in round i. Parameters and buffers (BatchNorm statistics) then get the values
    back, bit for bit, that they had when the pass began, or after ``reset_to_step`` steps of the first training
    (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671).

    What comes out is the ticket: masks, over the values that it was reset to. Train it (``FineTune``).

    Args:
        inner: any pruner; its sparsity, a float or a mapping, is the final one, s.
        rounds: n.
        reset_to_step: which step's values are given back; 0: those before the first.
        epochs: how long each training is; the task's by default.

    Needs the task's batches, loss and optimizer, and what the inner pruner needs. Masks only grow.
    """

    inner: Pass
    rounds: int = 5
    reset_to_step: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        require_pruner(self.inner, self.name)
        require_count("rounds", self.rounds)
        require_count("reset_to_step", self.reset_to_step, least=0)
        if self.epochs is not None:
            require_count("epochs", self.epochs)

    @property
    def pruner(self) -> Pass:
        """What masks."""
        return self.inner

    def sparsity_at(self, round_: int, final: float) -> float:
        """1 - (1 - s)^(i/n) for i = ``round_`` in 0 .. n, with s = ``final``."""
        return final if round_ == self.rounds else 1 - (1 - final) ** (round_ / self.rounds)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Train, mask and reset, n times."""
        origin = Kept(values=None)
        names = list(state_of(module))
        if self.reset_to_step == 0:
            _remember(module, names, origin)
        release = context.keep(origin)
        for number in range(1, self.rounds + 1):
            place = f"round {number} of {self.rounds}"
            hook = partial(self._after_step, module, names, origin) if number == 1 and self.reset_to_step else None
            with context.laid(module, self.name):
                done = context.train(module, epochs=self.epochs, after_step=hook, title=f"{self.name}, {place}")
            if origin["values"] is None:
                raise InputError(
                    f"reset_to_step is {self.reset_to_step}, and a training has {sum(epoch.steps for epoch in done)} "
                    "steps; expected no more than that. Train longer, or reset to an earlier step."
                )
            inner = with_sparsity(self.inner, partial(self.sparsity_at, number))
            context.step(module, partial(_mask_and_reset, inner, module, context, origin))
        release()
        return module

    def _after_step(self, module: TracedModule, names: list[str], origin: Kept, step: int) -> None:
        if step == self.reset_to_step:
            share_statistics(module)  # of several processes each has its own until an epoch ends
            _remember(module, names, origin)


def _remember(module: TracedModule, names: list[str], origin: Kept) -> None:
    state = state_of(module)
    origin["values"] = {name: state[name].detach().clone() for name in names}


def _mask_and_reset(inner: Pass, module: TracedModule, context: Context, origin: Kept) -> None:
    prune(inner, module, context)
    values: dict[str, Tensor] = origin["values"]
    with torch.no_grad():
        for name, tensor in state_of(module).items():
            if name in values:
                tensor.copy_(values[name])
