"""``compress``: trace a model, run the passes, hand back the module."""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fxcompress.checkpoint import Checkpoint, seeded
from fxcompress.context import Context
from fxcompress.errors import CheckpointError, InputError, TraceError
from fxcompress.exclusive import exclusive
from fxcompress.fingerprint import fingerprint
from fxcompress.inputs import Inputs, check_devices, other_batch
from fxcompress.module import TracedModule, copied, state_of
from fxcompress.pipeline import Pass, PassResult, parse_passes, run_pass
from fxcompress.report import report
from fxcompress.search.history import SearchHistory
from fxcompress.task import Task
from fxcompress.trace import capture
from fxcompress.verify import TOLERANCE, difference, run_seeded


@dataclass(frozen=True)
class Step:
    """One entry of a module's history, ``module.meta["history"]``.

    Attributes:
        name: the pass.
        options: the pass as it was written.
        modified: whether it changed anything.
        seconds: how long it took.
        notes: what it reported.
        difference: the largest relative difference that verification found, where the pass preserves the function.
        searches: what it searched.
    """

    name: str
    options: str
    modified: bool
    seconds: float
    notes: tuple[str, ...]
    difference: float | None
    searches: tuple[SearchHistory, ...] = ()


@exclusive
def compress(
    model: nn.Module,
    passes: Sequence[Pass],
    *,
    example_inputs: Any = None,
    task: Task | None = None,
    verify: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> TracedModule:
    """Run compression passes on a model.

    Args:
        model: any module, or what an earlier ``compress`` returned; never changed.
        passes: in order.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. May be left out for a module
            that fxcompress made, or when every pass looks at weights alone.
        task: what the model is for, for passes that train it or look at data.
        verify: check by evaluation that the trace equals the model, and that passes which claim to preserve the
            function do.
        checkpoint: a file that holds how far the run is. The same call goes on from there after it was killed, and ends
            as if it had not been, bit for bit (on the same machine, if batches depend on nothing but torch's, NumPy's
            and Python's random numbers). It is pickled: give only files that you wrote. Every finished trial of a
            search is in a journal next to it (``<checkpoint>.<pass>.jsonl``).
        executor: any ``concurrent.futures.Executor``, for the trials of searches: a process pool, or a Dask client's.
            By default they run here, one after the other. The result does not depend on the number of workers.
        seed: for whatever is random.
        progress: print what was done and a table of before and after; by default where stderr is a terminal.

    Returns:
        A GraphModule over the model's own layers and ``state_dict`` keys, in the model's mode. ``meta["history"]``
        tells what ran.

    Raises:
        InputError: an argument is unusable; ``task`` lacks something that a pass needs.
        CheckpointError: ``checkpoint`` is damaged, or that of another run.
        TrainingError: a loss became NaN or infinite; the checkpoint holds the last epoch before.
        TraceError: the model cannot be recorded.
        VerificationError: a pass changed what it claimed to keep.
    """
    pipeline = parse_passes(passes)
    inputs = _parse_inputs(model, pipeline, example_inputs)
    console = Console(stderr=True, quiet=not (sys.stderr.isatty() if progress is None else progress))
    context = Context(
        inputs=inputs, seed=seed, verify=verify, task=task and task.begun_with(model), dense=model, console=console,
        checkpoint=_parse_checkpoint(checkpoint, model, pipeline, inputs, task, seed),
        executor=parse_executor(executor),
    )  # fmt: skip
    for item in pipeline:
        if item.needs:
            context.required_task(item.needs, item.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _run(model, pipeline, context)
    module.ready()
    if not console.quiet:
        console.print(report(model, module, inputs, latency=False))
    return module


def _run(model: nn.Module, pipeline: Sequence[Pass], context: Context) -> TracedModule:
    """The passes one after another, from where the checkpoint is."""
    known = context.checkpoint.open()
    if known is None:
        module = capture(model, context.inputs, waiting=True)
        if context.verify and context.inputs is not None and not isinstance(model, TracedModule):
            _check_trace(model, module, context.inputs)
    else:
        module, context.masking = known.module, known.masking
        home = {parameter.device for parameter in model.parameters()}
        if len(home) == 1:  # a step of a training elsewhere (Task.device) may have been the last
            module.to(home.pop())
        module.wait()
    begun = context.checkpoint.index
    for item, following in list(itertools.zip_longest(pipeline, pipeline[1:]))[begun:]:
        if not item.versioned:
            module.ready()
        with seeded(context.seed, context.checkpoint.index):
            result = run_pass(item, module, context, lays=following is None or not following.lifts)
        module = result.module
        searches, context.searches = tuple(context.searches), []
        module.meta["history"] = (*module.meta["history"], _step(item, result, searches))
        context.checkpoint.passed(partial(context.position, module))
        if not context.console.quiet:
            context.console.print(_line(item, result))
    return module


def _parse_inputs(model: nn.Module, pipeline: Sequence[Pass], example_inputs: Any) -> Inputs | None:
    """Everything about the arguments that can be checked before any work starts."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    needing = [item.name for item in pipeline if item.needs_inputs]
    if example_inputs is None and needing:
        raise InputError(
            f"example_inputs is missing: {', '.join(needing)} follows channels through a run of the model. Pass a "
            "batch: compress(model, passes, example_inputs=x)."
        )
    inputs = None if example_inputs is None else Inputs.parse(example_inputs)
    if inputs is not None:
        check_devices(model, inputs)
    state = state_of(model).items()
    weights = {name: t.detach() for name, t in state if isinstance(t, nn.Parameter) and t.is_floating_point()}
    if math.isfinite(nn.utils.get_total_norm(weights.values())):
        return inputs
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{name} holds {bad} values that are NaN or infinite; expected finite weights. Check the training run."
            )
    return inputs


def _parse_checkpoint(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    pipeline: Sequence[Pass],
    inputs: Inputs | None,
    task: Task | None,
    seed: int,
) -> Checkpoint:
    """The file of this run, which can be written.

    Raises:
        CheckpointError: its directory does not exist.
    """
    if path is None:
        return Checkpoint(seed=seed)
    if not Path(path).parent.is_dir():
        raise CheckpointError(f"checkpoint is {os.fspath(path)!r}, whose directory does not exist; create it first.")
    shapes = None if inputs is None else inputs.shapes()
    plain = [type(task), *(getattr(task, name, None) for name in ("epochs", "clip", "patience", "precision"))]
    return Checkpoint(path, fingerprint(pipeline, shapes, seed, plain, model), seed)


def parse_executor(executor: Executor | None) -> Executor | None:
    """The executor, if it is one.

    Raises:
        InputError: it is something else.
    """
    if executor is not None and not isinstance(executor, Executor):
        raise InputError(
            f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor: a ProcessPoolExecutor, "
            "or that of a Dask client, client.get_executor()."
        )
    return executor


def _check_trace(model: nn.Module, module: TracedModule, inputs: Inputs) -> None:
    """The traced graph computes what the model does, at the example's batch size and at another where there is one."""
    twin, trial = copied(model, plainly=True), copy.deepcopy(module)
    with torch.no_grad():
        gap = _gap(twin, trial, inputs)
        if not gap <= TOLERANCE[torch.float32]:
            raise TraceError(
                f"the traced model differs from the model by {gap:.3g} on the example inputs. The forward is not a "
                "function of its inputs alone (random numbers, state that it changes), or this is an error."
            )
        if not module.meta["batched"]:
            return
        other = inputs.rebatched(other_batch(inputs.batch))
        try:
            gap = _gap(twin, trial, other)
        except RuntimeError as error:
            module.meta["batched"] = ()
            warnings.warn(f"no batch dimension: the model fails at batch {other.batch} ({error})", stacklevel=3)
            return
        if not gap <= TOLERANCE[torch.float32]:
            module.meta["batched"] = ()
            warnings.warn("no batch dimension: the traced model holds for the example's batch size only", stacklevel=3)


def _gap(model: nn.Module, module: TracedModule, inputs: Inputs) -> float:
    """The relative difference of two models that draw the same random numbers, in whatever mode they are in."""
    return difference(run_seeded(model, inputs), run_seeded(module, inputs))


def _step(item: Pass, result: PassResult, searches: tuple[SearchHistory, ...]) -> Step:
    return Step(item.name, repr(item), result.modified, result.seconds, result.notes, result.difference, searches)


def _line(item: Pass, result: PassResult) -> str:
    text = f"{item.name}: {'changed' if result.modified else 'nothing to do'} in {result.seconds:.2f} s"
    if result.difference is not None:
        text += f", verified to {result.difference:.1e}"
    return "\n".join([text, *(f"  {note}" for note in result.notes)])
