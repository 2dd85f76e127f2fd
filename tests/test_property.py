"""Generated networks: what is masked and what is removed compute the same, whatever rewrites that takes."""

import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from removal import (
    NETWORKS,
    PIPELINES,
    PLAIN,
    PRUNERS,
    check_fine_tuned,
    check_pipeline,
    check_removal,
    check_zeroed,
    framed,
    rewrites,
)

from fxcompress import Pass
from fxcompress.passes import RandomFilterPruner
from fxcompress.testing import Spec, networks

#: Each of these must be needed in at least a tenth of the draws.
REWRITES = (
    "addition",
    "attention",
    "batch norm",
    "concatenation",
    "convolution in",
    "convolution out",
    "depthwise convolution",
    "gather",
    "grouped convolution",
    "layer or group norm",
    "linear in",
    "linear out",
    "live-only statistics",
    "matrix product",
    "parameter outside layers",
    "recurrent layer",
    "split or slice",
    "transposed convolution",
    "view or reshape",
    "zero padding",
)


@pytest.fixture(autouse=True)
def _some_channels_stay() -> Iterator[None]:
    """A warning for users, and none here: a network whose channels are all its outputs', an order with no gather."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has nothing to prune")
        warnings.filterwarnings("ignore", message=".*; its channels stay")
        yield


@given(spec=NETWORKS, pruner=PRUNERS, training=st.booleans())
def test_masked_and_removed_are_equal(spec: Spec, pruner: RandomFilterPruner, training: bool) -> None:
    check_removal(spec, pruner, training)


@given(spec=framed(PLAIN, max_ops=4), pruner=PRUNERS)
def test_masked_is_zeroed_by_hand(spec: Spec, pruner: RandomFilterPruner) -> None:
    check_zeroed(spec, pruner)


@settings(max_examples=max(8, settings().max_examples // 4))
@given(spec=NETWORKS, passes=PIPELINES)
def test_any_pipeline_then_removal(spec: Spec, passes: list[Pass]) -> None:
    check_pipeline(spec, passes)


@settings(max_examples=max(8, settings().max_examples // 4))
@given(spec=NETWORKS, pruner=PRUNERS)
def test_what_was_fine_tuned_is_what_ships(spec: Spec, pruner: RandomFilterPruner) -> None:
    check_fine_tuned(spec, pruner)


@pytest.mark.long
@settings(max_examples=max(1000, settings().max_examples))
@given(spec=st.one_of(NETWORKS, networks()), pruner=PRUNERS, training=st.booleans())
def test_masked_and_removed_are_equal_in_the_long_run(spec: Spec, pruner: RandomFilterPruner, training: bool) -> None:
    check_removal(spec, pruner, training)


@pytest.mark.long
@settings(max_examples=max(300, settings().max_examples))
@given(spec=framed(PLAIN, max_ops=6), pruner=PRUNERS)
def test_masked_is_zeroed_by_hand_in_the_long_run(spec: Spec, pruner: RandomFilterPruner) -> None:
    check_zeroed(spec, pruner)


@pytest.mark.long
@settings(max_examples=150)
@given(spec=NETWORKS, passes=PIPELINES, pruner=PRUNERS)
def test_pipelines_and_fine_tuning_in_the_long_run(spec: Spec, passes: list[Pass], pruner: RandomFilterPruner) -> None:
    check_pipeline(spec, passes)
    check_fine_tuned(spec, pruner)


def test_every_rewrite_is_drawn() -> None:
    seen: Counter[str] = Counter()
    draws = 0

    def draw(spec: Spec, pruner: RandomFilterPruner) -> None:
        nonlocal draws
        draws += 1
        seen.update(rewrites(spec, pruner).keys())

    quietly = settings(
        max_examples=60,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    for number in range(5):  # within a run, draws resemble one another
        seed(number)(quietly(given(spec=NETWORKS, pruner=PRUNERS)(draw)))()
    assert draws >= 270
    rare = {kind: f"{seen[kind] / draws:.1%}" for kind in REWRITES if seen[kind] < draws / 10}
    assert not rare
