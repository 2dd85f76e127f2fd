"""Bad input gives one clear error and leaves the caller's model bit-identical."""

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import FxCompressError, InputError, Pass, SelectionError, TraceError
from fxcompress.passes import (
    ChannelPruner,
    FoldBatchNorm,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    RandomFilterPruner,
    Speedup,
)
from fxcompress.testing import portrait

IMAGE = torch.randn(2, 3, 8, 8)
CHANNEL_PRUNERS = (L1FilterPruner, L2FilterPruner, FPGMPruner, RandomFilterPruner)


class Model(nn.Module):
    """In train mode, with a hook, gradients, and a plain attribute: everything that a careless tool would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Conv2d(8, 8, 3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        self.table = [1, 2, 3]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(self.layer1(self.stem(x)).mean((2, 3))))
        return out


def fresh() -> Model:
    model = Model().train()
    model(IMAGE).sum().backward()
    model.layer1.eval()
    model.layer1.register_forward_hook(lambda module, args, output: output)
    return model


class Untouched:
    """On leaving, the model must be what it was on entering."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = portrait(self.model)

    def __exit__(self, *_: object) -> None:
        assert portrait(self.model) == self.before


def fails(error: type[Exception], parts: list[str], model: Any, passes: Any, **options: Any) -> FxCompressError:
    """``compress`` raises exactly this, with every part in the message and no warning beside it."""
    guard = Untouched(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with warnings.catch_warnings(record=True) as caught, guard, pytest.raises(error) as raised:
        fxcompress.compress(model, passes, **options)
    assert [str(each.message) for each in caught] == []
    text = str(raised.value)
    for part in parts:
        assert part in text, text
    assert "\n" not in text
    assert type(raised.value) is error
    assert isinstance(raised.value, FxCompressError)
    return raised.value


# ---- example inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [*(pruner(0.5) for pruner in CHANNEL_PRUNERS), Speedup()], ids=lambda p: p.name)
def test_no_inputs_where_they_are_needed(item: Pass) -> None:
    fails(InputError, ["example_inputs is missing", item.name, "example_inputs=x"], fresh(), [item])
    fails(InputError, ["example_inputs is missing", item.name], fresh(), [LevelPruner(0.5), item])


def test_no_inputs_for_what_looks_at_channels() -> None:
    for call in (fxcompress.channel_groups, lambda model: fxcompress.channel_groups(model, None)):
        with Untouched(model := fresh()), pytest.raises(InputError, match="example_inputs is missing"):
            call(model)


def test_no_inputs_are_fine_for_weights_alone_and_for_our_own_modules() -> None:
    with Untouched(model := Model()):
        masked = fxcompress.compress(model, [LevelPruner(0.5)])
        again = fxcompress.compress(masked, [LevelPruner(0.7)])
    assert fxcompress.sparsity(again)["fc.weight"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "inputs, parts",
    [
        (torch.randn(2, 4, 8, 8), ["(2, 4, 8, 8)", "channels", "model(*inputs)"]),
        (torch.randn(2, 8, 8), ["(2, 8, 8)"]),
        (torch.randn(2, 3, 3, 3), ["(2, 3, 3, 3)"]),
        ((torch.randn(2, 3, 8, 8),) * 2, ["forward", "too many positional arguments"]),
        ({"y": torch.randn(2, 3, 8, 8)}, ["forward", "'x'"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.long), ["(2, 3, 8, 8)"]),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), ["(2, 3, 8, 8)"]),
        ("image.png", ["str", "tensor"]),
        (None, ["example_inputs is missing"]),
        ((), ["no tensor"]),
        (8, ["int", "tensor"]),
    ],
    ids=["channels", "rank", "too small", "too many", "name", "integers", "doubles", "str", "none", "empty", "int"],
)
def test_inputs_of_the_wrong_shape_or_kind(inputs: Any, parts: list[str]) -> None:
    fails(InputError, parts, fresh(), [L1FilterPruner(0.5)], example_inputs=inputs)


def test_a_model_on_another_device() -> None:
    model = Model().to("meta")
    found = ["stem.0.weight", "meta", "cpu", "Move them together"]
    fails(InputError, found, model, [L1FilterPruner(0.5)], example_inputs=IMAGE)
    fails(InputError, ["stem.0.weight", "cpu", "meta"], fresh(), [LevelPruner(0.5)], example_inputs=IMAGE.to("meta"))


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, float("nan"), float("inf"), True, "0.5", [0.5], 1 + 0.5j], ids=repr)
@pytest.mark.parametrize("pruner", [*CHANNEL_PRUNERS, LevelPruner])
def test_sparsity_outside_its_range(pruner: Callable[..., Pass], sparsity: Any) -> None:
    with pytest.raises(InputError, match=r"sparsity is .*expected a number in \[0, 1\)") as caught:
        pruner(sparsity)
    assert repr(sparsity) in str(caught.value)
    with pytest.raises(InputError, match=r"sparsity\['layer1'\] is .*\[0, 1\)"):
        pruner({"*": 0.5, "layer1": sparsity})


def test_no_sparsity() -> None:
    with pytest.raises(InputError, match="sparsity is missing: give the fraction of channels"):
        L1FilterPruner(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty mapping"):
        L1FilterPruner({})


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"include": "layer2"}, ["include='layer2'", "layer1"]),
        ({"exclude": ["stem.*", "layr1"]}, ["exclude='layr1'", "layer1"]),
        ({"sparsity": {"*": 0.5, "stem.1.conv": 0.1}}, ["sparsity='stem.1.conv'", "stem"]),
        ({"include": nn.Conv1d}, ["include=Conv1d", "Conv2d"]),
        ({"include": "Layer1"}, ["include='Layer1'", "layer1"]),
        ({"include": "layer1", "exclude": "layer1"}, ["no layer is left", "include more or exclude less"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("pruner", [L1FilterPruner, LevelPruner])
def test_a_pattern_that_matches_nothing(pruner: Callable[..., Pass], options: dict[str, Any], parts: list[str]) -> None:
    item = pruner(**{"sparsity": 0.5, **options})
    fails(SelectionError, parts, fresh(), [item], example_inputs=IMAGE)


@pytest.mark.parametrize("selector", [3, nn.ReLU(), int, [None]], ids=repr)
def test_a_selector_of_another_kind(selector: Any) -> None:
    with pytest.raises(SelectionError, match=r"include has .*expected a name pattern"):
        L1FilterPruner(0.5, include=selector)


# ---- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "item", [L1FilterPruner(0.5), LevelPruner(0.5), FoldBatchNorm(), Speedup()], ids=lambda p: p.name
)
def test_a_weight_that_is_not_a_number(item: Pass, value: float) -> None:
    model = fresh()
    with torch.no_grad():
        model.layer1.weight[3, 2, 0, 0] = value
        model.layer1.weight[3, 2, 0, 1] = value
    parts = ["layer1.weight", "2 values", "NaN or infinite", "expected finite"]
    fails(InputError, parts, model, [item], example_inputs=IMAGE)


@pytest.mark.parametrize("model", [None, Model, "resnet18", {"fc": nn.Linear(2, 2)}, lambda x: x], ids=type)
def test_a_model_that_is_no_module(model: Any) -> None:
    fails(
        InputError,
        ["model is a", type(model).__name__, "torch.nn.Module"],
        model,
        [L1FilterPruner(0.5)],
        example_inputs=IMAGE,
    )
    for call in (fxcompress.trace, fxcompress.channel_groups):
        with pytest.raises(InputError, match=r"torch\.nn\.Module"):
            call(model, IMAGE)


class Reading(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.sum() > 0:
            return y
        return -y


def test_a_forward_that_cannot_be_recorded() -> None:
    line = inspect.getsourcelines(Reading.forward)[1] + 2
    parts = [f"{Path(__file__).name}:{line}", "bool", "cannot be recorded", "submodule"]
    fails(TraceError, parts, Reading(), [L1FilterPruner(0.5)], example_inputs=IMAGE)


def test_a_forward_that_returns_what_no_graph_holds() -> None:
    class Odd(Model):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x), "by": object()}

    fails(TraceError, ["returns a object", "expected tensors"], Odd(), [L1FilterPruner(0.5)], example_inputs=IMAGE)


def test_a_forward_that_is_no_function_of_its_inputs() -> None:
    factors = itertools.count(1)

    class Noisy(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(factors)

    fails(
        TraceError,
        ["differs", "not a function of its inputs alone"],
        Noisy().eval(),
        [L1FilterPruner(0.5)],
        example_inputs=IMAGE,
    )


def test_a_forward_that_raises() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such thing as a free lunch")

    fails(InputError, ["free lunch", "(2, 3, 8, 8)"], Broken(), [L1FilterPruner(0.5)], example_inputs=IMAGE)


# ---- the list of passes -------------------------------------------------------------------------------------------


def edit(module: nn.Module) -> None:
    """A function that was not decorated."""


@pytest.mark.parametrize(
    "passes, parts",
    [
        ([], ["passes is empty", "L1FilterPruner(0.5)"]),
        ((), ["passes is empty"]),
        (None, ["passes is a NoneType", "list of passes"]),
        (L1FilterPruner(0.5), ["passes is a L1FilterPruner", "list of passes"]),
        (L1FilterPruner, ["expected a list of passes"]),
        ("L1FilterPruner", ["passes is a str"]),
        ([L1FilterPruner], ["passes[0]", "class L1FilterPruner", "instance"]),
        ([L1FilterPruner(0.5), None], ["passes[1]", "NoneType", "expected a Pass"]),
        ([L1FilterPruner(0.5), "speedup"], ["passes[1]", "'speedup'", "expected a Pass"]),
        ([edit], ["passes[0]", "edit", "graph_pass"]),
        ([[L1FilterPruner(0.5)]], ["passes[0]", "list"]),
        ({L1FilterPruner(0.5): 1}, ["passes is a dict"]),
    ],
)
def test_a_list_of_passes_that_is_none(passes: Any, parts: list[str]) -> None:
    fails(InputError, parts, fresh(), passes, example_inputs=IMAGE)


def test_the_last_pass_is_checked_before_the_first_runs() -> None:
    ran: list[str] = []

    class Recording(ChannelPruner):
        def score(self, layer: Any) -> Tensor:
            ran.append(layer.name)
            return torch.zeros(len(layer.weight))

    fails(InputError, ["passes[1]"], fresh(), [Recording(0.5), "speedup"], example_inputs=IMAGE)
    assert ran == []


# ---- given masks --------------------------------------------------------------------------------------------------


def masks() -> dict[str, Tensor]:
    keep = torch.arange(8) != 3
    return {
        "stem.0.weight": keep[:, None, None, None].expand(8, 3, 3, 3).clone(),
        "stem.0.bias": keep.clone(),
        "stem.1.weight": keep.clone(),
        "stem.1.bias": keep.clone(),
        "layer1.weight": keep[:, None, None].expand(8, 8, 3, 3).clone(),
    }


@pytest.mark.parametrize(
    "given, parts",
    [
        ({name: torch.zeros_like(mask) for name, mask in masks().items()}, ["stem.0", "every channel", "at least one"]),
        ({**masks(), "stem.0": masks()["stem.0.bias"]}, ["'stem.0'", "no parameter", "stem.0.weight"]),
        ({**masks(), "stem.1.running_mean": masks()["stem.0.bias"]}, ["'stem.1.running_mean'", "no parameter"]),
        ({"stem.0.weight": torch.ones(8, dtype=torch.bool)}, ["'stem.0.weight'", "(8,)", "(8, 3, 3, 3)"]),
        ({"stem.0.bias": torch.ones(8)}, ["'stem.0.bias'", "float32", "bool"]),
        ({"stem.0.bias": [True] * 8}, ["'stem.0.bias'", "list", "bool"]),
        ({"stem.0.bias": None}, ["'stem.0.bias'", "NoneType", "bool"]),
    ],
    ids=["empties a group", "module", "buffer", "shape", "dtype", "list", "none"],
)
def test_given_masks(given: dict[str, Any], parts: list[str]) -> None:
    fails(InputError, parts, fresh(), [Speedup(masks=given)], example_inputs=IMAGE)


@pytest.mark.parametrize("given", [[], "masks", torch.ones(8), 1], ids=repr)
def test_given_masks_that_are_no_mapping(given: Any) -> None:
    with pytest.raises(InputError, match="masks"):
        fxcompress.compress(fresh(), [Speedup(masks=given)], example_inputs=IMAGE)


# ---- a pass that fails --------------------------------------------------------------------------------------------


def test_an_error_inside_a_pass_names_the_pass_and_its_options() -> None:
    @fxcompress.graph_pass
    def broken(module: Any) -> None:
        raise KeyError("conv9")

    error = fails(fxcompress.PassError, ["broken failed", "KeyError", "conv9"], fresh(), [broken], example_inputs=IMAGE)
    assert isinstance(error.__cause__, KeyError)


def test_a_pass_that_claims_too_much_is_caught() -> None:
    @fxcompress.graph_pass(preserves=True)
    def doubles(module: Any) -> None:
        (output,) = module.graph.find_nodes(op="output")
        with module.graph.inserting_before(output):
            twice = module.graph.call_function(torch.mul, (output.args[0], 2))
        output.args = (twice,)

    error = fails(
        fxcompress.VerificationError, ["doubles", "differs", "verify=False"], fresh(), [doubles], example_inputs=IMAGE
    )
    assert isinstance(error, fxcompress.VerificationError)
    assert error.difference == pytest.approx(1.0)


def test_a_pass_that_breaks_the_graph_is_caught() -> None:
    @fxcompress.graph_pass
    def breaks(module: Any) -> None:
        node = next(node for node in module.graph.nodes if node.op == "call_module")
        node.target = "nowhere"

    fails(fxcompress.GraphError, ["nowhere", "does not exist"], fresh(), [breaks], example_inputs=IMAGE)


def test_errors_say_which_pass_was_running() -> None:
    error = fails(SelectionError, ["nothing"], fresh(), [L1FilterPruner(0.5, include="nothing")], example_inputs=IMAGE)
    assert any("L1FilterPruner" in note for note in error.__notes__)
