"""A traced module as an ONNX model, in memory or in a file."""

from __future__ import annotations

import contextlib
import io
import logging
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
from fxcompress.export.from_fake_quant import store_masked, write_operators
from fxcompress.export.grid_operators import translations
from fxcompress.export.placement import Rounded, place_pairs
from fxcompress.export.signature import Signature, Slot, slotted
from fxcompress.inputs import Inputs, check_devices, other_batch, positional
from fxcompress.module import TracedModule, copied
from fxcompress.quantization.fake_quantize import fake_quant_nodes
from fxcompress.replacing import replacing
from fxcompress.trace import trace

#: Who runs the file: what fuses differs.
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES = ("onnxruntime", "openvino")
#: What a protobuf message may hold.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Program:
    """An ONNX model.

    Attributes:
        model: serialized.
        signature: how it is called.
        notes: what was left in float, and why.
    """

    model: bytes
    signature: Signature
    notes: tuple[str, ...]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any,
    runtime: Runtime = "onnxruntime",
) -> None:
    """Write a model as an ONNX file (opset 20), in eval mode, with a batch dimension of any size.

    Other dimensions have the sizes of the example inputs: what runtimes fuse and how fast is decided by them.

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
        # A mode decides which branch is recorded; what is traced already has been.
        traced = trace(model if isinstance(model, TracedModule) else copied(model).eval(), inputs)
        draft.write_bytes(program_of(traced, inputs, runtime, "export_onnx").model)


def program_of(module: TracedModule, inputs: Inputs, runtime: Runtime, author: str) -> Program:
    """The ONNX model of a traced module, which is used up.

    Raises:
        PassError: a spec of a fake-quant node, or an operator, cannot be written.
    """
    module.eval()
    quantized = bool(fake_quant_nodes(module))
    notes = write_operators(module, author) if quantized else []
    store_masked(module, author)
    module.ready()
    # A batch of one would be taken for a constant.
    trial = inputs.rebatched(other_batch(inputs.batch)) if inputs.batch == 1 else inputs
    batched = module.meta["batched"]
    values = tuple(positional(module, trial if batched else inputs))
    with torch.no_grad():
        result = module(*pytree.tree_map_only(Tensor, Tensor.clone, values))
    written = _exported(module, values, batched, trial.batch)
    rounded: dict[str, Rounded] = {}
    if quantized:
        rounded, left = place_pairs(written, every=runtime == "onnxruntime")
        notes += left
    given, made = slotted(values), slotted(result)
    shapes = tuple(
        tuple(size if isinstance(size, int) else None for size in value.shape) for value in written.graph.inputs
    )
    dtypes = tuple(leaf.dtype for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
    return Program(_serialized(written), Signature(given, shapes, dtypes, made, rounded), tuple(notes))


class _TensorsOnly(nn.Module):
    """A module that takes and gives tensors alone, whatever they are nested in: an ONNX model knows nothing else."""

    def __init__(self, module: TracedModule, values: tuple[Any, ...]) -> None:
        super().__init__()
        self.module = module
        self.values = slotted(values)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of the result, in its order."""
        values = pytree.tree_map_only(Slot, lambda slot: tensors[slot.index], self.values)
        return [leaf for leaf in pytree.tree_leaves(self.module(*values)) if isinstance(leaf, Tensor)]


def _exported(module: TracedModule, values: tuple[Any, ...], batched: tuple[str, ...], size: int) -> Any:
    """An ``onnx_ir.Model`` by torch's exporter."""
    batch = torch.export.Dim("batch", min=1)
    holders = [node for node in module.graph.nodes if node.op == "placeholder"]
    names, tensors, shapes = [], [], []
    for holder, value in zip(holders, values, strict=True):
        for path, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, Tensor):
                names.append(f"{holder.target}{pytree.keystr(path)}")
                tensors.append(leaf)
                nested = leaf is not value and bool(batched) and leaf.dim() > 0 and len(leaf) == size
                shapes.append({0: batch} if holder.name in batched or nested else None)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _TensorsOnly(module, values).eval(),
                tuple(tensors),
                dynamic_shapes={"tensors": tuple(shapes)} if batched else None,
                input_names=names,
                custom_translation_table=translations(),
                opset_version=20,
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
    for value, shape in zip(program.model.graph.inputs, shapes, strict=True):
        found = value.shape
        if shape is not None and found is not None and isinstance(found[0], int):
            raise PassError(
                f"torch.onnx.export fixed the batch size of {value.name} at {found[0]}, and this model takes "
                "any. Look for code that reads the size as a number, for example len(x) or int(x.shape[0])."
            )
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of itself."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _serialized(model: Any) -> bytes:
    import onnx_ir

    for item in (model.graph, *model.graph.all_nodes(), *(value for node in model.graph for value in node.outputs)):
        item.metadata_props.clear()  # the exporter's notes: stack traces, with the paths of this machine
    for item in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        item.metadata_props.clear()
    model.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del model.graph.initializers[name]  # parameters that only folded ones were made of
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > _LARGEST:
        raise PassError(f"the weights take {size} bytes; an ONNX file holds at most {_LARGEST}.")
    made: bytes = onnx_ir.to_proto(model).SerializeToString()
    return made
