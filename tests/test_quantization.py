"""Fake-quant nodes in the graph: where they are, with masks, settled, trained; bad input."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import X, normed, quantizers, small_network, values
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError, Pass, PassError, QuantSpec, SelectionError, Task, compress
from fxcompress.passes import (
    BNNQuantizer,
    DoReFaQuantizer,
    L1FilterPruner,
    LevelPruner,
    Lower,
    LSQQuantizer,
    NaiveQuantizer,
    PTQQuantizer,
    QATQuantizer,
    Quantizer,
    Speedup,
)
from fxcompress.quantization.fake_quantize import ROLE, AffineFakeQuantize, LearnedFakeQuantize, fake_quant_nodes
from fxcompress.quantization.observers import MinMax
from fxcompress.quantization.settle import settle
from fxcompress.quantization.spec import activation_spec

EVERY: list[Pass] = [
    NaiveQuantizer(),
    QATQuantizer(),
    QATQuantizer(4, 4, per_channel=False),
    LSQQuantizer(4, 4),
    LSQQuantizer(4, 4, learn_offset=True, per_channel=True),
    DoReFaQuantizer(gradient_bits=4),
    DoReFaQuantizer(1, 1),
    BNNQuantizer(),
    PTQQuantizer(equalize=True, bias_correction=True, adaround=True, iterations=10),
]
every = pytest.mark.parametrize("item", EVERY, ids=lambda item: f"{item.name}-{EVERY.index(item)}")


@every
@pytest.mark.parametrize("pruner", [None, L1FilterPruner(0.5), LevelPruner(0.5)], ids=["dense", "channels", "elements"])
def test_masked_and_removed_are_equal(item: Pass, pruner: Pass | None) -> None:
    network = small_network()
    passes = [item] if pruner is None else [pruner, item]
    made = compress(network, passes, example_inputs=X)
    for name, mask in fxcompress.masks(made).items():
        node = next((n for n in made.graph.nodes if n.target == f"_quant.{name}"), None)
        if node is not None and isinstance(pruner, LevelPruner):
            reads = made.get_submodule(f"_quant.{name}")(made.get_parameter(name) * mask)
            assert made.get_submodule(f"_quant.{name}").keeps_zero is False or bool((reads[~mask] == 0).all())
    small = compress(made, [Speedup()], example_inputs=X)  # verified in float64
    assert small.meta["history"][-1].difference is not None
    if isinstance(pruner, L1FilterPruner):
        assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("item", [DoReFaQuantizer(4, 4), DoReFaQuantizer(1, 1), BNNQuantizer()], ids=lambda i: i.name)
@pytest.mark.parametrize("given", [False, True], ids=["laid", "given"])
def test_single_weights_are_removed_where_zero_is_none_of_the_values(item: Pass, given: bool) -> None:
    network = small_network()
    with torch.no_grad():
        network.get_parameter("grouped.weight")[0, 0] = 0.0  # kept, and sign(0) is +1
    mask = values(10, 5, 1, 1) > 0
    mask[0, 0] = True
    made = compress(network, [item], example_inputs=X)
    small = compress(made, [Speedup(masks={"grouped.weight": mask})], example_inputs=X)
    if not given:
        masked = compress(network, [LevelPruner(0.5), item], example_inputs=X)
        small = compress(masked, [Speedup()], example_inputs=X)
        torch.testing.assert_close(small(X), masked(X))
        mask = fxcompress.masks(masked)["grouped.weight"]
    quantizer, weight = small.get_submodule("_quant.grouped.weight"), small.get_parameter("grouped.weight")
    reads = quantizer(weight).detach()
    assert torch.equal(reads != 0, mask)
    unmasked = made.get_submodule("_quant.grouped.weight")(made.get_parameter("grouped.weight") * mask).detach()
    torch.testing.assert_close(reads[mask], unmasked[mask])
    assert "_masks" not in dict(small.named_modules())
    settled = copy.deepcopy(small)
    settle(settled)
    torch.testing.assert_close(settled(X), small(X), rtol=1e-4, atol=1e-5)


def _layer_before(node: torch.fx.Node) -> str:
    (source,) = node.all_input_nodes
    return str(source.meta.get("layer", source.target))


@every
def test_settling_changes_nothing(item: Pass) -> None:
    network = small_network()
    made = compress(network, [item], example_inputs=X).double()
    settled = copy.deepcopy(made)
    settle(settled)
    with torch.no_grad():
        torch.testing.assert_close(settled(X.double()), made(X.double()), rtol=1e-9, atol=1e-9)
    behind = [n for n in settled.graph.nodes if n.op == "call_module" and n.target.startswith("norm")]
    quantized = [n for n in made.graph.nodes if n.op == "call_module" and n.target.endswith(".weight")]
    assert (
        len(behind) <= 3 - min(3, len([n for n in quantized if "last" not in n.target and "side" not in n.target])) + 1
    )
    for name, quantizer in quantizers(settled).items():
        assert "activations" in name or isinstance(quantizer, (AffineFakeQuantize, LearnedFakeQuantize))


@every
def test_an_ordinary_module(item: Pass) -> None:
    network = small_network()
    made = compress(network, [item], example_inputs=X)
    wanted = made(X)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(X), wanted)
    assert made(values(7, 3, 6, 6)).shape == (7, 5)
    made.train()
    made(X).sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if "bias" not in name)
    again = compress(made.eval(), [item], example_inputs=X)
    assert str(again.graph) == str(made.graph)


def test_shared_scale_of_a_concatenation() -> None:
    network = small_network()
    made = compress(network, [QATQuantizer()], example_inputs=X)
    cat = next(n for n in made.graph.nodes if n.target is torch.cat)
    one, two = cat.args[0]
    assert one.target == two.target
    assert quantizers(made)[one.target].calls == 2


def test_blocks_are_quantized_at_their_end() -> None:
    network = small_network()
    made = compress(network, [QATQuantizer()], example_inputs=X)
    places = [str(n.args[0]) for n in made.graph.nodes if "activations" in str(n.target)]
    assert places == ["x", "relu", "relu_1", "relu_2", "relu_3", "mean"]


def test_bits_by_pattern_and_ends() -> None:
    network = small_network()
    made = compress(
        network,
        [QATQuantizer({"*": 4, "grouped": 6}, {"*": 5}, exclude="depthwise", first_last=8)],
        example_inputs=X,
    )
    bits = {name.split(".")[1]: q.spec.bits for name, q in quantizers(made).items() if name.endswith("weight")}
    assert bits == {"stem": 8, "grouped": 6, "side": 4, "last": 8}


def test_training_on_a_task() -> None:
    network = small_network()
    images = values(48, 3, 6, 6)
    labels = images.mean((1, 2, 3)).mul(20).long().clamp(0, 4)
    task = Task(
        batches=[(images[i : i + 16], labels[i : i + 16]) for i in range(0, 48, 16)],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    for item in (
        QATQuantizer(epochs=6),
        LSQQuantizer(4, 4, epochs=6),
        BNNQuantizer(epochs=6),
        DoReFaQuantizer(epochs=6),
    ):
        untrained = compress(network, [type(item)(epochs=0)], example_inputs=X, task=task)
        trained = compress(network, [item], example_inputs=X, task=task)
        losses = [float(nn.functional.cross_entropy(m(images), labels).detach()) for m in (untrained, trained)]
        assert losses[1] < losses[0]
    assert float(trained.get_parameter("grouped.weight").detach().abs().max()) > 0


# ---- products of two activations -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention written out, and once more in one call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1) @ v
        y = F.scaled_dot_product_attention(q, k, value=y)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("item", [QATQuantizer, LSQQuantizer, PTQQuantizer], ids=lambda item: item.name)
def test_products_of_activations_read_grids(item: Any) -> None:
    model, x = Attention().eval(), values(3, 7, 12)
    plain = compress(model, [item()], example_inputs=x)
    made = compress(model, [item(product_bits=6)], example_inputs=x)
    found = [str(n.args[0]) for n in made.graph.nodes if n.meta.get(ROLE) == "activation"]
    before = [str(n.args[0]) for n in plain.graph.nodes if n.meta.get(ROLE) == "activation"]
    assert len(found) == len(before) + 3  # one for all of q, k and v, where they are made; probabilities; the product
    new = {"qkv", "softmax", "matmul_1"}
    assert set(found) == set(before) | new
    bits = {str(n.args[0]): item.spec.bits for n, item in fake_quant_nodes(made)}
    assert {bits[name] for name in new} == {6}
    torch.testing.assert_close(made(x), model(x), rtol=0.2, atol=0.1)
    with pytest.raises(InputError, match="product_bits"):
        item(product_bits=9)


def test_projections_of_a_multihead_attention_are_quantized() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    made = compress(layer, [PTQQuantizer()], example_inputs=values(2, 5, 8))
    names = {n.target for n in made.graph.nodes if n.meta.get(ROLE) == "weight"}
    layers = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == {f"_quant.{name}" for name in layers}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 9, 4.0, True, "8", {}])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(InputError, match="weight_bits"):
        QATQuantizer(weight_bits=bits)
    with pytest.raises(InputError, match="activation_bits"):
        QATQuantizer(activation_bits=bits)


def test_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match="freeze_step"):
        QATQuantizer(start_step=5, freeze_step=3)
    with pytest.raises(InputError, match="observer"):
        PTQQuantizer(observer="average")
    with pytest.raises(InputError, match="first_last"):
        QATQuantizer(first_last="none")  # type: ignore[arg-type]


class Channelwise(Quantizer):
    """A scale for each channel of what is read."""

    def activation_spec(self, bits: int) -> QuantSpec:
        return activation_spec(bits, MinMax()).along(1)


def test_specs_that_cannot_be() -> None:
    network = small_network()
    with pytest.raises(InputError, match=r"Channelwise for \w+ has axis=1; expected None"):
        compress(network, [Channelwise(8, 8)], example_inputs=X)
    with pytest.raises(InputError, match="bits is 9; expected an integer from 1 to 8"):
        QuantSpec(9, "weight", signed=True, symmetric=True)


def test_a_quantizer_that_finds_nothing_says_why() -> None:
    network = small_network()
    made = compress(network, [PTQQuantizer()], example_inputs=X)
    with pytest.warns(UserWarning, match="QATQuantizer has nothing to quantize: .*stem has 8, not 4"):
        again = compress(made, [QATQuantizer(4)], example_inputs=X)
    assert again.meta["history"][-1].notes == ("nothing to quantize",)
    again = compress(made, [QATQuantizer()], example_inputs=X)  # no warning: it is as asked
    assert again.meta["history"][-1].notes == ("nothing to quantize",)
    with pytest.warns(UserWarning, match="no convolution or linear layer"):
        compress(nn.Sequential(nn.ReLU()), [PTQQuantizer()], example_inputs=X)
    with pytest.warns(UserWarning, match="leave every layer in float"):
        compress(nn.Sequential(nn.Linear(6, 6)), [BNNQuantizer()], example_inputs=X)


@pytest.mark.parametrize("item", [NaiveQuantizer(), PTQQuantizer(), QATQuantizer()], ids=lambda item: item.name)
def test_lowered_modules_are_refused(item: Pass) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    lowered = compress(model, [Lower(dtype="float32")], example_inputs=X)
    with pytest.raises(PassError, match=f"{item.name} was given a lowered module"):
        compress(lowered, [item], example_inputs=X)


def test_calibration_without_batches_or_with_nan() -> None:
    network = small_network()
    with pytest.raises(InputError, match="no batch"):
        compress(network, [PTQQuantizer()], example_inputs=X, task=Task(batches=list))
    bad = X.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"NaN.*activations"):
        compress(network, [PTQQuantizer()], example_inputs=X, task=Task(batches=[bad]))
    with pytest.raises(InputError, match="example_inputs is missing"):
        compress(network, [PTQQuantizer()])
    with pytest.raises(SelectionError, match="steem"):
        compress(network, [PTQQuantizer({"steem": 8})], example_inputs=X)


@pytest.mark.parametrize(
    "item", [QATQuantizer(), LSQQuantizer(), PTQQuantizer(adaround=True), BNNQuantizer(first_last="same")]
)
@pytest.mark.parametrize("bad", ["none", "nan", "infinite", "weight"])
def test_a_calibration_that_fails_leaves_the_model(item: Pass, bad: str) -> None:
    model = normed()
    batches = [] if bad == "none" else [X.clone()]
    if bad in ("nan", "infinite"):
        batches[0][1, 0, 2, 2] = math.nan if bad == "nan" else math.inf
    if bad == "weight":
        model.get_parameter("4.weight").data[0, 0] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="no batch" if bad == "none" else "NaN or infinite"):
        compress(model, [item], example_inputs=X, task=Task(batches=batches))
    assert all(torch.equal(before[name].nan_to_num(7), t.nan_to_num(7)) for name, t in model.state_dict().items())
    assert not any("_quant" in name for name, _ in model.named_modules())
