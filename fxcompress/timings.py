"""How long single operators take on this machine: measured once, and kept on disk."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import platformdirs
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

from fxcompress.errors import InputError
from fxcompress.module import TracedModule, submodule


class Stopwatch(Protocol):
    """Measures how long a call takes."""

    def __call__(self, call: Callable[[], object], least: float) -> float:
        """Seconds that ``call()`` takes, measured for ``least`` seconds at least."""
        ...


def stopwatch(call: Callable[[], object], least: float) -> float:
    """The median of ``torch.utils.benchmark``, with as many threads as torch uses now, after one call to warm up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return timer.blocked_autorange(min_run_time=least).median


class Timings:
    """Seconds by what was run: shapes, dtypes, options, threads, torch and processor are part of it.

    Args:
        path: a SQLite file, made if it is not there; by default in the user's cache directory. ``":memory:"`` keeps
            nothing.

    Raises:
        InputError: the file is no such file, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(platformdirs.user_cache_dir("fxcompress"), "latency.sqlite") if path is None else Path(path)
        self._machine = "; ".join(
            (torch.__version__, torch.backends.cpu.get_cpu_capability(), _processor(), str(torch.get_num_threads()))
        )
        try:
            if str(path) != ":memory:":
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path if str(path) != ":memory:" else ":memory:", timeout=60)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS timings (key TEXT PRIMARY KEY, seconds REAL NOT NULL)")
                self._file.execute("SELECT key, seconds FROM timings LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the table of latencies {os.fspath(self.path)!r} cannot be used: {error}. Delete it, or give a path "
                "that can be written; it is filled again by measuring."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __len__(self) -> int:
        with closing(self._file.execute("SELECT COUNT(*) FROM timings")) as rows:
            return int(rows.fetchone()[0])

    def seconds(self, what: str, measure: Callable[[], float]) -> float:
        """What is known, or else is measured, and known from then on."""
        key = f"{self._machine}; {what}"
        with closing(self._file.execute("SELECT seconds FROM timings WHERE key = ?", (key,))) as rows:
            found = rows.fetchone()
        if found is not None:
            return float(found[0])
        seconds = measure()
        with self._file:
            self._file.execute("INSERT OR REPLACE INTO timings VALUES (?, ?)", (key, seconds))
        return seconds


class NodeTimes(fx.Interpreter):
    """Runs a graph, and finds how long each of its nodes takes.

    Args:
        module: in eval mode.
        timings: what is known.
        watch: measures the rest.
    """

    LEAST = 0.004
    """Seconds that a node is measured for."""

    def __init__(self, module: TracedModule, timings: Timings, watch: Stopwatch) -> None:
        super().__init__(module)
        self.times: dict[str, float] = {}
        self._timings, self._watch = timings, watch

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; its time goes into :attr:`times`."""
        if n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = getattr(self, n.op)
        if tensors:
            own = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))  # some are written into
            what = self._described(n, args, kwargs)
            self.times[n.name] = self._timings.seconds(
                what, lambda: self._watch(lambda: call(n.target, *own), self.LEAST)
            )
        return call(n.target, args, kwargs)

    def _described(self, node: fx.Node, args: Any, kwargs: Any) -> str:
        """All that its time depends on."""
        if node.op == "call_module":
            layer = submodule(self.module, str(node.target))
            name = f"{type(layer).__module__}.{type(layer).__qualname__}({_options(layer)})"
        else:
            name = getattr(node.target, "__name__", str(node.target))
        return f"{name} of {pytree.tree_map_only(Tensor, _shown, (args, kwargs))}"


def _options(layer: nn.Module) -> str:
    """A layer's options, and its tensors."""
    own = (*layer.named_parameters(), *layer.named_buffers())
    return "; ".join((layer.extra_repr(), *(f"{name} {_shown(tensor)}" for name, tensor in own)))


def _shown(tensor: Tensor) -> str:
    kind = "" if tensor.device.type == "cpu" else f" {tensor.device.type}"
    order = "" if tensor.is_contiguous() else f" strides {tensor.stride()}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}{order}{kind}"


def _processor() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
