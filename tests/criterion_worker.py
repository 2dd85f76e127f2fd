"""One of several processes that look at their part of every batch; started by test_criteria_distributed.py.

    python criterion_worker.py <folder> <rank> <processes>

Writes ``<folder>/result-<rank>.pt``: what :func:`results` gives.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from criterion_cases import case
from torch import distributed, nn

import fxcompress
from fxcompress import Task
from fxcompress.errors import InputError
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.passes import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ChannelPruner,
    CompensateBias,
    L1FilterPruner,
    RecalibrateBatchNorm,
    TaylorFOPruner,
)
from fxcompress.passes.scoring import Criterion

PRUNERS: tuple[ChannelPruner, ...] = (
    TaylorFOPruner(0.4),
    TaylorFOPruner(0.4, per="element"),
    ActivationAPoZRankFilterPruner(0.4),
    ActivationMeanRankFilterPruner(0.4),
)


def scores(pruner: ChannelPruner, model: nn.Module, x: torch.Tensor, task: Task) -> dict[str, torch.Tensor]:
    """What the criterion gave each layer, batches combined."""
    context = fxcompress.Context(inputs=Inputs.parse(x), task=task)
    module = fxcompress.trace(model, x)
    groups = context.groups(module)
    slices = [item for group in groups for item in group.slices]
    criterion = Criterion(pruner.name, pruner.score, pruner.reads, None)
    found = criterion.scores(slices, module, Masking(), groups, context)
    return {item.parameter: torch.from_numpy(values) for item, values in zip(slices, found, strict=True)}


def results(rank: int, processes: int) -> dict[str, Any]:
    model, x, whole = case("cnn", torch.float64)
    batches = [(x.chunk(processes)[rank], y.chunk(processes)[rank]) for x, y in whole.read()]
    task = Task(batches=batches, loss=whole.loss)
    made: dict[str, Any] = {}
    for number, pruner in enumerate(PRUNERS):
        made[f"{number} {pruner.name}"] = scores(pruner, model, x, task)
    passes = [L1FilterPruner(0.4), CompensateBias(), RecalibrateBatchNorm()]
    after = fxcompress.compress(model, passes, example_inputs=x, task=task)
    made["after"] = dict(after.state_dict())
    if processes > 1:
        made["uneven"] = refused(model, x, Task(batches=batches[: len(batches) - rank], loss=whole.loss))
    return made


def refused(model: nn.Module, x: torch.Tensor, task: Task) -> str:
    """The message where one process has fewer batches than another, if they have met."""
    if not distributed.is_initialized():
        return ""
    try:
        fxcompress.compress(model, [TaylorFOPruner(0.4)], example_inputs=x, task=task)
    except InputError as error:
        return str(error)
    return "accepted"


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    place = (folder / "store").as_uri()
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    try:
        torch.save(results(rank, processes), folder / f"result-{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
