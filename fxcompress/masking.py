"""Masks: what a pruner decided, laid over a graph as nodes and lifted off again (design 6).

A masked module keeps its parameters' stored values; ``_masks.<parameter>`` holds one bool buffer for each masked
parameter, shared by all its uses. Dead channels are remembered by parameter axis, so that they mean the same after
other passes have changed the graph. Operators whose result depends on how many channels there are (norms, softmax,
products of activations) read the live channels only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import BoolArray, Cut, Labels, dims_of
from fxcompress.channels.solve import Channels
from fxcompress.errors import GraphError
from fxcompress.layers import close_layer, closes, open_layer
from fxcompress.merged import Merged, Step
from fxcompress.module import MASKS, TracedModule, copy_graph, evaluating, submodule
from fxcompress.nodes import apply_mask, learned_mask, restore_live, select_live
from fxcompress.plan import Plan
from fxcompress.quantization.fake_quantize import QUANT, ROLE, fake_quant_of
from fxcompress.rewrite import Rewriter, rewriting

LIVE = "_live"


@dataclass(frozen=True, eq=False)  # equal by its tensors, and so without a hash
class Masking:
    """What is masked.

    Attributes:
        elements: bool tensors by parameter, True = keep, in the parameter's shape.
        dead: for a parameter axis ``(name, dim)`` which of its indices are dead channels.
    """

    elements: dict[str, Tensor] = field(default_factory=dict)
    dead: dict[tuple[str, int], BoolArray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.elements or self.dead)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masking):
            return NotImplemented
        if self.elements.keys() != other.elements.keys() or self.dead.keys() != other.dead.keys():
            return False
        return all(torch.equal(mask, other.elements[name]) for name, mask in self.elements.items()) and all(
            np.array_equal(flags, other.dead[axis]) for axis, flags in self.dead.items()
        )

    def live(self, channels: Channels) -> BoolArray:
        """For every label of an analysis whether it lives. What is remembered of an axis that is gone no longer counts.

        Raises:
            GraphError: an axis has another length than when it was masked.
        """
        gone: BoolArray = np.zeros(len(channels.component), dtype=bool)
        lengths: dict[tuple[str, int], list[int]] = {}
        for axis in channels.facts.ledger.axes if self.dead else ():
            flags = self.dead.get((axis.name, axis.dim))
            if flags is None or axis.kind == "made":
                continue
            lengths.setdefault((axis.name, axis.dim), []).append(axis.size)
            if len(flags) == axis.size:
                gone[axis.start : axis.start + axis.size] = flags
        for (name, dim), found in lengths.items():  # a grouped transposed weight has two, one for all its groups
            flags = self.dead[name, dim]
            if len(flags) not in found:
                raise GraphError(
                    f"dimension {dim} of {name} has a length of {found[0]}; expected {len(flags)}, of which "
                    f"{int(flags.sum())} are masked. A pass that changes lengths has to leave masked layers alone, or "
                    "to run after Speedup."
                )
        return channels.without(gone)

    def joined(self, elements: Mapping[str, Tensor]) -> Masking:
        """With further element masks; what is masked stays masked."""
        made = dict(self.elements)
        for name, mask in elements.items():
            made[name] = made[name] & mask if name in made else mask
        return Masking(made, self.dead)

    def with_live(self, channels: Channels, live: BoolArray) -> Masking:
        """With the channels dead that do not live."""
        dead = {
            (axis.name, axis.dim): flags
            for axis in channels.facts.ledger.axes
            if axis.kind != "made" and (flags := ~live[axis.start : axis.start + axis.size]).any()
        }
        return Masking(self.elements, dead)


def complete(module: TracedModule, masking: Masking, channels: Channels) -> Masking:
    """The same masking, every slice of a dead channel masked element by element too."""
    if not masking.dead:
        return masking
    return masking.joined(_parameter_masks(module, Plan(module, channels, masking.live(channels))))


def masks(module: nn.Module) -> dict[str, Tensor]:
    """The masks of a module that a pruner returned: parameter name to bool tensor, True = keep (copies)."""
    holder = getattr(module, MASKS, None)
    if not isinstance(holder, nn.Module):
        return {}
    return {name: buffer.clone() for name, buffer in holder.named_buffers()}


def clean(module: TracedModule) -> TracedModule:
    """The module without its mask nodes, changed in place."""
    lift(module)
    return module


def lift(module: TracedModule) -> Masking:
    """Take the masks off: afterwards the graph is the clean one, node names included."""
    masking = Masking(masks(module), dict(module.meta.get("dead", {})))
    if not masking.elements and not masking.dead:
        return masking
    with rewriting(module, "lift") as rewriter:
        for node in list(module.graph.nodes):
            if node.target in (apply_mask, learned_mask, restore_live, select_live) and "mask" in node.meta:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                rewriter.replace(node, source)
        for node in list(module.graph.nodes):
            if "dense" in node.meta:
                rewriter.become(node, node.op, node.target, *_dense_arguments(node))
        for node in list(module.graph.nodes):
            if "mask" in node.meta:
                continue
            if closes(node):
                close_layer(rewriter, node)
        for node in reversed(list(module.graph.nodes)):
            if "mask" in node.meta or (node.op == "get_attr" and not node.users):
                rewriter.erase(node)
        rewriter.drop_module(MASKS)
        rewriter.drop_module(LIVE)
    module.graph = copy_graph(module.graph)  # names that the mask nodes had are free again
    module.meta.pop("dead", None)
    return masking


def lay(module: TracedModule, masking: Masking, groups: ChannelGroups | None, author: str) -> None:
    """Put masks on a clean module: one bool buffer for each masked parameter, and a node at each of its uses.

    Args:
        module: a clean traced module, changed in place.
        masking: what to mask; its dead channels must satisfy the analysis' constraints.
        groups: the channel analysis; needed where channels are dead.
        author: the pass, for provenance.
    """
    elements = dict(masking.elements)
    behind: set[str] = set()
    if not masking.elements and not masking.dead:
        return
    if masking.dead and groups is None:
        raise GraphError("dead channels can only be laid over a graph whose channels were analysed")
    with rewriting(module, author) as rewriter, evaluating(module):
        if groups is not None and masking.dead:
            channels = groups.channels
            plan = Plan(module, channels, masking.live(channels))
            for name, mask in _parameter_masks(module, plan).items():
                elements[name] = elements[name] & mask if name in elements else mask
            inserter = _Inserter(rewriter, plan, elements)
            inserter.channels()
            behind = inserter.masked_outputs
        _mask_parameters(rewriter, elements, behind)
    if masking.dead:
        module.meta["dead"] = masking.dead


def _dense_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments before its literals were rewritten."""
    positional, named = node.meta.pop("dense")
    args = tuple(positional.get(i, value) for i, value in enumerate(node.args))
    kwargs = {key: named.get(key, value) for key, value in node.kwargs.items()}
    return args, {key: value for key, value in kwargs.items() if not (key in named and value is None)}


def _parameter_masks(module: TracedModule, plan: Plan) -> dict[str, Tensor]:
    """For every parameter with dead slices its mask, in the parameter's shape and on its device."""
    made = {}
    for name, parameter in module.named_parameters():
        if name.startswith(f"{QUANT}."):
            continue  # a learned scale of a dead channel scales zeros
        labels = plan.channels.facts.state[name]
        mask = np.ones((1,) * parameter.dim(), dtype=bool)
        for factor in labels.factors:
            mask = mask & plan.live[factor.numpy()]
        if not mask.all():
            made[name] = torch.from_numpy(mask).expand(parameter.shape).clone().to(parameter.device)
    return made


def _mask_parameters(rewriter: Rewriter, elements: Mapping[str, Tensor], behind: set[str]) -> None:
    """Open the layers that hold masked parameters and multiply the masks in (``behind``: layers masked behind)."""
    module = rewriter.module
    names = _aliases(module)
    holders = _holders(module, elements)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and str(node.target) in holders:
            open_layer(rewriter, node)
    sources = [node for node in module.graph.nodes if node.op == "get_attr" and names.get(str(node.target)) in elements]
    for name, mask in elements.items():
        rewriter.add_buffer(f"{MASKS}.{name}", mask, persistent=True)
    for node in sources:
        name = names[str(node.target)]
        buffer = rewriter.insert_after(node, "get_attr", f"{MASKS}.{name}", ())
        buffer.meta["mask"] = True
        product = rewriter.insert_after(buffer, "call_function", apply_mask, (node, buffer))
        product.meta["mask"] = True
        rewriter.replace(node, product)
        for user in list(product.users):
            if user.meta.get(ROLE) == "weight" and not _keeps_zero(module, user):
                again = rewriter.insert_after(user, "call_function", apply_mask, (user, buffer))
                again.meta["mask"] = True
                rewriter.replace(user, again)
    read = {names[str(node.target)] for node in sources}
    for name in elements:
        holder = name.rpartition(".")[0]
        if name not in read and holder not in behind and any(n.target == holder for n in module.graph.nodes):
            kind = type(submodule(module, holder)).__name__
            raise GraphError(f"{name} cannot be masked element by element: a {kind} stays one node of the graph.")


def _keeps_zero(module: TracedModule, node: fx.Node) -> bool:
    """Whether a fake-quant node leaves zeros as they are."""
    quantizer = fake_quant_of(module, node)
    return quantizer is None or quantizer.keeps_zero


def _aliases(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter to the first name of the same tensor (tied weights have several)."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in module.named_parameters(remove_duplicate=False)
    }


def _holders(module: nn.Module, names: Mapping[str, Tensor]) -> set[str]:
    """The modules that hold these parameters, under any of their names."""
    return {alias.rpartition(".")[0] for alias, name in _aliases(module).items() if name in names}


class _Inserter:
    """Puts the nodes that a channel mask needs besides the masks of parameters."""

    def __init__(self, rewriter: Rewriter, plan: Plan, elements: Mapping[str, Tensor]) -> None:
        self.rewriter, self.plan, self.elements = rewriter, plan, elements
        self.module = rewriter.module
        self.buffers: dict[bytes, str] = {}
        self.masked_outputs: set[str] = set()
        self.merged = Merged(rewriter, plan)
        self.found: dict[tuple[fx.Node, bytes], list[Step]] = {}

    def channels(self) -> None:
        live_only = self.plan.channels.facts.ledger.live_only
        holders = _holders(self.module, self.elements)
        for node in list(self.module.graph.nodes):
            if node.name in live_only and self.plan.touched(node):
                self._live_only(node)
            elif node.op == "call_module" and str(node.target) in holders:
                layer = submodule(self.module, str(node.target))
                if not open_layer(self.rewriter, node):
                    self._mask_output(node, layer)

    def _mask_output(self, node: fx.Node, layer: nn.Module) -> None:
        """A layer that stays a leaf (BatchNorm): its dead channels are zeroed behind it."""
        labels = self.plan.value(node)
        if not isinstance(labels, Labels):
            raise GraphError(f"the parameters of {type(layer).__name__} {node.target} cannot be masked")
        self.masked_outputs.add(str(node.target))
        for factor in labels.factors:
            mask = self.plan.live[factor.numpy()]
            if mask.all():
                continue
            buffer = self._buffer(node, torch.from_numpy(np.ascontiguousarray(mask)))
            product = self.rewriter.insert_after(buffer, "call_function", apply_mask, (node, buffer))
            product.meta["mask"] = True
            self.rewriter.replace(node, product)

    def _live_only(self, node: fx.Node) -> None:
        """Let a node read the live part of its inputs, and put zeros back where nothing was live."""
        if node.op == "call_module":
            layer = str(node.target)
            if not open_layer(self.rewriter, node) and any(True for _ in submodule(self.module, layer).parameters()):
                raise GraphError(f"statistics of {type(layer).__name__} {node.target} cannot run over live channels")
        sources = [(source, self.plan.value(source)) for source in node.all_input_nodes]
        self._rewrite(node)
        for source, labels in sources:
            if not isinstance(labels, Labels):
                continue
            value = source
            for cut in self.plan.cuts(labels) or ():
                value = self._select(value, source, node, labels, cut)
            if value is not source:
                self.rewriter.read(node, source, value)
        results = self.plan.value(node)
        for labels, produced in [(results, node)] if isinstance(results, Labels) else self._parts(node):
            value = produced
            for cut in reversed(self.plan.cuts(labels) or ()):
                value = self._restore(value, node, labels, cut)

    def _parts(self, node: fx.Node) -> list[tuple[Labels, fx.Node]]:
        return [(value, user) for user in node.users if isinstance(value := self.plan.value(user), Labels)]

    def _rewrite(self, node: fx.Node) -> None:
        """The same literals as in the removed model, the original ones kept for the way back."""
        shadow = self.plan.live_arguments(node)
        if shadow is not None:
            args, kwargs = shadow
            # As numbers: the nodes that computed them are swept, and a copy of the graph would not map them.
            node.meta["dense"] = (
                {i: self._dense(old) for i, (old, new) in enumerate(zip(node.args, args, strict=True)) if old != new},
                {k: self._dense(node.kwargs.get(k)) for k, new in kwargs.items() if node.kwargs.get(k) != new},
            )
            self.rewriter.become(node, node.op, node.target, tuple(args), dict(kwargs))

    def _dense(self, literal: Any) -> Any:
        return fx.map_arg(literal, self.plan.value)

    def _select(self, value: fx.Node, source: fx.Node, user: fx.Node, labels: Labels, cut: Cut) -> fx.Node:
        steps = self.merged.steps(source, labels, cut, LIVE)
        if steps is None:
            steps = [(dim, self._buffer(user, index, before=True), size) for dim, index, size in _steps(labels, cut)]
        else:
            self.found[user, _key(labels, cut)] = steps
        for dim, index, size in steps:
            value = self.rewriter.insert_before(user, "call_function", select_live, (value, dim, index, size))
            value.meta["mask"] = True
        return value

    def _restore(self, value: fx.Node, user: fx.Node, labels: Labels, cut: Cut) -> fx.Node:
        """``value``, computed by ``user``, with zeros; an input cut like it knows where, if sizes alone do not."""
        steps = self.found.get((user, _key(labels, cut)))
        if steps is None:
            steps = [(dim, self._buffer(value, index), size) for dim, index, size in _steps(labels, cut)]
        for dim, index, size in reversed(steps):
            made = self.rewriter.insert_after(
                max(value, index), "call_function", restore_live, (value, dim, index, size)
            )
            made.meta["mask"] = True
            self.rewriter.replace(value, made)
            value = made
        return value

    def _buffer(self, place: fx.Node, tensor: Tensor, *, before: bool = False) -> fx.Node:
        """A node that reads a constant, stored once."""
        key = str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.numpy().tobytes()
        name = self.buffers.get(key)
        if name is None:
            name = self.buffers[key] = f"{LIVE}.i{len(self.buffers)}"
            device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
            self.rewriter.add_buffer(name, tensor.to(device), persistent=False)
        insert = self.rewriter.insert_before if before else self.rewriter.insert_after
        node = insert(place, "get_attr", name, ())
        node.meta["mask"] = True
        return node


def _key(labels: Labels, cut: Cut) -> bytes:
    """Equal for two values that are cut in the same way."""
    arrays = [*cut.keep, *([] if cut.gather is None else [cut.gather])]
    return str((labels.shape, cut.dims, cut.column)).encode() + b"".join(array.tobytes() for array in arrays)


def _steps(labels: Labels, cut: Cut) -> list[tuple[int, Tensor, int]]:
    """A cut as selections along one dimension each: ``(dim, index, dense size of one period)``."""
    steps = []
    for i, dim in enumerate(cut.dims):
        size = labels.shape[dim]
        if i == cut.column or len(cut.keep[i]) == size:
            continue
        period = _period(labels, dim)
        kept = cut.keep[i][cut.keep[i] < period]
        steps.append((dim, torch.from_numpy(kept), period))
    if cut.gather is not None and cut.column is not None:
        shape = [1] * len(labels.shape)
        for dim, size in zip(cut.dims, cut.gather.shape, strict=True):
            shape[dim] = size
        index = torch.from_numpy(cut.gather).reshape(shape)
        for i, dim in enumerate(cut.dims):
            period = _period(labels, dim)
            if i != cut.column and period < index.shape[dim]:
                index = index.narrow(dim, 0, period)
        steps.append((cut.dims[cut.column], index.contiguous(), labels.shape[cut.dims[cut.column]]))
    return steps


def _period(labels: Labels, dim: int) -> int:
    """The shortest length after which labels repeat along a dimension (the batch, merged into it, repeats them)."""
    factors = [factor for factor in labels.factors if dim in dims_of(factor)]
    size = labels.shape[dim]
    for period in range(1, size):
        if size % period == 0 and all(
            bool((f.narrow(dim, 0, size - period) == f.narrow(dim, period, size - period)).all()) for f in factors
        ):
            return period
    return size
