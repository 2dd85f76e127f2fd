"""How fast lowered models are: processor time of a forward pass, as a multiple of torch's eager float32.

One thread, 224x224 (64 tokens for the encoder). Every column is a process of its own, because what one packs changes
what another is given (onednn keeps primitives by shape, and weights that were packed for a neighbour's are reordered at
every call). The processes take turns: in every round each runs once to warm up and once on the clock, and its time is
divided into that of eager float32 in the same round; the medians of these gains are shown. A column whose package is
not installed, or that cannot take the model, has a dash and a line below the table. Ranges of the fake-quantized model
are those of the input: time does not depend on them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
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
from benchmarks.competitors import Call, compiled, onnx_runtime, onnx_runtime_int8, openvino_int8, pt2e, silently
from fxcompress.passes import L1FilterPruner, Lower, PTQQuantizer, Speedup

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
#: Made ready at the same time.
_AT_ONCE = 2


@dataclass(frozen=True)
class Contender:
    """A column of the table.

    Attributes:
        title: of the column.
        make: takes a model in eval mode and its input, and gives a call that runs it.
        packages: that it needs.
    """

    title: str
    make: Callable[[nn.Module, Tensor], Call]
    packages: tuple[str, ...] = ()


def eager(model: nn.Module, x: Tensor) -> Call:
    """torch as it is."""
    return lambda: model(x)


@dataclass(frozen=True)
class Lowered:
    """A model through :class:`Lower`; with half of its channels removed before, if asked for.

    ``symmetric``: activations have zero point 0, and what products of two activations read is rounded too, as in the
    presets for speed of other quantizers.
    """

    dtype: str
    backend: str = "torch"
    pruned: bool = False
    symmetric: bool = False

    def __call__(self, model: nn.Module, x: Tensor) -> Call:
        source = halved(model, x) if self.pruned else model
        passes: list[fxcompress.Pass] = [Lower(self.backend, self.dtype)]
        if self.symmetric:
            passes.insert(0, PTQQuantizer(symmetric=True, product_bits=8))
        elif self.dtype == "int8":
            source = fake_quantized(source, x)
        made = fxcompress.compress(source, passes, example_inputs=x, verify=False, progress=False)
        return lambda: made(x)


def halved(model: nn.Module, x: Tensor) -> nn.Module:
    """Without half of its channels."""
    passes = [L1FilterPruner(0.5), Speedup()]
    return fxcompress.compress(model, passes, example_inputs=x, verify=False, progress=False)


def pruned(model: nn.Module, x: Tensor) -> Call:
    """Eager, without half of its channels."""
    return eager(halved(model, x), x)


CONTENDERS = (
    Contender("eager", eager),
    Contender("compile", compiled),
    Contender("ORT", onnx_runtime, ("onnxruntime", "onnxscript")),
    Contender("ORT int8", onnx_runtime_int8, ("onnxruntime", "onnxscript")),
    Contender("OpenVINO int8", openvino_int8, ("openvino", "nncf")),
    Contender("PT2E int8", pt2e, ("torchao",)),
    Contender("Lower float32", Lowered("float32")),
    Contender("Lower bfloat16", Lowered("bfloat16")),
    Contender("Lower int8", Lowered("int8")),
    Contender("Lower onnx", Lowered("int8", "onnx"), ("onnxruntime", "onnxscript")),
    Contender("Lower openvino", Lowered("int8", "openvino"), ("openvino", "onnxscript")),
    Contender("Lower openvino, symmetric", Lowered("int8", "openvino", symmetric=True), ("openvino", "onnxscript")),
    Contender("pruned", pruned),
    Contender("pruned, int8", Lowered("int8", pruned=True)),
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


def _contend(pipe: Connection, gate: Semaphore, title: str, name: str, batch: int) -> None:
    """A column's process: says None when it is ready, or why it cannot be; then a time for every turn."""
    torch.set_num_threads(1)
    contender = next(item for item in CONTENDERS if item.title == title)
    missing = [package for package in contender.packages if find_spec(package) is None]
    try:
        if missing:
            raise ModuleNotFoundError(f"{', '.join(missing)} not installed")
        with gate:
            call = silently(contender.make, *prepared(name, batch))
    except Exception as error:  # noqa: BLE001 - whatever a competitor raises, the others are measured
        pipe.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
        return
    pipe.send(None)
    with torch.no_grad():
        while pipe.recv():
            call()
            start = process_time()
            call()
            pipe.send(process_time() - start)


def race(name: str, batch: int, rounds: int, titles: list[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each column in every round, and why others have none."""
    context = multiprocessing.get_context("spawn")
    gate = context.Semaphore(_AT_ONCE)
    pipes: dict[str, Connection] = {}
    processes = []
    for title in titles:
        pipes[title], other = context.Pipe()
        processes.append(context.Process(target=_contend, args=(other, gate, title, name, batch), daemon=True))
        processes[-1].start()
        other.close()
    absent = {title: reason for title in titles if (reason := pipes[title].recv()) is not None}
    seconds: dict[str, list[float]] = {title: [] for title in titles if title not in absent}
    for turn in range(rounds + 1):
        for title in seconds:
            pipes[title].send(True)
            taken = pipes[title].recv()
            if turn:  # in the first one memory is still allocated
                seconds[title].append(taken)
    for title in seconds:
        pipes[title].send(False)
    for process in processes:
        process.join()
    return seconds, absent


def lowering(
    rounds: int,
    names: tuple[str, ...] = MODELS,
    batches: tuple[int, ...] = (1, 8),
    titles: tuple[str, ...] = tuple(item.title for item in CONTENDERS),
) -> Table:
    """A row for each model and batch size; a competitor that could not run has a dash, and the caption says why."""
    titles = ("eager", *(title for title in titles if title != "eager"))
    table = Table(title="Lowering: times eager float32", box=box.SIMPLE, caption_justify="left")
    for title in ("model", "batch", *titles):
        table.add_column(title, justify="right" if title != "model" else "left", no_wrap=title == "model")
    why: list[str] = []
    for name in track(names, "lowering", transient=True):
        for batch in batches:
            seconds, absent = race(name, batch, max(rounds, 10), list(titles))
            cells = [f"{median(seconds['eager']) * 1e3:.0f} ms"]
            for title in titles[1:]:
                turns = zip(seconds["eager"], seconds.get(title, []), strict=False)
                gains = [dense / taken for dense, taken in turns]
                cells.append(f"{median(gains):.2f}" if gains else "-")
            table.add_row(name, str(batch), *cells)
            why += [f"{name}, batch {batch}: {title}: {reason}" for title, reason in absent.items()]
    table.caption = "\n".join(why) or None
    return table
