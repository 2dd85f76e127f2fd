"""An ONNX model that runs in process, as a module."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.export.extras import require
from fxcompress.export.openvino_graph import drop_zero_points, join_pairs, sums_convolutions
from fxcompress.export.program import Runtime, program_of
from fxcompress.export.signature import Signature
from fxcompress.inputs import Inputs
from fxcompress.lower.flat import FLAT
from fxcompress.module import OwnedGraph, TracedModule

_Sizes = tuple[tuple[int, ...], ...]
#: OpenVINO's fusion of attention, and of element-wise operators, which takes a residual sum out of the integer
#: convolution in front of it (resnet50: 3 % slower). An internal property: it may go.
_SNIPPETS = "SNIPPETS_MODE"


class OnnxModule(nn.Module):
    """Runs an ONNX model in ONNX Runtime or OpenVINO, on the CPU. For inference: no gradients.

    The model is the uint8 buffer ``model``, so that it is saved, loaded, copied and pickled with the rest; the runtime
    makes its own form of it on the first call, which copies and pickles leave behind. Calls from several threads run
    side by side. The runtime uses ``torch.get_num_threads()`` threads, as they are on the first call.

    Args:
        model: a serialized ONNX model.
        signature: how it is called.
        runtime: ``"onnxruntime"`` or ``"openvino"``.
    """

    model: Tensor
    signature: Signature
    runtime: Runtime

    def __init__(self, model: bytes, signature: Signature, runtime: Runtime) -> None:
        super().__init__()
        self.register_buffer("model", torch.frombuffer(bytearray(model), dtype=torch.uint8))
        self.signature, self.runtime = signature, runtime
        self.release()

    def release(self) -> None:
        """Let go of the runtime's form of the model; the next call makes it again."""
        self._lock = threading.Lock()
        self._session: tuple[Tensor, int | None, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_session")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.release()

    def forward(self, *inputs: Any) -> Any:
        """The model's result, of the same structure, on the device of the inputs.

        Raises:
            InputError: a shape, a dtype, or what is no tensor, differs from what was written into the model.
        """
        tensors = self.signature.tensors(inputs)
        arrays = [np.asarray(tensor.numpy(force=True), order="C") for tensor in tensors]
        made = [torch.from_numpy(array) for array in self._ready()(arrays)]
        if not tensors[0].is_cpu:
            made = [tensor.to(tensors[0].device) for tensor in made]
        return self.signature.packed(made)

    def _ready(self) -> Any:
        """The runtime's form of the model as it is now."""
        model = self._buffers["model"]
        assert model is not None
        version = None if model.is_inference() else model._version
        session = self._session
        if session is not None and session[0] is model and session[1] == version:
            return session[2]
        with self._lock:
            session = self._session
            if session is None or session[0] is not model or session[1] != version:
                kind = _OnnxRuntime if self.runtime == "onnxruntime" else _OpenVINO
                session = self._session = model, version, kind(self.file(), torch.get_num_threads())
            return session[2]

    def file(self) -> bytes:
        """The model, as it would lie in a file."""
        return self.model.cpu().numpy().tobytes()

    def extra_repr(self) -> str:
        """The runtime and the size."""
        return f"{self.runtime}, {self.model.numel()} bytes"


def in_runtime(module: TracedModule, inputs: Inputs, runtime: Runtime, notes: list[str], author: str) -> TracedModule:
    """A traced module of one node that runs the model in a runtime; ``module`` is used up. Notes are added."""
    holders = [node for node in module.graph.nodes if node.op == "placeholder"]
    meta, training = {**module.meta, FLAT: True}, module.training
    program = program_of(module, inputs, runtime, author)
    notes += [f"one ONNX model of {len(program.model)} bytes, in {runtime}", *program.notes]
    graph = OwnedGraph()
    made = [graph.create_node("placeholder", node.target, node.args, {}, node.name) for node in holders]
    for old, new in zip(holders, made, strict=True):
        new.meta = dict(old.meta)
    call = graph.create_node("call_module", runtime, tuple(made), {}, runtime)
    call.meta["by"] = author
    graph.create_node("output", "output", (call,), {}, "output")
    tree = nn.Module()
    tree.add_module(runtime, OnnxModule(program.model, program.signature, runtime))
    return TracedModule.build(tree.train(training), graph, meta)


class _OnnxRuntime:
    def __init__(self, model: bytes, threads: int) -> None:
        (onnxruntime,) = require("onnx", "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.names = [item.name for item in self.session.get_inputs()]

    def __call__(self, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        found: list[np.ndarray[Any, Any]] = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
        return found


class _OpenVINO:
    """Compiled for the sizes of the first inputs that come, up to ``FIXED`` of them, then once for any sizes.

    Kernels for sizes that are known are faster (efficientnet_b0: by 8 %). A request runs once at a time, so that each
    thread has its own.
    """

    FIXED = 4

    def __init__(self, model: bytes, threads: int) -> None:
        (openvino,) = require("openvino", "openvino")
        self.shared = openvino.Tensor
        self.core = openvino.Core()
        self.read: Any = self.core.read_model(model)
        integer = join_pairs(self.read) > 0
        drop_zero_points(self.read)
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        attention = any(operator.get_type_name() == "Softmax" for operator in self.read.get_ops())
        if integer and not attention and sums_convolutions(self.read):
            self.options[_SNIPPETS] = "DISABLE"
        self.compiled: dict[_Sizes | None, Any] = {}
        self.lock = threading.Lock()
        self.own = threading.local()

    def __call__(self, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        sizes = tuple(array.shape for array in arrays)
        requests = self.own.__dict__.setdefault("requests", {})
        request = requests.get(sizes)
        if request is None:
            request = self._request(sizes, requests)
        # Given to `infer`, they go through layers of dispatch. The request does not keep them: whoever called does, and
        # nothing runs before all of them are set again.
        for place, array in enumerate(arrays):
            request.set_input_tensor(place, self.shared(array, shared_memory=True))
        return list(request.infer().to_tuple())

    def _request(self, sizes: _Sizes, requests: dict[_Sizes | None, Any]) -> Any:
        """One of the model for these sizes, kept in ``requests``, which are this thread's."""
        with self.lock:
            full = len(self.compiled) >= self.FIXED or not all(map(math.prod, sizes))
            key = sizes if sizes in self.compiled or not full else None
            if key not in self.compiled:
                self.compiled[key] = self._compile(key)
        if key not in requests:
            requests[key] = self.compiled[key].create_infer_request()
        return requests[key]

    def _compile(self, sizes: _Sizes | None) -> Any:
        model = self.read.clone()
        if sizes is not None:
            model.reshape(dict(enumerate(map(list, sizes))))
        try:
            return self.core.compile_model(model, "CPU", self.options)
        except RuntimeError:
            options = {name: value for name, value in self.options.items() if name != _SNIPPETS}
            if options == self.options:
                raise
            return self.core.compile_model(model, "CPU", options)
