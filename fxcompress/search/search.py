"""A search under way: proposals go out to an executor in generations, trials come back, each of them once.

Every number of proposals belongs to one generation, whose size no executor decides; trials are told in the order of
their numbers, and each has one thread and random numbers of its own. So a search ends the same whatever the number of
workers. A trial is in the journal before it is told.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fxcompress.errors import CheckpointError, GraphError, SearchError
from fxcompress.search.history import SearchHistory
from fxcompress.search.journal import Journal
from fxcompress.search.packing import packed
from fxcompress.search.trial import Proposal, Trial, best_of
from fxcompress.search.worker import Job, Outcome, Subject, holding, run

#: Proposals that are made before the first of them is told, where an algorithm has no number of its own.
GENERATION = 8


class Search:
    """The trials of one search; a context manager.

    Args:
        name: of the pass, for progress and messages.
        total: how many trials are expected, for progress.
        seeds: whatever is random follows from these and the number of the trial.
        journal: where trials are kept; by default nowhere.
        executor: where trials run; by default in this process.
        console: where progress is shown.
        within: says of a trial whether it may be taken: only such are the best so far; by default all are.

    Attributes:
        trials: those that were told, in order.
        interrupted: whether somebody pressed Ctrl-C: the search is to end with what it found.
    """

    def __init__(
        self,
        name: str,
        total: int,
        seeds: tuple[int, ...] = (0,),
        journal: Journal | None = None,
        executor: Executor | None = None,
        console: Console | None = None,
        within: Callable[[Trial], bool] | None = None,
    ) -> None:
        self.name, self.seeds, self.within = name, seeds, within
        self.journal, self.executor = journal or Journal(), executor
        self.trials: list[Trial] = []
        self.interrupted = False
        self._answers: dict[Any, Trial] = {}  # of the subject, by candidate
        self._subject: Callable[[], Subject] | None = None
        self._sent: _Sent | None = None
        self._held = ExitStack()  # what the subject needs while it is the one
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = console or Console(quiet=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=console.quiet)
        self._row = self._progress.add_task(name, total=total)
        self._begun = False

    def __enter__(self) -> Search:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        self._progress.stop()

    def about(self, subject: Callable[[], Subject]) -> None:
        """What the next proposals are about; ``subject`` is called if one of them has to be tried."""
        self._release()
        self._subject = subject
        self._answers.clear()

    def evaluate(self, proposals: Sequence[Proposal]) -> list[Trial]:
        """Try a generation. A candidate that was tried already, of the same subject, is answered from that trial.

        Returns:
            a trial for each proposal, in order; if the search was interrupted, for those before the first that did
            not end. What ended behind it is in the journal.

        Raises:
            SearchError: the executor does not work any more.
            CheckpointError: the journal cannot be written, or holds other proposals.
            InputError: what the trials are about cannot be sent to the executor's processes.
        """
        if self.interrupted:
            return []
        numbered = dict(enumerate(proposals, len(self.trials)))
        told = {number: trial for number, each in numbered.items() if (trial := self._known(number, each)) is not None}
        leading: dict[Any, int] = {}
        for number, each in numbered.items():
            if each.candidate not in self._answers:
                leading.setdefault(each.candidate, number)
        waiting = {number: numbered[number] for number in leading.values() if number not in told}
        if waiting:
            self._begin(len(told))
            try:
                for trial in self._tried(waiting):
                    self.journal.append(trial)
                    told[trial.number] = trial
                    self._show([*self.trials, *told.values()])
            except KeyboardInterrupt:
                self.interrupted = True
        self._answers |= {candidate: told[number] for candidate, number in leading.items() if number in told}
        generation: list[Trial] = []
        for number, each in numbered.items():
            if number not in told:
                earlier = self._answers.get(each.candidate)
                if earlier is None:
                    break
                told[number] = replace(earlier, number=number, proposal=each, seconds=0.0, same_as=earlier.number)
                self.journal.append(told[number])
            generation.append(told[number])
        self.trials += generation
        self._show(self.trials)
        return generation

    def best(self, within: Callable[[Trial], bool] | None = None) -> Trial:
        """The trial with the highest score.

        Raises:
            SearchError: none has a score.
            KeyboardInterrupt: the search was interrupted before one had.
        """
        found = best_of(self.trials, within)
        if found is not None:
            return found
        if self.interrupted:
            raise KeyboardInterrupt
        counted = [trial for trial in self.trials if within is None or within(trial)]
        errors = [trial.error for trial in counted if trial.error]
        which = (
            f"{len(counted)} trials" if len(counted) == len(self.trials) else f"{len(counted)} trials that may be taken"
        )
        raise SearchError(
            f"{self.name}: all {which} failed; expected at least one score. "
            + (f"The first: {errors[0]}. Call task.score(model) yourself to see where." if errors else "")
        )

    def history(self, **known: Any) -> SearchHistory:
        """What was tried."""
        return SearchHistory(self.name, tuple(self.trials), interrupted=self.interrupted, **known)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _known(self, number: int, proposal: Proposal) -> Trial | None:
        """The trial of that number in the journal."""
        trial = self.journal.trials.get(number)
        if trial is not None and trial.proposal.candidate != proposal.candidate:
            raise CheckpointError(
                f"trial {number} in {self.journal.path} tried {trial.proposal}; expected {proposal}, which this search "
                "proposes. The journal is that of another version; delete it to begin anew."
            )
        return trial

    def _tried(self, proposals: Mapping[int, Proposal]) -> Iterator[Trial]:
        """The trials as they end."""
        sent = self._sent = self._sent or self._send_subject()
        if self.executor is None:
            for number, proposal in proposals.items():
                yield _trial(number, proposal, run(sent.job(proposal, (*self.seeds, number))))
        else:
            yield from self._submitted(self.executor, sent, proposals)

    def _submitted(self, executor: Executor, sent: _Sent, proposals: Mapping[int, Proposal]) -> Iterator[Trial]:
        futures = self._submit(executor, {n: sent.job(each, (*self.seeds, n)) for n, each in proposals.items()})
        try:
            while futures:
                again: dict[int, Job] = {}
                for future in as_completed(futures):
                    number, outcome = futures[future], _outcome(future, self.name)
                    if outcome.missing:  # the process cannot read our files: it gets the subject with the trial
                        again[number] = replace(
                            sent.job(proposals[number], (*self.seeds, number)), payload=sent.payload
                        )
                    else:
                        yield _trial(number, proposals[number], outcome)
                futures = self._submit(executor, again)
        finally:
            for future in futures:
                future.cancel()

    def _submit(self, executor: Executor, jobs: Mapping[int, Job]) -> dict[Future[Outcome], int]:
        try:
            return {executor.submit(run, job): number for number, job in jobs.items()}
        except RuntimeError as error:  # broken, or shut down
            raise _broken(self.name, error) from error

    def _send_subject(self) -> _Sent:
        """Put the subject where trials can get at it."""
        if self._subject is None:
            raise GraphError(f"{self.name} proposes before it says what its proposals are about")
        subject, key = self._subject(), uuid.uuid4().hex
        if self.executor is None or isinstance(self.executor, ThreadPoolExecutor):
            self._held.enter_context(holding(key, subject))
            return _Sent(key)
        folder = self._held.enter_context(tempfile.TemporaryDirectory(prefix="fxcompress-"))
        path = Path(folder, key)
        path.write_bytes(packed(subject))
        return _Sent(key, str(path))

    def _release(self) -> None:
        self._sent = None
        self._held.close()

    def _begin(self, told: int) -> None:
        """What the journal held took no time of this run."""
        if not self._begun:
            self._begun = True
            self._progress.reset(self._row, completed=len(self.trials) + told)

    def _show(self, trials: Sequence[Trial]) -> None:
        if self._progress.disable:
            return
        best = best_of(trials, self.within)
        text = self.name if best is None else f"{self.name}: best {best.score:.6g}"
        self._progress.update(self._row, completed=len(trials), description=text)


@dataclass(frozen=True)
class _Sent:
    """Where a subject is: in this process under a key, or in a file."""

    key: str
    path: str | None = None

    @property
    def payload(self) -> bytes | None:
        return None if self.path is None else Path(self.path).read_bytes()

    def job(self, proposal: Proposal, seeds: tuple[int, ...]) -> Job:
        return Job(self.key, self.path, None, seeds, proposal)


def _trial(number: int, proposal: Proposal, outcome: Outcome) -> Trial:
    return Trial(
        number, proposal, "failed" if outcome.score is None else "done", outcome.score, outcome.seconds, outcome.error
    )


def _outcome(future: Future[Outcome], name: str) -> Outcome:
    """What a future gave; what its executor met on the way is an error of the trial."""
    try:
        return future.result()
    except (BrokenExecutor, CancelledError) as error:
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:  # a worker that wants to end is no reason for this process to
        return Outcome(error=f"{type(error).__name__}: {error}")


def _broken(name: str, error: BaseException) -> SearchError:
    return SearchError(
        f"{name}: the executor takes no trial any more ({type(error).__name__}: {error}). Look at why its workers "
        "ended (memory, most often). With a checkpoint, the same call with a new executor goes on where this one ended."
    )
