"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file next to ``path`` to write into, which takes its place at the end; after an error nothing has changed.

    Raises:
        OSError: ``path`` cannot be written; names ``path``.
    """
    final = Path(path)
    draft = final.with_name(f".{final.name}.{uuid.uuid4().hex}.part")
    try:
        draft.touch(exist_ok=False)
        yield draft
        draft.replace(final)
    except OSError as error:
        if error.filename is None or Path(error.filename) != draft:
            raise
        raise type(error)(error.errno, error.strerror, str(final)) from None
    finally:
        draft.unlink(missing_ok=True)
