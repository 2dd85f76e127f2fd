"""The same operators, as ONNX Runtime has integer kernels for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxcompress.export.graph_editor import GraphEditor

#: What a weight of int8 is at most.
_LARGEST = 127
_CLIPS = ("Relu", "Clip")


def rewrite(edit: GraphEditor) -> None:
    """Rewrite what lies between two grids and has an integer kernel under another name, in place.

    BatchNorm and average pooling become depthwise convolutions, means over images GlobalAveragePool. ONNX Runtime
    computes the first and the last in float, pooling with channels first, and transposes around them.
    """
    for node in list(edit.graph):
        form = _FORMS.get(node.op_type)
        if form is not None and edit.grid(node.inputs[0]) is not None:
            form(edit, node)


def clips(edit: GraphEditor) -> None:
    """A ReLU between grids, of which the second has integers below zero, becomes a LeakyReLU of slope 0.

    A ReLU is dropped where the grid behind it ends at zero; elsewhere it has no integer kernel, and this has one.
    """
    for node in list(edit.graph):
        if node.op_type != "Relu" or edit.grid(node.inputs[0]) is None:
            continue
        end = edit.rounds_to(node.outputs[0])
        if end is not None and end.zero_point:
            edit.replace(node, edit.node("LeakyRelu", node.inputs[:1], node.outputs[0], alpha=0.0))


def sums(edit: GraphEditor) -> None:
    """A sum in front of a LayerNormalization is written as Sum, which ONNX Runtime does not fuse with it.

    Its SkipLayerNormalization takes 0.45 ms for 64 tokens of 768 channels, Sum and LayerNormalization 0.1 ms (1.32).
    """
    for node in list(edit.graph):
        add = edit.maker(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is not None:
            edit.replace(add, edit.node("Sum", add.inputs, add.outputs[0]))


def _norm(edit: GraphEditor, node: Any) -> None:
    """One multiplication and addition for each channel: a depthwise convolution over single positions."""
    gamma, beta, mean, variance = (edit.array(value) for value in node.inputs[1:5])
    if gamma is None or beta is None or mean is None or variance is None or len(_sizes(node.inputs[0])) != 4:
        return
    if not _rounded(edit, node):
        return
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    bias = edit.constant((beta - mean * factor).astype(np.float32))
    signs = np.sign(factor).reshape(-1, 1, 1, 1)
    edit.replace(node, _depthwise(edit, node, signs, np.abs(factor), [bias]))


def _average(edit: GraphEditor, node: Any) -> None:
    """Average pooling without padding: a depthwise convolution with equal weights."""
    sizes, options = _sizes(node.inputs[0]), {key: item.value for key, item in node.attributes.items()}
    plain = not any(options.get("pads", ())) and not options.get("ceil_mode", 0)
    plain = plain and options.get("auto_pad", "NOTSET") == "NOTSET"
    if len(sizes) != 4 or not isinstance(sizes[1], int) or not plain or not _rounded(edit, node):
        return
    kernel = tuple(options["kernel_shape"])
    factor = np.full(sizes[1], 1 / np.prod(kernel))
    kept = {key: options[key] for key in ("strides", "dilations") if key in options}
    edit.replace(node, _depthwise(edit, node, np.ones((sizes[1], 1, *kernel)), factor, [], **kept))


def _mean(edit: GraphEditor, node: Any) -> None:
    """A mean over an image: global average pooling, and a reshape where its dimensions go."""
    sizes, axes = _sizes(node.inputs[0]), edit.array(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or len(sizes) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return
    end = edit.rounds_to(node.outputs[0])
    if end is None:
        return
    if "keepdims" not in node.attributes or node.attributes["keepdims"].as_int():
        edit.replace(node, edit.node("GlobalAveragePool", node.inputs[:1], node.outputs[0]))
        return
    pooled = edit.node("GlobalAveragePool", node.inputs[:1])
    pooled.outputs[0].shape = edit.ir.Shape([*sizes[:2], 1, 1])
    edit.replace(node, pooled, edit.node("Flatten", pooled.outputs, node.outputs[0], axis=1))
    edit.pair(pooled.outputs[0], end)


_FORMS = {"BatchNormalization": _norm, "AveragePool": _average, "ReduceMean": _mean}


def _sizes(value: Any) -> list[Any]:
    """A value's shape: a number, or what stands for any, for each dimension."""
    return [] if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]


def _rounded(edit: GraphEditor, node: Any) -> bool:
    """Whether a result is rounded, at most clipped before: elsewhere a grid would be needed that is not there."""
    after = edit.reader(node.outputs[0])
    clipped = after is not None and after.op_type in _CLIPS
    return edit.rounding(after.outputs[0] if clipped else node.outputs[0]) is not None


def _depthwise(
    edit: GraphEditor,
    node: Any,
    signs: np.ndarray[Any, Any],
    factor: np.ndarray[Any, Any],
    more: Sequence[Any],
    **kept: Any,
) -> Any:
    """A convolution of each channel with ``signs * factor``, exact in 8 bits: a scale for each channel."""
    scale = np.where(factor > 0, factor, 1.0) / _LARGEST
    integers, zeros = (_LARGEST * signs).astype(np.int8), np.zeros(len(scale), np.int8)
    constants = [edit.constant(integers), edit.constant(scale.astype(np.float32)), edit.constant(zeros)]
    weight = edit.node("DequantizeLinear", constants, axis=0)
    weight.outputs[0].shape = edit.ir.Shape(signs.shape)
    weight.outputs[0].type = node.inputs[0].type
    edit.graph.insert_before(node, weight)
    inputs, kernel = [node.inputs[0], weight.outputs[0], *more], signs.shape[2:]
    return edit.node("Conv", inputs, node.outputs[0], group=len(scale), kernel_shape=list(kernel), **kept)
