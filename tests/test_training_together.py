"""The built-in loop in two processes (gloo): masked models, averaged gradients, common decisions; and in float16."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Batch, X, data, loss, network_of, sgd, task
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxcompress
from fxcompress import Distill, InputError, Task, TracedModule
from fxcompress.passes import FineTune, L1FilterPruner
from fxcompress.training import Training

PROCESSES = 2


def parted(rank: int) -> list[Batch]:
    """This process's half of every batch; of unequal numbers of samples halves would weigh differently."""
    return [(x.chunk(PROCESSES)[rank], y.chunk(PROCESSES)[rank]) for x, y in data()]


def float64(batches: list[Batch]) -> list[Batch]:
    return [(x.double(), y) for x, y in batches]


def plain(rank: int, file: str | None) -> TracedModule:
    """Without BatchNorm, whose statistics are each process's own."""
    net = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    torch.manual_seed(4)
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    batches = float64(data() if rank < 0 else parted(rank))
    kinds = set()

    def seen(model: nn.Module, batch: Batch) -> Tensor:
        kinds.add(type(model))
        return loss(model, batch)

    given = Task(batches=batches, loss=seen, optimizer=sgd, clip=0.5)
    made = fxcompress.compress(
        net.double(), [L1FilterPruner(0.4), FineTune(2)], example_inputs=X.double(), checkpoint=file,
        task=Distill(given, layers="2"),
    )  # fmt: skip
    assert rank < 0 or kinds == {DistributedDataParallel}
    return made


def patient(rank: int, file: str | None) -> TracedModule:
    """Each would stop at another epoch by its own score, and its BatchNorms have seen other batches."""
    scores = iter([[0.1, 0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.5, 0.9, 0.1, 0.1]][rank])
    given = task(batches=parted(rank), score=lambda model: next(scores), patience=2)
    return fxcompress.compress(network_of(0), [L1FilterPruner(0.4), FineTune(6)], example_inputs=X, task=given)


def uneven(rank: int, file: str | None) -> TracedModule:
    given = task(batches=parted(rank)[: 3 + rank])
    with pytest.raises(InputError, match=r"ended before step 4 of epoch 1 in 50% of the processes"):
        fxcompress.compress(network_of(0), [FineTune(1)], example_inputs=X, task=given)
    return fxcompress.trace(network_of(0), X)


JOBS = {"plain": plain, "patient": patient, "uneven": uneven}
WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_training_together as t

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
done = {{name: job(rank, folder + "/" + name + ".ckpt") for name, job in t.JOBS.items()}}
torch.save({{name: (m.state_dict(), m.meta["history"]) for name, m in done.items()}}, folder + f"/result-{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("together")
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER.format(tests=str(tests)), str(folder)]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
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
    assert not list(folder.glob(".*.part"))
    return [*found, torch.load(folder / "plain.ckpt", weights_only=False)]


def test_gradients_are_averaged_and_the_loss_is_given_the_wrapper(results: list[Any]) -> None:
    expected = plain(-1, None)
    for result in results[:2]:
        state, history = result["plain"]
        torch.testing.assert_close(state, expected.state_dict(), rtol=1e-9, atol=1e-12)
        assert history[-1].notes == expected.meta["history"][-1].notes
    masks = fxcompress.masks(expected)
    assert masks
    assert all(torch.equal(results[0]["plain"][0][f"_masks.{name}"], mask) for name, mask in masks.items())


def test_what_was_stored_is_the_result(results: list[Any]) -> None:
    stored = results[2].module.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in results[0]["plain"][0].items())


def test_all_stop_together_with_equal_weights_and_statistics(results: list[Any]) -> None:
    (first, history), (second, _) = (result["patient"] for result in results[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    # means of the scores: 0.3, 0.3, 0.45, 0.6, 0.15, 0.1
    assert "trained 6 epochs" in history[-1].notes[0]
    assert "score 0.1" in history[-1].notes[0]


# ---- one process -----------------------------------------------------------------------------------------------------


def test_a_step_that_overflows_in_float16_changes_nothing_and_counts() -> None:
    model = network_of(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps: list[tuple[int, bool]] = []

    def overflowing(module: nn.Module, batch: Batch) -> Tensor:
        return loss(module, batch).float() * (1e8 if len(steps) < 2 else 1.0)  # times the scale of 65536

    def after_step(step: int) -> None:
        steps.append((step, all(torch.equal(p, before[name]) for name, p in model.named_parameters())))

    given = task(loss=overflowing, precision=torch.float16, clip=1.0, epochs=1)
    (epoch,) = given.train(model, Training(epochs=1, after_step=after_step))
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    assert epoch.steps == 5
    assert [same for _, same in steps[:2]] == [True, True]
    assert not steps[4][1]


def test_gradients_are_clipped_by_their_own_size_not_the_scaled_one() -> None:
    def moved(precision: torch.dtype | None) -> float:
        model = network_of(0)
        start = nn.utils.parameters_to_vector(model.parameters()).detach()
        given = task(
            batches=data(1), precision=precision, clip=0.01,
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        )  # fmt: skip
        given.train(model, Training(epochs=1))
        return float((nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm())

    assert moved(None) == pytest.approx(0.01, rel=1e-3)
    assert moved(torch.float16) == pytest.approx(0.01, rel=1e-3)
