"""Sparsity is met as the contract counts it, whatever the pruner and the architecture, and measured as it is."""

import pytest
import torch
from criterion_cases import case
from nets import Net
from scores import InOrder
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress import InputError, Task
from fxcompress.passes import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ChannelPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    RandomFilterPruner,
    Speedup,
    TaylorFOPruner,
)

CRITERIA: tuple[type[ChannelPruner], ...] = (
    L1FilterPruner, L2FilterPruner, FPGMPruner, RandomFilterPruner, ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner, TaylorFOPruner,
)  # fmt: skip


DEFAULT = {("cnn", 0.9), ("vit", 0.5), ("gqa", 0.99)}
#: Every architecture at every sparsity; one of each in a short run.
some = pytest.mark.parametrize(
    "name, sparsity",
    [
        pytest.param(name, sparsity, marks=[] if (name, sparsity) in DEFAULT else pytest.mark.long)
        for name in ("cnn", "vit", "gqa")
        for sparsity in (0.1, 0.5, 0.9, 0.99)
    ],
)


def traced(name: str) -> tuple[fxcompress.TracedModule, Tensor, Task]:
    model, x, task = case(name)
    return fxcompress.trace(model, x), x, task


def dead(masked: nn.Module, group: fxcompress.Group) -> list[bool]:
    """For each channel of a group whether all its producing slices are masked."""
    masks, alive = fxcompress.masks(masked), [False] * group.width
    for item in group.slices:
        mask = masks.get(item.parameter)
        lines = None if mask is None else item.lines(mask)
        for row, channel in zip(item.rows.tolist(), item.channels.tolist(), strict=True):
            alive[channel] |= lines is None or bool(lines[row].any())
    return [not each for each in alive]


@some
def test_every_criterion_meets_the_sparsity_of_every_group(name: str, sparsity: float) -> None:
    """A group of N channels in r rows loses int(N / r * s) of every row, and never its last."""
    model, x, task = traced(name)
    groups = fxcompress.channel_groups(model, x)
    for kind in CRITERIA:
        masked = fxcompress.compress(model, [kind(sparsity)], example_inputs=x, task=task, verify=False)
        for group in groups:
            gone = dead(masked, group)
            rows = [[gone[i] for i in range(group.width) if group.row_of[i] == row] for row in range(group.rows)]
            size = group.width // group.rows
            expected = min(int(size * sparsity), size - 1) if group.removable else 0
            assert [sum(row) for row in rows] == [expected] * group.rows, (kind, group)


@some
def test_every_criterion_meets_a_global_sparsity(name: str, sparsity: float) -> None:
    model, x, task = traced(name)
    groups = [group for group in fxcompress.channel_groups(model, x) if group.removable]
    units = [group.width // group.rows for group in groups]
    for kind in CRITERIA:
        pruner = kind(sparsity, scope="global", norm_by="layer")
        masked = fxcompress.compress(model, [pruner], example_inputs=x, task=task, verify=False)
        gone = [sum(dead(masked, group)) // group.rows for group in groups]
        assert all(count < whole for count, whole in zip(gone, units, strict=True)), kind
        assert sum(gone) == min(int(sum(units) * sparsity), sum(units) - len(units)), kind


@pytest.mark.parametrize("name, heads", [("vit", 5), pytest.param("gqa", 2, marks=pytest.mark.long)])
def test_every_criterion_meets_the_sparsity_of_heads(name: str, heads: int) -> None:
    model, x, task = traced(name)
    sets = fxcompress.channel_groups(model, x).row_sets
    assert [rows.width for rows in sets] == [heads] * 2
    for kind in CRITERIA:
        pruner = kind(0.5, granularity="head")
        masked = fxcompress.compress(model, [pruner], example_inputs=x, task=task, verify=False)
        small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
        left = [rows.width for rows in fxcompress.channel_groups(small, x).row_sets]
        kept = heads - int(heads * 0.5)
        assert left == ([kept] * 2 if kept > 1 else []), kind  # a single row is no set of rows


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["cnn", "vit", "gqa"])
def test_single_weights(name: str, sparsity: float) -> None:
    model, x, _ = traced(name)
    found = fxcompress.sparsity(fxcompress.compress(model, [LevelPruner(sparsity)], example_inputs=x))
    weights = {name: count for name, count in found.parameters.items() if count.gone}
    for key, count in weights.items():
        assert count.gone == int(count.elements * sparsity), key
        assert count.gone < count.elements
    masked = fxcompress.compress(model, [LevelPruner(sparsity, scope="global")], example_inputs=x)
    after = fxcompress.sparsity(masked)
    assert sum(after.parameters[key].gone for key in weights) == int(
        sum(c.elements for c in weights.values()) * sparsity
    )
    assert all(mask.any() for mask in fxcompress.masks(masked).values())


def test_a_cap_holds_in_either_scope_and_for_what_is_masked_already() -> None:
    model, x, _ = case("cnn")
    groups = [group for group in fxcompress.channel_groups(model, x) if group.removable]
    for options in ({"scope": "global"}, {}):
        pruner = L1FilterPruner(0.9, max_sparsity_per_group=0.6, **options)  # type: ignore[arg-type]
        masked = fxcompress.compress(model, [pruner], example_inputs=x)
        assert [sum(dead(masked, group)) for group in groups] == [int(group.width * 0.6) for group in groups]
    first = fxcompress.compress(model, [L1FilterPruner(0.8, include="fc1")], example_inputs=x)
    capped = L1FilterPruner(0.4, scope="global", max_sparsity_per_group=0.5)
    again = fxcompress.compress(first, [capped], example_inputs=x)
    gone = [sum(dead(again, group)) for group in groups]
    assert gone[-1] == int(13 * 0.8)
    assert sum(gone) == int(41 * 0.4)


# ---- what is measured ------------------------------------------------------------------------------------------------


def plain() -> Net:
    return Net(
        lambda n, x: n.fc(F.max_pool2d(F.relu(n.bn(n.a(x))), 4).flatten(1)),
        a=nn.Conv2d(3, 6, 3, padding=1), bn=nn.BatchNorm2d(6), fc=nn.Linear(6 * 4, 5),
    )  # fmt: skip


X = torch.randn(2, 3, 8, 8)


def test_masked_removed_and_zero_elements_count() -> None:
    """a is 6 x 27 + 6, bn 2 x 6, fc 5 x 24 + 5; half of all but fc's bias goes."""
    net = plain()
    masked = fxcompress.compress(net, [InOrder(0.5)], example_inputs=X)
    total = 0.5 * (162 + 6 + 12 + 120) / (162 + 6 + 12 + 125)
    for found in (fxcompress.sparsity(masked), fxcompress.sparsity(masked, net)):
        half = dict.fromkeys(("a.weight", "a.bias", "bn.weight", "bn.bias", "fc.weight", "a", "bn"), 0.5)
        assert dict(found) == {**half, "fc.bias": 0.0, "fc": 0.5 * 120 / 125}
        assert found.total == pytest.approx(total)
        assert found.layers["a"].gone == 84
        assert "fc" in str(found)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    assert fxcompress.sparsity(small).total == 0
    assert dict(fxcompress.sparsity(small, net)) == dict(fxcompress.sparsity(masked))
    assert fxcompress.sparsity(net).total == 0
    with pytest.raises(InputError, match=r"a\.weight has 162 elements, and 81 in the dense model"):
        fxcompress.sparsity(net, small)
    with pytest.raises(KeyError, match="no parameter and no layer"):
        fxcompress.sparsity(net)["b"]


def test_masks_that_were_multiplied_in_count_and_zero_biases_do_not() -> None:
    net = plain()
    with torch.no_grad():
        net.fc.bias.zero_()
        net.bn.bias.zero_()
    masked = fxcompress.compress(net, [LevelPruner(0.25)], example_inputs=X)
    sparse = fxcompress.compress(masked, [Speedup()], example_inputs=X)
    for found in (fxcompress.sparsity(masked), fxcompress.sparsity(sparse)):
        assert found["a.weight"] == int(162 * 0.25) / 162
        assert found["fc.weight"] == 0.25
        assert found["fc.bias"] == found["bn"] == 0
        assert found.total == (int(162 * 0.25) + 30) / 305


def test_tied_weights_count_once_and_nothing_is_nothing() -> None:
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    assert fxcompress.sparsity(nn.Sequential(embed, head)).parameters.keys() == {"0.weight"}
    assert fxcompress.sparsity(nn.ReLU()).total == 0
