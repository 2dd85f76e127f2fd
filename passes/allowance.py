"""How many units a channel pruner removes so that a budget is met, and which: what pruners and searches share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fxcompress.budget import Budget
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray
from fxcompress.channels.row_sets import RowSet
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.latency_table import in_turns, measure, without
from fxcompress.module import TracedModule
from fxcompress.plan import Settled
from fxcompress.prices import DENSE, Prices, dense_cost
from fxcompress.ranking import Ranking
from fxcompress.removable_units import Units

#: How often a budget is tightened for what comes back after a choice.
_ROUNDS = 8

#: A latency is met within this fraction of its target, either way; after all rounds it is at most twice that above it.
_BAND, _ACCEPTED = 0.05, 2.0


@dataclass(frozen=True)
class Race:
    """Measures what is left against what there was.

    Attributes:
        module: the clean traced module.
        groups: its analysis.
        context: with the inputs, and for notes.
        dense: seconds of the module.
    """

    module: TracedModule
    groups: ChannelGroups
    context: Context
    dense: float

    def seconds(self, live: BoolArray) -> float:
        """Seconds of what lives, measured in turns with the module."""
        assert self.context.inputs is not None
        small = without(self.module, self.groups, live)
        before, after = in_turns([self.module, small], self.context.inputs)
        self.context.notes.append(f"latency measured: {after / before:.1%} of {before * 1e3:.3f} ms")
        return after / before * self.dense


class Allowance:
    """How many units of each group go for a budget.

    Args:
        budget: what to meet.
        prices: of the module.
        dense: what the caller's dense model costs, of which the budget is a fraction.
        race: what a latency is checked with, if there is a budget of it.
    """

    def __init__(self, budget: Budget, prices: Prices, dense: Mapping[str, float], race: Race | None = None) -> None:
        self.budget, self.prices, self.dense, self.race = budget, prices, dict(dense), race
        self._place = {group.name: index for index, group in enumerate(prices.groups)}

    @classmethod
    def of(
        cls, budget: Budget, module: TracedModule, groups: ChannelGroups, context: Context, round_to: int = 1
    ) -> Allowance:
        """For a clean traced module; what it costs first is remembered as what the caller's dense model costs."""
        assert context.inputs is not None
        prices = Prices(module, groups, context.inputs)
        dense = dense_cost(module, context.inputs, budget)
        if budget.latency is None:
            return cls(budget, prices, dense.figures)
        # a run that goes on prices with the same table, or it would propose something else
        table = context.step(module, partial(measure, module, groups, context.inputs, prices, round_to=round_to))
        prices.add("latency", table.figure, table.dense)
        module.meta[DENSE] = dense = dense.measured(table.dense, context.inputs)
        context.notes.append(str(table))
        return cls(budget, prices, dense.figures, Race(module, groups, context, table.dense))

    def within(self, budget: Budget) -> Allowance:
        """The same for another budget of the same figures."""
        return Allowance(budget, self.prices, self.dense, self.race)

    def parts(self, chosen: Sequence[tuple[Group | RowSet, float]]) -> list[tuple[Group | RowSet, float]]:
        """Groups as they are priced, with their sparsities; of several the smallest."""
        shares = {item.name: share for item, share in chosen}
        groups = [item for item, _ in chosen if isinstance(item, Group)]
        return [(part, min(shares[name] for name in names)) for part, names in self.prices.parts(groups)]

    def met(self, ranking: Ranking, counts: Callable[[Allowance], list[int]]) -> tuple[list[int], Settled]:
        """How many units go so that what is left meets the budget, and what that is.

        Channels may come back after the choice (coupled rows that must stay equal, nodes that cannot be rewritten), and
        a latency is a prediction: what is left is priced, or measured, and the budget corrected until it is met.

        Raises:
            InputError: it is not, after as many rounds as make sense.
        """
        factors = dict.fromkeys(self.budget.ratios, 1.0)
        best: tuple[float, list[int], Settled, dict[str, float]] | None = None
        last: list[int] = []
        for _ in range(_ROUNDS):
            try:
                chosen = counts(self.corrected(factors))
            except InputError:
                if best is None or _distance(best[3], below=False) > _ACCEPTED:
                    raise
                break  # the corrected budget is out of reach
            found = ranking.without(chosen)
            misses = {name: share / self.budget.ratios[name] for name, share in self.left(found.live).items()}
            worst = _distance(misses)
            if best is None or worst < best[0]:
                best = worst, chosen, found, misses
            if worst <= 1 or (chosen == last and _distance(misses, below=False) <= 1):
                break
            last = chosen
            for name, miss in misses.items():
                factors[name] *= miss if name == "latency" else max(miss, 1.0)
        assert best is not None
        _, chosen, found, misses = best
        if _distance(misses, below=False) > _ACCEPTED:
            raise InputError(
                f"the budget allows {self.budget}, and what is left after {_ROUNDS} rounds of corrections is not "
                f"within it ({', '.join(f'{miss:.3f} times the {name}' for name, miss in misses.items())}): channels "
                "come back that are coupled with others, or latencies vary; expected a larger budget."
            )
        return chosen, found

    def left(self, live: BoolArray) -> dict[str, float]:
        """What lives, by figure, as a fraction of the dense model; a latency is measured."""
        have: dict[str, float] = dict(self.prices.price(live))
        if self.race is not None:
            have["latency"] = self.race.seconds(live)
        return {name: have[name] / self.dense[name] for name in self.budget.ratios}

    def allows(self, left: Mapping[str, float]) -> bool:
        """Whether fractions of the dense model, as :meth:`left` has them, are within the budget."""
        misses = {name: left[name] / ratio for name, ratio in self.budget.ratios.items()}
        return _distance(misses, below=False) <= 1

    def corrected(self, factors: Mapping[str, float]) -> Allowance:
        """The same for a dense model that costs less by a factor for each figure."""
        dense = {name: value / factors.get(name, 1.0) for name, value in self.dense.items()}
        return Allowance(self.budget, self.prices, dense)

    def shared(
        self, names: Sequence[str], tables: Sequence[Units], most: Sequence[int], shares: Sequence[float], round_to: int
    ) -> list[int]:
        """How many units go, at sparsities in the given proportions.

        Args:
            names: of the groups that may lose any.
            tables: their units.
            most: how many each may lose at most.
            shares: their sparsities, relative to one another's.
            round_to: the kept width is a multiple of it.
        """
        sparsities, least, largest = (
            np.zeros(len(self.prices.units)),
            self.prices.units.copy(),
            self.prices.units.copy(),
        )
        for name, units, limit, share in zip(names, tables, most, shares, strict=True):
            place = self._place[name]
            largest[place] -= units.gone
            least[place] -= max(limit, units.gone) if share else units.gone
            sparsities[place] = share
        kept = self.prices.fill(sparsities, self.budget, round_to, least=least, most=largest, dense=self.dense)
        return [units.number - int(kept[self._place[name]]) for name, units in zip(names, tables, strict=True)]

    def ranked(self, names: Sequence[str], tables: Sequence[Units], most: Sequence[int], round_to: int) -> list[int]:
        """How many units go of each group if the lowest of all groups do: as few as meet the budget.

        Raises:
            InputError: all that may go would not be enough.
        """
        entries = [(score, g) for g, units in enumerate(tables) for score in units.scores[: most[g]]]
        entries.sort(key=lambda entry: entry[0])  # stable: ties by order in the graph, then index
        order = np.array([g for _, g in entries], dtype=np.int64)
        places = [self._place[name] for name in names]

        def counts(number: int) -> list[int]:
            found = np.bincount(order[:number], minlength=len(tables)).tolist()
            return [units.rounded(count, round_to) for units, count in zip(tables, found, strict=True)]

        def use(number: int) -> float:
            kept = self.prices.units.copy()
            kept[places] -= counts(number)
            have = self.prices.of(kept)
            return max(float(have[n]) / (ratio * self.dense[n]) for n, ratio in self.budget.ratios.items())

        low, high = 0, len(order)
        if use(high) > 1:
            raise InputError(
                f"the budget allows {self.budget}, and what may go leaves {use(high):.3f} times as much; expected a "
                "larger budget, or more groups to prune."
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if use(middle) <= 1 else (middle + 1, high)
        return counts(low)


def _distance(misses: Mapping[str, float], *, below: bool = True) -> float:
    """How far what is left is from its budget, at most 1 where it is met: latencies vary, and may be met from above.

    A latency that is far below its target is no miss where there are other figures, which may be the scarcer ones.

    Args:
        misses: what is left, as multiples of what the budget allows.
        below: whether a latency alone may be too far below its target.
    """
    exact = max((miss for name, miss in misses.items() if name != "latency"), default=0.0)
    if exact > 1 + 1e-9:
        return _ACCEPTED + exact
    gap = (misses.get("latency", 1.0) - 1) / _BAND
    return max(min(exact, 1.0), abs(gap) if below and len(misses) == 1 else gap)
