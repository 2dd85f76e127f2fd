"""Where an ONNX graph needs pairs of QuantizeLinear and DequantizeLinear so that a runtime fuses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

#: Their results hold elements of their first input, or what commutes with rounding.
_CLOSED = frozenset(
    """MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Slice Split Expand DepthToSpace SpaceToDepth Tile Gather
    Relu""".split()
)
_ACTIVATIONS: dict[str, Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "HardSwish": lambda x, options: F.hardswish(x),
    "Gelu": lambda x, options: F.gelu(x, approximate=options.get("approximate", "none")),
    "LeakyRelu": lambda x, options: F.leaky_relu(x, options.get("alpha", 0.01)),
    "Elu": lambda x, options: F.elu(x, options.get("alpha", 1.0)),
    "HardSigmoid": lambda x, options: (options.get("alpha", 0.2) * x + options.get("beta", 0.5)).clamp(0, 1),
    "Sigmoid": lambda x, options: torch.sigmoid(x),
    "Tanh": lambda x, options: torch.tanh(x),
}
#: Half of what an int32 bias may hold: the sum of products needs room too.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class OnnxGrid:
    """Scale and zero point of uint8 values, as numbers."""

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """The value of integer 0."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The value of integer 255."""
        return (255 - self.zero_point) * self.scale

    @classmethod
    def over(cls, low: float, high: float) -> OnnxGrid:
        """A grid that reaches from ``low`` to ``high`` and holds zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32((high - low) / 255)) or 1.0
        return cls(scale, int(np.clip(round(-low / scale), 0, 255)))


def place_pairs(model: Any, *, every: bool) -> list[str]:
    """Edit an ``onnx_ir.Model`` in place; returns notes.

    Weights that are transposed are stored transposed, and biases of convolutions and Gemm as int32 with the scale of
    the products. ``every``: also a pair behind each operator that only moves or picks values, on its input's grid, and
    inside fused blocks, behind a convolution whose result is added to or passed to an activation. There the grid is
    one beyond whose ends the block's result saturates, so that no data is needed to find it.
    """
    placer = _Placer(model)
    placer.weights()
    if every:
        placer.movements()
        placer.blocks()
    placer.biases()  # last: the step of a bias is that of the layer's input
    placer.sweep()
    return placer.notes()


class _Placer:
    def __init__(self, model: Any) -> None:
        import onnx_ir

        self.ir, self.graph = onnx_ir, model.graph
        self.count = 0
        self.left: Counter[str] = Counter()

    def notes(self) -> list[str]:
        return [f"{count} convolutions stay float: {reason}" for reason, count in self.left.items()]

    # ---- reading -------------------------------------------------------------------------------------------------

    def _array(self, value: Any) -> np.ndarray[Any, Any] | None:
        """What a constant holds."""
        held = None if value is None else self.ir.convenience.get_const_tensor(value)
        return None if held is None else held.numpy()

    def _maker(self, value: Any, kind: str) -> Any:
        """The node of a kind that makes a value, or None."""
        node = None if value is None else value.producer()
        return node if node is not None and node.op_type == kind else None

    def _grid(self, value: Any) -> OnnxGrid | None:
        """The grid of a dequantized activation."""
        node = self._maker(value, "DequantizeLinear")
        return None if node is None or self._array(node.inputs[0]) is not None else self._grid_of(node)

    def _grid_of(self, node: Any) -> OnnxGrid | None:
        scale, zero_point = self._array(node.inputs[1]), self._array(node.inputs[2])
        if scale is None or zero_point is None or scale.size != 1:
            return None
        return OnnxGrid(float(scale.reshape(())), int(zero_point.reshape(())))

    def _reader(self, value: Any) -> Any:
        """The one node that reads a value which is no output, or None."""
        readers = list(value.consumers())
        return readers[0] if len(readers) == 1 and not value.is_graph_output() else None

    def _rounds_to(self, value: Any) -> OnnxGrid | None:
        """The grid that the one reader of a value rounds to."""
        reader = self._reader(value)
        return self._grid_of(reader) if reader is not None and reader.op_type == "QuantizeLinear" else None

    # ---- writing -------------------------------------------------------------------------------------------------

    def _constant(self, array: np.ndarray[Any, Any]) -> Any:
        self.count += 1
        tensor = self.ir.tensor(array, name=f"placed_{self.count}")
        value = self.ir.Value(
            name=tensor.name,
            shape=self.ir.Shape(array.shape),
            type=self.ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _node(self, kind: str, inputs: list[Any], like: Any = None, **attributes: Any) -> Any:
        self.count += 1
        node = self.ir.node(kind, inputs, attributes or None, name=f"placed_{self.count}")
        node.outputs[0].name = f"placed_{self.count}_value"
        if like is not None:
            node.outputs[0].shape = like.shape
        return node

    def _pair(self, value: Any, grid: OnnxGrid) -> None:
        """Let all who read a value read it rounded."""
        uses = list(value.uses())
        scale = self._constant(np.array(grid.scale, np.float32))
        zero_point = self._constant(np.array(grid.zero_point, np.uint8))
        rounded = self._node("QuantizeLinear", [value, scale, zero_point], value)
        back = self._node("DequantizeLinear", [rounded.outputs[0], scale, zero_point], value)
        rounded.outputs[0].type = self.ir.TensorType(self.ir.DataType.UINT8)
        back.outputs[0].type = value.type
        self.graph.insert_after(value.producer(), [rounded, back])
        for node, index in uses:
            node.replace_input_with(index, back.outputs[0])

    # ---- constants -----------------------------------------------------------------------------------------------

    def weights(self) -> None:
        """A transposed weight is stored transposed."""
        for node in list(self.graph):
            source = self._maker(node.inputs[0], "DequantizeLinear") if node.op_type == "Transpose" else None
            held = None if source is None else self._array(source.inputs[0])
            if source is None or held is None:
                continue
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(held.ndim)[::-1]
            axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
            integers = self._constant(np.ascontiguousarray(held.transpose(order)))
            made = self._node(
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
            grid, bias = self._grid(node.inputs[0]), self._array(node.inputs[2])
            weight = self._maker(node.inputs[1], "DequantizeLinear")
            scales = None if weight is None else self._array(weight.inputs[1])
            if grid is None or bias is None or weight is None or scales is None or bias.ndim != 1:
                continue
            step = scales.astype(np.float64) * grid.scale
            if (np.abs(bias) > step * _LARGEST_BIAS).any():
                continue  # weights so small beside their bias that no int32 holds it in their steps
            step = np.broadcast_to(step, bias.shape).astype(np.float32)
            integers = self._constant(np.rint(bias / step.astype(np.float64)).astype(np.int32))
            per_channel = scales.ndim > 0 and scales.size > 1
            scale = self._constant(step if per_channel else step[:1].reshape(()))
            made = self._node("DequantizeLinear", [integers, scale], node.inputs[2], axis=0)
            made.outputs[0].type = node.inputs[2].type
            self.graph.insert_before(node, made)
            node.replace_input_with(2, made.outputs[0])

    def sweep(self) -> None:
        """Drop constants that nobody reads any more."""
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del self.graph.initializers[name]

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
            grids = {self._grid(source) for source in sources}
            (grid,) = grids if len(grids) == 1 else (None,)
            if grid is None:
                continue
            for value in node.outputs:
                if value.uses() and not value.is_graph_output() and self._rounds_to(value) != grid:
                    self._pair(value, grid)

    def blocks(self) -> None:
        """A convolution has an integer kernel only where its own result is rounded."""
        for node in list(self.graph):
            if node.op_type != "Conv" or self._grid(node.inputs[0]) is None:
                continue
            if self._maker(node.inputs[1], "DequantizeLinear") is None:
                continue
            value = node.outputs[0]
            if self._rounds_to(value) is not None:
                continue
            grid = self._inner(value)
            if grid is None:
                self.left["their results are not rounded"] += 1
            elif grid != _FUSED:
                self._pair(value, grid)

    def _inner(self, value: Any) -> OnnxGrid | None:
        """A grid for a value inside a block, beyond whose ends the block's result does not change."""
        readers = list(value.consumers())
        if len(readers) == 2 and {item.op_type for item in readers} == {"Sigmoid", "Mul"}:  # SiLU
            (product,) = (item for item in readers if item.op_type == "Mul")
            end = self._rounds_to(product.outputs[0])
            return None if end is None else _saturating(F.silu, end)
        node = self._reader(value)
        if node is None:
            return None
        end = self._rounds_to(node.outputs[0])
        if node.op_type == "Relu" and end is not None:
            return _FUSED if end.zero_point == 0 else end
        if node.op_type == "Clip" and end is not None:
            limits = [self._array(item) for item in node.inputs[1:3]]
            inside = len(limits) == 2 and all(item is not None for item in limits)
            if inside and float(limits[0]) <= end.low and float(limits[1]) >= end.high - end.scale / 2:  # type: ignore[arg-type]
                return _FUSED
            return end
        if node.op_type == "Add":
            return self._addend(value, node)
        if node.op_type in _ACTIVATIONS and end is not None:
            function = _ACTIVATIONS[node.op_type]
            options = {key: item.value for key, item in node.attributes.items()}
            return _saturating(lambda x: function(x, options), end)
        return None

    def _addend(self, value: Any, node: Any) -> OnnxGrid | None:
        """What is added to a value on a grid and rounded cannot be seen beyond the difference of the two ranges."""
        others = [item for item in node.inputs if item is not value]
        other = self._grid(others[0]) if len(others) == 1 else None
        result = node.outputs[0]
        end = self._rounds_to(result)
        after = self._reader(result)
        if end is None and after is not None and after.op_type in ("Relu", "Clip"):
            end = self._rounds_to(after.outputs[0])  # both only saturate earlier
            if end is not None and (after.op_type == "Clip" or end.zero_point != 0):
                self._pair(result, end)
        if other is None or end is None:
            return None
        return OnnxGrid.over(end.low - other.high, end.high - other.low)


#: The runtime takes an operator into the rounding behind it.
_FUSED = OnnxGrid(0.0, 0)


def _is_nearest(node: Any) -> bool:
    return node.op_type == "Resize" and "mode" in node.attributes and node.attributes["mode"].value == "nearest"


def _saturating(function: Callable[[torch.Tensor], torch.Tensor], end: OnnxGrid) -> OnnxGrid:
    """The smallest grid beyond whose ends ``function``, rounded to the grid ``end``, does not change."""
    reach = 16.0 + 128 * max(abs(end.low), abs(end.high))  # a LeakyReLU's slope is a hundredth
    x = torch.linspace(-reach, reach, 1 + (1 << 17), dtype=torch.float64)
    integers = ((function(x) / end.scale).round() + end.zero_point).clamp(0, 255)
    low = int((integers != integers[0]).int().argmax()) if bool((integers != integers[0]).any()) else 0
    high = int((integers != integers[-1]).nonzero().max()) if bool((integers != integers[-1]).any()) else len(x) - 1
    return OnnxGrid.over(float(x[max(low - 1, 0)]), float(x[min(high + 1, len(x) - 1)]))
