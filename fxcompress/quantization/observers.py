"""From values to a range: what an observer is, and the scale and zero point that a range gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.quantization.search import Range, lowest_divergence, lowest_error, percentiles

if TYPE_CHECKING:
    from fxcompress.quantization.spec import QuantSpec

Reads = Literal["extremes", "values", "histogram"]


@dataclass(frozen=True)
class Observer:
    """How the range of a tensor is found. A subclass says :meth:`follow`, or ``reads`` and :meth:`search`.

    Where it follows extremes, training can go on observing; what is searched for is found once. What an observer finds
    is widened to hold zero, which is on every grid. Options are fields of a frozen dataclass.
    """

    #: What the range follows from: the extremes of each batch; values; or a histogram, without what is exactly zero.
    #: The values of an activation are a histogram too, of 8,192 bins. Zeros of a weight do not count: masks make them.
    reads: ClassVar[Reads] = "extremes"

    def __init_subclass__(cls) -> None:
        if cls.reads not in get_args(Reads):
            raise TypeError(f"{cls.__name__}.reads is {cls.reads!r}; expected one of {', '.join(get_args(Reads))}.")
        if cls.reads == "extremes" and cls.search is not Observer.search:
            raise TypeError(f"{cls.__name__} has a search, which nothing calls: its reads is 'extremes'.")

    @property
    def running(self) -> bool:
        """Whether the range follows from the extremes of each batch."""
        return self.reads == "extremes"

    def follow(self, extremes: Tensor, batch: Tensor) -> Tensor:
        """The extremes after one more batch: by default those of everything seen.

        Args:
            extremes: so far, ``[2]`` or ``[2, channels]``, low and high.
            batch: those of the batch, likewise.
        """
        return torch.stack((torch.minimum(extremes[0], batch[0]), torch.maximum(extremes[1], batch[1])))

    def search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
        """Low and high, ``[channels]``: by default the extremes. Of what ``reads`` asks for.

        Args:
            values: ``[channels, n]``.
            counts: how often each of them occurs, likewise.
            low, high: the extremes, ``[channels]``; low is at most 0, high at least.
            spec: of the grid; ``spec.grid(low, high)`` gives scale and zero point.
        """
        return low, high


@dataclass(frozen=True)
class MinMax(Observer):
    """The extremes of everything seen so far (of a weight: of its current values)."""


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The extremes of each batch, averaged exponentially: ``low += (1 - momentum) * (min x - low)``.

    Jacob et al. 2018, arXiv 1712.05877, section 3.1. The first batch sets the range.
    """

    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum!r}; expected a number in [0, 1), such as 0.99.")

    def follow(self, extremes: Tensor, batch: Tensor) -> Tensor:
        return extremes + (1 - self.momentum) * (batch - extremes)


@dataclass(frozen=True)
class Percentile(Observer):
    """The range that holds this percentage of all values, as much left out below as above."""

    percentage: float = 99.99

    reads: ClassVar[Reads] = "values"

    def __post_init__(self) -> None:
        if not 50 < self.percentage <= 100:
            raise InputError(f"percentage is {self.percentage!r}; expected a number in (50, 100], such as 99.99.")

    def search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
        return percentiles(values, counts, low, high, self.percentage)


@dataclass(frozen=True)
class Entropy(Observer):
    """The range whose quantized histogram has the smallest Kullback-Leibler divergence from the original.

    Migacz 2017, "8-bit Inference with TensorRT", GTC; on the histogram of all values but zero, which is on every grid
    and would outweigh everything behind a ReLU.
    """

    reads: ClassVar[Reads] = "histogram"

    def search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
        return lowest_divergence(values, counts, low, high, spec)


@dataclass(frozen=True)
class MSE(Observer):
    """The range with the smallest mean squared error of quantization (Banner et al. 2019, arXiv 1810.05723), searched
    among ``candidates`` fractions of the extremes."""

    candidates: int = 100

    reads: ClassVar[Reads] = "values"

    def __post_init__(self) -> None:
        count = self.candidates
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= 10_000:
            raise InputError(f"candidates is {self.candidates!r}; expected an integer in [2, 10000].")

    def search(self, values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
        return lowest_error(values, counts, low, high, spec, self.candidates)


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
