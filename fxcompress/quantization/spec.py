"""What a fake-quant node promises: how many bits, on which grid, and how the range is found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.quantization.observers import MinMax, Observer

#: Below this a step is no step: everything was zero.
SMALLEST_STEP = 1e-30


class Grid(NamedTuple):
    """The grid of a fake-quant node: a value is ``(integer - zero_point) * scale``.

    Attributes:
        scale: float, > 0; 0-d per tensor, ``[channels]`` per channel.
        zero_point: int32, of the same shape, in ``[quant_min, quant_max]``; the integer that stands for zero.
    """

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class QuantSpec:
    """Frozen description of one fake-quant node.

    Attributes:
        bits: width of the integers, 1 (binary) to 8.
        role: of what: decides whether a range remembers earlier batches (activations) or not (weights).
        signed: integers from ``-2^(bits-1)``, or from 0.
        symmetric: the zero point is 0.
        narrow: signed and without the lowest integer, so that the grid is the same for ``-x``.
        axis: dimension whose indices have a scale each; None = one scale for the tensor.
        observer: how the range is found; None where it is given or learned.
        learned: scale (and, unless symmetric, zero point) are parameters.
    """

    bits: int
    role: Literal["weight", "activation"]
    signed: bool
    symmetric: bool
    narrow: bool = False
    axis: int | None = None
    observer: Observer | None = None
    learned: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise InputError(f"bits is {self.bits!r}; expected an integer from 1 to 8.")
        if self.narrow and not (self.signed and self.symmetric):
            raise InputError("narrow leaves out the lowest of signed integers around 0; expected signed and symmetric.")

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        if self.bits == 1:
            return -1 if self.signed else 0
        return int(self.narrow) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return max(1, (1 << (self.bits - 1)) - 1) if self.signed else (1 << self.bits) - 1

    def along(self, axis: int | None) -> QuantSpec:
        """The same grid with scales along another dimension, or one scale for the tensor."""
        return replace(self, axis=axis)

    def frozen(self) -> QuantSpec:
        """The same grid with a range that is given."""
        return replace(self, observer=None, learned=False)

    def grid(self, low: Tensor, high: Tensor) -> Grid:
        """Scale and zero point for a range, which is extended to hold 0 (Jacob et al. 2018, section 3.1).

        An empty range (constant zero, or nothing seen: ``low > high``) gives scale 1.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-low, high) if self.signed else high) / self.quant_max
            zero_point = torch.zeros_like(scale)
        else:
            steps = self.quant_max - self.quant_min
            scale = high / steps - low / steps
            zero_point = (self.quant_min - low / scale).round()
        empty = ~((scale >= SMALLEST_STEP) & torch.isfinite(scale))
        scale = torch.where(empty, 1.0, scale)
        zero_point = torch.where(empty, 0.0, zero_point).clamp(self.quant_min, self.quant_max)
        return Grid(scale, zero_point.to(torch.int32))


def weight_spec(
    bits: int, *, axis: int | None = 0, observer: Observer | None = None, learned: bool = False
) -> QuantSpec:
    """Signed, symmetric and narrow: per output channel along ``axis``, or per tensor with None."""
    found = None if learned else observer or MinMax()
    return QuantSpec(
        bits, "weight", signed=True, symmetric=True, narrow=True, axis=axis, observer=found, learned=learned
    )


def activation_spec(
    bits: int, observer: Observer | None, *, symmetric: bool = False, signed: bool = False
) -> QuantSpec:
    """Per tensor; by default unsigned and affine, what integer kernels take."""
    return QuantSpec(bits, "activation", signed=signed, symmetric=symmetric, observer=observer)
