"""The models of the sweep, by name, with inputs they accept: ``library/name``.

Weights are drawn (``model_zoo.randomize``), because with their defaults much that is wrong computes the right value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import model_zoo  # isort: skip  # declares the operators that torchvision asks for: it must come first

from zoo.sample import Sample

#: Every library has a module of its own, with a table of builders: only what is asked for is imported.
LIBRARIES = ("torchvision", "timm", "transformers")


def models(library: str) -> dict[str, Callable[[], Sample]]:
    """How to build every model of a library."""
    return import_module(f"zoo.{library}_models").MODELS  # type: ignore[no-any-return]


def names(library: str) -> list[str]:
    """All models of a library, as ``library/model``."""
    return [f"{library}/{name}" for name in models(library)]


def build(name: str, seed: int = 0) -> Sample:
    """A model in eval mode whose weights and statistics hide nothing, and inputs for it."""
    library, _, model = name.partition("/")
    return prepared(models(library)[model](), seed)


def prepared(sample: Sample, seed: int = 0) -> Sample:
    """A sample in eval mode whose weights and statistics hide nothing."""
    sample.model.eval()
    model_zoo.randomize(sample.model, seed)
    model_zoo.calibrate(sample.model, *sample.inputs) if isinstance(sample.inputs, tuple) else _calibrate(sample)
    return sample


def _calibrate(sample: Sample) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sample.model

        def forward(self) -> object:
            return self.inner(**sample.inputs)

    model_zoo.calibrate(ByName())
