"""Models as ONNX: float ones to rounding, files and modules, bad input."""

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fake_quantized import fake_quantized
from onnx import numpy_helper
from onnx_cases import (
    IMAGES,
    ROOT,
    TOKENS,
    block,
    file_of,
    image_net,
    optimized,
)
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, LevelPruner, Lower, PTQQuantizer, Speedup
from fxcompress.quantization.spec import activation_spec, weight_spec
from fxcompress.verify import difference

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


class Scaled(nn.Module):
    """With an input of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_inputs_of_any_layout_and_of_no_dimensions(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model, x, scale = Scaled().eval(), torch.randn(6, 5).t().requires_grad_(), torch.tensor(3.0)
    lower = Lower(backend=backend, dtype="float32")
    lowered = fxcompress.compress(model, [lower], example_inputs=(torch.randn(2, 6), scale), progress=False)
    found = lowered(x, scale)
    assert not found.requires_grad
    torch.testing.assert_close(found, model(x, scale).detach())


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
