"""How fast exported int8 models are in ONNX Runtime and OpenVINO, beside what the runtimes' own quantizers make.

As :mod:`benchmarks.lowering` measures: one thread, all columns take turns, times eager float32. The own quantizers are
``onnxruntime.quantization.quantize_static`` (QDQ, per channel, after its pre-processing) and ``nncf.quantize``, both
calibrated on the input. Columns whose package is not installed are left out.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from fake_quantized import fake_quantized
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from benchmarks.lowering import Call, gains, prepared
from fxcompress.passes import Lower

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")


class _Once:
    """An input to calibrate with, as ``quantize_static`` reads it."""

    def __init__(self, feed: dict[str, np.ndarray[Any, Any]]) -> None:
        self.feeds: Iterator[dict[str, np.ndarray[Any, Any]]] = iter([feed])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The input, and then no more."""
        return next(self.feeds, None)


def onnx_runtime(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """A float model in ONNX Runtime, and what its own quantizer makes of it."""
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8")]
        fxcompress.export_onnx(model, paths[0], example_inputs=x)
        quant_pre_process(str(paths[0]), str(paths[1]))
        logging.disable(logging.WARNING)
        quantize_static(
            paths[1],
            paths[2],
            _Once({"x": x.numpy()}),  # pyright: ignore[reportArgumentType] - a reader is what has get_next
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        logging.disable(logging.NOTSET)
        for name, path in (("ORT float32", paths[0]), ("ORT quantize_static", paths[2])):
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            calls[name] = _runs(session, {"x": x.numpy()})
    return calls


def _runs(session: Any, feed: dict[str, np.ndarray[Any, Any]]) -> Call:
    return lambda: session.run(None, feed)


def openvino(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """A float model in OpenVINO, and what nncf makes of it."""
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    converted = ov.convert_model(model, example_input=x)
    array = x.numpy()
    made = {"OpenVINO float32": converted}
    if find_spec("nncf"):
        import nncf

        nncf.set_log_level(logging.ERROR)
        made["nncf"] = nncf.quantize(converted, nncf.Dataset([array]), subset_size=1)
    compiled = {name: ov.compile_model(item, "CPU", options).create_infer_request() for name, item in made.items()}
    return {name: _infers(request, array) for name, request in compiled.items()}


def _infers(request: Any, array: np.ndarray[Any, Any]) -> Call:
    return lambda: request.infer([array])


def columns(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """What is compared, ready to be called."""
    made: dict[str, Call] = {"eager": lambda: model(x)}
    simulated = fake_quantized(model, x)
    for backend, package, own in (("onnx", "onnxruntime", onnx_runtime), ("openvino", "openvino", openvino)):
        if find_spec(package):
            made |= own(model, x)
            made[f"Lower {backend}"] = _lowered(simulated, x, backend)
    return made


def _lowered(simulated: nn.Module, x: Tensor, backend: str) -> Call:
    made = fxcompress.compress(simulated, [Lower(backend=backend)], example_inputs=x, verify=False, progress=False)
    return lambda: made(x)


def export(rounds: int, names: tuple[str, ...] = MODELS, batches: tuple[int, ...] = (1, 8)) -> Table:
    """A row for each model and batch size."""
    table = Table(title="int8 in other runtimes: times eager float32", box=box.SIMPLE)
    header: list[str] = []
    for name in track(names, "export", transient=True):
        for batch in batches:
            model, x = prepared(name, batch)
            found = gains(columns(model, x), max(rounds, 10))
            if not header:
                header = ["model", "batch", "eager", *list(found)[1:]]
                for title in header:
                    table.add_column(title, justify="right" if title != "model" else "left")
            cells = [f"{gain:.1f}" for key, (_, gain) in found.items() if key != "eager"]
            table.add_row(name, str(batch), f"{found['eager'][0]:.0f} ms", *cells)
            gc.collect()
    return table
