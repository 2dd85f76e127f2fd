"""Trials on a real Dask cluster of two local workers, which are processes of their own."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from search_cases import ANNEALING, TASK, X, network, slow

import fxcompress
from fxcompress import Sensitivity
from fxcompress.passes import Speedup

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as made:
        yield made


def measured(executor: Any = None) -> tuple[Sensitivity, float]:
    start = time.perf_counter()
    found = fxcompress.sensitivity(network(), replace(TASK, score=slow), example_inputs=X[:2], executor=executor)
    return found, time.perf_counter() - start


def test_two_workers_halve_the_time_of_a_sensitivity_run(client: Any) -> None:
    """Within 40 %, and the numbers are the same. (A trial waits far longer than it computes: cores may be busy.)"""
    with client.get_executor() as executor:
        measured(executor)  # the workers import torch
        together, shared = measured(executor)
    alone, single = measured()
    print(f"alone {single:.2f} s, two workers {shared:.2f} s, ratio {shared / single:.3f}")
    assert together == alone
    assert shared <= 0.5 * 1.4 * single


def test_a_search_on_a_cluster_ends_as_it_does_alone(client: Any) -> None:
    def run(executor: Any = None) -> Any:
        small = fxcompress.compress(
            network(), [ANNEALING, Speedup()], example_inputs=X[:2], task=TASK, executor=executor
        )
        history = small.meta["history"][0].searches[0]
        return [(trial.proposal, trial.score) for trial in history.trials], history.best

    with client.get_executor() as executor:
        assert run(executor) == run()
