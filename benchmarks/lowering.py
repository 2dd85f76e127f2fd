"""How fast lowered models are: processor time of a forward pass, as a multiple of torch's eager float32.

One thread, 224x224 (64 tokens for the encoder). All columns of a model take turns in every round; each time is divided
into that of eager float32 in the same round, and the medians of these gains are shown. Columns whose package is not
installed are left out. Ranges of the fake-quantized model are those of the input: time does not depend on them.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from time import process_time
from typing import Any

import model_zoo
import torch
import torchvision
from fake_quantized import fake_quantized
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import Lower

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "vgg11_bn",
    "densenet121",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "vit_b_16",
    "bert, 2 layers",
)
Call = Callable[[], Any]


def prepared(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model with drawn weights, and its input."""
    torch.manual_seed(0)
    if name.startswith("bert"):
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(num_hidden_layers=2)).eval(), torch.randint(0, 30000, (batch, 64))
    model = torchvision.models.get_model(name, weights=None).eval()
    model_zoo.randomize(model, 0)
    model_zoo.calibrate(model, torch.randn(1, 3, 224, 224))
    return model, torch.randn(batch, 3, 224, 224)


def onnx_runtime(model: nn.Module, x: Tensor) -> Call:
    """ONNX Runtime on one thread."""
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)  # pyright: ignore[reportArgumentType] - a file, too
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino(model: nn.Module, x: Tensor) -> Call:
    """OpenVINO, float32, on one thread."""
    import openvino as ov

    converted = ov.convert_model(model, example_input=x)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(converted, "CPU", options)
    array = x.numpy()
    return lambda: compiled(array)


def lowered(model: nn.Module, x: Tensor, dtype: str) -> Call:
    """The model through :class:`Lower`."""
    source = fake_quantized(model, x) if dtype == "int8" else model
    made = fxcompress.compress(source, [Lower(dtype=dtype)], example_inputs=x, verify=False, progress=False)
    return lambda: made(x)


def columns(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """What is compared, ready to be called."""
    compiled = torch.compile(model)
    made: dict[str, Call] = {"eager": lambda: model(x), "torch.compile": lambda: compiled(x)}
    if find_spec("onnxruntime"):
        made["ONNX Runtime"] = onnx_runtime(model, x)
    if find_spec("openvino"):
        made["OpenVINO"] = openvino(model, x)
    for dtype in ("float32", "bfloat16", "int8"):
        made[f"Lower {dtype}"] = lowered(model, x, dtype)
    return made


@torch.no_grad()
def gains(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each, and median gain over eager."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = process_time()
            call()
            if turn > 1:  # the first passes pack, compile and allocate
                seconds[name].append(process_time() - start)
    eager = seconds["eager"]
    return {
        name: (median(times) * 1e3, median(e / t for e, t in zip(eager, times, strict=True)))
        for name, times in seconds.items()
    }


def lowering(rounds: int, names: tuple[str, ...] = MODELS, batches: tuple[int, ...] = (1, 8)) -> Table:
    """A row for each model and batch size."""
    table = Table(title="Lowering: times eager float32", box=box.SIMPLE)
    header: list[str] = []
    for name in track(names, "lowering", transient=True):
        for batch in batches:
            model, x = prepared(name, batch)
            found = gains(columns(model, x), max(rounds, 10))
            if not header:
                header = ["model", "batch", "eager", *list(found)[1:]]
                for title in header:
                    table.add_column(title, justify="right" if title != "model" else "left", no_wrap=True)
            cells = [f"{gain:.1f}" for key, (_, gain) in found.items() if key != "eager"]
            table.add_row(name, str(batch), f"{found['eager'][0]:.0f} ms", *cells)
            torch.compiler.reset()
            gc.collect()
    return table
