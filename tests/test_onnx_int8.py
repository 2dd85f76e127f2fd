"""Fake-quant nodes as pairs that ONNX Runtime and OpenVINO fuse."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fake_quantized import fake_quantized
from model_zoo import randomize
from onnx import numpy_helper
from onnx_cases import (
    IMAGES,
    ROOT,
    TOKENS,
    block,
    file_of,
    image_net,
    inner,
    kernels,
    optimized,
    roundings,
)
from torch import Tensor, nn

import fxcompress
from fxcompress.export.agreement import compare, tapped
from fxcompress.export.graph_editor import OnnxGrid
from fxcompress.export.openvino_graph import drop_zero_points, join_pairs, sums_convolutions
from fxcompress.export.placement import _gate, _saturating
from fxcompress.inputs import Inputs
from fxcompress.passes import Lower, PTQQuantizer
from fxcompress.quantization.spec import QuantSpec, weight_spec
from fxcompress.verify import difference


@pytest.fixture(scope="module")
def convolutions() -> tuple[fxcompress.TracedModule, fxcompress.TracedModule]:
    simulated = fake_quantized(image_net(), IMAGES)
    return simulated, fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


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


class Tables(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(13, 7), nn.Linear(7, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.mix(self.words(tokens)).relu(), self.words.weight)


def test_tables_are_stored_as_integers_per_row() -> None:
    model, tokens = Tables().eval(), torch.arange(15).reshape(3, 5) % 13
    randomize(model, 4)
    simulated = fxcompress.compress(model, [PTQQuantizer(embeddings=True)], example_inputs=tokens, progress=False)
    lowered = fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=tokens, progress=False)
    compare(simulated, inner(lowered), Inputs.parse(tokens), batched=False, what="the result")
    with torch.no_grad():
        for given in (tokens.flip(1), tokens[:1]):
            assert difference(simulated(given), lowered(given)) < 1e-5, "nothing lies on an edge"
    graph = file_of(lowered).graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    gathered = [stored[node.input[0]] for node in graph.node if node.op_type == "Gather"]
    assert sorted((array.dtype.name, array.shape) for array in gathered) == [("float32", (13, 1)), ("int8", (13, 7))]
    assert not any(array.dtype == np.float32 and array.size >= 13 * 7 for array in stored.values())


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
    """A residual sum; the weights of one convolution are left float by some tests."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem, self.left_float = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1, bias=bias)
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


@pytest.mark.parametrize("bias", [False, True])
def test_openvino_adds_residuals_in_integer_convolutions(bias: bool) -> None:
    openvino = pytest.importorskip("openvino")
    model = Residual(bias).eval()
    randomize(model, 9)
    lowered = fxcompress.compress(
        model, [PTQQuantizer(), Lower(backend="openvino")], example_inputs=IMAGES, progress=False
    )
    lowered(IMAGES)
    (compiled,) = inner(lowered)._ready().compiled.values()
    found = kernels(compiled)
    assert set(found["Convolution"]) <= {"u8", "i8"}
    assert not {"Subgraph", "Eltwise"} & found.keys()

    read = openvino.Core().read_model(inner(lowered).file())
    assert sums_convolutions(read)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    passes = [Lower(backend="openvino", dtype="float32")]
    other = fxcompress.compress(plain, passes, example_inputs=IMAGES, progress=False)
    assert not sums_convolutions(openvino.Core().read_model(inner(other).file())), "a bias is no residual"


class GatedBlock(nn.Module):
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
    model = GatedBlock().eval()
    randomize(model, 8)
    passes = [PTQQuantizer(symmetric=symmetric), Lower(backend="openvino")]
    lowered = fxcompress.compress(model, passes, example_inputs=IMAGES, progress=False)
    read = openvino.Core().read_model(inner(lowered).file())
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    (as_read,) = openvino.compile_model(read, "CPU", options)([IMAGES.numpy()]).values()
    assert join_pairs(read) == len(inner(lowered).signature.rounded) >= 7
    assert drop_zero_points(read) == 5, "the weights of each layer"
    read.reshape({0: list(IMAGES.shape)})
    made = openvino.compile_model(read, "CPU", options)
    ran = kernels(made)
    assert not ran["Convert"]
    assert len(ran["Convolution"]) == 5
    assert set(ran["Convolution"]) <= {"i8", "u8"}
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


def test_only_differences_from_zero_that_keep_the_shape_are_dropped() -> None:
    openvino, operators = pytest.importorskip("openvino"), pytest.importorskip("openvino.opset13")
    x = operators.parameter([-1, 3], np.float32)
    zeros = [np.zeros((), np.float32), np.zeros((1, 3), np.float32), np.zeros((5, 3), np.float32), np.eye(3)[:1]]
    differences = [operators.subtract(x, operators.constant(zero.astype(np.float32))) for zero in zeros]
    model = openvino.Model([operators.negative(item) for item in differences], [x])
    assert drop_zero_points(model) == 2
    read = [item.input_value(0).get_node().input_value(0).get_node().get_type_name() for item in model.get_results()]
    assert read == ["Parameter", "Parameter", "Subtract", "Subtract"]


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
