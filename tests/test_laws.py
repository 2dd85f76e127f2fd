"""Every pass obeys the laws. A new pass is tested by being listed in `PASSES`."""

import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress.passes
from fxcompress import Pass, PassError, compress, graph_pass
from fxcompress.lower import float_graph
from fxcompress.lower.features import has_bfloat16, has_int8_instructions
from fxcompress.passes import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ADMMPruner,
    AGPPruner,
    BNNQuantizer,
    CompensateBias,
    DoReFaQuantizer,
    FineTune,
    FoldBatchNorm,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    Lower,
    LSQQuantizer,
    MovementPruner,
    NaiveQuantizer,
    PTQQuantizer,
    QATQuantizer,
    RandomFilterPruner,
    RecalibrateBatchNorm,
    SlimPruner,
    Speedup,
    TaylorFOPruner,
)
from fxcompress.quantization.fake_quantize import FakeQuantize
from fxcompress.testing import LAWS, Spec, check_laws, inputs, network, networks


@graph_pass(preserves=True)
def drop_identities(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


PASSES: tuple[Pass, ...] = (
    LevelPruner(0.5),
    LevelPruner(0.4, scope="global", block=(2, 3)),
    LevelPruner(pattern="2:4"),
    L1FilterPruner(0.5),
    L1FilterPruner(0.3, scope="global", norm_by="layer"),
    L2FilterPruner(0.5, round_to=2),
    L2FilterPruner(0.3, scope="global", norm_by="size"),
    FPGMPruner(0.4),
    FPGMPruner(0.4, scope="global"),
    RandomFilterPruner(0.6, seed=3),
    RandomFilterPruner(0.4, seed=4, scope="global"),
    ActivationAPoZRankFilterPruner(0.5),
    ActivationMeanRankFilterPruner(0.4, scope="global", norm_by="layer"),
    TaylorFOPruner(0.5),
    TaylorFOPruner(0.4, per="element", scope="global", max_sparsity_per_group=0.6),
    FoldBatchNorm(),
    RecalibrateBatchNorm(),
    CompensateBias(),
    FineTune(1),
    AGPPruner(L1FilterPruner(0.5), iterations=2),
    LinearPruner(LevelPruner(0.5, scope="global"), initial=0.2, iterations=2),
    LotteryTicketPruner(L2FilterPruner(0.5), rounds=2, reset_to_step=1),
    ADMMPruner(0.5, iterations=2),
    ADMMPruner(0.5, iterations=2, granularity="channel"),
    SlimPruner(0.3),
    MovementPruner(0.5),
    MovementPruner(0.4, granularity="channel", scope="global"),
    NaiveQuantizer(),
    QATQuantizer(),
    QATQuantizer(4, {"*": 4}, per_channel=False),
    LSQQuantizer(4, 4),
    DoReFaQuantizer(),
    BNNQuantizer(),
    PTQQuantizer(equalize=True, bias_correction=True),
    Speedup(),
    Speedup(approximate=True),
    Lower(dtype="float32"),
    *([Lower(dtype="bfloat16")] if has_bfloat16() else []),
    *([Lower()] if has_int8_instructions() else []),
    drop_identities,
)
every_pass = pytest.mark.parametrize("item", PASSES, ids=[f"{i}-{item.name}" for i, item in enumerate(PASSES)])


class Convolutions(nn.Module):
    """A residual block with a depthwise convolution and squeeze-excite, a shuffle, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Identity())
        self.last = nn.Linear(32, 5)
        self.auxiliary = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = x + self.project(y)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        x = nn.functional.dropout(x, 0.1, self.training)
        return self.last(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Tokens(nn.Module):
    """Token and position embeddings before two transformer layers; called with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(1, 7, 12))
        layer = nn.TransformerEncoderLayer(12, 3, 16, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.layers(self.embed(tokens) + self.position[:, : tokens.shape[1]])
        return self.head(x[:, 0]) * weight, {"pooled": x.mean(1)}


def randomised(model: nn.Module) -> nn.Module:
    """Norms and biases away from their defaults."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "convolutions": (Convolutions, torch.linspace(-1, 1, 2 * 3 * 6 * 6).sin().reshape(2, 3, 6, 6)),
    "tokens": (Tokens, {"tokens": torch.arange(14).reshape(2, 7) % 11, "weight": torch.linspace(1, 2, 2)[:, None]}),
}


@pytest.fixture(autouse=True)
def _nothing_to_prune() -> Iterator[None]:
    """A network whose channels are all its outputs' is a warning for its user, and none here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has nothing to (prune|quantize)")
        warnings.filterwarnings("ignore", message=".*; its channels stay")
        yield


def check_generated(item: Pass, spec: Spec, training: bool, masked: bool) -> None:
    model: nn.Module = network(spec).train(training)
    assume(not item.needs or any(True for _ in model.parameters()))  # what has no parameters cannot be trained
    if masked:
        model = compress(model, [RandomFilterPruner(0.5)], example_inputs=inputs(spec), verify=False)
    model = prepared(item, model, inputs(spec))
    assume(model is not None)  # without layers there are no fake-quant nodes
    check_laws(item, model, inputs(spec))


def prepared(item: Pass, model: nn.Module, example: Any) -> Any:
    """The model with what a pass asks for, fake-quant nodes for lowering to int8; None if it can have none."""
    if not (isinstance(item, Lower) and item.integer):
        return model
    made = compress(model, [QATQuantizer()], example_inputs=example, verify=False)
    return made if any(isinstance(layer, FakeQuantize) for layer in made.modules()) else None


@pytest.fixture(autouse=True)
def _layers_of_every_size_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated layers are so small that the kernels, which the laws are about, would not pay."""
    monkeypatch.setattr(float_graph, "SMALLEST", 0)


@every_pass
@settings(max_examples=max(4, settings().max_examples // 6))
@given(spec=networks(), training=st.booleans(), masked=st.booleans())
def test_laws_on_generated_networks(item: Pass, spec: Spec, training: bool, masked: bool) -> None:
    check_generated(item, spec, training, masked)


@pytest.mark.long
@every_pass
@settings(max_examples=60)
@given(spec=networks(), training=st.booleans(), masked=st.booleans())
def test_laws_in_the_long_run(item: Pass, spec: Spec, training: bool, masked: bool) -> None:
    check_generated(item, spec, training, masked)


@every_pass
@pytest.mark.parametrize(
    "name, masked, training",
    [
        ("convolutions", False, False),
        ("convolutions", True, True),
        ("tokens", False, True),
    ],
)
def test_laws_on_models(item: Pass, name: str, masked: bool, training: bool) -> None:
    kind, example = MODELS[name]
    model = randomised(kind()).train(training)
    if masked:
        model = compress(model, [L1FilterPruner(0.5)], example_inputs=example, verify=False)
    check_laws(item, prepared(item, model, example), example)


def test_every_pass_is_listed() -> None:
    searches = {
        fxcompress.passes.AutoCompressPruner,
        fxcompress.passes.NetAdaptPruner,
        fxcompress.passes.SensitivityPruner,
        fxcompress.passes.SimulatedAnnealingPruner,
        fxcompress.passes.TunedPruner,
        fxcompress.passes.TunedQuantizer,
    }  # a search on every drawn network takes too long; test_searching_pruners.py has what they promise
    unlisted = {fxcompress.passes.Quantizer, *searches}  # a Quantizer is for authors to subclass
    exported = {
        value
        for value in vars(fxcompress.passes).values()
        if isinstance(value, type) and issubclass(value, Pass) and not inspect.isabstract(value)
    }
    assert len(exported) >= 7
    assert exported - unlisted <= {type(item) for item in PASSES}


def test_the_models_give_every_pass_something_to_do() -> None:
    for item in PASSES:
        model = Convolutions().eval()
        if isinstance(item, (Speedup, CompensateBias)):
            model = compress(model, [L1FilterPruner(0.5)], example_inputs=MODELS["convolutions"][1])
        model = prepared(item, model, MODELS["convolutions"][1])
        result = check_laws(item, model, MODELS["convolutions"][1], laws=["modified"])
        assert result.meta["history"][-1].modified, item


def test_a_pass_that_fails_leaves_the_model_alone() -> None:
    @graph_pass
    def fails(module: fx.GraphModule) -> None:
        with torch.no_grad():
            next(module.parameters()).zero_()
        raise RuntimeError("halfway")

    with pytest.raises(PassError, match="halfway"):
        check_laws(fails, Convolutions(), MODELS["convolutions"][1])


def test_hypothesis_is_needed_by_the_strategies_only() -> None:
    code = "import sys, fxcompress.testing; sys.exit('hypothesis' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert run.returncode == 0


def test_a_law_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="expected names from untouched, verifies"):
        check_laws(FoldBatchNorm(), Convolutions(), MODELS["convolutions"][1], laws=["unmodified"])
    assert set(LAWS) >= {"untouched", "verifies", "modified", "idempotent", "preserves", "keys", "copies", "modes"}
