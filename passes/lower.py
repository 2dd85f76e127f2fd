"""Lowering to the kernels that run a model fastest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from fxcompress.context import Context
from fxcompress.errors import InputError, PassError, VerificationError
from fxcompress.export.agreement import compare
from fxcompress.export.extras import require
from fxcompress.export.program import Runtime
from fxcompress.export.session import OnnxModule, in_runtime
from fxcompress.inputs import other_batch
from fxcompress.lower.agreement import agreement
from fxcompress.lower.features import int8_missing, require_bfloat16, require_float
from fxcompress.lower.flat import FLAT
from fxcompress.lower.float_graph import lower_float
from fxcompress.lower.fold_masks import fold_masks, forget_masks
from fxcompress.lower.int8_graph import lower_int8
from fxcompress.lower.naming import drop_unread, state_read
from fxcompress.lower.values import shapes_of
from fxcompress.module import MASKS, TracedModule, evaluating
from fxcompress.passes.fold_batch_norm import fold_norms
from fxcompress.pipeline import Pass
from fxcompress.quantization.fake_quantize import QUANT, fake_quant_nodes
from fxcompress.quantization.settle import settle
from fxcompress.verify import TOLERANCE, tolerance_of, verify

_RUNTIMES: dict[str, Runtime] = {"onnx": "onnxruntime", "openvino": "openvino"}
_FLOAT = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Lower(Pass):
    """Replaces layers by kernels with packed weights, in the same graph. The result is for inference.

    ``dtype="float32"`` and ``"bfloat16"``: BatchNorm is folded; convolutions and linear layers become onednn's
    (``torch.ops.mkldnn``), with the addition and the activation behind them fused.

    ``dtype="int8"`` (or None) reads fake-quant nodes and nothing else: a layer whose weight and input are
    fake-quantized becomes an integer kernel (``torch.ops.onednn``; Jacob et al. 2018, arXiv 1712.05877, equation 7)
    that takes over the addition, the activation and the rounding behind it, and what lies between such layers stays
    uint8: pooling, joins, reshapes, sums, products. Values differ from the simulation by at most one quantization
    step, node by node.

    Masks that are still in the graph are multiplied into the weights; ``Speedup`` in front removes them.

    Without the processor's 8-bit instructions, or the operators in torch, ``dtype="int8"`` warns and leaves the
    fake-quantized module as it is.

    Layers that do not pay, or for which there is no kernel, stay, and the notes say which and why. Weights are plain
    buffers under their layers' names (int8 ones with ``weight_scale``) and are packed when the module first runs, so
    that it can be saved, copied and loaded. Parameters that lay beside layers are listed under their new names.

    ``backend="onnx"`` and ``"openvino"``: the model becomes an ONNX model (:func:`fxcompress.export_onnx`) that runs in
    process, in ONNX Runtime or OpenVINO: a graph of one node, a module whose ``state_dict`` is the file. It can be
    copied, pickled, loaded and run in threads. ``dtype="int8"`` (or None) needs fake-quant nodes; float models are
    ``dtype="float32"``. Float results are checked to 1e-5; with fake-quant nodes every rounding of an activation is
    checked, from the same values before it: one step, and what a coarser grid that the runtime needs inside a fused
    block adds to it.

    Args:
        backend: ``"torch"``, ``"onnx"`` or ``"openvino"``.
        dtype: see above; ``"bfloat16"`` with ``"torch"`` alone.
    """

    backend: str = "torch"
    dtype: str | None = None

    preserves: ClassVar[bool] = True
    rounding: ClassVar[bool] = True
    trainable: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.backend not in ("torch", *_RUNTIMES):
            raise InputError(f"backend is {self.backend!r}; expected 'torch', 'onnx' or 'openvino'.")
        if self.dtype not in (None, "int8", *_FLOAT):
            raise InputError(f"dtype is {self.dtype!r}; expected 'int8' (or None), 'float32' or 'bfloat16'.")
        if self.backend != "torch" and self.dtype == "bfloat16":
            raise InputError(
                f"dtype is 'bfloat16', which backend={self.backend!r} does not run; expected 'int8' (or None) or "
                "'float32'."
            )

    @property
    def integer(self) -> bool:
        """Whether fake-quant nodes are what is lowered."""
        return self.dtype in (None, "int8")

    def requires(self, module: TracedModule, context: Context) -> None:
        """The kernels exist, and the processor has their instructions."""
        super().requires(module, context)
        if self.backend != "torch":
            require("onnx", "onnx", "onnxscript", "onnxruntime" if self.backend == "onnx" else "onnxscript")
            if self.backend == "openvino":
                require("openvino", "openvino")
        elif self.dtype == "bfloat16":
            require_bfloat16()
        elif not self.integer:
            require_float()
        self._require_nodes(bool(fake_quant_nodes(module)))

    def _require_nodes(self, there: bool) -> None:
        if self.integer and not there:
            raise PassError(
                "Lower found no fake-quant node: there is nothing to lower to int8. Run a quantizer first, for example "
                f"PTQQuantizer(...), or lower the float model with Lower(backend={self.backend!r}, dtype='float32')."
            )
        if there and not self.integer:
            raise PassError(
                f"{self.name}(backend={self.backend!r}, dtype={self.dtype!r}) found fake-quant nodes; expected a float "
                "model. "
                "Lower it with dtype='int8'."
            )

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """The module as it came, in eval mode."""
        return copy.deepcopy(module).eval()

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Lower what can be lowered."""
        assert context.inputs is not None
        if self.backend != "torch":
            return in_runtime(module, context.inputs, _RUNTIMES[self.backend], context.notes, self.name)
        missing = int8_missing() if self.integer else None
        if missing is not None:
            message = f"{missing}. The fake-quantized module is left as it is: right, and not faster"
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
            context.notes.append(message)
            return module
        before, modes = _names(module), {name: item.training for name, item in module.named_modules()}
        read = state_read(module)
        with evaluating(module):
            fold_masks(module, self.name)
            ranks = partial(_rank, shapes_of(module, context.inputs)[0])
            if self.integer:
                context.notes += settle(module, ranks, self.name)
                fold_masks(module, self.name)  # behind a rule that moved zero there is a plain grid now
                context.notes += lower_int8(module, context.inputs, self.name)
            else:
                folded = fold_norms(module, ranks, self.name)
                context.notes += [f"folded {', '.join(folded)}"] if folded else []
                context.notes += lower_float(module, context.inputs, _FLOAT[str(self.dtype)], self.name)
        forget_masks(module)
        drop_unread(module, read)
        for name, item in module.named_modules():
            item.training = modes.get(name, module.training)
        context.notes += _listed(before, _names(module))
        module.meta[FLAT] = True
        module.recompile()
        return module

    def compare(self, reference: TracedModule, result: TracedModule, context: Context) -> float:
        """Float results to rounding; integers node by node, each from the simulation's values, to one step."""
        try:
            return self._compare(reference, result, context)
        finally:  # the forms for the sizes compared are not those of who calls next
            for item in result.children():
                if isinstance(item, OnnxModule):
                    item.release()

    def _compare(self, reference: TracedModule, result: TracedModule, context: Context) -> float:
        inputs, batched = context.inputs, bool(result.meta["batched"])
        assert inputs is not None
        if not self.integer:
            tolerance, what = tolerance_of(_FLOAT[str(self.dtype)]), f"the result of {self.name}"
            return verify(
                reference, result, inputs, batched=batched, tolerance=tolerance, what=what, raised=False
            ).difference
        if self.backend != "torch":
            (lowered,) = (item for item in result.children() if isinstance(item, OnnxModule))
            gap, note = compare(reference, lowered, inputs, batched=batched, what=f"the result of {self.name}")
            context.notes.append(note)
            return gap
        trials = [inputs, inputs.rebatched(other_batch(inputs.batch))] if batched else [inputs]
        found = [item for trial in trials for item in agreement(reference, result, trial)]
        for item in found:
            if (item.steps or 0) > 1 or not item.difference <= TOLERANCE[torch.float32]:
                away = f"{item.difference:.3g} of its largest value" if item.steps is None else f"{item.steps} steps"
                raise VerificationError(
                    f"the result of {self.name} differs from the simulation by {away} at node {item.name}, given "
                    "the simulation's values there; expected at most one quantization step. This is an error in "
                    "fxcompress; verify=False skips the check.",
                    node=item.name,
                )
        rounded = [item for item in found if item.steps is not None]
        share = sum(item.elements * item.share for item in rounded) / max(1, sum(item.elements for item in rounded))
        context.notes.append(f"node by node, {share:.1e} of all integers are one step from the simulation's")
        return max((item.difference for item in found), default=0.0)


def _rank(shapes: Mapping[str, tuple[int, ...]], node: fx.Node) -> int:
    """Number of dimensions of a node's value."""
    return len(shapes.get(node.name, ()))


def _names(module: TracedModule) -> set[str]:
    """The keys of the ``state_dict`` that are no masks and no ranges."""
    return {key for key in module.state_dict() if not key.startswith((f"{MASKS}.", f"{QUANT}."))}


def _listed(before: set[str], after: set[str]) -> list[str]:
    """How the ``state_dict`` changed."""
    changes = (("new", sorted(after - before)), ("gone", sorted(before - after)))
    return [f"{what} in the state_dict: {', '.join(keys)}" for what, keys in changes if keys]
