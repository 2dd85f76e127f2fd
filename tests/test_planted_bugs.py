"""Deliberately broken variants: the laws and properties catch each within a few generated networks.

A variant is planted by replacing one function of fxcompress. What catches it must hold again without it.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from removal import PRUNERS, check_removal
from torch import Tensor, fx, nn

import fxcompress.compress
from fxcompress import FxCompressError, Pass, TracedModule, graph_pass
from fxcompress import literals, masking, module, pipeline, plan, shrink
from fxcompress.channels import contractions, groups, ledger, operators, reductions, rules, solve
from fxcompress.channels.labels import Labels
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, RandomFilterPruner, Speedup
from fxcompress.testing import LawBroken, Op, Spec, check_laws, inputs, network, networks

EXAMPLES = 20
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _nothing_to_prune() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has nothing to prune")
        yield


def framed(kinds: tuple[str, ...]) -> st.SearchStrategy[Spec]:
    """Small networks of these kinds between a stem and a head, without which little can go."""
    frame = Op("conv_bn_relu", 8), Op("head", 8)
    return networks(kinds, max_ops=2).map(
        lambda spec: dataclasses.replace(spec, ops=(frame[0], *spec.ops, frame[1]))
    )


def first_failure(
    kinds: tuple[str, ...], check: Callable[[Spec, RandomFilterPruner], object]
) -> tuple[Spec, RandomFilterPruner] | None:
    """The first of `EXAMPLES` networks on which a check fails."""
    failed: list[tuple[Spec, RandomFilterPruner]] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spec=framed(kinds), pruner=PRUNERS)
    def draw(spec: Spec, pruner: RandomFilterPruner) -> None:
        if not failed:
            try:
                check(spec, pruner)
            except (AssertionError, FxCompressError, RuntimeError, IndexError):
                failed.append((spec, pruner))

    draw()
    return failed[0] if failed else None


# ---- in the analysis and the removal: masked and removed differ ------------------------------------------------


def second_user_ignored(patch: Patch) -> None:
    """Of the operands that meet in a sum, only the first has labels."""

    def first_only(ledger: Any, operands: Any, reason: str) -> list[Tensor]:
        return next((list(factors) for _, factors in operands if factors), [])

    patch.setattr(rules, "join", first_only)


def wrong_axis(patch: Patch) -> None:
    """A square weight loses columns instead of rows."""
    right = shrink.cut_tensor

    def cut(tensor: Tensor, cuts: Any) -> Tensor:
        square = tensor.dim() > 1 and tensor.shape[0] == tensor.shape[1]
        return right(tensor.transpose(0, 1), cuts).transpose(0, 1) if square else right(tensor, cuts)

    patch.setattr(shrink, "cut_tensor", cut)


def stale_shape(patch: Patch) -> None:
    """The sizes of a view are left as they were, and nobody looks whether that works."""
    for name in ("view", "reshape"):
        patch.delitem(literals.LITERALS, name)
    patch.setattr(plan.Plan, "_agrees", lambda *_: True)


def stale_scale(patch: Patch) -> None:
    """Attention scales by the head size that is left."""
    patch.delitem(literals.LITERALS, "scaled_dot_product_attention")


def tied_once(patch: Patch) -> None:
    """A tied weight is cut under its first name only."""

    def untied(self: Any, name: str, tensor: Tensor) -> None:
        holder, leaf = self.owner(name)
        old = getattr(holder, leaf)
        if isinstance(old, nn.Parameter):
            holder._parameters[leaf] = nn.Parameter(tensor)
        else:
            holder._buffers[leaf] = tensor
        self.edits += 1

    patch.setattr(shrink.Rewriter, "set_tensor", untied)


def shared_twice(patch: Patch) -> None:
    """A layer that is called twice is cut for each call, at the same positions."""
    right = shrink._cut_tensors

    def cut(rewriter: Any, plan: Any) -> None:
        right(rewriter, plan)
        calls = [str(n.target) for n in rewriter.graph.nodes if n.op == "call_module"]
        for name, labels in plan.channels.facts.state.items():
            if calls.count(name.rpartition(".")[0]) > 1:
                tensor = rewriter.module.get_parameter(name).detach()
                for (dim,), (keep,) in ((cut.dims, cut.keep) for cut in plan.cuts(labels) or ()):
                    tensor = tensor[(slice(None),) * dim + (keep[keep < tensor.shape[dim]],)]
                rewriter.set_tensor(name, tensor)

    patch.setattr(shrink, "_cut_tensors", cut)


def output_missed(patch: Patch) -> None:
    """Channels of the model's outputs may go."""
    right = ledger.Ledger.freeze

    def freeze(self: Any, factors: Any, reason: str) -> None:
        if reason != "it is an output of the model":
            right(self, factors, reason)

    patch.setattr(ledger.Ledger, "freeze", freeze)


def opaque_layer_missed(patch: Patch) -> None:
    """What enters a layer that nobody understands is not frozen."""
    patch.setattr("fxcompress.channels.propagate._Interpreter._freeze", lambda *_: None)


def gather_order_ignored(patch: Patch) -> None:
    """A gather takes the right channels in ascending order."""
    right = plan.Plan._gather

    def gather(self: Any, node: fx.Node) -> plan.Gather:
        made = right(self, node)
        return dataclasses.replace(made, index=made.index.sort().values)

    patch.setattr(plan.Plan, "_gather", gather)


def all_channels_counted(patch: Patch) -> None:
    """Statistics of the masked model run over dead channels too."""
    patch.setattr(masking._Inserter, "_live_only", lambda *_: None)


def pad_labels_swapped(patch: Patch) -> None:
    """Channels are believed to lie behind the zeros that are padded behind them."""

    def pad(call: rules.Call) -> Labels:
        amounts = list(call.arguments["pad"])
        swapped = [amounts[i ^ 1] for i in range(len(amounts))]
        return rules.pad(dataclasses.replace(call, arguments={**call.arguments, "pad": swapped}))

    patch.setitem(operators.RULES, "constant_pad_nd", pad)


def constraint_dropped(patch: Patch) -> None:
    """The groups of a convolution may lose unequal numbers."""
    patch.setattr(ledger.Ledger, "constrain", lambda *_, **__: None)


def running_statistics_kept(patch: Patch) -> None:
    """Buffers are not cut."""
    right = shrink.cut_tensor
    patch.setattr(shrink, "cut_tensor", lambda t, cuts: t if not t.requires_grad and t.dim() == 1 else right(t, cuts))


def attributes_kept(patch: Patch) -> None:
    """`groups` of a depthwise convolution stays what it was."""
    patch.setattr(shrink, "agree", lambda *_, **__: None)


def unknown_is_pointwise(patch: Patch) -> None:
    """An operator without a rule is taken for an element-wise one."""
    for name in ("_softmax", "flip", "roll"):
        patch.delitem(operators.RULES, name)
    right = operators.rule_for
    patch.setattr("fxcompress.channels.propagate.rule_for", lambda *args: right(*args) or rules.pointwise)


REMOVAL_BUGS: dict[Callable[[Patch], None], tuple[str, ...]] = {
    second_user_ignored: ("residual", "skip"),
    wrong_axis: ("residual", "conv_bn_relu"),
    stale_shape: ("attention_explicit", "shuffle"),
    stale_scale: ("attention_fused",),
    tied_once: ("tied_weights",),
    shared_twice: ("shared_conv",),
    output_missed: ("conv_bn_relu", "residual"),
    opaque_layer_missed: ("recurrent",),
    gather_order_ignored: ("permute_index", "shuffle", "reorder"),
    all_channels_counted: ("layer_norm", "softmax_gate"),
    pad_labels_swapped: ("zero_padded_shortcut",),
    constraint_dropped: ("grouped_conv",),
    running_statistics_kept: ("conv_bn_relu",),
    attributes_kept: ("depthwise_conv", "inverted_residual"),
    unknown_is_pointwise: ("reorder", "softmax_gate"),
}


@pytest.mark.parametrize("plant", REMOVAL_BUGS, ids=lambda plant: plant.__name__)
def test_removal_catches(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        failed = first_failure(REMOVAL_BUGS[plant], check_removal)
    assert failed is not None, "no network shows it"
    check_removal(*failed)
