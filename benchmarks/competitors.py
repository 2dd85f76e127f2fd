"""What :class:`Lower` is compared with: other ways to make a model fast on a processor, on one thread.

Every function takes a model in eval mode and its input, and gives a call that runs it, from tensor to tensors. The
int8 ones are each tool's own quantizer with its defaults for speed, calibrated on the input: time does not depend on
the ranges.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


def compiled(model: nn.Module, x: Tensor) -> Call:
    """torch.compile (Inductor), float32."""
    made = torch.compile(model)
    return lambda: made(x)


def pt2e(model: nn.Module, x: Tensor) -> Call:
    """torchao's PT2E quantization for x86, compiled by Inductor with freezing."""
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared: Any = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    with config.patch(freezing=True):
        made = torch.compile(convert_pt2e(prepared))
        made(x)  # freezing is looked at when it compiles, which is now
    return lambda: made(x)


def onnx_runtime(model: nn.Module, x: Tensor) -> Call:
    """ONNX Runtime, float32."""
    return _session(_onnx(model, x), x)


def onnx_runtime_int8(model: nn.Module, x: Tensor) -> Call:
    """ONNX Runtime on what its quantize_static writes: unsigned activations, weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = [{name: x.numpy()}]

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]  # its own says dict, and takes None
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        source, ready, made = (str(Path(folder) / f"{name}.onnx") for name in ("float", "ready", "int8"))
        Path(source).write_bytes(_onnx(model, x))
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        name = _inputs(Path(ready).read_bytes())[0]
        options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, made, Once(name), quant_format=QuantFormat.QDQ, **options)
        return _session(Path(made).read_bytes(), x)


def openvino_int8(model: nn.Module, x: Tensor) -> Call:
    """OpenVINO on what nncf quantizes, compiled for the size of the input."""
    import nncf
    import openvino as ov

    preset = nncf.QuantizationPreset.PERFORMANCE
    converted = ov.convert_model(model, example_input=x)
    inner: dict[str, Any] = {} if x.is_floating_point() else {"model_type": nncf.ModelType.TRANSFORMER}
    quantized = nncf.quantize(converted, nncf.Dataset([x.numpy()]), preset=preset, subset_size=1, **inner)
    quantized.reshape({0: list(x.shape)})
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    made = ov.compile_model(quantized, "CPU", options)
    return lambda: [torch.from_numpy(array) for array in made(x.numpy()).to_tuple()]


def silently(make: Callable[[nn.Module, Tensor], Call], model: nn.Module, x: Tensor) -> Call:
    """Make a call and run it once, without what the tools print on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), torch.no_grad():
            call = make(model, x)
            call()
    finally:
        logging.disable(before)
    return call


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)  # pyright: ignore[reportArgumentType] - a file, too
    return file.getvalue()


def _inputs(model: bytes) -> list[str]:
    import onnx

    return [item.name for item in onnx.load_from_string(model).graph.input]


def _session(model: bytes, x: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: [torch.from_numpy(array) for array in session.run(None, {name: x.numpy()})]
