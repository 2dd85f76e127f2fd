"""Lower on models whose masks are still in the graph, and at the end of prune, quantize, train and remove."""

import copy

import pytest
import torch
from model_zoo import calibrate, randomize
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.lower import float_graph
from fxcompress.lower.agreement import agreement
from fxcompress.lower.features import has_bfloat16, has_int8_instructions
from fxcompress.lower.prepacked import Prepacked
from fxcompress.passes import DoReFaQuantizer, L1FilterPruner, LevelPruner, Lower, PTQQuantizer, QATQuantizer, Speedup
from fxcompress.verify import difference

integer = pytest.mark.skipif(not has_int8_instructions(), reason="no 8-bit multiply-accumulate instructions")
PRUNERS = [L1FilterPruner(0.5), LevelPruner(0.5)]
masked_by = pytest.mark.parametrize("pruner", PRUNERS, ids=["channels", "elements"])


class Network(nn.Module):
    """BatchNorm behind layers and in front, a norm over live channels, a layer that is called twice, BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18)
        self.first, self.block = nn.BatchNorm2d(18), nn.Conv2d(18, 18, 3, padding=1)
        self.twice = nn.Conv2d(18, 18, 1)
        self.live = nn.LayerNorm(18)
        self.hidden, self.behind = nn.Linear(18, 22), nn.BatchNorm1d(22)
        self.last = nn.Linear(22, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.block(self.first(x).relu())
        x = self.twice(self.twice(x).relu()).mean((2, 3))
        hidden: Tensor = self.behind(self.hidden(self.live(x)))
        return F.linear(self.last(hidden.relu()), self.last.weight[:, :7])


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(5, 3, 9, 15, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _layers_of_every_size_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_graph, "SMALLEST", 0)


@pytest.fixture
def network() -> nn.Module:
    model = Network().eval()
    randomize(model, 1)
    calibrate(model, X)
    return model


def lower(model: nn.Module, dtype: str) -> fxcompress.TracedModule:
    return fxcompress.compress(model, [Lower(dtype=dtype)], example_inputs=X, progress=False)


def assert_no_mask_is_left(lowered: fxcompress.TracedModule) -> None:
    assert not fxcompress.masks(lowered)
    assert not [key for key in lowered.state_dict() if key.startswith("_masks.")]
    assert not [node for node in lowered.graph.nodes if "mask" in getattr(node.target, "__name__", str(node.target))]


@masked_by
@pytest.mark.parametrize("dtype", ["float32", *(["bfloat16"] if has_bfloat16() else [])])
def test_masks_go_into_float_weights(pruner: fxcompress.Pass, dtype: str, network: nn.Module) -> None:
    masked = fxcompress.compress(network, [pruner], example_inputs=X)
    with torch.no_grad():
        assert difference(network(X), masked(X)) > 0.1
    lowered = lower(masked, dtype)
    assert_no_mask_is_left(lowered)
    assert {"stem", "block", "twice", "hidden"} <= {n for n, m in lowered.named_modules() if isinstance(m, Prepacked)}
    assert not any("norm" in str(node.target) for node in lowered.graph.nodes if node.op == "call_module")
    for x in (X, OTHER):
        with torch.no_grad():
            gap = difference(masked(x), lowered(x))
        assert gap <= (1e-5 if dtype == "float32" else 0.05)


@integer
@masked_by
@pytest.mark.parametrize("quantizer", [QATQuantizer(), PTQQuantizer(), DoReFaQuantizer(4, 4)], ids=lambda q: q.name)
def test_masks_go_into_integers(pruner: fxcompress.Pass, quantizer: fxcompress.Pass, network: nn.Module) -> None:
    simulated = fxcompress.compress(network, [pruner, quantizer], example_inputs=X)
    lowered = lower(simulated, "int8")
    assert_no_mask_is_left(lowered)
    for x in (X, OTHER):
        found = agreement(simulated, lowered, Inputs.parse(x))
        assert found
        assert max(item.steps or 0 for item in found) <= 1
        assert max(item.difference for item in found) < 1e-5


def test_a_batch_norm_behind_a_linear_layer_is_folded(network: nn.Module) -> None:
    lowered = lower(network, "float32")
    assert not any(node.target == "behind" for node in lowered.graph.nodes)
    assert not [key for key in lowered.state_dict() if key.startswith("behind.")]


class TiedAndShared(nn.Module):
    """A weight that embeds and classifies, and one that a layer and a function read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(13, 12), nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embed(tokens))
        x = F.linear(x.relu(), self.mix.weight.t())
        return F.linear(x, self.embed.weight)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=integer)])
def test_weights_that_others_read_stay_what_they_are(dtype: str) -> None:
    model, tokens = TiedAndShared().eval(), torch.arange(10).reshape(2, 5)
    randomize(model, 2)
    passes = [Lower(dtype=dtype)] if dtype == "float32" else [PTQQuantizer(), Lower()]
    lowered = fxcompress.compress(model, passes, example_inputs=tokens, progress=False)
    bound = 1e-5 if dtype == "float32" else 0.05
    with torch.no_grad():
        assert difference(model(tokens), lowered(tokens)) <= bound
        assert difference(model(tokens[:1]), copy.deepcopy(lowered)(tokens[:1])) <= bound


@integer
@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_pruned_trained_quantized_removed_and_lowered_in_one_call(name: str) -> None:
    import torchvision

    options = {"resnet18": {}, "vit_b_16": {"image_size": 64}}[name]
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    randomize(model, 0)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 3, 64, 64, generator=generator), torch.randint(0, 10, (8,), generator=generator))
        for _ in range(2)
    ]
    calibrate(model, batches[0][0])
    task = fxcompress.Task(
        batches=batches,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )
    passes = [L1FilterPruner(0.5), QATQuantizer(epochs=1), Speedup()]
    x = batches[0][0][:2]
    lowered = fxcompress.compress(model, [*passes, Lower()], example_inputs=x, task=task, progress=False)  # verified
    assert [step.name for step in lowered.meta["history"]] == ["L1FilterPruner", "QATQuantizer", "Speedup", "Lower"]
    simulated = fxcompress.compress(model, passes, example_inputs=x, task=task, progress=False).eval()
    found = agreement(simulated, lowered, Inputs.parse(batches[1][0]))
    assert max(item.steps or 0 for item in found) <= 1
    assert sum(t.numel() for t in lowered.state_dict().values()) < 0.6 * sum(p.numel() for p in model.parameters())
