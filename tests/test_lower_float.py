"""Lower(dtype="float32" | "bfloat16"): packed kernels compute what the model does, and are used."""

import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from model_zoo import build, randomize
from torch import Tensor, nn

import fxcompress
from fxcompress.lower.prepacked import FloatBatchNorm, FloatConvolution, FloatLinear, Prepacked
from fxcompress.passes import L1FilterPruner, Lower, Speedup
from fxcompress.verify import difference


def lower(model: nn.Module, x: Tensor, dtype: str = "float32") -> fxcompress.TracedModule:
    return fxcompress.compress(model.eval(), [Lower(dtype=dtype)], example_inputs=x, progress=False)


def notes(module: fxcompress.TracedModule) -> str:
    return "\n".join(module.meta["history"][-1].notes)


def packed(module: nn.Module) -> dict[str, Prepacked]:
    return {name: item for name, item in module.named_modules() if isinstance(item, Prepacked)}


def assert_same(model: nn.Module, lowered: nn.Module, *shapes: tuple[int, ...], tolerance: float = 1e-5) -> None:
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
        with torch.no_grad():
            assert difference(model(x), lowered(x)) <= tolerance


class Residual(nn.Module):
    """A downsampling block and a plain one, which shares its ReLU; the shortcut of the second is read again."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.one = nn.Conv2d(24, 40, 3, 2, 1)
        self.two = nn.Conv2d(24, 40, 1, 2)
        self.three = nn.Conv2d(40, 40, (3, 5), padding="same", dilation=(2, 1))
        self.depthwise = nn.Conv2d(40, 80, 3, padding=1, groups=40)
        self.fc = nn.Linear(80, 700)
        self.act, self.relu = act, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.one(x)
        y += self.two(x)
        y = self.relu(y)
        z = F.relu(self.three(y) + y)
        z = self.act(self.depthwise(z + y))
        tokens = z.flatten(2).transpose(1, 2)
        return self.act(self.fc(tokens))


def residual(act: nn.Module) -> Residual:
    model = Residual(act).eval()
    randomize(model, 1)
    return model


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.7),
    nn.LeakyReLU(0.2),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.ELU(),
]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_a_residual_network_at_other_sizes(act: nn.Module) -> None:
    model = residual(act)
    lowered = lower(model, torch.randn(2, 3, 32, 32))
    assert set(packed(lowered)) == {"stem", "one", "two", "three", "depthwise", "fc"}
    # `y + two(x)` with its ReLU, and `three(y) + y` with its own
    assert "2 additions fused" in notes(lowered)
    assert f"{5 if not isinstance(act, nn.ELU) else 2} activations" in notes(lowered)
    assert not any(node.target == "norm" for node in lowered.graph.nodes)
    assert_same(model, lowered, (2, 3, 32, 32), (1, 3, 32, 32), (5, 3, 32, 32), (3, 3, 48, 40))


def test_state_dict_keys_are_the_callers() -> None:
    model = residual(nn.ReLU())
    lowered = lower(model, torch.randn(2, 3, 32, 32))
    gone = {key for key in model.state_dict() if key.startswith("norm.")}
    assert set(lowered.state_dict()) == set(model.state_dict()) - gone | {"stem.bias"}


def test_copies_pickles_and_threads() -> None:
    model = residual(nn.SiLU())
    x = torch.randn(2, 3, 32, 32)
    lowered = lower(model, x)
    expected = lowered(x)
    buffer = io.BytesIO()
    torch.save(lowered, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(lowered), copy.copy(lowered), pickle.loads(pickle.dumps(lowered)), loaded):
        assert all(layer._kernel is None for layer in packed(copy.deepcopy(twin)).values())
        assert torch.equal(twin(x), expected)
    fresh = copy.deepcopy(lowered)  # nothing is packed: the threads race to do it
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: fresh(x), range(32)))


def test_loading_a_state_dict_packs_anew() -> None:
    one, other = residual(nn.ReLU()), residual(nn.ReLU())
    randomize(other, 2)
    x = torch.randn(2, 3, 32, 32)
    lowered, target = lower(one, x), lower(other, x)
    lowered(x)
    lowered.load_state_dict(target.state_dict())
    assert torch.equal(lowered(x), target(x))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in target.get_submodule("one").state_dict().items()}
    lowered.get_submodule("one").load_state_dict(zeros)
    assert not torch.equal(lowered(x), target(x))


def test_bfloat16() -> None:
    model = residual(nn.ReLU())
    x = torch.randn(2, 3, 32, 32)
    lowered = lower(model, x, "bfloat16")
    assert lowered.get_buffer("one.weight").dtype == torch.bfloat16
    assert lowered(x).dtype == torch.float32
    assert_same(model, lowered, (2, 3, 32, 32), (4, 3, 32, 32), tolerance=0.05)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_that_cannot_be_folded(affine: bool) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 24, 3, padding=1)
            self.first, self.second = (nn.BatchNorm2d(width, affine=affine) for width in (24, 24 + 40))
            self.one, self.two = nn.Conv2d(24, 40, 1), nn.Conv2d(64, 33, 1)
            self.rows = nn.BatchNorm1d(33, affine=affine)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.tanh(self.stem(x))
            x = torch.cat([x, self.one(F.relu(self.first(x)))], 1)
            y = self.two(F.relu(self.second(x)))
            return y, self.rows(y.amax((2, 3)))

    model = Dense()
    randomize(model, 6)
    x = torch.randn(2, 3, 20, 20)
    lowered = lower(model, x)
    assert {name for name, item in packed(lowered).items() if isinstance(item, FloatBatchNorm)} == {
        "first",
        "second",
        "rows",
    }
    assert packed(lowered)["first"].relu
    assert not packed(lowered)["rows"].relu
    assert not any("relu" in str(node.target) for node in lowered.graph.nodes)
    for shape in ((2, 3, 20, 20), (5, 3, 31, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            for right, found in zip(model(x), lowered(x), strict=True):
                assert difference(right, found) <= 1e-5


def test_small_grouped_convolutions_are_packed() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)).eval()
    randomize(model, 7)
    lowered = lower(model, torch.randn(2, 16, 9, 9))
    assert set(packed(lowered)) == {"0"}
    assert_same(model, lowered, (2, 16, 9, 9), (3, 16, 12, 5))


class Hazards(nn.Module):
    """What is read by a layer, or added to its result, is written into meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        short = self.one(x)
        x.relu_()  # after `one` read it, before its result is added
        y = self.two(x)
        y = y + short
        kept = self.three(y)
        kept.add_(y)
        base = torch.tanh(y)
        view = base[:, :8]
        base += self.three(x)  # `view` sees this
        return kept, view


def test_writes_in_place_stay_where_they_are() -> None:
    model = Hazards()
    randomize(model, 3)
    assert_same(model, lower(model, torch.randn(2, 16, 20, 20)), (2, 16, 20, 20), (3, 16, 20, 20))


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.uneven = nn.Conv2d(16, 16, 4, padding="same")
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(16, 16, 3)
        self.tiny = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(self.uneven(self.reflect(x))))
        return self.tiny(self.transposed(self.twice(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_what_stays_is_named_with_the_reason() -> None:
    model = Unusual()
    randomize(model, 4)
    lowered = lower(model, torch.randn(2, 16, 20, 20))
    assert set(packed(lowered)) == {"twice"}
    text = notes(lowered)
    assert "pads unevenly or not with zeros: uneven" in text  # the other one is recorded as padding and a function
    assert "no packed kernel: transposed" in text
    assert "fewer than 250,000 MACs (calling the packed kernel costs more): tiny" in text
    assert_same(model, lowered, (2, 16, 20, 20), (3, 16, 20, 20))


def test_weights_beside_layers_are_packed_under_names_of_their_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(96, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    model = Attention()
    randomize(model, 5)
    x = torch.randn(2, 33, 96)
    lowered = lower(model, x)
    assert {name: type(item) for name, item in packed(lowered).items()} == {
        "inner.in_proj": FloatLinear,
        "inner.out_proj": FloatLinear,
    }
    assert "inner.in_proj_weight is inner.in_proj.weight now" in notes(lowered)
    assert_same(model, lowered, (2, 33, 96), (3, 33, 96), (1, 20, 96))


def test_after_pruning_and_removal() -> None:
    model, x = build("mobilenet_v2")
    small = fxcompress.compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=x, progress=False)
    lowered = lower(small, x)
    assert any(isinstance(item, FloatConvolution) for item in packed(lowered).values())
    assert_same(small, lowered, (2, 3, 64, 64), (1, 3, 96, 64))


def test_options_that_do_not_exist() -> None:
    with pytest.raises(fxcompress.InputError, match="backend is 'tpu'; expected 'torch'"):
        Lower(backend="tpu")
    with pytest.raises(fxcompress.InputError, match=r"dtype is 'float16'; expected 'int8' \(or None\), 'float32'"):
        Lower(dtype="float16")


def test_an_operator_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.lower.features._FLOAT", ("mkldnn::_convolution_of_tomorrow",))
    with pytest.raises(
        fxcompress.PassError, match=r"needs the operators mkldnn::_convolution_of_tomorrow, which torch"
    ):
        lower(nn.Linear(3, 3), torch.randn(2, 3))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0"])
def test_real_models(name: str) -> None:
    model, x = build(name)
    assert_same(model, lower(model, x), tuple(x.shape), (3, 3, 96, 64))


class Named(nn.Module):
    """Its inputs have the names that a flat function gives its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, c0: Tensor, v3: Tensor, _run: Tensor, module: Tensor | None = None) -> Tensor:
        made = F.relu(self.one(c0)) - F.relu(self.two(v3)) * _run
        return made if module is None else made + module


@pytest.mark.parametrize("grad", [False, True])
def test_names_of_inputs_mean_nothing(grad: bool) -> None:
    model, values, scale = Named().eval(), torch.randn(3, 2, 3, 8, 8).unbind(), torch.rand(2, 1, 1, 1)
    example = {"c0": values[0], "v3": values[1], "_run": scale, "module": scale}
    lowered = fxcompress.compress(model, [Lower(dtype="float32")], example_inputs=example, progress=False)
    assert list(inspect.signature(lowered.forward).parameters) == list(example)
    right = model(values[0], values[2], scale, scale).detach()
    with torch.set_grad_enabled(grad):
        found = [lowered(values[0], values[2], scale, scale) for _ in range(4)]
        found.append(lowered(module=scale, v3=values[2], _run=scale, c0=values[0]))
    for item in found:
        assert not item.requires_grad
        torch.testing.assert_close(item, right, rtol=1e-5, atol=1e-5)
