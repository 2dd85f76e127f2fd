"""Choosing layers, the same way for every pass: ``include=``, ``exclude=`` and ``sparsity=``.

What the user wrote is parsed once into an immutable recipe (:class:`Selection`, :class:`Sparsity`), which
raises at once on what it cannot mean. The recipe is then applied to the layers of a model, which raises on
what it does not find there.

The layers come as a mapping of dotted name to module that holds only the layers a pass is interested in.
Containers are known by their names alone, as the dotted prefixes of the layers' names.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import nn

from fxcompress.errors import InputError, SelectionError

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name pattern, a module type, or a predicate ``(name, module) -> bool``."""

Selectors: TypeAlias = Selector | Sequence[Selector]
"""One selector or several, of which any one is enough."""


Value = TypeVar("Value")


class Coupled(Protocol):
    """A group of layers that change together."""

    @property
    def layers(self) -> Sequence[str]:
        """Their names."""
        ...


Group = TypeVar("Group", bound=Coupled)


@dataclass(frozen=True)
class Selection:
    """Which layers a pass works on.

    A name pattern is matched against the whole dotted name by :func:`fnmatch.fnmatchcase`: case counts, ``*``
    crosses dots. A pattern that matches a container stands for every layer under it. A type is matched by
    ``isinstance``. A predicate is asked about each layer.

    Args:
        include: selectors, any of which chooses a layer; None chooses every layer.
        exclude: selectors, any of which drops a layer, included or not; None drops none.

    Both are stored as tuples, but for ``include=None``.

    Raises:
        SelectionError: a selector is of another kind, or ``include`` is empty.
    """

    include: Selectors | None = None
    exclude: Selectors | None = None

    def __post_init__(self) -> None:
        if self.include is not None:
            object.__setattr__(self, "include", _parsed("include", self.include))
        if self.include == ():
            raise SelectionError("include is empty and chooses no layer; leave it out to choose every layer")
        object.__setattr__(self, "exclude", _parsed("exclude", self.exclude))

    def chosen(self, modules: Mapping[str, nn.Module]) -> frozenset[str]:
        """The names of the layers in `modules` that are included and not excluded.

        Without ``include`` and ``exclude`` these are all the names, even if there are none.

        Raises:
            SelectionError: a pattern or type matches no layer (near names are listed), or no layer is left.
        """
        included = frozenset(modules)
        if self.include is not None:
            included = _matched("include", _parsed("include", self.include), modules)
        excluded = _matched("exclude", _parsed("exclude", self.exclude), modules)
        chosen = included - excluded
        if not chosen and (self.include or self.exclude):
            raise SelectionError(
                f"no layer is left to work on: of {len(modules)}, {self._described()}, "
                f"{len(included)} are included and {len(excluded)} excluded; include more or exclude less"
            )
        return chosen

    def coupled(self, groups: Iterable[Group], modules: Mapping[str, nn.Module]) -> list[Group]:
        """Those of some groups of coupled layers that have an included layer and no excluded one.

        Raises:
            SelectionError: as for :meth:`chosen`.
        """
        self.chosen(modules)  # raises where a selector matches nothing, or nothing is left
        included = Selection(self.include).chosen(modules)
        excluded = _matched("exclude", _parsed("exclude", self.exclude), modules)
        return [group for group in groups if set(group.layers) & included and not set(group.layers) & excluded]

    def _described(self) -> str:
        given = {"include": _parsed("include", self.include), "exclude": _parsed("exclude", self.exclude)}
        return " and ".join(f"by {role}={', '.join(map(_shown, each))}" for role, each in given.items() if each)


@dataclass(frozen=True)
class Sparsity:
    """The fraction to remove, per layer: what :meth:`parse` makes of the ``sparsity=`` option of a pass.

    Attributes:
        rules: (name pattern, sparsity) in the order given; the last one that matches a layer wins.
    """

    rules: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, value: float | Mapping[str, float]) -> Sparsity:
        """Read ``sparsity=``: a float for every layer, or a mapping of name pattern to float.

        Patterns are those of :class:`Selection`.

        Raises:
            InputError: a value is no number in [0, 1), or the mapping is empty.
            SelectionError: a key is no name pattern.
        """
        return cls(parsed_rules("sparsity", value, _fraction, "{'layer1.*': 0.5}"))

    def sparsities(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """The sparsity, in [0, 1), of each layer in `modules` that a rule matches, in the order of `modules`.

        A layer that no rule matches is not to be pruned. It is absent, not 0.0, which a rule may say too.

        Raises:
            SelectionError: a pattern matches no layer; near names are listed.
        """
        return last_matches("sparsity", self.rules, modules)


def last_matches(role: str, rules: Sequence[tuple[str, Value]], modules: Mapping[str, nn.Module]) -> dict[str, Value]:
    """What the last rule that matches a layer says, for each layer that one matches, in the order of `modules`.

    Raises:
        SelectionError: a pattern matches no layer; near names are listed.
    """
    found: dict[str, Value] = {}
    for pattern, value in rules:
        names = [name for name in modules if _covers(pattern, name)]
        if not names and pattern != "*":  # one value for all is fine for a model that has no layers
            raise _unmatched(role, pattern, modules)
        found.update(dict.fromkeys(names, value))
    return {name: found[name] for name in modules if name in found}


def parsed_rules(
    role: str, value: Any, read: Callable[[str, Any], Value], example: str
) -> tuple[tuple[str, Value], ...]:
    """An option that is one value for every layer, or a mapping of name pattern to value, as rules.

    Raises:
        InputError: the mapping is empty, or ``read(what, value)`` does not like a value.
        SelectionError: a key is no name pattern.
    """
    if not isinstance(value, Mapping):
        return (("*", read(role, value)),)
    if not value:
        raise InputError(f"{role} is an empty mapping; give a pattern, such as {example}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise SelectionError(
                f"{role} has the key {_shown(pattern)}; expected a name pattern such as 'layer1.*' "
                "(types and predicates go into include=)"
            )
    return tuple((pattern, read(f"{role}[{pattern!r}]", of)) for pattern, of in value.items())


def _fraction(what: str, value: object) -> float:
    number = float("nan") if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    if not 0 <= number < 1:  # a NaN is in no range
        raise InputError(f"{what} is {value!r}; expected a number in [0, 1), the fraction to remove")
    return number


def _parsed(role: str, selectors: Selectors | None) -> tuple[Selector, ...]:
    """The selectors as a tuple, each of a kind that can be matched."""
    if selectors is None:
        return ()
    if isinstance(selectors, str) or not isinstance(selectors, Sequence):
        selectors = (selectors,)
    for selector in selectors:
        if not _usable(selector):
            raise SelectionError(
                f"{role} has {_shown(selector)} of type {type(selector).__name__}; expected a name pattern "
                "such as 'layer1.*', a subclass of torch.nn.Module, a predicate (name, module) -> bool, "
                "or a tuple or list of those"
            )
    return tuple(selectors)


def _usable(selector: object) -> bool:
    if isinstance(selector, type):
        return issubclass(selector, nn.Module)
    return isinstance(selector, str) or (callable(selector) and not isinstance(selector, nn.Module))


def _matched(role: str, selectors: tuple[Selector, ...], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of the layers that any of `selectors` matches."""
    names: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            matches = {name for name in modules if _covers(selector, name)}
        elif isinstance(selector, type):
            matches = {name for name, module in modules.items() if _is_a(module, selector)}
        else:
            names.update(name for name, module in modules.items() if selector(name, module))
            continue  # a predicate may well say no to every layer
        if not matches:
            raise _unmatched(role, selector, modules)
        names |= matches
    return frozenset(names)


def _is_a(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is, or stands in a traced model for, one of this type."""
    return isinstance(module, kind) or issubclass(getattr(module, "kind", type(module)), kind)


def _covers(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the layer called `name` or a container that it is in."""
    return fnmatchcase(name, pattern) or any(fnmatchcase(each, pattern) for each in _containers(name))


def _containers(name: str) -> list[str]:
    """The dotted prefixes of `name`, outermost first: "a.b.c" is in "a" and in "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _unmatched(role: str, selector: str | type[nn.Module], modules: Mapping[str, nn.Module]) -> SelectionError:
    if isinstance(selector, str):
        kind, wanted = "names", selector.strip("*.")
        known = [each for name in modules for each in (*_containers(name), name)]
    else:
        kind, wanted = "types", selector.__name__
        known = [type(module).__name__ for module in modules.values()]
    known = list(dict.fromkeys(known))
    near = get_close_matches(wanted, known, n=5, cutoff=0.5)
    hint = f"near {kind}: {', '.join(near)}" if near else f"some {kind}: {', '.join(known[:5]) or 'none'}"
    return SelectionError(f"{role}={_shown(selector)} matches none of the {len(modules)} layers; {hint}")


def _shown(selector: object) -> str:
    name = getattr(selector, "__qualname__", None)
    return name if isinstance(name, str) else repr(selector)
