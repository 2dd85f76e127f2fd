"""Layers with int8 weights that run on onednn's integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.lower.features import require_int8
from fxcompress.lower.integers import ByteGrid
from fxcompress.lower.prepacked import Geometry, Kernel, PostOp, Prepacked
from fxcompress.nodes import rows_of

#: A result that is not rounded.
_PLAIN = ByteGrid(1.0, 0, 0, 255)
#: Activations that are affine between two ends: factor and shift, which weights and bias take, and the clip.
_AFFINE = {"hardsigmoid": (1 / 6, 0.5, PostOp("hardtanh", (0.0, 1.0)))}


def _rounded_anyway(post: PostOp, grid: ByteGrid) -> bool:
    """Whether saturation at the ends of a grid does all that an activation would have done (ReLU, ReLU6, Hardtanh)."""
    if post.name == "relu":
        return grid.starts_at_zero
    if post.name != "hardtanh":
        return False
    scale, zero_point, low, high = grid
    smallest, largest = (round(limit / scale) + zero_point for limit in post.scalars)
    return smallest <= low and largest >= high


class QuantizedLayer(Prepacked):
    """Weights, and the grids of what enters and leaves.

    The grids are part of the ``state_dict``: one that was made for other ranges is refused, because nodes of the graph
    hold them too.

    Args:
        weight: int8, output channels first.
        weight_scale: float32, ``[out]`` or 0-d.
        bias: float32 ``[out]``, or None.
        post: applied before rounding.
        x_grid: of the input.
        grid: of the result; None = the result is float32.
        other_grid: of what is added before ``post``; None = nothing is, or it is float32.
        spends_other: what is added may be overwritten.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    grids: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        post: PostOp,
        x_grid: ByteGrid,
        grid: ByteGrid | None,
        other_grid: ByteGrid | None = None,
        spends_other: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.factor, self.shift, post = _AFFINE.get(post.name, (1.0, 0.0, post))
        self.post = PostOp() if grid is not None and _rounded_anyway(post, grid) else post
        self.x_grid, self.grid, self.other_grid, self.spends_other = x_grid, grid, other_grid, spends_other
        self.register_buffer("grids", torch.tensor(self._grids()))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.post.name}, {self.x_grid} -> {self.grid}"

    @property
    def affine(self) -> bool:
        """Whether weights and bias take a part of the activation."""
        return (self.factor, self.shift) != (1.0, 0.0)

    def _grids(self) -> list[ByteGrid]:
        """Of the input, the result and what is added; where there is none, a grid without steps."""
        nothing = ByteGrid(0.0, 0, 0, 0)
        return [self.x_grid, self.grid or nothing, self.other_grid or nothing]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = state_dict.get(f"{prefix}grids")
        if given is not None and not torch.equal(given.cpu(), torch.tensor(self._grids(), dtype=given.dtype)):
            errors = args[-1]
            errors.append(
                f"{prefix}grids: the state_dict is that of a module lowered from other ranges of activations "
                f"({given.tolist()}; this one has {torch.tensor(self._grids()).tolist()}). Lower a model with the same "
                "ranges, or save and load the module whole."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (0) of each output channel."""
        out = self.weight.shape[0]
        scale = self.weight_scale if self.factor == 1 else self.weight_scale * self.factor
        return scale.expand(out).contiguous(), torch.zeros(out, dtype=torch.int64)

    def _offsets(self) -> Tensor | None:
        """What is added to each output channel."""
        if self.shift == 0:
            return self.bias
        bias = torch.zeros(self.weight.shape[0]) if self.bias is None else self.bias * self.factor
        return bias + self.shift

    def _finish(self) -> Callable[[Tensor], Tensor] | None:
        """What is left to do to a kernel's result: saturation at the ends of a narrower grid."""
        if self.grid is None or self.grid.full:
            return None
        low, high = self.grid.low, self.grid.high
        return lambda y: y.clamp_(low, high)

    def _linear(self, weight: Tensor, x: Tensor) -> Kernel:
        """``x [..., in]`` times ``weight [out, in]``."""
        require_int8()
        scales, zeros = self._scales()
        packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        first = (self.x_grid.scale, self.x_grid.zero_point, packed, scales, zeros)
        grid = self.grid or _PLAIN
        result = (self._offsets(), grid.scale, grid.zero_point, torch.float32 if self.grid is None else torch.uint8)
        post = (self.post.name, list(self.post.scalars), self.post.algorithm)
        other, keeps = self.other_grid, not self.spends_other
        unary, rest = torch.ops.onednn.qlinear_pointwise.default, (*first, *result, *post)
        binary = torch.ops.onednn.qlinear_pointwise.binary
        overwrites = self.spends_other and self.grid is None
        finish = self._finish()

        def kernel(x: Tensor, added: Tensor | None = None) -> Tensor:
            x = x.contiguous()
            if added is None:
                made: Tensor = unary(x, *rest)
            elif other is None:
                how = "sum" if overwrites else "add"
                made = binary(x, *first, added.contiguous(), *result, 1.0, 0, how, 1.0, *post)
            else:
                added = added.clone(memory_format=torch.contiguous_format) if keeps else added.contiguous()
                made = binary(x, *first, added, *result, other.scale, other.zero_point, "sum", 1.0, *post)
            return made if finish is None else finish(made)

        return kernel


class QuantizedLinear(QuantizedLayer):
    """``post(x @ weight.T + bias)``, or ``post(x @ weight.T + bias + other)``; weight ``[out, in]``."""

    def pack(self, x: Tensor) -> Kernel:
        return self._linear(self.weight, x)


class QuantizedConvolution(QuantizedLayer):
    """``post(conv(x, weight, bias))``, or ``post(conv(x, weight, bias) + other)``, 1-d or 2-d.

    Args:
        geometry: of the convolution.
        **options: see :class:`QuantizedLayer`.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry, **options: Any
    ) -> None:
        super().__init__(weight, weight_scale, bias, **options)
        self.geometry = geometry

    @property
    def pointwise(self) -> bool:
        """Whether every position is by itself: a linear layer over channels."""
        stride, padding, _, groups = self.geometry.lists
        return self.weight[0, 0].numel() == 1 and set(stride) == {1} and set(padding) == {0} and groups == 1

    def pack(self, x: Tensor) -> Kernel:
        if x.dim() == 4 and self.pointwise and self.other_grid is not None:
            return self._over_channels(x)  # adds faster than the convolution does, which is faster otherwise
        padding = list(self.geometry.padding)
        return self._convolving(self.weight, padding, list(x.shape))

    def _convolving(self, weight: Tensor, padding: list[int], shape: list[int]) -> Kernel:
        """The kernel for integers ``x`` of a shape."""
        stride, _, dilation, groups = self.geometry.lists
        require_int8()
        scales, zeros = self._scales()
        bias, zero_point = self._offsets(), self.x_grid.zero_point
        if zero_point and not any(padding):
            # Without padding the zero point adds the same everywhere; the kernel is faster without.
            sums = weight.flatten(1).sum(1, dtype=torch.float64) * scales.double()
            shift = (-zero_point * self.x_grid.scale * sums).float()
            bias, zero_point = shift if bias is None else bias + shift, 0
        # Told the shape, onednn packs for another kernel than the one that a zero point leads to, and packs again at
        # every call (measured: five times slower).
        packed = torch.ops.onednn.qconv_prepack(
            weight,
            scales,
            self.x_grid.scale,
            zero_point,
            stride,
            padding,
            dilation,
            groups,
            shape if zero_point == 0 else None,
        )
        first = (self.x_grid.scale, zero_point, packed, scales, zeros)
        where = (bias, stride, padding, dilation, groups)
        grid = self.grid or _PLAIN
        result = (grid.scale, grid.zero_point, torch.float32 if self.grid is None else torch.uint8)
        post = (self.post.name, list(self.post.scalars), self.post.algorithm)
        other, keeps, finish = self.other_grid, not self.spends_other, self._finish()
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        one = torch.ops.onednn.qconv_pointwise if len(shape) == 4 else torch.ops.onednn.qconv1d_pointwise
        unary, rest, binary = one.default, (*first, *where, *result, *post), torch.ops.onednn.qconv2d_pointwise.binary

        def kernel(x: Tensor, added: Tensor | None = None) -> Tensor:
            x = x.contiguous(memory_format=last)
            if added is None:
                made: Tensor = unary(x, *rest)
            else:
                assert other is not None
                added = added.clone(memory_format=last) if keeps else added.contiguous(memory_format=last)
                made = binary(x, *first, added, *where, *result, other.scale, other.zero_point, "sum", 1.0, *post)
            return made if finish is None else finish(made)

        return kernel

    def _over_channels(self, x: Tensor) -> Kernel:
        linear = self._linear(self.weight.flatten(1), x)

        def kernel(x: Tensor, added: Tensor | None = None) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            return linear(x, None if added is None else added.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        return kernel

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.geometry}"


class QuantizedBatchNorm(Prepacked):
    """BatchNorm in eval mode over ``[batch, channels, height, width]``, on integers.

    Args:
        norm: what it is made of; its statistics and affine map are kept under their names.
        x_grid: of the input.
        grid: of the result.
        relu: a ReLU follows.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.BatchNorm2d, x_grid: ByteGrid, grid: ByteGrid, *, relu: bool) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach())
        self.eps, self.x_grid, self.grid, self.relu = norm.eps, x_grid, grid, relu

    def pack(self, x: Tensor) -> Kernel:
        mean, var, eps = self.running_mean, self.running_var, self.eps
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        x_scale, x_zero_point = self.x_grid.scale, self.x_grid.zero_point
        scale, zero_point, low, high = self.grid
        low = max(low, zero_point) if self.relu else low
        clips = low > 0 or high < 255
        norm = torch.ops.onednn.qbatch_norm2d.default

        def kernel(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            made: Tensor = norm(x, x_scale, x_zero_point, weight, bias, mean, var, eps, scale, zero_point, torch.uint8)
            return made.clamp_(low, high) if clips else made

        return kernel


class QuantizedEmbedding(nn.Module):
    """Rows of an int8 table, in float32; only the rows that are asked for are multiplied by their scales.

    Args:
        weight: int8, ``[rows, width]``.
        scale: float32, ``[rows]`` or 0-d.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, rows: Tensor) -> Tensor:
        """``weight[rows] * weight_scale[rows]``, ``[..., width]``."""
        return rows_of(rows, self.weight, self.weight_scale)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class IntegerWeight(nn.Module):
    """A weight kept as integers for a layer that runs in float: called without arguments it gives the float values.

    Args:
        weight: int8 of any shape.
        scale: broadcasts to it.
        bias: of the layer, kept beside its weight.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)

    def forward(self) -> Tensor:
        """``weight * scale``."""
        return self.weight * self.weight_scale
