"""The models of the sweep, by name, with inputs they accept: ``library/name``.

Weights are drawn (``model_zoo.randomize``), because with their defaults much that is wrong computes the right value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import model_zoo  # isort: skip  # declares the operators that torchvision asks for: it must come first

from zoo import timm_models, torchvision_models, transformers_models
from zoo.sample import Sample

#: How to build every model of a library.
LIBRARIES: dict[str, dict[str, Callable[[], Sample]]] = {
    "torchvision": torchvision_models.MODELS,
    "timm": timm_models.MODELS,
    "transformers": transformers_models.MODELS,
}


def names(library: str | None = None) -> list[str]:
    """All models of the sweep, or those of one library."""
    return [f"{each}/{name}" for each, models in LIBRARIES.items() if library in (None, each) for name in models]


def build(name: str, seed: int = 0) -> Sample:
    """A model in eval mode whose weights and statistics hide nothing, and inputs for it."""
    library, _, model = name.partition("/")
    return prepared(LIBRARIES[library][model](), seed)


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
