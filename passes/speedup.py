"""Physical removal of masked channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.groups import ChannelGroups
from fxcompress.errors import InputError, PassError
from fxcompress.masking import Masking, lay, lift
from fxcompress.module import MASKS, TracedModule
from fxcompress.pipeline import Context, Pass
from fxcompress.plan import settle
from fxcompress.rewrite import rewriting
from fxcompress.shrink import shrink


@dataclass(frozen=True)
class Speedup(Pass):
    """Removes every channel whose slices are masked in all their members; multiplies other masks into the weights.

    The result computes the same function as the masked module in eval mode, and has no mask nodes. With nothing to
    remove it only closes opened layers.

    Args:
        masks: masks that come from elsewhere, ``{"conv1.weight": bool tensor}``, True = keep, joined with the
            module's own.
    """

    masks: Mapping[str, Tensor] | None = None

    preserves: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    def requires(self, module: TracedModule, context: Context) -> None:
        """Given masks fit the module's parameters."""
        super().requires(module, context)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, mask in (self.masks or {}).items():
            if name not in parameters:
                raise InputError(
                    f"masks has {name!r}, which is no parameter of the model; expected names like {next(iter(parameters))!r}."
                )
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameters[name].shape:
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(
                    f"masks[{name!r}] is {found}; expected a bool tensor of shape {tuple(parameters[name].shape)}."
                )

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """The masked module; with given masks, the module masked with them."""
        masked = copy.deepcopy(module)
        if self.masks:
            masking = lift(masked)
            groups = context.groups(masked)
            lay(masked, self._joined(masked, masking, groups), groups, self.name)
        return masked

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Lift the masks and remove what they say."""
        masking = lift(module)
        if not self.masks and not masking.elements:
            return module
        groups = context.groups(module)
        masking = self._joined(module, masking, groups)
        live = masking.live(groups.channels)
        with rewriting(module, self.name) as rewriter:
            for name, mask in masking.elements.items():
                parameter = module.get_parameter(name)
                rewriter.set_tensor(name, parameter.detach() * mask.to(parameter.device))
        before = sum(p.numel() for p in module.parameters())
        if not live.all():
            context.align = shrink(module, groups, live, self.name).align
        after = sum(p.numel() for p in module.parameters())
        context.notes.append(f"{self.name}: {before - after:,} of {before:,} parameters removed")
        return module

    def ensures(self, module: TracedModule, context: Context) -> None:
        """No mask is left."""
        if hasattr(module, MASKS) or any("mask" in node.meta for node in module.graph.nodes):
            raise PassError(f"{self.name} left mask nodes in the graph")

    def _joined(self, module: TracedModule, masking: Masking, groups: ChannelGroups) -> Masking:
        """The module's masking with the given masks, and the channels dead whose slices are all masked."""
        if not self.masks:
            return masking
        masking = masking.joined(self.masks)
        channels = groups.channels
        alive = np.zeros(len(channels.component), dtype=bool)
        flags = _alive_slices(groups, masking)
        for axis in channels.facts.ledger.axes:
            if axis.kind == "parameter":
                labels = np.arange(axis.start, axis.start + axis.size)
                alive[channels.component[labels[flags.get((axis.name, axis.dim), np.ones(axis.size, dtype=bool))]]] = (
                    True
                )
        produced = np.concatenate([group.components for group in groups])
        dead = produced[~alive[produced] & ~channels.frozen[produced]]
        for group in groups:
            _check_not_empty(
                group.name,
                [flags.get((s.parameter, s.dim)) for s in group.slices],
                [s.rows for s in group.slices],
            )
        live = settle(module, channels, masking.live(channels) & channels.live(dead))
        return masking.with_live(channels, live)


def _alive_slices(
    groups: ChannelGroups, masking: Masking
) -> dict[tuple[str, int], np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For every masked parameter axis which slices have an element left."""
    alive = {}
    for name, mask in masking.elements.items():
        for dim in range(mask.dim()):
            others = [d for d in range(mask.dim()) if d != dim]
            alive[name, dim] = (mask.any(dim=others) if others else mask).cpu().numpy()
    return alive


def _check_not_empty(
    name: str,
    flags: list[np.ndarray[tuple[int], np.dtype[np.bool_]] | None],
    rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]],
) -> None:
    if flags and all(flag is not None and not flag[index].any() for flag, index in zip(flags, rows, strict=True)):
        raise InputError(
            f"the given masks mask every channel of group {name}; expected at least one to stay. Nothing would be "
            "computed from an empty layer: keep a channel, or take the layer out of the model."
        )
