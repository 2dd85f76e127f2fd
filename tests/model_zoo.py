"""Real models for tests: torchvision, importable without its C++ library, and weights that hide nothing.

Import this module before anything that imports torchvision (timm and transformers do).
"""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn


def _declare_operators() -> torch.library.Library | None:
    """Make torchvision importable without its C++ library, which does not load with a CPU build of torch.

    Importing torchvision registers fake versions of these two operators, so they have to exist by then.
    The Library must be kept: its definitions go when it does.
    """
    spec = find_spec("torchvision")
    assert spec is not None, "torchvision is not installed; `make test` installs it"
    assert spec.origin is not None
    with contextlib.suppress(OSError):
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_OPERATORS = _declare_operators()

import torchvision.models  # noqa: E402

NAMES = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg16_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mnasnet0_5",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "alexnet",
    "deeplabv3_mobilenet_v3_large",
)

#: Only measured, by the benchmarks.
MEASURED = ("densenet201", "vit_b_16")

_OPTIONS: dict[str, dict[str, object]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
}
# 64 leaves the last stage of a network of stride 32 two pixels wide: a border, and no 1x1 special case.
_SIDE = {"inception_v3": 75, "vit_b_16": 224}

_CONTRACTIONS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build(name: str, seed: int = 0, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """The torchvision model `name` in eval mode with random weights, and an input [batch, 3, side, side].

    Every weight, bias and statistic comes from `seed` (`randomize`), scaled so that each layer's output on
    this input has a standard deviation of 1 (`calibrate`). The same arguments give the same model.
    """
    if name not in (*NAMES, *MEASURED):
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(NAMES)}")
    options = {"weights": None, **_OPTIONS.get(name, {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, **options).eval()
    randomize(model, seed)
    side = _SIDE.get(name, 64)
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))
    calibrate(model, x)
    return model, x


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter and statistic of `model` away from its default, in place.

    With the defaults (means 0, variances 1, biases 0, layer scales 1e-6) a channel that was masked or removed
    the wrong way often computes the right value by accident.

    - weights of convolutions, linear and attention projections: N(0, 2 / fan_in); their biases N(0, .1)
    - norms: weight in [.5, 1.5], bias N(0, .3); BatchNorm's mean N(0, .3) and variance in [.5, 2]
    - parameters that belong to no torch.nn layer (layer scale, class token, position embedding):
      magnitude in [.5, 1.5], either sign
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor | None, std: float) -> None:
        if tensor is not None:
            tensor.normal_(0, std, generator=generator)

    def uniform(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, _CONTRACTIONS):
            per_output = module.weight.numel() // module.weight.shape[0]
            if isinstance(module, _TRANSPOSED):  # [in, out / groups, *kernel]: each input reaches these
                per_output = module.weight.shape[0] // module.groups * module.weight[0, 0].numel()
            normal(module.weight, (2 / per_output) ** 0.5)
            normal(module.bias, 0.1)
        elif isinstance(module, nn.MultiheadAttention):  # its out_proj is a Linear, visited by itself
            for projection in (module.in_proj_weight, *_separate_projections(module)):
                if projection is not None:
                    normal(projection, (1 / projection.shape[1]) ** 0.5)
            normal(module.in_proj_bias, 0.1)
        elif isinstance(module, _NORMS):
            uniform(module.weight, 0.5, 1.5)
            normal(getattr(module, "bias", None), 0.3)
            if isinstance(module, _BATCH_NORMS):
                normal(module.running_mean, 0.3)
                uniform(module.running_var, 0.5, 2.0)
        elif not type(module).__module__.startswith("torch.nn."):
            for parameter in module.parameters(recurse=False):
                uniform(parameter, 0.5, 1.5)
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(sign)


def _separate_projections(attention: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Tensor) -> None:
    """Scale each convolution and linear layer, in place, so that its output on `inputs` has std 1.

    One forward pass. Without it deep networks vanish or blow up in eval mode, where BatchNorm with drawn
    statistics normalizes nothing, and a wrong channel disappears in rounding or in a saturated gate.
    """
    done: set[nn.Module] = set()

    def scale(module: nn.Module, _: object, output: Tensor) -> Tensor | None:
        assert isinstance(module, _CONTRACTIONS)
        std = output.std().item()
        if module in done or not std > 0:  # used twice, or one value only
            return None
        done.add(module)
        module.weight.div_(std)
        if module.bias is not None:
            module.bias.div_(std)
        return output / std

    handles = [m.register_forward_hook(scale) for m in model.modules() if isinstance(m, _CONTRACTIONS)]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
