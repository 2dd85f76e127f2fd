"""How long each stage of a compression takes, counted in forward passes of the model it compresses.

One thread, 224x224, batch 1. Every round measures every model: each stage of
`compress(model, [L1FilterPruner(0.5), Speedup()], example_inputs=x)` by itself, that call as a whole, and forward
passes before and after, by turns. A time is divided by the dense forward pass of its own round, and the medians over
the rounds are shown. What is measured is processor time, which a busy machine changes less than the time on the wall;
with one thread on an idle machine they are the same.
"""

import copy
import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import TypeVar

import torch
from model_zoo import build
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from fxcompress.inputs import Inputs
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.pipeline import run_pass
from fxcompress.verify import verify

MODELS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121")
STAGES = ("trace", "analyse", "mask", "remove", "verify", "compress")
Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that a call takes, and what it gives; it does not pay for the garbage of the one before."""
    gc.collect()
    start = process_time()
    result = function()
    return process_time() - start, result


@torch.no_grad()
def forward_passes(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Median seconds of a forward pass of each; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(16):
        for name, model in models.items():
            start = process_time()
            model(x)
            if turn:  # the first pass allocates
                seconds[name].append(process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


def one_round(model: nn.Module, x: Tensor) -> tuple[dict[str, float], nn.Module]:
    """Seconds of every stage, of the whole call and of the forward passes before and after; and the removed model."""
    seconds: dict[str, float] = {}
    prune, remove = L1FilterPruner(0.5), Speedup()
    context = fxcompress.Context(inputs=Inputs.parse(x), verify=False)  # verification is a stage of its own
    seconds["trace"], traced = timed(lambda: fxcompress.trace(model, x))
    seconds["analyse"], _ = timed(lambda: context.groups(traced))  # kept by the context for the passes below
    seconds["mask"], masked = timed(lambda: run_pass(prune, traced, context).module)
    reference = copy.deepcopy(masked)
    seconds["remove"], removed = timed(lambda: run_pass(remove, masked, context).module)
    seconds["verify"], _ = timed(lambda: verify(reference, removed, Inputs.parse(x)))
    whole = partial(fxcompress.compress, model, [prune, remove], example_inputs=x, progress=False)
    seconds["compress"], _ = timed(whole)
    seconds.update(forward_passes({"dense": model, "removed": removed}, x))
    return seconds, removed


def row(model: nn.Module, removed: nn.Module, x: Tensor, rounds: list[dict[str, float]]) -> list[str]:
    """The cells of one model."""
    dense, small = (fxcompress.count(each, x) for each in (model, removed))
    stages = [median(seconds[stage] / seconds["dense"] for seconds in rounds) for stage in STAGES]
    gains = sorted(seconds["dense"] / seconds["removed"] for seconds in rounds)
    return [
        f"{median(seconds['dense'] for seconds in rounds) * 1e3:.0f} ms",
        *(f"{stage:.1f}" for stage in stages),
        f"{dense.macs / small.macs:.2f}",
        f"{median(gains):.2f}",
        f"{gains[0]:.2f} to {gains[-1]:.2f}",
    ]


def stages(rounds: int) -> tuple[Table, str]:
    """A row for each model, and what the columns mean."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    models = {name: build(name)[0] for name in MODELS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    results: dict[str, nn.Module] = {}
    for number in track(range(rounds + 1), "stages", transient=True):
        for name, model in models.items():
            seconds, results[name] = one_round(model, x)
            if number:  # the first round loads and allocates
                found[name].append(seconds)
    table = Table(title="Stages, and what is gained", box=box.SIMPLE)
    for header in ("forward", *STAGES, "MACs", "latency", "in the rounds"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, model in models.items():
        table.add_row(name, *row(model, results[name], x, found[name]))
    note = "trace to compress: time in forward passes of the dense model. MACs, latency: dense / removed."
    return table, note
