"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxcompress.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file next to ``path`` to write into, which takes its place at the end; after an error nothing has changed.

    Raises:
        InputError: ``path`` is no name of a file.
        OSError: ``path`` cannot be written; names ``path``.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).name:
        raise InputError(f"path is {path!r}; expected the name of a file, as a str or a path.")
    final = Path(path)
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
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
