"""QuantizeLinear and DequantizeLinear as torch operators: what fake-quant nodes become before an export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Metadata of a QuantizeLinear: the fake-quant node that it was.
NODE = "fxcompress.node"


@torch.library.custom_op("fxcompress::quantize", mutates_args=())
def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, node: str) -> Tensor:
    """``saturate(round(x / scale) + zero_point)`` in the zero point's dtype; ONNX QuantizeLinear per tensor."""
    limits = torch.iinfo(zero_point.dtype)
    steps = (x / scale).round() + zero_point.to(x.dtype)
    return steps.clamp(limits.min, limits.max).to(zero_point.dtype)


@_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, node: str) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("fxcompress::dequantize", mutates_args=())
def _dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """``(x - zero_point) * scale``, the last two 0-d or along ``axis``; ONNX DequantizeLinear."""
    shape = [1] * x.dim()
    if scale.dim():
        shape[axis] = -1
    return (x.to(scale.dtype) - zero_point.to(scale.dtype).reshape(shape)) * scale.reshape(shape)


@_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


#: The operators as nodes call them.
quantize = torch.ops.fxcompress.quantize.default
dequantize = torch.ops.fxcompress.dequantize.default


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes the operators: one ONNX operator each."""
    from onnxscript import opset20 as op

    def write_quantize(x: Any, scale: Any, zero_point: Any, node: str) -> Any:
        made: Any = op.QuantizeLinear(x, scale, zero_point)
        made.producer().metadata_props[NODE] = node
        return made

    def write_dequantize(x: Any, scale: Any, zero_point: Any, axis: int = 0) -> Any:
        return op.DequantizeLinear(x, scale, zero_point, axis=axis)

    return {quantize: write_quantize, dequantize: write_dequantize}
