"""Budgets: priced exactly, met by what is left, filled like water."""

import copy
from typing import Any

import model_zoo
import numpy as np
import pytest
import torch
import torchvision
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import Budget, Context, InputError, count, trace
from fxcompress.figures import Polynomial
from fxcompress.inputs import Inputs
from fxcompress.masking import Masking
from fxcompress.passes import L1FilterPruner, Speedup
from fxcompress.pipeline import run_pass
from fxcompress.prices import Prices
from fxcompress.ranking import Ranking
from fxcompress.water_filling import TOLERANCE, Limits, fill

IMAGE = torch.randn(2, 3, 9, 9)
MODELS = ("resnet18", "mobilenet_v2", "densenet121", "vit_b_16")


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name != "vit_b_16":
        return model_zoo.build(name)
    return torchvision.models.get_model(name, weights=None, image_size=32).eval(), torch.randn(2, 3, 32, 32)


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.norm(net.stem(x)).relu()
    return net.head((x + net.two(net.one(x).relu())).mean((2, 3)))


def repeated(net: Net, x: Tensor) -> Tensor:
    """Four channels are read twice: they cost more than the others."""
    x = net.stem(x).relu()
    return net.two(net.one(torch.cat([x, x[:, :4]], 1)).relu()).mean((2, 3))


def joined(net: Net, x: Tensor) -> Tensor:
    """The two groups of a grouped convolution read different layers, which so keep equally many channels."""
    return net.two(net.one(torch.cat([net.left(x), net.right(x)], 1)).relu()).mean((2, 3))


def queries(net: Net, x: Tensor) -> Tensor:
    """Four heads of queries share two of keys and values."""
    q = net.q(x).unflatten(-1, (4, 5)).transpose(1, 2)
    k, v = (layer(x).unflatten(-1, (2, 5)).transpose(1, 2) for layer in (net.k, net.v))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return net.o(mixed.transpose(1, 2).flatten(2))


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


NETS: dict[str, tuple[Net, Tensor]] = {
    "residual": (
        Net(
            residual, stem=conv(3, 13, 3), norm=nn.BatchNorm2d(13), one=conv(13, 21, 3), two=conv(21, 13),
            head=nn.Linear(13, 5),
        ),
        IMAGE,
    ),
    "repeated": (Net(repeated, stem=conv(3, 11), one=conv(15, 7, 3), two=conv(7, 4)), IMAGE),
    "joined": (
        Net(joined, left=conv(3, 10), right=conv(3, 10, 3), one=conv(20, 12, groups=2), two=conv(12, 3)), IMAGE,
    ),
    "grouped": (
        Net(
            lambda net, x: net.three(net.two(net.one(x).relu()).relu()).mean((2, 3)),
            one=conv(3, 12, 3), two=conv(12, 18, 3, groups=3), three=conv(18, 4),
        ),
        IMAGE,
    ),
    "queries": (
        Net(queries, q=nn.Linear(8, 20), k=nn.Linear(8, 10), v=nn.Linear(8, 10), o=nn.Linear(20, 6)),
        torch.randn(2, 7, 8),
    ),
}  # fmt: skip


def priced(model: nn.Module, x: Tensor) -> tuple[fxcompress.TracedModule, Context, Prices]:
    module, context = trace(model, x), Context(inputs=Inputs.parse(x), verify=False)
    return module, context, Prices(module, context.groups(module), Inputs.parse(x))


# ---- what is said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "the budget is empty; expected at least one of params, macs, bytes, latency"),
        ({"macs": 0.0}, r"macs is 0.0; expected a fraction of the dense model in \(0, 1\]"),
        ({"params": 1.5}, "params is 1.5; expected a fraction"),
        ({"bytes": float("nan")}, "bytes is nan; expected a fraction"),
        ({"latency": "half"}, "latency is 'half', a str; expected a fraction"),
        ({"macs": True}, "macs is True, a bool"),
    ],
)
def test_budgets_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**options)


def test_a_budget_says_what_it_allows() -> None:
    assert Budget(macs=0.5, params=1).ratios == {"params": 1, "macs": 0.5}
    assert str(Budget(macs=0.5)) == "50.0% of the macs"


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "sparsity is missing: give the fraction of channels to remove, .* or a budget"),
        ({"budget": 0.5}, r"budget is 0.5; expected a Budget, such as Budget\(macs=0.5\)"),
        ({"budget": Budget(macs=0.5), "granularity": "head"}, "what whole heads cost is not priced"),
        ({"budget": Budget(macs=0.5), "scope": "global", "sparsity": 0.5}, "give a sparsity or a budget, not both"),
    ],
)
def test_pruners_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        L1FilterPruner(**options)


def test_prices_refuse_what_is_no_allocation() -> None:
    _, _, prices = priced(*NETS["residual"])
    assert [group.name for group in prices.groups] == ["stem", "one"]
    with pytest.raises(InputError, match=r"kept has the shape \(3,\); expected \(2,\)"):
        prices.of([1, 2, 3])
    with pytest.raises(InputError, match="kept asks for 22 to 22 units of one; expected 1 to 21"):
        prices.of([1, 22])
    with pytest.raises(InputError, match="kept holds float64; expected integers"):
        prices.of([1.0, 2.0])
    with pytest.raises(InputError, match=r"sparsities have the shape \(1,\)"):
        prices.fill([0.5], Budget(macs=0.5))
    with pytest.raises(InputError, match=r"sparsities hold numbers outside \[0, 1\]"):
        prices.fill([0.5, 1.5], Budget(macs=0.5))
    with pytest.raises(InputError, match="do not know the latency"):
        prices.fill([0.5, 0.5], Budget(latency=0.5))


# ---- what is priced ----------------------------------------------------------------------------------------------


def check_prices(model: nn.Module, x: Tensor, seeds: range) -> None:
    """Random allocations cost what is counted once the rest has been removed."""
    module, context, prices = priced(model, x)
    groups = context.groups(module)
    assert {name: float(value) for name, value in prices.of(prices.units).items()} == dict(prices.dense)
    for seed in seeds:
        random = np.random.default_rng(seed)
        kept = random.integers(1, prices.units + 1)
        scores = [random.random(group.width) for group in prices.groups]
        ranking = Ranking.of(module, groups, Masking(), prices.groups, scores)
        live = ranking.keeping(kept).live
        masked = copy.deepcopy(module)
        masking = Masking().with_live(groups.channels, live)
        context.masking = masking
        removed = run_pass(Speedup(), context.masked(masked, "test", module), Context(inputs=context.inputs)).module
        found = count(removed, x)
        predicted = prices.of(kept)
        assert (predicted["params"], predicted["macs"]) == (found.params, found.macs), f"seed {seed}"
        assert prices.price(live) == {name: float(value) for name, value in predicted.items()}


@pytest.mark.parametrize("name", NETS)
def test_prices_are_what_is_left(name: str) -> None:
    check_prices(*NETS[name], range(8))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "resnet18" else pytest.mark.long) for name in MODELS]
)
def test_prices_are_what_is_left_of_models(name: str) -> None:
    check_prices(*build(name), range(2))


def test_groups_are_priced_in_parts_or_together() -> None:
    names = {name: [(group.name, group.rows) for group in priced(*net)[2].groups] for name, net in NETS.items()}
    assert names["repeated"] == [("stem:0", 1), ("stem:1", 1), ("one", 1)]
    assert names["joined"] == [("left+right", 2), ("one", 2)]
    assert names["grouped"] == [("one", 3), ("two", 3)]


def test_many_allocations_at_once() -> None:
    _, _, prices = priced(*NETS["residual"])
    kept = np.random.default_rng(0).integers(1, prices.units + 1, (50, 2))
    together = prices.of(kept)
    for row, allocation in enumerate(kept):
        assert {name: float(v) for name, v in prices.of(allocation).items()} == {n: v[row] for n, v in together.items()}
    shares = np.random.default_rng(1).random((50, 2))
    filled = prices.fill(shares, Budget(macs=0.4))
    assert (filled == [prices.fill(row, Budget(macs=0.4)) for row in shares]).all()


# ---- water-filling -----------------------------------------------------------------------------------------------


def chain(sizes: np.ndarray[Any, Any], work: np.ndarray[Any, Any]) -> Polynomial:
    """A chain of layers, each with the work of its inputs times its outputs."""
    n = len(sizes)
    quadratic = np.zeros((n, n))
    quadratic[np.arange(n - 1), np.arange(1, n)] = quadratic[np.arange(1, n), np.arange(n - 1)] = work[1:] / 2
    linear = np.zeros(n)
    linear[0] = 3 * work[0]
    none = np.zeros(0), np.zeros((0, 0), dtype=np.int64), np.eye(n), np.zeros(n)
    return Polynomial(0.0, linear, quadratic, *none)


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 1150), marks=pytest.mark.long)])
def test_water_filling_ends_and_meets_every_feasible_budget(seeds: range) -> None:
    """Random widths, random work, random sparsities, up to 98 % of the work removed: no unit more would fit."""
    feasible = 0
    for seed in seeds:
        random = np.random.default_rng(seed)
        n = int(random.integers(1, 40))
        sizes = np.ceil(2 ** random.uniform(0, 11, n)).astype(np.int64)
        step = np.full(n, random.choice([1, 1, 4]))
        figure = chain(sizes, random.integers(1, 1000, n).astype(np.float64))
        limits = Limits(sizes, np.ones(n, dtype=np.int64), sizes, step)
        dense = float(figure.value(sizes[None].astype(np.float64))[0])
        target = dense * random.choice([0.02, 0.1, 0.5, 0.9])
        lowest = np.minimum(step, sizes)[None].astype(np.float64)
        if figure.value(lowest)[0] > target:
            continue
        feasible += 1
        shares = random.random((3, n)) * random.integers(0, 2, (3, n))
        kept = fill([figure], [target], shares, limits)
        assert ((kept >= 1) & (kept <= sizes) & ((kept % step == 0) | (kept == sizes))).all()
        use = figure.value(kept) / target
        assert (use <= 1).all(), f"seed {seed}"
        for row in np.flatnonzero(use < 1 - TOLERANCE):
            by = limits.next(kept[row : row + 1])
            more = figure.growth(kept[row : row + 1], by)[0][by[0] > 0]
            assert (more + figure.value(kept)[row] > target).all(), f"seed {seed}: {use[row]}"
    assert feasible > 0.7 * len(seeds)


def test_polynomials_of_any_degree() -> None:
    """The arrays say what the expressions do, for each allocation and for each group that grows."""
    random = np.random.default_rng(0)
    cube = Polynomial(
        5.0, np.array([1.0, 2.0]), np.array([[1.0, 0.5], [0.5, 0.0]]), np.array([3.0]), np.array([[0, 0, 1]]),
        np.eye(2), np.zeros(2),
    )  # fmt: skip
    kept = random.integers(1, 9, (20, 2)).astype(np.float64)

    def by_hand(k: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        a, b = k[:, 0], k[:, 1]
        return 5 + a + 2 * b + a * a + a * b + 3 * a * a * b

    assert np.allclose(cube.value(kept), by_hand(kept))
    by = random.integers(1, 4, (20, 2)).astype(np.float64)
    for group in range(2):
        grown = kept + by * np.eye(2)[group]
        assert np.allclose(cube.growth(kept, by)[:, group], by_hand(grown) - by_hand(kept))


def test_shares_scale_together_up_to_what_a_group_can_lose() -> None:
    _, _, prices = priced(*build("resnet18"))
    shares = np.linspace(0.1, 0.6, len(prices.groups))
    kept = prices.fill(shares, Budget(macs=0.5))
    lost = 1 - kept / prices.units
    factor = lost[-1] / shares[-1]
    assert np.abs(lost - factor * shares).max() < 3 / 64  # rounded to units, and single ones given back
    alone = np.zeros(len(prices.groups))
    alone[3] = 0.2
    assert (prices.fill(alone, Budget(macs=0.97)) < prices.units).sum() == 1
    deep = prices.fill(alone, Budget(macs=0.3))  # more than one group can give
    assert deep[3] == 1
    assert (deep < prices.units).all()


def test_rounding_and_limits() -> None:
    _, _, prices = priced(*build("resnet18"))
    kept = prices.fill(np.full(len(prices.groups), 0.5), Budget(macs=0.5), 8)
    assert (kept % 8 == 0).all()
    assert 0.995 <= float(prices.of(kept)["macs"]) / prices.dense["macs"] / 0.5 <= 1
    most = prices.units.copy()
    most[0] = 20
    least = np.ones_like(prices.units)
    least[5] = prices.units[5]
    kept = prices.fill(np.full(len(prices.groups), 0.5), Budget(params=0.5), least=least, most=most)
    assert kept[0] <= 20
    assert kept[5] == prices.units[5]
    assert 0.995 <= float(prices.of(kept)["params"]) / prices.dense["params"] / 0.5 <= 1


def test_a_budget_out_of_reach_names_the_smallest() -> None:
    _, _, prices = priced(*NETS["residual"])
    least = {name: float(value) / prices.dense[name] for name, value in prices.of([1, 1]).items()}
    with pytest.raises(InputError, match=rf"allows 1.00% of the macs; {least['macs']:.2%} is the least"):
        prices.fill([0.5, 0.5], Budget(macs=0.01))


# ---- pruners -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETS)
def test_pruners_meet_budgets_of_small_networks(name: str, scope: Any) -> None:
    model, x = NETS[name]
    small = fxcompress.compress(
        model, [L1FilterPruner(budget=Budget(params=0.6), scope=scope), Speedup()], example_inputs=x
    )
    assert 0.4 < count(small, x).params / count(model, x).params <= 0.6


CASES = [(name, figure, ratio) for name in MODELS for figure in ("params", "macs") for ratio in (0.7, 0.5, 0.3)]
SHORT = {("resnet18", "macs", 0.5), ("mobilenet_v2", "params", 0.3)}


@pytest.mark.parametrize(
    "name, figure, ratio", [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long) for case in CASES]
)
def test_pruners_meet_budgets(name: str, figure: str, ratio: float) -> None:
    """Counted once the rest has been removed: at most the target, and within 0.5 % of it."""
    model, x = build(name)
    passes = [L1FilterPruner(budget=Budget(**{figure: ratio})), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=x, verify=False)
    found = getattr(count(small, x), figure) / getattr(count(model, x), figure)
    assert ratio * (1 - TOLERANCE) <= found <= ratio


def test_a_budget_is_of_the_dense_model_in_every_call() -> None:
    """What a budget was first measured against counts in later calls too."""
    model, x = build("resnet18")
    dense = count(model, x)
    once = fxcompress.compress(
        model, [L1FilterPruner(budget=Budget(macs=0.8)), Speedup()], example_inputs=x, verify=False
    )
    twice = fxcompress.compress(
        once, [L1FilterPruner(budget=Budget(macs=0.5)), Speedup()], example_inputs=x, verify=False
    )
    assert 0.4975 <= count(twice, x).macs / dense.macs <= 0.5
    again = fxcompress.compress(twice, [L1FilterPruner(budget=Budget(macs=0.5))], example_inputs=x, verify=False)
    assert not fxcompress.masks(again)


def test_excluded_layers_stay_whole_and_masks_count() -> None:
    model, x = build("resnet18")
    masked = fxcompress.compress(model, [L1FilterPruner(0.3, include="layer1.*")], example_inputs=x)
    passes = [L1FilterPruner(budget=Budget(macs=0.6), exclude="layer2.*"), Speedup()]
    small = fxcompress.compress(masked, passes, example_inputs=x, verify=False)
    assert small.get_parameter("layer2.0.conv1.weight").shape[0] == 128
    assert small.get_parameter("layer1.0.conv1.weight").shape[0] <= 64 - 19
    assert 0.597 <= count(small, x).macs / count(model, x).macs <= 0.6


def test_proportions_of_a_mapping() -> None:
    model, x = build("resnet18")
    passes = [L1FilterPruner({"*": 0.2, "layer4.*": 0.4}, budget=Budget(macs=0.7)), Speedup()]
    small = fxcompress.compress(model, passes, example_inputs=x, verify=False)
    lost = [1 - small.get_parameter(f"layer{i}.0.conv1.weight").shape[0] / width for i, width in ((3, 256), (4, 512))]
    assert lost[1] / lost[0] == pytest.approx(2, rel=0.05)


def test_numbers_of_numpy_are_numbers() -> None:
    given = Budget(macs=np.float32(0.5), params=np.float64(0.25))  # type: ignore[arg-type]
    assert given == Budget(macs=0.5, params=0.25)
    assert {type(ratio) for ratio in given.ratios.values()} == {float}
    with pytest.raises(InputError, match="macs is"):
        Budget(macs=np.array([0.5]))  # type: ignore[arg-type]
