"""What searches are tested on: a small residual network, and tasks that other processes can import."""

import time
from collections.abc import Iterator

import torch
from nets import scatter
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import Budget, Task
from fxcompress.passes import L1FilterPruner, SimulatedAnnealingPruner

X = torch.randn(16, 3, 7, 9, generator=torch.Generator().manual_seed(1))
#: 3 temperatures of 4 candidates, besides the first two trials.
ANNEALING = SimulatedAnnealingPruner(Budget(macs=0.5), start=0.8, stop=0.1, cooling=0.5, trials_per_temperature=4)
TRIALS = 14


class Residual(nn.Module):
    """Three groups: the stem's, which the block's second convolution shares, the block's, and the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.conv1, self.norm1 = nn.Conv2d(11, 13, 3, padding=1, bias=False), nn.BatchNorm2d(13)
        self.conv2, self.norm2 = nn.Conv2d(13, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.last, self.head = nn.Conv2d(11, 17, 3, stride=2), nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(F.relu(self.last(x)).mean(dim=(2, 3)))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Residual()
        scatter(made)
    return made.eval()


with torch.no_grad():
    TARGETS = network()(X)


def score(model: nn.Module) -> float:
    """How near the outputs are to those of the dense network: 1 for the same."""
    with torch.no_grad():
        return float(1 - F.mse_loss(model(X), TARGETS) / TARGETS.var())


def distance(model: nn.Module) -> float:
    """0 for the dense network, and lower for all others."""
    return score(model) - 1


def failing(model: nn.Module) -> float:
    """Fails for two thirds of the candidates, and for the dense network not."""
    value = score(model)
    if value < 0.999 and int(value * 1e6) % 3:
        raise RuntimeError(f"no score at {value:.3f}")
    return value


def noisy(model: nn.Module) -> float:
    """Depends on the seed of its trial."""
    return score(model) + 0.1 * float(torch.rand(()))


def quitting(model: nn.Module) -> float:
    """Ends its process for half of the candidates."""
    value = score(model)
    if value < 0.999 and int(value * 1e6) % 2:
        raise SystemExit("enough")
    return value


def _dampened(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * 0.9


def careless(model: nn.Module) -> float:
    """Leaves traces in everything that a model has."""
    model.train()
    model(X)
    model.eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor * 0.9)
    for parameter in model.parameters():
        parameter.requires_grad_(False).data = parameter.data.double().float()
    model.register_forward_hook(_dampened)
    model.extra = nn.Linear(2, 2)
    return score(model)


def slow(model: nn.Module) -> float:
    """Waits and computes, a quarter of a second each on an idle machine."""
    time.sleep(0.25)
    end = time.process_time() + 0.05
    while time.process_time() < end:
        model(X)
    return score(model)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, 16, 8):
        yield X[start : start + 8], TARGETS[start : start + 8]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)  # type: ignore[arg-type]


TASK = Task(score=score)
TRAINED = Task(score=score, batches=batches, loss=loss, optimizer=adam)
UNIFORM = L1FilterPruner(budget=Budget(macs=0.5))
