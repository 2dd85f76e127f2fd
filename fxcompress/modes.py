"""Train and eval mode in a recording: ``module.training`` that remembers what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxcompress.callers import user_line


class TrainingFlag(int):
    """``module.training`` while recording: a flag to Python, a node when a recorded call takes it.

    It cannot be a bool, of which Python allows no subclass, and so C++ does not take it for one: a module that hands it
    to an operator of ATen itself is recorded again with a plain flag (:class:`PlainFlagNeeded`).
    """

    asked: list[str] | None = None

    def __bool__(self) -> bool:
        if self.asked is not None:
            self.asked.append(user_line())
        return int(self) != 0

    def __mul__(self, other: Any) -> Any:
        return WhileTraining(other, int(self) != 0) if isinstance(other, float) else int(self) * other

    __rmul__ = __mul__


class WhileTraining(float):
    """``p * module.training``: a dropout probability that is p in train mode and 0 in eval mode."""

    probability: float

    def __new__(cls, probability: float, training: bool) -> WhileTraining:
        self = float.__new__(cls, probability if training else 0.0)
        self.probability = probability
        return self


class PlainFlagNeeded(Exception):  # noqa: N818 - a request, not an error
    """A module passed its :class:`TrainingFlag` to C++, which takes nothing but a bool."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    @classmethod
    def is_behind(cls, error: Exception) -> bool:
        """Whether an error says that C++ was given a flag of ours."""
        return isinstance(error, TypeError) and TrainingFlag.__name__ in str(error)


#: Where operators of ATen take the mode among their positional arguments, by the operator.
_MODE_OF: dict[Any, int] = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), 6),
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_), 2),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout), 2),
    torch.batch_norm: 5,
}


def with_mode(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a call by a module with a plain flag: a mode that is the module's stays a switch."""
    if kwargs.get("training") is training:
        kwargs = {**kwargs, "training": TrainingFlag(training)}
    place = _MODE_OF.get(func)
    if place is not None and place < len(args) and args[place] is training:
        args = (*args[:place], TrainingFlag(training), *args[place + 1 :])
    return args, kwargs
