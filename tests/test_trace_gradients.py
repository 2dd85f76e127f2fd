"""Capture: what a forward computes without gradients has none in the recording either."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import assert_same
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError, TraceError
from fxcompress.passes import L1FilterPruner, LevelPruner, Speedup

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def built(step: Callable[[Any, Tensor], Any]) -> Net:
    torch.manual_seed(0)
    net = Net(step, a=nn.Linear(4, 6), b=nn.Linear(6, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 2))
    net.scale = nn.Parameter(torch.rand(6) + 0.5)
    net.register_buffer("average", torch.rand(6))
    return net


def teacher(net: Any, x: Tensor) -> Tensor:
    """Functions and layers without gradients, read inside, behind, and along with what has some."""
    h = net.a(x)
    with torch.no_grad():
        g = net.norm(net.b(h * net.scale)).relu()
        g = g + net.scale
    return net.head(h + g) + net.b(g)[:, :2]


@torch.no_grad()
def targets(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).relu())


def decorated(net: Any, x: Tensor) -> Tensor:
    return net.head(net.a(x) - targets(net, x))


def inside_out(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        g = net.a(x)
        with torch.enable_grad():
            h = net.b(g) * net.scale
    with torch.no_grad():
        k = net.head(h.relu() + torch.zeros_like(g)).sum()
    return h + k


def returned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(False):
        h = net.a(x)
    return h, net.head(h)


def averaged(net: Any, x: Tensor) -> Tensor:
    """A running average, which must not keep the graph of the step before."""
    h = net.a(x)
    with torch.no_grad():
        net.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return net.head(h - net.average)


def written(net: Any, x: Tensor) -> Tensor:
    """A write without gradients: the value changes, and what is known of its gradient does not."""
    h = net.a(x)
    with torch.no_grad():
        h.mul_(net.scale)
        h[:, 0] += 1
    return net.head(h)


def regions(net: Any, x: Tensor) -> Tensor:
    """What leaves a region and meets gradients enters the next one as what it is by then."""
    with torch.no_grad():
        g = net.a(x)
    h = g * net.scale
    with torch.no_grad():
        g = h + g
    return net.head(g * h)


def unversioned(net: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        g = net.a(x)
        g += 1
    return net.head(g.clone() * net.scale)


STEPS = [teacher, decorated, inside_out, returned, averaged, written, regions, unversioned]


def grads(net: Any, steps: int = 2) -> dict[str, Tensor | None]:
    """Gradients of the parameters and the input after some steps, and the buffers."""
    x = X.clone().requires_grad_()
    for _ in range(steps):
        result = net(x)
        results = result if isinstance(result, tuple) else (result,)
        torch.stack([item.square().sum() for item in results]).sum().backward()
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {**found, "x": x.grad, **dict(net.named_buffers())}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_the_models(step: Callable[[Any, Tensor], Any], training: bool) -> None:
    model = built(step).train(training)
    traced = fxcompress.trace(model, X)
    for copied in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        expected, found = grads(copy.deepcopy(model)), grads(copied)
        unused = expected.keys() - found.keys() - dict(model.named_buffers()).keys()
        assert all(expected[name] is None for name in unused)
        assert_same({name: expected[name] for name in found}, found)


@pytest.mark.parametrize("step", [teacher, written])
def test_gradients_of_pruned_models(step: Callable[[Any, Tensor], Any]) -> None:
    model = built(step).eval()
    masked = fxcompress.compress(model, [L1FilterPruner(0.5)], example_inputs=X)
    removed: Any = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    assert removed.a.weight.shape[0] < 6
    left, right = grads(masked), grads(removed)
    trained = {name for name, grad in grads(fxcompress.trace(model, X)).items() if grad is not None}
    assert {name for name, grad in right.items() if grad is not None} == trained
    for name in ("x", "head.bias"):
        torch.testing.assert_close(right[name], left[name], rtol=1e-4, atol=1e-5)


def test_the_graph_compiles_and_exports() -> None:
    traced = fxcompress.trace(built(teacher).eval(), X)
    expected = grads(copy.deepcopy(traced))
    found = grads(torch.compile(copy.deepcopy(traced), backend="aot_eager"))
    for name, grad in expected.items():
        torch.testing.assert_close(found["_orig_mod." + name if name != "x" else name], grad, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(traced, (X,)).module()
    torch.testing.assert_close(exported(X), traced(X))


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_the_caller_makes_no_difference(caller: Callable[[], Any]) -> None:
    model = built(teacher).eval()
    with caller():
        traced = fxcompress.trace(model, X)
    assert_same(grads(copy.deepcopy(model)), grads(traced))
    assert torch.is_grad_enabled()


def test_flags_of_parameters_are_read_as_they_are() -> None:
    model = built(lambda n, x: n.head(n.a(x) * 2 if n.scale.requires_grad else n.a(x) * n.scale)).eval()
    model.scale.requires_grad_(False)
    traced = fxcompress.trace(model, X)
    assert_same(model(X), traced(X))
    assert not traced.scale.requires_grad


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        out: Tensor = self.head(x)
        return out


def test_a_region_cannot_be_traced_without_inputs() -> None:
    with pytest.raises(InputError, match=r"without gradients.*Pass a batch"):
        fxcompress.compress(Frozen(), [LevelPruner(0.5)])


class Cast(nn.Module):
    """Casts in places."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.relu(self.fc(x))
        return h.float()


def test_a_submodule_that_switches_autocast_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Cast(), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match=r"^1 stays as it is: autocast is switched inside"):
        traced = fxcompress.trace(model, X)
    assert_same(model(X), traced(X))
    with pytest.raises(TraceError, match="autocast around the call of the model works"):
        fxcompress.trace(Cast(), X)


def test_autocast_that_switches_nothing_is_no_obstacle() -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net.a(x)

    traced = fxcompress.trace(Net(step, a=nn.Linear(4, 4)), X)
    assert not traced.meta["opaque"]
