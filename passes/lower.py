"""Lowering to the kernels that run a model fastest here."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxcompress.errors import InputError
from fxcompress.lower.features import require_bfloat16, require_float
from fxcompress.lower.float_graph import lower_float
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.passes.fold_batch_norm import FoldBatchNorm
from fxcompress.pipeline import Context, Pass
from fxcompress.verify import tolerance_of, verify

_FLOAT = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Lower(Pass):
    """Replaces layers by kernels with packed weights; the result is for inference only."""

    backend: str = "torch"
    dtype: str | None = None

    preserves: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.backend != "torch":
            raise InputError(f"backend is {self.backend!r}; expected 'torch'.")
        if self.dtype not in (None, "int8", *_FLOAT):
            raise InputError(f"dtype is {self.dtype!r}; expected 'int8' (or None), 'float32' or 'bfloat16'.")

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        assert context.inputs is not None
        module.eval()
        dtype = _FLOAT[str(self.dtype)]
        require_float()
        if dtype == torch.bfloat16:
            require_bfloat16()
        FoldBatchNorm().run(module, context)
        context.masking = None
        context.notes += lower_float(module, context.inputs, dtype, self.name)
        return module
