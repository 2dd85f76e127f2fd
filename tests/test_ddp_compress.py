"""Pruning with training by two gloo processes, each with its half of every batch, ends as it does in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_compress import compressed
from nets import scatter
from torch import Tensor, nn

from fxcompress import Pass
from fxcompress.passes import (
    ADMMPruner,
    AGPPruner,
    L1FilterPruner,
    LevelPruner,
    LotteryTicketPruner,
    LSQQuantizer,
    MovementPruner,
    PTQQuantizer,
    QATQuantizer,
    SlimPruner,
    TaylorFOPruner,
)

PROCESSES = 2
PASSES: tuple[Pass, ...] = (
    AGPPruner(L1FilterPruner(0.5), iterations=2),
    AGPPruner(TaylorFOPruner(0.5, scope="global"), iterations=2),
    LotteryTicketPruner(LevelPruner(0.6), rounds=2, reset_to_step=2),
    ADMMPruner(0.5, rho=0.1, iterations=2, granularity="channel"),
    SlimPruner(0.4, scale=0.01),
    MovementPruner(0.5, epochs=2),
    MovementPruner(0.5, epochs=2, granularity="channel"),
    QATQuantizer(epochs=2),
    LSQQuantizer(4, 4, epochs=2),
    PTQQuantizer(observer="entropy"),
)


def work() -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    """In float64, with norms that do not see how a batch was divided."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 11), nn.LayerNorm(11), nn.ReLU(), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 3))
    scatter(model)
    batches = [(torch.randn(6, 5).double(), torch.randn(6, 3).double()) for _ in range(3)]
    return model.double(), batches[0][0], batches


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """For each process, for each pass, the state afterwards."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.save((*work(), PASSES), folder / "jobs.pt")
    worker = Path(__file__).with_name("ddp_compress.py")
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[1])}
    running = [
        subprocess.Popen([sys.executable, str(worker), str(folder), str(rank), str(PROCESSES)], env=environment)
        for rank in range(PROCESSES)
    ]
    try:
        assert [process.wait(timeout=300) for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("number", range(len(PASSES)), ids=[f"{i}-{item.name}" for i, item in enumerate(PASSES)])
def test_two_processes_end_as_one_does(number: int, results: list[list[dict[str, Tensor]]]) -> None:
    alone = compressed(PASSES[number], *work())
    assert any(key.startswith(("_masks.", "_quant.")) for key in alone)
    for rank in range(PROCESSES):
        found = results[rank][number]
        assert found.keys() == alone.keys()
        if isinstance(PASSES[number], LSQQuantizer):
            continue  # the gradient of a step is divided by how many values its process has seen: LSQ's equation 5
        for key, tensor in alone.items():
            if tensor.dtype == torch.bool:
                assert torch.equal(found[key], tensor), key
            else:
                torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)
    for key, tensor in results[0][number].items():
        assert torch.equal(results[1][number][key], tensor), key
