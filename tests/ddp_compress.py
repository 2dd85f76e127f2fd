"""One of several processes that prune and train together; started by test_ddp_compress.py.

    python ddp_compress.py <folder> <rank> <processes>

Reads ``<folder>/jobs.pt``: a model, its example input, batches of which every process takes its part, and passes.
Writes ``<folder>/result-<rank>.pt``: for each pass the state of the module that came out.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Pass, Task


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01)


def compressed(item: Pass, model: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    task = Task(batches=batches, loss=loss, optimizer=adam)
    module = fxcompress.compress(model, [item], example_inputs=x, task=task)
    return dict(module.state_dict())


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=processes
    )  # fmt: skip
    try:
        model, x, batches, passes = torch.load(folder / "jobs.pt", weights_only=False)
        mine = [(a.chunk(processes)[rank], b.chunk(processes)[rank]) for a, b in batches]
        torch.save([compressed(item, model, x, mine) for item in passes], folder / f"result-{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
