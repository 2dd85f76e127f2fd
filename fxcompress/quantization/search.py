"""Searches for the range of a grid, over values that are weighted by how often they occur."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fxcompress.quantization.spec import QuantSpec

Range = tuple[Tensor, Tensor]
#: Fractions of the extremes that the divergence is computed for.
_CANDIDATES = 100
_TINY = 1e-12


def percentiles(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, percentage: float) -> Range:
    """The range that leaves out at most half of ``100 - percentage`` percent of the values at each end.

    Args:
        values, counts: ``[channels, n]``.
        low, high: extremes, ``[channels]``; the result lies within.
        percentage: of values to keep.
    """
    values, order = values.double().sort(1)
    reached = counts.double().gather(1, order).cumsum(1)
    total = reached[:, -1:]
    out = total * (100 - percentage) / 200
    first = (reached <= out).sum(1).clamp(max=values.shape[1] - 1)
    last = (reached < total - out).sum(1).clamp(max=values.shape[1] - 1)
    below, above = (values.gather(1, place[:, None]).squeeze(1) for place in (first, last))
    return torch.maximum(below, low.double()).clamp(max=0), torch.minimum(above, high.double()).clamp(min=0)


def lowest_error(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, candidates: int) -> Range:
    """The fraction of the extremes with the smallest ``sum counts * (x - quantize(x))^2``; see :func:`percentiles`."""
    values, counts, low, high = (item.double() for item in (values, counts, low, high))
    best_error = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for step in range(candidates, 0, -1):
        fraction = step / candidates
        grid = spec.grid(low * fraction, high * fraction)
        scale, zero_point = grid.scale[:, None], grid.zero_point[:, None]
        steps = (values / scale).round()
        steps = torch.minimum(torch.maximum(steps, spec.quant_min - zero_point), spec.quant_max - zero_point)
        error = (counts * (values - steps * scale) ** 2).sum(1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, fraction, best)
    return low * best, high * best


def lowest_divergence(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Range:
    """The fraction of the extremes whose clipped histogram loses least information on as many levels as the grid has.

    For every fraction: P is the histogram inside the range, what lies outside added to its ends; Q is the histogram
    inside it, merged into equal levels, each spread evenly over the bins of the level that are not empty; the
    divergence is ``sum P log(P / Q)`` (Migacz 2017).

    Args:
        values, counts: ``[channels, bins]``, a histogram with equal bins.
        low, high: extremes, ``[channels]``.
        spec: the grid.
    """
    levels = spec.quant_max - spec.quant_min
    best = torch.ones_like(low, dtype=torch.float64)
    for row in range(len(values)):
        if int((counts[row] > 0).sum()) <= levels:
            continue  # too few values to say anything: the whole range
        lowest = torch.inf
        for step in range(_CANDIDATES, 0, -1):
            fraction = step / _CANDIDATES
            divergence = _divergence(
                values[row], counts[row], float(low[row]) * fraction, float(high[row]) * fraction, levels
            )
            if divergence < lowest:
                lowest, best[row] = divergence, fraction
    return low.double() * best, high.double() * best


def _divergence(values: Tensor, counts: Tensor, low: float, high: float, levels: int) -> float:
    """For one channel and one range; infinite for a range with fewer bins than levels."""
    inside = (values >= low) & (values <= high)
    q = counts[inside]
    if len(q) < levels or not bool(q.sum() > 0):
        return torch.inf
    p = q.clone()
    p[0] += counts[values < low].sum()
    p[-1] += counts[values > high].sum()
    level = torch.arange(len(q), device=q.device) * levels // len(q)
    present = (q > 0).double()
    merged = q.new_zeros(levels).index_add(0, level, q)
    shared = q.new_zeros(levels).index_add(0, level, present)
    q = (merged / shared.clamp(min=1))[level] * present
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp(min=_TINY)).log()).sum())
