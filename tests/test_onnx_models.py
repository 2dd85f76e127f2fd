"""Models as they are published, lowered to ONNX Runtime and OpenVINO."""

import pytest
import torch
from fake_quantized import fake_quantized
from model_zoo import calibrate, randomize
from onnx_cases import inner, roundings
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import Lower
from fxcompress.verify import difference


def encoder() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertModel(config).eval(), torch.randint(0, 100, (2, 12))


def transformer() -> tuple[nn.Module, Tensor]:
    import torchvision  # after the test helper that makes it importable

    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    randomize(model, 0)
    return model, torch.randn(2, 3, 32, 32)


def published(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    torch.manual_seed(0)
    if name in ("encoder", "transformer"):
        return {"encoder": encoder, "transformer": transformer}[name]()
    size = 224 if name == "vit_b_16" else 64
    model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, size, size)
    randomize(model, 0)
    calibrate(model, x)
    return model, x


@pytest.mark.long
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "name",
    """encoder transformer resnet18 mobilenet_v2 mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 densenet121
    vit_b_16""".split(),
)
def test_published_models_agree_rounding_by_rounding(name: str, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model, x = published(name)
    simulated = fake_quantized(model, x)
    lowered = fxcompress.compress(simulated, [Lower(backend=backend)], example_inputs=x, progress=False)
    rounded = inner(lowered).signature.rounded
    assert rounded.keys() == roundings(simulated)
    # The limits of the check, which follow from grids: SiLU in efficientnet's squeeze-excite has the widest.
    most = 1 if backend == "openvino" else 6 if name == "efficientnet_b0" else 4
    assert max(item.steps for item in rounded.values()) <= most
    print(name, backend, *lowered.meta["history"][-1].notes)


@pytest.mark.long
@pytest.mark.parametrize("name", ["encoder", "transformer", "mobilenet_v3_large", "shufflenet_v2_x1_0", "densenet121"])
def test_published_float_models_agree_to_rounding(name: str) -> None:
    model, x = published(name)
    lower = Lower(backend="onnx", dtype="float32")  # which compares at two batch sizes
    lowered = fxcompress.compress(model, [lower], example_inputs=x, progress=False)
    with torch.no_grad():
        assert difference(model(x), lowered(x)) < 1e-5
