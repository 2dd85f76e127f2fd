"""How long a model takes, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from fxcompress.errors import InputError
from fxcompress.exclusive import exclusive
from fxcompress.undisturbed import checked, run, undisturbed


@dataclass(frozen=True)
class Latency:
    """The measured time of one forward pass.

    Attributes:
        median: seconds for the batch.
        iqr: interquartile range of the measurements, in seconds.
        threads: threads that the operators could use.
        batch: samples in the batch.
        runs: forward passes measured.
        times: seconds of each block of forward passes, divided by their number; median and iqr are of these.
    """

    median: float
    iqr: float
    threads: int
    batch: int
    runs: int
    times: tuple[float, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return (
            f"{self.median * 1e3:.3f} ms (median of {self.runs} runs, IQR {self.iqr * 1e3:.3f} ms), "
            f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        )


@exclusive
def latency(model: nn.Module, example_inputs: Any, *, threads: int | None = None, min_run_time: float = 1.0) -> Latency:
    """Measure the time of a forward pass of `model` in eval mode, without gradients.

    ``torch.utils.benchmark`` does the measuring (``blocked_autorange``), after a warm-up.

    Args:
        model: any module, compiled ones included; left as it was, as by :func:`count`.
        example_inputs: the same as for :func:`count`; the batch is timed as given.
        threads: threads for the operators; as many as torch uses now if None.
        min_run_time: seconds to measure for; slow models are given the time of ten runs.

    Raises:
        InputError: as for :func:`count`, or `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected at least 1, or None for as many as torch uses now")
    inputs = checked(model, example_inputs)
    copies = inputs.map(torch.clone)
    timer = Timer(
        "model(*args, **kwargs)",
        globals={"model": model, "args": copies.args, "kwargs": copies.kwargs},
        num_threads=threads or torch.get_num_threads(),
    )
    with undisturbed(model):
        run(model, inputs)
        once = timer.timeit(1).mean
        measured = timer.blocked_autorange(min_run_time=max(min_run_time, 10 * once))
    runs = measured.number_per_run * len(measured.times)
    return Latency(measured.median, measured.iqr, measured.num_threads, inputs.batch, runs, tuple(measured.times))


def merged(parts: Sequence[Latency]) -> Latency:
    """Several measurements of one model under the same conditions as one."""
    times = tuple(seconds for part in parts for seconds in part.times)
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    return Latency(median, high - low, parts[0].threads, parts[0].batch, sum(part.runs for part in parts), times)
