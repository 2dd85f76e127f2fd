"""Runs that can be killed: each of their steps happens once, and is on disk before the next one begins.

A run is replayed: the same passes with the same options take the same steps in the same order. A step that is in the
file is not taken again; what it returned comes from there. Whatever a step changes (the module, its masks, what was
handed to :meth:`Checkpoint.keep`) is as the last one left it. So a pass says what its steps are, and nothing of how
they are stored or resumed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from fxcompress.errors import CheckpointError
from fxcompress.masking import Masking
from fxcompress.module import TracedModule
from fxcompress.processes import first
from fxcompress.replacing import replacing

Result = TypeVar("Result")


class Stateful(Protocol):
    """What can be kept: an optimizer, a schedule, an algorithm's own tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while it is used."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Be as when ``state_dict`` was taken."""
        ...


@dataclass
class Position:
    """How far a run is.

    Attributes:
        run: what tells this run from others.
        index: of the pass that is next, or under way.
        module: as the last step left it.
        masking: its masks if they are lifted, else None.
        results: what its steps returned.
        kept: states of what it keeps, by order of :meth:`Checkpoint.keep`.
    """

    run: str
    index: int
    module: TracedModule
    masking: Masking | None = None
    results: list[Any] = field(default_factory=list)
    kept: dict[int, Any] = field(default_factory=dict)


class Checkpoint:
    """The file of a run, or nothing but its seeds if there is no file.

    Args:
        path: the file, written whole at each step; None for a run that cannot be resumed.
        run: what tells this run from others; a file of another is refused.
        seed: of the run. Every step has one of its own, so that those before need not be taken to repeat it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, run: str = "", seed: int = 0) -> None:
        self.path = None if path is None else Path(path)
        self.run, self.seed = run, seed
        self.index = 0
        self._results: list[Any] = []
        self._taken = 0
        self._states: dict[int, Any] = {}
        self._kept: dict[int, Stateful] = {}
        self._keeps = 0
        self._inside = False

    def open(self) -> Position | None:
        """Where the run was interrupted, or None if it was not begun.

        Raises:
            CheckpointError: the file is damaged, or is that of another run.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=False)  # written by this run, as far as anybody can tell
        except Exception as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}); expected the checkpoint of an "
                "interrupted run. Give another path, or delete the file to begin anew."
            ) from error
        if not isinstance(found, Position) or found.run != self.run:
            raise CheckpointError(
                f"{self.path} is the checkpoint of another run; expected one with the same model, passes, example "
                "inputs, task and seed. Give another path, or delete the file to begin anew."
            )
        self.index, self._results, self._states = found.index, list(found.results), dict(found.kept)
        return found

    def step(self, work: Callable[[], Result], position: Callable[[], Position]) -> Result:
        """What ``work`` returns, now or in the run that was interrupted. A step within a step is part of it.

        Args:
            work: changes what it likes of the module, its masks and what is kept; returns something to be pickled.
            position: of the run afterwards.
        """
        if self._inside:
            return work()
        number, self._taken = self._taken, self._taken + 1
        if number < len(self._results):
            known: Result = self._results[number]
            return known
        with seeded(self.seed, self.index, number):
            self._inside = True
            try:
                result = work()
            finally:
                self._inside = False
        self._results.append(result)
        self._write(position)
        return result

    def keep(self, item: Stateful) -> int:
        """Let the state of ``item`` be stored from now on; in a run that goes on, it is as it was.

        What is kept within a step is not stored: the step is taken again as a whole.

        Returns:
            a number to :meth:`release` it with.
        """
        if self._inside:
            return -1
        number, self._keeps = self._keeps, self._keeps + 1
        self._kept[number] = item
        if number in self._states:
            item.load_state_dict(self._states.pop(number))
        return number

    def release(self, number: int) -> None:
        """The item is not needed any more."""
        self._kept.pop(number, None)

    def passed(self, position: Callable[[], Position]) -> None:
        """The pass under way has ended."""
        self.index += 1
        self._results, self._taken, self._keeps = [], 0, 0
        self._states.clear()
        self._kept.clear()
        self._write(position)

    def _write(self, position: Callable[[], Position]) -> None:
        if self.path is None or not first():  # what several processes do is the same in all
            return
        now = position()
        now.run, now.index, now.results = self.run, self.index, self._results
        now.kept = {**self._states, **{number: item.state_dict() for number, item in self._kept.items()}}
        with replacing(self.path) as draft:
            torch.save(now, draft)


class Kept:
    """Tensors and numbers of an algorithm, by name, that outlive its steps.

    Example::

        duals = Kept(weight=torch.zeros(3))
        context.keep(duals)
        duals["weight"] += 1
    """

    def __init__(self, **values: Any) -> None:
        self.values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value

    def state_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(self.values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over values."""
        self.values = dict(state_dict)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python that depend on ``numbers`` alone; afterwards as if none were drawn."""
    seed = int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numeric = random.getstate(), np.random.get_state()  # noqa: NPY002 - what users' data sets draw from
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - as above
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)  # noqa: NPY002 - as above
