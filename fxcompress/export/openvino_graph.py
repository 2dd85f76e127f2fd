"""A graph that OpenVINO read: what its rules for integer kernels look for in it, and what they would miss."""

from __future__ import annotations

from typing import Any

import numpy as np

from fxcompress.export.extras import require


def join_pairs(model: Any) -> int:
    """Let who reads a dequantized activation read one FakeQuantize, in place; returns how many pairs were joined.

    OpenVINO reads a QuantizeLinear as a FakeQuantize to ``[0, 255]`` with a conversion to uint8, and a
    DequantizeLinear as a conversion, a difference and a product. Its own rule that joins the two misses pairs
    (measured with 2026.4: those in front of a BatchNorm behind a join, or of a gate), and conversions to float remain
    between kernels. Here the FakeQuantize gives ``(integer - zero_point) * scale`` itself: it rounds as before.

    Args:
        model: an ``openvino.Model`` that was read from an ONNX model.
    """
    joined = 0
    for rounding in model.get_ordered_ops():
        if rounding.get_type_name() != "FakeQuantize":
            continue
        for integers in _readers(rounding, "Convert"):
            for values in _readers(integers, "Convert"):
                for shifted in _readers(values, "Subtract"):
                    for scaled in _readers(shifted, "Multiply"):
                        joined += _join(rounding, integers, shifted, scaled)
    model.validate_nodes_and_infer_types()
    return joined


def drop_zero_points(model: Any) -> int:
    """Let who reads ``x - 0`` read ``x``, in place; returns how many readers did.

    Weights have zero point 0. Where sizes are fixed, OpenVINO (2026.4) finds no integer kernel for a layer in front of
    a sum whose weights are such a difference: half of vit_b_16's layers were float.

    Args:
        model: an ``openvino.Model`` that was read from an ONNX model.
    """
    dropped = 0
    for shifted in model.get_ordered_ops():
        if shifted.get_type_name() != "Subtract":
            continue
        values, zero_point = shifted.input_value(0), _constant(shifted.input_value(1))
        same = values.get_partial_shape() == shifted.output(0).get_partial_shape()
        if zero_point is None or zero_point.any() or not same:
            continue
        for reader in list(shifted.output(0).get_target_inputs()):
            reader.replace_source_output(values)
            dropped += 1
    model.validate_nodes_and_infer_types()
    return dropped


def sums_convolutions(model: Any) -> bool:
    """Whether a convolution's result is added to another that depends on the inputs: a residual sum."""
    computed: set[str] = set()  # what depends on the inputs
    convolved: set[str] = set()  # results of convolutions, with or without a bias
    for node in model.get_ordered_ops():
        sources = [value.get_node().get_name() for value in node.input_values()]
        kind, found = node.get_type_name(), computed.intersection(sources)
        if kind == "Add" and len(found) == 2 and convolved.intersection(sources):
            return True
        if kind == "Parameter" or (found and kind != "ShapeOf"):
            computed.add(node.get_name())
        if kind in ("Convolution", "GroupConvolution") or (kind == "Add" and convolved.intersection(sources)):
            convolved.add(node.get_name())
    return False


def _join(rounding: Any, integers: Any, shifted: Any, scaled: Any) -> int:
    """One pair; 1, or 0 where zero point or scale are computed.

    Who else reads the integers is given those of the joined operator: were there two, each could round a tie its way.
    """
    (operators,) = require("openvino", "openvino.opset13")
    zero_point, scale = _constant(shifted.input_value(1)), _constant(scaled.input_value(1))
    ends = [_constant(rounding.input_value(place)) for place in (3, 4)]
    if zero_point is None or scale is None or any(end is None for end in ends):
        return 0
    limits = [operators.constant(((end - zero_point) * scale).astype(np.float32)) for end in ends]
    given = [rounding.input_value(place) for place in range(3)]
    made = operators.fake_quantize(*given, *limits, rounding.get_attributes()["levels"])
    made.set_friendly_name(scaled.get_friendly_name())
    for reader in scaled.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))
    others = [item for item in integers.output(0).get_target_inputs() if item.get_node().get_type_name() != "Convert"]
    if others:
        steps = operators.round(operators.divide(made, operators.constant(scale)), "half_to_even")
        again = operators.convert(operators.add(steps, operators.constant(zero_point)), integers.get_element_type())
        for reader in others:
            reader.replace_source_output(again.output(0))
    return 1


def _readers(node: Any, kind: str) -> list[Any]:
    readers = [item.get_node() for item in node.output(0).get_target_inputs()]
    return [reader for reader in readers if reader.get_type_name() == kind]


def _constant(value: Any) -> Any:
    """What a constant holds, in float32 where it is converted; None for other values."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return node.data
    if kind not in ("Convert", "Reshape"):
        return None
    held = _constant(node.input_value(0))
    if held is None:
        return None
    return held.astype(np.float32) if kind == "Convert" else held.reshape(tuple(value.get_shape()))
