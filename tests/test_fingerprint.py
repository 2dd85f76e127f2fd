"""What tells one call from another: code and data, and nothing that another process would have otherwise."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search_cases import X, network
from torch import nn

import fxcompress
from fxcompress import Budget, CheckpointError, Task
from fxcompress.fingerprint import fingerprint
from fxcompress.passes import SimulatedAnnealingPruner


def constant(value: int) -> Any:
    return eval(f"lambda model: {value}.0")


def closing(value: Any) -> Any:
    return lambda model: value


def defaulting(value: Any) -> Any:
    return lambda model, *, given=value: given


class Scorer:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, model: nn.Module) -> Any:
        return self.value

    def measure(self, model: nn.Module) -> Any:
        return self.value


def loader(value: float) -> Any:
    data = torch.utils.data.TensorDataset(torch.full((4, 2), value))
    return torch.utils.data.DataLoader(data, batch_size=2)


@pytest.mark.parametrize(
    "make",
    [
        constant,
        closing,
        defaulting,
        Scorer,
        lambda value: Scorer(value).measure,
        lambda value: functools.partial(max, value),
        lambda value: functools.partial(max, key=closing(value)),
        lambda value: eval(f"lambda model: model.{'ab'[value]}"),  # names
        lambda value: eval(f"lambda model: [{value} for _ in model]"),  # code within code
        lambda value: closing(torch.tensor([1.0, value])),
        lambda value: closing(np.array([1.0, value])),
        lambda value: closing({"a": [0, (value,)]}),
        lambda value: closing({"abc", value}),
        lambda value: closing(loader(value)),
        lambda value: closing(nn.LeakyReLU(value)),
        lambda value: network(value),
    ],
)
def test_other_code_or_other_data_is_told_apart(make: Callable[[int], Any]) -> None:
    assert fingerprint(make(0)) == fingerprint(make(0))
    assert fingerprint(make(0)) != fingerprint(make(1))


def test_what_holds_itself_has_an_end() -> None:
    one, other = Scorer(None), Scorer(None)
    one.value, other.value = one, Scorer(None)
    assert fingerprint(one) != fingerprint(other)
    first, second = [0], [0]
    assert fingerprint([first, second, first]) != fingerprint([first, second, second])


def test_an_object_that_prints_itself_counts_as_it_prints() -> None:
    class Named(Scorer):
        def __repr__(self) -> str:
            return "Named"

    assert fingerprint(Named(1)) == fingerprint(Named(2))


PROGRAM = """
from torch import nn
from fxcompress.fingerprint import fingerprint

class Scorer:
    def __init__(self, *values):
        self.values = values
    def __call__(self, model):
        return model in {"x", "y", "z"}

def closing(*values):
    return lambda model, given={"some": values}: (model, values)

parts = Scorer({"a", "b", 3}, object()), closing(Scorer, 1.5), nn.ReLU(), frozenset("hash"), closing
found = fingerprint(*parts)
"""


def test_another_process_finds_the_same() -> None:
    """Whose sets have other orders, and whose objects have other addresses."""
    here: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, here)
    there = f"here = {{'__name__': 'program'}}; exec({PROGRAM!r}, here); print(here['found'], end='')"
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", there], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == here["found"]


class Activated(nn.Module):
    """Another function has the same weights."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.activation = activation
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize("what", ["model", "score", "inputs"])
def test_a_sensitivity_journal_of_another_call_is_refused(what: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": torch.relu, "score": constant(1), "inputs": X[:2]}
    other: dict[str, Any] = {"model": torch.tanh, "score": constant(2), "inputs": X[:2, :, :6]}

    def measured(model: Any, score: Any, inputs: Any) -> Any:
        options: dict[str, Any] = {"sparsities": (0.5,), "bits": (), "checkpoint": tmp_path / "journal"}
        return fxcompress.sensitivity(Activated(model).eval(), Task(score=score), example_inputs=inputs, **options)

    assert measured(**given) == measured(**given)
    with pytest.raises(CheckpointError, match="journal of another search"):
        measured(**{**given, what: other[what]})


def test_a_searchs_journal_of_another_score_is_refused(tmp_path: Path) -> None:
    path, item = tmp_path / "run.pt", SimulatedAnnealingPruner(Budget(macs=0.5), cooling=0.1)

    def run(score: Any) -> None:
        fxcompress.compress(network(), [item], example_inputs=X[:2], task=Task(score=score), checkpoint=path)
        path.unlink()

    run(closing(1.0))
    run(closing(1.0))
    with pytest.raises(CheckpointError, match="journal of another search"):
        run(closing(2.0))
