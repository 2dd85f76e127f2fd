"""Whole rows: heads of attention, groups of convolutions and norms go as one, or shrink evenly."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Net
from removal import relative_gap
from scores import InOrder
from test_channels_tokens import CASES as TOKEN_CASES
from test_channels_tokens import TOKENS, fused, join_heads, rotated, split_heads
from torch import Tensor, nn

import fxcompress
from fxcompress import InputError, TracedModule
from fxcompress.passes import ChannelPruner, L1FilterPruner, Layer, RandomFilterPruner, Speedup
from fxcompress.removable_units import crossed_units


def shapes(module: nn.Module, *names: str) -> list[tuple[int, ...]]:
    return [tuple(module.get_parameter(name).shape) for name in names]


def kept(masked: TracedModule, name: str) -> list[int]:
    """Indices of a parameter's slices along dimension 0 that its mask keeps."""
    mask = fxcompress.masks(masked)[name]
    return mask.reshape(len(mask), -1).any(1).nonzero().flatten().tolist()


def check(
    net: nn.Module, x: Any, item: ChannelPruner, others: tuple[Any, ...] = ()
) -> tuple[TracedModule, TracedModule]:
    """Masked and removed, which agree to 1e-9 in float64 on the example and on other inputs."""
    masked = fxcompress.compress(net, [item], example_inputs=x)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    one, two = masked.double(), removed.double()
    for trial in (x, *others):
        args = [t.double() if t.is_floating_point() else t for t in (trial if isinstance(trial, tuple) else (trial,))]
        with torch.no_grad():
            assert relative_gap(one(*args), two(*args)) <= 1e-9
    return masked, removed


class Separate(nn.Module):
    """Queries, keys and values of their own: ``heads`` of ``size``, q and k of another size than v."""

    def __init__(self, heads: int = 3, size: int = 5, values: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(7, heads * size), nn.Linear(7, heads * size)
        self.v, self.o = nn.Linear(7, heads * values), nn.Linear(heads * values, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        return self.o(join_heads(F.scaled_dot_product_attention(q, k, v)))


LONGER = torch.randn(5, 9, 7)
SHORT = torch.randn(2, 6, 7)


# ---- the option ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("channel", [(9, 7), (9, 7), (6, 7), (7, 6)]),  # int(5 / 2) of 5 and int(4 / 2) of 4 in each of 3 heads
        ("head_dim", [(9, 7), (9, 7), (6, 7), (7, 6)]),
        ("head", [(10, 7), (10, 7), (8, 7), (7, 8)]),  # int(3 / 2) of 3 heads
    ],
)
def test_what_each_granularity_leaves(granularity: Any, expected: list[tuple[int, ...]]) -> None:
    _, removed = check(Separate().eval(), SHORT, L1FilterPruner(0.5, granularity=granularity), (LONGER,))
    assert shapes(removed, "q.weight", "k.weight", "v.weight", "o.weight") == expected


class Given(ChannelPruner):
    """Scores of queries; all other layers have no say."""

    def score(self, layer: Layer) -> Tensor:
        return SCORES if layer.name == "q" else torch.zeros(len(layer.weight))


SCORES = torch.tensor([[1.0, 2, 3, 4, 9], [9, 1, 2, 3, 1], [7, 7, 1, 1, 4]]).flatten()


def test_every_head_keeps_its_own_best_or_all_the_same_positions() -> None:
    net = Separate().eval()
    own = fxcompress.compress(net, [Given({"q": 0.4, "k": 0.4})], example_inputs=SHORT)
    assert kept(own, "q.bias") == kept(own, "k.bias") == [2, 3, 4, 5, 7, 8, 10, 11, 14]
    # sums over the heads: 17, 10, 6, 8, 14
    aligned = fxcompress.compress(net, [Given({"q": 0.4, "k": 0.4}, granularity="head_dim")], example_inputs=SHORT)
    assert kept(aligned, "q.bias") == kept(aligned, "k.bias") == [0, 1, 4, 5, 6, 9, 10, 11, 14]
    # sums over the channels: 19, 16, 20
    whole = fxcompress.compress(net, [Given(0.4, granularity="head")], example_inputs=SHORT)
    assert kept(whole, "q.bias") == kept(whole, "k.bias") == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert kept(whole, "v.bias") == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize(("reduce", "gone"), [("sum", 1), ("mean", 1), ("max", 2)])
def test_a_heads_score_is_reduced_over_its_channels(reduce: Any, gone: int) -> None:
    masked = fxcompress.compress(
        Separate().eval(), [Given(0.4, granularity="head", reduce=reduce)], example_inputs=SHORT
    )
    assert kept(masked, "q.bias") == [i for i in range(15) if i // 5 != gone]


def test_heads_are_counted_whole() -> None:
    net = Separate(heads=7, size=3, values=2).eval()
    for sparsity, heads in ((0.1, 7), (0.29, 5), (0.58, 3), (0.99, 1)):  # int(7 * s) go, never the last
        small = fxcompress.compress(
            net, [L1FilterPruner(sparsity, granularity="head"), Speedup()], example_inputs=SHORT
        )
        assert shapes(small, "q.weight", "o.weight") == [(heads * 3, 7), (7, heads * 2)]
    rounded = fxcompress.compress(
        net, [L1FilterPruner(0.6, granularity="head", round_to=4), Speedup()], example_inputs=SHORT
    )
    assert shapes(rounded, "v.weight") == [(8, 7)]  # 3 rounded up to 4 heads


def test_one_ranking_over_heads_and_channels() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.end = Separate(4, 2, 2), Separate(2, 3, 3), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.two(self.one(x)))

    net = Two().eval()
    with torch.no_grad():
        for layer in (net.one.q, net.one.k, net.one.v):
            layer.weight.mul_(1e-3)
        for layer in (net.one.o, net.two.o):
            layer.weight.mul_(1e3)
    # 4 + 2 heads, 7 channels of one.o and 7 of two.o: int(20 * 0.15) = 3 go, the weakest heads of the first layer
    small = fxcompress.compress(
        net, [L1FilterPruner(0.15, granularity="head", scope="global"), Speedup()], example_inputs=SHORT
    )
    assert shapes(small, "one.q.weight", "two.q.weight", "one.o.weight") == [(2, 7), (6, 7), (7, 2)]


def test_selection_takes_or_leaves_a_whole_set_of_heads() -> None:
    net = Separate().eval()
    for layer in ("q", "v"):
        small = fxcompress.compress(
            net, [L1FilterPruner(0.4, granularity="head", include=layer), Speedup()], example_inputs=SHORT
        )
        assert shapes(small, "q.weight", "v.weight") == [(10, 7), (8, 7)]
    with pytest.warns(UserWarning, match="nothing to prune"):
        left = fxcompress.compress(net, [L1FilterPruner(0.4, granularity="head", exclude="k")], example_inputs=SHORT)
    assert not fxcompress.masks(left)
    by_name = L1FilterPruner({"*": 0.4, "v": 0.8}, granularity="head")
    masked = fxcompress.compress(net, [by_name], example_inputs=SHORT)
    assert len(kept(masked, "v.bias")) == 8  # the smallest that its layers ask for
    assert "disagree" in masked.meta["history"][-1].notes[0]


def test_again_changes_nothing_and_more_goes_on() -> None:
    net = Separate(5).eval()
    once = fxcompress.compress(net, [L1FilterPruner(0.4, granularity="head")], example_inputs=SHORT)
    twice = fxcompress.compress(once, [L1FilterPruner(0.4, granularity="head")], example_inputs=SHORT)
    assert not twice.meta["history"][-1].modified
    both = fxcompress.compress(
        net,
        [L1FilterPruner(0.4, granularity="head"), L1FilterPruner(0.4), Speedup()],
        example_inputs=SHORT,
    )
    assert shapes(both, "q.weight", "v.weight") == [(9, 7), (9, 7)]  # 3 heads of 3: of 5 channels 2, of 4 one


@pytest.mark.parametrize("bad", ["heads", "row", None])
def test_an_unknown_granularity_is_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="expected 'channel', 'head_dim' or 'head'"):
        L1FilterPruner(0.5, granularity=bad)


# ---- what a head takes with it -----------------------------------------------------------------------------------


def test_sets_of_rows() -> None:
    (heads,) = fxcompress.channel_groups(Separate(), SHORT).row_sets
    assert (heads.name, heads.width, heads.layers) == ("q", 3, ("q", "k", "v"))
    expected = {(f"{n}.{leaf}", 0) for n in "qkv" for leaf in ("weight", "bias")} | {("o.weight", 1)}
    assert set(heads.members) == expected
    assert [item.rows[item.channels == 1].tolist() for item in heads.slices] == [[5, 6, 7, 8, 9]] * 2 + [[4, 5, 6, 7]]
    assert str(heads) == "q: 3 rows of q, k, v"


#: By name of a case in test_channels_tokens: shapes that half of the heads leave.
HALVED = {
    "attention by hand": {"q.weight": (4, 3), "v.weight": (4, 3), "o.weight": (3, 4)},
    "scaled dot product": {"q.weight": (4, 3), "v.weight": (4, 3), "o.weight": (3, 4)},
    "causal": {"q.weight": (4, 3), "v.weight": (4, 3), "o.weight": (3, 4)},
    "grouped queries, repeat_interleave": {"q.weight": (8, 3), "k.weight": (4, 3), "o.weight": (3, 8)},
    "grouped queries, expand": {"q.weight": (8, 3), "k.weight": (4, 3), "o.weight": (3, 8)},
    "grouped queries, enable_gqa": {"q.weight": (8, 3), "k.weight": (4, 3), "o.weight": (3, 8)},
    "rotary": {"q.weight": (4, 3), "k.weight": (4, 3), "v.weight": (4, 3), "cos": (9, 4)},
}


@pytest.mark.parametrize("name", HALVED)
def test_half_of_the_heads(name: str) -> None:
    case = TOKEN_CASES[name]
    assert isinstance(case.x, Tensor)
    masked, removed = check(case.net(), case.x, RandomFilterPruner(0.5, granularity="head"), (torch.randn(3, 7, 3),))
    state = {**dict(removed.named_parameters()), **dict(removed.named_buffers())}
    assert {key: tuple(state[key].shape) for key in HALVED[name]} == HALVED[name]
    size = 2 * HALVED[name]["q.weight"][0] // 2
    first = kept(masked, "q.bias")[0]
    assert kept(masked, "q.bias") == list(range(first, first + size))  # contiguous: a head, or a set of them


def repeated(t: Tensor) -> Tensor:
    batch, shared, length, size = t.shape
    return t[:, :, None].expand(batch, shared, 4, length, size).reshape(batch, 4 * shared, length, size)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bse->bhte", torch.einsum("bhtd,bsd->bhts", q, k[:, 0]).softmax(-1), v[:, 0])


#: Attention of queries (batch, 4 heads, n, 4) to keys and values (batch, 1, n, 4 and 5).
ONE_FOR_ALL: dict[str, Any] = {
    "broadcast": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "einsum": summed,
    "expanded": lambda q, k, v: F.scaled_dot_product_attention(q, *(t.expand(-1, 4, -1, -1) for t in (k, v))),
    "expanded and merged": lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v)),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
}


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_heads_of_queries_that_share_one_key_and_value(name: str, granularity: Any) -> None:
    """Each is a row of its own: it goes with what reads it. The key loses channels that no head has any more."""

    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = split_heads(net.q(x), 4), split_heads(net.k(x), 1), split_heads(net.v(x), 1)
        return net.o(join_heads(ONE_FOR_ALL[name](q, k, v)))

    net = Net(step, q=nn.Linear(7, 16), k=nn.Linear(7, 4), v=nn.Linear(7, 5), o=nn.Linear(20, 3))
    groups = fxcompress.channel_groups(net, SHORT)
    assert groups.removable == 4 + 5
    assert [(item.width, item.layers) for item in groups.row_sets] == [(4, ("q",))]
    _, removed = check(net, SHORT, RandomFilterPruner(0.5, granularity=granularity), (LONGER,))
    heads, size = (2, 4) if granularity == "head" else (4, 2)
    assert shapes(removed, "q.weight", "k.weight") == [(heads * size, 7), (size, 7)]
    assert shapes(removed, "v.weight", "o.weight") == [(3, 7), (3, heads * 3)]  # of 5 channels int(5 / 2) go


@pytest.mark.parametrize("order", ["bkrtd", "btkrd"])
@pytest.mark.parametrize("granularity", ["head", "channel", "head_dim"])
def test_heads_of_queries_that_share_keys_by_einsum(order: str, granularity: Any) -> None:
    """2 keys and values, each for 3 queries of 4: a set of those goes with its key and its value, whose channels go
    one by one as well."""

    def step(net: Net, x: Tensor) -> Tensor:
        (b, n, _), places = x.shape, [("btkrd").index(letter) for letter in order]
        q = net.q(x).view(b, n, 2, 3, 4).permute(places)
        k, v = net.k(x).view(b, n, 2, 4), net.v(x).view(b, n, 2, 5)
        a = torch.einsum(f"{order},bskd->bkrts", q, k).softmax(-1)
        return net.o(torch.einsum("bkrts,bskd->btkrd", a, v).reshape(b, n, -1))

    net = Net(step, q=nn.Linear(7, 24), k=nn.Linear(7, 8), v=nn.Linear(7, 10), o=nn.Linear(30, 3))
    groups = fxcompress.channel_groups(net, SHORT)
    assert groups.removable == 2 * 4 + 2 * 5
    assert [item.width for item in groups.row_sets] == [2]
    _, removed = check(net, SHORT, RandomFilterPruner(0.5, granularity=granularity), (LONGER,))
    left = [(12, 7), (4, 7), (5, 7), (3, 15)] if granularity == "head" else [(12, 7), (4, 7), (6, 7), (3, 18)]
    assert shapes(removed, "q.weight", "k.weight", "v.weight", "o.weight") == left


def test_rotary_heads_and_positions_at_once() -> None:
    case = TOKEN_CASES["rotary"]
    masked = fxcompress.compress(
        case.net(), [RandomFilterPruner(0.5, granularity="head"), RandomFilterPruner(0.5)], example_inputs=case.x
    )
    small = fxcompress.compress(masked, [Speedup()], example_inputs=case.x)
    assert shapes(small, "q.weight", "k.weight") == [(2, 3), (2, 3)]
    assert small.get_buffer("cos").shape == (9, 2)


def test_layers_that_share_cosines_have_heads_of_their_own() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        for i in "12":
            q, k, v = (split_heads(net.get_submodule(f"{name}{i}")(x), 3) for name in "qkv")
            q, k = (rotated(t, net.cos, net.sin) for t in (q, k))
            x = x + net.get_submodule(f"o{i}")(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return x

    layers = {f"{name}{i}": nn.Linear(3, 12) for name in "qkv" for i in "12"}
    net = Net(step, **layers, o1=nn.Linear(12, 3), o2=nn.Linear(12, 3), cos=torch.zeros(9, 4), sin=torch.zeros(9, 4))
    sets = fxcompress.channel_groups(net, TOKENS).row_sets
    assert [(item.width, item.layers) for item in sets] == [(3, ("q1", "k1", "v1")), (3, ("q2", "k2", "v2"))]
    _, removed = check(net, TOKENS, RandomFilterPruner(0.4, granularity="head"), (torch.randn(4, 7, 3),))
    assert shapes(removed, "q1.weight", "q2.weight", "v1.weight", "o2.weight") == [(8, 3), (8, 3), (8, 3), (3, 8)]
    both = [RandomFilterPruner({"v1": 0.4, "q1": 0.4, "k1": 0.4}, granularity="head"), RandomFilterPruner(0.5)]
    small = fxcompress.compress(net, [*both, Speedup()], example_inputs=TOKENS)
    assert shapes(small, "q1.weight", "q2.weight", "v1.weight", "v2.weight") == [(4, 3), (6, 3), (4, 3), (6, 3)]


def scored(change: Any, heads: int = 3, **more: Any) -> Net:
    """Attention whose scores (batch, heads, n, n) something changes before softmax."""

    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), heads) for f in (net.q, net.k, net.v))
        return net.o(join_heads(change(net, q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v))

    layers = {name: nn.Linear(3, 5 * heads) for name in "qkv"}
    return Net(step, **layers, o=nn.Linear(5 * heads, 3), **more)


@pytest.mark.parametrize(
    ("change", "tensor", "dim"),
    [
        (lambda n, s: s + n.own, nn.Parameter(torch.zeros(3, 5, 5)), 0),
        (lambda n, s: s + n.own[n.index.view(-1)].view(5, 5, 3).permute(2, 0, 1), nn.Parameter(torch.zeros(9, 3)), 1),
        (lambda n, s: s * n.own, nn.Parameter(torch.zeros(3, 1, 1)), 0),
        (lambda n, s: s * n.own.exp(), torch.zeros(1, 3, 1, 1), 1),
    ],
    ids=["bias tensor", "relative position table", "scale of each head", "buffer"],
)
def test_what_belongs_to_a_head_goes_with_it(change: Any, tensor: Tensor, dim: int) -> None:
    net = scored(change, own=tensor, index=torch.randint(0, 9, (5, 5)))
    masked, removed = check(net, TOKENS, InOrder(0.4, granularity="head"), (torch.randn(4, 5, 3),))
    assert kept(masked, "q.bias") == list(range(5, 15))
    own: Any = removed.own
    assert torch.equal(own, net.own.double().narrow(dim, 1, 2))
    even = fxcompress.compress(net, [InOrder(0.4), Speedup()], example_inputs=TOKENS)
    assert even.own.shape == net.own.shape  # heads that only shrink keep theirs


def talking(net: Net, s: Tensor) -> Tensor:
    return net.mix(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_talking_heads() -> None:
    """Those that make scores lose columns of the mixing layer, those that read them its rows."""
    net = scored(talking, mix=nn.Linear(3, 3))
    sets = fxcompress.channel_groups(net, TOKENS).row_sets
    assert [(item.width, item.layers) for item in sets] == [(3, ("q", "k")), (3, ("v", "mix"))]
    _, removed = check(
        net, TOKENS, InOrder({"*": 0.4, "q": 0.7, "k": 0.7}, granularity="head"), (torch.randn(4, 8, 3),)
    )
    assert shapes(removed, "q.weight", "v.weight", "mix.weight", "mix.bias") == [(5, 3), (10, 3), (2, 1), (2,)]


def test_talking_heads_of_a_fused_projection_go_together() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).reshape(x.shape[0], x.shape[1], 3, 3, 5).permute(2, 0, 3, 1, 4)
        return net.o(join_heads(talking(net, q @ k.transpose(-2, -1)).softmax(-1) @ v))

    net = Net(step, qkv=nn.Linear(3, 45), mix=nn.Linear(3, 3), o=nn.Linear(15, 3))
    (heads,) = fxcompress.channel_groups(net, TOKENS).row_sets
    assert (heads.width, heads.layers) == (3, ("qkv", "mix"))
    masked, removed = check(net, TOKENS, RandomFilterPruner(0.4, granularity="head"), (torch.randn(4, 8, 3),))
    assert shapes(removed, "qkv.weight", "mix.weight", "o.weight") == [(30, 3), (2, 2), (3, 10)]
    assert not masked.meta["history"][-1].notes


def test_norms_of_heads_and_the_scale_that_their_size_implies() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), 3) for f in (net.q, net.k, net.v))
        q, k = net.norm(q), F.normalize(k, dim=-1)
        return net.o(join_heads(F.scaled_dot_product_attention(q, k, v)))

    layers = {name: nn.Linear(3, 15) for name in "qkv"}
    net = Net(step, **layers, norm=nn.RMSNorm(5, eps=0.01), o=nn.Linear(15, 3))
    left: dict[Any, tuple[int, ...]] = {"channel": (9, 9, 3), "head_dim": (9, 9, 3), "head": (10, 10, 5)}
    for granularity, widths in left.items():
        _, removed = check(net, TOKENS, L1FilterPruner(0.4, granularity=granularity), (torch.randn(4, 8, 3),))
        assert tuple(removed.get_parameter(f"{n}.weight").shape[0] for n in ("q", "v", "norm")) == widths
        (node,) = [n for n in removed.graph.nodes if n.target is F.scaled_dot_product_attention]
        assert node.kwargs.get("scale", 5**-0.5) == pytest.approx(5**-0.5)


def test_a_mask_that_the_caller_gives_each_head_keeps_all_heads() -> None:
    net = scored(lambda n, s: s + n.given)

    def step(net: Net, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), 3) for f in (net.q, net.k, net.v))
        return net.o(join_heads((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v))

    net.step = step
    x = (TOKENS, torch.randn(2, 3, 5, 5))
    assert not fxcompress.channel_groups(net, x).row_sets
    _, removed = check(net, x, InOrder(0.4, granularity="head"))
    assert shapes(removed, "q.weight", "v.weight") == [(9, 3), (9, 3)]  # heads that cannot go shrink


@pytest.mark.parametrize("fast", [True, False])
def test_multihead_attention(fast: bool) -> None:
    net = Net(
        lambda n, x: n.end(n.attention(y := n.start(x), y, y, need_weights=not fast)[0]),
        start=nn.Linear(3, 9), attention=nn.MultiheadAttention(9, 3, batch_first=True), end=nn.Linear(9, 2),
    )  # fmt: skip
    _, removed = check(net, TOKENS, L1FilterPruner({"attention": 0.4}, granularity="head"), (torch.randn(4, 8, 3),))
    assert shapes(removed, "attention.in_proj_weight", "attention.out_proj.weight") == [
        (18, 9),
        (6, 6),
    ]  # 2 heads, 6 outputs


def test_a_fused_projection_loses_the_same_heads_of_queries_keys_and_values() -> None:
    net = Net(fused, qkv=nn.Linear(3, 24), o=nn.Linear(8, 3))
    masked, removed = check(net, TOKENS, InOrder(0.5, granularity="head"), (torch.randn(4, 8, 3),))
    assert kept(masked, "qkv.bias") == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert shapes(removed, "qkv.weight", "o.weight") == [(12, 3), (3, 4)]


def test_aligned_positions_of_a_fused_projection_are_those_of_its_queries_and_those_of_its_values() -> None:
    net = Net(fused, qkv=nn.Linear(3, 24), o=nn.Linear(8, 3))
    masked = fxcompress.compress(net, [RandomFilterPruner(0.5, granularity="head_dim", seed=4)], example_inputs=TOKENS)
    rows = fxcompress.masks(masked)["qkv.bias"].view(3, 2, 4)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


# ---- groups of convolutions and norms ------------------------------------------------------------------------------


def conv(inp: int, out: int, groups: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, padding=kernel // 2, groups=groups)


IMAGE = torch.randn(2, 3, 6, 7)
OTHER = torch.randn(3, 3, 9, 5)


def test_groups_of_a_convolution() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x)).relu()), a=conv(3, 15), b=conv(15, 10, 5), c=conv(10, 2))
    groups = fxcompress.channel_groups(net, IMAGE)
    assert [(item.width, item.layers) for item in groups.row_sets] == [(5, ("a", "b"))]
    masked, removed = check(net, IMAGE, InOrder(0.5, granularity="head"), (OTHER,))
    assert kept(masked, "a.bias") == list(range(6, 15))
    assert kept(masked, "b.bias") == list(range(4, 10))
    b = removed.get_submodule("b")
    assert isinstance(b, nn.Conv2d)
    assert (b.groups, b.in_channels, b.out_channels, tuple(b.weight.shape)) == (3, 9, 6, (6, 3, 3, 3))


def test_the_only_output_of_a_convolution_group_goes_with_it() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x)).relu()), a=conv(3, 12), b=conv(12, 4, 4), c=conv(4, 2))
    _, removed = check(net, IMAGE, RandomFilterPruner(0.5, granularity="head"), (OTHER,))
    assert shapes(removed, "a.weight", "b.weight", "c.weight") == [(6, 3, 3, 3), (2, 3, 3, 3), (2, 2, 3, 3)]
    _, even = check(net, IMAGE, RandomFilterPruner(0.5), (OTHER,))
    assert shapes(even, "a.weight", "b.weight") == [(8, 3, 3, 3), (4, 2, 3, 3)]  # one of each three, and no output


def test_groups_of_a_norm() -> None:
    net = Net(lambda n, x: n.b(n.norm(n.a(x)).relu()), a=conv(3, 15), norm=nn.GroupNorm(5, 15, eps=0.1), b=conv(15, 2))
    masked, removed = check(net, IMAGE, InOrder(0.5, granularity="head"), (OTHER,))
    assert kept(masked, "norm.bias") == list(range(6, 15))
    norm = removed.get_submodule("norm")
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (3, 9)


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize("groups, width, left", [(3, 9, 6), (3, 15, 9), (3, 18, 9), (4, 16, 8), (3, 60, 30), (2, 8, 4)])
def test_a_shuffle_between_grouped_convolutions(groups: int, width: int, left: int) -> None:
    """Of each of ``groups`` rows before and after the shuffle, int(width / groups / 2) channels go: no cell is equal to
    another where ``width / groups`` is no multiple of ``groups``."""
    net = Net(
        lambda n, x: n.c(n.norm2(n.d(shuffled(n.norm1(n.a(n.stem(x))).relu(), groups)))),
        stem=conv(3, 12), a=conv(12, width, groups, 1), norm1=nn.BatchNorm2d(width),
        d=conv(width, width, width), norm2=nn.BatchNorm2d(width), c=conv(width, 12, groups, 1),
    )  # fmt: skip
    masked, removed = check(net, IMAGE, RandomFilterPruner({"a": 0.5, "d": 0.5}), (OTHER,))
    assert shapes(removed, "d.weight") == [(left, 1, 3, 3)]
    assert not masked.meta["history"][-1].notes
    before = np.array(kept(masked, "a.bias")) // (width // groups)
    after = np.array(kept(masked, "d.bias")) // (width // groups)
    assert np.bincount(before).tolist() == np.bincount(after).tolist() == [left // groups] * groups


def test_the_cheapest_channels_of_crossed_rows() -> None:
    """Rows {0, 1, 2} {3, 4, 5} and {0, 2, 4} {1, 3, 5}: 0 and 3 cost 1 + 1, then 2 and 5 cost 2 + 3, not 1 and 2."""
    left, right = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 0, 1])
    units = crossed_units((left, right), np.array([1.0, 9.0, 2.0, 1.0, 9.0, 3.0]))
    assert units.T.tolist() == [[0, 3], [2, 5], [1, 4]]
    again = crossed_units((left, right), np.array([1.0, -np.inf, 2.0, 1.0, -np.inf, 3.0]))
    assert again.T.tolist()[0] == [1, 4]  # what is gone counts first


# ---- costs -------------------------------------------------------------------------------------------------------


def test_figures_without_whole_heads() -> None:
    net = Net(fused, qkv=nn.Linear(3, 24), o=nn.Linear(8, 3))
    masked = fxcompress.compress(net, [RandomFilterPruner(0.5, granularity="head")], example_inputs=TOKENS)
    cost = fxcompress.count(masked, TOKENS)
    small = fxcompress.count(fxcompress.compress(masked, [Speedup()], example_inputs=TOKENS), TOKENS)
    assert cost.after == small
    assert cost.symbolic.evaluate(cost.symbolic.current) == (small.macs, small.params, small.bytes)


def test_widths_do_not_price_what_belongs_to_heads() -> None:
    net = scored(lambda n, s: s + n.own, own=nn.Parameter(torch.zeros(3, 5, 5)))
    masked = fxcompress.compress(net, [RandomFilterPruner(0.4, granularity="head")], example_inputs=TOKENS)
    with pytest.raises(fxcompress.GraphError, match=r"whole rows .* are masked, and what own costs"):
        _ = fxcompress.count(masked, TOKENS).symbolic


def test_rotary_of_neighbours() -> None:
    """Even and odd positions of a head are halves of pairs, which stand or fall together, in every head the same."""

    def turned(net: Any, x: Tensor) -> Tensor:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * net.cos[: x.shape[2]] + other * net.sin[: x.shape[2]]

    def step(net: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 6)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        attended = (turned(net, q) @ turned(net, k).transpose(-1, -2)).softmax(-1) @ v
        return net.o(attended.transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 7)
    layers = {name: nn.Linear(7, 18) for name in "qkv"} | {"o": nn.Linear(18, 3)}
    net = Net(step, cos=torch.randn(9, 6), sin=torch.randn(9, 6), **layers)
    small = fxcompress.compress(net, [L1FilterPruner(0.34), Speedup()], example_inputs=x)
    assert small.get_submodule("q").out_features == small.get_submodule("k").out_features == 3 * 4
    assert small.get_submodule("v").out_features == 3 * 4
