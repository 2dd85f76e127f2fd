"""A traced module as an ONNX model, in memory or in a file."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import InputError, PassError
from fxcompress.export.extras import require
from fxcompress.export.from_fake_quant import fake_quant_nodes, write_operators
from fxcompress.export.grid_operators import translations
from fxcompress.export.placement import place_pairs
from fxcompress.inputs import Inputs, check_devices, other_batch, positional
from fxcompress.module import TracedModule, evaluating
from fxcompress.replacing import replacing
from fxcompress.trace import trace

#: Who runs the file: what fuses differs.
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES = ("onnxruntime", "openvino")
#: What a protobuf message may hold.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Program:
    """An ONNX model and what it takes to call it.

    Attributes:
        model: the serialized ONNX model.
        given: for each leaf of the positional inputs (``torch.utils._pytree``): None for a tensor, which the model
            takes, else the value that is written into it.
        result: the structure of what the model returns.
        notes: what was left in float, and why.
    """

    model: bytes
    given: tuple[Any, ...]
    result: pytree.TreeSpec
    notes: tuple[str, ...]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any,
    runtime: Runtime = "onnxruntime",
) -> None:
    """Write a model as an ONNX file (opset 18), in eval mode, with a batch dimension of any size.

    Float and pruned models are written as they are. Fake-quant nodes become QuantizeLinear and DequantizeLinear,
    weights int8 initializers with a DequantizeLinear per channel, biases of convolutions int32 ones.

    Args:
        model: any module, or a traced one. It is not changed.
        path: the file, which is replaced. After an error it is as it was.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        runtime: ``"onnxruntime"`` or ``"openvino"``: ONNX Runtime has kernels for single operators and needs a pair on
            every input and output; OpenVINO fuses blocks, in which a pair costs accuracy.

    Raises:
        InputError: an argument is unusable, or the packages of the extra ``onnx`` are missing.
        PassError: a spec of a fake-quant node, or an operator, cannot be written.
        TraceError: the model cannot be recorded.
        OSError: the file cannot be written.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime is {runtime!r}; expected one of {', '.join(map(repr, RUNTIMES))}.")
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    require("onnx", "onnx", "onnxscript")
    inputs = Inputs.parse(example_inputs)
    check_devices(model, inputs)
    with replacing(path) as draft:  # first of all: a path that cannot be written is known before the work
        traced = copy.deepcopy(model) if isinstance(model, TracedModule) else trace(model, inputs)
        draft.write_bytes(program_of(traced, inputs, runtime, "export_onnx").model)


def program_of(module: TracedModule, inputs: Inputs, runtime: Runtime, author: str) -> Program:
    """The ONNX model of a traced module, which is used up.

    Raises:
        PassError: a spec of a fake-quant node, or an operator, cannot be written.
    """
    module.eval()
    quantized = bool(fake_quant_nodes(module))
    notes = write_operators(module, author) if quantized else []
    module.ready()
    # A batch of one would be taken for a constant.
    trial = inputs.rebatched(other_batch(inputs.batch)) if inputs.batch == 1 else inputs
    batched = module.meta["batched"]
    values = tuple(positional(module, trial if batched else inputs))
    with torch.no_grad(), evaluating(module):
        result = pytree.tree_structure(module(*pytree.tree_map_only(Tensor, Tensor.clone, values)))
    written = _exported(module, values, batched)
    if quantized:
        notes += place_pairs(written, every=runtime == "onnxruntime")
    leaves = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(values))
    return Program(_serialized(written), leaves, result, tuple(notes))


def _exported(module: TracedModule, values: tuple[Any, ...], batched: tuple[str, ...]) -> Any:
    """An ``onnx_ir.Model`` by torch's exporter."""
    batch = torch.export.Dim("batch", min=1)
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    shapes = tuple(_dynamic(value, name in batched, batch) for name, value in zip(names, values, strict=True))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                values,
                dynamic_shapes=shapes if batched else None,
                custom_translation_table=translations(),
                opset_version=18,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise PassError(
            f"torch.onnx.export cannot write this model: {reason} Export the model as it is before passes such as "
            "Lower(backend='torch'), whose kernels only torch has."
        ) from error
    assert program is not None
    return program.model


def _dynamic(value: Any, batched: bool, batch: Any) -> Any:
    """What of an argument has a size that is not known."""
    return pytree.tree_map(
        lambda leaf: {0: batch} if batched and isinstance(leaf, Tensor) and leaf.dim() else None, value
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints and warns of itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _serialized(model: Any) -> bytes:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > _LARGEST:
        raise PassError(f"the weights take {size} bytes; an ONNX file holds at most {_LARGEST}.")
    made: bytes = onnx_ir.to_proto(model).SerializeToString()
    return made
