"""How long pruning takes, beside torch-pruning in the same process.

Ours: `compress(model, [L1FilterPruner(0.5), Speedup()], verify=False)`: trace, analysis, masks and removal, on a copy
of the model. Theirs: `MagnitudePruner(model, ratio 0.5)` and `step()`: dependency graph and removal, in place (the copy
that they work on is not timed). By turns, one thread, 224x224, batch 1; processor time, medians of the rounds. What
verification adds to ours is shown beside it.
"""

from __future__ import annotations

import copy
import warnings
from statistics import median

import torch
from model_zoo import build
from rich import box
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fxcompress
from benchmarks.networks import residual_network
from benchmarks.stages import timed
from fxcompress.passes import L1FilterPruner, Speedup

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "densenet201",
    "convnext_tiny",
    "efficientnet_v2_s",
)
#: Blocks in each of three stages of a residual network: 20 to 1,004 layers.
DEPTHS = (3, 18, 56, 167)


def ours(model: nn.Module, x: Tensor, *, verify: bool = False) -> float:
    """Seconds for a copy of the model without half of its channels."""
    passes = [L1FilterPruner(0.5), Speedup()]
    return timed(lambda: fxcompress.compress(model, passes, example_inputs=x, verify=verify, progress=False))[0]


def theirs(model: nn.Module, x: Tensor) -> float:
    """Seconds for torch-pruning to do the same to the model itself."""
    import torch_pruning

    work = copy.deepcopy(model)
    classifiers = [item for item in work.modules() if isinstance(item, nn.Linear) and item.out_features == 1000]

    def prune() -> None:
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        torch_pruning.pruner.MagnitudePruner(
            work, x, importance=importance, pruning_ratio=0.5, ignored_layers=list[nn.Module](classifiers)
        ).step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside layers
        return timed(prune)[0]


def beside_the_peer(rounds: int, models: tuple[str, ...] = MODELS) -> Table:
    """A row for each model: seconds of both, their ratio, and what verification adds."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    table = Table(title="Half of the channels removed: seconds", box=box.SIMPLE)
    for header in ("model", "fxcompress", "torch-pruning", "ratio", "verification"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name in models:
        model, _ = build(name)
        ours(model, x)
        theirs(model, x)  # the first run loads and allocates
        times = [
            (ours(model, x), theirs(model, x), ours(model, x, verify=True))
            for _ in track(range(rounds), name, transient=True)
        ]
        mine, peer, checked = (median(column) for column in zip(*times, strict=True))
        table.add_row(name, f"{mine:.2f}", f"{peer:.2f}", f"{mine / peer:.2f}", f"+{checked - mine:.2f}")
    return table


def by_depth(rounds: int) -> Table:
    """Seconds for residual networks of 20 to 1,004 layers, and per layer."""
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    table = Table(title="By depth: residual networks, 32x32, widths 16 to 64", box=box.SIMPLE)
    for header in ("layers", "seconds", "ms per layer"):
        table.add_column(header, justify="right")
    for blocks in DEPTHS:
        model = residual_network(blocks)
        layers = sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model.modules())
        seconds = median(ours(model, x) for _ in range(rounds))
        table.add_row(f"{layers:,}", f"{seconds:.2f}", f"{seconds / layers * 1e3:.1f}")
    return table
