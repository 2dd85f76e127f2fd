"""Print the generated part of groups.md: the channel groups of two models, dependencies, and what `explain` says.

PYTHONPATH=tests python docs/make_groups.py
"""

import sys
from collections.abc import Iterator

import model_zoo
import torch
from torch import Tensor, nn

import fxcompress


class Small(nn.Module):
    """A residual block of which the inside is a grouped convolution and a norm over groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.reduce, self.grouped, self.expand = (
            nn.Conv2d(32, 24, 1),
            nn.Conv2d(24, 24, 3, 1, 1, groups=8),
            nn.Conv2d(24, 32, 1),
        )
        self.norm = nn.GroupNorm(4, 24)
        self.gate = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.expand(self.norm(self.grouped(self.reduce(x))))
        return x * torch.sigmoid(self.gate(x))


def page() -> str:
    resnet, mobilenet = groups_of("resnet18"), groups_of("mobilenet_v2")
    return "\n".join(
        [
            *("## resnet18", "", *table(resnet), ""),
            "One channel of the group `conv1` is one slice of each of these (parameter or buffer, dimension):",
            *("", *(f"    {name}[{dim}]" for name, dim in resnet["conv1"].members), ""),
            *("## mobilenet_v2", "", *table(mobilenet), ""),
            *("## Dependencies", "", *dependencies(resnet, "coupled"), *dependencies(resnet, "shared_inputs")),
            *dependencies(fxcompress.channel_groups(Small(), torch.randn(1, 3, 16, 16)), "grouped"),
            *("## A coupled layer", "", *explanation(resnet, "layer1.0.conv2"), ""),
            *("## A frozen layer", "", *explanation(resnet, "fc")),
        ]
    )


def groups_of(name: str) -> fxcompress.ChannelGroups:
    model, x = model_zoo.build(name)
    return fxcompress.channel_groups(model, x)


def table(groups: fxcompress.ChannelGroups) -> Iterator[str]:
    yield "| group | channels | produced by | cut | removable |"
    yield "|---|--:|---|--:|---|"
    for group in groups:
        removable = "yes" if group.removable else f"no: {group.reason}"
        yield f"| `{group.name}` | {group.width:,} | {code(group.layers)} | {len(group.members)} | {removable} |"
    yield ""
    yield f"Removable: {groups.removable:,} channels."


def dependencies(groups: fxcompress.ChannelGroups, name: str) -> Iterator[str]:
    model = "a block with a grouped convolution and a GroupNorm" if name == "grouped" else "resnet18"
    yield f"`groups.{name}` of {model}:"
    yield ""
    yield from (f"    {line}".rstrip() for line in str(getattr(groups, name)).splitlines())
    yield ""


def code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def explanation(groups: fxcompress.ChannelGroups, layer: str) -> Iterator[str]:
    yield f"`groups.explain({layer!r})`:"
    yield ""
    yield from (f"    {line}" for line in groups.explain(layer).splitlines())


if __name__ == "__main__":
    sys.stdout.write(page() + "\n")
