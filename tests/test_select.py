"""Choosing layers by name, type and predicate, and a sparsity for each."""

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import InputError, SelectionError
from fxcompress.select import Selection, Sparsity

LAYERS: dict[str, nn.Module] = {
    "conv1": nn.Conv2d(3, 4, 3),
    "layer1.0.conv1": nn.Conv2d(4, 4, 3),
    "layer1.0.conv2": nn.Conv2d(4, 4, 1),
    "layer1.1.conv1": nn.Conv2d(4, 4, 3),
    "layer10.0.conv1": nn.ConvTranspose2d(4, 4, 3),
    "head.fc": nn.Linear(4, 2),
}
LAYER1 = {"layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"}
EVERY = set(LAYERS)


def is_pointwise(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (None, None, EVERY),
        ("conv1", None, {"conv1"}),
        ("layer1", None, LAYER1),  # a container; not layer10
        ("layer1.*", None, LAYER1),
        ("layer1*", None, LAYER1 | {"layer10.0.conv1"}),
        ("layer1.?", None, LAYER1),  # the pattern matches the containers layer1.0 and layer1.1
        ("layer1.[!0]", None, {"layer1.1.conv1"}),
        ("*.conv1", None, {"layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"}),
        ("*", None, EVERY),
        (nn.Linear, None, {"head.fc"}),
        (nn.Module, None, EVERY),
        (torch.nn.modules.conv._ConvNd, None, EVERY - {"head.fc"}),  # by isinstance: a base class
        (is_pointwise, None, {"layer1.0.conv2"}),
        (("conv1", nn.Linear, is_pointwise), None, {"conv1", "head.fc", "layer1.0.conv2"}),
        (["conv1", "conv1"], None, {"conv1"}),
        (None, "layer1", EVERY - LAYER1),
        (None, (nn.Conv2d, nn.Linear), {"layer10.0.conv1"}),
        (nn.Conv2d, ("layer1.0", "conv1"), {"layer1.1.conv1"}),
        ("layer1", lambda name, _: name.endswith("conv1"), {"layer1.0.conv2"}),
        (None, lambda *_: False, EVERY),  # a predicate that says no to every layer is no mistake
    ],
)
def test_chosen(include: Any, exclude: Any, expected: set[str]) -> None:
    assert Selection(include, exclude).chosen(LAYERS) == expected


NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", "0"]), min_size=1, max_size=4).map(".".join),
    min_size=1,
    max_size=8,
    unique=True,
)


def expression(pattern: str) -> re.Pattern[str]:
    """The rules for patterns, written a second time; what follows a dot is under a container."""
    return re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".") + r"(\..*)?", re.DOTALL)


@given(names=NAMES, pattern=st.text("ab0.*?", min_size=1, max_size=5))
def test_patterns_follow_their_rules(names: list[str], pattern: str) -> None:
    modules = {name: nn.Identity() for name in names}
    expected = {name for name in names if expression(pattern).fullmatch(name)}
    if expected:
        assert Selection(pattern).chosen(modules) == expected
    else:
        with pytest.raises(SelectionError, match=f"none of the {len(names)} layers"):
            Selection(pattern).chosen(modules)


@given(names=NAMES, data=st.data())
def test_include_and_exclude_part_the_layers(names: list[str], data: st.DataObject) -> None:
    modules = {name: nn.Identity() for name in names}
    some = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    taken = Selection(include=some).chosen(modules)
    if taken == set(names):
        with pytest.raises(SelectionError, match="no layer is left"):
            Selection(exclude=some).chosen(modules)
    else:
        assert Selection(exclude=some).chosen(modules) == set(names) - taken


@pytest.mark.parametrize("role", ["include", "exclude"])
def test_a_pattern_without_a_match_lists_near_names(role: str) -> None:
    with pytest.raises(SelectionError, match=rf"{role}='layer2\.\*' matches none of the 6 layers") as raised:
        Selection(**{role: ("conv1", "layer2.*")}).chosen(LAYERS)
    assert "near names: layer1" in str(raised.value)


def test_case_counts_and_the_near_name_says_so() -> None:
    with pytest.raises(SelectionError, match="near names: conv1"):
        Selection("Conv1").chosen(LAYERS)


def test_without_near_names_some_are_listed() -> None:
    with pytest.raises(SelectionError, match=r"some names: conv1, layer1, layer1\.0"):
        Selection("zzzzzz").chosen(LAYERS)


def test_a_type_without_a_match_lists_the_types_there() -> None:
    with pytest.raises(SelectionError, match=r"include=Conv1d matches none of the 6 layers; near types: Conv2d"):
        Selection(nn.Conv1d).chosen(LAYERS)


@pytest.mark.parametrize("include, exclude", [("conv1", nn.Conv2d), (lambda *_: False, None), (None, "*")])
def test_choosing_no_layer_raises(include: Any, exclude: Any) -> None:
    with pytest.raises(SelectionError, match="no layer is left to work on: of 6"):
        Selection(include, exclude).chosen(LAYERS)


def test_a_model_without_layers() -> None:
    assert Selection().chosen({}) == frozenset()
    assert Sparsity.parse(0.5).sparsities({}) == {}
    with pytest.raises(SelectionError, match="none of the 0 layers"):
        Selection("conv1").chosen({})


@pytest.mark.parametrize(
    "wrong, found",
    [
        (3, "3 of type int"),
        (None, "None of type NoneType"),
        (int, "int of type type"),
        (nn.ReLU(), r"ReLU\(\) of type ReLU"),  # callable, and certainly no predicate
    ],
)
@pytest.mark.parametrize("role", ["include", "exclude"])
def test_the_wrong_kind_of_selector(role: str, wrong: Any, found: str) -> None:
    with pytest.raises(SelectionError, match=f"{role} has {found}; expected a name pattern"):
        Selection(**{role: ("conv1", wrong)})


def test_an_empty_include_raises_at_once() -> None:
    with pytest.raises(SelectionError, match="include is empty"):
        Selection(include=())


def test_a_selection_is_an_immutable_value() -> None:
    selectors: list[str | type[nn.Module]] = ["conv1", nn.Linear]
    selection = Selection(include=selectors)
    selectors.append("layer1")
    assert selection == Selection(include=("conv1", nn.Linear))
    assert hash(selection) == hash(Selection(include=("conv1", nn.Linear)))
    assert selection.chosen(LAYERS) == {"conv1", "head.fc"}
    assert dataclasses.replace(selection, exclude="conv1").chosen(LAYERS) == {"head.fc"}
    anything: Any = selection
    with pytest.raises(dataclasses.FrozenInstanceError):
        anything.include = None


def test_one_sparsity_for_every_layer() -> None:
    assert Sparsity.parse(0.3).sparsities(LAYERS) == dict.fromkeys(LAYERS, 0.3)


def test_the_last_match_wins_and_the_rest_is_absent() -> None:
    sparsity = Sparsity.parse({"layer1": 0.5, "*.conv2": 0.0, "layer1.1*": 0.7, "conv1": 0.25})
    assert sparsity.sparsities(LAYERS) == {
        "conv1": 0.25,
        "layer1.0.conv1": 0.5,
        "layer1.0.conv2": 0.0,
        "layer1.1.conv1": 0.7,
    }
    assert list(sparsity.sparsities(LAYERS)) == [name for name in LAYERS if name in LAYER1 | {"conv1"}]


def test_order_decides_not_precision() -> None:
    assert Sparsity.parse({"layer1.0.conv1": 0.9, "*": 0.1}).sparsities(LAYERS) == dict.fromkeys(LAYERS, 0.1)


def test_a_sparsity_pattern_without_a_match_raises() -> None:
    with pytest.raises(SelectionError, match=r"sparsity='layer2' matches none of the 6 layers; near names: layer1"):
        Sparsity.parse({"conv1": 0.5, "layer2": 0.5}).sparsities(LAYERS)


@given(value=st.floats(0, 1, exclude_max=True))
def test_every_sparsity_in_range_is_kept_as_it_is(value: float) -> None:
    assert Sparsity.parse({"conv1": value}).sparsities(LAYERS) == {"conv1": value}


@pytest.mark.parametrize("make", [np.float32, np.float64, Fraction, float])
def test_numbers_of_other_libraries_become_floats(make: Callable[[float], Any]) -> None:
    (value,) = Sparsity.parse(make(0.5)).sparsities({"conv1": nn.Identity()}).values()
    assert type(value) is float
    assert value == 0.5


def test_the_integer_zero_is_a_sparsity() -> None:
    assert Sparsity.parse(0) == Sparsity.parse(0.0)


WRONG_SPARSITIES = [
    1,
    1.0,
    -0.1,
    float("nan"),
    float("inf"),
    True,
    False,
    "0.5",
    None,
    0.5j,
    torch.tensor(0.5),
]


@pytest.mark.parametrize("wrong", WRONG_SPARSITIES, ids=repr)
def test_a_value_outside_the_range_or_no_number(wrong: Any) -> None:
    expected = rf"is {re.escape(repr(wrong))}; expected a number in \[0, 1\)"
    with pytest.raises(InputError, match=f"sparsity {expected}"):
        Sparsity.parse(wrong)
    with pytest.raises(InputError, match=rf"sparsity\['conv1'\] {expected}"):
        Sparsity.parse({"layer1": 0.5, "conv1": wrong})


def test_a_mapping_by_type_is_no_sparsity() -> None:
    wrong: Any = {nn.Conv2d: 0.5}
    with pytest.raises(SelectionError, match=r"sparsity has the key Conv2d.*include="):
        Sparsity.parse(wrong)


def test_an_empty_mapping_is_no_sparsity() -> None:
    with pytest.raises(InputError, match="empty mapping"):
        Sparsity.parse({})
