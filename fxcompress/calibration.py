"""Running a model on a task's batches to learn something about it: on a copy, in eval mode, leaving no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fxcompress.channels.groups import ChannelGroups
from fxcompress.masking import Masking, lay
from fxcompress.module import TracedModule
from fxcompress.nodes import apply_mask, restore_live
from fxcompress.task import Task
from fxcompress.undisturbed import undisturbed

_WATCHERS = "_watchers"


@contextmanager
def replica(
    module: TracedModule, task: Task, author: str, masking: Masking | None = None, groups: ChannelGroups | None = None
) -> Iterator[TracedModule]:
    """A copy of a module on the task's device, in eval mode and without gradients; what it draws at random is not
    missing afterwards.

    Args:
        module: not changed.
        task: says where.
        author: the pass, for provenance.
        masking: laid over the copy; ``module`` is clean then.
        groups: the module's analysis, for a masking with dead channels.
    """
    trial = copy.deepcopy(module)
    if masking is not None:
        lay(trial, masking, groups, author)
    if task.device is not None:
        trial.to(task.device)
    with undisturbed(trial):
        yield trial


class _Watcher(nn.Module):
    """Shows a value to somebody."""

    def __init__(self, see: Callable[[Any], None]) -> None:
        super().__init__()
        self.see = see

    def forward(self, value: Any) -> None:
        self.see(value)


def watch(
    module: TracedModule,
    results: Mapping[str, Callable[[Any], None]] | None = None,
    inputs: Mapping[str, Callable[[Any], None]] | None = None,
) -> None:
    """Let functions see values whenever the module runs.

    Args:
        module: a :func:`replica`, changed in place.
        results: functions by the name of a node whose result they see, as its readers do: masked, at dense size.
        inputs: functions by the name of a node whose first input they see right before it runs.
    """
    holder = nn.Module()
    module.add_module(_WATCHERS, holder)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, see in (results or {}).items():
        node = _as_read(nodes[name])
        with module.graph.inserting_after(node):
            _insert(module, holder, see, node)
    for name, see in (inputs or {}).items():
        node = nodes[name]
        with module.graph.inserting_before(node):
            _insert(module, holder, see, node.all_input_nodes[0] if not node.args else node.args[0])
    holder.eval()
    module.recompile()


def _insert(module: TracedModule, holder: nn.Module, see: Callable[[Any], None], value: Any) -> None:
    name = f"_{len(holder._modules)}"
    holder.add_module(name, _Watcher(see))
    module.graph.call_module(f"{_WATCHERS}.{name}", (value,))


def _as_read(node: fx.Node) -> fx.Node:
    """The last of the mask nodes behind a node."""
    while True:
        masked = [user for user in node.users if user.target in (apply_mask, restore_live) and user.args[0] is node]
        if not masked or "mask" not in masked[0].meta:
            return node
        node = masked[0]
