"""Physical removal of masked channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray
from fxcompress.errors import InputError, PassError
from fxcompress.masking import Masking, lay
from fxcompress.module import MASKS, TracedModule
from fxcompress.pipeline import Context, Pass
from fxcompress.plan import settle
from fxcompress.rewrite import rewriting
from fxcompress.shrink import shrink


@dataclass(frozen=True)
class Speedup(Pass):
    """Removes every channel whose slices are masked in all their members; multiplies other masks into the weights.

    The result computes the same function as the masked module in eval mode, and has no mask nodes. With nothing to
    remove it changes nothing.

    Args:
        masks: masks that come from elsewhere, ``{"conv1.weight": bool tensor}``, True = keep, joined with the
            module's own. A channel goes if they mask all its slices, those that consume it included.
    """

    masks: Mapping[str, Tensor] | None = field(default=None, repr=False)

    preserves: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    lifts: ClassVar[bool] = True
    versioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.masks is not None and not isinstance(self.masks, Mapping):
            found = type(self.masks).__name__
            raise InputError(f"masks is a {found}; expected a mapping of parameter name to bool tensor.")

    def requires(self, module: TracedModule, context: Context) -> None:
        """Given masks fit the module's parameters."""
        super().requires(module, context)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, mask in (self.masks or {}).items():
            if name not in parameters:
                example = next(iter(parameters))
                raise InputError(f"masks has {name!r}, which is no parameter; expected names like {example!r}.")
            shape = tuple(parameters[name].shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"masks[{name!r}] is {found}; expected a bool tensor of shape {shape}.")

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """The masked module; with given masks, the module masked with them."""
        if not self.masks:
            return super().reference(module, context)
        masked, own, groups = copy.deepcopy(module), context.masking or Masking(), context.groups(module)
        dead = self._joined(masked, own, groups)[0].dead
        _multiply(masked, self.masks, self.name)
        lay(masked, Masking(own.elements, dead), groups, self.name)
        return masked

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Remove what the masks say."""
        masking, context.masking = context.masking or Masking(), Masking()
        if not self.masks and not masking:
            return module
        groups = context.groups(module)
        masking, notes = self._joined(module, masking, groups)
        context.notes += notes
        live = masking.live(groups.channels)
        before = sum(parameter.numel() for parameter in module.parameters())
        if live.all():
            _multiply(module, masking.elements, self.name)
        else:
            context.align = shrink(module, groups, live, self.name, masking.elements).align
        after = sum(parameter.numel() for parameter in module.parameters())
        context.notes.append(f"{before - after:,} of {before:,} parameters removed")
        return module

    def ensures(self, module: TracedModule, context: Context) -> None:
        """No mask is left."""
        super().ensures(module, context)
        if context.masking or hasattr(module, MASKS) or any("mask" in node.meta for node in module.graph.nodes):
            raise PassError(f"{self.name} left mask nodes in the graph")

    def _joined(self, module: TracedModule, masking: Masking, groups: ChannelGroups) -> tuple[Masking, list[str]]:
        """The module's masking with the given masks, channels dead whose slices are all masked; and what stays."""
        if not self.masks:
            return masking, []
        masking = masking.joined(self.masks)
        channels = groups.channels
        flags = _alive_slices(masking)
        alive = np.zeros(len(channels.component), dtype=bool)
        for axis in channels.facts.ledger.axes:
            if axis.kind == "parameter":
                kept = flags.get((axis.name, axis.dim), np.ones(axis.size, dtype=bool))
                alive[channels.component[axis.start + np.flatnonzero(kept)]] = True
        notes = []
        dead = [np.empty(0, dtype=np.int64)]
        for group in groups:
            masked = _masked_channels(group, flags)
            gone = ~alive[group.components] if group.removable else np.zeros(group.width, dtype=bool)
            dead.append(group.components[gone])
            if (masked & ~gone).any():
                notes.append(_staying(group, masked & ~gone, flags))
        live = settle(module, channels, masking.live(channels) & channels.live(np.concatenate(dead)))
        return masking.with_live(channels, live), notes


def _multiply(module: TracedModule, masks: Mapping[str, Tensor], author: str) -> None:
    """Masks multiplied into the parameters' values."""
    with rewriting(module, author) as rewriter:
        for name, mask in masks.items():
            parameter = module.get_parameter(name)
            rewriter.set_tensor(name, parameter.detach() * mask.to(parameter.device))


def _alive_slices(masking: Masking) -> dict[tuple[str, int], BoolArray]:
    """For every masked parameter axis which slices have an element left."""
    alive = {}
    for name, mask in masking.elements.items():
        for dim in range(mask.dim()):
            others = [d for d in range(mask.dim()) if d != dim]
            alive[name, dim] = (mask.any(dim=others) if others else mask).cpu().numpy()
    return alive


def _masked_channels(group: Group, flags: Mapping[tuple[str, int], BoolArray]) -> BoolArray:
    """The channels of a group whose producing slices are all masked.

    Raises:
        InputError: all of them are.
    """
    alive = np.zeros(group.width, dtype=bool)
    for item in group.slices:
        kept = flags.get((item.parameter, item.dim))
        alive[item.channels if kept is None else item.channels[kept[item.rows]]] = True
    if not alive.any():
        raise InputError(
            f"the given masks mask every channel of group {group.name}; expected at least one to stay. Nothing would "
            "be computed from an empty layer: keep a channel, or take the layer out of the model."
        )
    return ~alive


def _staying(group: Group, staying: BoolArray, flags: Mapping[tuple[str, int], BoolArray]) -> str:
    """Why masked channels are not removed."""
    if not group.removable:
        return f"{int(staying.sum())} masked channels of {group.name} stay: {group.reason}"
    buffers = ("running_mean", "running_var")
    whole = [name for name, dim in group.members if (name, dim) not in flags and not name.endswith(buffers)]
    return (
        f"{int(staying.sum())} masked channels of {group.name} stay: not masked in {', '.join(whole) or 'all slices'}"
    )
