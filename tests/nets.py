"""Small networks written in one expression, and channel groups written in one line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress import Group


class Net(nn.Module):
    """Layers by name and a forward ``step(net, x)``; weights, biases and statistics away from their defaults."""

    def __init__(self, step: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.step = step
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        scatter(self)
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.step(self, *args)

    def __getattr__(self, name: str) -> Any:  # for type checkers: whatever was given
        return super().__getattr__(name)


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Parameters and running statistics in [-1.5, -0.5] or [0.5, 1.5], norms' weights and variances positive."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        value = torch.rand_like(tensor) + 0.5
        owner = model.get_submodule(name.rpartition(".")[0])
        positive = name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1)
        if not positive:
            value = value * (torch.randint(0, 2, tensor.shape) * 2 - 1)
        fan_in = tensor[0].numel() if tensor.dim() > 1 and name.endswith("weight") else 1
        tensor.copy_(value / (fan_in**0.5 if not isinstance(owner, nn.Embedding) else 1))


def members(text: str) -> set[tuple[str, int]]:
    """``"a.weight b.weight:1"`` as (parameter, dimension) pairs; ``bn.*`` are the four tensors of a BatchNorm."""
    found = set()
    for word in text.split():
        name, _, dim = word.partition(":")
        prefix, star, _ = name.partition("*")
        leaves = ("weight", "bias", "running_mean", "running_var") if star else ("",)
        found |= {(prefix + leaf, int(dim or 0)) for leaf in leaves}
    return found


@dataclass
class Expected:
    """A removable group: its width, its members, its rows, and its layers (only its own name by default)."""

    width: int
    members: str
    rows: int = 1
    layers: str = ""

    def of(self, name: str) -> tuple[int, set[tuple[str, int]], int, set[str]]:
        return self.width, members(self.members), self.rows, set((self.layers or name).split())


@dataclass
class Case:
    """A network, its input, its removable groups, and the layers whose group is frozen with part of the reason."""

    net: Callable[[], nn.Module]
    x: Tensor | tuple[Tensor, ...]
    groups: dict[str, Expected]
    frozen: dict[str, str] = field(default_factory=dict)


def described(group: Group) -> tuple[int, set[tuple[str, int]], int, set[str]]:
    return group.width, set(group.members), group.rows, set(group.layers)


def rows_of(group: Group, parameter: str) -> list[list[int]]:
    """For each channel of a group the rows of a parameter that belong to it."""
    found: list[list[int]] = [[] for _ in range(group.width)]
    for item in group.slices:
        if item.parameter == parameter:
            for row, channel in zip(item.rows.tolist(), item.channels.tolist(), strict=True):
                found[channel].append(row)
    return found
