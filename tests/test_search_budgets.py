"""Budgets of searches: met by what is measured, used up, of one dense model."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from nets import Net
from search_cases import ANNEALING, TASK, TRAINED, X, network
from test_budget import conv
from test_latency_table import Work, work
from torch import Tensor, nn

import fxcompress
from fxcompress import Budget, InputError, Task, TracedModule, latency_table
from fxcompress.passes import (
    ADMMPruner,
    AutoCompressPruner,
    L1FilterPruner,
    NetAdaptPruner,
    SensitivityPruner,
    SimulatedAnnealingPruner,
    Speedup,
)
from fxcompress.water_filling import TOLERANCE

__all__ = ["work"]  # the fixture
SHORT = replace(ANNEALING, cooling=0.2, trials_per_temperature=2)
ADMM = ADMMPruner(0.5, rho=1e-2, iterations=1, epochs=1)


def near(model: nn.Module, x: Tensor) -> Task:
    """A task that a model's own outputs are the targets of."""
    with torch.no_grad():
        wanted: Tensor = copy.deepcopy(model)(x)
    return Task(
        score=lambda made: -float((made(x) - wanted).square().mean()),
        loss=lambda made, batch: (made(batch) - wanted).square().mean(),
        batches=[x],
        optimizer=partial(torch.optim.SGD, lr=1e-3),
    )


def shares(small: nn.Module, model: nn.Module, x: Tensor, budget: Budget) -> dict[str, float]:
    """What is left, as fractions of what the budget allows."""
    after, before = fxcompress.count(small, x), fxcompress.count(model, x)
    return {name: getattr(after, name) / getattr(before, name) / ratio for name, ratio in budget.ratios.items()}


def macs_left(module: TracedModule) -> int:
    """MACs without what is masked."""
    found = fxcompress.count(module, X[:2])
    assert found.after is not None
    return found.after.macs


# ---- latency ---------------------------------------------------------------------------------------------------------


def plain(net: Net, x: Tensor) -> Tensor:
    made: Tensor = net.three(net.two(net.one(x).relu()).relu()).relu().mean((2, 3))
    return made


#: Of a score; not part of it, so that a run goes on with the same score.
CALLS: list[nn.Module] = []

SEARCHES: dict[str, Callable[[Budget], fxcompress.Pass]] = {
    "netadapt": lambda budget: NetAdaptPruner(budget, step=0.1, epochs=0),
    "annealing": lambda budget: replace(SHORT, budget=budget),
    "sensitivity": lambda budget: SensitivityPruner(budget, rounds=2),
    "autocompress": lambda budget: AutoCompressPruner(budget, 2, SHORT, ADMM),
}


def chain_of_three() -> tuple[nn.Module, Tensor]:
    net = Net(plain, one=conv(3, 40, 3), two=conv(40, 50, 3), three=conv(50, 12, 3))
    return net.eval(), torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_latency_is_met_by_measurement(work: Work, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The table says that half of the time cannot be saved, and is measured once: what is left decides."""
    model, x = chain_of_three()
    made, tables = latency_table.measure, []

    def wrong(*args: object, **options: object) -> latency_table.LatencyTable:
        table = made(*args, **options)  # type: ignore[arg-type]
        tables.append(table)
        return replace(table, figure=replace(table.figure.scaled(0.5), constant=table.dense * 0.5))

    monkeypatch.setattr("fxcompress.passes.allowance.measure", wrong)
    item = SEARCHES[name](Budget(latency=0.75))
    small = fxcompress.compress(model, [item, Speedup()], example_inputs=x, task=near(model, x), verify=False)
    assert len(tables) == 1
    before, after = work(lambda: model(x), 0), work(lambda: small(x), 0)
    assert after / before == pytest.approx(0.75, rel=0.1)


@pytest.mark.parametrize("name", ["netadapt", "annealing"])
def test_a_run_that_goes_on_keeps_its_table(
    work: Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Another measurement would price, and so propose, something else."""
    model, x = chain_of_three()
    made, tables = latency_table.measure, []

    def drifting(*args: object, **options: object) -> latency_table.LatencyTable:
        table = made(*args, **options)  # type: ignore[arg-type]
        tables.append(table)
        return replace(table, figure=table.figure.scaled(1 + 0.2 * len(tables)))

    monkeypatch.setattr("fxcompress.passes.allowance.measure", drifting)
    task = near(model, x)
    wanted = task.score
    assert wanted is not None
    CALLS.clear()

    def scored(candidate: nn.Module) -> float:
        CALLS.append(candidate)
        if len(CALLS) == 3:
            raise Killed
        return wanted(candidate)

    run = partial(
        fxcompress.compress,
        model,
        [SEARCHES[name](Budget(latency=0.75))],
        example_inputs=x,
        task=replace(task, score=scored),
        verify=False,
        checkpoint=tmp_path / "run.pt",
    )
    with pytest.raises(Killed):
        run()
    (history,) = run().meta["history"][0].searches
    assert len(tables) == 1
    assert len(CALLS) == sum(trial.same_as is None for trial in history.trials) + 1


class Killed(BaseException):
    """The process ends here."""


# ---- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.7, 0.2])
def test_netadapt_uses_its_budget_up(ratio: float) -> None:
    """All but half a percent of it, where the units of two groups together are that small."""
    torch.manual_seed(1)
    model = Net(plain, one=conv(3, 40, 3), two=conv(40, 50, 3), three=conv(50, 12, 3)).eval()
    x, budget = torch.randn(2, 3, 9, 9), Budget(macs=ratio)
    item = NetAdaptPruner(budget, step=0.11, epochs=0)
    small = fxcompress.compress(model, [item, Speedup()], example_inputs=x, task=near(model, x))
    assert 1 - TOLERANCE <= shares(small, model, x, budget)["macs"] <= 1


def test_netadapt_steps_on_the_figure_that_is_furthest_from_its_budget() -> None:
    budget = Budget(params=0.6, macs=0.45, bytes=0.7)
    small = fxcompress.compress(
        network(), [NetAdaptPruner(budget, step=0.1, epochs=0), Speedup()], example_inputs=X[:2], task=TASK
    )
    used = shares(small, network(), X[:2], budget)
    assert 0.97 < max(used.values()) <= 1, used


def test_netadapt_within_its_budget_scores_the_model_and_takes_nothing() -> None:
    small = fxcompress.compress(
        network(), [NetAdaptPruner(Budget(macs=1.0), epochs=0)], example_inputs=X[:2], task=TASK
    )
    (history,) = small.meta["history"][0].searches
    assert history.dense == pytest.approx(TASK.score(network()) if TASK.score else None)
    assert [trial.number for trial in history.trials] == [0]
    assert history.best == 0
    assert history.taken.kept == history.widths
    assert not fxcompress.masks(small)


def test_netadapt_says_what_it_took() -> None:
    item = NetAdaptPruner(Budget(macs=0.6), step=0.2, epochs=0)
    small = fxcompress.compress(network(), [item], example_inputs=X[:2], task=TASK)
    (history,) = small.meta["history"][0].searches
    assert history.taken == history.chosen.proposal
    assert history.taken.cost["macs"] == pytest.approx(macs_left(small) / fxcompress.count(network(), X[:2]).macs)


# ---- AutoCompress ----------------------------------------------------------------------------------------------------


def grouped(net: Net, x: Tensor) -> Tensor:
    x = net.each(net.first(x).relu()).relu()
    x = net.some(x).relu()
    return net.head((x + net.more(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_leave_grouped_convolutions_their_freedom(rounds: int) -> None:
    """A first round may leave them one input for each group; what they make may go all the same in the next."""
    torch.manual_seed(3)
    model = Net(
        grouped, first=conv(3, 16, 3), each=conv(16, 16, 3, groups=16), some=conv(16, 24, 3, groups=4),
        more=conv(24, 24, 3, groups=4), head=nn.Linear(24, 10),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 12, 12)
    small = fxcompress.compress(
        model, [AutoCompressPruner(Budget(macs=0.5), rounds, SHORT, ADMM)], example_inputs=x, task=near(model, x)
    )
    (used,) = shares(small, model, x, Budget(macs=0.5)).values()
    assert used <= 1
    assert fxcompress.masks(small) == {}


def test_autocompress_says_early_what_cannot_be() -> None:
    """Before it trains for a round that could be met."""
    calls: list[int] = []
    task = replace(TRAINED, loss=lambda model, batch: calls.append(1))
    item = AutoCompressPruner(Budget(macs=0.001), 3, SimulatedAnnealingPruner(Budget(macs=0.5)), ADMM)
    with pytest.raises(InputError, match="least that can be reached"):
        fxcompress.compress(network(), [item], example_inputs=X[:2], task=task)
    assert not calls


# ---- the dense model -------------------------------------------------------------------------------------------------


def pruned(model: nn.Module, x: Tensor, budget: Budget) -> TracedModule:
    return fxcompress.compress(model, [L1FilterPruner(budget=budget), Speedup()], example_inputs=x)


def test_macs_of_a_dense_model_are_those_of_one_size_of_inputs() -> None:
    small, large = X[:2], torch.randn(1, 3, 21, 27)
    once = pruned(network(), large, Budget(macs=0.9))
    with pytest.raises(InputError, match=r"known for inputs of \(3, 21, 27\) in batches of 1; found \(3, 7, 9\) in"):
        pruned(once, small, Budget(macs=0.5))
    used = shares(pruned(once, small, Budget(params=0.5)), network(), small, Budget(params=0.5))
    assert 0.9 < used["params"] <= 1
    again = pruned(once, torch.randn(3, 3, 21, 27), Budget(macs=0.5))  # MACs are of a sample
    assert 0.9 < shares(again, network(), large, Budget(macs=0.5))["macs"] <= 1


def test_a_model_of_which_nothing_was_removed_is_counted_again() -> None:
    small, large = X[:2], torch.randn(1, 3, 21, 27)
    masked = fxcompress.compress(network(), [L1FilterPruner(budget=Budget(macs=0.9))], example_inputs=large)
    used = shares(pruned(masked, small, Budget(macs=0.5)), network(), small, Budget(macs=0.5))
    assert 0.9 < used["macs"] <= 1
