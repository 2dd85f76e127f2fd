"""Figures as polynomials in the widths: equal to what is counted, before and after removal."""

import copy
from collections.abc import Callable
from typing import Any

import model_zoo
import numpy as np
import pytest
import sympy
import torch
import torchvision
from hypothesis import given, settings
from nets import Net
from removal import NETWORKS, PRUNERS, check_figures
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import Context, compress, count, masks, trace
from fxcompress.channels.labels import Labels
from fxcompress.cost import Cost
from fxcompress.errors import GraphError, InputError
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.passes import RandomFilterPruner, Speedup
from fxcompress.pipeline import run_pass
from fxcompress.polynomials import Counter
from fxcompress.symbolic import Figures, derive
from fxcompress.testing import Spec, networks


def figures(cost: Cost) -> Figures:
    return Figures(cost.macs, cost.params, cost.bytes)


# ---- small networks whose polynomials one can write down -----------------------------------------------------


def chain() -> tuple[Net, Tensor]:
    net = Net(
        lambda m, x: m.head(F.relu(m.norm(m.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(3, 8, 3, bias=False),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 5),
    )
    return net, torch.randn(2, 3, 6, 7)


def test_the_polynomials_of_a_chain() -> None:
    model, x = chain()
    found = count(model, x).symbolic
    n = found["conv"]
    assert list(found.symbols) == ["conv"]
    assert (n.is_integer, n.is_positive, n.name) == (True, True, "conv")
    assert dict(found.widths) == {"conv": 8} == dict(found.current)
    assert sympy.expand(found.macs) == 4 * 5 * 27 * n + 5 * n
    assert sympy.expand(found.params) == 27 * n + 2 * n + 5 * n + 5
    assert sympy.expand(found.bytes) == 4 * (27 * n + 4 * n + 5 * n + 5) + 8  # num_batches_tracked is an int64
    assert found["head"] == 5  # the outputs stay
    rows = {row.name: (row.kind, row.macs, row.params) for row in found.table}
    assert rows["conv"] == ("Conv2d", 540 * n, 27 * n)
    assert rows["norm"] == ("BatchNorm2d", 0, 2 * n)
    assert rows["head"] == ("Linear", 5 * n, 5 * n + 5)


def test_evaluation_at_one_and_at_many_allocations() -> None:
    model, x = chain()
    found = count(model, x).symbolic
    assert found.evaluate() == figures(count(model, x))
    assert found.evaluate({"conv": 3}) == (3 * 545, 3 * 34 + 5, 4 * (3 * 36 + 5) + 8)
    assert all(type(figure) is int for figure in found.evaluate({"conv": np.int32(3)}))
    many = found.evaluate({"conv": np.array([[1, 2], [3, 8]])})
    assert [figure.tolist() for figure in many] == [
        [[545 * n for n in row] for row in ([1, 2], [3, 8])],
        [[34 * n + 5 for n in row] for row in ([1, 2], [3, 8])],
        [[4 * (36 * n + 5) + 8 for n in row] for row in ([1, 2], [3, 8])],
    ]
    assert all(figure.dtype == np.int64 for figure in many)


def test_widths_of_several_groups_are_broadcast() -> None:
    net = Net(
        lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(7, 5, bias=False), b=nn.Linear(5, 6), c=nn.Linear(6, 2, bias=False)
    )
    found = count(net, torch.randn(3, 7)).symbolic
    a, b = np.arange(1, 6)[:, None], np.arange(1, 7)
    macs, params, size = found.evaluate({"a": a, "b": b})
    assert (macs == 7 * a + a * b + 2 * b).all()
    assert (params == macs + b).all()
    assert (size == 4 * params).all()
    assert (found.evaluate({"b": b}).macs == 35 + 7 * b).all()


def pairs(m: Net, x: Tensor) -> Tensor:
    """The squared norm of an outer product: one product for each pair of channels."""
    y = (m.a(x)[:, :, None] * m.b(x)[:, None, :]).flatten(1)
    return y[:, None, :] @ y[:, :, None]


CASES: dict[str, tuple[Callable[[], Net], tuple[int, ...], dict[str, str], str, str]] = {
    # name: (network, input, group to symbol, MACs per sample, params)
    "part of a group is used once more": (
        lambda: Net(
            lambda m, x: m.b(torch.cat([h := m.a(x), h[:, :3]], 1)),
            a=nn.Linear(4, 8, bias=False),
            b=nn.Linear(11, 2, bias=False),
        ),
        (3, 4),
        {"a:0": "p", "a:1": "q"},
        "4*(p + q) + 2*(2*p + q)",
        "4*(p + q) + 2*(2*p + q)",
    ),
    "a grouped convolution": (
        lambda: Net(
            lambda m, x: m.head(m.grouped(m.stem(x)).mean((2, 3))),
            stem=nn.Conv2d(3, 8, 1, bias=False),
            grouped=nn.Conv2d(8, 12, 3, groups=4, bias=False),
            head=nn.Linear(12, 2, bias=False),
        ),
        (2, 3, 4, 5),
        {"stem": "n", "grouped": "m"},
        "20*3*n + 6*9*n*m/4 + 2*m",
        "3*n + 9*n*m/4 + 2*m",
    ),
    "a depthwise convolution with a multiplier": (
        lambda: Net(
            lambda m, x: m.head(m.depthwise(m.stem(x)).mean((2, 3))),
            stem=nn.Conv2d(3, 4, 1, bias=False),
            depthwise=nn.Conv2d(4, 8, 3, groups=4, bias=False),
            head=nn.Linear(8, 2, bias=False),
        ),
        (2, 3, 4, 5),
        {"stem": "n"},
        "20*3*n + 6*9*2*n + 2*2*n",
        "3*n + 18*n + 4*n",
    ),
    "pairs of channels": (
        lambda: Net(pairs, a=nn.Linear(6, 4), b=nn.Linear(6, 5)),
        (2, 6),
        {"a": "n", "b": "m"},
        "6*n + 6*m + n*m",
        "7*n + 7*m",
    ),
    "flattened positions": (
        lambda: Net(lambda m, x: m.head(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 5, 2), head=nn.Linear(60, 2)),
        (2, 3, 4, 5),
        {"conv": "n"},
        "12*12*n + 24*n",
        "12*n + n + 24*n + 2",
    ),
    "a transposed convolution": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)), a=nn.ConvTranspose2d(3, 6, 3, stride=2, bias=False), b=nn.Conv2d(6, 2, 1)
        ),
        (2, 3, 4, 5),
        {"a": "n"},
        "20*27*n + 2*99*n",
        "27*n + 2*n + 2",
    ),
    "a layer used twice": (
        lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=nn.Linear(3, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2)),
        (2, 3),
        {"a": "n"},
        "3*n + 2*n**2 + 2*n",
        "3*n + n + n**2 + n + 2*n + 2",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_polynomials_by_hand(case: tuple[Callable[[], Net], tuple[int, ...], dict[str, str], str, str]) -> None:
    make, shape, names, macs, params = case
    model, x = make(), torch.randn(shape)
    cost = count(model, x)
    found = cost.symbolic
    assert set(found.symbols) == set(names)
    ours = {symbol: found.symbols[name] for name, symbol in names.items()}
    assert sympy.expand(found.macs - sympy.parse_expr(macs, ours)) == 0
    assert sympy.expand(found.params - sympy.parse_expr(params, ours)) == 0
    assert found.evaluate() == figures(cost)
    assert sum((row.macs for row in found.table), sympy.Integer(0)) == found.macs


def test_a_group_in_parts_has_a_width_for_each() -> None:
    make, shape, *_ = CASES["part of a group is used once more"]
    found = count(make(), torch.randn(shape)).symbolic
    assert dict(found.widths) == {"a:0": 3, "a:1": 5}  # in the order of their first channels
    assert found["a"] == found["a:0"] + found["a:1"]
    assert found.evaluate({"a:0": 0, "a:1": 5}).macs == 4 * 5 + 2 * 5
    with pytest.raises(InputError, match=r"channels of a are not all used alike; give the widths of a:0, a:1\."):
        found.evaluate({"a": 4})


def test_work_that_samples_share_is_rounded_up_row_by_row() -> None:
    model = Net(lambda m, x: m.b(m.a(x) @ (m.left @ m.right)), a=nn.Linear(3, 6), b=nn.Linear(5, 2))
    model.left, model.right = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 5))
    cost = count(model, torch.randn(4, 3))
    found = cost.symbolic
    assert found.evaluate() == figures(cost)
    assert found.evaluate({"a": 5}).macs == 3 * 5 + 5 * 5 + -(-5 * 7 * 5 // 4) + 5 * 2
    assert found.macs.has(sympy.ceiling)
    assert found.evaluate({"a": np.arange(1, 7)}).macs.tolist() == [found.evaluate({"a": n}).macs for n in range(1, 7)]


def test_two_shared_products_in_one_module() -> None:
    """The model has one row for both, its trace one for each: they may round differently, and nothing minds."""
    model = Net(
        lambda m, x: m.b(m.a(x) @ (m.left @ m.right) @ (m.right.T @ m.left.T)), a=nn.Linear(3, 6), b=nn.Linear(6, 2)
    )
    model.left, model.right = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 5))
    x = torch.randn(4, 3)
    assert count(model, x).symbolic.evaluate() == figures(count(trace(model, x), x))


def test_products_beyond_64_bits_do_not_wrap() -> None:
    model = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 6, bias=False), b=nn.Linear(6, 2, bias=False))
    x = torch.randn(1, 3)
    module, context = trace(model, x), Context(inputs=Inputs.parse(x))
    groups, table = context.groups(module), count(module, x).table
    contractions = groups.channels.facts.ledger.contractions
    contractions[0] = type(contractions[0])(contractions[0].node, contractions[0].space, 2**62)
    inflated = tuple(
        type(row)(
            row.name,
            row.kind,
            row.macs * 2**62 if row.name == "a" else row.macs,
            row.params,
            row.bytes,
            row.output,
            row.elementwise,
        )
        for row in table
    )
    found = derive(module, groups, inflated, 1, np.ones(len(groups.channels.component), dtype=bool))
    assert found.evaluate({"a": 5}).macs == 15 * 2**62 + 10
    assert found.evaluate({"a": np.array([5, 6])}).macs.tolist() == [15 * 2**62 + 10, 18 * 2**62 + 12]


def test_opaque_modules_are_constants_and_recurrent_layers_are_not() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.weight(x) if x.sum().item() < 1e9 else x
            return y

    model = Net(
        lambda m, x: m.d(m.c(m.reads(m.rnn(m.a(x))[0]))),
        a=nn.Linear(3, 4), rnn=nn.GRU(4, 6, batch_first=True), reads=Reads(), c=nn.Linear(6, 5), d=nn.Linear(5, 2),
    )  # fmt: skip
    cost = count(model, torch.randn(2, 7, 3))
    with pytest.warns(UserWarning, match="reads stays as it is"):
        found = cost.symbolic
    assert list(found.symbols) == ["a", "c"]  # what the GRU makes enters an opaque module
    constant = 7 * (3 * 6 * 6 + 36)
    assert sympy.expand(found.macs - (constant + 7 * (8 * found["c"] + (3 + 18) * found["a"]))) == 0
    assert found.evaluate() == figures(cost)


def test_rows_that_given_masks_remove_whole() -> None:
    """Of 4 rows of 3 channels one goes as a whole: no pruner would, and the polynomials hold all the same."""
    model = Net(
        lambda m, x: m.b(m.a(x).view(-1, 4, 3).softmax(1).flatten(1)),
        a=nn.Linear(5, 12, bias=False),
        b=nn.Linear(12, 2, bias=False),
    )
    x, keep = torch.randn(2, 5), torch.arange(12) // 3 != 1
    given = {"a.weight": keep[:, None].expand(12, 5), "b.weight": keep.expand(2, 12)}
    removed = compress(model, [Speedup(masks=given)], example_inputs=x)
    assert removed.get_parameter("a.weight").shape == (9, 5)
    assert count(model, x).symbolic.evaluate({"a": 9}) == figures(count(removed, x)) == (63, 63, 252)


# ---- unusable widths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "widths, message",
    [
        ({"stem": 0}, r"widths\['stem'\] holds 0; expected integers from 1 to 8\."),
        ({"stem": np.array([4, 12])}, r"widths\['stem'\] holds 12; expected integers from 1 to 8\."),
        ({"stem": 4.0}, r"widths\['stem'\] holds float64; expected integers"),
        ({"stem": 6}, r"the widths of stem sum up to 6, which no removal can leave: 4 convolution groups .* of 4\."),
        ({"grouped": np.array([8, 4, 2])}, r"the widths of grouped sum up to 2, which no removal can leave"),
        ({"steam": 4}, r"there is no channel group 'steam'; near names: stem"),
        ({"head": 1}, r"group head is frozen: its 2 channels stay\. Leave it out of widths\."),
    ],
)
def test_widths_that_cannot_be(widths: dict[str, Any], message: str) -> None:
    make, shape, *_ = CASES["a grouped convolution"]
    found = count(make(), torch.randn(shape)).symbolic
    with pytest.raises(InputError, match=message):
        found.evaluate(widths)


def test_an_unknown_group() -> None:
    make, shape, *_ = CASES["a grouped convolution"]
    with pytest.raises(InputError, match="no channel group 'steam'; near names: stem"):
        count(make(), torch.randn(shape)).symbolic["steam"]


def test_what_depends_on_which_channels_live_is_no_polynomial() -> None:
    """The diagonal of an outer product: an element lives if both its channels do."""
    x = torch.randn(2, 6)
    model = Net(
        lambda m, x: m.c(F.relu(m.a(x))) + m.d(F.relu(m.b(x))),
        a=nn.Linear(6, 4), b=nn.Linear(6, 4), c=nn.Linear(4, 3), d=nn.Linear(4, 3),
    )  # fmt: skip
    module, context = trace(model, x), Context(inputs=Inputs.parse(x))
    groups = context.groups(module)
    first, second = (groups.channels.facts.values[name].factors[0].reshape(-1) for name in ("relu", "relu_1"))
    diagonal = Labels((4,), (first, second))
    counter = Counter(groups.channels, groups, [diagonal])
    with pytest.raises(GraphError, match="the size of here is no polynomial"):
        counter.live(diagonal, 1, "here")


# ---- real models -------------------------------------------------------------------------------------------------

VIT = "vit_b_16"
#: How many random allocations are removed for real: in the default suite, and in the sweep.
REMOVED = {"resnet18": (4, 20), "mobilenet_v2": (2, 20), "densenet121": (1, 20), VIT: (1, 20)}


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name != VIT:
        return model_zoo.build(name)
    return torchvision.models.get_model(VIT, weights=None, image_size=32).eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    "name, seeds",
    [
        *((name, range(few)) for name, (few, _) in REMOVED.items()),
        *(pytest.param(name, range(few, many), marks=pytest.mark.long) for name, (few, many) in REMOVED.items()),
        *(
            pytest.param(name, range(5), marks=pytest.mark.long)
            for name in ("resnext50_32x4d", "regnet_y_400mf", "shufflenet_v2_x1_0", "efficientnet_b0", "convnext_tiny")
        ),
    ],
)
def test_random_allocations_cost_what_the_removed_model_does(name: str, seeds: range) -> None:
    """Every group loses a share of its own, at random; our passes mask and remove it."""
    model, x = build(name)
    dense, context = trace(model, x), Context(inputs=Inputs.parse(x), verify=False)
    groups = context.groups(dense)
    channels = groups.channels
    symbolic = derive(dense, groups, count(dense, x).table, len(x), channels.live(np.empty(0, dtype=np.int64)))
    assert symbolic.evaluate() == figures(count(dense, x))
    for seed in seeds:
        shares = np.random.default_rng(seed).uniform(0, 0.9, len(groups))
        sparsity = {layer: float(s) for group, s in zip(groups, shares, strict=True) for layer in group.layers}
        masked = run_pass(RandomFilterPruner(sparsity, seed=seed), copy.deepcopy(dense), context).module
        widths = symbolic.at(Masking(masks(masked), masked.meta["dead"]).live(channels))
        removed = run_pass(Speedup(), masked, context).module
        assert widths != symbolic.widths
        found, predicted = count(removed, x), symbolic.evaluate(widths)
        assert (predicted.macs, predicted.params) == (found.macs, found.params), f"seed {seed}"
        assert predicted.bytes + index_bytes(removed) == found.bytes, f"seed {seed}"


def index_bytes(model: nn.Module) -> int:
    """Of the indices that removal added where literals could not say what is read (channel shuffles)."""
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.startswith("_gathers."))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "squeezenet1_1" else pytest.mark.long) for name in model_zoo.NAMES],
)
def test_dense_widths_give_what_was_counted(name: str) -> None:
    model, x = model_zoo.build(name)
    found, dense = count(model, x).symbolic, count(trace(model, x), x)
    assert found.evaluate() == figures(dense)
    full = {found.symbols[cell]: width for cell, width in found.widths.items()}
    counted = {row.name: row for row in dense.table}
    for row in found.table:
        for figure in ("macs", "params", "bytes"):
            assert sympy.sympify(getattr(row, figure)).xreplace(full) == getattr(counted[row.name], figure), row.name
    assert found.evaluate({cell: np.array([width]) for cell, width in found.widths.items()}).macs == [dense.macs]


# ---- generated networks ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* has nothing to prune", "ignore:.*; its channels stay")
@settings(max_examples=max(8, settings().max_examples // 2))
@given(spec=NETWORKS, pruner=PRUNERS)
def test_figures_of_generated_networks(spec: Spec, pruner: RandomFilterPruner) -> None:
    check_figures(spec, pruner)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* has nothing to prune", "ignore:.*; its channels stay")
@settings(max_examples=max(300, settings().max_examples))
@given(spec=NETWORKS | networks(), pruner=PRUNERS)
def test_figures_of_generated_networks_in_the_long_run(spec: Spec, pruner: RandomFilterPruner) -> None:
    check_figures(spec, pruner)
