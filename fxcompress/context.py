"""What a pass may ask for while it runs: the analysis, the masks, the task, and steps that happen once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from torch import Tensor, fx, nn

from fxcompress.channels.groups import ChannelGroups, analyse
from fxcompress.checkpoint import Checkpoint, Position, Stateful
from fxcompress.errors import InputError
from fxcompress.fingerprint import fingerprint
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking, lay, lift
from fxcompress.module import TracedModule, state_of
from fxcompress.search.history import SearchHistory
from fxcompress.search.journal import Journal
from fxcompress.search.search import Search
from fxcompress.search.trial import Trial
from fxcompress.task import Need, Task, missing
from fxcompress.training import Epoch, Training, summary
from fxcompress.verify import Align

if TYPE_CHECKING:
    from fxcompress.pipeline import Snapshot

Result = TypeVar("Result")


@dataclass
class Context:
    """What a pass may ask for while it runs.

    Attributes:
        inputs: the example inputs, or None.
        seed: for whatever is random.
        verify: whether claims are checked by running models.
        notes: what the passes had to say, for the history.
        align: set by a pass that changes shapes: what a value of the module before it is in the one after it.
        masking: the module's masks while they are lifted off its graph, else None; see :attr:`Pass.lifts`.
        rounded: set by a pass that computed new weights in this run although it seldom does; see ``Pass.rounding``.
        task: what the model is for, or None.
        dense: the model that the run began with, never changed; a teacher for instance.
        checkpoint: where the run's steps are stored.
        console: where progress is shown.
        executor: where trials of searches run; in this process if it is None.
        searches: what the pass under way searched, for the history.
    """

    inputs: Inputs | None = None
    seed: int = 0
    verify: bool = True
    notes: list[str] = field(default_factory=list)
    align: Align | None = None
    masking: Masking | None = None
    rounded: bool = False
    task: Task | None = None
    dense: nn.Module | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    executor: Executor | None = None
    searches: list[SearchHistory] = field(default_factory=list)
    _snapshot: tuple[TracedModule, Snapshot] | None = None
    _latest: tuple[Any, ChannelGroups] | None = None
    _analyses: dict[str, ChannelGroups] = field(default_factory=dict)

    def groups(self, module: TracedModule) -> ChannelGroups:
        """The channel groups of a clean traced module; analysed once for each graph.

        Raises:
            InputError: there are no example inputs.
        """
        if self.inputs is None:
            raise InputError(
                "example_inputs is missing: channels are followed through a run of the model. Pass a batch."
            )
        shapes = [tuple(tensor.shape) for tensor in state_of(module).values()]
        now = signature(module.graph), shapes
        if self._latest is not None and self._latest[0] == now:
            return self._latest[1]
        key = f"{module.graph}{shapes}"
        if key not in self._analyses:
            self._analyses[key] = analyse(module, self.inputs)
        self._latest = now, self._analyses[key]
        return self._analyses[key]

    def forget(self) -> None:
        """Drop what is known about the module: somebody may have changed what no graph shows (a layer's stride)."""
        self._snapshot = self._latest = None
        self._analyses.clear()

    def masked(self, module: TracedModule, author: str, like: TracedModule | None = None) -> TracedModule:
        """The module (a copy of ``like``, whose analysis will do) with its lifted masks laid over it, in place."""
        if self.masking is not None:
            lay(module, self.masking, self.groups(like or module) if self.masking.dead else None, author)
        return module

    @contextmanager
    def laid(self, module: TracedModule, author: str) -> Iterator[TracedModule]:
        """The module with its masks laid over it meanwhile, for a pass that lifts and has to run or train it."""
        masking = self.masking
        if masking is None:
            yield module
            return
        self.masked(module, author)
        self.masking = None
        try:
            yield module
        finally:
            self.masking = lift(module)
            if self.masking == masking:
                self.masking = masking  # the object says which analysis it was completed with

    # ---- training and steps --------------------------------------------------------------------------------------

    def required_task(self, needs: Sequence[Need], who: str) -> Task:
        """The task, which gives all that is needed.

        Raises:
            InputError: there is none, or it lacks something; says what.
        """
        lacking = list(needs) if self.task is None else self.task.lacking(needs)
        if lacking or self.task is None:
            raise InputError(f"{missing(lacking, who)} Give it with compress(..., task=fxcompress.Task(...)).")
        return self.task

    def position(self, module: TracedModule) -> Position:
        """How far the run is, for a checkpoint."""
        return Position("", 0, module, self.masking)

    def search(
        self,
        name: str,
        total: int,
        *parts: object,
        label: str = "",
        within: Callable[[Trial], bool] | None = None,
    ) -> Search:
        """A search of the pass under way, whose journal lies next to the checkpoint.

        Args:
            name: of the pass.
            total: how many trials are expected.
            parts: what tells it from other searches, besides the seed and the task.
            label: tells it from other searches of the same pass.
            within: says of a trial whether it may be taken, for the best so far.
        """
        index, path = self.checkpoint.index, self.checkpoint.path
        given = [getattr(self.task, part, None) for part in ("score", "loss", "optimizer", "schedule")]
        journal = Journal(
            None if path is None else path.with_name(f"{path.name}.{index}{label}.jsonl"),
            ""
            if path is None
            else fingerprint(name, self.checkpoint.run, self.seed, index, label, type(self.task), given, *parts),
        )
        seeds = self.seed, index, *label.encode()
        return Search(name, total, seeds, journal, self.executor, self.console, within)

    def step(self, module: TracedModule, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; in a run that goes on after it was killed, what it returned then.

        ``work`` may change the module, its masks and what was kept. Nothing else that it changes is there in a run
        that goes on, so what follows may depend on these and on what it returned alone.

        Args:
            module: stored with its masks after the step.
            work: what is done once; returns something that can be pickled.
        """
        result, notes = self.checkpoint.step(partial(self._noted, work), partial(self.position, module))
        self.notes += notes
        return result

    def _noted(self, work: Callable[[], Result]) -> tuple[Result, list[str]]:
        """What ``work`` returns, and the notes that it made, taken out of the context's."""
        said = len(self.notes)
        result = work()
        notes = self.notes[said:]
        del self.notes[said:]
        return result, notes

    def keep(self, item: Stateful) -> Callable[[], None]:
        """Store the state of ``item`` with every step until the function that is returned is called.

        In a run that goes on, ``item`` is at once as it was.
        """
        return partial(self.checkpoint.release, self.checkpoint.keep(item))

    def train(
        self,
        module: TracedModule,
        *,
        epochs: int | None = None,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[int], None] | None = None,
        title: str = "training",
    ) -> tuple[Epoch, ...]:
        """Train the module on the task, in place; masks in its graph stay.

        Args:
            module: the module, masks laid over it (see :meth:`laid`).
            epochs: how many; the task's by default.
            penalty: added to the loss: a scalar tensor.
            after_step: called without gradients after every step of the optimizer with their number so far, from 1.
            title: for progress and messages.

        Raises:
            InputError: the task lacks what training needs.
            TrainingError: the loss became NaN or infinite.
        """
        task = self.required_task(("batches", "loss", "optimizer"), title)
        training = Training(
            epochs=task.epochs if epochs is None else epochs,
            step=partial(self.step, module),
            keep=self.keep,
            penalty=penalty,
            after_step=after_step,
            console=self.console,
            title=title,
        )
        done = task.train(module, training)
        if done:
            self.notes.append(f"{title}: {summary(done)}")
        return done


def signature(graph: fx.Graph) -> list[Any]:
    """What equals another's if the nodes are the same ones and call the same."""
    return [(node, node.op, node.target, node.args, node.kwargs) for node in graph.nodes]
