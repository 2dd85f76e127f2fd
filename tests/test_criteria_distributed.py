"""Two gloo processes that each read half of every batch choose as one process does that reads all of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from criterion_worker import PRUNERS, results

PROCESSES = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("criteria")
    worker = Path(__file__).with_name("criterion_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(worker.parents[1])}
    running = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), str(rank), str(PROCESSES)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def test_scores_and_means_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    alone = results(0, 1)
    half = results(0, 2)  # without the other process
    assert len(alone) == len(PRUNERS) + 1
    for name, expected in alone.items():
        for process in found:
            mine = {key: t for key, t in process[name].items() if "running" not in key}
            torch.testing.assert_close(mine, {key: expected[key] for key in mine}, rtol=1e-9, atol=1e-12)
        assert any(not torch.allclose(half[name][key].double(), t.double()) for key, t in expected.items()), name


def test_statistics_are_the_mean_of_what_the_processes_measured(found: list[dict[str, Any]]) -> None:
    """Each normalises with its own part, so that they are not those of whole batches; all processes agree."""
    first, second = (process["after"] for process in found)
    halves = [results(rank, 2)["after"] for rank in range(2)]
    for name in ("norm0.running_mean", "norm0.running_var"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-9, atol=1e-12)


def test_gradients_need_as_many_batches_in_each_process(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "of TaylorFOPruner in 50% of the processes" in process["uneven"]
