"""Trials where they run: in this process, or in one that an executor has.

What a trial is about (the model, its analysis, the task) goes to a process once and stays there under its digest; what
goes with every trial is its number and its proposal.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fxcompress.checkpoint import seeded
from fxcompress.search.trial import Proposal

#: How many subjects a process keeps; a search has one at a time.
_KEPT = 2
#: A process has one random generator and one number of threads: its trials run one after the other.
_LOCK = threading.Lock()
_SUBJECTS: OrderedDict[str, Subject] = OrderedDict()


class Subject(Protocol):
    """What proposals are about. It is pickled, and used again and again: a trial leaves it as it found it."""

    def score(self, proposal: Proposal) -> float:
        """The score of a candidate."""
        ...


@dataclass(frozen=True)
class Job:
    """One trial on its way.

    Attributes:
        digest: of the subject.
        path: where the subject lies, if it does in a file that the process may be able to read.
        payload: the subject, pickled, for a process that asked for it.
        seeds: of the trial's random numbers.
        proposal: the candidate.
    """

    digest: str
    path: str | None
    payload: bytes | None
    seeds: tuple[int, ...]
    proposal: Proposal


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        score: None where it failed.
        seconds: how long it took.
        error: what was raised.
        missing: the process does not have the subject, and no file of it; nothing was tried.
    """

    score: float | None = None
    seconds: float = 0.0
    error: str = ""
    missing: bool = False


@contextmanager
def holding(digest: str, subject: Subject) -> Iterator[None]:
    """A subject that this process need not be sent, meanwhile."""
    with _LOCK:
        _remember(digest, subject)
    try:
        yield
    finally:
        with _LOCK:
            _SUBJECTS.pop(digest, None)


def run(job: Job) -> Outcome:
    """Try a candidate, with one thread and with random numbers of its own."""
    with _LOCK:
        subject = _subject(job)
        if subject is None:
            return Outcome(missing=True)
        start = time.perf_counter()
        try:
            with one_thread(), seeded(*job.seeds):
                score = subject.score(job.proposal)
        except Exception as error:
            return Outcome(seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
        return Outcome(score, time.perf_counter() - start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums do not depend on how many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _subject(job: Job) -> Subject | None:
    found = _SUBJECTS.get(job.digest)
    if found is None:
        payload = job.payload
        if payload is None and job.path is not None and Path(job.path).exists():
            payload = Path(job.path).read_bytes()
        if payload is None:
            return None
        found = pickle.loads(payload)
        assert found is not None
    _remember(job.digest, found)
    return found


def _remember(digest: str, subject: Subject) -> None:
    _SUBJECTS[digest] = subject
    _SUBJECTS.move_to_end(digest)
    while len(_SUBJECTS) > _KEPT:
        _SUBJECTS.popitem(last=False)
