"""Print the generated part of groups.md: the channel groups of two models, and what `explain` says.

PYTHONPATH=tests python docs/make_groups.py
"""

import sys
from collections.abc import Iterator

import model_zoo

import fxcompress


def page() -> str:
    resnet, mobilenet = groups_of("resnet18"), groups_of("mobilenet_v2")
    return "\n".join(
        [
            *("## resnet18", "", *table(resnet), ""),
            "One channel of the group `conv1` is one slice of each of these (parameter or buffer, dimension):",
            *("", *(f"    {name}[{dim}]" for name, dim in resnet["conv1"].members), ""),
            *("## mobilenet_v2", "", *table(mobilenet), ""),
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


def code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def explanation(groups: fxcompress.ChannelGroups, layer: str) -> Iterator[str]:
    yield f"`groups.explain({layer!r})`:"
    yield ""
    yield from (f"    {line}" for line in groups.explain(layer).splitlines())


if __name__ == "__main__":
    sys.stdout.write(page() + "\n")
