"""Removal for real: what is left, what is not touched, and masks that came from elsewhere."""

import copy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from channel_cases import CASES, conv
from nets import Net
from scores import InOrder, choose
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError
from fxcompress.passes import L1FilterPruner, LevelPruner, RandomFilterPruner, Speedup

IMAGE = torch.randn(2, 3, 8, 8)


def close(expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def small_net() -> Net:
    return Net(
        lambda n, x: n.fc(F.relu(n.bn(n.a(x))).mean((2, 3))),
        a=conv(3, 8, 3), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 5),
    ).double()  # fmt: skip


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_with_nothing_to_do_nothing_changes() -> None:
    net = small_net()
    done = fxcompress.compress(net, [Speedup()], example_inputs=IMAGE.double())
    (step,) = done.meta["history"]
    assert not step.modified
    assert str(done.graph) == str(fxcompress.trace(net, IMAGE.double()).graph)
    assert all(torch.equal(a, b) for a, b in zip(done.state_dict().values(), net.state_dict().values(), strict=True))


def test_removing_twice_changes_nothing_more() -> None:
    x = IMAGE.double()
    small = fxcompress.compress(small_net(), [InOrder(0.5), Speedup()], example_inputs=x)
    again = fxcompress.compress(small, [Speedup()], example_inputs=x)
    assert not again.meta["history"][-1].modified
    assert str(again.graph) == str(small.graph)
    assert shapes(again) == shapes(small)


def test_what_is_left() -> None:
    """Channels 0 to 3 of 8 go: every slice is the dense one without them."""
    net, x = small_net(), IMAGE.double()
    small = fxcompress.compress(net, [InOrder(0.5), Speedup()], example_inputs=x)
    state, dense = small.state_dict(), net.state_dict()
    assert list(state) == list(dense)
    for key in ("a.weight", "a.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        assert torch.equal(state[key], dense[key][4:]), key
    assert torch.equal(state["fc.weight"], dense["fc.weight"][:, 4:])
    assert torch.equal(state["fc.bias"], dense["fc.bias"])
    assert [str(n.target) for n in small.graph.nodes if n.op == "call_module"] == ["a", "bn", "fc"]
    assert {type(small.get_submodule(name)) for name in ("a", "bn", "fc")} == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert fxcompress.masks(small) == {}
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    net = small_net()
    net.a.requires_grad_(False)
    small = fxcompress.compress(net, [InOrder(0.5), Speedup()], example_inputs=IMAGE.double())
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {"a.weight", "a.bias"}


@pytest.mark.parametrize("name", CASES)
def test_attributes_agree_with_the_weights(name: str) -> None:
    case = CASES[name]
    small = fxcompress.compress(case.net(), [RandomFilterPruner(0.5), Speedup()], example_inputs=case.x)
    for module in small.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            assert (module.in_channels, module.out_channels) == (weight.shape[0], weight.shape[1] * module.groups)
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert (module.in_channels, module.out_channels) == (weight.shape[1] * module.groups, weight.shape[0])
            assert module.in_channels % module.groups == module.out_channels % module.groups == 0
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == weight.shape
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_features == len(weight) == len(cast(Tensor, module.running_var))
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(weight)
            assert module.num_channels % module.num_groups == 0
        elif isinstance(module, nn.PReLU):
            assert module.num_parameters == len(weight)
        if weight is not None:
            assert str(module) in str(small)


def test_attributes_of_layers_without_weights() -> None:
    net = Net(
        lambda n, x: n.b(n.ln(n.gn(n.bn(n.a(x))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        a=conv(3, 8), bn=nn.BatchNorm2d(8, affine=False), gn=nn.GroupNorm(2, 8, affine=False),
        ln=nn.LayerNorm(8, elementwise_affine=False), b=conv(8, 4),
    )  # fmt: skip
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=IMAGE)
    bn, gn, ln = (small.get_submodule(name) for name in ("bn", "gn", "ln"))
    assert (bn.num_features, gn.num_channels, gn.num_groups, ln.normalized_shape) == (4, 4, 2, (4,))
    assert len(small.get_buffer("bn.running_mean")) == 4


def test_embedding_attributes() -> None:
    net = Net(lambda n, x: n.b(n.norm(n.e(x))), e=nn.Embedding(7, 6), norm=nn.RMSNorm(6), b=nn.Linear(6, 2))
    small = fxcompress.compress(net, [InOrder(0.5), Speedup()], example_inputs=torch.tensor([[1, 2]]))
    e = small.get_submodule("e")
    assert (e.num_embeddings, e.embedding_dim) == (7, 3) == tuple(small.get_parameter("e.weight").shape)
    assert tuple(small.get_submodule("norm").normalized_shape) == (3,)  # type: ignore[arg-type]


# ---- masks that came from elsewhere -------------------------------------------------------------------------------


def given(net: nn.Module, slices: dict[str, list[int]]) -> dict[str, Tensor]:
    """Masks that are False at the indices of ``"parameter:dim"``."""
    masks: dict[str, Tensor] = {}
    for key, indices in slices.items():
        name, _, dim = key.partition(":")
        masks.setdefault(name, torch.ones(net.get_parameter(name).shape, dtype=torch.bool))
        masks[name].index_fill_(int(dim or 0), torch.tensor(indices), False)
    return masks


def zeroed(net: Net, masks: dict[str, Tensor]) -> Net:
    made = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            made.get_parameter(name).mul_(mask)
    return made


def test_given_masks_of_whole_channels_are_removed() -> None:
    net, x = small_net(), IMAGE.double()
    masks = given(
        net, {"a.weight": [1, 6], "a.bias": [1, 6], "bn.weight": [1, 6], "bn.bias": [1, 6], "fc.weight:1": [1, 6]}
    )
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    assert small.get_parameter("a.weight").shape == (6, 3, 3, 3)
    assert small.get_parameter("fc.weight").shape == (5, 6)
    for each in (x, torch.randn(5, 3, 8, 8, dtype=torch.float64)):
        close(zeroed(net, masks)(each), small(each))


FOREIGN: dict[str, dict[str, list[int]]] = {
    "a convolution alone": {"a.weight": [1, 6], "a.bias": [1, 6]},
    "its weight alone": {"a.weight": [1, 6]},
    "its consumer alone": {"fc.weight:1": [2]},
    "all but the consumer": {"a.weight": [3], "a.bias": [3], "bn.weight": [3], "bn.bias": [3]},
    "the norm alone": {"bn.weight": [0], "bn.bias": [0]},
    "inputs": {"a.weight:1": [2]},
    "an odd set": {"a.weight": [0, 1, 2], "bn.bias": [1, 2], "fc.weight:1": [2, 5]},
}


@pytest.mark.parametrize("slices", FOREIGN.values(), ids=FOREIGN)
def test_given_masks_of_part_of_a_channel_keep_the_function(slices: dict[str, list[int]]) -> None:
    """A channel whose convolution is masked still emits what the norm and the activation make of zero."""
    net, x = small_net(), IMAGE.double()
    masks = given(net, slices)
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    for each in (x, torch.randn(5, 3, 8, 8, dtype=torch.float64)):
        close(zeroed(net, masks)(each), small(each))
    assert fxcompress.masks(small) == {}


def test_given_masks_join_the_models_own() -> None:
    net, x = small_net(), IMAGE.double()
    masked = fxcompress.compress(net, [choose({"a": 8}, {"a": [0, 1]}), LevelPruner(0.3)], example_inputs=x)
    masks = given(
        net, {"a.weight": [1, 6], "a.bias": [1, 6], "bn.weight": [1, 6], "bn.bias": [1, 6], "fc.weight:1": [1, 6]}
    )
    small = fxcompress.compress(masked, [Speedup(masks=masks)], example_inputs=x)
    assert small.get_parameter("a.weight").shape == (5, 3, 3, 3)
    own = fxcompress.masks(masked)
    joined = {name: own.get(name, masks[name]) & masks[name] for name in masks}
    close(zeroed(net, joined)(x), small(x))
    assert fxcompress.masks(masked).keys() == own.keys()


def test_given_masks_of_another_module_of_the_same_kind() -> None:
    """What one masked model says can be given to another."""
    net, x = small_net(), IMAGE.double()
    masks = fxcompress.masks(fxcompress.compress(net, [L1FilterPruner(0.5)], example_inputs=x))
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    direct = fxcompress.compress(net, [L1FilterPruner(0.5), Speedup()], example_inputs=x)
    assert shapes(small) == shapes(direct)
    close(direct(x), small(x))


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda m: m | {"b.weight": m["a.weight"]}, "'b.weight'"),
        (lambda m: m | {"a.bias": m["a.bias"][:4]}, r"'a.bias'.*\(4,\).*\(8,\)"),
        (lambda m: m | {"a.bias": m["a.bias"].float()}, "'a.bias'.*float32.*bool"),
        (lambda m: m | {"a.bias": [True] * 8}, "'a.bias'.*list"),
        (
            lambda m: {name: torch.zeros_like(mask) for name, mask in m.items()},
            r"every channel of group a.*at least one",
        ),
    ],
    ids=["name", "shape", "dtype", "type", "empties a group"],
)
def test_given_masks_that_do_not_fit(change: Any, part: str) -> None:
    net = small_net()
    masks = given(net, {"a.weight": [1], "a.bias": [1], "bn.weight": [1], "bn.bias": [1], "fc.weight:1": [1]})
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InputError, match=part):
        fxcompress.compress(net, [Speedup(masks=change(masks))], example_inputs=IMAGE.double())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_rows_that_given_masks_leave_unequal_stay() -> None:
    """A grouped convolution cannot lose a channel of one group only: it stays, with its zeros."""
    net = Net(lambda n, x: n.b(n.g(n.a(x))), a=conv(3, 8), g=conv(8, 8, 3, groups=2), b=conv(8, 4)).double()
    x = IMAGE.double()
    masks = given(net, {"g.weight": [0, 1, 4], "g.bias": [0, 1, 4], "b.weight:1": [0, 1, 4]})
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=x)
    assert small.get_submodule("g").out_channels == 6  # one of each group
    close(zeroed(net, masks)(x), small(x))


def test_rows_of_a_group_norm_are_its_groups_even_where_channels_repeat() -> None:
    class Tied(nn.Module):
        """Three channels twice: a, b, c, a, b, c in groups of two, of which none can lose one alone."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.other.weight, self.other.bias = self.conv.weight, self.conv.bias
            self.norm, self.head = nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.cat([self.conv(x), self.other(x.flip(2))], 1)))

    net, x = Tied().eval(), torch.randn(2, 3, 6, 6)
    masked = fxcompress.compress(net, [L1FilterPruner(0.5)], example_inputs=x)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    torch.testing.assert_close(small(x), masked(x))
    assert small.get_submodule("norm").num_groups == 3
