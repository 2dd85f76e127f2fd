"""Your own pruning schedule in under ten lines, around a criterion that comes with the library.

python examples/custom_schedule.py
"""

import math

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, ScheduledPruner, Speedup


class CosinePruner(ScheduledPruner):
    """Prunes slowly at first and at last: s_t = s_f + (s_i - s_f) * (1 + cos(pi * t/n)) / 2."""

    def remaining(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> fxcompress.TracedModule:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()
    images = torch.randn(8, 16, 1, 10, 10)
    batches = [(x, (x.mean((1, 2, 3)) > 0).long()) for x in images]

    task = fxcompress.Task(batches=batches, loss=loss, optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3))
    passes = [CosinePruner(L1FilterPruner(0.75), iterations=4), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=images[0], task=task)
    for step in small.meta["history"]:
        print(step.name, *step.notes, sep="\n    ")
    print(fxcompress.report(model, small, images[0]))
    return small


if __name__ == "__main__":
    main()
