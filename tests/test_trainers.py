"""Trainers of other libraries in the place of the built-in loop: the same weights, the same hooks."""

import copy
import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import model_zoo  # noqa: F401  torchvision, which both libraries import, is importable after it
import pytest
import torch
from test_training import Batch, X, data, loss, network, network_of, sgd, task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

import fxcompress
from fxcompress import Context, Distill, InputError, LightningTask, Task, TracedModule, TrainingError, TransformersTask
from fxcompress.passes import FineTune, L1FilterPruner, LevelPruner, MovementPruner, Speedup

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries' own imports
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # lightning's own use of torch
]


def lightning_trainer(**options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", devices=1, **quiet, **options)


def lightning_task(**options: Any) -> LightningTask:
    return LightningTask(**{"batches": data(), "loss": loss, "optimizer": sgd, "trainer": lightning_trainer, **options})


def transformers_trainer(model: nn.Module, **options: Any) -> Any:
    arguments = TrainingArguments(
        "unused", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options},
    )  # fmt: skip
    return Trainer(model, arguments)


def transformers_task(**options: Any) -> TransformersTask:
    return TransformersTask(
        **{"batches": data(), "loss": loss, "optimizer": sgd, "trainer": transformers_trainer, **options}
    )


TASKS: dict[str, Callable[..., Task]] = {"lightning": lightning_task, "transformers": transformers_task}
both = pytest.mark.parametrize("adapted", TASKS.values(), ids=list(TASKS))


@both
def test_it_trains_as_the_built_in_loop_does_and_masks_stay(adapted: Callable[..., Task]) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    passes = [L1FilterPruner(0.4), FineTune(3)]
    options = {"score": lambda m: float(m.get_parameter("head.weight").sum())}
    expected = fxcompress.compress(model, passes, example_inputs=X, verify=False, task=task(**options))
    trained = fxcompress.compress(model, passes, example_inputs=X, verify=False, task=adapted(**options))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert trained.meta["history"][-1].notes == expected.meta["history"][-1].notes
    assert all(torch.equal(mask, fxcompress.masks(expected)[name]) for name, mask in fxcompress.masks(trained).items())
    assert trained.training
    assert model.training
    assert all(p.grad is None for p in trained.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    removed = fxcompress.compress(trained.eval(), [Speedup()], example_inputs=X)
    assert removed.get_parameter("first.weight").shape[0] == 7 - int(7 * 0.4)


@dataclass(frozen=True)
class Pull(fxcompress.Pass):
    """Trains with a penalty on a weight and a hook that holds a bias at zero; its notes are the steps."""

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        weight, bias, counts = module.get_parameter("first.weight"), module.get_parameter("first.bias"), []

        def after_step(step: int) -> None:
            assert not torch.is_grad_enabled()
            counts.append(step)
            bias.zero_()

        epochs = context.train(
            module, epochs=2, penalty=lambda: 100 * weight.square().sum(), after_step=after_step, title="pulling"
        )
        assert epochs[1].penalty < epochs[0].penalty
        assert sum(epoch.steps for epoch in epochs) == len(counts)
        context.notes.append(repr(counts))
        return module


@both
def test_the_penalty_and_the_hook_reach_into_training(adapted: Callable[..., Task]) -> None:
    model = network()
    chosen = adapted(optimizer=partial(torch.optim.SGD, lr=1e-3))
    pulled = fxcompress.compress(model, [Pull()], example_inputs=X, task=chosen)
    assert pulled.get_parameter("first.weight").norm() < 0.5 * model.get_parameter("first.weight").norm()
    assert not pulled.get_parameter("first.bias").any()
    assert pulled.meta["history"][-1].notes[1] == repr(list(range(1, 11)))


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: lightning_task(trainer=partial(lightning_trainer, accumulate_grad_batches=5)),
        lambda: transformers_task(trainer=partial(transformers_trainer, gradient_accumulation_steps=5)),
    ],
    ids=list(TASKS),
)
def test_accumulated_gradients_are_one_step_and_one_penalty(chosen: Callable[[], Task]) -> None:
    """One step on the mean of five batches: the penalty counts once."""
    model = network_of(0)
    rate = partial(torch.optim.SGD, lr=1e-3)
    task = chosen()
    object.__setattr__(task, "optimizer", rate)
    pulled = fxcompress.compress(model, [Pull()], example_inputs=X, task=task)
    assert pulled.meta["history"][-1].notes[1] == "[1, 2]"
    model.train()
    for _ in range(2):
        model.zero_grad()
        for batch in data():
            (loss(model, batch) / 5).backward()
        (100 * model.get_parameter("first.weight").square().sum()).backward()
        rate(model.parameters()).step()
        model.get_parameter("first.bias").data.zero_()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(pulled.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: lightning_task(trainer=partial(lightning_trainer, accumulate_grad_batches=3)),
        lambda: transformers_task(trainer=partial(transformers_trainer, gradient_accumulation_steps=3)),
    ],
    ids=list(TASKS),
)
@pytest.mark.parametrize("taught", [False, True], ids=["alone", "with a teacher"])
def test_a_curve_over_steps_reaches_its_end_where_gradients_accumulate(
    chosen: Callable[[], Task], taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches an epoch, three a step: two steps an epoch, the second on two batches."""
    asked: list[tuple[int, int]] = []
    curve = MovementPruner.sparsity_at

    def noted(self: MovementPruner, step: int, steps: int, final: float) -> float:
        asked.append((step, steps))
        return curve(self, step, steps, final)

    monkeypatch.setattr(MovementPruner, "sparsity_at", noted)
    task = Distill(chosen()) if taught else chosen()
    pruned = fxcompress.compress(network(), [MovementPruner(0.5, epochs=3)], example_inputs=X, task=task)
    assert sorted(set(asked)) == [(step, 6) for step in range(1, 7)]
    at_once = fxcompress.compress(network(), [LevelPruner(0.5)], example_inputs=X)
    assert fxcompress.sparsity(pruned).total == fxcompress.sparsity(at_once).total


@both
def test_a_teacher_teaches_in_any_trainer(adapted: Callable[..., Task]) -> None:
    model = network()
    passes = [L1FilterPruner(0.4), FineTune(2)]
    found = [
        fxcompress.compress(model, passes, example_inputs=X, task=Distill(each(), layers=("first", "norm")))
        for each in (task, adapted)
    ]
    assert not torch.equal(found[0].get_parameter("head.weight"), model.get_parameter("head.weight"))
    for name, tensor in found[0].state_dict().items():
        torch.testing.assert_close(found[1].state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


@both
def test_a_loss_that_is_no_number_stops_at_its_step(adapted: Callable[..., Task]) -> None:
    calls: list[int] = []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 8 else 1.0)

    with pytest.raises(TrainingError, match=r"nan at epoch 2, step 3 of fine-tuning"):
        fxcompress.compress(network(), [FineTune(4)], example_inputs=X, task=adapted(loss=failing))


@both
def test_an_interrupted_run_repeats_the_training_under_way(adapted: Callable[..., Task], tmp_path: Path) -> None:
    def run(objective: Any, file: Path | None) -> TracedModule:
        return fxcompress.compress(
            network_of(0), [L1FilterPruner(0.3), FineTune(1), L1FilterPruner(0.5), FineTune(1)], example_inputs=X,
            task=adapted(loss=objective), checkpoint=file,
        )  # fmt: skip

    calls: list[int] = []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 8 else 1.0)

    whole = run(loss, None).state_dict()
    with pytest.raises(TrainingError):
        run(failing, tmp_path / "run.pt")
    resumed = run(failing, tmp_path / "run.pt").state_dict()
    assert len(calls) == 13
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@both
def test_batches_of_unknown_number_and_a_seed(adapted: Callable[..., Task]) -> None:
    def noisy(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])

    def run(seed: int) -> Tensor:
        chosen = adapted(batches=lambda: iter(data()), loss=noisy)
        return fxcompress.compress(
            network_of(0), [FineTune(2)], example_inputs=X, task=chosen, seed=seed
        ).get_parameter("head.weight")

    first = run(1)
    torch.randn(3)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


@both
def test_nothing_keeps_what_was_trained(adapted: Callable[..., Task]) -> None:
    chosen = adapted()
    trained = fxcompress.compress(network(), [FineTune(1)], example_inputs=X, task=chosen)
    gc.disable()
    try:
        seen = weakref.ref(trained)
        del trained
        assert seen() is None
    finally:
        gc.enable()


# ---- what only one of them has -------------------------------------------------------------------------------------


class Whole(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """As users of Lightning write it: the network is one of its attributes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(4))
        self.seen: list[Any] = []

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        out = self.net(batch[0]) * self.scale
        self.log("out", out.mean(), on_epoch=True)
        return {"loss": F.cross_entropy(out, batch[1]), "index": batch_idx}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["index"] == batch_idx
        assert "out" in self.trainer.callback_metrics

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("distilled", [False, True])
def test_a_lightning_module_trains_itself(distilled: bool) -> None:
    whole = Whole(network_of(0))
    before = copy.deepcopy(whole.state_dict())
    chosen: Task = LightningTask(batches=data(), module=whole, network="net", trainer=lightning_trainer)
    if distilled:
        chosen = Distill(chosen, layers="first")
    passes = [L1FilterPruner(0.4), FineTune(2)]
    trained = fxcompress.compress(whole.net, passes, example_inputs=X, task=chosen)

    scales = [nn.Parameter(torch.ones(4))]

    def scaled(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]) * scales[0], batch[1])

    twin: Task = task(
        loss=scaled,
        optimizer=lambda p: sgd([*p, *scales]),
        schedule=lambda optimizer: ExponentialLR(optimizer, 0.5),
    )
    if distilled:
        twin = Distill(twin, layers="first")
    expected = fxcompress.compress(network_of(0), passes, example_inputs=X, task=twin)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(scales[0], torch.ones(4))
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in before.items())
    if not distilled:  # outside of a run there is no teacher
        assert chosen.loss is not None
        own = float(chosen.loss(whole.net, data()[0]).detach())  # passes that look at gradients need no Trainer
        assert own > 0


def test_a_model_of_transformers_with_its_own_loss_and_optimizer() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30,
        max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 50, (4, 8, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": each, "labels": each[:, 0] % 3} for each in ids]
    chosen = TransformersTask(batches=batches, trainer=partial(transformers_trainer, learning_rate=5e-3), epochs=8)
    passes = [L1FilterPruner(0.5, include="*.intermediate"), FineTune(), Speedup()]
    small = fxcompress.compress(model.eval(), passes, example_inputs=batches[0], task=chosen)
    assert small.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").shape == (15, 24)
    (note,) = small.meta["history"][1].notes
    first, last = (float(word) for word in note.partition("loss ")[2].split(" -> "))
    assert last < 0.6 * first


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapted, options, message",
    [
        (lightning_task, {"clip": 1.0}, r"clip is 1\.0; expected it to be left.*gradient_clip_val"),
        (lightning_task, {"patience": 2}, "EarlyStopping"),
        (lightning_task, {"device": "cpu"}, "accelerator="),
        (lightning_task, {"precision": torch.bfloat16}, "precision="),
        (lightning_task, {"trainer": None}, "trainer is a NoneType"),
        (lightning_task, {"module": nn.Linear(1, 1)}, r"expected a lightning\.LightningModule"),
        (lightning_task, {"module": Whole(nn.Linear(1, 1))}, "nothing called 'model'.*one of net"),
        (transformers_task, {"clip": 1.0}, "max_grad_norm"),
        (transformers_task, {"schedule": lambda o: ExponentialLR(o, 0.5)}, "lr_scheduler_type"),
        (transformers_task, {"trainer": 3}, "trainer is a int"),
    ],
)
def test_a_task_that_cannot_be(adapted: Callable[..., Task], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapted(**options)


@both
def test_a_trainer_that_is_none(adapted: Callable[..., Task]) -> None:
    with pytest.raises(InputError, match="gave a NoneType"):
        fxcompress.compress(network(), [FineTune()], example_inputs=X, task=adapted(trainer=lambda *_, **__: None))
    with pytest.raises(InputError, match="batches is missing"):
        fxcompress.compress(network(), [FineTune()], example_inputs=X, task=adapted(batches=None))


def test_what_own_losses_need() -> None:
    with pytest.raises(InputError, match="batch is a tuple"):
        transformers_task(loss=None).objective(network(), data()[0])
    with pytest.raises(InputError, match="returned no loss"):
        transformers_task(loss=None).objective(nn.Linear(2, 2), {"input": torch.randn(1, 2)})


@pytest.mark.parametrize(
    "adapted, library, extra",
    [
        (lightning_task, "lightning", "lightning"),
        (transformers_task, "accelerate", "transformers"),
    ],
)
def test_the_extra_is_named(
    adapted: Callable[..., Task], library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'fxcompress\[{extra}\]'"):
        adapted()
