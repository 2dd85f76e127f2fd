"""A measurement as a program of its own, with a limit on the processor time that it may take."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def print_record(measure: Callable[[str], DataclassInstance]) -> None:
    """Measure the model that the command line names, ``library/model [seconds]``, and print the record as JSON.

    A process that takes longer ends with SIGXCPU.
    """
    name, *given = sys.argv[1:]
    if given:
        limit = int(given[0])
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))  # at the second one it would be SIGKILL
    torch.set_num_threads(1)
    print(json.dumps(asdict(measure(name))))
