"""Integers that remember which tensor's size they are.

While a forward is recorded, ``x.shape`` hands out :class:`TracedInt`: an ``int`` to Python (it indexes, compares,
branches and prints as one) that carries the expression it came from, so that arithmetic on sizes can be
recorded as nodes and the traced model runs at other batch sizes and resolutions.

What leaves them on purpose is a plain number again: ``int(n)``, ``math.sqrt(n)``. It keeps what it was when the model
was recorded. (So does ``x.shape.numel()``, which is C; ``x.numel()`` is traced.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


class Expression:
    """How a traced number was made: ``function(*operands)``; operands are numbers, traced numbers, or nodes."""

    __slots__ = ("function", "node", "operands")

    def __init__(self, function: Callable[..., Any] | str, *operands: Any) -> None:
        self.function = function
        self.operands = operands
        self.node: Any = None  # the fx node, once some recorded call has needed it


class TracedInt(int):
    """An integer derived from tensor sizes."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> TracedInt:
        self = int.__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class TracedFloat(float):
    """A quotient or a root of sizes."""

    expression: Expression

    def __new__(cls, value: float, expression: Expression) -> TracedFloat:
        self = float.__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


TRACED = (TracedInt, TracedFloat)


def plain(number: Any) -> Any:
    """The number without its memory."""
    if isinstance(number, TracedInt):
        return int(number)
    return float(number) if isinstance(number, TracedFloat) else number


def _traced(value: int | float, expression: Expression) -> int | float:
    return TracedInt(value, expression) if isinstance(value, int) else TracedFloat(value, expression)


def _binary(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            return NotImplemented
        operands = (other, self) if reflected else (self, other)
        return _traced(function(*map(plain, operands)), Expression(function, *operands))

    return method


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    def method(self: Any, *digits: int) -> Any:
        value = function(plain(self), *digits)
        return _traced(value, Expression(function, self, *digits))

    return method


def _divmod(self: Any, other: Any) -> Any:
    return self // other, self % other


_ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow")
_BITWISE = ("lshift", "rshift", "and", "or", "xor")
for _name in (*_ARITHMETIC, *_BITWISE):
    for _class in TRACED if _name in _ARITHMETIC else (TracedInt,):
        setattr(_class, f"__{_name}__", _binary(getattr(operator, f"__{_name}__"), reflected=False))
        setattr(_class, f"__r{_name}__", _binary(getattr(operator, f"__{_name}__"), reflected=True))
for _class in TRACED:
    for _name in ("neg", "pos", "abs"):
        setattr(_class, f"__{_name}__", _unary(getattr(operator, _name)))
    setattr(_class, "__divmod__", _divmod)
for _name, _function in (("ceil", math.ceil), ("floor", math.floor), ("round", round), ("trunc", math.trunc)):
    setattr(TracedFloat, f"__{_name}__", _unary(_function))
