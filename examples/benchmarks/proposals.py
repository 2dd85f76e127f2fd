"""How fast annealing prices candidates: 10,000 allocations of resnet50 that meet a budget; no model is built.

    python examples/benchmarks/proposals.py [model] [count]

The random weights of a torchvision model do: nothing is scored. Exits with 1 if it takes longer than 2 seconds.
"""

import sys
import time

import numpy as np
import torch
from model_zoo import build

import fxcompress
from fxcompress import Budget, Context
from fxcompress.inputs import Inputs
from fxcompress.passes import SimulatedAnnealingPruner


def main(name: str = "resnet50", count: str = "10000") -> int:
    torch.set_num_threads(1)
    model, x = build(name)
    pruner = SimulatedAnnealingPruner(Budget(macs=0.5))
    module = fxcompress.trace(model, x)
    ground = pruner.ground(module, Context(inputs=Inputs.parse(x)))
    rng = np.random.default_rng(0)
    start, used = time.perf_counter(), time.process_time()
    kept = pruner.perturbed(np.full(len(ground.free), 0.5), 1.0, int(count), ground, rng)
    proposals = ground.proposals(kept)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    costs = np.array([each.cost["macs"] for each in proposals])
    print(f"{name}: {len(proposals)} proposals of {kept.shape[1]} groups in {seconds:.2f} s ({used:.2f} s of one core)")
    print(f"MACs from {costs.min():.4f} to {costs.max():.4f} of the dense model; {len(np.unique(kept, axis=0))} differ")
    return int(used > 2)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
