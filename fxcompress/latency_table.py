"""Latency of allocations that nobody has built: from a table of what layers take at a few widths.

A few allocations are removed for real, and every node of what is left is measured (:mod:`fxcompress.timings`: once on a
machine). Between the widths that were measured, a node takes

    t = a + b * in + c * out + d * in * out,    a, b, c, d >= 0,

where in and out are the shares of the channels that it reads and makes: bilinear, as the work of a convolution is,
and never less where more is kept. The sum over the nodes is scaled by one factor so that it agrees with whole models,
dense and pruned, and its error is measured on further ones that had no part in this. In the units of all groups it is
a quadratic form, like MACs, and as fast to price.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import BoolArray, FloatArray, IntArray, labels_in
from fxcompress.figures import Polynomial
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.prices import Prices
from fxcompress.ranking import Ranking
from fxcompress.shrink import shrink
from fxcompress.timings import NodeTimes, Stopwatch, Timings, stopwatch
from fxcompress.undisturbed import undisturbed

#: Shares of its units that every group keeps in the models that calibrate, the dense one among them.
_UNIFORM = (1.0, 0.7, 0.5, 0.3)

#: How many random allocations are measured node by node, and how many of them also as a whole, to test with.
_RANDOM, _HELD_OUT = 6, 2

#: Seconds that a whole model is measured for, in each of several turns.
_LEAST, _TURNS = 0.1, 5


@dataclass(frozen=True)
class LatencyTable:
    """Predicts the time of a forward pass.

    Attributes:
        figure: seconds of allocations.
        dense: seconds of the module as it is, measured.
        scale: what the sum over the nodes is multiplied by.
        errors: relative errors of the prediction for whole models that had no part in it.
    """

    figure: Polynomial
    dense: float
    scale: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """The mean of the absolute relative errors."""
        return float(np.mean(np.abs(self.errors)))

    def __str__(self) -> str:
        return (
            f"latency: {self.dense * 1e3:.3f} ms dense; the table is scaled by {self.scale:.3f}, and its predictions "
            f"for {len(self.errors)} models of other widths are off by {self.error:.1%} on average"
        )


def measure(
    module: TracedModule,
    groups: ChannelGroups,
    inputs: Inputs,
    prices: Prices,
    *,
    round_to: int = 1,
    timings: Timings | None = None,
    watch: Stopwatch | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure the layers of a clean traced module at a few widths, and fit a table to them.

    Args:
        module: the clean module.
        groups: its channel analysis.
        inputs: what is timed.
        prices: of the module.
        round_to: widths are measured at multiples of it, as they will be kept.
        timings: what is known of this machine; by default what the user's cache directory holds.
        watch: measures; by default ``torch.utils.benchmark`` does.
        seed: of the random allocations.
    """
    known = Timings() if timings is None else timings
    random = np.random.default_rng(seed)
    uniform = [np.full(len(prices.groups), share) for share in _UNIFORM]
    drawn = list(random.uniform(0.15, 1.0, (_RANDOM, len(prices.groups))))
    shares = np.array([*uniform, *drawn], dtype=np.float64)
    allocations = prices.rounded(shares * prices.units.astype(np.float64), round_to)
    whole = len(uniform) + _HELD_OUT
    try:
        samples, wholes = [], []
        for number, kept in enumerate(allocations):
            small = removed(module, groups, prices, kept) if (kept < prices.units).any() else copy.deepcopy(module)
            samples.append(node_times(small, inputs, known, watch))
            if number < whole:
                wholes.append(small)
        measured = in_turns(wholes, inputs, watch)
    finally:
        if timings is None:
            known.close()
    raw = _fitted(module, groups, prices, allocations, samples)
    predicted = raw.value(allocations[:whole].astype(np.float64))
    ratios = np.log(np.array(measured) / predicted)
    scale = float(np.exp(ratios[: len(uniform)].mean()))
    errors = tuple((np.exp(np.log(scale) - ratios[len(uniform) :]) - 1).tolist())
    return LatencyTable(raw.scaled(scale), measured[0], scale, errors)


def removed(module: TracedModule, groups: ChannelGroups, prices: Prices, kept: IntArray) -> TracedModule:
    """What is left of a clean module where every group keeps so many units, whichever they are."""
    ranking = Ranking.of(module, groups, Masking(), prices.groups, [np.zeros(group.width) for group in prices.groups])
    return without(module, groups, ranking.keeping(kept).live)


def without(module: TracedModule, groups: ChannelGroups, live: BoolArray) -> TracedModule:
    """A copy of a clean module without what does not live."""
    small = copy.deepcopy(module)
    shrink(small, groups, live, "latency")
    small.ready()
    return small


def node_times(
    module: TracedModule, inputs: Inputs, timings: Timings, watch: Stopwatch | None = None
) -> dict[str, float]:
    """Seconds of every node of a clean module."""
    runner = NodeTimes(module, timings, watch or stopwatch)
    with undisturbed(module):
        inputs.run(runner.run)
    return runner.times


def in_turns(models: Sequence[TracedModule], inputs: Inputs, watch: Stopwatch | None = None) -> list[float]:
    """Seconds of whole models, measured in turns, so that a machine that slows down does so for all.

    A model's time is that of the first, its median over the turns, times the median of how they compare in a turn.
    """
    given = inputs.map(torch.clone)
    for model in models:
        model.ready()
    times = np.zeros((_TURNS, len(models)))
    for turn, (column, model) in itertools.product(range(_TURNS), enumerate(models)):
        with undisturbed(model):
            times[turn, column] = (watch or stopwatch)(partial(model, *given.args, **given.kwargs), _LEAST)
    ratios = np.median(times / times[:, :1], axis=0)
    found: list[float] = (np.median(times[:, 0]) * ratios).tolist()
    return found


# ---- the fit -----------------------------------------------------------------------------------------------------


def _fitted(
    module: TracedModule,
    groups: ChannelGroups,
    prices: Prices,
    allocations: IntArray,
    samples: Sequence[Mapping[str, float]],
) -> Polynomial:
    """Seconds as a polynomial in units: the sum over the nodes of what fits their samples."""
    n = len(prices.groups)
    constant, linear, quadratic = 0.0, np.zeros(n), np.zeros((n, n))
    place, weight = _places(groups, prices)
    kept = allocations.astype(np.float64)
    known = {node.name: node for node in module.graph.nodes}
    everything = np.array([0.0, *(1 / (n * units) for units in prices.units)])
    for name in dict.fromkeys(name for sample in samples for name in sample):
        sides = everything, everything
        if name in known:  # what removal adds, a gather of what is kept, has no place of its own
            sides = _shares(known[name], groups, place, weight, n)
        (base, into), (rest, out) = ((side[0], side[1:]) for side in sides)
        read, made = kept @ into + base, kept @ out + rest
        there = np.array([name in sample for sample in samples])
        times = np.array([sample.get(name, 0.0) for sample in samples])
        a, b, c, d = _nonnegative(np.stack([np.ones(len(kept)), read, made, read * made], axis=1)[there], times[there])
        constant += a + b * base + c * rest + d * base * rest
        linear += b * into + c * out + d * (base * out + rest * into)
        quadratic += d * (np.outer(into, out) + np.outer(out, into)) / 2
    nothing = np.zeros(0), np.zeros((0, 0), dtype=np.int64), np.eye(n), np.zeros(n)
    return Polynomial(constant, linear, quadratic, *nothing)


def _places(groups: ChannelGroups, prices: Prices) -> tuple[IntArray, FloatArray]:
    """For every component the priced group that it is of (or -1), and which share of its units' channels it is."""
    place = np.full(len(groups.channels.component), -1, dtype=np.int64)
    weight = np.zeros(len(place))
    for index, group in enumerate(prices.groups):
        place[group.components] = index
        weight[group.components] = 1 / prices.units[index]
    return place, weight


def _shares(
    node: fx.Node, groups: ChannelGroups, place: IntArray, weight: FloatArray, n: int
) -> tuple[FloatArray, FloatArray]:
    """Which share of its inputs, and of its outputs, a node has left: (1 + groups,), a constant and one for each unit.

    Where channels of several groups meet in one element, the mean of their shares stands for their product.
    """
    values, component = groups.channels.facts.values, groups.channels.component
    sides = []
    for nodes in (node.all_input_nodes, [node]):
        total, elements = np.zeros(n + 1), 0
        for labels in (found for each in nodes for found in labels_in(values.get(each.name))):
            size = int(np.prod(labels.shape, dtype=np.int64))
            elements += size
            if not labels.factors:
                total[0] += size
            for factor in labels.factors:
                parts = component[factor.numpy().reshape(-1)]
                share = np.bincount(place[parts] + 1, np.where(place[parts] < 0, 1.0, weight[parts]), n + 1)
                total += share * size / (len(parts) * len(labels.factors))
        if not elements:
            total[0], elements = 1, 1
        sides.append(total / elements)
    return sides[0], sides[1]


def _nonnegative(features: FloatArray, times: FloatArray) -> Sequence[float]:
    """Least squares of relative errors with coefficients that are not negative: the best of all subsets of features."""
    weight = 1 / np.maximum(times, 1e-9)  # no clock tells less apart
    scaled, wanted = features * weight[:, None], times * weight
    best: tuple[float, Any] = (np.inf, np.zeros(features.shape[1]))
    columns = range(features.shape[1])
    for chosen in itertools.chain.from_iterable(itertools.combinations(columns, r) for r in range(1, 5)):
        found, *_ = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)
        if (found >= 0).all():
            miss = float(((scaled[:, chosen] @ found - wanted) ** 2).sum())
            if miss < best[0] * (1 - 1e-9):
                coefficients = np.zeros(features.shape[1])
                coefficients[list(chosen)] = found
                best = miss, coefficients
    made: list[float] = best[1].tolist()
    return made
