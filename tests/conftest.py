"""Hypothesis profiles, threads and seeds: the same for every test."""

import functools
import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils.benchmark import Timer

_SLOW = (HealthCheck.too_slow,)  # drawing a network builds it
settings.register_profile("quick", max_examples=12, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", max_examples=20, deadline=None, suppress_health_check=_SLOW, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "quick"))

torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Clock:
    """Time that passes when somebody sleeps, and at no other time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What latency is measured with, so that how busy the machine is decides no test."""
    made = Clock()
    module = importlib.import_module("fxcompress.latency")  # the package has a function of that name
    monkeypatch.setattr(module, "Timer", functools.partial(Timer, timer=made))
    return made
