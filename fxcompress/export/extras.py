"""Packages that only some users need, asked for when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxcompress.errors import InputError


def require(extra: str, *names: str) -> list[ModuleType]:
    """The modules of these names.

    Raises:
        InputError: one is not installed; names the extra that brings it.
    """
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
                raise
            raise InputError(
                f"{name} is not installed, and this needs it; install it with: pip install 'fxcompress[{extra}]'."
            ) from None
    return found
