"""Masks that somebody gave, where coupled layers disagree."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray, IntArray


def conflicts(groups: ChannelGroups, masks: Mapping[str, Tensor]) -> list[str]:
    """Where one layer of a group masks a channel and another keeps it, so that it stays: a line for each group.

    Args:
        groups: the channel analysis.
        masks: by parameter, True = keep.
    """
    found = []
    for group in groups:
        split, by, keeping = _disagreement(group, masks)
        if len(split):
            shown = ", ".join(map(str, split[:5].tolist())) + (", ..." if len(split) > 5 else "")
            found.append(
                f"the masks disagree on {len(split)} of the {group.width} channels of {group.name} ({shown}), which "
                f"stay: {', '.join(by)} would lose them, {', '.join(keeping)} would not. Mask them in all of these "
                "layers to remove them."
            )
    return found


def _disagreement(group: Group, masks: Mapping[str, Tensor]) -> tuple[IntArray, list[str], list[str]]:
    """The channels that some of the producing layers mask and others keep; the layers that mask, those that keep."""
    kept: dict[str, BoolArray] = {}
    there: dict[str, BoolArray] = {}
    for item in group.slices:
        mask = masks.get(item.parameter)
        lines = None if mask is None else item.lines(mask)
        lives = np.ones(len(item.rows), dtype=bool)
        if lines is not None:
            lives = lines.reshape(len(lines), -1).any(1).cpu().numpy()[item.rows]
        there.setdefault(item.layer, np.zeros(group.width, dtype=bool))[item.channels] = True
        kept.setdefault(item.layer, np.zeros(group.width, dtype=bool))[item.channels[lives]] = True
    nothing = np.zeros(group.width, dtype=bool)
    masked = {layer: there[layer] & ~kept[layer] for layer in there}
    some = np.logical_or.reduce([nothing, *masked.values()])
    alive = np.logical_or.reduce([nothing, *kept.values()])
    split = some & alive
    by = [layer for layer, gone in masked.items() if (gone & split).any()]
    keeping = [layer for layer, lives in kept.items() if (lives & split).any()]
    return np.flatnonzero(split), by, keeping
