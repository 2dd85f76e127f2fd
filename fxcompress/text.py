"""What rich shows, as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType) -> str:
    """What rich shows for `renderable`, as plain text: the same whatever the terminal is."""
    console = Console(file=io.StringIO(), width=200, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def shown_shape(shape: Iterable[int]) -> str:
    """A shape as text: "64x3x7x7"."""
    return "x".join(map(str, shape))
