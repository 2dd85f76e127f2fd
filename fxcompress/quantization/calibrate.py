"""Calibration: what went by at a place where a fake-quant node belongs, and the range that an observer makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import InputError
from fxcompress.module import TracedModule, evaluating
from fxcompress.processes import summed, widest
from fxcompress.quantization.observers import MinMax, Observer, extremes, rows
from fxcompress.quantization.spec import QuantSpec

#: Of a histogram that reaches from ``-2^k`` to ``2^k``, so that doubling the range merges pairs of bins exactly.
BINS = 8192


class Calibrator(nn.Module):
    """Stands where a fake-quant module belongs, and remembers what it is called with.

    Attributes:
        low, high: what the observer makes of the extremes of each batch, 0-d or ``[channels]``.
        magnitude: mean of ``abs(x)``, likewise; zeros of weights, which masks made, are not counted.
        batches: how often it saw something; several nodes that share it count as many times.
        watching: whether it looks at what it is called with.
    """

    def __init__(self, name: str, spec: QuantSpec) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        self.batches = 0
        self.watching = False
        self.low = self.high = self.magnitude = torch.zeros(())
        self._last = sys.maxsize  # a forward begins with a node that does not come behind this one
        self._earlier: tuple[Tensor, Tensor] | None = None
        self._batch = self.low, self.high
        self._sums: Tensor | None = None  # of magnitudes, and their numbers
        self._values: Tensor | None = None  # of a weight
        self._histogram: _Histogram | None = None

    def forward(self, x: Tensor, factor: Tensor | None = None, place: int = 0) -> Tensor:
        if self.watching:
            self.see(x.detach() if factor is None else x.detach() * factor, place)
        return x

    def see(self, x: Tensor, place: int = 0) -> None:
        """One batch, or what one of the nodes that share the calibrator sees of it.

        Args:
            x: what goes by.
            place: which of the nodes it is, counted in the order of the graph.

        Raises:
            InputError: it holds values that are not finite.
        """
        if x.numel() == 0:
            return
        low, high = extremes(x, self.spec.axis)
        weight = self.spec.role == "weight"
        if not weight:  # every process has its part of a batch, and ends with the same range
            low, high = widest(low, high)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise InputError(
                f"calibration met NaN or infinite values at {self.name}; expected finite ones. Check the batches for "
                "bad samples, and the model for overflow."
            )
        if place > self._last:  # of the same forward
            low, high = torch.minimum(self._batch[0], low), torch.maximum(self._batch[1], high)
        elif self.batches and not weight:
            self._earlier = self.low, self.high
        self._last, self._batch = place, (low, high)
        if self._earlier is None:
            self.low, self.high = low, high
        else:
            self.low, self.high = self.observer.follow(torch.stack(self._earlier), torch.stack(self._batch))
        flat = rows(x, self.spec.axis)
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums = torch.stack((flat.abs().sum(1, dtype=dtype), torch.full_like(flat[:, 0], flat.shape[1], dtype=dtype)))
        if weight:
            sums[1] = (flat != 0).sum(1)
        else:
            sums = summed(sums)
        self._sums = sums if self._sums is None else self._sums + sums
        self.magnitude = (self._sums[0] / self._sums[1].clamp(min=1)).reshape(low.shape)
        if weight and self.observer.reads == "values":
            self._values = flat
        elif self.observer.reads != "extremes":
            self._histogram = (None if weight else self._histogram) or _Histogram(flat)
            self._histogram.add(flat, shared=not weight)
        self.batches += 1

    @property
    def observer(self) -> Observer:
        """The spec's; extremes where the range is given or learned."""
        return self.spec.observer or MinMax()

    def fitting(self) -> QuantSpec:
        """The spec, with signed integers where an activation around zero was seen to be negative."""
        spec = self.spec
        both = spec.role == "activation" and spec.symmetric and bool(self.low < 0)
        return replace(spec, signed=True) if both else spec

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high, 0-d or ``[channels]``.

        Raises:
            InputError: nothing was seen.
        """
        if not self.batches:
            raise InputError(
                f"calibration saw no values at {self.name}; expected at least one batch. Give batches, or inputs "
                "that reach this part of the model."
            )
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        if self.observer.reads != "extremes":
            values, counts = self._counted()
            found = self.observer.search(values, counts, low.reshape(-1), high.reshape(-1), self.fitting())
            some = (low < 0) | (high > 0)  # of a pruned channel there is nothing to search
            low, high = (torch.where(some, end.reshape(low.shape).to(low), low) for end in found)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise InputError(
                f"{self.observer!r} found a range that is not finite at {self.name}, of finite values; expected finite "
                "numbers, of every channel."
            )
        return low.clamp(max=0), high.clamp(min=0)

    def _counted(self) -> tuple[Tensor, Tensor]:
        """``[channels, n]``: values, and how often each was seen."""
        if self._values is not None:
            return self._values, (self._values != 0).to(self._values.dtype)
        assert self._histogram is not None
        counts = self._histogram.counts.clone()
        if self.observer.reads == "histogram":
            counts[:, BINS // 2] -= self._histogram.zeros
        return self._histogram.centers(), counts


class _Histogram:
    """Counts of values in ``BINS`` equal bins from ``-reach`` to ``reach``, per row."""

    def __init__(self, values: Tensor) -> None:
        self.reach = values.new_zeros(len(values), 1, dtype=torch.float64)
        self.counts = values.new_zeros(len(values), BINS, dtype=torch.float64)
        self.zeros = values.new_zeros(len(values), dtype=torch.float64)

    def add(self, values: Tensor, *, shared: bool) -> None:
        """Count ``[rows, values]``, doubling the reach of a row until it holds them.

        Args:
            values: of this process.
            shared: those of all processes are counted.
        """
        values = values.double()
        zeros, largest = (values == 0).sum(1), values.abs().amax(1, keepdim=True)
        if shared:
            zeros, largest = summed(zeros), widest(largest, largest)[1]
        self.zeros += zeros
        wanted = largest.clamp(min=2.0**-100).log2().ceil().exp2()
        while bool((grow := (self.reach > 0) & (self.reach < wanted)).any()):
            half = torch.zeros_like(self.counts)
            half[:, BINS // 4 : BINS // 4 * 3] = self.counts.reshape(len(values), -1, 2).sum(2)
            self.counts = torch.where(grow, half, self.counts)
            self.reach = torch.where(grow, 2 * self.reach, self.reach)
        self.reach = torch.where(self.reach > 0, self.reach, wanted)
        index = ((values / self.reach + 1) * (BINS / 2)).floor().long().clamp(0, BINS - 1)
        index += torch.arange(len(values), device=values.device)[:, None] * BINS
        counts = torch.bincount(index.reshape(-1), minlength=self.counts.numel()).reshape(self.counts.shape)
        self.counts += summed(counts) if shared else counts

    def centers(self) -> Tensor:
        """``[rows, BINS]``: what the bins stand for."""
        steps = torch.arange(BINS, dtype=torch.float64, device=self.reach.device)
        return self.reach * ((steps + 0.5) / (BINS / 2) - 1)


def calibrate(
    module: TracedModule, calibrators: Iterable[Calibrator], batches: Iterable[Any], run: Callable[[Any], object]
) -> None:
    """Run batches through a module whose fake-quant modules are still calibrators, in eval mode, without gradients.

    Raises:
        InputError: there are no batches, or one of them leads to values that are not finite.
    """
    seen = 0
    calibrators = list(calibrators)
    for calibrator in calibrators:
        calibrator.watching = True
    with evaluating(module), torch.no_grad():
        for batch in batches:
            run(batch)
            seen += 1
    if not seen:
        raise InputError(
            "calibration got no batches; expected at least one. Give a list of batches, or example_inputs."
        )
    for calibrator in calibrators:
        calibrator.range()
