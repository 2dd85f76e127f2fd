"""The errors that fxcompress raises: one family, so that ``except FxCompressError`` catches them all.

Every message names the thing, what was found, what was expected, and what to do next.
"""

from __future__ import annotations


class FxCompressError(Exception):
    """Any error that fxcompress raises on purpose."""


class InputError(FxCompressError, ValueError):
    """An argument is unusable: example inputs, options, masks, or the model itself."""


class SelectionError(InputError):
    """A name pattern, type or predicate selects nothing, or is no selector at all."""


class TraceError(FxCompressError):
    """The model's forward cannot be recorded as a graph."""


class GraphError(FxCompressError):
    """A graph is malformed, or a rewrite met something that it cannot express."""


class PassError(FxCompressError):
    """A pass failed or broke its contract; the message names the pass."""


class VerificationError(FxCompressError):
    """Two models that must agree differ.

    Attributes:
        node: name of the first node whose value differs, or None if only outputs could be compared.
        difference: the largest ``max abs(a - b) / max abs(a)`` over the outputs.
    """

    def __init__(self, message: str, *, node: str | None = None, difference: float = float("nan")) -> None:
        super().__init__(message)
        self.node = node
        self.difference = difference


class TrainingError(FxCompressError):
    """A training run cannot go on: its loss is no number, or its score is not."""


class CheckpointError(FxCompressError):
    """A checkpoint cannot be read, or belongs to another run."""


class SearchError(FxCompressError):
    """A search found no candidate: all trials failed, or its executor does not work any more."""
