"""One of several processes that train the same model (``torch.distributed``), or the only one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fxcompress.errors import InputError


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


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, the same in all of them; changed in place."""
    if together():
        distributed.all_reduce(tensor)
    return tensor


def averaged(tensor: Tensor) -> Tensor:
    """The mean over the processes, the same in all of them; changed in place."""
    return summed(tensor).div_(distributed.get_world_size()) if together() else tensor


def averages(values: list[float], device: torch.device) -> list[float]:
    """Each number's mean over the processes; ``device`` is one that they can send from."""
    if not together():
        return values
    found: list[float] = averaged(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
    return found


def in_step(batches: Iterator[Any], where: str, device: torch.device) -> Iterator[Any]:
    """Batches, as many in every process: one that has none left would leave the others waiting.

    Raises:
        InputError: some of the processes have fewer; says at which step of ``where``.
    """
    for step in itertools.count(1):
        batch = next(batches, _END)
        (having,) = averages([float(batch is not _END)], device)
        if having == 0:
            return
        if having < 1:
            raise InputError(
                f"batches ended before step {step} of {where} in {1 - having:.0%} of the processes; expected as many "
                "in each, such as a DistributedSampler gives."
            )
        yield batch


_END = object()


def widest(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest values of all processes, each of which has seen its part of a batch."""
    if not together():
        return low, high
    ends = torch.stack((-low, high))
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return -ends[0], ends[1]


def share_statistics(model: nn.Module) -> None:
    """Give every process the running statistics of the first: each has seen other batches."""
    if not together():
        return
    buffers: list[Tensor] = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for buffer in buffers:
        distributed.broadcast(buffer, 0)
