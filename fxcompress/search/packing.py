"""What trials are about, as bytes for another process; what cannot be sent is named."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
from typing import Any

from fxcompress.errors import InputError
from fxcompress.task import Task


def packed(subject: Any) -> bytes:
    """The subject, pickled; with cloudpickle where that is installed and pickle alone will not do (a lambda).

    Raises:
        InputError: part of it cannot be pickled; names it.
    """
    try:
        return pickle.dumps(subject)
    except Exception as error:
        found = _cloudpickled(subject)
        if found is not None:
            return found
        raise InputError(_unsendable(subject, error)) from error


def _cloudpickled(subject: Any) -> bytes | None:
    if importlib.util.find_spec("cloudpickle") is None:
        return None
    import cloudpickle

    try:
        made: bytes = cloudpickle.dumps(subject)
    except Exception:  # the caller says what cannot be pickled
        return None
    return made


def _unsendable(subject: Any, error: Exception) -> str:
    """Which part cannot be pickled."""
    task = getattr(subject, "task", None)
    parts: dict[str, Any] = {}
    if isinstance(task, Task):
        parts = {f"task.{each.name}": getattr(task, each.name) for each in dataclasses.fields(task)}
    parts["the model"] = getattr(subject, "module", None)
    for name, value in parts.items():
        try:
            pickle.dumps(value)
        except Exception as reason:
            return (
                f"{name} is {value!r:.200}, which cannot be sent to the executor's processes ({reason}); expected "
                "something that pickles. Define functions at the top level of a module that the processes can import, "
                "or install cloudpickle there and here."
            )
    return f"the search cannot be sent to the executor's processes: {error}."
