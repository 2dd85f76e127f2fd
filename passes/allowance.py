"""How many units a channel pruner removes so that a budget is met, and which: what pruners and searches share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fxcompress.budget import Budget
from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray
from fxcompress.channels.row_sets import RowSet
from fxcompress.context import Context
from fxcompress.errors import InputError
from fxcompress.module import TracedModule
from fxcompress.plan import Settled
from fxcompress.prices import Prices, dense_cost
from fxcompress.ranking import Ranking
from fxcompress.removable_units import Units

#: How often a budget is tightened for what comes back after a choice.
_ROUNDS = 8


class Allowance:
    """How many units of each group go for a budget.

    Args:
        budget: what to meet.
        prices: of the module.
        dense: what the caller's dense model costs, of which the budget is a fraction.
    """

    def __init__(self, budget: Budget, prices: Prices, dense: Mapping[str, float]) -> None:
        self.budget, self.prices, self.dense = budget, prices, dict(dense)
        self._place = {group.name: index for index, group in enumerate(prices.groups)}

    @classmethod
    def of(cls, budget: Budget, module: TracedModule, groups: ChannelGroups, context: Context) -> Allowance:
        """For a clean traced module; what it costs first is remembered as what the caller's dense model costs."""
        assert context.inputs is not None
        prices = Prices(module, groups, context.inputs)
        return cls(budget, prices, dense_cost(module, context.inputs))

    def parts(self, chosen: Sequence[tuple[Group | RowSet, float]]) -> list[tuple[Group | RowSet, float]]:
        """Groups as they are priced, with their sparsities; of several the smallest."""
        shares = {item.name: share for item, share in chosen}
        groups = [item for item, _ in chosen if isinstance(item, Group)]
        return [(part, min(shares[name] for name in names)) for part, names in self.prices.parts(groups)]

    def met(self, ranking: Ranking, counts: Callable[[Allowance], list[int]]) -> tuple[list[int], Settled]:
        """How many units go so that what is left meets the budget, and what that is.

        Channels may come back after the choice (coupled rows that must stay equal, nodes that cannot be rewritten):
        what is left is priced once more, and the budget tightened until it is met.

        Raises:
            InputError: it is not, after as many rounds as make sense.
        """
        factor, over = 1.0, 1.0
        for _ in range(_ROUNDS):
            chosen = counts(self.tightened(factor))
            found = ranking.without(chosen)
            over = self.over(found.live)
            if over <= 1:
                return chosen, found
            factor *= over
        raise InputError(
            f"the budget allows {self.budget}, and {over:.3f} times as much is left after {_ROUNDS} rounds, because "
            "channels come back that are coupled with others; expected a larger budget."
        )

    def over(self, live: BoolArray) -> float:
        """By which factor what lives exceeds the budget, of its scarcest figure; at most 1 where it is met."""
        have = self.prices.price(live)
        return max(have[name] / (ratio * self.dense[name]) for name, ratio in self.budget.ratios.items())

    def tightened(self, factor: float) -> Allowance:
        """The same for a budget that is smaller by a factor, for what comes back after the choice."""
        return Allowance(self.budget, self.prices, {name: value / factor for name, value in self.dense.items()})

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
