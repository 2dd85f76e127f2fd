"""Distillation against what one computes by hand, on masked graphs, removed ones, and in interrupted runs."""

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net
from test_training import Batch, X, data, loss, network, network_of, task
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import Context, Distill, InputError, Task, TracedModule
from fxcompress.passes import FineTune, L1FilterPruner, Speedup


def softmax(logits: Tensor, temperature: float) -> Any:
    scaled = np.exp(logits.detach().double().numpy() / temperature)
    return scaled / scaled.sum(-1, keepdims=True)


def plain(masked: nn.Module, like: nn.Module) -> nn.Module:
    """The caller's own module with the masked module's effective weights; its norms' dead channels are zero too."""
    made, keep = copy.deepcopy(like), fxcompress.masks(masked)
    state = {name: masked.state_dict()[name] * keep.get(name, torch.ones(())) for name in like.state_dict()}
    made.load_state_dict(state)
    for name, module in made.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in keep:
            module.running_mean *= keep[f"{name}.weight"]  # type: ignore[operator]
    return made


def outputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = output.clone()

    hooks = [model.get_submodule(name).register_forward_hook(partial(record, name)) for name in names]
    found[""] = model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_the_loss_is_the_papers() -> None:
    student, teacher, batch = network_of(1), network_of(2), data()[0]
    distilled = Distill(task(), teacher, layers=("first", "norm"), temperature=3.0, weight=0.3, layer_weight=0.7)
    found = float(distilled.objective(student, batch).detach())
    ours, theirs = (outputs_of(model, ["first", "norm"], batch[0]) for model in (student, teacher))
    p, q = softmax(theirs[""], 3.0), softmax(ours[""], 3.0)
    expected = 0.7 * float(loss(student, batch).detach()) + 0.3 * 9 * (p * np.log(p / q)).sum(-1).mean()
    for name in ("first", "norm"):
        expected += 0.7 * float(F.mse_loss(ours[name], theirs[name]).detach())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_layers_of_a_masked_graph_are_those_of_the_masked_function(sparsity: float) -> None:
    dense, batch = network(), data()[0]
    student = fxcompress.compress(dense, [L1FilterPruner(sparsity)], example_inputs=X)
    assert bool(fxcompress.masks(student)) == (sparsity > 0)
    names = ["first", "second", "norm", "head"]
    found = float(Distill(task(), dense, layers=names, weight=0.0).objective(student, batch).detach())
    ours, theirs = (outputs_of(model, names, batch[0]) for model in (plain(student, dense), dense))
    expected = float(loss(student, batch).detach()) + sum(
        float(F.mse_loss(ours[name], theirs[name]).detach()) for name in names
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert (expected > float(loss(student, batch).detach()) + 1e-3) == (sparsity > 0)
    assert "forward" not in vars(student)


def test_a_norm_over_live_channels_and_a_write_in_place() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        return net.out(F.relu(net.norm(F.relu(net.inner(x), inplace=True))))

    dense = Net(step, inner=nn.Linear(5, 12), norm=nn.LayerNorm(12), out=nn.Linear(12, 3))
    x, names = torch.randn(6, 5), ["inner", "norm"]
    student = fxcompress.compress(dense, [L1FilterPruner(0.5)], example_inputs=x)
    removed = fxcompress.compress(student, [Speedup()], example_inputs=x)
    live = fxcompress.masks(student)["inner.bias"]
    distilled = Distill(Task(loss=lambda m, b: m(b).sum() * 0), dense, layers=names, weight=0.0)
    found = distilled.objective(student, x).detach()
    narrow, wide = outputs_of(removed, names, x), outputs_of(dense, names, x)
    for name in names:
        spread = torch.zeros(6, 12)
        spread[:, live] = narrow[name].detach()
        narrow[name] = spread
    before = F.linear(x, dense.inner.weight, dense.inner.bias)  # not what relu made of it in place
    assert bool((before < 0).any())
    expected = sum(float(F.mse_loss(narrow[name], wide[name]).detach()) for name in names)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(wide["inner"], before)


def test_the_student_runs_once_and_the_teacher_stays_as_it_is() -> None:
    dense = network().train()
    state = copy.deepcopy(dense.state_dict())
    calls: list[int] = []

    def once(model: nn.Module, batch: Batch) -> Tensor:
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        try:
            return loss(model, batch)
        finally:
            hook.remove()

    trained = fxcompress.compress(
        dense, [L1FilterPruner(0.4), FineTune(2)], example_inputs=X, verify=False,
        task=Distill(task(loss=once), layers="second", weight=1.0),
    )  # fmt: skip
    assert len(calls) == 10
    assert dense.training
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(p.grad is None and p.requires_grad for p in dense.parameters())
    assert not torch.equal(trained.get_parameter("head.weight"), dense.get_parameter("head.weight"))


def test_the_student_learns_what_the_teacher_says() -> None:
    """Without labels: with weight 1 nothing but the teacher decides."""
    dense, batches = network(), [x for x, _ in data()]

    def gap(model: nn.Module) -> float:
        return float(np.mean([F.mse_loss(model(x), dense(x)).item() for x in batches]))

    masked = fxcompress.compress(dense, [L1FilterPruner(0.4)], example_inputs=X)
    unlabelled = Task(batches=batches, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), epochs=15)
    trained = fxcompress.compress(
        masked, [FineTune()], example_inputs=X, task=Distill(unlabelled, dense, weight=1.0, temperature=2.0)
    )
    assert gap(trained) < 0.3 * gap(masked)


def test_options_of_the_task_within_hold() -> None:
    inner = task(epochs=3, clip=0.5, score=lambda model: 1.0)
    distilled = Distill(inner)
    assert (distilled.epochs, distilled.clip, distilled.score) == (3, 0.5, inner.score)
    assert not distilled.lacking(("batches", "loss", "score", "optimizer"))
    assert Distill(Task(), weight=1).lacking(("batches", "loss", "optimizer")) == ["batches", "optimizer"]
    nested = Distill(Distill(inner, network(), weight=0.5), network(), weight=0.5)
    trained = fxcompress.compress(network(), [FineTune(1)], example_inputs=X, task=nested)
    assert "trained 1 epochs" in trained.meta["history"][-1].notes[0]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 13 else 1.0)

    def run(objective: Any, file: Path | None) -> TracedModule:
        return fxcompress.compress(
            network_of(0), [L1FilterPruner(0.3), FineTune(4), Speedup()], example_inputs=X, checkpoint=file,
            task=Distill(task(loss=objective), layers=("first", "norm")),
        )  # fmt: skip

    whole = run(loss, None).state_dict()
    with pytest.raises(fxcompress.TrainingError, match="epoch 3, step 3"):
        run(failing, tmp_path / "run.pt")
    resumed = run(failing, tmp_path / "run.pt").state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_nothing_keeps_student_and_teacher() -> None:
    gc.collect()
    gc.disable()
    try:
        dense = network()
        distilled = Distill(task(), layers="first")
        trained = fxcompress.compress(dense, [L1FilterPruner(0.3), FineTune(1)], example_inputs=X, task=distilled)
        seen = [weakref.ref(trained), weakref.ref(dense)]
        del trained, dense
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"weight": 1.5}, "weight is 1.5"),
        ({"layer_weight": -1.0}, "layer_weight is -1.0"),
        ({"teacher": 3}, "teacher is a int"),
        ({"layers": [3]}, "layers|include has 3"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distill(task(), **options)
    with pytest.raises(InputError, match=r"expected a fxcompress\.Task"):
        Distill(loss)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no loss and weight is 0\.5"):
        Distill(Task(batches=[]))


def test_a_changed_model_is_no_teacher() -> None:
    masked = fxcompress.compress(network(), [L1FilterPruner(0.4)], example_inputs=X)
    with pytest.raises(InputError, match=r"been through L1FilterPruner.*Distill\(task, teacher=dense\)"):
        fxcompress.compress(masked, [FineTune()], example_inputs=X, task=Distill(task()))
    with pytest.raises(InputError, match="there is no teacher"):
        Distill(task()).objective(network(), data()[0])


def test_a_removed_student_has_other_layers_and_the_same_logits() -> None:
    dense = network()
    removed = fxcompress.compress(dense, [L1FilterPruner(0.4), Speedup()], example_inputs=X)
    with pytest.raises(InputError, match=r"first gives \(8, 5, 6, 6\) in the student and \(8, 7, 6, 6\) in the teach"):
        fxcompress.compress(removed, [FineTune()], example_inputs=X, task=Distill(task(), dense, layers="first"))
    trained = fxcompress.compress(removed, [FineTune()], example_inputs=X, task=Distill(task(), dense))
    assert trained.meta["history"][-1].modified


def test_layers_and_logits_that_do_not_fit() -> None:
    dense, batch = network(), data()[0]
    with pytest.raises(fxcompress.SelectionError, match=r"matches none.*second"):
        Distill(task(), dense, layers="secnd").objective(network(), batch)
    with pytest.raises(InputError, match="the teacher has no layer second"):
        Distill(task(), nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), layers="second").objective(network(), batch)
    with pytest.raises(InputError, match=r"\(8, 4\), the teacher's \(8, 9\)"):
        Distill(task(), nn.Sequential(nn.Flatten(), nn.Linear(36, 9))).objective(network(), batch)
    with pytest.raises(InputError, match="did not call the model"):
        Distill(task(loss=lambda model, batch: torch.zeros(())), dense).objective(network(), batch)
    pair = Net(lambda net, x: (net.a(x), x), a=nn.Linear(3, 2))
    unpaired = Distill(Task(loss=lambda model, x: model(x)[0].sum()), pair)
    with pytest.raises(InputError, match="the model returns a tuple"):
        unpaired.objective(pair, torch.randn(2, 3))
    found = Distill(Task(loss=lambda model, x: model(x)[0].sum() * 0), pair, logits=lambda out: out[0])
    assert float(found.objective(pair, torch.randn(2, 3)).detach()) == pytest.approx(0, abs=1e-6)


def test_a_context_of_its_own_needs_a_teacher() -> None:
    assert Context(task=Distill(task(), network())).required_task(("loss", "optimizer"), "a pass").loss is not None
