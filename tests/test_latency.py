"""Latency, and what counting and measuring have in common: nothing is disturbed, bad arguments are named."""

import contextlib
import copy
import random
import time
from collections.abc import Callable
from typing import Any

import model_zoo
import pytest
import torch
from conftest import Clock
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.cost import count
from fxcompress.errors import InputError
from fxcompress.latency import latency


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ---- nothing is disturbed --------------------------------------------------------------------------------


class Restless(nn.Module):
    """Writes to everything that it has, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.calls = 0
        self.cache: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.steps: Tensor
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = x.mean()
        self.cache.append(x)
        self.by_name["x"] = x
        self.added = x
        self.register_buffer("new", x)
        x = self.norm(self.conv(F.dropout(x.mul_(2), training=True)))
        x = F.batch_norm(x, self.frozen.running_mean, self.frozen.running_var, training=True)
        if self.fails:
            raise RuntimeError("told to fail")
        return x


def restless() -> Restless:
    model = Restless()
    model.train()
    model.frozen.eval()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def snapshot(model: Restless) -> dict[str, Any]:
    return {
        "state": {
            name: (id(value), value.clone()) for name, value in (*model.named_parameters(), *model.named_buffers())
        },
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [
            (
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                list(module._forward_hooks_always_called),
            )
            for module in model.modules()
        ],
        "calls": model.calls,
        "cache": (id(model.cache), list(model.cache), dict(model.by_name)),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "gradients": (torch.is_grad_enabled(), [p.requires_grad for p in model.parameters()]),
        "threads": torch.get_num_threads(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("measure", [count, lambda *args: latency(*args, min_run_time=0.0, threads=1)])
@pytest.mark.parametrize("fails", [False, True])
def test_model_inputs_and_random_state_are_left_as_they_were(measure: Callable[..., Any], fails: bool) -> None:
    model, x = restless(), torch.randn(2, 3, 6, 6)
    model.fails = fails
    before, inputs = snapshot(model), x.clone()
    with pytest.raises(InputError, match="told to fail") if fails else contextlib.nullcontext():
        measure(model, x)
    after = snapshot(model)
    for key, value in before.items():
        assert same(value, after[key]), key
    assert torch.equal(x, inputs)


def test_a_graph_module_is_left_as_it_was() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())).train()
    before, code = copy.deepcopy(model.state_dict()), model.code
    count(model, torch.randn(2, 3, 6, 6))
    assert model.code == code
    assert all(module.training for module in model.modules())
    assert same(dict(before), dict(model.state_dict()))


def test_counting_in_inference_mode_and_on_no_device() -> None:
    model, x = model_zoo.build("squeezenet1_1")
    expected = count(model, x)
    with torch.inference_mode():
        assert count(model, x) == expected
    assert count(copy.deepcopy(model).to("meta"), x.to("meta")) == expected


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [count, latency])
@pytest.mark.parametrize(
    "model, inputs, message",
    [
        (nn.Linear(3, 2), (), "no tensor"),
        (nn.Linear(3, 2), torch.zeros(0, 3), "empty batch"),
        (
            nn.Linear(3, 2),
            torch.zeros(5, 4),
            r"failed on the example inputs \(shapes \(5, 4\)\): mat1 and mat2",
        ),
        (nn.Linear(3, 2), torch.zeros(5, 3, device="meta"), "one device"),
        (nn.LazyLinear(2), torch.zeros(5, 3), "lazy parameters"),
        (torch.relu, torch.zeros(5, 3), "expected a torch.nn.Module"),
    ],
)
def test_unusable_arguments(measure: Callable[..., Any], model: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(model, inputs)


# ---- latency ---------------------------------------------------------------------------------------------


def test_latency_measures_the_forward_pass(clock: Clock) -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append((len(x), torch.get_num_threads(), torch.is_grad_enabled()))
        clock.sleep(1 / 128 if len(seen) % 2 else 3 / 128)
        return x

    found = latency(Call(run), torch.zeros(3, 2), threads=1, min_run_time=1.0)
    assert found.median == 2 / 128
    assert found.iqr == 2 / 128
    assert set(found.times) == {1 / 128, 3 / 128}
    assert (found.batch, found.threads, found.runs) == (3, 1, 64)
    assert found.runs < len(seen)  # the model was warm
    assert {(batch, grad) for batch, _, grad in seen} == {(3, False)}
    assert seen[-1][1] == 1
    assert str(found) == "15.625 ms (median of 64 runs, IQR 15.625 ms), batch 3, 1 thread"


def test_the_clock_is_the_machines() -> None:
    start = time.perf_counter()
    found = latency(Call(torch.relu), torch.zeros(1), min_run_time=0.0)
    assert 0 < sum(found.times) / len(found.times) * found.runs < time.perf_counter() - start


def test_slow_models_are_measured_ten_times(clock: Clock) -> None:
    assert latency(Call(lambda x: clock.sleep(0.25)), torch.zeros(1), min_run_time=0.0).runs == 10


def test_latency_in_eval_mode_with_as_many_threads_as_now() -> None:
    layer = nn.Dropout(0.5).train()
    layer.register_forward_hook(lambda module, _, output: modes.add(module.training))
    modes: set[bool] = set()
    found = latency(layer, torch.ones(2, 2), min_run_time=0.0)
    assert modes == {False}
    assert layer.training
    assert found.threads == torch.get_num_threads()


def test_threads_below_one() -> None:
    with pytest.raises(InputError, match="threads is 0; expected at least 1"):
        latency(nn.Linear(2, 2), torch.zeros(1, 2), threads=0)
