"""Models as ONNX: fake-quant nodes as pairs that ONNX Runtime and OpenVINO fuse, float models to rounding."""

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fake_quantized import fake_quantized
from model_zoo import randomize
from onnx import numpy_helper
from torch import Tensor, nn

import fxcompress
from fxcompress.export.placement import OnnxGrid, _saturating
from fxcompress.export.session import OnnxModule
from fxcompress.passes import L1FilterPruner, Lower, Speedup
from fxcompress.quantization.spec import activation_spec, weight_spec
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


def file_of(module: nn.Module) -> onnx.ModelProto:
    (inner,) = (item for item in module.modules() if isinstance(item, OnnxModule))
    return onnx.load_from_string(inner.model.numpy().tobytes())


def optimized(module: nn.Module, path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a model, operators counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(file_of(module).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@torch.no_grad()
def output_step(simulated: nn.Module, x: Tensor) -> float:
    """A 255th of the range of a float result: what a step would be, were it rounded."""
    result = simulated(x)
    return float(result.max() - result.min()) / 255


@pytest.fixture(scope="module")
def convolutions() -> tuple[fxcompress.TracedModule, fxcompress.TracedModule]:
    simulated = fake_quantized(image_net(), IMAGES)
    return simulated, fxcompress.compress(simulated, [Lower(backend="onnx")], example_inputs=IMAGES, progress=False)


# ---- int8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_convolutions_agree_within_a_step(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule], batch: int
) -> None:
    simulated, lowered = convolutions
    x = IMAGES.repeat(2, 1, 1, 1)[:batch]
    assert lowered(x).shape == (batch, 5)
    with torch.no_grad():
        assert float((lowered(x) - simulated(x)).abs().max()) <= output_step(simulated, IMAGES)


def test_every_convolution_is_an_integer_kernel(
    convolutions: tuple[fxcompress.TracedModule, fxcompress.TracedModule], tmp_path: Path
) -> None:
    found = optimized(convolutions[1], tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == 6
    assert not found["Conv"] + found["FusedConv"] + found["NhwcFusedConv"] + found["Gemm"] + found["MaxPool"]
    assert found["QLinearAdd"] == found["QLinearConcat"] == found["QGemm"] == found["NhwcMaxPool"] == 1


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
    with torch.no_grad():
        for x in (TOKENS, TOKENS[:1]):
            assert float((lowered(x) - simulated(x)).abs().max()) <= output_step(simulated, TOKENS)
    found = optimized(lowered, tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 4
    assert found["MatMul"] + found["FusedMatMul"] == 2, "the two products of attention"


def test_openvino_agrees_within_a_step() -> None:
    pytest.importorskip("openvino")
    simulated = fake_quantized(image_net(), IMAGES)
    lowered = fxcompress.compress(simulated, [Lower(backend="openvino")], example_inputs=IMAGES, progress=False)
    pairs = Counter(node.op_type for node in file_of(lowered).graph.node)["QuantizeLinear"]
    assert pairs == sum(item.name.startswith("_quant_activations") for item in simulated.graph.nodes)
    with torch.no_grad():
        for x in (IMAGES, IMAGES[:1]):
            assert float((lowered(x) - simulated(x)).abs().max()) <= output_step(simulated, IMAGES)
    with ThreadPoolExecutor(3) as pool:
        first = lowered(IMAGES)
        assert all(torch.equal(first, other) for other in pool.map(lowered, [IMAGES] * 6))


@pytest.mark.parametrize("function", [F.hardswish, F.silu, F.gelu, F.leaky_relu, torch.sigmoid, torch.tanh])
def test_beyond_an_inner_grid_nothing_changes(function: Callable[[Tensor], Tensor]) -> None:
    end = OnnxGrid.over(-0.3, 2.1)
    inner = _saturating(function, end)

    def rounded(x: Tensor) -> Tensor:
        return ((function(x) / end.scale).round() + end.zero_point).clamp(0, 255)

    x = torch.linspace(-40, 40, 5001, dtype=torch.float64)
    torch.testing.assert_close(rounded(x), rounded(x.clamp(inner.low, inner.high)), rtol=0, atol=1)
    assert inner.high - inner.low < (16 if function is not F.leaky_relu else 35)


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
    for module in (lowered, pickle.loads(pickle.dumps(lowered))):
        found, right = module(**inputs), model(**inputs)
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
    assert os.listdir(tmp_path) == ["directory"]


def test_a_missing_package_is_named_with_its_extra() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import torch, fxcompress; from fxcompress.passes import Lower\n"
        "try: fxcompress.compress(torch.nn.Linear(2, 2), [Lower('onnx', 'float32')], example_inputs=torch.ones(2, 2))\n"
        "except fxcompress.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'fxcompress[onnx]'" in done.stdout
