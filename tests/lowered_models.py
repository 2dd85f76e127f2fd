"""Ten models lowered to int8 and compared with their simulations: `python tests/lowered_models.py [name ...]`.

What is measured: every node given the simulation's values; the largest output over many inputs; what the state_dict
takes on disk; and whether copies, files and threads compute the same.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import calibrate, randomize  # before torchvision
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.lower.agreement import agreement
from fxcompress.passes import Lower, PTQQuantizer
from fxcompress.verify import default_dtype, precise


class Encoder(nn.Module):
    """A BERT-like classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=500, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768,
            max_position_embeddings=64,
        )  # fmt: skip
        config.num_labels = 20
        self.inner = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=tokens).logits
        return logits


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return made

    return make


#: Small images where the architecture allows it, so that a thousand of them go through a simulation in a minute.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "vgg11_bn": _torchvision("vgg11_bn"),
    "densenet121": _torchvision("densenet121"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "vit_b_16": _torchvision("vit_b_16", image_size=64),
    "bert": Encoder,
}


@dataclass(frozen=True)
class Row:
    """What was found for one model.

    Attributes:
        name: of the model.
        steps: the largest difference of any node from the simulation, in quantization steps.
        share: of all integers of all nodes that differ. Not of the worst node: a mean of integers often lies in the
            middle between two, where the last bit of a float decides (4 % of what vgg11_bn's pooling gives).
        gap: largest relative difference of a float node.
        clear: inputs whose simulated top-1 margin exceeds one step of the output.
        agree: share of these with the same top-1.
        control: share of these on which the simulation in float64 agrees with itself in float32: rounding at ties,
            which a deep random network amplifies until it is as large as the noise of quantization. 1 where that was
            not needed.
        classes: how many different classes are top-1 in the simulation.
        bytes: of the lowered state_dict on disk, as a fraction of the float32 one's.
        int8: layers that run in int8, of all (from the notes).
    """

    name: str
    steps: int
    share: float
    gap: float
    clear: int
    agree: float
    control: float
    classes: int
    bytes: float
    int8: str

    def __str__(self) -> str:
        return (
            f"{self.name:20} {self.steps:5} {self.share:9.1e} {self.gap:9.1e} {self.clear:6} {self.agree:8.2%} "
            f"{self.control:8.2%} {self.classes:7} {self.bytes:7.3f}  {self.int8}"
        )


HEAD = (
    f"{'model':20} {'steps':>5} {'share':>9} {'float':>9} {'clear':>6} {'top-1':>8} {'control':>8} "
    f"{'classes':>7} {'bytes':>7}"
)


#: Of which inputs are drawn.
CLASSES = 10


def examples(name: str, count: int, seed: int = 0) -> Tensor:
    """Inputs of :data:`CLASSES` classes: noisy images of a pattern each, or tokens of which nine in ten are typical."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels(count, seed)
    if name == "bert":
        typical = classes[:, None] * 50 + torch.randint(0, 50, (count, 32), generator=generator)
        anything = torch.randint(0, 500, (count, 32), generator=generator)
        return torch.where(torch.rand(count, 32, generator=generator) < 0.9, typical, anything)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(77))
    coarse = patterns[classes] + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    noise = torch.randn(count, 3, 64, 64, generator=generator)
    return 1.5 * nn.functional.interpolate(coarse, size=64, mode="bilinear") + 0.3 * noise


def labels(count: int, seed: int) -> Tensor:
    """The classes of :func:`examples`."""
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(1000 + seed))


def float_model(name: str) -> nn.Module:
    """The model in eval mode: weights away from defaults, values of order one, its classifier fitted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    randomize(model, 0)
    calibrate(model, examples(name, 8, seed=1))
    _fit(model, examples(name, 400, seed=4), labels(400, 4))
    return model


@torch.no_grad()
def _fit(model: nn.Module, x: Tensor, classes: Tensor) -> None:
    """Give the last linear layer the ridge regression of one-hot targets, so that its decisions are decisions."""
    classifier = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    for part in x.split(50):
        model(part)
    handle.remove()
    features = torch.cat(seen)
    mean = features.mean(0)
    targets = nn.functional.one_hot(classes * (classifier.out_features // CLASSES), classifier.out_features).double()
    centred = features - mean
    gram = centred @ centred.T
    ridge = 0.01 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weight = centred.T @ torch.linalg.solve(gram + ridge, targets - targets.mean(0))
    classifier.weight.copy_(weight.T)
    classifier.bias.copy_(targets.mean(0) - mean @ weight)


def quantized(name: str) -> tuple[nn.Module, fxcompress.TracedModule]:
    """The float model, and its simulation with ranges of 64 inputs."""
    model = float_model(name)
    task = fxcompress.Task(batches=list(examples(name, 64, seed=2).split(16)))
    simulated = fxcompress.compress(
        model,
        [PTQQuantizer(embeddings=True)],
        example_inputs=examples(name, 2),
        task=task,
        verify=False,
        progress=False,
    )
    return model, simulated


def lowered_of(name: str, simulated: fxcompress.TracedModule) -> fxcompress.TracedModule:
    """Lowered, and checked by the pipeline."""
    return fxcompress.compress(simulated, [Lower()], example_inputs=examples(name, 2), progress=False)


def measure(name: str, count: int = 1000) -> Row:
    """Quantize, lower and compare one model."""
    model, simulated = quantized(name)
    lowered = lowered_of(name, simulated)
    found = [
        item
        for batch in (1, 5)
        for item in agreement(simulated, lowered, Inputs.parse(examples(name, batch, seed=3 + batch)))
    ]
    rounded = [item for item in found if item.steps is not None]
    right, made = (
        torch.cat([item(part) for part in examples(name, count, seed=9).split(50)]) for item in (simulated, lowered)
    )
    best = right.topk(2).values
    clear = best[:, 0] - best[:, 1] > (right.max() - right.min()) / 255
    agree = right.argmax(1) == made.argmax(1)
    share = float(agree[clear].double().mean())
    control = 1.0 if share >= 0.995 else _control(name, count, simulated, right, clear)
    assert_same_everywhere(name, simulated, lowered)
    return Row(
        name,
        max(item.steps or 0 for item in found),
        sum(item.share * item.elements for item in rounded) / sum(item.elements for item in rounded),
        max(item.difference for item in found),
        int(clear.sum()),
        share,
        control,
        len(right.argmax(1).unique()),
        stored(lowered) / stored(model),
        next(note for note in lowered.meta["history"][-1].notes if "layers run in int8" in note),
    )


def _control(name: str, count: int, simulated: fxcompress.TracedModule, right: Tensor, clear: Tensor) -> float:
    """How often the simulation agrees with itself in float64."""
    exact = precise(simulated).eval()
    with default_dtype(torch.float64):
        parts = (
            part.double() if part.is_floating_point() else part for part in examples(name, count, seed=9).split(50)
        )
        found = torch.cat([exact(part) for part in parts])
    return float((found.argmax(1) == right.argmax(1))[clear].double().mean())


def stored(model: nn.Module) -> int:
    """Bytes of the state_dict on disk."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def assert_same_everywhere(name: str, simulated: fxcompress.TracedModule, lowered: fxcompress.TracedModule) -> None:
    """Copies, files, a loaded state_dict and threads compute what the module does, bit by bit."""
    x = examples(name, 3, seed=5)
    expected = lowered(x)
    buffer = io.BytesIO()
    torch.save(lowered, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    state = io.BytesIO()
    torch.save(lowered.state_dict(), state)
    state.seek(0)
    other = copy.deepcopy(lowered)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(state, weights_only=True))
    for twin in (loaded, copy.deepcopy(lowered), other):
        assert torch.equal(twin(x), expected), name
    fresh = copy.deepcopy(lowered)  # nothing is packed yet: the threads race to do it
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(made, expected) for made in pool.map(lambda _: fresh(x), range(8))), name


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    with torch.no_grad():
        for name in sys.argv[1:] or MODELS:
            print(measure(name), flush=True)


if __name__ == "__main__":
    main()
