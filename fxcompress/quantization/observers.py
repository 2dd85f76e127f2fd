"""From values to a range: what an observer is, and the scale and zero point that a range gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxcompress.errors import InputError


@dataclass(frozen=True)
class Observer:
    """How the range of a tensor is found; see the subclasses."""

    #: The range follows from the extremes of each batch: training can go on observing.
    running: ClassVar[bool] = False


@dataclass(frozen=True)
class MinMax(Observer):
    """The extremes of everything seen so far (of a weight: of its current values)."""

    running: ClassVar[bool] = True


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The extremes of each batch, averaged exponentially: ``low += (1 - momentum) * (min x - low)``.

    Jacob et al. 2018, arXiv 1712.05877, section 3.1. The first batch sets the range.
    """

    momentum: float = 0.99

    running: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum!r}; expected a number in [0, 1), such as 0.99.")


@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds this percentage of all values, as much left out below as above."""

    percentage: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentage <= 100:
            raise InputError(f"percentage is {self.percentage!r}; expected a number in (50, 100], such as 99.99.")


@dataclass(frozen=True)
class Entropy(Observer):
    """The range whose quantized histogram has the smallest Kullback-Leibler divergence from the original.

    Migacz 2017, "8-bit Inference with TensorRT", GTC; on the histogram of all values but zero, which is on every grid.
    """


@dataclass(frozen=True)
class MSE(Observer):
    """The range with the smallest mean squared error of quantization (Banner et al. 2019, arXiv 1810.05723), searched
    among ``candidates`` fractions of the extremes."""

    candidates: int = 100

    def __post_init__(self) -> None:
        count = self.candidates
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= 10_000:
            raise InputError(f"candidates is {self.candidates!r}; expected an integer in [2, 10000].")


def rows(x: Tensor, axis: int | None) -> Tensor:
    """A tensor as ``[channels, values]``; one row without an axis."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value: 0-d, or ``[channels]`` along ``axis``."""
    if axis is None:
        low, high = x.aminmax()
        return low, high
    flat = x.movedim(axis, 0).flatten(1)
    return flat.amin(1), flat.amax(1)
