"""One at a time: whoever changes what belongs to the whole process, and puts it back, must not be interleaved.

The default dtype, the random generator and the choice of attention kernels are such.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

_LOCK = threading.RLock()


def exclusive(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let calls of this and other such functions from several threads wait for one another."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        with _LOCK:
            return function(*args, **kwargs)

    return run
