"""Physical removal: dead channels leave parameters, buffers, literals and module attributes (design 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.arguments import mapped
from fxcompress.channels.groups import ChannelGroups
from fxcompress.channels.labels import BoolArray, Labels, cut_tensor
from fxcompress.gathers import Gather
from fxcompress.layers import agree
from fxcompress.literals import Scaled, live_groups
from fxcompress.module import TracedModule, modules_of, state_of, submodule
from fxcompress.nodes import scale_size, select_live
from fxcompress.plan import Call, Plan
from fxcompress.quantization.fake_quantize import FakeQuantize
from fxcompress.rewrite import Rewriter, rewriting

GATHERS = "_gathers"


def shrink(
    module: TracedModule,
    groups: ChannelGroups,
    live: BoolArray,
    author: str,
    masks: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Remove every channel that does not live; returns how every value of the graph was cut.

    Args:
        module: a clean traced module, changed in place.
        groups: its channel analysis.
        live: for every label whether it lives; satisfies the analysis' constraints.
        author: the pass, for provenance.
        masks: of single elements, by parameter, True = keep: multiplied into what remains.
    """
    plan = Plan.of(module, groups, live)
    steps, entering = plan.steps(), _entering(module, plan)  # everything is decided before anything is changed
    with rewriting(module, author) as rewriter:
        identities = [(n, g.source) for n, g in steps.items() if isinstance(g, Gather) and _is_identity(g)]
        for node, step in steps.items():
            if isinstance(step, Gather):
                if not _is_identity(step):
                    _write_gather(rewriter, node, step)
            elif step is not None and node.op != "output":
                _write_call(rewriter, node, step)
        for node, source in reversed(identities):  # after all others were written, which still read them
            rewriter.replace(node, source)
        _cut_tensors(rewriter, plan, masks or {})
        for name, layer in modules_of(module).items():
            if isinstance(layer, FakeQuantize):
                layer.agree()
            elif name in entering or (name and any(p is not None for p in layer._parameters.values())):
                labels, groups_now = entering.get(name, (None, None))
                agree(layer, inputs=labels, groups=groups_now)
    return plan


def _entering(module: TracedModule, plan: Plan) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """For every called layer the live shape of its input (and the groups left of a GroupNorm)."""
    found: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for node in module.graph.nodes:
        name = str(node.target) if node.op == "call_module" else str(node.meta.get("layer", ""))
        if not name or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        labels = plan.value(node.args[0])
        if isinstance(labels, Labels) and plan.cuts(labels) is not None:
            layer = submodule(module, name)
            left = live_groups(plan, labels, layer.num_groups) if isinstance(layer, nn.GroupNorm) else None
            found[name] = plan.shape(labels), left
    return found


def _write_call(rewriter: Rewriter, node: fx.Node, call: Call) -> None:
    if call.args == node.args and call.kwargs == node.kwargs:
        rewriter.become(node, call.op, call.target, node.args, node.kwargs)
        return

    def settle(item: Any) -> Any:
        if isinstance(item, Scaled):
            return rewriter.insert_before(
                node, "call_function", scale_size, (item.node, item.numerator, item.denominator)
            )
        return item

    rewriter.become(node, call.op, call.target, mapped(settle, call.args), mapped(settle, dict(call.kwargs)))


def _is_identity(gather: Gather) -> bool:
    """All live positions in their order: no gather is needed."""
    return torch.equal(gather.index, torch.arange(gather.size))


def _write_gather(rewriter: Rewriter, node: fx.Node, gather: Gather) -> None:
    name = f"{GATHERS}.{node.name}"
    device = next((p.device for p in rewriter.module.parameters()), torch.device("cpu"))
    rewriter.add_buffer(name, gather.index.to(device), persistent=False)
    index = rewriter.insert_before(node, "get_attr", name, ())
    rewriter.become(node, "call_function", select_live, (gather.source, gather.dim, index, gather.size))


def _cut_tensors(rewriter: Rewriter, plan: Plan, masks: Mapping[str, Tensor]) -> None:
    """Every parameter and buffer without its dead slices, and zero where it is masked."""
    state = state_of(rewriter.module)
    for name, labels in plan.channels.facts.state.items():
        cuts, mask, old = plan.cuts(labels), masks.get(name), state.pop(name)
        if not cuts and mask is None:
            continue
        tensor = cut_tensor(old.detach(), cuts or ())
        if mask is not None:
            tensor = tensor * cut_tensor(mask, cuts or ()).to(tensor.device)
        rewriter.exchange(old, tensor.contiguous())
