"""Random numbers that are not torch's: a recording holds what was drawn, and nobody would know."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def foreign_draws(found: set[str]) -> Iterator[None]:
    """Add the generators that were drawn from meanwhile to ``found``, and put them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is what others draw from
    try:
        yield
    finally:
        if random.getstate() != python:
            found.add("Python's random")
            random.setstate(python)
        after = np.random.get_state()  # noqa: NPY002 - as above
        if any(not np.array_equal(one, other) for one, other in zip(numpy, after, strict=True)):
            found.add("numpy's random")
            np.random.set_state(numpy)  # noqa: NPY002 - as above
