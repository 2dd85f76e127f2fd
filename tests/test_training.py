"""Tasks and the built-in training loop, masks included; runs that are killed and go on."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fxcompress
from fxcompress import Context, InputError, Task, TracedModule, TrainingError
from fxcompress.fingerprint import fingerprint
from fxcompress.passes import FineTune, L1FilterPruner, LevelPruner, Speedup
from fxcompress.training import Training, _shown

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    return Net(
        lambda net, x: net.head(F.relu(net.norm(net.second(F.relu(net.first(x))))).mean((2, 3))),
        first=nn.Conv2d(1, 7, 3, padding=1),
        second=nn.Conv2d(7, 9, 3),
        norm=nn.BatchNorm2d(9),
        head=nn.Linear(9, 4),
    )


X = torch.randn(2, 1, 6, 6)


def data(count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 8, 1, 6, 6, generator=generator)
    return [(x, (x.mean((1, 2, 3)) > 0).long()) for x in images]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def task(**options: Any) -> Task:
    return Task(**{"batches": data(), "loss": loss, "optimizer": sgd, **options})


def test_the_loop_does_what_one_writes_by_hand() -> None:
    model = network()
    options = {"clip": 0.5, "schedule": lambda optimizer: ExponentialLR(optimizer, 0.5)}
    trained = fxcompress.compress(model, [FineTune(3)], example_inputs=X, task=task(**options))
    model.train()
    optimizer = sgd(model.parameters())
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5**epoch
        for batch in data():
            optimizer.zero_grad()
            loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert not trained.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "optimizer",
    [sgd, lambda p: torch.optim.Adam(p, weight_decay=0.1), lambda p: torch.optim.AdamW(p, weight_decay=0.1)],
    ids=["sgd", "adam", "adamw"],
)
def test_what_is_masked_stays_zero_and_what_is_not_learns(optimizer: Any) -> None:
    masked = fxcompress.compress(network(), [L1FilterPruner(0.4), LevelPruner(0.3)], example_inputs=X)
    keep = fxcompress.masks(masked)
    trained = fxcompress.compress(masked, [FineTune(2)], example_inputs=X, task=task(optimizer=optimizer))
    assert all(torch.equal(mask, keep[name]) for name, mask in fxcompress.masks(trained).items())
    removed = fxcompress.compress(trained, [Speedup()], example_inputs=X)
    assert removed.get_parameter("first.weight").shape[0] == 7 - int(7 * 0.4)
    assert not torch.equal(trained.get_parameter("head.weight"), masked.get_parameter("head.weight"))


def test_the_penalty_and_the_hook_reach_into_training() -> None:
    @dataclass(frozen=True)
    class Pull(fxcompress.Pass):
        def run(self, module: TracedModule, context: Context) -> TracedModule:
            weight, counts = module.get_parameter("first.weight"), []
            bias = module.get_parameter("first.bias")
            epochs = context.train(
                module, epochs=2, penalty=lambda: 100 * weight.square().sum(),
                after_step=lambda step: (counts.append(step), bias.zero_())[0],
            )  # fmt: skip
            assert counts == list(range(1, 11))
            assert epochs[1].penalty < epochs[0].penalty
            return module

    small = lambda p: torch.optim.SGD(p, lr=1e-3)  # noqa: E731
    model = network()
    pulled = fxcompress.compress(model, [Pull()], example_inputs=X, task=task(optimizer=small))
    assert pulled.get_parameter("first.weight").norm() < 0.5 * model.get_parameter("first.weight").norm()
    assert not pulled.get_parameter("first.bias").any()


def test_patience_goes_back_to_the_best_epoch() -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    seen = []

    def score(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model.get_parameter("head.weight").clone())
        return next(scores)

    trained = fxcompress.compress(network(), [FineTune(9)], example_inputs=X, task=task(score=score, patience=2))
    assert len(seen) == 4
    assert torch.equal(trained.get_parameter("head.weight"), seen[1])


def test_mixed_precision_runs_the_forward_in_it() -> None:
    seen = set()

    def observed(model: nn.Module, batch: Batch) -> Tensor:
        out = model(batch[0])
        seen.add(out.dtype)
        return F.cross_entropy(out.float(), batch[1])

    trained = fxcompress.compress(
        network(), [FineTune()], example_inputs=X, task=task(loss=observed, precision=torch.bfloat16)
    )
    assert seen == {torch.bfloat16}
    assert trained.get_parameter("head.weight").dtype == torch.float32


def test_a_schedule_that_waits_for_a_plateau_is_given_the_score() -> None:
    scores, made = iter([0.1, 0.2, 0.15, 0.3]), []

    def schedule(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
        made.append(optimizer)
        return ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)

    given = task(score=lambda model: next(scores), schedule=schedule)
    fxcompress.compress(network(), [FineTune(4)], example_inputs=X, task=given)
    assert made[0].param_groups[0]["lr"] == 0.05 * 0.5


def test_time_left_is_known_in_the_first_epoch_and_after_an_interruption() -> None:
    training = Training(epochs=4, console=Console(file=io.StringIO(), force_terminal=True), title="tuning")
    with _shown(training, 5) as bar:
        for step in (1, 2):
            bar.advance(0, step, 0.25)
        assert bar.progress.tasks[0].completed == pytest.approx(0.4)
        assert bar.progress.tasks[0].time_remaining is not None
        assert bar.progress.tasks[0].description == "tuning: loss 0.25"
    with _shown(training, None) as bar:
        bar.begin(3)
        assert bar.progress.tasks[0].speed is None  # three epochs in no time are no pace
        bar.end(3, 5)
        assert bar.progress.tasks[0].completed == 4


def shuffled() -> DataLoader[Any]:
    pairs = data()
    images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return DataLoader(
        TensorDataset(images, labels), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(99)
    )


@pytest.mark.parametrize("kind", ["callable", "loader", "sampler"])
def test_the_seed_decides(kind: str) -> None:
    batches: Any = shuffled if kind == "callable" else shuffled()
    if kind == "sampler":  # its generator is nobody's but its own
        sampler = RandomSampler(batches.dataset, generator=torch.Generator().manual_seed(99))
        batches = DataLoader(batches.dataset, batch_size=8, sampler=sampler)

    def run(seed: int) -> Tensor:
        return fxcompress.compress(
            network_of(0), [FineTune()], example_inputs=X, task=task(batches=batches), seed=seed
        ).get_parameter("head.weight")

    first = run(1)
    torch.randn(3)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def network_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_what_a_pass_needs_is_asked_for_before_any_work() -> None:
    model = network()
    with pytest.raises(InputError, match=r"optimizer is missing, which FineTune needs.*lambda p"):
        fxcompress.compress(
            model, [L1FilterPruner(0.5), FineTune()], example_inputs=X, task=Task(batches=[], loss=loss)
        )
    with pytest.raises(InputError, match=r"batches is missing.*loss is missing.*optimizer is missing"):
        fxcompress.compress(model, [FineTune()], example_inputs=X)


def forever() -> Iterator[Batch]:
    yield from data()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": forever()}, "generator, which can be read only once"),
        ({"batches": 3}, "batches is a int"),
        ({"loss": nn.CrossEntropyLoss()}, r"takes outputs and targets; expected a function of model and batch"),
        ({"loss": "mse"}, r"loss is a str; expected a function loss\(model, batch\)"),
        ({"optimizer": sgd(network().parameters())}, "an optimizer over one model's parameters"),
        ({"epochs": -1}, "epochs is -1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"patience": 0}, "patience is 0"),
        ({"precision": torch.int8}, "precision is torch.int8"),
    ],
)
def test_a_task_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": []}, "gave no batch"),
        ({"loss": lambda model, batch: model(batch[0])}, r"gave shape \(8, 4\); expected a scalar"),
        ({"loss": lambda model, batch: 3.0}, "gave a float"),
        ({"optimizer": lambda p: None}, "gave a NoneType"),
    ],
)
def test_a_task_that_turns_out_not_to_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxcompress.compress(network(), [FineTune()], example_inputs=X, task=task(**options))


def test_a_score_that_is_no_number() -> None:
    with pytest.raises(TrainingError, match="gave nan"):
        fxcompress.compress(network(), [FineTune()], example_inputs=X, task=task(score=lambda model: float("nan")))


# ---- runs that are interrupted -----------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_names_the_step_and_leaves_the_last_good_epoch(tmp_path: Path) -> None:
    path, calls = tmp_path / "run.pt", []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 13 else 1.0)

    def run(objective: Any, file: Path | None) -> TracedModule:
        return fxcompress.compress(
            network_of(0), [FineTune(4)], example_inputs=X, task=task(loss=objective), checkpoint=file
        )

    with pytest.raises(TrainingError, match=r"nan at epoch 3, step 3 of fine-tuning"):
        run(failing, path)
    whole, calls = run(loss, None), []
    resumed = run(failing, path)
    assert len(calls) == 10  # two epochs were there already
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_weights_that_became_nan_at_finite_losses_are_not_stored(tmp_path: Path) -> None:
    calls: list[int] = []

    def rooted(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        value = loss(model, batch)
        return value + ((value - value) ** 2).sqrt() if len(calls) == 10 else value  # the last step of the second epoch

    def run() -> TracedModule:
        return fxcompress.compress(
            network_of(0), [FineTune(2)], example_inputs=X, task=task(loss=rooted), checkpoint=tmp_path / "run.pt"
        )

    with pytest.raises(TrainingError, match=r"weights became NaN or infinite in epoch 2 of fine-tuning"):
        run()
    assert all(bool(p.isfinite().all()) for p in run().parameters())
    assert len(calls) == 15


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fxcompress.compress(network_of(0), [FineTune(1)], example_inputs=X, task=task(), checkpoint=path)
    with pytest.raises(fxcompress.CheckpointError, match="another run"):
        fxcompress.compress(network_of(0), [FineTune(2)], example_inputs=X, task=task(), checkpoint=path)
    with pytest.raises(fxcompress.CheckpointError, match="another run"):
        fxcompress.compress(network_of(1), [FineTune(1)], example_inputs=X, task=task(), checkpoint=path)
    with pytest.raises(fxcompress.CheckpointError, match="another run"):
        fxcompress.compress(network_of(0), [FineTune(1)], example_inputs=X, task=task(clip=1.0), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(fxcompress.CheckpointError, match="cannot be read"):
        fxcompress.compress(network_of(0), [FineTune(1)], example_inputs=X, task=task(), checkpoint=path)
    with pytest.raises(fxcompress.CheckpointError, match="directory does not exist"):
        fxcompress.compress(network_of(0), [FineTune(1)], example_inputs=X, task=task(), checkpoint=tmp_path / "a/b")


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import test_training as t
import fxcompress
from fxcompress.passes import FineTune, L1FilterPruner, Speedup

left = int(sys.argv[2])

def loss(model, batch):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.loss(model, batch)

model = fxcompress.compress(
    t.network_of(0), [L1FilterPruner(0.3), FineTune(2), L1FilterPruner(0.5), FineTune(2), Speedup()], seed=5,
    example_inputs=t.X, task=t.task(batches=t.shuffled, loss=loss), checkpoint=sys.argv[1] or None,
)
torch.save(dict(model.state_dict()), sys.argv[3])
"""


def test_a_run_that_is_killed_goes_on_and_ends_the_same_bit_for_bit(tmp_path: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent))

    def run(checkpoint: str, steps: int, result: str) -> int:
        command = [sys.executable, "-c", program, checkpoint, str(steps), str(tmp_path / result)]
        return subprocess.run(command, env=os.environ, check=False).returncode

    assert run("", 0, "whole.pt") == 0
    path = str(tmp_path / "run.pt")
    for steps in (7, 6, 6):
        assert run(path, steps, "parts.pt") == -signal.SIGKILL
    assert run(path, 0, "parts.pt") == 0
    whole, parts = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "parts.pt")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


def test_a_selector_that_is_a_function_does_not_keep_a_run_from_going_on() -> None:
    prints = []
    for _ in range(2):
        chosen = [L1FilterPruner(0.5, include=lambda name, module: name == "first"), Speedup()]
        prints.append(fingerprint(chosen, network_of(0)))
    assert prints[0] == prints[1]
    other = [L1FilterPruner(0.5, include=lambda name, module: name != "first"), Speedup()]
    assert fingerprint(other, network_of(0)) != prints[0]
    masks = [
        Speedup(masks={"first.weight": torch.ones(7, 1, 3, 3, dtype=torch.bool).index_fill(0, torch.tensor(i), False)})
        for i in (0, 1)
    ]
    assert fingerprint(masks[0]) != fingerprint(masks[1])
