"""The public names: all there, nothing else, and importable one by one."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fxcompress
import fxcompress.passes
import fxcompress.testing
from fxcompress import passes

ROOT = Path(fxcompress.__file__).parents[1]

CORE = {
    # what users call
    "compress", "trace", "channel_groups", "count", "latency", "report", "masks", "sparsity", "sensitivity",
    "export_onnx",
    # what they get
    "TracedModule", "ChannelGroups", "Group", "GroupedLayers", "LayerSet", "LayerSets", "RowSet", "Cost", "Symbolic",
    "Latency", "Report", "Step", "Epoch", "Sparsities",
    "Sensitivity", "Curve", "SearchHistory", "Trial", "Proposal",
    # what a model is for
    "Task", "Budget", "Distill", "LightningTask", "TransformersTask",
    # what authors of passes need
    "Pass", "PassResult", "Context", "Rewriter", "graph_pass", "Kept", "Training",
    # what quantization puts into a graph
    "FakeQuantize", "QuantSpec",
    # errors
    "FxCompressError", "InputError", "SelectionError", "TraceError", "GraphError", "PassError", "VerificationError",
    "TrainingError", "CheckpointError", "SearchError",
}  # fmt: skip
PASSES = {
    "L1FilterPruner", "L2FilterPruner", "FPGMPruner", "RandomFilterPruner", "LevelPruner", "FoldBatchNorm", "FineTune",
    "Speedup", "ActivationAPoZRankFilterPruner", "ActivationMeanRankFilterPruner", "TaylorFOPruner",
    "RecalibrateBatchNorm", "CompensateBias",
    "AGPPruner", "LinearPruner", "LotteryTicketPruner", "ADMMPruner", "SlimPruner", "MovementPruner",
    "NaiveQuantizer", "QATQuantizer", "DoReFaQuantizer", "BNNQuantizer", "LSQQuantizer", "PTQQuantizer", "Lower",
    "SimulatedAnnealingPruner", "NetAdaptPruner", "AutoCompressPruner", "SensitivityPruner", "TunedPruner",
    "TunedQuantizer",
    # what authors of criteria, schedules and quantizers need
    "ChannelPruner", "Layer", "ScheduledPruner", "Quantizer",
    # what quantizers are given, and a loop of one's own calls
    "Observer", "MinMax", "MovingAverage", "Percentile", "Entropy", "MSE", "clip_weights",
}  # fmt: skip


def public(module: ModuleType) -> set[str]:
    return {
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }


@pytest.mark.parametrize("module, names", [(fxcompress, CORE), (passes, PASSES)], ids=["fxcompress", "passes"])
def test_the_names_are_these_and_no_others(module: ModuleType, names: set[str]) -> None:
    assert public(module) == names


@pytest.mark.parametrize("module, names", [(fxcompress, CORE), (passes, PASSES)], ids=["fxcompress", "passes"])
def test_every_name_is_ours_and_documented(module: ModuleType, names: set[str]) -> None:
    for name in names:
        value = getattr(module, name)
        assert value.__module__.startswith("fxcompress"), name
        assert value.__name__ == name
        text = inspect.getdoc(value)
        assert text, name
        assert not text.startswith(f"{name}("), f"{name} has only the docstring that dataclass made"


def test_the_testing_module() -> None:
    assert {"check_laws", "networks", "network", "inputs", "motifs", "Spec", "Op"} <= public(fxcompress.testing)


def test_every_pass_is_a_frozen_dataclass_that_prints_its_options() -> None:
    others = {"Layer", "Observer", "MinMax", "MovingAverage", "Percentile", "Entropy", "MSE", "clip_weights"}
    for name in PASSES - others:
        kind = getattr(passes, name)
        assert issubclass(kind, fxcompress.Pass), name
        assert dataclasses.is_dataclass(kind)
        assert vars(kind)["__dataclass_params__"].frozen, name
    pruner = passes.L1FilterPruner(0.5, include="conv*", round_to=8)
    assert pruner == passes.L1FilterPruner(0.5, include="conv*", round_to=8) != passes.L1FilterPruner(0.5)
    for part in ("L1FilterPruner", "sparsity=0.5", "'conv*'", "round_to=8"):
        assert part in repr(pruner)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruner.sparsity = 0.6  # type: ignore[misc]


def test_every_error_is_one_of_the_family() -> None:
    for name in CORE:
        if name.endswith("Error"):
            assert issubclass(getattr(fxcompress, name), fxcompress.FxCompressError)
    assert issubclass(fxcompress.InputError, ValueError)


def test_signatures() -> None:
    compress = inspect.signature(fxcompress.compress).parameters
    assert list(compress)[:2] == ["model", "passes"]
    options = {name for name, parameter in compress.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert {"example_inputs", "verify", "seed", "progress"} <= options
    assert set(compress) == {"model", "passes"} | options
    for call in (fxcompress.trace, fxcompress.channel_groups, fxcompress.count, fxcompress.latency):
        assert list(inspect.signature(call).parameters)[:2] == ["model", "example_inputs"]


def test_the_compiler_imports_no_algorithm_and_no_extra() -> None:
    unwanted = (
        "fxcompress.passes",
        "hypothesis",
        "pytest",
        "torchvision",
        "matplotlib",
        "optuna",
        "cloudpickle",
        "distributed",
        "onnx",
        "transformers",
        "lightning",
        "accelerate",
    )
    code = f"import sys, fxcompress; sys.exit(sorted(set({unwanted!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_first_page() -> None:
    """The line of the design, as it stands."""
    from fxcompress.passes import L1FilterPruner, Speedup

    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 8, 8)
    small = fxcompress.compress(model, passes=[L1FilterPruner(0.5), Speedup()], example_inputs=(x,))
    assert isinstance(small, torch.fx.GraphModule)
    assert small.get_parameter("0.weight").shape == (4, 3, 3, 3)
    assert [step.name for step in small.meta["history"]] == ["L1FilterPruner", "Speedup"]
