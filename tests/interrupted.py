"""Runs that are killed in the middle; each in a process of its own, forked from one that has imported everything.

    python interrupted.py <folder>

Reads ``<folder>/jobs.pt``: for each job the checkpoint, the pass, and after how many losses each attempt is killed.
Every attempt goes on where the one before was killed. Ends with an error if one of them was not.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from test_training import Batch, X, loss, network_of, shuffled, task
from torch import Tensor, nn

import fxcompress
from fxcompress import Pass, TracedModule


def attempt(item: Pass, checkpoint: Path | None, losses: int = 0) -> TracedModule:
    """A run of one pass that kills its process at the given number of losses (0: never)."""
    left = [losses]

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    given = task(loss=counted, batches=shuffled)
    return fxcompress.compress(network_of(0), [item], example_inputs=X, task=given, seed=5, checkpoint=checkpoint)


def kill(folder: Path, jobs: dict[str, tuple[Pass, tuple[int, ...]]]) -> dict[str, Path]:
    """The checkpoints that killed runs leave, by the name of their job."""
    paths = {name: folder / f"{number}.pt" for number, name in enumerate(jobs)}
    torch.save([(paths[name], *job) for name, job in jobs.items()], folder / "jobs.pt")
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    subprocess.run([sys.executable, __file__, str(folder)], env={**os.environ, "PYTHONPATH": path}, check=True)
    return paths


def check_resumed(item: Pass, checkpoint: Path) -> None:
    """The killed run goes on and ends as one that was not killed, bit for bit."""
    assert checkpoint.exists()
    resumed, whole = attempt(item, checkpoint).state_dict(), attempt(item, None).state_dict()
    assert resumed.keys() == whole.keys()
    assert any(key.startswith("_masks.") for key in whole)
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    jobs: list[Any] = torch.load(folder / "jobs.pt", weights_only=False)
    for path, item, kills in jobs:
        for losses in kills:
            child = os.fork()
            if child == 0:
                attempt(item, path, losses)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, item


if __name__ == "__main__":
    main(Path(sys.argv[1]))
