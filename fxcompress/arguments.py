"""The arguments of a call: values in tuples, lists, dicts and slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to all that is in its containers, in order.

    The containers are made anew, those of torch.fx as ordinary ones.
    """
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(mapped(function, item) for item in value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(function, item) for item in (value.start, value.stop, value.step)))
    return function(value)


def leaves(value: Any) -> list[Any]:
    """All that is in the containers of ``value``, in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return found
