"""A module that runs in ONNX Runtime or OpenVINO is an ordinary one: copies, threads, sizes, dtypes, what it checks."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_quantized import fake_quantized
from model_zoo import randomize
from onnx_cases import IMAGES, image_net, inner, kernels
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fxcompress
from fxcompress.export.session import OnnxModule
from fxcompress.passes import Lower, PTQQuantizer
from fxcompress.verify import difference

Pair = tuple[fxcompress.TracedModule, fxcompress.TracedModule]


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return str(request.param)


@pytest.fixture(scope="module")
def convolutions(backend: str) -> Pair:
    simulated = fake_quantized(image_net(), IMAGES)
    return simulated, fxcompress.compress(simulated, [Lower(backend)], example_inputs=IMAGES, progress=False)


def test_copies_pickles_and_state(convolutions: Pair, tmp_path: Path) -> None:
    _, lowered = convolutions
    right = lowered(IMAGES)
    assert not right.requires_grad
    copies = [copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), copy.copy(lowered)]
    torch.save(lowered.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(lowered)
    name = next(iter(other.state_dict()))
    other.get_buffer(name).zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.inference_mode():
        copies.append(copy.deepcopy(lowered))
    assert all(torch.equal(right, module(IMAGES)) for module in (*copies, other))


def test_a_state_that_is_assigned_is_what_runs(backend: str) -> None:
    x = torch.randn(3, 4)
    made = [
        fxcompress.compress(nn.Linear(4, 2), [Lower(backend, "float32")], example_inputs=x, progress=False)
        for _ in range(2)
    ]
    right = [module(x) for module in made]
    one = copy.deepcopy(made[0])
    for turn in (1, 0, 1):
        one.load_state_dict(made[1 - turn].state_dict(), assign=True)
        one.load_state_dict(made[turn].state_dict(), assign=True)
        assert torch.equal(one(x), right[turn])


def test_threads_with_many_sizes(convolutions: Pair) -> None:
    simulated, lowered = convolutions
    sizes = [IMAGES[:1].repeat(batch, 1, 1, 1) for batch in (1, 2, 3, 4, 5, 6, 7)] * 3
    with torch.no_grad():
        right = simulated(IMAGES[:1])
    fresh = copy.deepcopy(lowered)
    with ThreadPoolExecutor(4) as pool:
        for x, found in zip(sizes, pool.map(fresh, sizes), strict=True):
            assert len(found) == len(x)
            assert difference(right.expand_as(found), found) < 0.05


def test_a_result_is_not_what_the_runtime_writes_next(convolutions: Pair) -> None:
    _, lowered = convolutions
    first = lowered(IMAGES)
    kept = first.clone()
    lowered(-IMAGES)
    assert torch.equal(first, kept)


class Nested(nn.Module):
    """Its second input is a dict, its third may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor], left: Tensor | None, right: Tensor | None) -> Tensor:
        made = self.fc(x) + more["p"] - 2 * more["q"]
        return made if right is None else made + 5 * right


def test_inputs_are_found_by_their_places_and_keys(backend: str) -> None:
    x, p, q, last = torch.randn(2, 4), *torch.randn(3, 2, 3)
    model = Nested().eval()
    example = (x, {"p": p, "q": q}, None, last)
    lowered = fxcompress.compress(model, [Lower(backend, "float32")], example_inputs=example, progress=False)
    right = model(*example).detach()
    for more in ({"p": p, "q": q}, {"q": q, "p": p}):
        torch.testing.assert_close(lowered(x, more, None, last), right)
    with pytest.raises(fxcompress.InputError, match=r"the inputs beside tensors are \(.*None\); this model was"):
        lowered(x, {"p": p, "q": q}, last, None)
    for wrong in ((p, q), {"p": p, "r": q}, {"p": p}):
        with pytest.raises(fxcompress.InputError, match="the inputs are nested in another way than this model"):
            lowered(x, wrong, None, last)


class Two(nn.Module):
    """Two inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.one(a) - self.two(b)


def test_a_runtime_module_has_the_models_signature(backend: str) -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 5)
    model = Two().eval()
    lowered = fxcompress.compress(model, [Lower(backend, "float32")], example_inputs=(a, b), progress=False)
    assert list(inspect.signature(lowered.forward).parameters) == ["a", "b"]
    torch.testing.assert_close(lowered(b=b, a=a), model(a, b).detach())
    fxcompress.count(lowered, {"b": b, "a": a})
    (name,) = (name for name, _ in lowered.named_children())
    setattr(lowered, name, Two().eval())
    assert torch.equal(lowered(a, b), lowered.get_submodule(name)(a, b)), "it is looked up at every call"


def test_an_option_that_openvino_no_longer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("fxcompress.export.session._SNIPPETS", "NO_SUCH_MODE")
    simulated = fake_quantized(image_net(), IMAGES)
    lowered = fxcompress.compress(simulated, [Lower("openvino")], example_inputs=IMAGES, progress=False)
    assert lowered(IMAGES).shape == (4, 5)
    assert "NO_SUCH_MODE" in inner(lowered)._ready().options, "it was asked for"


def test_an_empty_batch(convolutions: Pair) -> None:
    _, lowered = convolutions
    assert lowered(IMAGES[:0]).shape == lowered(IMAGES)[:0].shape


def test_other_dtypes_are_refused(convolutions: Pair) -> None:
    _, lowered = convolutions
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(fxcompress.InputError, match=f"{dtype}; this model was written for torch.float32"):
            lowered(IMAGES.to(dtype))


def test_what_is_returned_is_checked_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = fake_quantized(image_net(), IMAGES)
    forward = OnnxModule.forward

    def wrong(self: OnnxModule, *inputs: Any) -> Any:
        result = forward(self, *inputs)
        return -result if isinstance(result, Tensor) else result  # with the integers it is a tuple

    monkeypatch.setattr(OnnxModule, "forward", wrong)
    with pytest.raises(fxcompress.VerificationError, match="from what the same model gives together with its integers"):
        fxcompress.compress(simulated, [Lower(backend)], example_inputs=IMAGES, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_sizes_that_were_compared_are_not_kept(backend: str, dtype: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    passes = [PTQQuantizer(), Lower(backend)] if dtype == "int8" else [Lower(backend, dtype)]
    lowered = fxcompress.compress(model, passes, example_inputs=torch.randn(8, 6), progress=False)
    assert inner(lowered)._session is None


def test_openvino_is_compiled_for_the_first_sizes_and_then_for_any() -> None:
    pytest.importorskip("openvino")
    images = torch.randn(9, 3, 16, 16)
    model = VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4).eval()
    randomize(model, 3)
    passes = [PTQQuantizer(), Lower(backend="openvino")]
    lowered = fxcompress.compress(model, passes, example_inputs=images, progress=False)
    right = lowered(images)
    for batch in (1, 2, 9, 3, 4, 1, 5):
        torch.testing.assert_close(lowered(images[:batch]), right[:batch], rtol=0, atol=float(right.abs().max()) / 50)
    runtime = inner(lowered)._ready()
    assert set(runtime.compiled) == {((batch, 3, 16, 16),) for batch in (9, 1, 2, 3)} | {None}
    for compiled in runtime.compiled.values():
        layers = kernels(compiled)["FullyConnected"]
        assert len(layers) == 5
        assert set(layers) <= {"i8", "u8"}
