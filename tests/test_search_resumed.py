"""Searching passes that are stopped at some moment end as if nobody had, with the checkpoint or with journals alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_cases import ANNEALING, X, adam, batches, loss, network, score
from torch import Tensor, nn

import fxcompress
from fxcompress import Budget, Pass, SearchHistory, Task, TracedModule
from fxcompress.passes import (
    ADMMPruner,
    AutoCompressPruner,
    NetAdaptPruner,
    SensitivityPruner,
    TunedPruner,
    TunedQuantizer,
)
from fxcompress.search import search, worker
from fxcompress.search.worker import Job, Outcome, Subject

HALF = Budget(macs=0.5)
SHORT = replace(ANNEALING, cooling=0.2, trials_per_temperature=2)
SEARCHES = {
    "annealing": SHORT,
    "tuned": TunedPruner(HALF, trials=6),
    "netadapt": NetAdaptPruner(HALF, step=0.2, epochs=0),
    "netadapt, trained": NetAdaptPruner(Budget(macs=0.6), step=0.25, epochs=1),
    "sensitivity": SensitivityPruner(HALF, rounds=2, epochs=1, drop=0.5),
    "autocompress": AutoCompressPruner(HALF, 2, SHORT, ADMMPruner(0.5, rho=1e-2, iterations=2, epochs=1)),
    "bits": TunedQuantizer(Budget(bytes=0.2), trials=4),
}


class Stop(BaseException):
    """The process ends here: nothing of what runs may catch it."""


class Moment:
    """When the task ends the process.

    Attributes:
        calls: of score and loss, so far.
        end: which of them does not return; 0 for none.
        how: what it raises.
    """

    def __init__(self) -> None:
        self.calls, self.end = 0, 0
        self.how: type[BaseException] = Stop

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.end:
            raise self.how


MOMENT = Moment()


def scored(model: nn.Module) -> float:
    MOMENT.tick()
    return score(model)


def lost(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    MOMENT.tick()
    return loss(model, batch)


TASK = Task(score=scored, batches=batches, loss=lost, optimizer=adam)


def compressed(
    item: Pass, end: int = 0, checkpoint: Path | None = None, how: type[BaseException] = Stop
) -> TracedModule:
    """What a pass makes of the network, if it is not ended at some call of the task."""
    MOMENT.calls, MOMENT.end, MOMENT.how = 0, end, how
    return fxcompress.compress(network(), [item], example_inputs=X[:2], task=TASK, checkpoint=checkpoint)


def searched(module: TracedModule) -> list[object]:
    """What the history says, without times."""
    (step,) = module.meta["history"]
    found: list[object] = []
    for history in step.searches:
        assert isinstance(history, SearchHistory)
        trials = [(trial.number, trial.proposal, trial.state, trial.score) for trial in history.trials]
        found.append((trials, history.best, history.dense, history.taken, history.interrupted, history.budget))
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_that_is_killed_ends_as_if_it_were_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again, each time a few calls further on; no trial that ended is run again."""
    ran: list[int] = []

    def run(job: Job) -> Outcome:
        found = worker.run(job)
        ran.append(job.seeds[-1])
        return found

    monkeypatch.setattr(search, "run", run)
    item = SEARCHES[name]
    expected = compressed(item)
    calls, trials, path, kills = MOMENT.calls, len(ran), tmp_path / "run.pt", 0
    ran.clear()
    while True:
        try:
            found = compressed(item, max(calls // 6, 1) + kills % 3, path)
            break
        except Stop:
            kills += 1
        assert kills < 40
    assert kills > 2
    assert len(ran) == trials
    assert searched(found) == searched(expected)
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    assert found.meta["history"][0].notes == expected.meta["history"][0].notes


ROUNDS = {
    "netadapt": SEARCHES["netadapt"],
    "annealing": SHORT,
    "sensitivity": SensitivityPruner(HALF, rounds=2, drop=0.5),
    "autocompress": SEARCHES["autocompress"],
}


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("place", ["early", "next round", "late"])
def test_ctrl_c_ends_all_rounds_within_the_budget(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the task after it, and what was found so far is scaled to the budget."""
    starts: list[int] = []
    about = search.Search.about

    def starting(self: search.Search, subject: Callable[[], Subject]) -> None:
        starts.append(MOMENT.calls)
        about(self, subject)

    item, several = ROUNDS[name], name in ("sensitivity", "autocompress")
    with monkeypatch.context() as patch:
        patch.setattr(search.Search, "about", starting)
        compressed(item)
    second = starts[1] if several else 2
    end = {"early": 3, "next round": second + 1, "late": second + 2}[place]
    found = compressed(item, end, how=KeyboardInterrupt)
    assert MOMENT.calls == end
    (step,) = found.meta["history"]
    assert [history.interrupted for history in step.searches] == [False] * (several and place != "early") + [True]
    dense, left = (fxcompress.count(model, X[:2]) for model in (network(), found))
    macs = left.macs if left.after is None else left.after.macs  # AutoCompress removes what it masks
    assert 0.35 * dense.macs < macs <= 0.5 * dense.macs
    assert step.searches[-1].taken.cost["macs"] == pytest.approx(macs / dense.macs)
