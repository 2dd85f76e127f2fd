"""DistributedDataParallel over two gloo processes: what ``compress`` returns trains as it does in one process."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_cases import FAST, FORMS, LARGE, compressed, images
from torch import Tensor, nn

import fxcompress
from fxcompress import masks
from fxcompress.module import TracedModule
from fxcompress.passes import Speedup

PROCESSES = 2
STEPS = 3
RATE = 0.05

Result = list[dict[str, Any]]


def batches(name: str) -> list[Tensor]:
    return [images(name, 6, seed).double() for seed in range(STEPS)]


def jobs(names: tuple[str, ...]) -> dict[tuple[str, str, bool], TracedModule]:
    """Models in float64 by network, form and mode; in eval mode BatchNorm does not see how the batch was divided."""
    return {
        (name, form, mode): compressed(name, form).double().train(mode)
        for name in names
        for form in FORMS
        for mode in (False, True)
    }


@pytest.fixture(
    scope="module", params=[FAST, pytest.param(LARGE, marks=pytest.mark.long)], ids=["small networks", "real networks"]
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Result]:
    """For every job what each process ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    models = jobs(request.param)
    work = [{"model": model, "batches": batches(key[0]), "lr": RATE} for key, model in models.items()]
    torch.save(work, folder / "jobs.pt")
    worker = Path(__file__).with_name("ddp_worker.py")
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
    found = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(PROCESSES)]
    return {key: [done[index] for done in found] for index, key in enumerate(models)}


def alone(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The same training on whole batches in this process; returns the gradients of the first step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.01)
    gradients: dict[str, Tensor] = {}
    for x in batches(name):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return gradients


def test_gradients_and_weights_are_those_of_one_process(results: dict[Any, Result]) -> None:
    compared = 0
    for (name, form, mode), ranks in results.items():
        model = compressed(name, form).double().train(mode)
        if mode and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            continue  # each process normalises with its own half
        gradients = alone(model, name)
        assert len(gradients) == sum(1 for _ in model.parameters())
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"], gradients, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(rank["model"].state_dict(), model.state_dict(), rtol=1e-9, atol=1e-12)
        compared += 1
    assert compared >= len(results) // 2


def test_processes_agree_and_masks_stay(results: dict[Any, Result]) -> None:
    for (name, form, mode), (first, second) in results.items():
        before = compressed(name, form).double().train(mode)
        one, other = dict(first["model"].named_parameters()), dict(second["model"].named_parameters())
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert any(not torch.equal(one[key], p) for key, p in before.named_parameters())
        for rank in (first, second):
            found = masks(rank["model"])
            assert found.keys() == masks(before).keys()
            assert bool(found) == (form == "masked")
            assert all(torch.equal(found[key], mask) for key, mask in masks(before).items())
            for key, mask in found.items():
                assert not rank["gradients"][key][~mask].any(), f"{name}: masked elements of {key} have a gradient"


def test_what_two_processes_trained_is_removed(results: dict[Any, Result]) -> None:
    """Momentum and decay may leave anything behind a mask; removal of it changes nothing."""
    for (name, form, _), (first, _) in results.items():
        if form == "removed":
            continue
        model, x = copy.deepcopy(first["model"]).eval(), batches(name)[0]
        removed = fxcompress.compress(model, [Speedup()], example_inputs=x)
        assert not masks(removed)
        with torch.no_grad():
            torch.testing.assert_close(removed(x), model(x), rtol=1e-9, atol=1e-9)
