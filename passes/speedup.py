"""Physical removal of masked channels."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxcompress.channels.groups import ChannelGroups, Group
from fxcompress.channels.labels import BoolArray
from fxcompress.conflicts import conflicts
from fxcompress.constant_channels import approximate, composed, remove_constants
from fxcompress.context import Context
from fxcompress.errors import InputError, PassError
from fxcompress.masking import Masking, lay
from fxcompress.module import MASKS, TracedModule, modules_of
from fxcompress.pipeline import Pass, check_claim
from fxcompress.plan import settle
from fxcompress.quantization.zeros import keep_zeros
from fxcompress.rewrite import rewriting
from fxcompress.shrink import shrink
from fxcompress.verify import verify


@dataclass(frozen=True)
class Speedup(Pass):
    """Removes every channel whose slices are masked in all their members; multiplies other masks into the weights.

    What then is zero, by a mask or by itself, makes further channels constant or unread: those go too where that is
    exact. Their constants are folded into whoever reads them: a bias, the running mean of the BatchNorm behind a layer
    without one, or a bias that is added. Channels with zero weights that stay are listed with the reason.

    The result computes the same function as the masked module in eval mode, and has no mask nodes. With nothing to
    remove it changes nothing.

    Args:
        masks: masks that come from elsewhere, ``{"conv1.weight": bool tensor}``, True = keep, joined with the
            module's own. A channel goes if they mask all its slices, those that consume it included.
        approximate: remove channels too whose constant is not the same at every position (zero padding), folding what
            arrives inside. The difference that this makes is measured and noted; the rest is checked as always.
    """

    masks: Mapping[str, Tensor] | None = field(default=None, repr=False)
    approximate: bool = False

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
        if not self.masks:
            return
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            if name not in parameters:
                near = difflib.get_close_matches(str(name), parameters, 3, 0.3) or list(parameters)[:1]
                expected = ", ".join(map(repr, near))
                raise InputError(f"masks has {name!r}, which is no parameter; expected names like {expected}.")
            shape = tuple(parameters[name].shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
                found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"masks[{name!r}] is {found}; expected a bool tensor of shape {shape}.")

    def reference(self, module: TracedModule, context: Context) -> TracedModule:
        """The masked module; with given masks, the module masked with them."""
        if not self.masks:
            return super().reference(module, context)
        masked, own, groups = copy.deepcopy(module), context.masking or Masking(), context.groups(module)
        dead = self._joined(masked, own, groups).dead
        keep_zeros(masked, self.masks, self.name)
        _multiply(masked, self.masks, self.name)
        lay(masked, Masking(own.elements, dead), groups, self.name)
        return masked

    @property
    def claims(self) -> bool:
        """An approximation is measured; all else that is removed then is checked by :meth:`run`."""
        return not self.approximate

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        """Remove what the masks say, and what holds nothing but a constant."""
        assert context.inputs is not None
        before = _size(module)
        reference = self.reference(module, context) if self.approximate and context.verify else None
        masked = self._remove_masked(module, context)
        staying = self._remove_constant(module, context)
        if reference is not None:
            check_claim(self, reference, module, context)
        if self.approximate:
            staying = self._approximate(module, context, staying)
        after = _size(module)
        if masked or after != before:
            context.notes.append(f"{before - after:,} of {before:,} parameters removed")
        context.notes += staying
        return module

    def _remove_masked(self, module: TracedModule, context: Context) -> bool:
        """Remove channels that are masked in all their members, multiply other masks in; whether there were any."""
        masking, context.masking = context.masking or Masking(), Masking()
        if not self.masks and not masking:
            return False
        groups = context.groups(module)
        masking = self._joined(module, masking, groups)
        if self.masks:
            context.notes += conflicts(groups, masking.elements)
        live = masking.live(groups.channels)
        keep_zeros(module, masking.elements, self.name)
        if live.all():
            _multiply(module, masking.elements, self.name)
        else:
            context.align = shrink(module, groups, live, self.name, masking.elements).align
        return True

    def _remove_constant(self, module: TracedModule, context: Context) -> list[str]:
        """Remove channels that are constant or unread where that is exact; why others with zero weights stay."""
        assert context.inputs is not None
        removal = remove_constants(module, context.inputs, self.name, context.groups)
        if removal.align is not None:
            first = context.align
            context.align = removal.align if first is None else composed(first, removal.align)
        if removal.folded:
            context.rounded = True
            context.notes.append(f"constants folded into {', '.join(dict.fromkeys(removal.folded))}")
        return list(removal.staying)

    def _approximate(self, module: TracedModule, context: Context, staying: list[str]) -> list[str]:
        """Take constants for what they are inside the border, and remove what that sets free; why others stay."""
        assert context.inputs is not None
        exact = copy.deepcopy(module)
        if not staying or not (count := approximate(module, context.groups(module), context.inputs, self.name)):
            return staying
        reference = copy.deepcopy(module) if context.verify else None
        context.align, context.rounded = None, False
        staying = self._remove_constant(module, context)
        if reference is not None:
            check_claim(self, reference, module, context)
        batched = bool(module.meta["batched"])
        measured = verify(exact, module, context.inputs, batched=batched, tolerance=math.inf).difference
        channels = f"{count} channel{'s' if count > 1 else ''}"
        context.notes.append(f"{channels} approximated: the outputs change by {measured:.3g} (max abs, relative)")
        return staying

    def ensures(self, module: TracedModule, context: Context) -> None:
        """No mask is left."""
        super().ensures(module, context)
        if context.masking or hasattr(module, MASKS) or any("mask" in node.meta for node in module.graph.nodes):
            raise PassError(f"{self.name} left mask nodes in the graph")

    def _joined(self, module: TracedModule, masking: Masking, groups: ChannelGroups) -> Masking:
        """The module's masking with the given masks, and channels dead whose slices are all masked."""
        if not self.masks:
            return masking
        masking = masking.joined(self.masks)
        channels = groups.channels
        alive = np.zeros(len(channels.component), dtype=bool)
        for name, _ in module.named_parameters():
            mask = masking.elements.get(name)
            for factor in channels.facts.state[name].factors:
                kept = np.ones(tuple(factor.shape), dtype=bool) if mask is None else _kept(mask, factor)
                alive[channels.component[factor.numpy()[kept]]] = True
        dead = [np.empty(0, dtype=np.int64)]
        for group in groups:
            _check_not_emptied(group, masking)
            if group.removable:
                dead.append(group.components[~alive[group.components]])
        live = settle(module, groups, masking.live(channels) & channels.live(np.concatenate(dead)))
        return masking.with_live(channels, live)


def _size(module: TracedModule) -> int:
    """Number of elements of all parameters."""
    tables = [item._parameters for item in modules_of(module).values()]
    return sum({id(p): p.numel() for table in tables for p in table.values() if p is not None}.values())


def _multiply(module: TracedModule, masks: Mapping[str, Tensor], author: str) -> None:
    """Masks multiplied into the parameters' values."""
    with rewriting(module, author) as rewriter:
        for name, mask in masks.items():
            parameter = module.get_parameter(name)
            rewriter.set_tensor(name, parameter.detach() * mask.to(parameter.device))


def _kept(mask: Tensor, factor: Tensor) -> BoolArray:
    """For every element of a factor of a parameter's labels whether the mask keeps something of it."""
    dims = [dim for dim, size in enumerate(factor.shape) if size == 1]
    kept: BoolArray = (mask.any(dim=dims, keepdim=True) if dims else mask).cpu().numpy()
    return kept


def _check_not_emptied(group: Group, masking: Masking) -> None:
    """Raise :class:`InputError` if all producing slices of a group are masked."""
    alive = np.zeros(group.width, dtype=bool)
    for item in group.slices:
        mask = masking.elements.get(item.parameter)
        lines = None if mask is None else item.lines(mask)
        kept = None if lines is None else lines.reshape(len(lines), -1).any(1).cpu().numpy()
        alive[item.channels if kept is None else item.channels[kept[item.rows]]] = True
    if not alive.any():
        raise InputError(
            f"the given masks mask every channel of group {group.name}; expected at least one to stay. Nothing would "
            "be computed from an empty layer: keep a channel, or take the layer out of the model."
        )
