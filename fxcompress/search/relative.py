"""What drops of a score are fractions of."""

from __future__ import annotations

from collections.abc import Iterable

#: A dense score is next to nothing where it is this fraction of how far scores fall, or less.
_TINY = 0.01


def scale_of(dense: float, scores: Iterable[float | None]) -> float:
    """What a drop of the score is a fraction of: the size of the dense score.

    Where that is next to nothing (scores such as the negative distance to the dense model's outputs are 0 there), how
    far the score falls at most; 1 where it is the same everywhere.

    Args:
        dense: the score of the model as it came.
        scores: of other candidates, one that is pruned far among them; None for those that failed.
    """
    span = max((abs(dense - score) for score in scores if score is not None), default=0.0)
    return (abs(dense) if abs(dense) > _TINY * span else span) or 1.0
