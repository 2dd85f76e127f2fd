"""Pruning a generated network and removing what was masked: the property, and which rewrites that took."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress import GraphError, Pass, TracedModule, compress, count, masks, trace
from fxcompress.channels.labels import Labels
from fxcompress.context import Context
from fxcompress.inputs import Inputs
from fxcompress.motifs import MOTIFS
from fxcompress.nodes import select_live
from fxcompress.passes import (
    FoldBatchNorm,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    RandomFilterPruner,
    Speedup,
)
from fxcompress.pipeline import run_pass
from fxcompress.testing import Op, Spec, inputs, network, networks

#: Operations that generated networks have too seldom, or too narrow to lose channels, for each rewrite to be drawn.
_SELDOM: tuple[tuple[Op, ...], ...] = (
    (),
    *((Op("shuffle", 24, variant),) for variant in (0, 2, 3, 5) * 3),
    *((Op("conv_bn_relu", 12), Op("grouped_conv", 12, variant)) for variant in (0, 1)),
    *((Op("transposed_conv", 8, variant),) for variant in (0, 2, 3, 5, 0)),
    *((Op("zero_padded_shortcut", 8, variant), Op("conv_bn_relu", 6)) for variant in (0, 1, 2)),
    *((Op("conv_bn_relu", 12), Op("group_norm", 6, variant), Op("conv_bn_relu", 6)) for variant in (0, 4, 7, 0, 4, 7)),
    *((Op("conv_bn_relu", 12), Op("layer_norm", 6, variant), Op("conv_bn_relu", 6)) for variant in (0, 1, 0, 1, 0)),
    *((Op("attention_fused", 8, variant),) for variant in (0, 2, 0, 2, 0, 2)),
    *((Op("einsum", 8, variant),) for variant in (0, 2, 0, 2, 1)),
    *((Op("depthwise_conv", 8, variant), Op("conv_bn_relu", 6)) for variant in (0, 1, 0, 1)),
    *((Op("lstm", 8, variant),) for variant in (1, 3, 4)),
)


def _framed(spec: Spec, seldom: tuple[Op, ...], frame: bool) -> Spec:
    if not frame:
        return spec
    return replace(spec, ops=(Op("conv_bn_relu", 8), *seldom, *spec.ops, Op("head", 8)))


#: Networks in most of which many channels can go.
NETWORKS = st.builds(
    _framed, networks(max_ops=6), st.sampled_from(_SELDOM), st.sampled_from((True, True, True, True, False))
)
PRUNERS = st.builds(
    RandomFilterPruner,
    sparsity=st.sampled_from((0.3, 0.5, 0.8)),
    scope=st.sampled_from(("layer", "layer", "global")),
    round_to=st.sampled_from((1, 1, 1, 2, 4)),
    granularity=st.sampled_from(("channel", "head", "head_dim")),
    seed=st.integers(0, 99),
)

_STEPS: tuple[Pass, ...] = (
    LevelPruner(0.4),
    LevelPruner(pattern="2:4"),
    L1FilterPruner(0.3),
    L2FilterPruner(0.3, scope="global", reduce="mean"),
    FPGMPruner(0.3),
    RandomFilterPruner(0.5, seed=1),
    RandomFilterPruner(0.6, seed=2),
    FoldBatchNorm(),
    Speedup(),
)
PIPELINES = st.lists(st.sampled_from(_STEPS), min_size=2, max_size=4)


def relative_gap(expected: Any, found: Any) -> float:
    """The largest ``max abs(a - b) / max abs(a)`` over outputs of the same shapes."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)} became {tuple(b.shape)}"
        assert a.isfinite().all()
        worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item())
    return worst


def check_removal(spec: Spec, pruner: RandomFilterPruner, training: bool = False) -> None:
    """Prune at random and remove, both verified by `compress`; then compare again, at batch sizes of our own.

    Every parameter of the removed network must hold exactly the elements that its mask kept, in their order.
    """
    model = network(spec).train(training)
    masked = compress(model, [pruner], example_inputs=inputs(spec))
    removed = compress(masked, [Speedup()], example_inputs=inputs(spec))
    kept, after = masks(masked), dict(removed.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        expected = parameter[kept[name]] if name in kept else parameter.reshape(-1)
        assert torch.equal(after[name].reshape(-1), expected), f"{name} is not what its mask kept"
    check_agreement(masked, removed, spec)


def check_agreement(masked: TracedModule, removed: TracedModule, spec: Spec) -> None:
    """Both compute the same in eval mode and float64, at batch sizes of our own. Both are changed to that."""
    one, two = masked.eval().double(), removed.eval().double()
    with torch.no_grad():
        for batch in (1, 5):
            (x,) = inputs(spec, batch)
            gap = relative_gap(one(x.double()), two(x.double()))
            assert gap <= 1e-9, f"masked and removed differ by {gap:.3g} at batch {batch}"


def check_pipeline(spec: Spec, passes: Sequence[Pass]) -> None:
    """Whatever ran before: removing what is masked then changes nothing."""
    masked = compress(network(spec).eval(), passes, example_inputs=inputs(spec))
    check_agreement(masked, compress(masked, [Speedup()], example_inputs=inputs(spec)), spec)


def check_fine_tuned(spec: Spec, pruner: RandomFilterPruner) -> None:
    """What was fine-tuned with masks is what ships: masked parameters may drift, and it makes no difference."""
    masked = compress(network(spec).train(), [pruner], example_inputs=inputs(spec))
    if not any(True for _ in masked.parameters()):
        return
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        outputs = pytree.tree_leaves(masked(*inputs(spec, 4)))
        loss = torch.stack([y.tanh().square().mean() for y in outputs]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    removed = compress(masked, [Speedup()], example_inputs=inputs(spec))
    assert removed.training
    check_agreement(masked, removed, spec)


def check_figures(spec: Spec, pruner: RandomFilterPruner) -> None:
    """Polynomials give what is counted: at dense widths the dense figures, at those kept the removed network's.

    An einsum over a single remaining channel runs as an element-wise product, which is not counted as MACs.
    """
    x = inputs(spec)
    masked = compress(network(spec).eval(), [pruner], example_inputs=x, verify=False)
    removed = compress(masked, [Speedup()], example_inputs=x, verify=False)
    cost, found = count(masked, x), count(removed, x)
    try:
        symbolic = cost.symbolic
    except GraphError as problem:
        if pruner.granularity != "head" or "whole rows" not in str(problem):
            raise
        assert cost.after == found  # how many rows are left is no width
        return
    assert symbolic.evaluate() == (cost.macs, cost.params, cost.bytes)
    predicted = symbolic.evaluate(symbolic.current)
    assert predicted.params == found.params
    indices = sum(b.numel() * b.element_size() for name, b in removed.named_buffers() if name.startswith("_gathers."))
    assert predicted.bytes + indices == found.bytes
    kept = {symbolic.symbols[name]: width for name, width in symbolic.current.items()}
    counted = {row.name: row.macs for row in found.table}
    rows = {row.name: int(sympy.sympify(row.macs).xreplace(kept)) for row in symbolic.table}
    assert sum(rows.values()) == predicted.macs
    wrong = {row.name for row in symbolic.table if rows[row.name] != counted.get(row.name, 0)}
    einsums = {row.name for row in symbolic.table if row.kind == "einsum" and not counted.get(row.name, 0)}
    assert wrong <= einsums, f"{sorted(wrong)}: {rows} were predicted, {counted} counted"
    if cost.after is not None:
        assert cost.after == found


#: Motifs without a statistic over channels: there a masked model is the model with its weights zeroed.
PLAIN = tuple(
    kind
    for kind in MOTIFS
    if kind
    not in (
        "attention_cross",  # mean over learned queries in one of its forms
        "attention_linear",  # softmax over channels
        "attention_talking",  # norms of queries and keys
        "class_token",  # LayerNorm
        "group_norm",
        "layer_norm",
        "mlp",  # LayerNorm
        "multihead",  # LayerNorm in one of its forms
        "reshape_pairs",  # maximum and softmax over pairs of channels
        "softmax_gate",
        "spatial_gate",
        "tied_embedding",  # softmax over the table's rows
        "transformer_block",  # LayerNorm
        "weight_standardised",
    )
)


def framed(kinds: tuple[str, ...], max_ops: int = 2) -> st.SearchStrategy[Spec]:
    """Networks of these kinds between a stem and a head, without which little can go."""
    return networks(kinds, max_ops=max_ops).map(lambda spec: _framed(spec, (), True))


def check_zeroed(spec: Spec, pruner: RandomFilterPruner) -> None:
    """A masked network computes what a plain copy does whose weights were zeroed by hand."""
    model, (x,) = network(spec).eval(), inputs(spec, 3)
    masked = compress(model, [pruner], example_inputs=inputs(spec), verify=False)
    kept, twin = masks(masked), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in kept:
                parameter[~kept[name]] = 0
        gap = relative_gap(twin.double()(x.double()), masked.double()(x.double()))
    assert gap <= 1e-9, f"masked and zeroed by hand differ by {gap:.3g}"


# ---- which rewrites a removal took -----------------------------------------------------------------------------


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def shapes(module: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every node's value, by name."""
    interpreter = _Shapes(module)
    with torch.no_grad():
        interpreter.run(example)
    return interpreter.shapes


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _literals(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)), is_leaf=lambda leaf: isinstance(leaf, slice))
    return [str(leaf) for leaf in leaves if not isinstance(leaf, fx.Node)]


#: Rewritten literals, by the name of the function.
_LITERALS = {
    "view or reshape": "view reshape view_as unflatten expand",
    "split or slice": "split chunk split_with_sizes getitem narrow",
    "zero padding": "pad new_zeros zeros zeros_like",
    "attention": "scaled_dot_product_attention",
    "layer or group norm": "layer_norm group_norm",
}
#: Nodes whose value got smaller, by the name of the function.
_SHRUNK = {
    "concatenation": "cat concat stack",
    "addition": "add iadd sum",
    "zero padding": "pad new_zeros zeros zeros_like",
    "split or slice": "split chunk getitem narrow",
    "pooling": "max_pool2d avg_pool2d adaptive_avg_pool2d mean interpolate",
    "matrix product": "matmul bmm einsum linear",
    "layer or group norm": "layer_norm group_norm",
}


def rewrites(spec: Spec, pruner: RandomFilterPruner) -> Counter[str]:
    """How often each kind of rewrite was needed to prune a network and remove what was masked."""
    (example,) = inputs(spec, 5)  # which no literal looks like, so that one recording is enough
    dense = trace(network(spec).eval(), example)
    context = Context(inputs=Inputs.parse(example), verify=False)  # one for both passes: one analysis
    module = run_pass(pruner, copy.deepcopy(dense), context).module
    found: Counter[str] = Counter()
    found["live-only statistics"] += sum(node.target is select_live for node in module.graph.nodes)
    module = run_pass(Speedup(), module, context).module
    found["gather"] += sum(node.target is select_live for node in module.graph.nodes)
    _count_parameters(found, dense, module)
    before = {n: v.shape for n, v in context.groups(dense).channels.facts.values.items() if isinstance(v, Labels)}
    after = shapes(module, example)
    old = {node.name: node for node in dense.graph.nodes}
    for node in module.graph.nodes:
        if node.name not in old:
            continue
        name = function_name(node)
        if _literals(node) != _literals(old[node.name]):
            found.update(kind for kind, names in _LITERALS.items() if name in names.split())
        if after.get(node.name) != before.get(node.name):
            found.update(kind for kind, names in _SHRUNK.items() if name in names.split())
    return +found


def _count_parameters(found: Counter[str], dense: nn.Module, removed: nn.Module) -> None:
    for name, parameter in dense.named_parameters():
        before, after = parameter.shape, removed.get_parameter(name).shape
        if before == after:
            continue
        path, _, leaf = name.rpartition(".")
        layer = dense.get_submodule(path)
        if not path:
            found["parameter outside layers"] += 1
        for kinds, rewritten in _LAYERS:
            if isinstance(layer, kinds) and leaf.startswith("weight"):
                found.update(rewritten(layer, before, after))


def _convolution(layer: nn.Module, before: torch.Size, after: torch.Size) -> list[str]:
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if layer.transposed:
        return ["transposed convolution"]
    if layer.groups > 1:
        return ["depthwise convolution" if layer.weight.shape[1] == 1 else "grouped convolution"]
    return [kind for kind, d in (("convolution out", 0), ("convolution in", 1)) if before[d] != after[d]]


def _linear(_: nn.Module, before: torch.Size, after: torch.Size) -> list[str]:
    return [kind for kind, d in (("linear out", 0), ("linear in", 1)) if before[d] != after[d]]


_Count = Callable[[nn.Module, torch.Size, torch.Size], list[str]]
_LAYERS: list[tuple[tuple[type[nn.Module], ...], _Count]] = [
    ((nn.modules.conv._ConvNd,), _convolution),
    ((nn.Linear,), _linear),
    ((nn.modules.batchnorm._BatchNorm,), lambda *_: ["batch norm"]),
    ((nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d), lambda *_: ["layer or group norm"]),
    ((nn.RNNBase, nn.RNNCellBase), lambda *_: ["recurrent layer"]),
]
