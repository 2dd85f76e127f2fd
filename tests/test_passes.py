"""Channel pruners: their definitions by explicit loops, and which layers and how many channels they take."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError
from fxcompress.masking import Masking, lay
from fxcompress.passes import (
    ChannelPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    Layer,
    RandomFilterPruner,
)

IMAGE = torch.randn(2, 3, 6, 6)


def l1(slices: list[list[float]]) -> list[float]:
    return [sum(abs(w) for w in row) for row in slices]


def l2(slices: list[list[float]]) -> list[float]:
    return [sum(w * w for w in row) ** 0.5 for row in slices]


def median_distance(slices: list[list[float]]) -> list[float]:
    def distance(a: list[float], b: list[float]) -> float:
        return sum((v - w) ** 2 for v, w in zip(a, b, strict=True)) ** 0.5

    return [sum(distance(a, b) for b in slices) for a in slices]


Definition = Callable[[list[list[float]]], list[float]]
CRITERIA: list[tuple[type[ChannelPruner], Definition]] = [
    (L1FilterPruner, l1),
    (L2FilterPruner, l2),
    (FPGMPruner, median_distance),
]


def slices_of(layer: nn.Module) -> list[list[float]]:
    """Each output's weights, whatever the layer's own layout, as plain numbers."""
    weight = layer.get_parameter("weight").detach()
    if isinstance(layer, (nn.ConvTranspose2d, nn.Embedding)):
        weight = weight.transpose(0, 1)
    return weight.flatten(1).tolist()


def dead_of(masked: nn.Module, name: str, dim: int = 0) -> list[int]:
    masks = fxcompress.masks(masked)
    if name not in masks:
        return []
    mask = masks[name].movedim(dim, 0)
    return (~mask.reshape(len(mask), -1).any(1)).nonzero().flatten().tolist()


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def chain() -> Net:
    return Net(
        lambda n, x: n.d(n.c(torch.relu(n.b(torch.relu(n.a(x)))))),
        a=nn.Conv2d(3, 8, 3), b=nn.ConvTranspose2d(8, 7, 2), c=nn.Conv2d(7, 6, 1), d=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


@pytest.mark.parametrize("criterion, definition", CRITERIA)
@pytest.mark.parametrize(
    "weight", [(5, 4), (6, 3, 2, 2), (1, 7), (4, 1), (3, 200)], ids=lambda shape: "x".join(map(str, shape))
)
def test_scores_by_explicit_loops(
    criterion: type[ChannelPruner], definition: Definition, weight: tuple[int, ...]
) -> None:
    values = torch.randn(weight)
    found = criterion(0.5).score(Layer("fc", nn.Identity(), values))
    torch.testing.assert_close(found.double(), torch.tensor(definition(values.flatten(1).tolist())).double())


def test_fpgm_tells_close_filters_apart() -> None:
    """Distances by a matrix product would lose these in rounding."""
    values = torch.full((3, 64), 100.0)
    values[1, 0] += 1e-3
    values[2, 0] += 2e-3
    found = FPGMPruner(0.5).score(Layer("fc", nn.Identity(), values)).double()
    expected = torch.tensor(median_distance(values.tolist())).double()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("criterion, definition", CRITERIA)
def test_the_lowest_of_every_layer_go(criterion: type[ChannelPruner], definition: Definition) -> None:
    net = chain()
    masked = fxcompress.compress(net, [criterion(0.4)], example_inputs=IMAGE)
    for name, dim, width in (("a", 0, 8), ("b", 1, 7), ("c", 0, 6)):
        expected = lowest(definition(slices_of(net.get_submodule(name))), int(width * 0.4))
        assert dead_of(masked, f"{name}.weight", dim) == expected
    assert dead_of(masked, "d.weight") == []


def test_embeddings_are_scored_by_column() -> None:
    net = Net(lambda n, x: n.b(n.e(x)), e=nn.Embedding(9, 6), b=nn.Linear(6, 2))
    masked = fxcompress.compress(net, [L2FilterPruner(0.5)], example_inputs=torch.tensor([[1, 2]]))
    assert dead_of(masked, "e.weight", 1) == lowest(l2(slices_of(net.e)), 3)


# ---- coupled layers -----------------------------------------------------------------------------------------------


def coupled(first: list[float], second: list[float], alone: list[float]) -> Net:
    """Two layers that are added, and one of its own; the L1 norm of output i is the i-th number."""
    net = Net(
        lambda n, x: n.d(n.c(n.a(x) + n.b(x))),
        a=nn.Linear(1, len(first)), b=nn.Linear(1, len(first)), c=nn.Linear(len(first), len(alone)),
        d=nn.Linear(len(alone), 2),
    )  # fmt: skip
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor(first)[:, None])
        net.b.weight.copy_(-torch.tensor(second)[:, None])
        net.c.weight.copy_(torch.tensor(alone)[:, None] / len(first))
    return net


@pytest.mark.parametrize("reduce, victim", [("sum", 1), ("mean", 1), ("max", 2)])
def test_scores_of_coupled_layers_are_combined(reduce: Any, victim: int) -> None:
    """Sums 7, 6.5, 7; maxima 6, 5, 4."""
    net = coupled([1, 5, 4], [6, 1.5, 3], [1, 2])
    masked = fxcompress.compress(net, [L1FilterPruner(0.34, reduce=reduce)], example_inputs=torch.randn(2, 1))
    assert dead_of(masked, "a.weight") == dead_of(masked, "b.weight") == [victim]
    assert dead_of(masked, "c.weight", 1) == [victim]


@pytest.mark.parametrize(
    "reduce, coupled_dead, alone_dead", [("sum", [], [0, 1]), ("mean", [0, 1], []), ("max", [], [0, 1])]
)
def test_how_scores_are_combined_matters_between_groups(
    reduce: Any, coupled_dead: list[int], alone_dead: list[int]
) -> None:
    """Sums 10, 11, 12, means 5, 5.5, 6 and maxima 9.9, 10.9, 11.9 against 7, 8, 9."""
    net = coupled([9.9, 10.9, 11.9], [0.1, 0.1, 0.1], [7, 8, 9])
    pruner = L1FilterPruner(0.34, reduce=reduce, scope="global")
    masked = fxcompress.compress(net, [pruner], example_inputs=torch.randn(2, 1))
    assert dead_of(masked, "a.weight") == coupled_dead
    assert dead_of(masked, "c.weight") == alone_dead


def test_scores_read_effective_values() -> None:
    """What an element mask hides does not count: without it output 0 is the largest, with it the smallest."""
    net = coupled([1, 1, 1], [1, 1, 1], [1, 2, 3])
    with torch.no_grad():
        net.c.weight.copy_(torch.tensor([[0.5] * 3, [0.1, 0.1, 0.6], [0.6, 0.1, 0.1]]))
    x = torch.randn(2, 1)
    assert dead_of(fxcompress.compress(net, [L1FilterPruner(0.5, include="c")], example_inputs=x), "c.weight") == [1]
    keep = torch.tensor([[False, False, True], [True] * 3, [True] * 3])

    @fxcompress.graph_pass
    def hide(module: Any) -> None:
        lay(module, Masking({"c.weight": keep}), None, "hide")

    masked = fxcompress.compress(net, [hide, L1FilterPruner(0.5, include="c")], example_inputs=x)
    assert dead_of(masked, "c.weight") == [0]


# ---- one ranking over all groups ----------------------------------------------------------------------------------


def ranked(widths: Mapping[str, list[float]], sparsity: float) -> dict[str, list[int]]:
    """int(N * s) channels go one by one: the lowest score whose group has another channel left."""
    left = {name: len(scores) for name, scores in widths.items()}
    gone: dict[str, list[int]] = {name: [] for name in widths}
    for _ in range(int(sum(left.values()) * sparsity)):
        candidates = [
            (score, place, i, name)
            for place, (name, scores) in enumerate(widths.items())
            for i, score in enumerate(scores)
            if i not in gone[name] and left[name] > 1
        ]
        if not candidates:
            break
        *_, i, name = min(candidates)
        gone[name].append(i)
        left[name] -= 1
    return {name: sorted(indices) for name, indices in gone.items()}


@pytest.mark.parametrize("norm_by", ["none", "size", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83, 0.99])
@pytest.mark.parametrize("seed", [1, 2])
def test_global_ranking_against_brute_force(norm_by: Any, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = chain()
    with torch.no_grad():
        for layer, factor in ((net.a, 1.0), (net.b, 0.3), (net.c, 2.0)):
            weight = torch.randn_like(layer.weight) * factor
            layer.weight.copy_((weight * 4).round() / 4 if norm_by == "none" else weight)  # quarters: exact, with ties
    scores = {}
    for name in "abc":
        slices = slices_of(net.get_submodule(name))
        scores[name] = l1(slices)
        if norm_by == "size":
            scores[name] = [score / len(slices[0]) for score in scores[name]]
        if norm_by == "layer":
            mean = sum(scores[name]) / len(scores[name])
            scores[name] = [score / mean for score in scores[name]]
    pruner = L1FilterPruner(sparsity, scope="global", norm_by=norm_by)
    masked = fxcompress.compress(net, [pruner], example_inputs=IMAGE)
    found = {name: dead_of(masked, f"{name}.weight", int(name == "b")) for name in "abc"}
    assert sum(map(len, found.values())) == min(int(21 * sparsity), 18)
    assert found == ranked(scores, sparsity)


# ---- random -------------------------------------------------------------------------------------------------------


def test_random_is_reproducible_and_uniform() -> None:
    def dead(seed: int) -> list[int]:
        torch.manual_seed(random.randrange(10**6))
        masked = fxcompress.compress(net, [RandomFilterPruner(0.5, seed=seed)], example_inputs=torch.randn(2, 3))
        return dead_of(masked, "a.weight") + [100 + i for i in dead_of(masked, "b.weight")]

    net = Net(lambda n, x: n.c(n.b(n.a(x))), a=nn.Linear(3, 12), b=nn.Linear(12, 12), c=nn.Linear(12, 2))
    draws = [dead(seed) for seed in range(12)]
    assert draws == [dead(seed) for seed in range(12)]
    assert len({tuple(draw) for draw in draws}) == 12
    assert all(len(draw) == 12 for draw in draws)
    counts = [sum(i in draw for draw in draws) for i in range(12)]
    assert max(counts) < 12
    assert min(counts) > 0
    assert any([i for i in draw if i < 100] != [i - 100 for i in draw if i >= 100] for draw in draws)


def test_random_leaves_the_global_generator_alone() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    fxcompress.compress(net, [RandomFilterPruner(0.5)], example_inputs=torch.ones(2, 3))
    assert torch.equal(torch.rand(2), expected)


# ---- which layers -------------------------------------------------------------------------------------------------


def nested() -> Net:
    block = {"conv": nn.Conv2d(6, 8, 1), "up": nn.ConvTranspose2d(8, 6, 1)}
    return Net(
        lambda n, x: n.head(n.body.up(n.body.conv(n.stem(x)))),
        stem=nn.Conv2d(3, 6, 1), body=nn.ModuleDict(block), head=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def taken(masked: nn.Module) -> set[str]:
    names = {"stem": ("stem.weight", 0), "body.conv": ("body.conv.weight", 0), "body.up": ("body.up.weight", 1)}
    return {layer for layer, (name, dim) in names.items() if dead_of(masked, name, dim)}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"stem", "body.conv", "body.up"}),
        ({"include": "stem"}, {"stem"}),
        ({"include": "body"}, {"body.conv", "body.up"}),
        ({"include": "*.conv"}, {"body.conv"}),
        ({"include": nn.ConvTranspose2d}, {"body.up"}),
        ({"include": lambda name, module: "o" in name and module.kernel_size == (1, 1)}, {"body.conv", "body.up"}),
        ({"include": ["stem", nn.ConvTranspose2d]}, {"stem", "body.up"}),
        ({"exclude": "body.*"}, {"stem"}),
        ({"exclude": nn.Conv2d}, {"body.up"}),
        ({"include": "body", "exclude": "body.up"}, {"body.conv"}),
        ({"sparsity": {"stem": 0.5}}, {"stem"}),
        ({"sparsity": {"*": 0.5, "body": 0.0}}, {"stem"}),
        ({"sparsity": {"body": 0.0, "*": 0.5}}, {"stem", "body.conv", "body.up"}),  # the last match
        ({"sparsity": {"*": 0.5}, "include": "body.up"}, {"body.up"}),
    ],
)
def test_which_layers_are_taken(options: dict[str, Any], expected: set[str]) -> None:
    pruner = L1FilterPruner(**{"sparsity": 0.5, **options})
    assert taken(fxcompress.compress(nested(), [pruner], example_inputs=IMAGE)) == expected


def test_a_mapping_says_how_many_for_each_layer() -> None:
    pruner = L1FilterPruner({"*": 0.5, "body.*": 0.25, "body.up": 0.7})
    masked = fxcompress.compress(nested(), [pruner], example_inputs=IMAGE)
    assert len(dead_of(masked, "stem.weight")) == 3
    assert len(dead_of(masked, "body.conv.weight")) == 2
    assert len(dead_of(masked, "body.up.weight", 1)) == 4


@pytest.mark.parametrize(
    "sparsity, count, disagree",
    [({"a": 0.75, "b": 0.5}, 2, True), ({"a": 0.75}, 0, True), ({"b": 0.75, "a": 0.75}, 3, False)],
)
def test_layers_of_a_group_that_disagree_take_the_smallest_and_say_so(
    sparsity: dict[str, float], count: int, disagree: bool
) -> None:
    net = coupled([1, 2, 3, 4], [1, 2, 3, 4], [1, 2])
    masked = fxcompress.compress(net, [L1FilterPruner(sparsity)], example_inputs=torch.randn(2, 1))
    assert len(dead_of(masked, "a.weight")) == count
    (step,) = masked.meta["history"]
    assert any("disagree" in note for note in step.notes) == disagree


def test_a_group_is_taken_if_any_layer_is_included_and_none_excluded() -> None:
    x = torch.randn(2, 1)
    net = coupled([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4])
    assert dead_of(fxcompress.compress(net, [L1FilterPruner(0.5, include="a")], example_inputs=x), "b.weight") == [0, 1]
    masked = fxcompress.compress(net, [L1FilterPruner(0.5, exclude="a")], example_inputs=x)
    assert dead_of(masked, "b.weight") == []
    assert dead_of(masked, "c.weight") == [0, 1]


def test_only_frozen_layers_is_a_warning_with_the_reason() -> None:
    with pytest.warns(UserWarning, match=r"nothing to prune.*head.*output of the model"):
        masked = fxcompress.compress(nested(), [L1FilterPruner(0.5, include="head")], example_inputs=IMAGE)
    assert fxcompress.masks(masked) == {}


# ---- custom criteria ----------------------------------------------------------------------------------------------


class Scores(ChannelPruner):
    seen: dict[str, tuple[tuple[int, ...], type[nn.Module]]] = {}  # noqa: RUF012

    def score(self, layer: Layer) -> Tensor:
        self.seen[layer.name] = tuple(layer.weight.shape), type(layer.module)
        return layer.weight.flatten(1).sum(1)


def test_a_criterion_sees_every_layer_with_its_channels_first() -> None:
    Scores.seen.clear()
    fxcompress.compress(chain(), [Scores(0.5)], example_inputs=IMAGE)
    assert Scores.seen == {
        "a": ((8, 3, 3, 3), nn.Conv2d),
        "b": ((7, 8, 2, 2), nn.ConvTranspose2d),
        "c": ((6, 7, 1, 1), nn.Conv2d),
    }


@pytest.mark.parametrize(
    "score, part",
    [
        (lambda layer: torch.zeros(3), r"expected shape \(8,\)"),
        (lambda layer: 1.0, "float"),
        (lambda layer: torch.full((len(layer.weight),), float("nan")), "NaN"),
        (lambda layer: layer.missing, "missing"),
    ],
)
def test_a_criterion_that_is_wrong_is_named(score: Any, part: str) -> None:
    class Wrong(ChannelPruner):
        def score(self, layer: Layer) -> Tensor:
            return score(layer)  # type: ignore[no-any-return]

    with pytest.raises(fxcompress.PassError, match=part) as caught:
        fxcompress.compress(chain(), [Wrong(0.5, include="a")], example_inputs=IMAGE)
    assert "Wrong" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "model"}, {"round_to": 0}, {"round_to": 1.5}, {"round_to": True}, {"reduce": "min"},
        {"norm_by": "width"}, {"scope": "global", "sparsity": {"*": 0.5}},
    ],
)  # fmt: skip
def test_options_are_checked_when_the_pass_is_written(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        L1FilterPruner(**{"sparsity": 0.5, **options})
