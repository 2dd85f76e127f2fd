"""Hypothesis profiles, threads and seeds: the same for every test."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_SLOW = (HealthCheck.too_slow,)  # drawing a network builds it
settings.register_profile("quick", max_examples=12, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", max_examples=20, deadline=None, suppress_health_check=_SLOW, derandomize=True)
settings.register_profile("long", max_examples=600, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "quick"))

torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
