"""An ONNX model that runs in process, as a module."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import InputError
from fxcompress.export.extras import require
from fxcompress.export.openvino_rounding import drop_zero_points, join_pairs
from fxcompress.export.program import Runtime, Signature, Slot, program_of
from fxcompress.inputs import Inputs
from fxcompress.module import OwnedGraph, TracedModule

_Sizes = tuple[tuple[int, ...], ...]
#: OpenVINO's fusion of attention, and of element-wise operators: it takes a residual sum out of the integer convolution
#: in front of it (resnet50 is then 9 % slower).
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
        leaves = inputs if all(isinstance(item, Tensor) for item in inputs) else pytree.tree_leaves(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if rest != self.signature.given:
            raise InputError(
                f"the inputs beside tensors are {rest}; this model was written for {self.signature.given}, which are "
                "part of it. Lower or export it with example inputs like these."
            )
        dtypes = tuple(tensor.dtype for tensor in tensors)
        if dtypes != self.signature.dtypes:
            raise InputError(
                f"the inputs are of {', '.join(map(str, dtypes))}; this model was written for "
                f"{', '.join(map(str, self.signature.dtypes))}. Convert them, or lower or export it with example "
                "inputs like these."
            )
        arrays = [np.asarray(tensor.numpy(force=True), order="C") for tensor in tensors]
        if not all(map(_fits, self.signature.shapes, arrays)):
            expected = ", ".join(str(tuple(size or "any" for size in shape)) for shape in self.signature.shapes)
            raise InputError(
                f"the inputs have the shapes {', '.join(str(array.shape) for array in arrays)}; this model "
                f"was written for {expected.replace(repr('any'), 'any')}. Lower or export it with example inputs of "
                "these sizes, or use Lower(backend='torch'), which takes others."
            )
        found = self._ready()(arrays)
        made = [torch.from_numpy(array) for array in found]
        if not tensors[0].is_cpu:
            made = [tensor.to(tensors[0].device) for tensor in made]
        result = self.signature.result
        if isinstance(result, Slot):
            return made[result.index]
        return pytree.tree_map_only(Slot, lambda slot: made[slot.index], result)

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
    meta, training = dict(module.meta), module.training
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


def _fits(shape: tuple[int | None, ...], array: np.ndarray[Any, Any]) -> bool:
    return len(shape) == array.ndim and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )


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
        if integer and not attention and _SNIPPETS in self.core.get_property("CPU", "INTERNAL_SUPPORTED_PROPERTIES"):
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
        found = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [np.array(array) for array in found.to_tuple()]

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
        return self.core.compile_model(model, "CPU", self.options)
