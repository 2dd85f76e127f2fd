"""Lower(): fake-quantized graphs on integer kernels, node by node within one quantization step."""

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from fake_quantized import ACTIVATION, WEIGHT, fake_quantized
from model_zoo import build, randomize
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.lower import integers
from fxcompress.lower.agreement import GRID, agreement
from fxcompress.lower.features import has_int8_instructions
from fxcompress.lower.prepacked import FloatLinear, PostOp
from fxcompress.lower.quantized import (
    IntegerWeight,
    QuantizedBatchNorm,
    QuantizedConvolution,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
)
from fxcompress.lower.stem import QuantizedStem
from fxcompress.passes import Lower, LSQQuantizer, PTQQuantizer, QATQuantizer
from fxcompress.passes.kernel_quantizer import KernelQuantizer
from fxcompress.quantization.observers import MinMax
from fxcompress.quantization.spec import QuantSpec, activation_spec, weight_spec
from fxcompress.verify import difference

pytestmark = pytest.mark.skipif(not has_int8_instructions(), reason="no 8-bit multiply-accumulate instructions")


def lower(simulated: fxcompress.TracedModule, *x: Tensor) -> fxcompress.TracedModule:
    return fxcompress.compress(simulated, [Lower()], example_inputs=x, progress=False)


def notes(module: fxcompress.TracedModule) -> str:
    return "\n".join(module.meta["history"][-1].notes)


def quantized(module: nn.Module) -> set[str]:
    return {name for name, item in module.named_modules() if isinstance(item, QuantizedLayer)}


def assert_within_a_step(simulated: fxcompress.TracedModule, lowered: fxcompress.TracedModule, *x: Tensor) -> None:
    """Each node on its own; and the outputs of the whole, which were compared by compress only node by node."""
    found = agreement(simulated, lowered, Inputs.parse(x))
    rounded = [item for item in found if item.steps is not None]
    assert rounded
    assert max(item.steps or 0 for item in rounded) <= 1
    assert max(item.share for item in rounded) < 0.01
    assert max(item.difference for item in found) < 1e-5


class Layers(nn.Module):
    """Every kind of layer, and everything that stays integer between them."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.one = nn.Conv2d(24, 40, 3, 2, 1)
        self.short = nn.Conv2d(24, 40, 1, 2)
        self.grouped = nn.Conv2d(40, 40, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(40, 80, 3, padding=1, groups=40)
        self.squeeze, self.excite = nn.Conv2d(80, 12, 1), nn.Conv2d(12, 80, 1)
        self.point = nn.Conv2d(80, 24, 1)
        self.line = nn.Conv1d(48, 20, 3, padding=1)
        self.fc = nn.Linear(20, 11)
        self.act, self.relu = act, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.stem(x))))
        y = self.one(x)
        y += self.short(x)
        y = self.relu(y)
        z = self.act(self.grouped(y) + y)
        z = self.act(self.depthwise(z + y))
        z = z * torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3), keepdim=True)))))
        point = self.point(z)
        joined = torch.cat([point, self.act(point)], 1).flatten(2)
        line = self.act(self.line(joined)).transpose(1, 2)
        return self.fc(line)


def layers(act: nn.Module) -> Layers:
    model = Layers(act).eval()
    randomize(model, 1)
    return model


ALL = {"stem", "one", "short", "grouped", "depthwise", "squeeze", "excite", "point", "line", "fc"}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.LeakyReLU()], ids=repr)
def test_every_layer_and_what_lies_between(act: nn.Module) -> None:
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(act), x)
    lowered = lower(simulated, x)
    assert quantized(lowered) == ALL
    assert "10 of 10 layers run in int8" in notes(lowered)
    for shape in ((2, 3, 40, 40), (1, 3, 40, 40), (5, 3, 33, 47)):
        assert_within_a_step(simulated, lowered, torch.randn(shape))
    kinds = {node.name: GRID in node.meta for node in lowered.graph.nodes if "cat" in node.name or "pool" in node.name}
    assert kinds
    assert all(kinds.values())


SPECS = {
    "per tensor": (weight_spec(8, axis=None), ACTIVATION),
    "symmetric": (WEIGHT, activation_spec(8, MinMax(), symmetric=True, signed=True)),
    "signed": (WEIGHT, activation_spec(8, MinMax(), signed=True)),
    "4 bits": (weight_spec(4), activation_spec(4, MinMax())),
    "weights of 2 bits": (weight_spec(2), activation_spec(6, MinMax(), signed=True)),
}


@pytest.mark.parametrize("weight, activation", SPECS.values(), ids=SPECS)
def test_specs(weight: QuantSpec, activation: QuantSpec) -> None:
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(nn.Hardswish()), x, weight=weight, activation=activation)
    lowered = lower(simulated, x)
    assert quantized(lowered) == ALL
    assert_within_a_step(simulated, lowered, torch.randn(3, 3, 40, 40))


def test_weights_alone() -> None:
    """Layers run in float and keep their integers."""
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(nn.ReLU()), x, activation=None)
    lowered = lower(simulated, x)
    assert quantized(lowered) == set()
    assert "its input is not quantized" in notes(lowered)
    assert isinstance(lowered.fc, FloatLinear)
    assert isinstance(lowered.line, IntegerWeight)
    state = lowered.state_dict()
    assert all(state[f"{name}.weight"].dtype == torch.int8 for name in ALL)
    y = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        assert difference(simulated(y), lowered(y)) < 1e-5


class Tables(nn.Module):
    """Tokens of one table and places of another, which is read twice; the head is tied to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, 7, padding_idx=0), nn.Embedding(5, 7)
        self.mix, self.head = nn.Linear(7, 7), nn.Linear(7, 13)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.places(places) + self.places(places.flip(0))
        return self.head(self.mix(x).relu())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("item", [PTQQuantizer, QATQuantizer, LSQQuantizer])
def test_tables_stay_integers(item: type[KernelQuantizer], bits: int) -> None:
    model, tokens = Tables().eval(), torch.arange(15).reshape(3, 5) % 13
    randomize(model, 4)
    simulated = fxcompress.compress(model, [item(weight_bits=bits, embeddings=True)], example_inputs=tokens)
    lowered = lower(simulated, tokens)
    assert_within_a_step(simulated, lowered, tokens.repeat(2, 1).flip(1))
    assert "2 of 2 layers run in int8, with 3 embeddings" in notes(lowered)
    tables = {name: table for name, table in lowered.named_modules() if isinstance(table, QuantizedEmbedding)}
    assert tables.keys() == {"words", "places", "places_call2"}
    state = lowered.state_dict()
    for name, table in tables.items():
        assert state[f"{name}.weight"].dtype == torch.int8
        assert state[f"{name}.weight_scale"].shape == table.weight.shape[:1]
        float_name = name.removesuffix("_call2")
        rows = torch.tensor([[4, 0, 2], [1, 1, 3]])
        expected = simulated.get_submodule(f"_quant.{float_name}.weight")(model.get_parameter(f"{float_name}.weight"))
        assert torch.equal(table(rows), expected[rows])
    assert state["places.weight"].data_ptr() == state["places_call2.weight"].data_ptr()


def test_a_tied_table_is_stored_once_and_loads() -> None:
    model, tokens = Tables().eval(), torch.arange(15).reshape(3, 5) % 13
    randomize(model, 4)
    simulated = fxcompress.compress(model, [PTQQuantizer(embeddings=True)], example_inputs=tokens)
    lowered, other = lower(simulated, tokens), lower(simulated, tokens)
    state = lowered.state_dict()
    assert state["words.weight"].data_ptr() == state["head.weight"].data_ptr()
    expected = lowered(tokens)
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), other):
        if twin is other:
            for tensor in other.state_dict().values():
                tensor.zero_()
            other.load_state_dict(copy.deepcopy(state))
        assert torch.equal(twin(tokens), expected)
        assert torch.equal(twin(tokens), expected), "and the recording"


def test_a_table_is_not_multiplied_as_a_whole() -> None:
    table = QuantizedEmbedding(torch.randint(-127, 128, (301, 7), dtype=torch.int8), torch.rand(301))
    with torch.profiler.profile(record_shapes=True) as seen:
        table(torch.tensor([[1, 300, 5]]))
    products = [event.input_shapes[0] for event in seen.events() if event.name in ("aten::mul", "aten::mul_")]
    assert products == [[1, 3, 7]]


def test_layers_that_were_left_out_stay_float() -> None:
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(nn.ReLU()), x, where=lambda name: name not in ("stem", "fc"))
    lowered = lower(simulated, x)
    assert quantized(lowered) == ALL - {"stem", "fc"}
    assert_within_a_step(simulated, lowered, torch.randn(3, 3, 40, 40))


def test_copies_pickles_and_threads() -> None:
    x = torch.randn(2, 3, 40, 40)
    lowered = lower(fake_quantized(layers(nn.ReLU()), x), x)
    expected = lowered(x)
    buffer = io.BytesIO()
    torch.save(lowered, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(lowered), copy.copy(lowered), pickle.loads(pickle.dumps(lowered)), loaded):
        assert torch.equal(twin(x), expected)
    fresh = copy.deepcopy(lowered)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: fresh(x), range(32)))


def test_a_state_dict_is_small_and_loads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 200, 3), nn.Flatten(), nn.Linear(3200, 100))
    x = torch.randn(2, 3, 8, 8)
    simulated = fake_quantized(model, x)
    lowered, other = lower(simulated, x), lower(simulated, x)
    sizes = []
    for item in (model, lowered):
        buffer = io.BytesIO()
        torch.save(item.state_dict(), buffer)
        sizes.append(buffer.tell())
    assert sizes[1] <= 0.27 * sizes[0]
    with torch.no_grad():
        lowered(x)
        getattr(other, "2").weight.zero_()
        other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        assert torch.equal(lowered(x), other(x))


class ReadAgain(nn.Module):
    """What a kernel adds into is read afterwards, also through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.left = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.one(x))
        view = a[:, :4]
        b = F.relu(self.two(a) + a)
        c = F.relu(self.three(b) + a)
        return self.left(view), self.one(c), self.two(b)


def test_a_kernel_overwrites_only_what_nobody_reads_again() -> None:
    model = ReadAgain()
    randomize(model, 2)
    x = torch.randn(2, 8, 12, 12)
    simulated = fake_quantized(model, x)
    lowered = lower(simulated, x)
    assert "2 fused additions" in notes(lowered)
    assert {"one", "one_call2", "two", "two_call2"} <= quantized(lowered)
    y = torch.randn(3, 8, 12, 12)
    with torch.no_grad():
        for right, found in zip(simulated(y), lowered(y), strict=True):
            assert difference(right, found) <= 0.03
    layer = lowered.two
    assert isinstance(layer, QuantizedConvolution)
    assert not layer.spends_other


@pytest.mark.parametrize(
    "kernel, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (5, 3, 2), ((3, 1), (1, 2), (1, 0))]
)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (13, 6)])
def test_max_pooling_of_integers(kernel: object, stride: object, padding: object, size: tuple[int, int]) -> None:
    q = torch.randint(0, 256, (2, 5, *size), dtype=torch.uint8)
    pair = integers.pair_of
    try:
        expected = F.max_pool2d(q.double(), pair(kernel), pair(stride), pair(padding))
    except RuntimeError:
        return  # smaller than the kernel
    found = integers.max_pool2d(q, pair(kernel), pair(stride), pair(padding))
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("channels, bits", [(1, 8), (2, 5), (3, 8)])
def test_an_image_is_rounded_by_its_convolution(channels: int, bits: int) -> None:
    class Stem(nn.Module):
        def __init__(self, reads: int) -> None:
            super().__init__()
            self.one = nn.Conv2d(channels, 21, (3, 5), (2, 1), (1, 0), (1, 2))
            self.two = nn.Conv2d(channels, 21, (3, 5), (2, 1), (1, 0), (1, 2))
            self.head, self.reads = nn.Conv2d(21, 7, 1), reads

        def forward(self, x: Tensor) -> Tensor:
            y = F.hardtanh(self.one(x), 0.0, 0.5)
            return self.head(y if self.reads == 1 else y + self.two(x))

    x = torch.randn(2, channels, 19, 22) + 0.3
    for reads in (1, 2):
        model = Stem(reads).eval()
        randomize(model, 8)
        simulated = fake_quantized(model, x, activation=activation_spec(bits, MinMax()))
        lowered = lower(simulated, x)
        assert isinstance(lowered.get_submodule("one"), QuantizedStem) == (reads == 1)
        for size in ((2, channels, 19, 22), (3, channels, 12, 31)):
            y = torch.randn(size) + 0.3
            for given in (y, y.contiguous(memory_format=torch.channels_last)):
                assert_within_a_step(simulated, lowered, given)
                kept = given.clone()
                lowered(given)
                assert torch.equal(kept, given)


def test_a_clip_that_rounding_does_anyway_is_dropped() -> None:
    def post(activation: PostOp, grid: integers.ByteGrid) -> str:
        weight, scale = torch.ones(4, 3, dtype=torch.int8), torch.ones(4)
        return QuantizedLinear(weight, scale, None, post=activation, x_grid=grid, grid=grid).post.name

    six = PostOp("hardtanh", (0.0, 6.0))
    assert post(six, integers.ByteGrid(6 / 255, 0, 0, 255)) == "none"
    assert post(six, integers.ByteGrid(5 / 255, 0, 0, 255)) == "none"
    assert post(six, integers.ByteGrid(7 / 255, 0, 0, 255)) == "hardtanh"
    assert post(six, integers.ByteGrid(6 / 255, 3, 0, 255)) == "hardtanh"
    assert post(PostOp("relu"), integers.ByteGrid(7 / 255, 0, 0, 255)) == "none"
    assert post(PostOp("hardswish"), integers.ByteGrid(1 / 255, 0, 0, 255)) == "hardswish"


@pytest.mark.parametrize("narrow", [False, True])
def test_sums_products_and_changes_of_scale(narrow: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(10, 246, (3, 17, 5, 4), dtype=torch.uint8, generator=generator) for _ in range(2))
    gate = torch.randint(10, 246, (3, 17, 1, 1), dtype=torch.uint8, generator=generator)
    low, high = (10, 245) if narrow else (0, 255)
    left, right = integers.ByteGrid(0.02, 37, low, high), integers.ByteGrid(0.03, 200, low, high)
    new = integers.ByteGrid(0.05, 101, low, high)

    def values(q: Tensor, grid: integers.ByteGrid) -> Tensor:
        return (q.double() - grid.zero_point) * grid.scale

    def rounded(x: Tensor) -> Tensor:
        return ((x / new.scale).round() + new.zero_point).clamp(low, high)

    cases: list[tuple[Tensor, Tensor]] = [
        (integers.add(a, b, left, right, new, False), values(a, left) + values(b, right)),
        (integers.add(a, b, left, right, new, True), F.relu(values(a, left) + values(b, right))),
        (integers.multiply(a, b, left, right, new), values(a, left) * values(b, right)),
        (integers.multiply(a, gate, left, right, new), values(a, left) * values(gate, right)),
        (integers.multiply(gate, a, right, left, new), values(a, left) * values(gate, right)),
        (integers.requantize(a, left, new), values(a, left)),
        (integers.requantize(a.flatten(), left, new), values(a.flatten(), left)),
    ]
    for found, exact in cases:
        away = (found.double() - rounded(exact)).abs()
        assert float(away.max()) <= 1
        assert float((away > 0).double().mean()) < 0.02  # ties


def test_top1_agrees_where_the_margin_is_more_than_a_step() -> None:
    model = layers(nn.ReLU())
    x = torch.randn(1000, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    simulated = fake_quantized(model, x[:32])
    lowered = lower(simulated, x[:4])
    with torch.no_grad():
        right, found = (torch.cat([item(part).mean(1) for part in x.split(100)]) for item in (simulated, lowered))
    best = right.topk(2).values
    clear = best[:, 0] - best[:, 1] > (right.max() - right.min()) / 255
    assert int(clear.sum()) > 100
    agree = right.argmax(1)[clear] == found.argmax(1)[clear]
    assert float(agree.double().mean()) >= 0.995


def test_a_wrong_kernel_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Tensor] = integers.max_pool2d

    def wrong(q: Tensor, *options: tuple[int, int]) -> Tensor:
        return right(q, *options).clamp(max=100)

    monkeypatch.setattr(integers, "max_pool2d", wrong)
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(fxcompress.VerificationError, match="steps at node pool") as caught:
        lower(fake_quantized(layers(nn.ReLU()), x), x)
    assert caught.value.node == "pool"


def test_a_graph_without_fake_quant_nodes() -> None:
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(fxcompress.PassError, match="no fake-quant node: there is nothing to lower to int8"):
        fxcompress.compress(layers(nn.ReLU()), [Lower()], example_inputs=x)


def test_a_spec_that_the_kernels_cannot_run() -> None:
    x = torch.randn(2, 3, 40, 40)
    affine = QuantSpec(8, "weight", signed=True, symmetric=False, axis=0, observer=MinMax())
    simulated = fake_quantized(layers(nn.ReLU()), x, weight=affine)
    with pytest.raises(
        fxcompress.PassError, match=r"node _quant_\w+weight .* affine.* can run weights with zero point 0"
    ):
        lower(simulated, x)


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(nn.ReLU()), x)
    lowered = copy.deepcopy(lower(simulated, x))
    monkeypatch.setattr("fxcompress.lower.features.has_int8_instructions", lambda: False)
    with pytest.raises(fxcompress.PassError, match=r"multiply-accumulate instructions .* processor .* has none"):
        lowered(x)  # made on another machine
    with pytest.warns(UserWarning, match=r"this processor .* has none\. The fake-quantized module is left as it is"):
        kept = lower(simulated, x)
    assert torch.equal(kept(x), simulated(x))
    assert "left as it is" in kept.meta["history"][-1].notes[0]


def test_an_operator_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.lower.features._INT8", ("onednn::qconv_of_tomorrow",))
    x = torch.randn(2, 3, 40, 40)
    simulated = fake_quantized(layers(nn.ReLU()), x)
    with pytest.warns(UserWarning, match=r"need the operators onednn::qconv_of_tomorrow, which torch .* lacks"):
        kept = lower(simulated, x)
    assert torch.equal(kept(x), simulated(x))


def test_weights_of_another_calibration_are_refused() -> None:
    x = torch.randn(2, 3, 40, 40)
    model = layers(nn.ReLU())
    one, other = (lower(fake_quantized(model, x * gain), x) for gain in (1.0, 0.1))
    with pytest.raises(RuntimeError, match=r"grids: the state_dict is that of a module lowered from other ranges"):
        one.load_state_dict(other.state_dict())


def test_a_model_of_another_dtype_is_refused() -> None:
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    simulated = fake_quantized(layers(nn.ReLU()).double(), x)
    with pytest.raises(fxcompress.PassError, match=r"float32 values, and these are torch.float64; convert .*float\(\)"):
        lower(simulated, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fake_quantized_model_is_not_lowered_as_a_float_one(dtype: str) -> None:
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(fxcompress.PassError, match="found fake-quant nodes; expected a float model"):
        fxcompress.compress(fake_quantized(layers(nn.ReLU()), x), [Lower(dtype=dtype)], example_inputs=x)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "efficientnet_b0", "vit_b_16"]
)
def test_real_models(name: str) -> None:
    model, x = build(name)
    simulated = fake_quantized(model, x)
    lowered = lower(simulated, x)
    assert_within_a_step(simulated, lowered, torch.randn(3, *x.shape[1:]))


class Heads(nn.Module):
    """Query, key and value of one input, of different widths, and a gate that is not reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(18, 20), nn.Linear(18, 20, bias=False), nn.Linear(18, 12)
        self.gate, self.out = nn.Linear(18, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).reshape(batch, tokens, 4, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed * self.gate(x).sigmoid())


def test_linear_layers_with_one_input_become_one() -> None:
    torch.manual_seed(3)
    model, x = Heads().eval(), torch.randn(2, 9, 18)
    simulated = fake_quantized(model, x)
    lowered = lower(simulated, x)
    names = {name for name, layer in lowered.named_modules() if isinstance(layer, QuantizedLinear)}
    assert names == {"query_key_value", "gate", "out"}
    assert lowered.get_submodule("query_key_value").weight.shape == (52, 18)
    assert_within_a_step(simulated, lowered, torch.randn(5, 9, 18))
    again = lower(simulated, x)
    again.load_state_dict(lowered.state_dict())
    assert torch.equal(again(x), lowered(x))


class PostNorm(nn.Module):
    """What a norm gives is multiplied, then added to the product, and perhaps read once more."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(18), nn.Linear(18, 37), nn.Linear(37, 18)
        self.later = later

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        turned = y.transpose(1, 2)
        z = self.down(F.gelu(self.up(y))) + y
        return z.sum(1) + turned.mean(2) if self.later else z


@pytest.mark.parametrize("later", [False, True])
def test_a_sum_overwrites_what_nobody_reads_later(later: bool) -> None:
    torch.manual_seed(4)
    model, x = PostNorm(later).eval(), torch.randn(2, 9, 18)
    randomize(model, 4)
    simulated = fake_quantized(model, x)
    added = next(node for node in simulated.graph.nodes if node.name == "add")
    assert not any("quant" in node.meta for node in added.args)  # the norm's values, not their roundings
    lowered = lower(simulated, x)
    down = lowered.get_submodule("down")
    assert isinstance(down, QuantizedLinear)
    assert down.spends_other is not later
    assert_within_a_step(simulated, lowered, torch.randn(5, 9, 18))
    with torch.no_grad():
        assert difference(simulated(x), lowered(x)) < 0.02


class DenseBlock(nn.Module):
    """Norms behind joins, which no layer can take over, and a sum with its ReLU that no layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 11, 3, padding=1), nn.Conv2d(11, 6, 3, padding=1), nn.Conv2d(17, 17, 1)
        self.norm, self.last = nn.BatchNorm2d(17), nn.Conv2d(17, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        joined = torch.cat([a, self.b(F.relu(a))], 1)
        turned = joined.flip(1)
        return self.last(F.relu(joined + turned) + F.relu(self.c(F.relu(self.norm(joined)))))


def test_norms_behind_joins_run_on_integers() -> None:
    model, x = DenseBlock().eval(), torch.randn(2, 3, 12, 12)
    randomize(model, 5)
    simulated = fake_quantized(model, x)
    lowered = lower(simulated, x)
    assert isinstance(lowered.get_submodule("norm"), QuantizedBatchNorm)
    floats = [node.name for node in lowered.graph.nodes if node.target in (integers.quantize, integers.dequantize)]
    assert floats == []
    assert_within_a_step(simulated, lowered, torch.randn(5, 3, 12, 12))
