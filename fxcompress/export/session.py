"""An ONNX model that runs in process, as a module."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import InputError, VerificationError
from fxcompress.export.extras import require
from fxcompress.export.from_fake_quant import fake_quant_nodes
from fxcompress.export.program import Program, Runtime, Slot, program_of
from fxcompress.inputs import Inputs, other_batch
from fxcompress.module import OwnedGraph, TracedModule, evaluating
from fxcompress.outputs import tensors_of
from fxcompress.verify import TOLERANCE, difference


class OnnxModule(nn.Module):
    """Runs an ONNX model in ONNX Runtime or OpenVINO, on the CPU. For inference: no gradients.

    The model is the uint8 buffer ``model``, so that it is saved, loaded, copied and pickled with the rest; the runtime
    makes its own form of it on the first call, which copies and pickles leave behind. Calls from several threads run
    side by side. The runtime uses ``torch.get_num_threads()`` threads, as they are on the first call.

    Args:
        program: the model and how it is called.
        runtime: ``"onnxruntime"`` or ``"openvino"``.
    """

    model: Tensor

    def __init__(self, program: Program, runtime: Runtime) -> None:
        super().__init__()
        self.register_buffer("model", torch.frombuffer(bytearray(program.model), dtype=torch.uint8))
        self.runtime, self.given, self.result = runtime, program.given, program.result
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._session: tuple[tuple[int, int], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_session")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """The model's result, of the same structure, on the device of the inputs.

        Raises:
            InputError: what is no tensor differs from what was written into the model.
        """
        leaves = pytree.tree_leaves(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if rest != self.given:
            raise InputError(
                f"the inputs beside tensors are {rest}; this model was written for {self.given}, which are part of it. "
                "Lower or export it with example inputs like these."
            )
        arrays = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in tensors]
        found = self._ready()(arrays)
        made = [torch.from_numpy(array).to(tensors[0].device) for array in found]
        return pytree.tree_map_only(Slot, lambda slot: made[slot.index], self.result)

    def _ready(self) -> Any:
        """The runtime's form of the model as it is now."""
        now = (id(self.model), self.model._version)
        with self._lock:
            if self._session is None or self._session[0] != now:
                kind = _OnnxRuntime if self.runtime == "onnxruntime" else _OpenVINO
                self._session = now, kind(self.model.cpu().numpy().tobytes(), torch.get_num_threads())
            return self._session[1]

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
    tree.add_module(runtime, OnnxModule(program, runtime))
    return TracedModule.build(tree.train(training), graph, meta)


def compare_noise(
    simulated: TracedModule, result: TracedModule, inputs: Inputs, notes: list[str], *, what: str
) -> float:
    """How far a result is from the simulation, as a share of the largest value; a note compares it with rounding.

    One integer that is rounded the other way becomes several on its way through a network, so that no number of steps
    bounds the end of it. What bounds it is what rounding did to the model itself, by the same way.

    A runtime rounds inside fused blocks too, on grids that may be twice as coarse: hence twice as much.

    Raises:
        VerificationError: it is further from the simulation than twice the simulation from the model without rounding,
            in root mean square over the outputs.
    """
    plain = copy.deepcopy(simulated)
    for _, item in fake_quant_nodes(plain):
        item.quantizing = False
    trials = [inputs, inputs.rebatched(other_batch(inputs.batch))] if result.meta["batched"] else [inputs]
    worst = 0.0
    for trial in trials:
        with torch.no_grad(), evaluating(simulated), evaluating(plain):
            right, found, free = (trial.run(item) for item in (simulated, result, plain))
        gap = difference(right, found)
        away, noise, size = _distance(right, found), _distance(right, free), _distance(right, None)
        if not (away <= 2 * noise or gap <= TOLERANCE[torch.float32]):
            raise VerificationError(
                f"{what} differs from the simulation by {away / size:.3g} of its root mean square at batch "
                f"{trial.batch}; expected at most twice what rounding makes of the model, {noise / size:.3g}. This is "
                "an error in fxcompress or in the runtime; verify=False skips the check.",
                difference=gap,
            )
        worst = max(worst, gap)
    notes.append(
        f"{away / (size or 1):.1e} of the outputs' root mean square from the simulation, which is "
        f"{noise / (size or 1):.1e} from the model without rounding"
    )
    return worst


def _distance(a: Any, b: Any) -> float:
    """Euclidean, over every tensor of two results; of one result from zero."""
    left, right = dict(tensors_of(a)), dict(tensors_of(b))
    total = sum(
        float((x.double() - right[key].double() if key in right else x.double()).square().sum())
        for key, x in left.items()
    )
    return math.sqrt(total)


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
    """One request for each thread: a request runs once at a time."""

    def __init__(self, model: bytes, threads: int) -> None:
        (openvino,) = require("openvino", "openvino")
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(model), "CPU", options)
        self.requests = threading.local()

    def __call__(self, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        found = self.requests.own.infer(arrays)
        return [np.array(found[index]) for index in range(len(self.compiled.outputs))]
