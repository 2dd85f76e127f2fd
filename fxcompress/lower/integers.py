"""Activations as uint8 tensors, and what is computed on them beside layers.

Every activation is held as uint8, whatever its spec says: onednn's kernels take nothing else. A signed grid is shifted
by 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxcompress.quantization.spec import Grid, QuantSpec

#: Between 2^23 and 2^24 float32 has the integers and nothing else.
_ONES = 1.5 * 2**23


class ByteGrid(NamedTuple):
    """A value is ``(integer - zero_point) * scale``, with integers in ``[low, high]``, which lies in [0, 255].

    Plain numbers, so that a node of a graph can hold it among its arguments.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, spec: QuantSpec, grid: Grid) -> ByteGrid:
        """The grid of a fake-quant node, per tensor."""
        shift = 128 if spec.quant_min < 0 else 0
        low, high = spec.quant_min + shift, spec.quant_max + shift
        return cls(float(grid.scale), int(grid.zero_point) + shift, low, high)

    @property
    def full(self) -> bool:
        """Whether every uint8 is on the grid, so that a kernel's saturation is the grid's."""
        return self.low == 0 and self.high == 255

    @property
    def starts_at_zero(self) -> bool:
        """Whether no value is negative: rounding to the grid does what a ReLU before it would do."""
        return self.zero_point == self.low


def quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    """Float values to the integers of a grid."""
    return quantizing(grid)(x)


@lru_cache(1024)
def quantizing(grid: ByteGrid) -> Callable[[Tensor], Tensor]:
    """:func:`quantize` for one grid, with what does not depend on values made beforehand."""
    start = torch.tensor(_ONES + grid.zero_point, dtype=torch.float32)
    factor, low, high = 1.0 / grid.scale, grid.low, grid.high

    def rounded(x: Tensor) -> Tensor:
        x = x if x.dtype is torch.float32 else x.to(torch.float32)
        return _stored(torch.add(start, x, alpha=factor), low, high)

    return rounded


def _stored(steps: Tensor, low: int, high: int) -> Tensor:
    """Numbers to which ``_ONES`` was added, as uint8: the addition rounded them, to even in the middle, and the
    integer is the lowest byte of what was computed. Three passes in place of six (torch's conversions are slow)."""
    return steps.clamp_(_ONES + low, _ONES + high).view(torch.int32).to(torch.uint8)


def dequantize(q: Tensor, grid: ByteGrid) -> Tensor:
    """The values that integers stand for, float32."""
    x = q.to(torch.float32)
    if grid[1]:
        x.sub_(grid[1])
    return x.mul_(grid[0])


def requantize(q: Tensor, grid: ByteGrid, new: ByteGrid) -> Tensor:
    """Integers of one grid to those of another."""
    if q.dim() == 4 and q.numel():
        return scale_channels(q, torch.ones(q.shape[1]), grid, new)
    return quantize(dequantize(q, grid), new)


def at_least(q: Tensor, low: int) -> Tensor:
    """A ReLU on integers: none below the one that stands for zero."""
    return q.clamp(min=low)


def add(a: Tensor, b: Tensor, a_grid: ByteGrid, b_grid: ByteGrid, grid: ByteGrid, relu: bool) -> Tensor:
    """The sum of two tensors of one shape, with a ReLU behind it if asked for.

    ``onednn::qadd`` is not used: torch 2.13 reads integers above 127 as negative there.
    """
    scale, zero_point, low, high = grid
    steps = a.to(torch.float32).mul_(a_grid[0] / scale).add_(b, alpha=b_grid[0] / scale)
    shift = zero_point - (a_grid[1] * a_grid[0] + b_grid[1] * b_grid[0]) / scale
    if shift:
        steps.add_(shift)  # not with _ONES: what is added to that is rounded
    return _stored(steps.add_(_ONES), max(low, zero_point) if relu else low, high)


def multiply(a: Tensor, b: Tensor, a_grid: ByteGrid, b_grid: ByteGrid, grid: ByteGrid) -> Tensor:
    """The product of two tensors that broadcast. (``onednn::qmul`` has the error of ``qadd``.)

    Args:
        a: any shape; ``[batch, channels, height, width]`` times ``b`` of ``[batch, channels, 1, 1]`` is one kernel.
        b: likewise.
        a_grid: of ``a``.
        b_grid: of ``b``.
        grid: of the result.
    """
    if a.dim() == b.dim() == 4 and a.shape[:2] == b.shape[:2] and 1 in (a[0, 0].numel(), b[0, 0].numel()):
        if a[0, 0].numel() == 1:
            a, b, a_grid, b_grid = b, a, b_grid, a_grid
        gates = dequantize(b, b_grid).flatten(1)
        if len(gates) == 1:
            return scale_channels(a, gates[0], a_grid, grid)
        parts = [scale_channels(item, gate, a_grid, grid) for item, gate in zip(a.split(1), gates, strict=True)]
        return torch.cat(parts)
    return quantize(dequantize(a, a_grid).mul(dequantize(b, b_grid)), grid)


def scale_channels(q: Tensor, factors: Tensor, grid: ByteGrid, new: ByteGrid) -> Tensor:
    """Every channel of ``q [batch, channels, height, width]`` times a factor: BatchNorm without statistics."""
    zeros = torch.zeros_like(factors)
    q = q.contiguous(memory_format=torch.channels_last)
    made: Tensor = torch.ops.onednn.qbatch_norm2d.default(
        q, grid[0], grid[1], factors, zeros, zeros, zeros, 1.0, new[0], new[1], torch.uint8
    )
    return made if new[2] == 0 and new[3] == 255 else made.clamp_(new[2], new[3])


def max_pool2d(q: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """The largest integers under a window; torch's own pooling takes no uint8 of more than 255 positions.

    Args:
        q: ``[batch, channels, height, width]``.
        kernel: height and width.
        stride: likewise.
        padding: likewise; positions outside never win.
    """
    rows = q.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    for dim in (2, 1):
        rows = _max_along(rows, dim, kernel[dim - 1], stride[dim - 1], padding[dim - 1])
    return rows.permute(0, 3, 1, 2)


def pair_of(value: Any) -> tuple[Any, Any]:
    """An option of a 2-d pooling, for height and width."""
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


def _max_along(x: Tensor, dim: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Pooling along one dimension: the largest of ``kernel`` strided slices."""
    size = x.shape[dim]
    count = (size + 2 * padding - kernel) // stride + 1
    made = None
    # The slice in the middle first: with at most half a kernel of padding it reaches every output.
    for tap in sorted(range(kernel), key=lambda tap: abs(tap - padding)):
        start = tap - padding
        first = max(0, -(start // stride) if start < 0 else 0)
        last = min(count, (size - 1 - start) // stride + 1)
        if last <= first:
            continue  # wholly in the padding
        piece = x.narrow(dim, start + first * stride, (last - first - 1) * stride + 1)
        piece = piece[(slice(None),) * dim + (slice(None, None, stride),)]
        if made is None:
            made = piece.clone() if last - first == count else _padded(piece, dim, first, count)
        else:
            part = made.narrow(dim, first, last - first)
            torch.maximum(part, piece, out=part)
    assert made is not None
    return made


def _padded(piece: Tensor, dim: int, first: int, count: int) -> Tensor:
    """A piece among zeros, which lose against every integer."""
    shape = list(piece.shape)
    shape[dim] = count
    made = piece.new_zeros(shape)
    made.narrow(dim, first, piece.shape[dim]).copy_(piece)
    return made


def average(q: Tensor, dims: tuple[int, ...], grid: ByteGrid, new: ByteGrid) -> Tensor:
    """The mean over whole dimensions, which stay with size 1."""
    count = math.prod(q.shape[dim] for dim in dims)
    # int32 is the fastest to sum in (torch 2.13: 0.75 of float32), and does not overflow before 2^23 bytes.
    total = q.sum(dims, keepdim=True, dtype=torch.int32 if count < 2**23 else torch.int64).to(torch.float32)
    return quantize(total.mul_(grid[0] / count).sub_(grid[0] * grid[1]), new)


#: Functions that can be told everything but their first argument beforehand, and what then is called.
PREPARED: dict[Any, Callable[..., Callable[[Tensor], Tensor]]] = {quantize: quantizing}
