"""Searches under way: workers, seeds, failures, interruptions, kills."""

import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from search_cases import ANNEALING, TASK, TRIALS, X, careless, failing, network, noisy, quitting, score
from search_killed import tuned
from torch import nn

import fxcompress
from fxcompress import InputError, SearchError, SearchHistory, Task
from fxcompress.passes import Speedup
from fxcompress.search import search
from fxcompress.search.journal import Journal
from fxcompress.search.search import Search
from fxcompress.search.trial import Proposal, Trial
from fxcompress.search.worker import Job, Outcome

TESTS = Path(__file__).parent


class Recording(Executor):
    """Runs what it is given at once, and remembers it."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append(args[0])
        future.set_result(fn(*args))
        return future


def found(task: Task = TASK, **options: Any) -> SearchHistory:
    small = fxcompress.compress(network(), [ANNEALING, Speedup()], example_inputs=X[:2], task=task, **options)
    history: SearchHistory = small.meta["history"][0].searches[0]
    return history


def same(one: SearchHistory, other: SearchHistory) -> bool:
    """Whether two searches are the same but for the time that they took."""
    plain = [replace(item, trials=tuple(replace(t, seconds=0.0) for t in item.trials)) for item in (one, other)]
    return plain[0] == plain[1]


def tried(history: SearchHistory) -> list[Trial]:
    """The trials that no earlier one had answered."""
    return [trial for trial in history.trials if trial.same_as is None]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as made:
        yield made


def test_the_best_is_within_the_budget_and_beats_the_first_candidate() -> None:
    small = fxcompress.compress(network(), [ANNEALING, Speedup()], example_inputs=X[:2], task=TASK)
    history: SearchHistory = small.meta["history"][0].searches[0]
    assert len(history.trials) == TRIALS
    assert history.dense == pytest.approx(1.0)
    assert history.chosen is not None
    uniform = history.trials[1].score
    assert uniform is not None
    assert history.chosen.score is not None
    assert history.chosen.score > uniform
    macs = fxcompress.count(small, X[:2]).macs / fxcompress.count(network(), X[:2]).macs
    assert macs <= 0.5
    assert macs == pytest.approx(history.chosen.proposal.cost["macs"])
    with torch.no_grad():
        assert score(small) == pytest.approx(history.chosen.score, abs=1e-5)


def test_processes_find_what_one_process_finds(pool: ProcessPoolExecutor) -> None:
    alone = found(replace(TASK, score=noisy), seed=3)
    assert same(alone, found(replace(TASK, score=noisy), seed=3, executor=pool))
    assert not same(alone, found(replace(TASK, score=noisy), seed=4))


def test_a_score_that_changes_the_model_changes_no_other_trial(pool: ProcessPoolExecutor) -> None:
    task = replace(TASK, score=careless)
    assert same(found(task), found(task, executor=pool))
    options: dict[str, Any] = {"example_inputs": X[:2], "sparsities": (0.3, 0.6), "bits": (4, 2)}
    alone = fxcompress.sensitivity(network(), task, **options)
    assert alone == fxcompress.sensitivity(network(), task, executor=pool, **options)
    assert alone.groups[0].points[0].score != alone.dense


def test_threads_find_what_one_thread_finds() -> None:
    with ThreadPoolExecutor(3) as executor:
        assert same(found(replace(TASK, score=noisy)), found(replace(TASK, score=noisy), executor=executor))


def test_the_model_is_not_sent_with_every_trial() -> None:
    executor = Recording()
    alone = found()
    assert same(alone, found(executor=executor))
    assert len(executor.jobs) == len(tried(alone))
    assert all(job.payload is None for job in executor.jobs)
    assert len({job.digest for job in executor.jobs}) == 1


def test_a_process_that_cannot_read_our_files_is_sent_the_model() -> None:
    class Elsewhere(Recording):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(fn, replace(args[0], path=None))

    executor = Elsewhere()
    assert same(found(), found(executor=executor))
    assert sum(job.payload is not None for job in executor.jobs) == 2  # of the first generation both had asked


def test_a_failing_trial_is_recorded_and_the_search_goes_on() -> None:
    history = found(replace(TASK, score=failing))
    assert len(history.trials) == TRIALS
    assert 0 < len(history.failed) < TRIALS - 1
    assert all(trial.error.startswith("RuntimeError: no score at") for trial in history.failed)
    assert history.chosen is not None
    assert history.chosen.done


def test_a_dense_model_that_fails_ends_the_search() -> None:
    def broken(model: nn.Module) -> float:
        raise ValueError("nothing to see")

    with pytest.raises(SearchError, match=r"fails on the model as it came \(ValueError: nothing to see\)"):
        found(replace(TASK, score=broken))


def test_nothing_but_failures_is_an_error() -> None:
    def once(model: nn.Module) -> float:
        if score(model) < 1 - 1e-6:
            raise ValueError("too small")
        return 1.0

    with pytest.raises(SearchError, match=f"all {TRIALS - 1} trials that may be taken failed"):
        found(replace(TASK, score=once))


def test_what_cannot_be_sent_is_named(pool: ProcessPoolExecutor) -> None:
    lock = threading.Lock()  # no pickler takes it

    def reading(model: nn.Module) -> float:
        with lock:
            return score(model)

    with pytest.raises(InputError, match=r"task\.score is .* cannot be sent"):
        found(replace(TASK, score=reading), executor=pool)


def test_an_executor_that_was_shut_down_is_named() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(SearchError, match="takes no trial any more"):
        found(executor=executor)


def test_no_executor() -> None:
    with pytest.raises(InputError, match=r"executor is a int; expected a concurrent\.futures\.Executor"):
        found(executor=2)


def test_ctrl_c_ends_with_the_best_so_far() -> None:
    calls = [0]

    def stopped(model: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return score(model)

    history = found(replace(TASK, score=stopped))
    whole = found()
    ended = tried(whole)[4].number
    assert history.interrupted
    assert not whole.interrupted
    begun = replace(whole, trials=whole.trials[:ended], best=history.best, taken=history.taken, interrupted=True)
    assert same(history, begun)
    scores = [trial.score for trial in history.trials[1:]]
    assert history.chosen is not None
    assert history.chosen.score == max(each for each in scores if each is not None)


class Numbered:
    """Scores a candidate by its number, and counts."""

    def __init__(self, interrupts: int = -1) -> None:
        self.interrupts, self.calls = interrupts, 0

    def score(self, proposal: Proposal) -> float:
        self.calls += 1
        if proposal.kept[0] == self.interrupts:
            raise KeyboardInterrupt
        return float(proposal.kept[0])


def candidates(*numbers: int) -> list[Proposal]:
    return [Proposal((number,)) for number in numbers]


class Backwards(Executor):
    """Ends the last of what it is given first, and is interrupted at a candidate."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any, Job]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, fn, args[0]))
        return future

    def work(self, *_: Any) -> Iterator[Future[Any]]:
        """Instead of ``as_completed``."""
        for future, fn, job in reversed(self.waiting):
            future.set_result(fn(job))
            yield future


def test_ctrl_c_keeps_scores_with_their_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended behind a candidate that did not is in the journal, for the next run, and in no generation."""
    executor, path = Backwards(), tmp_path / "journal"
    monkeypatch.setattr(search, "as_completed", executor.work)
    with Search("numbered", 4, journal=Journal(path, "this"), executor=executor) as first:
        first.about(partial(Numbered, 11))
        generation = first.evaluate(candidates(10, 11, 12, 13))
        assert first.interrupted
        assert generation == first.trials == []
        assert first.evaluate(candidates(10)) == []
    journal = Journal(path, "this")
    assert {number: trial.score for number, trial in journal.trials.items()} == {2: 12.0, 3: 13.0}
    with Search("numbered", 4, journal=journal) as again:
        again.about(partial(Numbered, 11))  # in this process
        assert [trial.score for trial in again.evaluate(candidates(10, 11, 12, 13))] == [10.0]
        assert again.interrupted
    subject = Numbered()
    with Search("numbered", 4, journal=Journal(path, "this")) as last:
        last.about(lambda: subject)
        assert [trial.score for trial in last.evaluate(candidates(10, 11, 12, 13))] == [10.0, 11.0, 12.0, 13.0]
    assert subject.calls == 1


def test_a_candidate_is_tried_once(tmp_path: Path) -> None:
    """Within a generation and across them; of another subject anew."""
    subject, path = Numbered(), tmp_path / "journal"
    with Search("numbered", 9, journal=Journal(path, "this")) as made:
        made.about(lambda: subject)
        made.evaluate(candidates(1, 2, 1))
        made.evaluate(candidates(3, 2))
        assert subject.calls == 3
        assert [(trial.number, trial.score, trial.same_as) for trial in made.trials] == [
            (0, 1.0, None),
            (1, 2.0, None),
            (2, 1.0, 0),
            (3, 3.0, None),
            (4, 2.0, 1),
        ]
        made.about(lambda: subject)
        assert made.evaluate(candidates(1))[0].same_as is None
    assert list(Journal(path, "this").trials.values()) == made.trials


def test_the_best_so_far_is_one_that_may_be_taken() -> None:
    """Not the model as it came, which scores highest."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with Search("numbered", 3, console=console, within=lambda trial: trial.proposal.kept[0] < 9) as made:
        made.about(Numbered)
        made.evaluate(candidates(9, 5, 7))
        assert made._progress.tasks[0].description == "numbered: best 7"
    assert found().progress()[0][0] > 0
    assert found().progress()[-1][0] == found().best


def test_a_worker_that_quits_is_a_failed_trial(pool: ProcessPoolExecutor) -> None:
    history = found(replace(TASK, score=quitting), executor=pool)
    assert history.failed
    assert {trial.error for trial in history.failed} == {"SystemExit: enough"}


def test_ctrl_c_before_any_candidate_is_no_result() -> None:
    def stopped(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(replace(TASK, score=stopped))


def test_a_finished_journal_answers_every_trial(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = found(checkpoint=path)
    path.unlink()
    assert same(found(replace(TASK), checkpoint=path), whole)
    path.unlink()
    lines = (tmp_path / "run.pt.0.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == TRIALS + 1
    with pytest.raises(fxcompress.CheckpointError, match="another search"):
        found(replace(TASK, score=noisy), checkpoint=path)


def test_memory_does_not_grow_with_trials() -> None:
    """Nothing but plain records stays of a trial: no tensor, no module."""

    class Plain:
        def score(self, proposal: Proposal) -> float:
            return float(torch.ones(1000).sum()) + proposal.kept[0]

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(item), (torch.Tensor, nn.Module)) for item in gc.get_objects())

    with Search("plain", 600) as search:
        search.about(Plain)
        search.evaluate([Proposal((number,)) for number in range(100)])
        before = alive()
        search.evaluate([Proposal((number,)) for number in range(500)])
        assert alive() <= before  # what other tests left may go meanwhile
        assert len(search.trials) == 600


def test_an_outcome_tells_missing_from_failed() -> None:
    assert Outcome(missing=True).score is None
    assert Outcome(error="x").missing is False


@pytest.mark.long
def test_a_search_that_is_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(TESTS / "search_killed.py"), str(tmp_path), "20"], env=environment, check=True)
    assert (tmp_path / "kills").read_text() == "20"
    runs = [line.split() for line in (tmp_path / "runs").read_text().splitlines()]
    assert {known for _, known in runs} == {"False"}  # no journaled trial ran again
    whole = tuned(None)
    assert len(tried(whole)) < len(runs) <= len(tried(whole)) + 20
    assert same(torch.load(tmp_path / "result.pt", weights_only=False), whole)
