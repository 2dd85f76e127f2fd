"""Deliberately broken variants: the laws and properties catch each within a few generated networks.

A variant is planted by replacing one function of fxcompress. What catches it must hold again without it.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from removal import PRUNERS, check_removal, check_zeroed, framed
from torch import Tensor, fx, nn

from fxcompress import (
    Context,
    FxCompressError,
    Pass,
    TracedModule,
    graph_pass,
    literals,
    masking,
    module,
    pipeline,
    plan,
    shrink,
    trace,
)
from fxcompress.channels import ledger, operators, rules
from fxcompress.channels.labels import Labels
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, RandomFilterPruner, Speedup
from fxcompress.testing import LawBroken, Op, Spec, check_laws, inputs, network

EXAMPLES = 40
Patch = pytest.MonkeyPatch
Check = Callable[[Spec, RandomFilterPruner], object]


@pytest.fixture(autouse=True)
def _nothing_to_prune() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has nothing to prune")
        yield


def first_failure(kinds: tuple[str, ...], check: Check) -> tuple[Spec, RandomFilterPruner] | None:
    """The first of `EXAMPLES` networks on which a check fails."""
    failed: list[tuple[Spec, RandomFilterPruner]] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
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

    right = shrink.Rewriter._places

    def first(self: Any, tensor: Tensor) -> list[tuple[Any, Any]]:
        return right(self, tensor)[:1]

    patch.setattr(shrink.Rewriter, "_places", first)


def shared_twice(patch: Patch) -> None:
    """A layer that is called twice is cut for each call, at the same positions."""
    right = shrink._cut_tensors

    def cut(rewriter: Any, plan: Any, masks: Any) -> None:
        right(rewriter, plan, masks)
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
    patch.setattr(ledger.Ledger, "stand_for", lambda *_: None)


def running_statistics_kept(patch: Patch) -> None:
    """Buffers are not cut."""
    right = shrink.cut_tensor
    patch.setattr(shrink, "cut_tensor", lambda t, cuts: t if not t.requires_grad and t.dim() == 1 else right(t, cuts))


def attributes_kept(patch: Patch) -> None:
    """`groups` of a depthwise convolution stays what it was."""
    patch.setattr(shrink, "agree", lambda *_, **__: None)


def dense_size_lost(patch: Patch) -> None:
    """A size that scales values is read from the tensor that got smaller."""
    patch.setattr(plan.Plan, "dense_number", lambda _, given: given)


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
    tied_once: ("tied_weights",),
    shared_twice: ("shared_conv",),
    output_missed: ("conv_bn_relu", "residual"),
    opaque_layer_missed: ("bilinear",),
    gather_order_ignored: ("permute_index", "shuffle", "reorder"),
    all_channels_counted: ("layer_norm", "softmax_gate"),
    pad_labels_swapped: ("zero_padded_shortcut",),
    constraint_dropped: ("grouped_conv",),
    running_statistics_kept: ("conv_bn_relu",),
    attributes_kept: ("depthwise_conv", "inverted_residual"),
    dense_size_lost: ("spatial_gate", "attention_shared"),
    unknown_is_pointwise: ("reorder", "softmax_gate"),
}


def planted(
    plant: Callable[[Patch], None], monkeypatch: Patch, kinds: tuple[str, ...], check: Check
) -> tuple[Spec, RandomFilterPruner]:
    """The first network that shows a planted bug."""
    with monkeypatch.context() as patch:
        plant(patch)
        failed = first_failure(kinds, check)
    assert failed is not None, f"no network of {EXAMPLES} shows it"
    return failed


@pytest.mark.parametrize("plant", REMOVAL_BUGS, ids=lambda plant: plant.__name__)
def test_removal_catches(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    failed = planted(plant, monkeypatch, REMOVAL_BUGS[plant], check_removal)
    check_removal(*failed)


def test_weights_zeroed_by_hand_catch_what_both_have_wrong(monkeypatch: Patch) -> None:
    failed = planted(stale_scale, monkeypatch, ("attention_fused",), check_zeroed)
    check_zeroed(*failed)


# ---- in passes and the pipeline: a law is broken ---------------------------------------------------------------


def flag_always_false(patch: Patch) -> None:
    patch.setattr(pipeline.Snapshot, "differs", lambda *_: False)


def flag_always_true(patch: Patch) -> None:
    patch.setattr(pipeline.Snapshot, "differs", lambda *_: True)


def caller_pruned(patch: Patch) -> None:
    """`compress` works on what it was given."""
    patch.setattr(import_module("fxcompress.compress"), "capture", lambda model, *_, **__: model)


def mode_lost(patch: Patch) -> None:
    """Running in eval mode for a moment leaves a model there."""

    @contextmanager
    def evaluating(module: nn.Module) -> Iterator[None]:
        module.eval()
        yield

    patch.setattr(masking, "evaluating", evaluating)


def pickle_loses_options(patch: Patch) -> None:
    right = module._Record.of

    def of(node: fx.Node) -> Any:
        return dataclasses.replace(right(node), kwargs={})

    patch.setattr(module._Record, "of", of)


#: The pass that shows it, and the law that it breaks.
PIPELINE_BUGS: dict[Callable[[Patch], None], tuple[Pass, str]] = {
    flag_always_false: (L1FilterPruner(0.5), "modified"),
    flag_always_true: (Speedup(), "modified"),
    caller_pruned: (L1FilterPruner(0.5), "untouched"),
    mode_lost: (L1FilterPruner(0.5), "modes"),
    pickle_loses_options: (FoldBatchNorm(), "copies"),
}


@pytest.mark.parametrize("plant", PIPELINE_BUGS, ids=lambda plant: plant.__name__)
def test_laws_catch(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    item, law = PIPELINE_BUGS[plant]
    broken: list[str] = []

    def check(spec: Spec, pruner: RandomFilterPruner) -> None:
        model = trace(network(spec), inputs(spec)) if law == "untouched" else network(spec)
        try:
            check_laws(item, model, inputs(spec))
        except LawBroken as error:
            broken.append(error.law)
            raise

    spec, pruner = planted(plant, monkeypatch, ("residual", "squeeze_excite"), check)
    assert broken == [law]
    check(spec, pruner)


# ---- passes that break their word ------------------------------------------------------------------------------


@graph_pass(preserves=True)
def scales_a_weight(module: fx.GraphModule) -> None:
    with torch.no_grad():
        next(module.parameters()).mul_(1.001)


@graph_pass
def adds_a_buffer(module: fx.GraphModule) -> None:
    module.register_buffer("counter", torch.zeros(1))


@graph_pass
def lies_about_its_width(module: fx.GraphModule) -> None:
    next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d)).out_channels += 1


@graph_pass
def cuts_the_gradient(module: fx.GraphModule) -> None:
    first = next(node for node in module.graph.nodes if node.op == "call_module")
    with module.graph.inserting_after(first):
        detached = module.graph.call_method("detach", (first,))
    first.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)


@graph_pass
def fixes_the_batch(module: fx.GraphModule) -> None:
    last = next(reversed(module.graph.nodes))
    with module.graph.inserting_before(last):
        made = module.graph.call_method("narrow", (last.args[0], 0, 0, 2))
    last.args = (made,)


@graph_pass
def writes_into_the_inputs(module: fx.GraphModule) -> None:
    EXAMPLE[0].mul_(2)


@dataclasses.dataclass(frozen=True)
class Decays(Pass):
    """Says that a second run changes nothing."""

    idempotent: ClassVar[bool] = True

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        scales_a_weight.run(module, context)
        return module


EXAMPLE = inputs(Spec((), seed=3))
LIARS: dict[str, tuple[Pass, str]] = {
    "preserves": (scales_a_weight, "outputs differ by"),
    "keys": (adds_a_buffer, "counter is new"),
    "verifies": (lies_about_its_width, "its tensors say"),
    "verifies the batch": (fixes_the_batch, "expected"),
    "trains": (cuts_the_gradient, "gets no gradient any more"),
    "untouched": (writes_into_the_inputs, "inputs.args"),
    "idempotent": (Decays(), "in the second run"),
}


@pytest.mark.parametrize("law", LIARS)
def test_a_pass_that_breaks_its_word_is_caught(law: str) -> None:
    item, message = LIARS[law]
    spec = Spec((Op("conv_bn_relu", 8), Op("residual", 8), Op("head", 8, 2)), seed=3)
    with pytest.raises(LawBroken, match=message) as caught:
        check_laws(item, network(spec), EXAMPLE)
    assert caught.value.law == law.split()[0]
    check_laws(FoldBatchNorm(), network(spec), EXAMPLE)
