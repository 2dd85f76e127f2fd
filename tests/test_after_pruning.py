"""What follows pruning: BatchNorm's statistics measured again, and biases that hold the mean of what went."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from criterion_cases import case, dead_channels
from nets import Net
from scores import choose
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import InputError, PassError, Task, TrainingError
from fxcompress.passes import CompensateBias, L1FilterPruner, LevelPruner, RecalibrateBatchNorm, Speedup

# ---- RecalibrateBatchNorm --------------------------------------------------------------------------------------------


def reset(model: nn.Module) -> None:
    """What PyTorch measures by itself with a cumulative average."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()


@pytest.mark.parametrize("batches", [None, 2])
def test_statistics_are_those_that_pytorch_measures(batches: int | None) -> None:
    model, x, task = case("cnn", torch.float64)
    norm = model.get_submodule("norm1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.eps = 0.3  # not the default
    model.train()
    found = fxcompress.compress(model, [RecalibrateBatchNorm(batches)], example_inputs=x, task=task)
    assert found.training
    reset(model.eval())
    with torch.no_grad():
        for batch, _ in task.read(batches):
            model(batch)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert found.state_dict()[name] == 0
        else:
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_masked_model_and_the_removed_one_measure_the_same() -> None:
    model, x, task = case("cnn", torch.float64)
    pruner = L1FilterPruner(0.4)
    first = fxcompress.compress(model, [pruner, RecalibrateBatchNorm(), Speedup()], example_inputs=x, task=task)
    last = fxcompress.compress(model, [pruner, Speedup(), RecalibrateBatchNorm()], example_inputs=x, task=task)
    assert first.get_buffer("norm1.running_mean").shape == (7,)
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    masked = fxcompress.compress(model, [pruner, RecalibrateBatchNorm()], example_inputs=x, task=task)
    for i in range(11):
        stays = torch.equal(masked.get_buffer("norm1.running_var")[i], model.get_buffer("norm1.running_var")[i])
        assert stays == (i in dead_channels(masked, "conv1.weight"))


def test_functional_batch_norm_and_a_layer_used_twice() -> None:
    class Functional(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    net = Net(lambda n, x: n.twice(n.own(n.twice(x)) * 3 + 1), own=Functional(3), twice=nn.BatchNorm2d(3)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 2 + 1
    found = fxcompress.compress(net, [RecalibrateBatchNorm()], example_inputs=x, task=Task(batches=[x]))
    first = F.batch_norm(x, None, None, net.twice.weight, net.twice.bias, True)
    second = F.batch_norm(first, None, None, net.own.weight, net.own.bias, True) * 3 + 1
    mean = (x.mean((0, 2, 3)) + second.mean((0, 2, 3))) / 2
    torch.testing.assert_close(found.get_buffer("own.running_mean"), first.mean((0, 2, 3)))
    torch.testing.assert_close(found.get_buffer("own.running_var"), first.transpose(0, 1).flatten(1).var(1))
    torch.testing.assert_close(found.get_buffer("twice.running_mean"), mean)


def test_what_cannot_be_measured() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    x = torch.randn(2, 3)
    found = fxcompress.compress(net, [RecalibrateBatchNorm()], example_inputs=x, task=Task(batches=[x]))
    (step,) = found.meta["history"]
    assert not step.modified
    assert step.notes == ("there is no BatchNorm with running statistics",)
    normed = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(3, 4), b=nn.BatchNorm1d(4))
    task = Task(batches=[torch.full((2, 3), torch.inf)])
    with pytest.raises(PassError, match=r"b\.running_mean would hold NaN"):
        fxcompress.compress(normed, [RecalibrateBatchNorm()], example_inputs=x, task=task)
    with pytest.raises(PassError, match="more than 1 value per channel"):
        fxcompress.compress(normed, [RecalibrateBatchNorm()], example_inputs=x, task=Task(batches=[x[:1]]))
    with pytest.raises(InputError, match="gave 1 batches; expected 2"):
        fxcompress.compress(normed, [RecalibrateBatchNorm(2)], example_inputs=x, task=Task(batches=[x]))
    for item in (RecalibrateBatchNorm(), CompensateBias()):
        with pytest.raises(InputError, match=f"batches is missing, which {item.name} needs"):
            fxcompress.compress(normed, [item], example_inputs=x)


# ---- CompensateBias --------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, **options)


READERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda b, x: b(x.mean((2, 3)))),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), lambda b, x: b(x.transpose(1, 3))),
    "convolution": (lambda: conv(6, 4, 3, stride=2), lambda b, x: b(x)),
    "before BatchNorm": (lambda: nn.Sequential(conv(6, 4, 3, bias=False), nn.BatchNorm2d(4)), lambda b, x: b(x)),
    "grouped": (lambda: conv(6, 4, 3, groups=2), lambda b, x: b(x)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 1), lambda b, x: b(x)),
    "grouped, transposed": (lambda: nn.ConvTranspose2d(6, 4, 1, groups=2), lambda b, x: b(x)),
    "functional": (lambda: nn.Linear(6, 4), lambda b, x: F.linear(x.mean((2, 3)), b.weight, b.bias)),
}


def constant_net(kind: str) -> Net:
    """Channels 1 and 4 of the first layer are constant behind BatchNorm and activation, and not zero."""
    layer, step = READERS[kind]
    net = Net(
        lambda n, x: step(n.b, F.softplus(n.norm(n.a(x)))), a=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), b=layer()
    )
    with torch.no_grad():
        net.a.weight[[1, 4]] = 0
    return net.double()


@pytest.mark.parametrize("kind", READERS)
def test_constants_are_compensated_exactly(kind: str) -> None:
    net = constant_net(kind)
    x, batches = torch.randn(2, 3, 7, 7).double(), [torch.randn(n, 3, 9, 9).double() for n in (2, 5)]
    task = Task(batches=batches)
    masked = fxcompress.compress(net, [choose({"a": 6}, {"a": [1, 4]})], example_inputs=x)
    assert dead_channels(masked, "a.weight") == {1, 4}
    with torch.no_grad():
        assert not torch.allclose(masked(x), net(x), atol=0.05)
        made = fxcompress.compress(masked, [CompensateBias()], example_inputs=x, task=task)
        torch.testing.assert_close(made(x), net(x), rtol=1e-10, atol=1e-10)
        small = fxcompress.compress(made, [Speedup()], example_inputs=x)
        torch.testing.assert_close(small(x), net(x), rtol=1e-10, atol=1e-10)
        assert small.get_parameter("a.weight").shape[0] == 4
        again = fxcompress.compress(made, [CompensateBias()], example_inputs=x, task=task)
    assert not again.meta["history"][-1].modified


@pytest.mark.parametrize("pruner", [L1FilterPruner(0.4), LevelPruner(0.5)], ids=["channels", "single weights"])
def test_the_mean_of_what_went_comes_back(pruner: Any) -> None:
    """The mean output of each reader is that of the dense model, whatever the channels held."""
    net = Net(lambda n, x: n.c(F.relu(n.b(n.a(x)))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3, padding=1),
              c=nn.Conv2d(5, 4, 1, bias=False)).double()  # fmt: skip
    batches = [torch.randn(n, 3, size, size).double() for n, size in ((2, 8), (5, 6))]
    x = batches[0]
    masked = fxcompress.compress(net, [pruner], example_inputs=x)
    made = fxcompress.compress(masked, [CompensateBias()], example_inputs=x, task=Task(batches=batches))
    effective = {name: made.get_parameter(name) * mask for name, mask in fxcompress.masks(made).items()}
    with torch.no_grad():
        inputs = [net.a(x) for x in batches]
        dense, found = (torch.cat([
            F.conv2d(x, weight, bias, padding=1).transpose(0, 1).flatten(1) for x in inputs
        ], 1).mean(1) for weight, bias in (
            (net.b.weight, net.b.bias), (effective["b.weight"], made.get_parameter("b.bias"))))  # fmt: skip
    live = sorted(set(range(5)) - dead_channels(made, "b.bias"))
    assert live
    torch.testing.assert_close(found[live], dense[live], rtol=1e-10, atol=1e-10)
    assert "c.bias (added)" in made.meta["history"][-1].notes[-1]
    assert made.get_parameter("c.bias").shape == (4,)


def test_pruning_and_compensating_twice_is_as_good_as_once() -> None:
    """The second time adds only what the first did not."""
    net = constant_net("linear")
    x, task = torch.randn(2, 3, 7, 7).double(), Task(batches=[torch.randn(4, 3, 9, 9).double()])
    steps = [choose({"a": 6}, {"a": [1]}), CompensateBias(), choose({"a": 6}, {"a": [1, 4]}), CompensateBias()]
    made = fxcompress.compress(net, steps, example_inputs=x, task=task)
    assert dead_channels(made, "a.weight") == {1, 4}
    with torch.no_grad():
        torch.testing.assert_close(made(x), net(x), rtol=1e-10, atol=1e-10)


def test_readers_whose_bias_cannot_take_it_are_listed() -> None:
    def step(n: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(n.a(x))
        return n.rnn(y)[0] @ n.matrix + n.b(y) + n.c(y)

    net = Net(step, a=nn.Linear(3, 6), rnn=nn.GRU(6, 5, batch_first=True), b=nn.Linear(6, 2), c=nn.Linear(6, 2),
              matrix=nn.Parameter(torch.randn(5, 2)))  # fmt: skip
    net.c.bias = net.b.bias
    x = torch.randn(2, 4, 3)
    masked = fxcompress.compress(net, [L1FilterPruner(0.5, include="a")], example_inputs=x)
    made = fxcompress.compress(masked, [CompensateBias()], example_inputs=x, task=Task(batches=[x]))
    (note,) = made.meta["history"][-1].notes
    assert note == "no bias of its own takes the mean of what is masked in rnn, b, c"
    assert not made.meta["history"][-1].modified


def test_numbers_that_are_none_are_refused() -> None:
    net = constant_net("linear")
    x = torch.randn(2, 3, 7, 7).double()
    with pytest.raises(TrainingError, match="what enters b holds NaN or infinite values"):
        fxcompress.compress(
            net, [L1FilterPruner(0.5), CompensateBias()], example_inputs=x, task=Task(batches=[x * torch.nan])
        )


def test_a_model_that_the_loss_runs_besides_keeps_its_statistics() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(teacher.state_dict())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(4, 3, 6, 6)
    task = Task(batches=[x], loss=lambda student, batch: (student(batch) - teacher(batch)).square().mean())
    measured = fxcompress.compress(model, [RecalibrateBatchNorm()], example_inputs=x, task=task)
    assert not torch.equal(measured.get_buffer("1.running_mean"), model.get_buffer("1.running_mean"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
