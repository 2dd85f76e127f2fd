"""Running statistics of BatchNorm measured anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fxcompress.calibration import replica
from fxcompress.context import Context
from fxcompress.errors import PassError
from fxcompress.module import TracedModule
from fxcompress.pipeline import Pass
from fxcompress.processes import averaged
from fxcompress.rewrite import rewriting
from fxcompress.task import Need, require_count


@dataclass(frozen=True)
class RecalibrateBatchNorm(Pass):
    """Measures the running statistics of every BatchNorm again: pruning in front of it has changed what enters.

    Each BatchNorm normalises with the batch's statistics, as in train mode, all else runs as in eval mode, and the
    running statistics become the plain mean of the batches' means and of their unbiased variances, as PyTorch computes
    them with ``momentum=None`` after ``reset_running_stats()``. Those of masked channels and ``num_batches_tracked``
    stay. With several processes each measures its own part of every batch, and the statistics are averaged.

    Wu & Johnson 2021, "Rethinking Batch in BatchNorm", arXiv 2105.07576, section 3 (precise BatchNorm); for pruned
    networks Li et al. 2020, "EagleEye", arXiv 2007.02491, section 3.4.

    Args:
        batches: how many of the task's batches are taken; all by default.

    Needs the task's batches. Changes nothing but the statistics.
    """

    batches: int | None = None

    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.batches is not None:
            require_count("batches", self.batches)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Batches to measure."""
        return ("batches",)

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Measure, and write the statistics."""
        task = context.required_task(self.needs, self.name)
        with replica(module, task, self.name) as trial:
            measuring = _Measuring(dict(trial.named_buffers()))
            with measuring:
                for batch in task.read(self.batches):
                    task.feed(trial, batch)
            found = {name: averaged(tensor.clone()) for name, tensor in measuring.measured()}
        if not found:
            context.notes.append("there is no BatchNorm with running statistics")
        dead = module.meta.get("dead", {})
        with rewriting(module, self.name) as rewriter:
            for name, value in found.items():
                if not bool(torch.isfinite(value).all()):
                    raise PassError(
                        f"{name} would hold NaN or infinite values; expected finite activations. Look at "
                        "the task's batches, or at the weights."
                    )
                old = module.get_buffer(name)
                masked = torch.from_numpy(dead.get((name, 0))).to(old.device) if (name, 0) in dead else None
                value = value.to(old.device)
                new = value if masked is None else torch.where(masked, old, value)
                if not torch.equal(new, old):
                    with torch.no_grad():
                        old.copy_(new)
                    rewriter.edits += 1
        return module


_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class _Measuring(TorchFunctionMode):
    """Has every batch normalisation with these running statistics measure its input, whoever calls it."""

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in buffers.items()}
        self.buffers = buffers
        self.calls: dict[int, int] = {}
        self.touched: list[Tensor] = []

    def measured(self) -> list[tuple[str, Tensor]]:
        """The buffers that were measured, by name."""
        return [(self.names[id(tensor)], tensor) for tensor in self.touched]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        mean, variance = named["running_mean"], named["running_var"]
        if id(mean) not in self.names or id(variance) not in self.names:  # of another model: a teacher's, say
            return func(*args, **kwargs)
        calls = self.calls[id(mean)] = self.calls.get(id(mean), 0) + 1
        if calls == 1:
            mean.zero_()
            variance.fill_(1)
            self.touched += [mean, variance]
        return func(**named | {"training": True, "momentum": 1 / calls})
