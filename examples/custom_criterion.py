"""Your own criterion that looks at data: say what it reads, and score what you are given.

python examples/custom_criterion.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.passes import ChannelPruner, CompensateBias, Layer, RecalibrateBatchNorm, Speedup


class VariancePruner(ChannelPruner):
    """Masks the channels whose activation varies least over samples and positions: a constant says nothing."""

    reads = "activation"  # or "gradient", which needs the task's loss; weights are always there

    def score(self, layer: Layer) -> Tensor:
        return layer.activation.var(dim=1)


def network() -> nn.Module:
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)).eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> fxcompress.TracedModule:
    torch.manual_seed(0)
    model = network()
    batches = [(torch.randn(16, 3, 12, 12), torch.randint(0, 10, (16,))) for _ in range(4)]
    task, x = fxcompress.Task(batches=batches, loss=loss), batches[0][0]
    passes = [VariancePruner(0.5, batches=3), CompensateBias(), RecalibrateBatchNorm(), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=x, task=task)
    print(fxcompress.sparsity(small, dense=model))
    return small


if __name__ == "__main__":
    main()
