"""Reading and editing an ONNX graph whose values lie on grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


class GraphEditor:
    """Edits the graph of an ``onnx_ir.Model`` in place."""

    def __init__(self, model: Any) -> None:
        import onnx_ir

        self.ir, self.graph = onnx_ir, model.graph
        self.count = 0

    # ---- reading -------------------------------------------------------------------------------------------------

    def array(self, value: Any) -> np.ndarray[Any, Any] | None:
        """What a constant holds."""
        held = None if value is None else self.ir.convenience.get_const_tensor(value)
        return None if held is None else held.numpy()

    def maker(self, value: Any, kind: str) -> Any:
        """The node of a kind that makes a value, or None."""
        node = None if value is None else value.producer()
        return node if node is not None and node.op_type == kind else None

    def grid(self, value: Any) -> OnnxGrid | None:
        """The grid of a dequantized activation."""
        node = self.maker(value, "DequantizeLinear")
        return None if node is None or self.array(node.inputs[0]) is not None else self.grid_of(node)

    def grid_of(self, node: Any) -> OnnxGrid | None:
        """The grid of a QuantizeLinear or DequantizeLinear of activations."""
        scale, zero_point = self.array(node.inputs[1]), self.array(node.inputs[2])
        if scale is None or zero_point is None or scale.size != 1:
            return None
        return OnnxGrid(float(scale.reshape(())), int(zero_point.reshape(())))

    def reader(self, value: Any) -> Any:
        """The one node that reads a value which is no output, or None."""
        readers = list(value.consumers())
        return readers[0] if len(readers) == 1 and not value.is_graph_output() else None

    def rounding(self, value: Any) -> Any:
        """The one reader of a value if that is a QuantizeLinear, or None."""
        reader = self.reader(value)
        return reader if reader is not None and reader.op_type == "QuantizeLinear" else None

    def rounds_to(self, value: Any) -> OnnxGrid | None:
        """The grid that the one reader of a value rounds to."""
        reader = self.rounding(value)
        return None if reader is None else self.grid_of(reader)

    # ---- writing -------------------------------------------------------------------------------------------------

    def constant(self, array: np.ndarray[Any, Any]) -> Any:
        """An initializer."""
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

    def node(self, kind: str, inputs: Sequence[Any], like: Any = None, **attributes: Any) -> Any:
        """A new node, which is nowhere yet; its result has the shape of ``like``."""
        self.count += 1
        node = self.ir.node(kind, inputs, attributes or None, name=f"placed_{self.count}")
        node.outputs[0].name = f"placed_{self.count}_value"
        if like is not None:
            node.outputs[0].shape = like.shape
        return node

    def pair(self, value: Any, grid: OnnxGrid) -> None:
        """Let all who read a value read it rounded."""
        uses = list(value.uses())
        scale = self.constant(np.array(grid.scale, np.float32))
        zero_point = self.constant(np.array(grid.zero_point, np.uint8))
        rounded = self.node("QuantizeLinear", [value, scale, zero_point], value)
        back = self.node("DequantizeLinear", [rounded.outputs[0], scale, zero_point], value)
        rounded.outputs[0].type = self.ir.TensorType(self.ir.DataType.UINT8)
        back.outputs[0].type = value.type
        self.graph.insert_after(value.producer(), [rounded, back])
        for node, index in uses:
            node.replace_input_with(index, back.outputs[0])

    def replace(self, node: Any, *made: Any) -> None:
        """Put nodes in the place of one; who reads its result reads that of the last."""
        for item in made:
            if item.outputs[0].type is None:
                item.outputs[0].type = node.outputs[0].type
        self.graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(made[-1].outputs[0])
        self.graph.remove(node, safe=True)
