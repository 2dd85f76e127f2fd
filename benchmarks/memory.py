"""Peak memory of a compression: the caller's model included, verification off.

`python -m benchmarks.memory resnet50` measures one model, which needs a process of its own; `peaks` runs those. The
allocator is told to hand back what is freed (MALLOC_TRIM_THRESHOLD_), so that what is in use is seen.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich import box
from rich.table import Table

MODELS = ("resnet50", "densenet201", "vit_b_16", "vgg16_bn")


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Most bytes that the process held since :func:`start_again`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def start_again() -> None:
    """Forget the peak so far."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str) -> dict[str, float]:
    """Bytes of the weights, of a forward pass, and of compressing, above what the process held before the model."""
    from model_zoo import build

    import fxcompress
    from fxcompress.passes import L1FilterPruner, Speedup

    torch.set_num_threads(1)
    passes = [L1FilterPruner(0.5), Speedup()]
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    small, _ = build("squeezenet1_1")
    fxcompress.compress(small, passes, example_inputs=x, verify=False, progress=False)  # loads what is loaded once
    gc.collect()
    before = resident()
    model, _ = build(name)
    start_again()
    held = resident()
    with torch.no_grad():
        model(x)
    forward = peak() - held
    start_again()
    fxcompress.compress(model, passes, example_inputs=x, verify=False, progress=False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    return {"weights": weights, "forward": forward, "peak": peak() - before}


def peaks() -> Table:
    """A row for each model: its weights, one forward pass, and the peak as a multiple of the weights."""
    table = Table(title="Peak memory (MB), the caller's model included", box=box.SIMPLE)
    for header in ("model", "weights", "forward", "peak", "(peak - forward) / weights"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name in MODELS:
        command = [sys.executable, "-m", "benchmarks.memory", name]
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        ratio = (found["peak"] - found["forward"]) / found["weights"]
        megabytes = (f"{found[key] / 1e6:.0f}" for key in ("weights", "forward", "peak"))
        table.add_row(name, *megabytes, f"{ratio:.2f}")
    return table


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    print(json.dumps(measure(sys.argv[1])))
