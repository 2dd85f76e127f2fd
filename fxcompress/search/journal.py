"""The trials of a search on disk, one JSON line each, written through to the disk before anybody uses it.

The first line says which search it is. Every line carries a checksum: a process that was killed, or a disk that was
full, can leave half a line at the end, which is cut off when the journal is opened; that trial had not been used.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from fxcompress.errors import CheckpointError
from fxcompress.processes import first
from fxcompress.search.trial import Trial

_FORMAT = 1
_BEGINNING = b'{"journal": '


class Journal:
    """The journal of one search; without a path, nothing is written.

    Args:
        path: the file, made when the first trial ends.
        search: what tells this search from others (a digest); a journal of another is refused.

    Attributes:
        trials: what it held when it was opened, by number.
        recovered: how many bytes of a half-written line were cut off; 0 most often.

    Raises:
        CheckpointError: the file is no journal, is that of another search, or is damaged before its end.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, search: str = "") -> None:
        self.path = None if path is None else Path(path)
        self.search = search
        self.trials: dict[int, Trial] = {}
        self.recovered = 0
        self._length = 0
        if self.path is not None and not self.path.parent.is_dir():
            raise CheckpointError(f"checkpoint is {str(path)!r}, whose directory does not exist; create it first.")
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def append(self, trial: Trial) -> None:
        """Put a trial on the disk.

        Raises:
            CheckpointError: it cannot be written (the disk is full); what was there before still is.
        """
        if self.path is None or not first():
            return
        text = _line({"trial": trial.record()})
        if not self._length:
            text = _line({"journal": _FORMAT, "search": self.search}) + text
        self._write(self.path, text)

    def _write(self, path: Path, text: bytes) -> None:
        fresh = not self._length
        try:
            with path.open("r+b" if path.exists() else "xb", buffering=0) as file:
                try:
                    file.seek(self._length)
                    left = memoryview(text)
                    while left:
                        left = left[os.write(file.fileno(), left) :]
                    os.fsync(file.fileno())
                except BaseException:
                    file.truncate(self._length)  # half a line is none
                    raise
            if fresh:
                _sync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror or error}); its {len(self.trials)} finished trials are "
                "kept. Make room, and make the same call again: it goes on from there."
            ) from error
        self._length += len(text)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        if not content.startswith(_BEGINNING[: len(content)]):
            raise CheckpointError(
                f"{path} is no journal of trials (it begins with {content[:40]!r}); expected a new file, or the "
                "journal of the same call. It is left as it is: give another path."
            )
        lines = content.splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines):
            record = _parsed(line)
            if record is None:
                if number < len(lines) - 1:
                    raise CheckpointError(
                        f"{path} is damaged in line {number + 1} of {len(lines)}; expected a journal of trials, in "
                        "which a killed run damages the last line alone. Delete that line to try its trial again, or "
                        "the file to begin anew."
                    )
                break
            records.append(record)
            self._length += len(line)
        self.recovered = len(content) - self._length
        if not records:
            return  # killed while it wrote the first line
        head = records[0]
        if head.get("journal") != _FORMAT or head.get("search") != self.search:
            raise CheckpointError(
                f"{path} is the journal of another search; expected one of the same model, task, options and seed. "
                "Give another path, or delete the file to begin anew."
            )
        for record in records[1:]:
            trial = Trial.of(record.get("trial", {}))
            self.trials[trial.number] = trial
        if self.recovered:
            with path.open("r+b") as file:
                file.truncate(self._length)


def _line(body: dict[str, Any]) -> bytes:
    """A line of JSON with a checksum of what is in it."""
    return json.dumps({**body, "crc": _checksum(body)}).encode() + b"\n"


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for one that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        body = json.loads(line)
        found = body.pop("crc")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return body if found == _checksum(body) else None


def _sync_directory(path: Path) -> None:
    """Make the name of a new file last, where a directory can be opened (not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
