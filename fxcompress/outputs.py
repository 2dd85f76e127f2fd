"""What a model returns: tensors in tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def items_of(value: Any) -> list[tuple[str, Any]]:
    """What a container in a result holds, by name; empty for what is none.

    Fields of a dataclass that are None are left out, because models differ by them only in what they were asked for.
    """
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return [(name, item) for name in fields if (item := getattr(value, name, None)) is not None]
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


# ---- making a result anew ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remade:
    """Makes an object as ``copy.copy`` does: without its class' constructor, which may ask for other things.

    Attributes:
        function: makes an empty one of ``arguments``.
        arguments: what is no content (the class, a ``default_factory``).
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, state: dict[str, Any], entries: dict[Any, Any]) -> Any:
        """One with these attributes and entries."""
        made = self.function(*self.arguments)
        for name, item in state.items():
            object.__setattr__(made, name, item)  # frozen ones too
        for key, item in entries.items():
            made[key] = item
        return made

    @property
    def __name__(self) -> str:
        """What the call is named after in a graph."""
        return next((item.__name__ for item in self.arguments if isinstance(item, type)), "remade").lower()


@dataclass(frozen=True)
class Making:
    """A call that makes a result: ``target(*args, **kwargs)``."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def gives(self, value: Any) -> bool:
        """Whether the call, made now, gives what ``value`` is."""
        try:
            return _same(self.target(*self.args, **(self.kwargs or {})), value)
        except Exception:  # noqa: BLE001 - whatever a constructor raises that wants other things
            return False


def making(value: Any) -> Making | None:
    """How an object of a class of its own, a dataclass or a mapping, is made of what it holds; None if nothing does."""
    dataclass_ = hasattr(type(value), "__dataclass_fields__")
    made = Making(type(value), (), dict(items_of(value))) if dataclass_ else Making(type(value), (dict(value),))
    if made.gives(value):
        return made
    try:
        reduced: str | tuple[Any, ...] = value.__reduce_ex__(4)
    except TypeError:
        return None
    if isinstance(reduced, str):
        return None
    function, arguments, *rest = reduced
    state, _, entries, *_ = (*rest, None, None, None)
    if isinstance(state, tuple):  # with attributes in slots
        state = {**(state[0] or {}), **state[1]}
    elif isinstance(state, list):  # a frozen dataclass with slots
        state = dict(zip(type(value).__dataclass_fields__, state, strict=True))
    made = Making(Remade(function, arguments), (state or {}, dict(entries or ())))
    return made if not any(True for _ in tensors_of(arguments)) and made.gives(value) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two objects hold the very same things in the same places."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    mine, theirs = items_of(one), items_of(other)
    if not mine and not theirs:
        return not isinstance(one, Tensor) and bool(one == other)
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        return False
    return all(_same(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True))
