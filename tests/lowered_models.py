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


class Encoder(nn.Module):
    """A BERT-like classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=500, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768,
            max_position_embeddings=64, num_labels=20,
        )  # fmt: skip
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
        share: of all integers that differ, in the worst node.
        gap: largest relative difference of a float node.
        clear: inputs whose simulated top-1 margin exceeds one step of the output.
        agree: share of these with the same top-1.
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
    classes: int
    bytes: float
    int8: str

    def __str__(self) -> str:
        return (
            f"{self.name:20} {self.steps:5} {self.share:9.1e} {self.gap:9.1e} {self.clear:6} {self.agree:8.2%} "
            f"{self.classes:7} {self.bytes:7.3f}  {self.int8}"
        )


HEAD = f"{'model':20} {'steps':>5} {'share':>9} {'float':>9} {'clear':>6} {'top-1':>8} {'classes':>7} {'bytes':>7}"


def examples(name: str, count: int, seed: int = 0) -> Tensor:
    """Inputs that differ in more than noise: images are blurred to different degrees and shifted in colour."""
    generator = torch.Generator().manual_seed(seed)
    if name == "bert":
        return torch.randint(0, 500, (count, 32), generator=generator)
    noise = torch.randn(count, 3, 64, 64, generator=generator)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    mixed = torch.rand(count, 1, 1, 1, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return mixed * noise + 2 * (1 - mixed) * nn.functional.interpolate(coarse, size=64, mode="bilinear") + colour


def float_model(name: str) -> nn.Module:
    """The model in eval mode, its weights away from defaults and its values of order one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    randomize(model, 0)
    calibrate(model, examples(name, 8, seed=1))
    classifier = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():  # without it nearly all inputs would be of one class
        classifier.bias -= model(examples(name, 64, seed=4)).mean(0)
    return model


def quantized(name: str) -> tuple[nn.Module, fxcompress.TracedModule]:
    """The float model, and its simulation with ranges of 64 inputs."""
    model = float_model(name)
    task = fxcompress.Task(batches=list(examples(name, 64, seed=2).split(16)))
    simulated = fxcompress.compress(
        model, [PTQQuantizer()], example_inputs=examples(name, 2), task=task, verify=False, progress=False
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
    right, made = (
        torch.cat([item(part) for part in examples(name, count, seed=9).split(50)]) for item in (simulated, lowered)
    )
    best = right.topk(2).values
    clear = best[:, 0] - best[:, 1] > (right.max() - right.min()) / 255
    agree = right.argmax(1) == made.argmax(1)
    assert_same_everywhere(name, simulated, lowered)
    return Row(
        name,
        max(item.steps or 0 for item in found),
        max(item.share for item in found),
        max(item.difference for item in found),
        int(clear.sum()),
        float(agree[clear].double().mean()),
        len(right.argmax(1).unique()),
        stored(lowered) / stored(model),
        next(note for note in lowered.meta["history"][-1].notes if "layers run in int8" in note),
    )


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
