"""Telling a forward that it is being captured, by the flag that libraries ask before they look at values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def compiling() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` answer yes, as it does inside ``torch.compile`` and ``torch.export``.

    The flag belongs to the process: only what holds the lock of :mod:`fxcompress.exclusive` may set it.
    ``is_exporting()`` and ``is_dynamo_compiling()`` keep answering no: they promise more than that nobody reads values.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
