"""Where in the user's code something happens."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

_SKIPPED_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@functools.cache
def _skipped(filename: str) -> bool:
    return filename.startswith(_SKIPPED_FOLDERS)


def user_line() -> str:
    """``file:line`` of the innermost frame that belongs neither to torch nor to fxcompress."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if not _skipped(frame.f_code.co_filename):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
