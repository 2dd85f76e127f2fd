"""What a model returns: tensors in tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def items_of(value: Any) -> list[tuple[str, Any]]:
    """What a container in a result holds, by name; empty for what is none.

    Fields of a dataclass that are None are left out, because models differ by them only in what they were asked for.
    """
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return [(name, getattr(value, name)) for name in fields if getattr(value, name) is not None]
    if isinstance(value, Mapping):
        return sorted(((str(key), item) for key, item in value.items()), key=operator.itemgetter(0))
    if isinstance(value, (tuple, list)):
        return [(str(index), item) for index, item in enumerate(value)]
    return []


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a result with the path to it, in an order that the result's structure decides."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in items_of(value):
        yield from tensors_of(item, f"{path}.{name}" if path else name)
