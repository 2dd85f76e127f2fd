"""One of several processes that train the same pickled models with DistributedDataParallel; started by test_ddp.py.

    python ddp_worker.py <folder> <rank> <processes>

Reads ``<folder>/jobs.pt``: for each job a model, batches of which every process takes its part, and a learning rate.
Writes ``<folder>/result-<rank>.pt``: for each job the gradients of the first step, and the model afterwards.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def train(job: dict[str, Any], rank: int, processes: int) -> dict[str, Any]:
    model = job["model"]
    replica = DistributedDataParallel(model)  # find_unused_parameters=False: each parameter must have a gradient
    optimizer = torch.optim.SGD(replica.parameters(), lr=job["lr"], momentum=0.9, weight_decay=0.01)
    gradients = {}
    for x in job["batches"]:
        optimizer.zero_grad()
        replica(x.chunk(processes)[rank]).square().mean().backward()
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters()}
        optimizer.step()
    return {"gradients": gradients, "model": model}


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    place = (folder / "store").as_uri()
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
    try:
        jobs = torch.load(folder / "jobs.pt", weights_only=False)
        torch.save([train(job, rank, processes) for job in jobs], folder / f"result-{rank}.pt")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
