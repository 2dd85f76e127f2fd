"""Definitions again, in NumPy: gradients, the folded BatchNorm, observers by brute force, product edges."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress import InputError, Pass, QuantSpec, Task, compress
from fxcompress.passes import (
    BNNQuantizer,
    DoReFaQuantizer,
    L1FilterPruner,
    LSQQuantizer,
    NaiveQuantizer,
    PTQQuantizer,
    QATQuantizer,
    Quantizer,
    Speedup,
)
from fxcompress.quantization.calibrate import Calibrator
from fxcompress.quantization.fake_quantize import (
    ROLE,
    AffineFakeQuantize,
    FakeQuantize,
    LearnedFakeQuantize,
    TransformedFakeQuantize,
    fake_quant_nodes,
)
from fxcompress.quantization.observers import MSE, Entropy, MovingAverage, Percentile
from fxcompress.quantization.regular import common_step
from fxcompress.quantization.settle import settle
from fxcompress.quantization.spec import activation_spec, weight_spec

Array = NDArray[Any]


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def normed() -> nn.Module:
    """A convolution with a BatchNorm of which some factors are negative, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 4)).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(values(7, seed=1) * 0.3)
        norm.running_var.copy_(values(7, seed=2).abs() + 0.5)
        norm.weight.copy_(values(7, seed=3))
        norm.bias.copy_(values(7, seed=4))
    return model


X = values(6, 3, 6, 6, seed=5)


def module_of(made: nn.Module, name: str) -> FakeQuantize:
    found = made.get_submodule(f"_quant.{name}")
    assert isinstance(found, FakeQuantize)
    return found


# ---- values and gradients --------------------------------------------------------------------------------------------


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


# ---- observers -------------------------------------------------------------------------------------------------------


def seen(spec: Any, *batches: Tensor) -> tuple[float, float]:
    calibrator = Calibrator("here", spec)
    for batch in batches:
        calibrator.see(batch)
    low, high = calibrator.range()
    return float(low), float(high)


SKEWED = values(20_000, seed=3).exp() - 1  # a long tail above, nothing below -1


def test_percentile_leaves_out_half_at_each_end() -> None:
    low, high = seen(activation_spec(8, Percentile(99.0)), SKEWED[:12_000], SKEWED[12_000:])
    wanted = np.percentile(SKEWED.numpy(), [0.5, 99.5])
    width = 2 * 2.0 ** math.ceil(math.log2(float(SKEWED.max()))) / 8192  # of a bin
    assert low == pytest.approx(wanted[0], abs=2 * width)
    assert high == pytest.approx(wanted[1], abs=2 * width)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_the_best_of_all_fractions(bits: int) -> None:
    spec = activation_spec(bits, MSE())
    low, high = seen(spec, SKEWED)
    x = SKEWED.double().numpy()

    def error(fraction: float) -> float:
        scale = (x.max() - min(x.min(), 0)) * fraction / (2**bits - 1)
        zero = np.clip(np.rint(-min(x.min(), 0) * fraction / scale), 0, 2**bits - 1)
        return float((((np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale - x) ** 2).mean())

    mine = high / x.max()
    assert low == pytest.approx(mine * x.min(), rel=1e-3)
    assert error(mine) <= 1.01 * min(error(step / 100) for step in range(1, 101))


def kullback_leibler(counts: Array, edges: Array, low: float, high: float, levels: int) -> float:
    """Migacz 2017, with loops."""
    inside = [i for i, center in enumerate((edges[1:] + edges[:-1]) / 2) if low <= center <= high]
    if len(inside) < levels:
        return math.inf
    p = counts[inside].astype(float)
    p[0] += counts[: inside[0]].sum()
    p[-1] += counts[inside[-1] + 1 :].sum()
    q = np.zeros(len(inside))
    for level in range(levels):
        mine = [i for i in range(len(inside)) if i * levels // len(inside) == level]
        full = [i for i in mine if counts[inside[i]] > 0]
        for i in full:
            q[i] = counts[[inside[j] for j in mine]].sum() / len(full)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * math.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_entropy_is_the_best_of_all_fractions(role: str) -> None:
    spec = weight_spec(4, axis=None, observer=Entropy()) if role == "weight" else activation_spec(4, Entropy())
    x = SKEWED.numpy()
    low, high = seen(spec, SKEWED)
    reach = 2.0 ** math.ceil(math.log2(np.abs(x).max()))
    counts, edges = np.histogram(x, 8192, (-reach, reach))
    levels = spec.quant_max - spec.quant_min
    mine = kullback_leibler(counts, edges, low, high, levels)
    fractions = [step / 100 for step in (5, 10, 20, 30, 50, 75, 100)]
    others = [kullback_leibler(counts, edges, x.min() * f, x.max() * f, levels) for f in fractions]
    assert math.isfinite(mine)
    assert mine <= min(others) * 1.001 + 1e-9
    assert high < 0.9 * x.max()  # the tail is not worth its levels


def test_entropy_on_weights_per_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3000, 4)).eval()
    with torch.no_grad():
        (weight,) = (tensor for name, tensor in layer.named_parameters() if name.endswith("weight"))
        weight.copy_(values(4, 3000, seed=6) ** 3)
        weight[3] = 0.5  # one value
    made = compress(layer, [PTQQuantizer(4, weight_observer="entropy")], example_inputs=values(2, 3000))
    grid = module_of(made, "0.weight").grid()
    assert grid is not None
    largest = layer.get_parameter("0.weight").detach().abs().amax(1) / 7
    assert bool((grid.scale[:3] < 0.9 * largest[:3]).all())
    torch.testing.assert_close(grid.scale[3], largest[3])


@pytest.mark.parametrize(
    "observer", [MovingAverage(0.9), Percentile(), Entropy(), MSE()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_constants_have_a_range(observer: Any, value: float, bits: int) -> None:
    spec = activation_spec(bits, observer)
    low, high = seen(spec, torch.full((30,), value), torch.full((2,), value))
    grid = spec.grid(torch.tensor(low), torch.tensor(high))
    step = float(grid.scale)
    assert math.isfinite(step)
    assert step > 0
    made = (np.clip(np.rint(value / step) + int(grid.zero_point), 0, 2**bits - 1) - int(grid.zero_point)) * step
    assert made == pytest.approx(value, abs=step / 2 + 1e-6)


# ---- products of two activations -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention written out, and once more in one call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1) @ v
        y = F.scaled_dot_product_attention(q, k, value=y)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("item", [QATQuantizer, LSQQuantizer, PTQQuantizer], ids=lambda item: item.name)
def test_products_of_activations_read_grids(item: Any) -> None:
    model, x = Attention().eval(), values(3, 7, 12)
    plain = compress(model, [item()], example_inputs=x)
    made = compress(model, [item(product_bits=6)], example_inputs=x)
    found = [str(n.args[0]) for n in made.graph.nodes if n.meta.get(ROLE) == "activation"]
    before = [str(n.args[0]) for n in plain.graph.nodes if n.meta.get(ROLE) == "activation"]
    assert len(found) == len(before) + 3  # one for all of q, k and v, where they are made; probabilities; the product
    new = {"qkv", "softmax", "matmul_1"}
    assert set(found) == set(before) | new
    bits = {str(n.args[0]): item.spec.bits for n, item in fake_quant_nodes(made)}
    assert {bits[name] for name in new} == {6}
    torch.testing.assert_close(made(x), model(x), rtol=0.2, atol=0.1)
    with pytest.raises(InputError, match="product_bits"):
        item(product_bits=9)


def test_projections_of_a_multihead_attention_are_quantized() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    made = compress(layer, [PTQQuantizer()], example_inputs=values(2, 5, 8))
    names = {n.target for n in made.graph.nodes if n.meta.get(ROLE) == "weight"}
    layers = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == {f"_quant.{name}" for name in layers}


# ---- embedding tables ------------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """A table as a layer and one that a function reads, both of odd sizes, in front of a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.words = nn.Embedding(13, 7, padding_idx=0, **options)
        self.places = nn.Parameter(values(5, 7, seed=7))
        self.mix, self.out = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        places = F.embedding(torch.arange(tokens.shape[1], device=tokens.device), self.places)
        return self.out(self.mix(self.words(tokens) + places).relu())


TOKENS = torch.arange(15).reshape(3, 5) % 13
ROUNDING = [QATQuantizer, PTQQuantizer, LSQQuantizer]


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("item", [QATQuantizer(3), PTQQuantizer(3, per_channel=False)], ids=lambda item: item.name)
def test_rows_of_a_table_have_a_scale_each(item: Any, bits: int) -> None:
    model = Tables().eval()
    made = compress(model, [replace(item, weight_bits=bits, embeddings=True)], example_inputs=TOKENS)
    for name in ("words.weight", "places"):
        table = model.get_parameter(name).detach().numpy()
        scale = np.abs(table).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        scale[scale == 0] = 1  # the row of the padding
        expected = np.round(table / scale) * scale
        np.testing.assert_allclose(module_of(made, name)(model.get_parameter(name)).detach(), expected, atol=1e-6)
        assert name == "places" or np.unique(scale).size == 13


@pytest.mark.parametrize("item", ROUNDING, ids=lambda item: item.name)
def test_tables_bring_no_node_for_activations(item: Any) -> None:
    model = Tables().eval()
    plain, made = (compress(model, [item(embeddings=given)], example_inputs=TOKENS) for given in (False, True))
    nodes, before = ({str(n.target): spec.spec for n, spec in fake_quant_nodes(each)} for each in (made, plain))
    assert nodes.keys() - before.keys() == {"_quant.words.weight", "_quant.places"}
    assert {name: nodes[name] for name in before} == before
    assert nodes["_quant.words.weight"].axis == nodes["_quant.places"].axis == 0
    again = compress(made, [item(embeddings=True)], example_inputs=TOKENS)
    assert str(again.graph) == str(made.graph)
    settled = copy.deepcopy(made)
    settle(settled)
    torch.testing.assert_close(settled(TOKENS), made(TOKENS))
    assert all(
        isinstance(each, AffineFakeQuantize) for n, each in fake_quant_nodes(settled) if n.meta[ROLE] == "weight"
    )


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_tables_that_are_written_or_have_sparse_gradients_stay_float(options: dict[str, Any]) -> None:
    made = compress(Tables(**options).eval(), [QATQuantizer(embeddings=True)], example_inputs=TOKENS)
    names = {n.target for n, _ in fake_quant_nodes(made)}
    assert "_quant.places" in names
    assert "_quant.words.weight" not in names


@pytest.mark.parametrize("item", ROUNDING, ids=lambda item: item.name)
def test_a_table_learns_behind_its_node(item: Any) -> None:
    made = compress(Tables().eval(), [item(embeddings=True)], example_inputs=TOKENS).train()
    made(TOKENS[:1]).square().sum().backward()
    gradient = made.get_parameter("words.weight").grad
    assert gradient is not None
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == {1, 2, 3, 4}, "what is read, without the padding"


@pytest.mark.parametrize("order", ["pruned first", "quantized first"])
def test_columns_of_a_table_go_and_the_scales_of_its_rows_stay(order: str) -> None:
    passes: list[Pass] = [L1FilterPruner(0.4, include=["words"]), PTQQuantizer(embeddings=True)]
    made = compress(Tables().eval(), passes if order == "pruned first" else passes[::-1], example_inputs=TOKENS)
    small = compress(made, [Speedup()], example_inputs=TOKENS)  # verified in float64
    assert small.get_parameter("words.weight").shape == (13, 5)
    assert small.get_parameter("places").shape == (5, 5)
    for name in ("words.weight", "places"):
        assert torch.equal(module_of(small, name).grid()[0], module_of(made, name).grid()[0])  # type: ignore[index]
    torch.testing.assert_close(small(TOKENS), made(TOKENS))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item", [QATQuantizer(), LSQQuantizer(), PTQQuantizer(adaround=True), BNNQuantizer(first_last="same")]
)
@pytest.mark.parametrize("bad", ["none", "nan", "infinite", "weight"])
def test_a_calibration_that_fails_leaves_the_model(item: Pass, bad: str) -> None:
    model = normed()
    batches = [] if bad == "none" else [X.clone()]
    if bad in ("nan", "infinite"):
        batches[0][1, 0, 2, 2] = math.nan if bad == "nan" else math.inf
    if bad == "weight":
        model.get_parameter("4.weight").data[0, 0] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="no batch" if bad == "none" else "NaN or infinite"):
        compress(model, [item], example_inputs=X, task=Task(batches=batches))
    assert all(torch.equal(before[name].nan_to_num(7), t.nan_to_num(7)) for name, t in model.state_dict().items())
    assert not any("_quant" in name for name, _ in model.named_modules())
