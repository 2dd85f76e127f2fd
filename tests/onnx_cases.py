"""Models for tests of ONNX, and what is looked at in a file."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from model_zoo import randomize
from torch import Tensor, nn

import fxcompress
from fxcompress.export.session import OnnxModule
from fxcompress.quantization.fake_quantize import fake_quant_nodes

ROOT = Path(fxcompress.__file__).parents[1]


class Convolutions(nn.Module):
    """BatchNorm, ReLU, a residual sum, depthwise, Hardswish, ReLU6, SiLU, a join, both poolings, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.one_norm = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.left, self.right = nn.Conv2d(12, 7, 1), nn.Conv2d(12, 9, 3, padding=1)
        self.last = nn.Conv2d(16, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.one_norm(self.one(x)) + x)
        x = F.hardswish(self.depthwise(x))
        x = F.relu6(self.last(torch.cat([F.relu(self.left(x)), F.silu(self.right(x))], 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """A block of a transformer over [N, T, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def image_net() -> nn.Module:
    model = Convolutions().eval()
    randomize(model, 3)
    return model


def block() -> nn.Module:
    model = Attention().eval()
    randomize(model, 4)
    return model


IMAGES, TOKENS = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(1)), torch.randn(3, 7, 12)


def inner(module: nn.Module) -> OnnxModule:
    (found,) = (item for item in module.modules() if isinstance(item, OnnxModule))
    return found


def file_of(module: nn.Module) -> onnx.ModelProto:
    return onnx.load_from_string(inner(module).file())


def optimized(module: nn.Module, path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a model, operators counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(file_of(module).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def roundings(simulated: fxcompress.TracedModule) -> set[str]:
    return {node.name for node, item in fake_quant_nodes(simulated) if item.spec.role == "activation"}


def kernels(compiled: Any) -> dict[str, list[str]]:
    """The precisions that each kind of kernel of an OpenVINO model runs in."""
    found = defaultdict(list)
    for operator in compiled.get_runtime_model().get_ops():
        info = operator.get_rt_info()
        found[str(info["layerType"].astype(str))].append(str(info["runtimePrecision"].astype(str)))
    return found
