"""Each quantizer against its definition in NumPy, forward and gradient."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_cases import Array, X, module_of, normed, quantizers, small_network, values
from torch import Tensor, nn

from fxcompress import InputError, QuantSpec, compress
from fxcompress.passes import (
    BNNQuantizer,
    DoReFaQuantizer,
    LSQQuantizer,
    NaiveQuantizer,
    PTQQuantizer,
    QATQuantizer,
    Quantizer,
)
from fxcompress.quantization.fake_quantize import (
    ROLE,
    AffineFakeQuantize,
    LearnedFakeQuantize,
    TransformedFakeQuantize,
    fake_quant_nodes,
)
from fxcompress.quantization.gradients import GradientQuantize
from fxcompress.quantization.observers import MinMax, MovingAverage
from fxcompress.quantization.regular import common_step
from fxcompress.quantization.settle import settle
from fxcompress.quantization.spec import activation_spec, weight_spec


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


def test_dorefa_activations() -> None:
    network = small_network()
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


def test_naive_quantizer_rounds_to_nearest() -> None:
    network = small_network()
    made = compress(network, [NaiveQuantizer()])
    weight = made.get_parameter("side.weight").detach().numpy()
    scale = np.abs(weight).max() / 127
    found = made.get_submodule("_quant.side.weight")(made.get_parameter("side.weight")).detach().numpy()
    np.testing.assert_allclose(found, np.rint(weight / scale) * scale, atol=1e-7)
    assert set(network.state_dict()) <= set(made.state_dict())
    assert all(key in network.state_dict() or key.startswith("_quant.") for key in made.state_dict())


# ---- widths, folded norms, other shapes of layers --------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_naive_weights_at_every_width(bits: int) -> None:
    model = normed()
    weight = model.get_parameter("0.weight")
    quantizer = module_of(compress(model, [NaiveQuantizer(bits)]), "0.weight")
    x = weight.detach().clone().requires_grad_()
    y = quantizer(x)
    upstream = values(*x.shape, seed=8)
    y.backward(upstream)
    w = weight.detach().numpy()
    scale = np.abs(w).max() / np.float32(2 ** (bits - 1) - 1)
    np.testing.assert_allclose(y.detach().numpy(), np.rint(w / scale) * scale, atol=1e-6)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), upstream.numpy())  # all are inside the range


@pytest.mark.parametrize(
    "item",
    [QATQuantizer(symmetric=True), *(PTQQuantizer(symmetric=True, observer=name) for name in ("min_max", "mse"))],
    ids=str,
)
def test_symmetric_activations_are_signed_where_negative(item: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)).eval()
    x = values(40, 6)
    made = compress(model, [item], example_inputs=x)
    with torch.no_grad():
        held = {"input_1": x, "_1": model[:2](x), "_3": model[:4](x)}
    found = {str(n.args[0]): module for n, module in fake_quant_nodes(made) if n.meta[ROLE] == "activation"}
    assert {name: module.spec.signed for name, module in found.items()} == {"input_1": True, "_1": False, "_3": True}
    for name, module in found.items():
        grid = module.grid()
        assert grid is not None
        assert int(grid.zero_point) == 0
        full = held[name].abs().max() / (127 if module.spec.signed else 255)
        assert 0.8 * full <= grid.scale <= 1.01 * full, "rounded layers before it; MSE may clip"


@pytest.mark.parametrize("bits", range(2, 9))
def test_ptq_rounds_what_it_calibrated(bits: int) -> None:
    made = compress(normed(), [PTQQuantizer(bits, bits)], example_inputs=X)
    quantizer = module_of(made, "activations.input_1" if "input_1" in str(made.graph) else "activations.x")
    low, high = X.min().item(), X.max().item()
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    x = values(40, seed=9, scale=3).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    v = x.detach().double().numpy() / scale
    np.testing.assert_allclose(
        y.detach().numpy(), (np.clip(np.rint(v) + zero, 0, 2**bits - 1) - zero) * scale, atol=1e-5
    )
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), ((v >= -zero) & (v <= 2**bits - 1 - zero)).astype(np.float32))


@pytest.mark.parametrize("training", [False, True])
def test_qat_rounds_on_the_grid_of_the_folded_weight(training: bool) -> None:
    model = normed()
    made = compress(model, [QATQuantizer(4, None)], example_inputs=X).train(training)
    factor = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach().double().numpy()  # type: ignore[index,union-attr,operator]
    w = model.get_parameter("0.weight").detach().double().numpy()
    folded = w * factor[:, None, None, None]
    scale = np.abs(folded).max((1, 2, 3), keepdims=True) / 7
    effective = np.rint(folded / scale) * scale / factor[:, None, None, None]
    with torch.no_grad():
        y = F.conv2d(X.double(), torch.from_numpy(effective), model.get_parameter("0.bias").double())
        mean, var = model.get_buffer("1.running_mean").double(), model.get_buffer("1.running_var").double()
        if training:  # BatchNorm goes on with the batch's statistics
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        gamma, beta = (model.get_parameter(f"1.{name}").double().reshape(shape) for name in ("weight", "bias"))
        y = (y - mean.reshape(shape)) / (var.reshape(shape) + 1e-5).sqrt() * gamma + beta
        last = model.get_parameter("4.weight").double().numpy()
        step = np.abs(last).max(1, keepdims=True) / 7
        rounded = torch.from_numpy(np.rint(last / step) * step)
        wanted = y.relu().flatten(1) @ rounded.T + model.get_parameter("4.bias").double()
        torch.testing.assert_close(made(X).double(), wanted, rtol=1e-3, atol=1e-3)


def test_lsq_plus_gradient_of_the_step_and_of_what_is_read() -> None:
    x = values(6, 20).requires_grad_()
    upstream = values(6, 20, seed=2)
    made = LearnedFakeQuantize(activation_spec(3, None), torch.tensor(0.25), torch.tensor(-0.75))
    made(x).backward(upstream)
    v, g = x.detach().double().numpy() / 0.25, upstream.double().numpy()
    low, high = -3, 4  # integers 0 to 7, the zero point is 3
    inside = (v > low) & (v < high)
    of_step = np.where(inside, np.rint(v) - v, np.where(v <= low, 0, 7))
    assert made.scale.grad is not None
    assert float(made.scale.grad) == pytest.approx((g * of_step).sum() / math.sqrt(v.size * 7), rel=1e-4)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), g * inside, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_starts_at_its_step(bits: int) -> None:
    made = compress(normed(), [LSQQuantizer(bits, bits)], example_inputs=X)
    weight = made.get_parameter("4.weight").detach().double()
    top = 2 ** (bits - 1) - 1
    scale = module_of(made, "4.weight").get_parameter("scale").detach()
    assert float(scale) == pytest.approx(2 * float(weight.abs().mean()) / math.sqrt(top), rel=1e-5)


def test_dorefa_one_bit_gradient_is_straight_through() -> None:
    rule, w = DoReFaQuantizer(), values(5, 6).requires_grad_()
    upstream = values(5, 6, seed=1)
    rule.quantize(w, rule.weight_spec(1)).backward(upstream)
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), upstream.numpy() * np.abs(w.detach().numpy()).mean(), rtol=1e-5)


def test_bnn_with_the_mean_magnitude() -> None:
    rule, w = BNNQuantizer(magnitude="mean"), values(5, 6, scale=0.8).requires_grad_()
    upstream = values(5, 6, seed=1)
    y = rule.quantize(w, rule.weight_spec(1))
    y.backward(upstream)
    x, g = w.detach().double().numpy(), upstream.double().numpy()
    sign, mean = np.where(x < 0, -1, 1), np.abs(x).mean(1, keepdims=True)
    np.testing.assert_allclose(y.detach().numpy(), sign * mean, rtol=1e-5)
    wanted = g * mean * (np.abs(x) <= 1) + (g * sign).sum(1, keepdims=True) * sign / 6
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="magnitude"):
        BNNQuantizer(magnitude="max")  # type: ignore[arg-type]


class Gated(nn.Module):
    """A GELU between two layers, with no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.gelu(self.two(F.gelu(self.one(x)))))


def test_bnn_passes_by_gelu() -> None:
    model, x = Gated().eval(), values(4, 5, scale=30)  # far below zero GELU is -0.0, whose sign is +1
    made = compress(model, [BNNQuantizer(magnitude="mean")], example_inputs=x)
    with torch.no_grad():
        inner = model.one(x)
        w = model.two.weight
        signs = torch.where(w < 0, -1.0, 1.0) * w.clamp(-1, 1).abs().mean(1, keepdim=True)
        wanted = model.three(F.gelu(torch.where(inner < 0, -1.0, 1.0) @ signs.T + model.two.bias))
        torch.testing.assert_close(made(x), wanted)
    settled = settle(made)
    assert settled == []
    with torch.no_grad():
        torch.testing.assert_close(made(x), wanted)


def test_a_rule_without_a_gradient_is_straight_through() -> None:
    rule = NaiveQuantizer()
    x = values(9).requires_grad_()
    TransformedFakeQuantize(weight_spec(3, axis=None), rule)(x).backward(values(9, seed=1))
    assert x.grad is not None
    assert torch.equal(x.grad, values(9, seed=1))


def test_weight_scales_follow_the_output_channels_of_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.ConvTranspose2d(3, 5, 2)).eval()
    made = compress(layer, [PTQQuantizer()], example_inputs=values(2, 3, 4, 4))
    scale = np.abs(layer.get_parameter("0.weight").detach().numpy()).max((0, 2, 3)) / 127
    grid = module_of(made, "0.weight").grid()
    assert grid is not None
    np.testing.assert_allclose(grid.scale.numpy(), scale, rtol=1e-6)


def test_lsq_of_eight_bits_folds_a_negative_factor() -> None:
    made = compress(normed(), [LSQQuantizer()], example_inputs=X).train()
    with torch.no_grad():
        made.get_parameter("0.weight")[:, 0, 0, 0] = -10.0  # clipped at the lowest integer
    made.eval()
    wanted = made(X).detach()
    assert any("1 into 0" in line for line in settle(made))
    assert module_of(made, "0.weight").spec.bits == 8
    torch.testing.assert_close(made(X).detach(), wanted, rtol=1e-4, atol=1e-4)


def test_dorefa_of_eight_bits_stays_where_integers_have_too_few() -> None:
    made = compress(normed(), [DoReFaQuantizer(8, 8, first_last="same")], example_inputs=X)
    wanted = made(X).detach()
    said = settle(made)
    assert any("need 9 bits" in line for line in said)
    assert torch.equal(made(X).detach(), wanted)


@pytest.mark.parametrize(
    "multiples, step",
    [([2, 5], 1.0), ([-3, 9, 6], 3.0), ([0, 0], None), ([127, -126], 1.0), ([4, 8, -1, 64], 1.0), ([6, 10, 15], 1.0)],
)
def test_the_step_of_regular_values(multiples: list[int], step: float | None) -> None:
    found = common_step(torch.tensor(multiples) * 0.0123, None)
    assert found is not None
    assert float(found) == pytest.approx(1.0 if step is None else step * 0.0123, rel=1e-5)


def test_the_step_of_each_channel_and_of_irregular_values() -> None:
    x = torch.tensor([[0.2, 0.8], [0.0, 0.0], [-0.9, 0.6]])
    found = common_step(x, 0)
    assert found is not None
    assert found.tolist() == pytest.approx([0.2, 1.0, 0.3])
    assert common_step(values(50), None) is None
    assert common_step(torch.tensor([1.0, 128.0]), None) is None  # one bit too many


class Doubling(Quantizer):
    """Steps that are powers of two: the largest value is rarely the largest integer."""

    def quantize(self, x: Tensor, spec: QuantSpec) -> Tensor:
        scale = (x.abs().max() / spec.quant_max).log2().ceil().exp2()
        return (x / scale).round() * scale


def test_weights_of_a_rule_and_activations_of_another_quantizer() -> None:
    model = normed()
    made = compress(model, [Doubling(4), PTQQuantizer(8)], example_inputs=X)
    assert type(module_of(made, "0.weight")) is TransformedFakeQuantize
    assert [step.notes for step in made.meta["history"]] == [
        ("weights: 2 to 4 bits",),
        ("activations: 2 to 8 bits",),
    ]
    wanted = made(X).detach()
    said = settle(made)
    assert not any("stays as it is" in line for line in said)
    assert isinstance(module_of(made, "0.weight").grid(), tuple)
    torch.testing.assert_close(made(X).detach(), wanted, rtol=1e-4, atol=1e-4)
