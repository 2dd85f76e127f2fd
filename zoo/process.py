"""A measurement in a process of its own, with limits on the time that it may take.

Processes are forked from one that has imported all libraries: importing takes longer than measuring most models.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PROCESSES = multiprocessing.get_context("forkserver")

#: How many times the limit on processor time a process may take on the wall.
_PATIENCE = 5


def preload(modules: list[str]) -> None:
    """Import modules once for all processes; each runs in one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"  # what is imported reads it
    _PROCESSES.set_forkserver_preload(modules)


def run(measure: Callable[[str], DataclassInstance], name: str, limit: int) -> dict[str, Any]:
    """The record of one model; one with an error where the process ended without.

    Args:
        measure: a function of a module.
        name: ``library/model``, its argument.
        limit: seconds of processor time.
    """
    start = time.monotonic()
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, receiver:
        said = Path(folder, "said.txt")
        said.touch()
        process = _PROCESSES.Process(target=_send, args=(sender, said, measure, name, limit))
        process.start()
        sender.close()
        try:
            if receiver.poll(_PATIENCE * limit):
                record: dict[str, Any] = receiver.recv()
            else:
                record = {"name": name, "error": f"took more than {_PATIENCE * limit} s on the wall"}
                process.kill()
            process.join()
        except EOFError:  # it ended without a record
            process.join()
            record = {"name": name, "error": _end(process.exitcode, limit, said)}
    return {**record, "wall": time.monotonic() - start}


def _end(code: int | None, limit: int, said: Path) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {limit} s"
    return f"exit code {code}: {said.read_text(errors='replace').strip().splitlines()[-1:]}"


def _send(sender: Connection, said: Path, measure: Callable[[str], DataclassInstance], name: str, limit: int) -> None:
    """Runs in the process: measure, and send the record as a dict. What is printed goes to a file."""
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))  # at the second one it would be SIGKILL
    torch.set_num_threads(1)
    sender.send(asdict(measure(name)))
