"""Each quantizer against its definition in NumPy, forward and gradient; ranges, training, bad input."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError, Pass, PassError, QuantSpec, SelectionError, Task, compress
from fxcompress.passes import (
    BNNQuantizer,
    DoReFaQuantizer,
    L1FilterPruner,
    LevelPruner,
    Lower,
    LSQQuantizer,
    NaiveQuantizer,
    PTQQuantizer,
    QATQuantizer,
    Quantizer,
    Speedup,
)
from fxcompress.quantization.fake_quantize import AffineFakeQuantize, FakeQuantize, LearnedFakeQuantize
from fxcompress.quantization.gradients import GradientQuantize
from fxcompress.quantization.observers import MinMax, MovingAverage
from fxcompress.quantization.settle import settle
from fxcompress.quantization.spec import activation_spec, weight_spec

Array = NDArray[Any]


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).float()


class Network(nn.Module):
    """Residual, depthwise and grouped convolutions, a concatenation, odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.norm1 = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.BatchNorm2d(10)
        self.grouped, self.norm2 = nn.Conv2d(10, 10, 1, groups=2), nn.BatchNorm2d(10)
        self.side = nn.Conv2d(10, 7, 1)
        self.last = nn.Linear(17, 5)
        generator = torch.Generator().manual_seed(3)
        for norm in (self.norm, self.norm1, self.norm2):
            norm.running_mean = torch.randn(10, generator=generator) * 0.3
            norm.running_var = torch.rand(10, generator=generator) + 0.5
            norm.weight.data = torch.rand(10, generator=generator) + 0.5
            norm.bias.data = torch.randn(10, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm1(self.depthwise(x)).relu()
        x = (self.norm2(self.grouped(y)) + x).relu()
        return self.last(torch.cat([x, self.side(x).relu()], 1).mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


X = values(4, 3, 6, 6)


def quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    return {name: item for name, item in module.named_modules() if isinstance(item, FakeQuantize)}


# ---- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, scale, zero_points",
    [(0.0, 5.0, 5 / 255, {0}), (1.0, 5.0, 5 / 255, {0}), (-1.0, 5.0, 6 / 255, {42, 43}), (-4.0, -1.0, 4 / 255, {255})],
)
def test_exact_cases(low: float, high: float, scale: float, zero_points: set[int]) -> None:
    grid = activation_spec(8, MinMax()).grid(torch.tensor(low), torch.tensor(high))
    assert float(grid.scale) == pytest.approx(scale, rel=1e-6)
    assert int(grid.zero_point) in zero_points


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (math.inf, -math.inf), (-3e38, 3e38), (0.0, 1e-40)])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_range_leaves_nan(low: float, high: float, bits: int, symmetric: bool) -> None:
    spec = activation_spec(bits, MinMax(), symmetric=symmetric, signed=symmetric)
    made = AffineFakeQuantize(spec)
    made.set_range(torch.tensor(low), torch.tensor(high))
    assert bool(torch.isfinite(made(values(50))).all())
    assert float(made(torch.zeros(()))) == 0


def affine(x: Array, scale: Any, zero: Any, low: int, high: int) -> tuple[Array, Array]:
    """Value and gradient, from the definition."""
    steps = x / scale
    inside = (steps >= low - zero) & (steps <= high - zero)
    return (np.clip(np.rint(steps) + zero, low, high) - zero) * scale, inside.astype(x.dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_qat_activations(bits: int) -> None:
    x = values(5, 7, seed=bits, scale=2).requires_grad_()
    made = AffineFakeQuantize(activation_spec(bits, MovingAverage(0.9)))
    made.set_range(torch.tensor(-0.7), torch.tensor(2.1))
    made.eval()
    y = made(x)
    y.sum().backward()
    scale = np.float32(2.1 / (2**bits - 1) + 0.7 / (2**bits - 1))
    zero = np.rint(np.float32(0.7) / scale)
    expected, gradient = affine(x.detach().numpy(), scale, zero, 0, 2**bits - 1)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-6)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), gradient)


@pytest.mark.parametrize("axis", [None, 0])
def test_weights_are_scaled_by_their_extremes(axis: int | None) -> None:
    w = values(6, 4, 3, 3).requires_grad_()
    made = AffineFakeQuantize(weight_spec(4, axis=axis), 0 if axis is None else 6).train()
    y = made(w)
    y.sum().backward()
    flat = np.abs(w.detach().numpy()).reshape(6, -1)
    largest = flat.max() if axis is None else flat.max(1).reshape(6, 1, 1, 1)
    expected, _ = affine(w.detach().numpy(), largest / np.float32(7), np.float32(0), -7, 7)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-6)
    assert w.grad is not None
    assert bool((w.grad == 1).all())  # nothing is clipped, the extremes included


@pytest.mark.parametrize("bits, signed", [(2, True), (4, True), (4, False), (8, False)])
def test_lsq(bits: int, signed: bool) -> None:
    x, step = values(6, 20, seed=bits).requires_grad_(), 0.21
    spec = activation_spec(bits, None, symmetric=True, signed=signed)
    made = LearnedFakeQuantize(spec, torch.tensor(step))
    y = made(x)
    upstream = values(6, 20, seed=9)
    y.backward(upstream)
    negative, positive = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v = x.detach().double().numpy() / np.float32(step)
    inside = (v > -negative) & (v < positive)
    np.testing.assert_allclose(y.detach().numpy(), np.rint(np.clip(v, -negative, positive)) * step, atol=1e-5)
    of_step = np.where(inside, np.rint(v) - v, np.where(v <= -negative, -negative, positive))
    expected = (upstream.numpy() * of_step).sum() / math.sqrt(v.size * positive)
    assert made.scale.grad is not None
    assert float(made.scale.grad) == pytest.approx(expected, rel=1e-4)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), upstream.numpy() * inside, atol=1e-6)


def test_lsq_plus_learns_the_offset() -> None:
    x = values(6, 20).requires_grad_()
    made = LearnedFakeQuantize(activation_spec(4, None), torch.tensor(0.2), torch.tensor(-0.8))
    y = made(x)
    y.sum().backward()
    v = x.detach().numpy() / np.float32(0.2) + 4
    outside = (v <= 0) | (v >= 15)
    np.testing.assert_allclose(y.detach().numpy(), (np.clip(np.rint(v), 0, 15) - 4) * 0.2, atol=1e-5)
    assert made.offset is not None
    assert made.offset.grad is not None
    assert float(made.offset.grad) == pytest.approx(outside.sum() / math.sqrt(v.size * 15), rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa_weights(bits: int) -> None:
    w = values(5, 4, 3, 3, seed=bits).requires_grad_()
    rule = DoReFaQuantizer()
    y = rule.quantize(w, rule.weight_spec(bits))
    upstream = values(5, 4, 3, 3, seed=7)
    y.backward(upstream)
    x, g = w.detach().double().numpy(), upstream.double().numpy()
    assert w.grad is not None
    if bits == 1:
        np.testing.assert_allclose(y.detach().numpy(), np.where(x < 0, -1, 1) * np.abs(x).mean(), rtol=1e-5)
        return
    levels, t = 2**bits - 1, np.tanh(x)
    largest = np.abs(t).max()
    np.testing.assert_allclose(
        y.detach().numpy(), 2 * np.rint((t / (2 * largest) + 0.5) * levels) / levels - 1, atol=1e-5
    )
    top = np.unravel_index(np.abs(t).argmax(), t.shape)
    of_t = g / largest
    of_t[top] -= (g * t).sum() / largest**2 * np.sign(t[top])  # the largest one is in every denominator
    np.testing.assert_allclose(w.grad.numpy(), of_t * (1 - t**2), rtol=2e-4, atol=1e-5)


def test_dorefa_activations(network: nn.Module) -> None:
    made = compress(network, [DoReFaQuantizer(4, 3)], example_inputs=X)
    (quantizer, *_) = [q for name, q in quantizers(made).items() if "activations" in name]
    x = values(4, 30).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    clipped = np.clip(x.detach().numpy(), 0, 1)
    np.testing.assert_allclose(y.detach().numpy(), np.rint(clipped * 7) / 7, atol=1e-6)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy() != 0, (x.detach().numpy() >= 0) & (x.detach().numpy() <= 1))


def test_dorefa_gradients_lie_on_a_grid_and_are_right_on_average() -> None:
    torch.manual_seed(0)
    layer, x, g = GradientQuantize(3).train(), values(2, 50).requires_grad_(), values(2, 50, seed=4)
    total = torch.zeros_like(g)
    for _ in range(400):
        x.grad = None
        layer(x).backward(g)
        assert x.grad is not None
        total += x.grad
        steps = (x.grad / (2 * g.abs().amax(1, keepdim=True)) + 0.5) * 7
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    inner = g.abs() < 0.8 * g.abs().amax(1, keepdim=True)
    assert float((total / 400 - g)[inner].abs().max()) < 0.15
    assert layer.eval()(x) is x


def test_rounded_gradients_in_front_of_an_activation_in_place() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.Flatten(1), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers).eval()
    item = DoReFaQuantizer(8, 8, first_last="same", gradient_bits=8)
    made = compress(model, [item], example_inputs=X).train()
    plain = compress(model, [DoReFaQuantizer(8, 8, first_last="same")], example_inputs=X).train()
    for each in (made, plain):
        each(X).sum().backward()
    found, wanted = (each.get_parameter("0.weight").grad for each in (made, plain))
    assert found is not None
    assert wanted is not None
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_bnn_signs_and_gradients() -> None:
    rule = BNNQuantizer()
    x = torch.tensor([-2.0, -1.0, -0.3, -0.0, 0.0, 0.4, 1.0, 1.5], requires_grad=True)
    y = rule.quantize(x, rule.weight_spec(1))
    y.sum().backward()
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_naive_quantizer_rounds_to_nearest(network: nn.Module) -> None:
    made = compress(network, [NaiveQuantizer()])
    weight = made.get_parameter("side.weight").detach().numpy()
    scale = np.abs(weight).max() / 127
    found = made.get_submodule("_quant.side.weight")(made.get_parameter("side.weight")).detach().numpy()
    np.testing.assert_allclose(found, np.rint(weight / scale) * scale, atol=1e-7)
    assert set(network.state_dict()) <= set(made.state_dict())
    assert all(key in network.state_dict() or key.startswith("_quant.") for key in made.state_dict())


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_moving_average_begins_with_the_first_batch() -> None:
    made = AffineFakeQuantize(activation_spec(8, MovingAverage(0.9))).train()
    made(torch.tensor([-1.0, 3.0]))
    assert (float(made.low), float(made.high)) == (-1, 3)
    made(torch.tensor([0.0, 5.0]))
    assert (float(made.low), float(made.high)) == pytest.approx((-0.9, 3.2))
    made(torch.tensor([math.nan, 5.0]))
    assert (float(made.low), float(made.high)) == pytest.approx((-0.9, 3.2))
    assert float(made.scale) == pytest.approx(4.1 / 255, rel=1e-5)


class Uneven(nn.Module):
    """A concatenation of values near zero and of values a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.large.weight *= 100

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.small(x), self.large(x)], 1))


@pytest.mark.parametrize(
    "item", [QATQuantizer(), PTQQuantizer(observer="moving_average"), PTQQuantizer()], ids=lambda item: str(item)[:40]
)
def test_a_shared_range_holds_what_all_its_places_see(item: Pass) -> None:
    torch.manual_seed(0)
    model, x = Uneven().eval(), values(8, 3, 6, 6)
    made = compress(model, [item], example_inputs=x)
    with torch.no_grad():
        wanted = model(x)
        assert float((made(x) - wanted).abs().max() / wanted.abs().max()) < 0.03
        made.train()
        for _ in range(100):
            made(x)
        assert float((made.eval()(x) - wanted).abs().max() / wanted.abs().max()) < 0.03


def shared(batches: list[list[list[float]]], momentum: float = 0.9, **options: Any) -> AffineFakeQuantize:
    """What is left of forwards that call one module at several places."""
    made = AffineFakeQuantize(activation_spec(8, MovingAverage(momentum)), calls=2, **options).train()
    for batch in batches:
        for place, seen in enumerate(batch):
            if seen:
                made(torch.tensor(seen), place=place)
    return made


def test_one_step_of_the_average_is_one_forward() -> None:
    forwards: list[list[list[float]]] = [[[-1.0, 0.0], [0.0, 3.0]], [[0.0, 5.0], [-2.0, 0.0]], [[], [-9.0, 0.0]]]
    made = shared(forwards[:1])
    assert (float(made.low), float(made.high), int(made.seen)) == (-1, 3, 1)
    made = shared(forwards[:2])
    assert (float(made.low), float(made.high)) == pytest.approx((-1.1, 3.2))
    assert float(made.scale) == pytest.approx(4.3 / 255, rel=1e-5)
    made = shared(forwards)  # the first place saw nothing the third time
    assert (float(made.low), float(made.high), int(made.seen)) == pytest.approx((-1.1 - 0.79, 3.2 - 0.32, 3))
    made = shared([*forwards[:2], [[math.nan], [0.0, 5.0]]])
    assert (float(made.low), float(made.high)) == pytest.approx((-1.1 + 0.11, 3.2 + 0.18))
    made = shared(forwards, freeze_step=1)
    assert (float(made.low), float(made.high)) == (-1, 3)
    assert float(made.scale) == pytest.approx(4 / 255, rel=1e-5)
    made = shared(forwards[:1], start_step=2)
    x = values(5)
    for rounded in (False, True):
        places = [made(x, place=0), made(x, place=1)]
        assert all(torch.equal(y, x) is not rounded for y in places)


def test_a_batch_of_nan_leaves_what_calibration_found() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    made = compress(model, [QATQuantizer()], example_inputs=X).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made(X * math.nan)
    changed = [name for name, tensor in made.state_dict().items() if not torch.equal(before[name], tensor)]
    assert all(name.endswith(".seen") for name in changed)
    made(X)
    ranges = [q for name, q in quantizers(made).items() if "activations" in name]
    assert len(ranges) == 2
    assert all(math.isinf(before[f"{n}.low"]) for n, q in quantizers(made).items() if q in ranges)
    assert all(isinstance(q, AffineFakeQuantize) and float(q.low) <= 0 < float(q.high) for q in ranges)


def test_eval_and_freeze_leave_ranges_alone(network: nn.Module) -> None:
    made = compress(network, [QATQuantizer(freeze_step=2, start_step=1)], example_inputs=X)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if name.startswith("_quant.")}
    made.eval()(X * 3)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in before.items())
    made.train()
    frozen: dict[str, Tensor] = {}
    for step in range(4):
        made(values(4, 3, 6, 6, seed=step, scale=1 + step))
        if step == 1:
            frozen = {n: t.clone() for n, t in made.state_dict().items() if n.startswith("_quant.") and "seen" not in n}
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in frozen.items())


def test_rounding_starts_with_start_step(network: nn.Module) -> None:
    made = compress(network, [QATQuantizer(start_step=1)], example_inputs=X).train()
    network = copy.deepcopy(network).train()
    torch.testing.assert_close(made(X), network(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made(X), network(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "entropy", "mse"])
def test_observers(observer: str, network: nn.Module) -> None:
    of_weights = "min_max" if observer == "entropy" else observer  # a handful of values has no histogram
    item = PTQQuantizer(observer=observer, weight_observer=of_weights)
    made = compress(network, [item], example_inputs=X)
    with torch.no_grad():
        wanted, found = network(X), made(X)
    assert float((wanted - found).norm() / wanted.norm()) < 0.05
    assert all(bool((q.grid().scale > 0).all()) for q in quantizers(made).values())  # type: ignore[union-attr]


# ---- the graph -------------------------------------------------------------------------------------------------------

EVERY: list[Pass] = [
    NaiveQuantizer(),
    QATQuantizer(),
    QATQuantizer(4, 4, per_channel=False),
    LSQQuantizer(4, 4),
    LSQQuantizer(4, 4, learn_offset=True, per_channel=True),
    DoReFaQuantizer(gradient_bits=4),
    DoReFaQuantizer(1, 1),
    BNNQuantizer(),
    PTQQuantizer(equalize=True, bias_correction=True, adaround=True, iterations=10),
]
every = pytest.mark.parametrize("item", EVERY, ids=lambda item: f"{item.name}-{EVERY.index(item)}")


@every
@pytest.mark.parametrize("pruner", [None, L1FilterPruner(0.5), LevelPruner(0.5)], ids=["dense", "channels", "elements"])
def test_masked_and_removed_are_equal(item: Pass, pruner: Pass | None, network: nn.Module) -> None:
    passes = [item] if pruner is None else [pruner, item]
    made = compress(network, passes, example_inputs=X)
    for name, mask in fxcompress.masks(made).items():
        node = next((n for n in made.graph.nodes if n.target == f"_quant.{name}"), None)
        if node is not None and isinstance(pruner, LevelPruner):
            reads = made.get_submodule(f"_quant.{name}")(made.get_parameter(name) * mask)
            assert made.get_submodule(f"_quant.{name}").keeps_zero is False or bool((reads[~mask] == 0).all())
    small = compress(made, [Speedup()], example_inputs=X)  # verified in float64
    assert small.meta["history"][-1].difference is not None
    if isinstance(pruner, L1FilterPruner):
        assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("item", [DoReFaQuantizer(4, 4), DoReFaQuantizer(1, 1), BNNQuantizer()], ids=lambda i: i.name)
@pytest.mark.parametrize("given", [False, True], ids=["laid", "given"])
def test_single_weights_are_removed_where_zero_is_none_of_the_values(
    item: Pass, given: bool, network: nn.Module
) -> None:
    with torch.no_grad():
        network.get_parameter("grouped.weight")[0, 0] = 0.0  # kept, and sign(0) is +1
    mask = values(10, 5, 1, 1) > 0
    mask[0, 0] = True
    made = compress(network, [item], example_inputs=X)
    small = compress(made, [Speedup(masks={"grouped.weight": mask})], example_inputs=X)
    if not given:
        masked = compress(network, [LevelPruner(0.5), item], example_inputs=X)
        small = compress(masked, [Speedup()], example_inputs=X)
        torch.testing.assert_close(small(X), masked(X))
        mask = fxcompress.masks(masked)["grouped.weight"]
    quantizer, weight = small.get_submodule("_quant.grouped.weight"), small.get_parameter("grouped.weight")
    reads = quantizer(weight).detach()
    assert torch.equal(reads != 0, mask)
    unmasked = made.get_submodule("_quant.grouped.weight")(made.get_parameter("grouped.weight") * mask).detach()
    torch.testing.assert_close(reads[mask], unmasked[mask])
    assert "_masks" not in dict(small.named_modules())
    settled = copy.deepcopy(small)
    settle(settled)
    torch.testing.assert_close(settled(X), small(X), rtol=1e-4, atol=1e-5)


def _layer_before(node: torch.fx.Node) -> str:
    (source,) = node.all_input_nodes
    return str(source.meta.get("layer", source.target))


@every
def test_settling_changes_nothing(item: Pass, network: nn.Module) -> None:
    made = compress(network, [item], example_inputs=X).double()
    settled = copy.deepcopy(made)
    settle(settled)
    with torch.no_grad():
        torch.testing.assert_close(settled(X.double()), made(X.double()), rtol=1e-9, atol=1e-9)
    behind = [n for n in settled.graph.nodes if n.op == "call_module" and n.target.startswith("norm")]
    quantized = [n for n in made.graph.nodes if n.op == "call_module" and n.target.endswith(".weight")]
    assert (
        len(behind) <= 3 - min(3, len([n for n in quantized if "last" not in n.target and "side" not in n.target])) + 1
    )
    for name, quantizer in quantizers(settled).items():
        assert "activations" in name or isinstance(quantizer, (AffineFakeQuantize, LearnedFakeQuantize))


@every
def test_an_ordinary_module(item: Pass, network: nn.Module) -> None:
    made = compress(network, [item], example_inputs=X)
    wanted = made(X)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(X), wanted)
    assert made(values(7, 3, 6, 6)).shape == (7, 5)
    made.train()
    made(X).sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if "bias" not in name)
    again = compress(made.eval(), [item], example_inputs=X)
    assert str(again.graph) == str(made.graph)


def test_shared_scale_of_a_concatenation(network: nn.Module) -> None:
    made = compress(network, [QATQuantizer()], example_inputs=X)
    cat = next(n for n in made.graph.nodes if n.target is torch.cat)
    one, two = cat.args[0]
    assert one.target == two.target
    assert quantizers(made)[one.target].calls == 2


def test_blocks_are_quantized_at_their_end(network: nn.Module) -> None:
    made = compress(network, [QATQuantizer()], example_inputs=X)
    places = [str(n.args[0]) for n in made.graph.nodes if "activations" in str(n.target)]
    assert places == ["x", "relu", "relu_1", "relu_2", "relu_3", "mean"]


def test_bits_by_pattern_and_ends(network: nn.Module) -> None:
    made = compress(
        network,
        [QATQuantizer({"*": 4, "grouped": 6}, {"*": 5}, exclude="depthwise", first_last=8)],
        example_inputs=X,
    )
    bits = {name.split(".")[1]: q.spec.bits for name, q in quantizers(made).items() if name.endswith("weight")}
    assert bits == {"stem": 8, "grouped": 6, "side": 4, "last": 8}


def test_training_on_a_task(network: nn.Module) -> None:
    images = values(48, 3, 6, 6)
    labels = images.mean((1, 2, 3)).mul(20).long().clamp(0, 4)
    task = Task(
        batches=[(images[i : i + 16], labels[i : i + 16]) for i in range(0, 48, 16)],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    for item in (
        QATQuantizer(epochs=6),
        LSQQuantizer(4, 4, epochs=6),
        BNNQuantizer(epochs=6),
        DoReFaQuantizer(epochs=6),
    ):
        untrained = compress(network, [type(item)(epochs=0)], example_inputs=X, task=task)
        trained = compress(network, [item], example_inputs=X, task=task)
        losses = [float(nn.functional.cross_entropy(m(images), labels).detach()) for m in (untrained, trained)]
        assert losses[1] < losses[0]
    assert float(trained.get_parameter("grouped.weight").detach().abs().max()) > 0


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, True, "8", {}])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(InputError, match="weight_bits"):
        QATQuantizer(weight_bits=bits)
    with pytest.raises(InputError, match="activation_bits"):
        QATQuantizer(activation_bits=bits)


def test_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match="freeze_step"):
        QATQuantizer(start_step=5, freeze_step=3)
    with pytest.raises(InputError, match="observer"):
        PTQQuantizer(observer="average")
    with pytest.raises(InputError, match="first_last"):
        QATQuantizer(first_last="none")  # type: ignore[arg-type]


class Channelwise(Quantizer):
    """A scale for each channel of what is read."""

    def activation_spec(self, bits: int) -> QuantSpec:
        return activation_spec(bits, MinMax()).along(1)


def test_specs_that_cannot_be(network: nn.Module) -> None:
    with pytest.raises(InputError, match=r"Channelwise for \w+ has axis=1; expected None"):
        compress(network, [Channelwise(8, 8)], example_inputs=X)
    with pytest.raises(InputError, match="bits is 9; expected an integer from 1 to 8"):
        QuantSpec(9, "weight", signed=True, symmetric=True)


def test_a_quantizer_that_finds_nothing_says_why(network: nn.Module) -> None:
    made = compress(network, [PTQQuantizer()], example_inputs=X)
    with pytest.warns(UserWarning, match="QATQuantizer has nothing to quantize: .*stem has 8, not 4"):
        again = compress(made, [QATQuantizer(4)], example_inputs=X)
    assert again.meta["history"][-1].notes == ("nothing to quantize",)
    again = compress(made, [QATQuantizer()], example_inputs=X)  # no warning: it is as asked
    assert again.meta["history"][-1].notes == ("nothing to quantize",)
    with pytest.warns(UserWarning, match="no convolution or linear layer"):
        compress(nn.Sequential(nn.ReLU()), [PTQQuantizer()], example_inputs=X)
    with pytest.warns(UserWarning, match="leave every layer in float"):
        compress(nn.Sequential(nn.Linear(6, 6)), [BNNQuantizer()], example_inputs=X)


@pytest.mark.parametrize("item", [NaiveQuantizer(), PTQQuantizer(), QATQuantizer()], ids=lambda item: item.name)
def test_lowered_modules_are_refused(item: Pass) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    lowered = compress(model, [Lower(dtype="float32")], example_inputs=X)
    with pytest.raises(PassError, match=f"{item.name} was given a lowered module"):
        compress(lowered, [item], example_inputs=X)


def test_calibration_without_batches_or_with_nan(network: nn.Module) -> None:
    with pytest.raises(InputError, match="no batch"):
        compress(network, [PTQQuantizer()], example_inputs=X, task=Task(batches=list))
    bad = X.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"NaN.*activations"):
        compress(network, [PTQQuantizer()], example_inputs=X, task=Task(batches=[bad]))
    with pytest.raises(InputError, match="example_inputs is missing"):
        compress(network, [PTQQuantizer()])
    with pytest.raises(SelectionError, match="steem"):
        compress(network, [PTQQuantizer({"steem": 8})], example_inputs=X)
