"""Where an ONNX graph needs pairs of QuantizeLinear and DequantizeLinear so that a runtime fuses them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fxcompress.export.graph_editor import GraphEditor, OnnxGrid
from fxcompress.export.grid_operators import NODE
from fxcompress.export.integer_forms import clips, rewrite, sums

#: Their results hold elements of their first input, or what commutes with rounding.
_CLOSED = frozenset(
    """MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Slice Split Expand DepthToSpace SpaceToDepth Tile Gather
    Relu""".split()
)
_ACTIVATIONS: dict[str, Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "Gelu": lambda x, options: F.gelu(x, approximate=options.get("approximate", "none")),
    "HardSwish": lambda x, options: F.hardswish(x),
    "LeakyRelu": lambda x, options: F.leaky_relu(x, options.get("alpha", 0.01)),
    "Elu": lambda x, options: F.elu(x, options.get("alpha", 1.0)),
    "HardSigmoid": lambda x, options: (options.get("alpha", 0.2) * x + options.get("beta", 0.5)).clamp(0, 1),
    "Sigmoid": lambda x, options: torch.sigmoid(x),
    "Tanh": lambda x, options: torch.tanh(x),
}
#: Layers whose float weights and biases ONNX Runtime quantizes (WeightBiasQuantization; MatMulAddFusion makes Gemm).
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
#: Half of what an int32 bias may hold: the sum of products needs room too.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class Rounded:
    """Where an ONNX model computes what a fake-quant node computes.

    Attributes:
        value: name of the uint8 value.
        steps: how many steps it can be from the simulation, given the same input: one, and what a coarser grid inside
            the block makes of it.
    """

    value: str
    steps: int


def place_pairs(model: Any, *, every: bool) -> tuple[dict[str, Rounded], list[str]]:
    """Edit an ``onnx_ir.Model`` in place.

    Weights that are transposed are stored transposed, and biases of convolutions and Gemm as int32 with the scale of
    the products. ``every``: also a pair behind each operator that only moves or picks values, on its input's grid, and
    inside fused blocks, behind a convolution whose result is added to or passed to an activation. There the grid is
    one beyond whose ends the block's result saturates, so that no data is needed to find it. What has an integer kernel
    under another name is renamed (:mod:`fxcompress.export.integer_forms`). And a layer with a float weight or bias is
    kept float: ONNX Runtime quantizes by itself what is missing between two pairs.

    Returns:
        Where each activation's fake-quant node is, by its name; and which layers stay float.
    """
    placer = _Placer(model)
    placer.weights()
    if every:
        placer.movements()
        rewrite(placer)
        placer.blocks()
        clips(placer)
        sums(placer)
    placer.biases()  # behind them: the step of a bias is that of the layer's input
    if every:
        placer.floats()
    return placer.rounded(), placer.notes()


class _Placer(GraphEditor):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.left: Counter[str] = Counter()
        #: Of the QuantizeLinear at the end of a block: how far a grid inside can move its argument, in its steps.
        self.inner: dict[Any, float] = {}

    def notes(self) -> list[str]:
        return [f"{count} convolutions stay float: {reason}" for reason, count in self.left.items()]

    def rounded(self) -> dict[str, Rounded]:
        return {
            node.metadata_props[NODE]: Rounded(node.outputs[0].name, 1 + math.floor(self.inner.get(node, 0.0)))
            for node in self.graph
            if NODE in node.metadata_props
        }

    # ---- constants -----------------------------------------------------------------------------------------------

    def weights(self) -> None:
        """A transposed weight is stored transposed."""
        for node in list(self.graph):
            source = self.maker(node.inputs[0], "DequantizeLinear") if node.op_type == "Transpose" else None
            held = None if source is None else self.array(source.inputs[0])
            if source is None or held is None:
                continue
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(held.ndim)[::-1]
            axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
            integers = self.constant(np.ascontiguousarray(held.transpose(order)))
            made = self.node(
                "DequantizeLinear", [integers, *source.inputs[1:]], node.outputs[0], axis=list(order).index(axis)
            )
            made.outputs[0].type = node.outputs[0].type
            self.graph.insert_after(node, made)
            node.outputs[0].replace_all_uses_with(made.outputs[0])
            self.graph.remove(node, safe=True)
            if not source.outputs[0].uses():
                self.graph.remove(source, safe=True)

    def biases(self) -> None:
        """Biases as int32 multiples of the scale of the products (Jacob et al. 2018, section 2.4)."""
        for node in list(self.graph):
            if node.op_type not in ("Conv", "Gemm") or len(node.inputs) < 3:
                continue
            grid, bias = self.grid(node.inputs[0]), self.array(node.inputs[2])
            weight = self.maker(node.inputs[1], "DequantizeLinear")
            scales = None if weight is None else self.array(weight.inputs[1])
            if grid is None or bias is None or weight is None or scales is None or bias.ndim != 1:
                continue
            least = (np.abs(bias.astype(np.float64)) / _LARGEST_BIAS / grid.scale).astype(np.float32)
            if (scales < least).any():
                scales = np.maximum(scales, least)
                weight = self._widened(node, weight, scales)
            step = np.broadcast_to(scales.astype(np.float64) * grid.scale, bias.shape).astype(np.float32)
            integers = self.constant(np.rint(bias / step.astype(np.float64)).astype(np.int32))
            per_channel = scales.ndim > 0 and scales.size > 1
            scale = self.constant(step if per_channel else step[:1].reshape(()))
            made = self.node("DequantizeLinear", [integers, scale], node.inputs[2], axis=0)
            made.outputs[0].type = node.inputs[2].type
            self.graph.insert_before(node, made)
            node.replace_input_with(2, made.outputs[0])

    def _widened(self, node: Any, weight: Any, scales: np.ndarray[Any, Any]) -> Any:
        """A layer's weight on coarser scales, one per output channel.

        A channel that is so small beside its bias that no int32 holds the bias in its steps (a dead BatchNorm's) is a
        constant in 8 bits: half a step of a weight, times a step of the input, is 2**-31 of the bias.
        """
        held, old = self.array(weight.inputs[0]), self.array(weight.inputs[1])
        assert held is not None
        assert old is not None
        rows = node.op_type == "Conv" or ("transB" in node.attributes and node.attributes["transB"].as_int() == 1)
        axis = 0 if rows else 1
        ratio = (old.astype(np.float64) / scales).reshape([-1 if dim == axis else 1 for dim in range(held.ndim)])
        integers = self.constant(np.rint(held * ratio).astype(held.dtype))
        constants = [self.constant(scales), self.constant(np.zeros(scales.shape, held.dtype))]
        made = self.node("DequantizeLinear", [integers, *constants], node.inputs[1], axis=axis)
        made.outputs[0].type = node.inputs[1].type
        self.graph.insert_before(node, made)
        node.replace_input_with(1, made.outputs[0])
        if not weight.outputs[0].uses():
            self.graph.remove(weight, safe=True)
        return made

    def floats(self) -> None:
        """Hide the grid of what enters a layer with a float weight or bias.

        ONNX Runtime would quantize that, per tensor, in a layer behind a DequantizeLinear. With the scale in a
        multiplication of its own the values are the same, bit for bit, and no rule of the runtime looks behind it.
        """
        for node in list(self.graph):
            if node.op_type not in _LAYERS or self.grid(node.inputs[0]) is None:
                continue
            if all(value is None or self.maker(value, "DequantizeLinear") for value in node.inputs[1:]):
                continue
            back = node.inputs[0].producer()
            one = self.constant(np.array(1, np.float32))
            steps = self.node("DequantizeLinear", [back.inputs[0], one, back.inputs[2]], node.inputs[0])
            scaled = self.node("Mul", [steps.outputs[0], back.inputs[1]], node.inputs[0])
            steps.outputs[0].type = scaled.outputs[0].type = node.inputs[0].type
            self.graph.insert_before(node, [steps, scaled])
            node.replace_input_with(0, scaled.outputs[0])
            if not back.outputs[0].uses() and not back.outputs[0].is_graph_output():
                self.graph.remove(back, safe=True)

    # ---- pairs ---------------------------------------------------------------------------------------------------

    def movements(self) -> None:
        """Values that stay on a grid get a pair of it."""
        for node in list(self.graph):
            if node.op_type in _CLOSED:
                sources = node.inputs[:1]
            elif node.op_type == "Concat" or _is_nearest(node):
                sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            else:
                continue
            grids = {self.grid(source) for source in sources}
            (grid,) = grids if len(grids) == 1 else (None,)
            if grid is None:
                continue
            for value in node.outputs:
                if value.uses() and not value.is_graph_output() and self.rounds_to(value) != grid:
                    self.pair(value, grid)

    def blocks(self) -> None:
        """A convolution has an integer kernel only where its own result is rounded."""
        for node in list(self.graph):
            if node.op_type != "Conv" or self.grid(node.inputs[0]) is None:
                continue
            if self.maker(node.inputs[1], "DequantizeLinear") is None:
                continue
            if self.rounding(node.outputs[0]) is None and not self._block(node.outputs[0]):
                self.left["their results are not rounded"] += 1

    def _block(self, value: Any) -> bool:
        """Put a pair behind a convolution that is followed by something, unless the runtime fuses that."""
        readers = list(value.consumers())
        if len(readers) == 2 and {item.op_type for item in readers} == {"Sigmoid", "Mul"}:  # SiLU
            (product,) = (item for item in readers if item.op_type == "Mul")
            (gate,) = (item for item in readers if item.op_type == "Sigmoid")
            return self._gated(value, gate, self.rounding(product.outputs[0]))
        node = self.reader(value)
        if node is None:
            return False
        if node.op_type == "Add":
            return self._added(value, node)
        rounding = self.rounding(node.outputs[0])
        if node.op_type in ("Relu", "Clip"):
            return rounding is not None and (self._fuses(node, rounding) or self._saturated(value, rounding))
        if node.op_type not in _ACTIVATIONS:
            return False
        function = _ACTIVATIONS[node.op_type]
        options = {key: item.value for key, item in node.attributes.items()}
        return self._activated(value, lambda x: function(x, options), rounding)

    def _fuses(self, node: Any, rounding: Any) -> bool:
        """Whether saturating to the grid behind a ReLU or Clip does what it does: runtimes then drop it."""
        end = self.grid_of(rounding)
        if end is None or node.op_type == "Relu":
            return end is not None and end.zero_point == 0
        low, high = (self.array(item) for item in (*node.inputs[1:3], None, None)[:2])
        below = low is not None and float(low) <= end.low
        return below and (high is None or float(high) >= end.high - end.scale / 2)

    def _saturated(self, value: Any, rounding: Any) -> bool:
        """In front of what only saturates: the grid behind it."""
        end = self.grid_of(rounding)
        if end is not None:
            self.pair(value, end)
        return end is not None

    def _activated(self, value: Any, function: Callable[[torch.Tensor], torch.Tensor], rounding: Any) -> bool:
        end = None if rounding is None else self.grid_of(rounding)
        if end is None:
            return False
        inner, slope = _saturating(function, end)
        self._inner_pair(value, inner, slope, rounding, end)
        return True

    def _gated(self, value: Any, gate: Any, rounding: Any) -> bool:
        """SiLU is two operators. Its factor gets a grid too, unless that alone moves the result by a step.

        It does so where the result has a narrow range, which negative values of many steps are rounded to.
        """
        if not self._activated(value, F.silu, rounding):
            return False
        inner, end = self.rounds_to(value), self.grid_of(rounding)
        assert inner is not None
        assert end is not None
        grid, alone, together = _gate(inner)
        if alone < end.scale:
            self.pair(gate.outputs[0], grid)
            self.inner[rounding] = together / end.scale
        return True

    def _added(self, value: Any, node: Any) -> bool:
        """What is added to a value on a grid and rounded cannot be seen beyond the difference of the two ranges."""
        others = [item for item in node.inputs if item is not value]
        other = self.grid(others[0]) if len(others) == 1 else None
        result = node.outputs[0]
        rounding, after = self.rounding(result), self.reader(result)
        saturating = after is not None and after.op_type in ("Relu", "Clip")
        if after is not None and saturating:
            rounding = self.rounding(after.outputs[0])
        end = None if rounding is None else self.grid_of(rounding)
        if other is None or end is None:
            return False
        if saturating and not self._fuses(after, rounding):
            self.pair(result, end)
        self._inner_pair(value, OnnxGrid.over(end.low - other.high, end.high - other.low), 1.0, rounding, end)
        return True

    def _inner_pair(self, value: Any, inner: OnnxGrid, slope: float, rounding: Any, end: OnnxGrid) -> None:
        """A pair inside a block; half a step of it, times the slope of what follows, is what the end can move by."""
        self.pair(value, inner)
        self.inner[rounding] = self.inner.get(rounding, 0.0) + slope * inner.scale / 2 / end.scale


def _gate(inner: OnnxGrid) -> tuple[OnnxGrid, float, float]:
    """A grid for ``sigmoid(x)`` where SiLU reads integers.

    Returns:
        The grid; the most that it moves ``x * sigmoid(x)`` by, alone; and together with the rounding of ``x``.
    """
    integers = torch.arange(256, dtype=torch.float64)
    x = (integers - inner.zero_point) * inner.scale
    factor = torch.sigmoid(x)
    grid = OnnxGrid.over(0.0, float(factor.max()))
    made = x * (factor / grid.scale).round() * grid.scale
    cell = x[:, None] + inner.scale * torch.linspace(-0.5, 0.5, 65, dtype=torch.float64)  # what is rounded to each
    return grid, float((made - F.silu(x)).abs().max()), float((made[:, None] - F.silu(cell)).abs().max())


def _is_nearest(node: Any) -> bool:
    return node.op_type == "Resize" and "mode" in node.attributes and node.attributes["mode"].value == "nearest"


def _saturating(function: Callable[[torch.Tensor], torch.Tensor], end: OnnxGrid) -> tuple[OnnxGrid, float]:
    """The smallest grid beyond whose ends ``function``, rounded to the grid ``end``, does not change; and its slope."""
    reach = 16.0 + 128 * max(abs(end.low), abs(end.high))  # a LeakyReLU's slope is a hundredth
    x = torch.linspace(-reach, reach, 1 + (1 << 17), dtype=torch.float64)
    y = function(x)
    integers = ((y / end.scale).round() + end.zero_point).clamp(0, 255)
    low = int((integers != integers[0]).int().argmax()) if bool((integers != integers[0]).any()) else 0
    high = int((integers != integers[-1]).nonzero().max()) if bool((integers != integers[-1]).any()) else len(x) - 1
    slope = float((y.diff() / x.diff()).abs().max())
    return OnnxGrid.over(float(x[max(low - 1, 0)]), float(x[min(high + 1, len(x) - 1)])), slope
