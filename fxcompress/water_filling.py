"""Sparsities scaled until a budget is met: each group takes its share, up to what it can lose, and others the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxcompress.channels.labels import BoolArray, FloatArray, IntArray
from fxcompress.figures import Figure

#: An allocation meets a budget if it costs at most that and at most this fraction less.
TOLERANCE = 0.005

#: Steps in search of the factor, a third of which halve its interval: 2^-60 of it is less than a double can tell apart.
_STEPS = 180


@dataclass(frozen=True)
class Limits:
    """What a group may keep: (groups,) each, in units.

    Attributes:
        units: how many the dense model has.
        least: the fewest, at least 1.
        most: the most; fewer than ``units`` where some are gone already.
        step: what is kept is a multiple of it, or ``most``.
    """

    units: IntArray
    least: IntArray
    most: IntArray
    step: IntArray

    def rounded(self, kept: FloatArray) -> FloatArray:
        """The next allocation that may be kept, upwards: (..., groups)."""
        up = np.ceil(np.maximum(kept, self.least) / self.step) * self.step
        allowed: FloatArray = np.minimum(up, self.most)
        return allowed

    def next(self, kept: FloatArray) -> FloatArray:
        """By how many units each group grows if it takes the next that it may keep; 0 where it has them all."""
        more: FloatArray = np.minimum((np.floor(kept / self.step) + 1) * self.step, self.most) - kept
        return more


def smallest(limits: Limits) -> FloatArray:
    """What is left at least: (groups,)."""
    return limits.rounded(limits.least.astype(np.float64))


def fill(figures: Sequence[Figure], targets: Sequence[float], sparsities: FloatArray, limits: Limits) -> FloatArray:
    """Allocations that cost at most the targets, and hardly less.

    All sparsities of an allocation are scaled by one factor, each up to the most that its group can lose: the factor is
    found by false position and bisection. Where the groups with a sparsity of 0 are needed as well, they share the rest
    alike. One factor may take many groups a unit down at once; so afterwards single units come back, each the largest
    that fits, until the gap is within :data:`TOLERANCE` or no unit fits.

    Args:
        figures: what has a budget.
        targets: what each of them may be; ``smallest(limits)`` meets them.
        sparsities: (allocations, groups), in [0, 1].
        limits: what groups may keep.

    Returns:
        kept units: (allocations, groups).
    """
    room = limits.units - limits.least
    shares = np.where(room > 0, sparsities, 0.0)
    shares = _enough(figures, targets, shares, limits)
    shares = shares / np.maximum(shares.max(axis=1, keepdims=True), 1e-300)
    positive = np.where(shares > 0, shares, np.inf)
    low = np.zeros(len(shares))
    high = 1 / np.minimum(positive.min(axis=1), 1.0)  # every group that has a share loses all it can
    dense, kept = _scaled(low, shares, limits), _scaled(high, shares, limits)
    over, under = _use(figures, targets, dense), _use(figures, targets, kept)
    kept[over <= 1] = dense[over <= 1]
    waiting = np.flatnonzero((over > 1) & (under < 1 - TOLERANCE))
    for number in range(_STEPS):
        if not len(waiting):
            break
        tried = _tried(number, *(values[waiting] for values in (low, high, over, under)))
        made = _scaled(tried, shares[waiting], limits)
        use = _use(figures, targets, made)
        fits = use <= 1
        these, others = waiting[fits], waiting[~fits]
        high[these], under[these], kept[these] = tried[fits], use[fits], made[fits]
        low[others], over[others] = tried[~fits], use[~fits]
        done: BoolArray = fits & (use >= 1 - TOLERANCE)
        waiting = waiting[~done]
    return _grown(figures, targets, kept, waiting, limits)


def _tried(number: int, low: FloatArray, high: FloatArray, over: FloatArray, under: FloatArray) -> FloatArray:
    """The next factors: where a line between both ends meets the target, and the middle in every third step.

    The first is 1, at which the group with the largest share has lost all it can: beyond it the ends say little.
    """
    if number == 0:
        return np.minimum(1.0, (low + high) / 2)
    middle = (low + high) / 2
    if number % 3 == 0:
        return middle
    line = low + (high - low) * (over - 1 + TOLERANCE / 2) / np.maximum(over - under, 1e-300)
    inside: FloatArray = np.where((line > low) & (line < high), line, middle)
    return inside


def _enough(figures: Sequence[Figure], targets: Sequence[float], shares: FloatArray, limits: Limits) -> FloatArray:
    """The shares; where all that have one cannot lose enough, the others have a share as well, far smaller."""
    lost = np.where(shares > 0, limits.rounded(limits.least.astype(np.float64)), limits.most)
    short = _use(figures, targets, lost) > 1
    made = shares.copy()
    room = limits.units > limits.least
    made[short] = np.where(shares[short] > 0, 1.0, np.where(room, 1e-9, 0.0))
    return made


def _scaled(factor: FloatArray, shares: FloatArray, limits: Limits) -> FloatArray:
    """What is kept at a factor: ``units - floor(units * factor * share)``, within limits."""
    lost = np.floor(limits.units * np.minimum(factor[:, None] * shares, 1.0))
    return limits.rounded(np.minimum(limits.units - lost, limits.most))


def _use(figures: Sequence[Figure], targets: Sequence[float], kept: FloatArray) -> FloatArray:
    """How much of the targets allocations use, of the scarcest one: (allocations,)."""
    used: FloatArray = np.max([f.value(kept) / target for f, target in zip(figures, targets, strict=True)], axis=0)
    return used


def _grown(
    figures: Sequence[Figure], targets: Sequence[float], kept: FloatArray, waiting: IntArray, limits: Limits
) -> FloatArray:
    """Allocations with single units back, the largest that fits first. Every round adds one, so this ends."""
    while len(waiting):
        mine = kept[waiting]
        by = limits.next(mine)
        uses = np.stack(
            [(f.value(mine)[:, None] + f.growth(mine, by)) / target for f, target in zip(figures, targets, strict=True)]
        ).max(axis=0)
        uses[(by <= 0) | (uses > 1)] = -np.inf
        best = uses.argmax(axis=1)
        rows = np.arange(len(mine))
        fits = np.isfinite(uses[rows, best])
        kept[waiting[fits], best[fits]] += by[rows, best][fits]
        waiting = waiting[fits & (uses[rows, best] < 1 - TOLERANCE)]
    return kept
