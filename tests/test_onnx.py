"""Models as ONNX: fake-quant nodes as pairs that ONNX Runtime and OpenVINO fuse, float models to rounding."""

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fake_quantized import fake_quantized
from model_zoo import calibrate, randomize
from onnx import numpy_helper
from torch import Tensor, nn

import fxcompress
from fxcompress.export.agreement import compare, tapped
from fxcompress.export.graph_editor import OnnxGrid
from fxcompress.export.openvino_rounding import join_pairs
from fxcompress.export.placement import _gate, _saturating
from fxcompress.export.session import OnnxModule
from fxcompress.inputs import Inputs
from fxcompress.passes import L1FilterPruner, LevelPruner, Lower, PTQQuantizer, Speedup
from fxcompress.quantization.fake_quantize import fake_quant_nodes
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec
from fxcompress.verify import difference

ROOT = Path(fxcompress.__file__).parents[1]


class Convolutions(nn.Module):
    """BatchNorm, ReLU, a residual sum, depthwise, Hardswish, ReLU6, SiLU, a join, both poolings, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.one_norm = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.left, self.right = nn.Conv2d(12, 7, 1), nn.Conv2d(12, 9, 3, padding=1)
        self.last = nn.Conv2d(16, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.one_norm(self.one(x)) + x)
        x = F.hardswish(self.depthwise(x))
        x = F.relu6(self.last(torch.cat([F.relu(self.left(x)), F.silu(self.right(x))], 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """A block of a transformer over [N, T, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def image_net() -> nn.Module:
    model = Convolutions().eval()
    randomize(model, 3)
    return model


def block() -> nn.Module:
    model = Attention().eval()
    randomize(model, 4)
    return model


IMAGES, TOKENS = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(1)), torch.randn(3, 7, 12)


def inner(module: nn.Module) -> OnnxModule:
    (found,) = (item for item in module.modules() if isinstance(item, OnnxModule))
    return found


def file_of(module: nn.Module) -> onnx.ModelProto:
    return onnx.load_from_string(inner(module).file())


def optimized(module: nn.Module, path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a model, operators counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(file_of(module).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def roundings(simulated: fxcompress.TracedModule) -> set[str]:
    return {node.name for node, item in fake_quant_nodes(simulated) if item.spec.role == "activation"}


@pytest.fixture(scope="module")
def convolutions() -> tuple[fxcompress.TracedModule, fxcompress.TracedModule]:
    simulated = fake_quantized(image_net(), IMAGES)
    return simulated, fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


# ---- int8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_every_rounding_agrees_with_the_simulation(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule], batch: int
) -> None:
    simulated, lowered = convolutions
    x = IMAGES.repeat(2, 1, 1, 1)[:batch]
    assert inner(lowered).signature.rounded.keys() == roundings(simulated)
    compare(simulated, inner(lowered), Inputs.parse(x), batched=False, what="the result")
    result, integers = tapped(inner(lowered))(x)
    assert torch.equal(lowered(x), result), "what was compared is what runs"
    assert all(item.dtype == torch.uint8 and len(item) == batch for item in integers.values())


def test_only_coarser_grids_inside_a_block_allow_more_than_a_step(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule],
) -> None:
    lowered = convolutions[1]
    rounded = inner(lowered).signature.rounded
    stored = {item.name: numpy_helper.to_array(item) for item in file_of(lowered).graph.initializer}
    nodes = list(file_of(lowered).graph.node)
    (silu,) = (node.output[0] for node in nodes if node.op_type == "Mul")
    end = next(node for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == silu)
    entering = next(node for node in nodes if node.op_type == "Sigmoid").input[0]
    inside = next(node for node in nodes if entering in node.output)
    slope = 1.0998  # of SiLU, at 2.4
    moved = slope * stored[inside.input[1]] / 2 / stored[end.input[1]]
    (allowed,) = (item.steps for item in rounded.values() if item.value == end.output[0])
    assert allowed == 1 + int(moved) == 2
    exact = {"_quant_activations_x", "_quant_activations_relu", "_quant_activations_relu_2", "_quant_activations_relu6"}
    assert all(rounded[name].steps == 1 for name in exact)


def test_a_block_that_computes_something_else_is_found(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule],
) -> None:
    simulated, lowered = copy.deepcopy(convolutions[0]), convolutions[1]
    step = simulated.get_submodule("_quant.activations.relu6").get_buffer("scale")
    with torch.no_grad():
        simulated.get_parameter("last.bias").add_(3 * step)
    with pytest.raises(
        fxcompress.VerificationError, match=r"by \d quantization steps at node _quant_activations_relu6"
    ):
        compare(simulated, inner(lowered), Inputs.parse(IMAGES), batched=True, what="the result")
    simulated = copy.deepcopy(convolutions[0])
    with torch.no_grad():
        simulated.get_parameter("fc.bias").mul_(1.1)
    with pytest.raises(fxcompress.VerificationError, match="of the largest value"):
        compare(simulated, inner(lowered), Inputs.parse(IMAGES), batched=True, what="the result")


def test_every_convolution_is_an_integer_kernel(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule], tmp_path: Path
) -> None:
    found = optimized(convolutions[1], tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 6
    assert not found["Conv"] + found["FusedConv"] + found["NhwcFusedConv"] + found["Gemm"] + found["MaxPool"]
    assert found["QLinearAdd"] == found["QLinearConcat"] == found["QGemm"] == found["NhwcMaxPool"] == 1
    assert (found["QLinearSigmoid"], found["QLinearMul"], found["QLinearGlobalAveragePool"]) == (1, 1, 1)
    assert not found["Sigmoid"] + found["ReduceMean"]


class Dense(nn.Module):
    """A dense block: a ReLU on a shared grid, BatchNorm behind joins, pooling by means, a mean without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(14)
        self.last, self.fc = nn.Conv2d(14, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = torch.cat([x, self.grow(F.relu(self.first(x)))], 1)
        x = F.avg_pool2d(self.last(F.relu(self.second(x))), 2)
        return self.fc(x.mean((2, 3)))


def test_norms_and_means_between_grids_are_integer_kernels(tmp_path: Path) -> None:
    model = Dense().eval()
    randomize(model, 9)
    with torch.no_grad():  # channels that are constant, and turned round
        model.second.weight[:2], model.second.weight[2:5] = 0, -1
    simulated = fake_quantized(model, IMAGES)
    lowered = fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)
    rounded = inner(lowered).signature.rounded
    assert {name: item.steps for name, item in rounded.items()} == dict.fromkeys(roundings(simulated), 1)
    found = optimized(lowered, tmp_path / "optimized.onnx")
    assert (found["QLinearConv"], found["QLinearGlobalAveragePool"], found["NhwcMaxPool"]) == (3 + 2 + 1, 1, 1)
    assert (found["QLinearLeakyRelu"], found["Transpose"], found["QuantizeLinear"]) == (1, 2, 1)
    assert not {"BatchNormalization", "AveragePool", "ReduceMean", "Relu", "MaxPool"} & found.keys()


def test_weights_are_stored_as_integers_per_channel(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule],
) -> None:
    _, lowered = convolutions
    graph = file_of(lowered).graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    used = {name for node in graph.node for name in node.input}
    assert stored.keys() <= used
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert len(layers) == 6
    kinds = []
    for node in layers:
        weight, bias = makers[node.input[1]], makers[node.input[2]]
        integers, scale = stored[weight.input[0]], stored[weight.input[1]]
        assert integers.dtype == np.int8
        assert scale.shape == integers.shape[:1]
        assert stored[bias.input[0]].dtype == np.int32
        entering = stored[makers[node.input[0]].input[1]]
        np.testing.assert_allclose(stored[bias.input[1]], scale * entering, rtol=1e-6)
        kinds.append(integers.shape)
    assert (12, 1, 3, 3) in kinds
    assert not any(array.dtype == np.float32 and array.ndim > 1 for array in stored.values())
    text = file_of(lowered).SerializeToString()
    assert str(ROOT).encode() not in text, "no paths of the machine that wrote it"


def test_attention_agrees_within_a_step(tmp_path: Path) -> None:
    simulated = fake_quantized(block(), TOKENS)
    lowered = fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=TOKENS, progress=False)
    assert {name: item.steps for name, item in inner(lowered).signature.rounded.items()} == dict.fromkeys(
        roundings(simulated), 1
    )
    with torch.no_grad():
        for x in (TOKENS, TOKENS[:1]):
            assert difference(simulated(x), lowered(x)) < 1e-5, "no grids inside blocks, and nothing lies on an edge"
    found = optimized(lowered, tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 4
    assert found["MatMul"] + found["FusedMatMul"] == 2, "the two products of attention"
    assert found["BiasGelu"] + found["Gelu"] == 1


class Normalized(nn.Module):
    """A norm behind a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + self.fc(x)))


def test_a_sum_is_not_fused_with_its_norm(tmp_path: Path) -> None:
    simulated = fake_quantized(Normalized(), TOKENS)
    gap, found = in_plain_session(simulated, TOKENS, tmp_path)
    assert gap < 1e-5
    assert (found["Sum"], found["LayerNormalization"], found["SkipLayerNormalization"]) == (1, 1, 0)


def in_plain_session(simulated: fxcompress.TracedModule, x: Tensor, folder: Path) -> tuple[float, Counter[str]]:
    """How far a file is from the simulation in a session with default options, and what that makes of it."""
    path, best = folder / "model.onnx", folder / "optimized.onnx"
    fxcompress.export_onnx(simulated, path, example_inputs=x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(best), 3
    session = onnxruntime.InferenceSession(path, options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        gap = difference(simulated(x), torch.from_numpy(found))
    return gap, Counter(node.op_type for node in onnx.load(best).graph.node)


def test_layers_with_float_weights_stay_float(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 1, 3), nn.Conv2d(1, 6, 3, bias=False), nn.ConvTranspose2d(6, 5, 2)]
    model = nn.Sequential(*(item for layer in layers for item in (layer, nn.ReLU())), nn.Flatten())
    model.extend([nn.Linear(605, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)])
    randomize(model, 5)
    simulated = fake_quantized(model, IMAGES, weight=None)
    assert len(roundings(simulated)) >= 5
    gap, found = in_plain_session(simulated, IMAGES, tmp_path)
    assert gap < 1e-5
    assert not {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul"} & found.keys()
    fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


class Residual(nn.Module):
    """A residual sum; the weights of one convolution stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left_float, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(F.relu(self.last(F.relu(self.left_float(x))) + x).mean((2, 3)))


def test_a_float_layer_among_integer_ones_stays_float(tmp_path: Path) -> None:
    model = Residual().eval()
    randomize(model, 6)
    simulated = fxcompress.compress(model, [PTQQuantizer(exclude="left_float")], example_inputs=IMAGES, progress=False)
    _, found = in_plain_session(simulated, IMAGES, tmp_path)
    assert (found["QLinearConv"], found["Conv"] + found["FusedConv"], found["QLinearAdd"]) == (2, 1, 1)
    fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


@pytest.mark.parametrize("weight", [weight_spec(8), replace(weight_spec(8), axis=None)])
def test_a_bias_that_dwarfs_its_weights_fits_int32(weight: QuantSpec, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU())
    model.extend([nn.Flatten(), nn.Linear(400, 7), nn.ReLU(), nn.Linear(7, 3)])
    randomize(model, 7)
    with torch.no_grad():  # a dead BatchNorm's channel, and whole layers
        for layer in (model[1], model[6]):
            layer.get_parameter("weight")[0], layer.get_parameter("bias")[0] = 1e-9, 0.5
        model[3].get_parameter("weight").mul_(1e-10)
    simulated = fake_quantized(model, IMAGES, weight=weight)
    gap, found = in_plain_session(simulated, IMAGES, tmp_path)
    assert gap < 1e-4
    assert (found["QLinearConv"], found["QGemm"]) == (2, 2)
    fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


def test_openvino_agrees_within_a_step() -> None:
    pytest.importorskip("openvino")
    simulated = fake_quantized(image_net(), IMAGES)
    lowered = fxcompress.compress(simulated, [Lower(backend="openvino")], example_inputs=IMAGES, progress=False)
    pairs = Counter(node.op_type for node in file_of(lowered).graph.node)["QuantizeLinear"]
    assert pairs == sum(item.name.startswith("_quant_activations") for item in simulated.graph.nodes)
    assert {name: item.steps for name, item in inner(lowered).signature.rounded.items()} == dict.fromkeys(
        roundings(simulated), 1
    )
    with ThreadPoolExecutor(3) as pool:
        first = lowered(IMAGES)
        assert all(torch.equal(first, other) for other in pool.map(lowered, [IMAGES] * 6))


class Dense(nn.Module):
    """A norm behind a join, and a gate whose image has two readers: where OpenVINO keeps conversions to float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.gate = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
        self.mix, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.silu(self.mix(F.relu(self.norm(torch.cat([x, self.more(x)], 1)))))
        return self.last(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).flatten(1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_openvino_has_no_conversions_between_kernels(symmetric: bool) -> None:
    openvino = pytest.importorskip("openvino")
    model = Dense().eval()
    randomize(model, 8)
    passes = [PTQQuantizer(symmetric=symmetric), Lower(backend="openvino")]
    lowered = fxcompress.compress(model, passes, example_inputs=IMAGES, progress=False)
    read = openvino.Core().read_model(inner(lowered).file())
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    (as_read,) = openvino.compile_model(read, "CPU", options)([IMAGES.numpy()]).values()
    assert join_pairs(read) == len(inner(lowered).signature.rounded) >= 7
    made = openvino.compile_model(read, "CPU", options)
    kinds = [str(item.get_rt_info()["layerType"].astype(str)) for item in made.get_runtime_model().get_ops()]
    assert "FakeQuantize" in kinds
    assert "Convert" not in kinds
    (joined,) = made([IMAGES.numpy()]).values()
    step = np.abs(as_read).max() / 127
    np.testing.assert_allclose(joined, as_read, rtol=0, atol=step)
    assert (np.abs(joined - as_read) > step / 100).mean() < 0.1, "an integer on an edge, here and there"
    np.testing.assert_array_equal(lowered(IMAGES).numpy(), joined)


def test_only_pairs_of_constants_are_joined() -> None:
    openvino, operators = pytest.importorskip("openvino"), pytest.importorskip("openvino.opset13")
    x, scale = operators.parameter([2, 3], np.float32), operators.parameter([], np.float32)
    limits = [operators.constant(np.float32(value)) for value in (-1, 1, 0, 255)]
    integers = operators.convert(operators.fake_quantize(x, *limits, 256), "u8")
    shifted = operators.subtract(operators.convert(integers, "f32"), operators.constant(np.float32(128)))
    model = openvino.Model([operators.multiply(shifted, scale)], [x, scale])
    assert join_pairs(model) == 0
    assert model.get_results()[0].input_value(0).get_node().get_type_name() == "Multiply"


@pytest.mark.parametrize("function", [F.hardswish, F.silu, F.gelu, F.leaky_relu, torch.sigmoid, torch.tanh])
def test_beyond_an_inner_grid_nothing_changes(function: Callable[[Tensor], Tensor]) -> None:
    end = OnnxGrid.over(-0.3, 2.1)
    inside, slope = _saturating(function, end)

    def rounded(x: Tensor) -> Tensor:
        return ((function(x) / end.scale).round() + end.zero_point).clamp(0, 255)

    x = torch.linspace(-40, 40, 5001, dtype=torch.float64)
    torch.testing.assert_close(rounded(x), rounded(x.clamp(inside.low, inside.high)), rtol=0, atol=1)
    steepest = (function(x).diff() / x.diff()).abs().max()
    torch.testing.assert_close(slope, float(steepest), rtol=1e-2, atol=0)
    assert inside.high - inside.low < (16 if function is not F.leaky_relu else 35)


def silu_block(high: float) -> tuple[fxcompress.TracedModule, Tensor]:
    """A convolution and SiLU in front of another, whose results reach up to about ``high``."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.ReLU()).eval(), IMAGES
    with torch.no_grad():
        model[0].weight.mul_(high / float(model[0](x).max()))
        model[0].bias.mul_(high / float(model[0](x).max()))
    return fake_quantized(model, x), x


@pytest.mark.parametrize("high, kept", [(0.5, "Sigmoid"), (4.0, "QLinearSigmoid"), (20.0, "QLinearSigmoid")])
def test_a_sigmoid_is_rounded_where_it_moves_less_than_a_step(high: float, kept: str, tmp_path: Path) -> None:
    simulated, x = silu_block(high)
    lowered = fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=x, progress=False)
    found = optimized(lowered, tmp_path / "optimized.onnx")
    assert {kind for kind in found if "Sigmoid" in kind} == {kept}


@pytest.mark.parametrize("high", [0.5, 2.0, 4.0, 20.0])
def test_what_a_rounded_sigmoid_moves_is_known(high: float) -> None:
    inside, _ = _saturating(F.silu, OnnxGrid.over(-0.28, high))
    grid, alone, together = _gate(inside)
    x = torch.linspace(inside.low, inside.high, 300001, dtype=torch.float64)
    rounded = (x / inside.scale).round() * inside.scale
    found = rounded * (torch.sigmoid(rounded) / grid.scale).round().clamp(0, 255) * grid.scale
    torch.testing.assert_close(float((found - F.silu(x)).abs().max()), together, rtol=1e-2, atol=0)
    torch.testing.assert_close(float((found - F.silu(rounded)).abs().max()), alone, rtol=1e-9, atol=0)


# ---- float -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_float_and_pruned_models_agree_to_rounding(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = image_net()
    pruned = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=IMAGES, progress=False)
    lower = Lower(backend=backend, dtype="float32")
    lowered = fxcompress.compress(pruned, [lower], example_inputs=IMAGES, progress=False)
    with torch.no_grad():
        for x in (IMAGES, IMAGES[:1], IMAGES.repeat(2, 1, 1, 1)):
            assert difference(pruned(x), lowered(x)) < 1e-5


@pytest.mark.parametrize("pruner", [L1FilterPruner(0.5), LevelPruner(0.5)])
def test_masks_are_folded(pruner: fxcompress.Pass, tmp_path: Path) -> None:
    masked = fxcompress.compress(image_net(), [pruner], example_inputs=IMAGES, progress=False)
    fxcompress.export_onnx(masked, tmp_path / "masked.onnx", example_inputs=IMAGES[:2])
    graph = onnx.load(tmp_path / "masked.onnx").graph
    stored = [numpy_helper.to_array(item) for item in graph.initializer]
    weights = [item for item in stored if item.ndim > 1 and item.shape[0] > 1]
    assert len(weights) == 7, "each once"
    assert sum((item == 0).sum() for item in weights) >= 0.4 * sum(item.size for item in weights)
    session = onnxruntime.InferenceSession(tmp_path / "masked.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": IMAGES.numpy()})
    with torch.no_grad():
        assert difference(masked(IMAGES), torch.from_numpy(found)) < 1e-5


def test_masked_and_quantized(tmp_path: Path) -> None:
    passes = [L1FilterPruner(0.5), PTQQuantizer(), Lower(backend="onnx")]
    lowered = fxcompress.compress(image_net(), passes, example_inputs=IMAGES, progress=False)
    assert not [item.name for item in file_of(lowered).graph.initializer if "mask" in item.name]
    assert optimized(lowered, tmp_path / "optimized.onnx")["QLinearConv"] == 6


def test_a_batch_of_one_is_no_constant(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))  # whose argument is called as a built-in function
    fxcompress.export_onnx(model, tmp_path / "a.onnx", example_inputs=torch.randn(1, 3, 4))
    (entry,) = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    assert (entry.name, entry.shape) == ("input", ["batch", 3, 4])


class Branching(nn.Module):
    """Another result in train mode, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.dropout(self.fc(x), 0.9, self.training)
        return (x, 2 * x) if self.training else x


def test_a_model_in_train_mode_is_written_in_eval_mode(tmp_path: Path) -> None:
    model, x = Branching().train(), torch.randn(2, 6)
    fxcompress.export_onnx(model, tmp_path / "a.onnx", example_inputs=x)
    assert model.training
    (found,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x.numpy()})
    with torch.no_grad():
        assert difference(model.eval()(x), torch.from_numpy(found)) < 1e-5


class Nested(nn.Module):
    """Keyword arguments, nested inputs, a constant, and a result with the same tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, unused: Any = None, k: int = 2, *, y: Any = None) -> dict[str, Any]:
        a = self.fc(x) * k + y["v"]
        return {"a": a, "n": None, "t": (a, a + 1, 3)}


def test_nested_inputs_and_results() -> None:
    model = Nested().eval()
    inputs = {"x": torch.randn(2, 6), "k": 3, "y": {"v": torch.randn(2, 5)}}
    lower = Lower(backend="onnx", dtype="float32")
    lowered = fxcompress.compress(model, [lower], example_inputs=inputs, progress=False)
    with torch.no_grad():
        right = model(**inputs)
    for module in (lowered, pickle.loads(pickle.dumps(lowered))):
        found = module(**inputs)
        assert found["n"] is None
        assert found["t"][2] == 3
        assert difference(right, found) < 1e-5
    with pytest.raises(fxcompress.InputError, match="part of it"):
        lowered(**{**inputs, "k": 4})


def test_a_file_runs_at_any_batch_size(tmp_path: Path) -> None:
    model, path = block(), tmp_path / "model.onnx"
    before = copy.deepcopy(model.state_dict())
    path.write_bytes(b"old")
    fxcompress.export_onnx(model, path, example_inputs=TOKENS[:1])
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.shape) == ("x", ["batch", 7, 12])
    for batch in (1, 2, 3):
        (found,) = session.run(None, {"x": TOKENS[:batch].numpy()})
        assert difference(model(TOKENS[:batch]).detach(), torch.from_numpy(found)) < 1e-5


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_another_size_than_the_written_one_is_named(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    lower = Lower(backend=backend, dtype="float32")
    lowered = fxcompress.compress(model, [lower], example_inputs=torch.randn(2, 3, 12, 12), progress=False)
    for shape in ((5, 3, 33, 20), (3, 12, 12)):
        with pytest.raises(
            fxcompress.InputError, match=rf"{re.escape(str(shape))}; this model was written for \(any, 3, 12, 12\)"
        ):
            lowered(torch.randn(shape))
    assert lowered(torch.randn(5, 3, 12, 12)).shape == (5, 4, 10, 10)


# ---- an ordinary module ----------------------------------------------------------------------------------------


def test_copies_pickles_state_and_threads(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule], tmp_path: Path
) -> None:
    _, lowered = convolutions
    right = lowered(IMAGES)
    assert not right.requires_grad
    copies = [copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), copy.copy(lowered)]
    torch.save(lowered.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(lowered)
    other.get_buffer("onnxruntime.model").zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(right, module(IMAGES)) for module in (*copies, other))
    fresh = copy.deepcopy(lowered)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(right, found) for found in pool.map(fresh, [IMAGES] * 8))


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [({"weight": weight_spec(8), "activation": activation_spec(4, None)}, "4 bits .* can run activations of 8 bits")],
)
def test_a_spec_that_cannot_be_run_is_named(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    simulated = fake_quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES, **options)
    with pytest.raises(fxcompress.PassError, match=match):
        fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)
    with pytest.raises(fxcompress.PassError, match=match):
        fxcompress.export_onnx(simulated, tmp_path / "model.onnx", example_inputs=IMAGES)
    assert not os.listdir(tmp_path)


def test_arguments_and_models_that_cannot_be_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(fxcompress.PassError, match="no fake-quant node"):
        fxcompress.compress(model, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)
    simulated = fake_quantized(model, IMAGES)
    with pytest.raises(fxcompress.PassError, match="dtype='int8'"):
        fxcompress.compress(simulated, [Lower("onnx", "float32")], example_inputs=IMAGES, progress=False)
    with pytest.raises(fxcompress.InputError, match="'torch', 'onnx' or 'openvino'"):
        Lower(backend="tensorrt")
    with pytest.raises(fxcompress.InputError, match="bfloat16"):
        Lower(backend="onnx", dtype="bfloat16")
    with pytest.raises(fxcompress.InputError, match="runtime is 'tvm'"):
        fxcompress.export_onnx(model, tmp_path / "a.onnx", example_inputs=IMAGES, runtime="tvm")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="missing"):
        fxcompress.export_onnx(model, tmp_path / "missing" / "a.onnx", example_inputs=IMAGES)
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        fxcompress.export_onnx(model, tmp_path / "directory", example_inputs=IMAGES)
    with pytest.raises(fxcompress.InputError, match=r"expected a torch.nn.Module"):
        fxcompress.export_onnx(max, tmp_path / "a.onnx", example_inputs=IMAGES)  # type: ignore[arg-type]
    for path in (None, "", ".", 3):
        with pytest.raises(fxcompress.InputError, match=f"path is {path!r}; expected the name of a file"):
            fxcompress.export_onnx(model, path, example_inputs=IMAGES)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["directory"]


class Halves(nn.Module):
    """A parameter that is split in the graph, which the exporter does not fold and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.weight.chunk(2)
        return F.linear(x, one) * F.linear(x, other)


def test_the_exporter_keeps_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("onnxscript").level
    fxcompress.export_onnx(Halves(), tmp_path / "a.onnx", example_inputs=torch.randn(2, 4))
    assert not [item.getMessage() for item in caplog.records if item.levelno >= logging.WARNING]
    assert logging.getLogger("onnxscript").level == level


def test_a_missing_package_is_named_with_its_extra() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import torch, fxcompress; from fxcompress.passes import Lower\n"
        "try: fxcompress.compress(torch.nn.Linear(2, 2), [Lower('onnx', 'float32')], example_inputs=torch.ones(2, 2))\n"
        "except fxcompress.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'fxcompress[onnx]'" in done.stdout


# ---- models as they are published ------------------------------------------------------------------------------


def encoder() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertModel(config).eval(), torch.randint(0, 100, (2, 12))


def transformer() -> tuple[nn.Module, Tensor]:
    import torchvision  # after the test helper that makes it importable

    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    randomize(model, 0)
    return model, torch.randn(2, 3, 32, 32)


def published(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    torch.manual_seed(0)
    if name in ("encoder", "transformer"):
        return {"encoder": encoder, "transformer": transformer}[name]()
    size = 224 if name == "vit_b_16" else 64
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, size, size)
    randomize(model, 0)
    calibrate(model, x)
    return model, x


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "name",
    """encoder transformer resnet18 mobilenet_v2 mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 densenet121
    vit_b_16""".split(),
)
def test_published_models_agree_rounding_by_rounding(name: str, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model, x = published(name)
    simulated = fake_quantized(model, x)
    lowered = fxcompress.compress(simulated, [Lower(backend=backend)], example_inputs=x, progress=False)
    rounded = inner(lowered).signature.rounded
    assert rounded.keys() == roundings(simulated)
    most = {"onnx": 4, "openvino": 1}[backend]
    assert max(item.steps for item in rounded.values()) <= most
    print(name, backend, *lowered.meta["history"][-1].notes)


@pytest.mark.long
@pytest.mark.parametrize("name", ["encoder", "transformer", "mobilenet_v3_large", "shufflenet_v2_x1_0", "densenet121"])
def test_published_float_models_agree_to_rounding(name: str) -> None:
    model, x = published(name)
    lower = Lower(backend="onnx", dtype="float32")  # which compares at two batch sizes
    lowered = fxcompress.compress(model, [lower], example_inputs=x, progress=False)
    with torch.no_grad():
        assert difference(model(x), lowered(x)) < 1e-5
