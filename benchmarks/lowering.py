"""How fast lowered models are: processor time of a forward pass, as a multiple of torch's eager float32.

One thread, 224x224 (64 tokens for the encoder). All columns of a model take turns in every round; each time is divided
into that of eager float32 in the same round, and the medians of these gains are shown. A competitor whose package is
not installed, or that cannot take the model, has a dash and a line below the table. Ranges of the fake-quantized model
are those of the input: time does not depend on them.
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from statistics import median
from time import process_time

import model_zoo
import torch
import torchvision
from fake_quantized import fake_quantized
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from benchmarks.competitors import COMPETITORS, Call, silently
from fxcompress.passes import Lower

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "densenet121",
    "vgg11_bn",
    "bert, 2 layers",
    "vit_b_16",
)


def prepared(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model with drawn weights, and its input."""
    torch.manual_seed(0)
    if name.startswith("bert"):
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(num_hidden_layers=2)).eval(), torch.randint(0, 30000, (batch, 64))
    model = torchvision.models.get_model(name, weights=None).eval()
    model_zoo.randomize(model, 0)
    model_zoo.calibrate(model, torch.randn(1, 3, 224, 224))
    return model, torch.randn(batch, 3, 224, 224)


def lowered(model: nn.Module, x: Tensor, dtype: str) -> Call:
    """The model through :class:`Lower`."""
    source = fake_quantized(model, x) if dtype == "int8" else model
    made = fxcompress.compress(source, [Lower(dtype=dtype)], example_inputs=x, verify=False, progress=False)
    return lambda: made(x)


def columns(model: nn.Module, x: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """What is compared, ready to be called, and why the rest is not."""
    made: dict[str, Call] = {"eager": lambda: model(x)}
    absent: dict[str, str] = {}
    for title, packages, make in COMPETITORS:
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            absent[title] = f"{', '.join(missing)} not installed"
            continue
        try:
            made[title] = silently(make, model, x)
        except Exception as error:  # noqa: BLE001 - whatever a competitor raises, the others are measured
            absent[title] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    for dtype in ("float32", "bfloat16", "int8"):
        made[f"Lower {dtype}"] = lowered(model, x, dtype)
    return made, absent


@torch.no_grad()
def gains(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each, and median gain over eager."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = process_time()
            call()
            if turn > 1:  # the first passes pack, compile and allocate
                seconds[name].append(process_time() - start)
    eager = seconds["eager"]
    return {
        name: (median(times) * 1e3, median(e / t for e, t in zip(eager, times, strict=True)))
        for name, times in seconds.items()
    }


def lowering(rounds: int, names: tuple[str, ...] = MODELS, batches: tuple[int, ...] = (1, 8)) -> Table:
    """A row for each model and batch size; a competitor that could not run has a dash, and the caption says why."""
    titles = [title for title, _, _ in COMPETITORS] + [f"Lower {dtype}" for dtype in ("float32", "bfloat16", "int8")]
    table = Table(title="Lowering: times eager float32", box=box.SIMPLE, caption_justify="left")
    for title in ("model", "batch", "eager", *titles):
        table.add_column(title, justify="right" if title != "model" else "left")
    why: list[str] = []
    for name in track(names, "lowering", transient=True):
        for batch in batches:
            model, x = prepared(name, batch)
            calls, absent = columns(model, x)
            found = gains(calls, max(rounds, 10))
            cells = [f"{found[title][1]:.1f}" if title in found else "-" for title in titles]
            table.add_row(name, str(batch), f"{found['eager'][0]:.0f} ms", *cells)
            why += [f"{name}, batch {batch}: {title}: {reason}" for title, reason in absent.items()]
            torch.compiler.reset()
            gc.collect()
    table.caption = "\n".join(why) or None
    return table
