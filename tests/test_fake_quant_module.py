"""A module with fake-quant nodes is an ordinary one: compiled, exported, copied, pickled, resumed."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.passes import L1FilterPruner, LSQQuantizer, QATQuantizer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 64, 5)
    )
    randomize(model, 1)
    return model.eval()


quantizers = pytest.mark.parametrize("item", [QATQuantizer(), LSQQuantizer(4, 4)], ids=lambda item: item.name)


def step(model: Any) -> dict[str, Tensor]:
    """State and gradients after one forward and backward in train mode."""
    model.train()
    model(X).square().mean().backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in (model.state_dict() | gradients).items()}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of its own doing
@quantizers
def test_compiled_trains_as_it_does_itself(item: fxcompress.Pass) -> None:
    made = fxcompress.compress(network(), [item], example_inputs=X)
    twin = copy.deepcopy(made)
    expected = step(twin)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in step(compiled).items()}
    torch.testing.assert_close(found, expected)


@quantizers
def test_exported_computes_the_same(item: fxcompress.Pass) -> None:
    made = fxcompress.compress(network(), [item], example_inputs=X).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(made, (X,), dynamic_shapes=({0: batch},)).module()
    for x in (X, torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(2))):
        torch.testing.assert_close(exported(x), made(x))


@quantizers
def test_copies_and_pickles_train_on_alike(item: fxcompress.Pass) -> None:
    made = fxcompress.compress(network(), [item], example_inputs=X)
    step(made)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        for tensor in twin.parameters():
            tensor.grad = None
        original = copy.deepcopy(made)
        for tensor in original.parameters():
            tensor.grad = None
        assert all(map(torch.equal, step(twin).values(), step(original).values()))


class Concatenation(nn.Module):
    """Two values that share a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x), self.two(x) * 5], 1))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of its own doing
def test_a_shared_range_compiles() -> None:
    torch.manual_seed(0)
    made = fxcompress.compress(Concatenation().eval(), [QATQuantizer(momentum=0.5)], example_inputs=X)
    twin = copy.deepcopy(made)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        expected = step(twin)
        found = {name.removeprefix("_orig_mod."): tensor for name, tensor in step(compiled).items()}
        torch.testing.assert_close(found, expected)


class Killed(Exception):  # noqa: N818 - it is no error
    pass


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    passes = [L1FilterPruner(0.3), QATQuantizer(epochs=2)]
    calls = 0

    def run(fails_at: int, checkpoint: Path | None) -> fxcompress.TracedModule:
        nonlocal calls
        calls = 0

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise Killed
            return F.mse_loss(model(batch[0]), batch[1])

        batches = [(X * scale, torch.ones(4, 5) * scale) for scale in (0.5, 1.0, 2.0)]
        task = fxcompress.Task(batches=batches, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        return fxcompress.compress(network(), passes, example_inputs=X, task=task, checkpoint=checkpoint)

    whole = run(0, None)
    with pytest.raises((Killed, fxcompress.FxCompressError)):
        run(5, tmp_path / "run.pt")  # in the second epoch
    gone_on = run(0, tmp_path / "run.pt")
    assert calls == 3
    for key, tensor in whole.state_dict().items():
        assert torch.equal(gone_on.state_dict()[key], tensor), key
