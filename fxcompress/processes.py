"""One of several processes that train the same model (``torch.distributed``), or the only one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def together() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def first() -> bool:
    """Whether this is the process that writes files."""
    return not together() or distributed.get_rank() == 0


def averaging(model: nn.Module) -> Callable[..., Any]:
    """The model as one of several processes trains it: gradients are averaged; alone, the model itself."""
    return DistributedDataParallel(model) if together() else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without what :func:`averaging` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def mean(values: list[float], device: torch.device) -> list[float]:
    """Each value's mean over the processes, the same in all of them; ``device`` is one that they can send from."""
    if not together():
        return values
    held = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(held)
    found: list[float] = (held / distributed.get_world_size()).tolist()
    return found


def widest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest values of all processes, each of which has seen its part of a batch."""
    if not together():
        return low, high
    ends = torch.stack((-low, high))
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return -ends[0], ends[1]


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if not together():
        return values
    summed = values.clone()
    distributed.all_reduce(summed)
    return summed


def share_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of the first: each has seen other batches."""
    if not together():
        return
    buffers: list[Tensor] = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        distributed.broadcast(buffer, 0)
