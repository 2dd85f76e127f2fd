"""The channel analysis on embeddings and attention: groups written out by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channel_cases import OUTPUT
from nets import Case, Expected, Net, described, rows_of
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import ChannelPruner, Layer, RandomFilterPruner, Speedup

TOKENS = torch.randn(2, 5, 3)  # batch, tokens, features
WORDS = torch.tensor([[1, 2, 3], [4, 5, 0]])


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def separate(attend: Any) -> Any:
    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), 2) for f in (net.q, net.k, net.v))
        return net.o(join_heads(attend(q, k, v)))

    return step


def fused(net: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return net.o(join_heads(by_hand(q, k, v)))


def shared_heads(repeat: Any) -> Any:
    def step(net: Net, x: Tensor) -> Tensor:
        q, k, v = split_heads(net.q(x), 4), split_heads(net.k(x), 2), split_heads(net.v(x), 2)
        return net.o(join_heads(F.scaled_dot_product_attention(q, repeat(k), repeat(v))))

    return step


def expanded(x: Tensor) -> Tensor:
    b, heads, n, size = x.shape
    return x[:, :, None].expand(b, heads, 2, n, size).reshape(b, heads * 2, n, size)


def one_key(net: Net, x: Tensor) -> Tensor:
    q = split_heads(net.q(x), 4)
    return net.o(join_heads(by_hand(q, net.k(x)[:, None], net.v(x)[:, None])))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[: x.shape[-2]] + turned * sin[: x.shape[-2]]


def rotary(net: Net, x: Tensor) -> Tensor:
    q, k, v = (split_heads(f(x), 2) for f in (net.q, net.k, net.v))
    q, k = rotated(q, net.cos, net.sin), rotated(k, net.cos, net.sin)
    return net.o(join_heads(F.scaled_dot_product_attention(q, k, v)))


def patches(net: Net, x: Tensor) -> Tensor:
    x = net.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat((net.token.expand(x.shape[0], -1, -1), x), 1) + net.position
    x = x + net.gamma * net.down(F.gelu(net.up(net.norm(x))))
    return net.head(x[:, 0])


def windowed(net: Net, x: Tensor) -> Tensor:
    """A shifted window of 2 x 2 with a table of biases for each head, as in Swin."""
    x = net.a(x).permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    b, h, w, c = x.shape
    x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    q, k, v = net.qkv(x).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = net.table[net.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
    x = net.o(join_heads((q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1) @ v))
    x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
    return net.head(x.roll((1, 1), (1, 2)))


class Mix(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,ed->bne", x, self.weight)


def tied() -> Net:
    net = Net(
        lambda n, x: n.out(n.norm(n.mid(n.embed(x)))),
        embed=nn.Embedding(7, 6), mid=nn.Linear(6, 6), norm=nn.LayerNorm(6), out=nn.Linear(6, 7, bias=False),
    )  # fmt: skip
    net.out.weight = net.embed.weight
    return net


def transformer() -> Net:
    return Net(
        lambda n, x: n.head(n.layer(n.a(x))),
        a=nn.Linear(3, 8), layer=nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), head=nn.Linear(8, 3),
    )  # fmt: skip


QKV = {"q": nn.Linear(3, 8), "k": nn.Linear(3, 8), "v": nn.Linear(3, 8), "o": nn.Linear(8, 3)}
GQA = {"q": nn.Linear(3, 16), "k": nn.Linear(3, 8), "v": nn.Linear(3, 8), "o": nn.Linear(16, 3)}
EIGHT = {  # two heads of four: a channel is a row of q and one of k; or a row of v and a column of o
    "q": Expected(8, "q.weight q.bias k.weight k.bias", 2, "q k"),
    "v": Expected(8, "v.weight v.bias o.weight:1", 2),
}

CASES = {
    "attention by hand": Case(lambda: Net(separate(by_hand), **QKV), TOKENS, EIGHT, {"o": OUTPUT}),
    "scaled dot product": Case(
        lambda: Net(separate(F.scaled_dot_product_attention), **QKV), TOKENS, EIGHT, {"o": OUTPUT}
    ),
    "causal": Case(
        lambda: Net(separate(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), **QKV),
        TOKENS, EIGHT, {"o": OUTPUT},
    ),
    "grouped queries, repeat_interleave": Case(
        lambda: Net(shared_heads(lambda x: x.repeat_interleave(2, 1)), **GQA), TOKENS, EIGHT, {"o": OUTPUT}
    ),
    "grouped queries, expand": Case(lambda: Net(shared_heads(expanded), **GQA), TOKENS, EIGHT, {"o": OUTPUT}),
    "grouped queries, enable_gqa": Case(
        lambda: Net(
            lambda n, x: n.o(join_heads(F.scaled_dot_product_attention(
                split_heads(n.q(x), 4), split_heads(n.k(x), 2), split_heads(n.v(x), 2), enable_gqa=True
            ))),
            **GQA,
        ),
        TOKENS, EIGHT, {"o": OUTPUT},
    ),
    "one key for all queries": Case(
        lambda: Net(one_key, q=nn.Linear(3, 16), k=nn.Linear(3, 4), v=nn.Linear(3, 4), o=nn.Linear(16, 3)),
        TOKENS,
        {
            "q": Expected(4, "q.weight q.bias k.weight k.bias", 1, "q k"),
            "v": Expected(4, "v.weight v.bias o.weight:1"),
        },
        {"o": OUTPUT},
    ),
    "rotary": Case(
        lambda: Net(rotary, cos=torch.zeros(9, 4), sin=torch.zeros(9, 4), **QKV),
        TOKENS,
        {
            "q": Expected(2, "q.weight q.bias k.weight k.bias cos:1 sin:1", 1, "q k"),
            "v": Expected(8, "v.weight v.bias o.weight:1", 2),
        },
        {"o": OUTPUT},
    ),
    "class token, position, layer scale": Case(
        lambda: Net(
            patches, patch=nn.Conv2d(3, 8, 2, 2), token=nn.Parameter(torch.zeros(1, 1, 8)),
            position=nn.Parameter(torch.zeros(1, 17, 8)), gamma=nn.Parameter(torch.zeros(8)),
            norm=nn.LayerNorm(8), up=nn.Linear(8, 6), down=nn.Linear(6, 8), head=nn.Linear(8, 3),
        ),
        torch.randn(2, 3, 8, 8),
        {
            "patch": Expected(
                8,
                "patch.weight patch.bias token:2 position:2 gamma norm.weight norm.bias up.weight:1 down.weight"
                " down.bias head.weight:1",
                1, "patch down",
            ),
            "up": Expected(6, "up.weight up.bias down.weight:1"),
        },
        {"head": OUTPUT},
    ),
    "embedding": Case(
        lambda: Net(
            lambda n, x: n.a(n.e(x) + n.p[: x.shape[1]]),
            e=nn.Embedding(7, 6), p=torch.zeros(4, 6), a=nn.Linear(6, 3),
        ),
        WORDS,
        {"e": Expected(6, "e.weight:1 p:1 a.weight:1")},
        {"a": OUTPUT},
    ),
    "einsum": Case(
        lambda: Net(lambda n, x: n.c(n.b(n.a(x))), a=nn.Linear(3, 8), b=Mix(6, 8), c=nn.Linear(6, 3)),
        TOKENS,
        {"a": Expected(8, "a.weight a.bias b.weight:1"), "b": Expected(6, "b.weight c.weight:1")},
        {"c": OUTPUT},
    ),
    "convolution over tokens, one wide": Case(  # (batch, 5 tokens, channels): channels lie where pixels would
        lambda: Net(
            lambda n, x: n.c(n.mix(n.norm(n.a(x)).sigmoid())),
            a=nn.Linear(3, 8), norm=nn.LayerNorm(8), mix=nn.Conv1d(5, 3, 1), c=nn.Linear(8, 3),
        ),
        TOKENS,
        {"a": Expected(8, "a.weight a.bias norm.weight norm.bias c.weight:1")},
        {"mix": OUTPUT, "c": OUTPUT},
    ),
    "batch norm over the last but one": Case(
        lambda: Net(
            lambda n, x: n.b(n.bn(n.a(x).transpose(1, 2)).transpose(1, 2)),
            a=nn.Linear(3, 8), bn=nn.BatchNorm1d(8), b=nn.Linear(8, 3),
        ),
        TOKENS,
        {"a": Expected(8, "a.weight a.bias bn.* b.weight:1")},
        {"b": OUTPUT},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups(case: Case) -> None:
    groups = fxcompress.channel_groups(case.net(), case.x)
    assert {group.name: described(group) for group in groups if group.removable} == {
        name: expected.of(name) for name, expected in case.groups.items()
    }
    frozen = {group.name: group.reason for group in groups if not group.removable}
    assert set(frozen) == set(case.frozen)
    for name, reason in case.frozen.items():
        assert reason in frozen[name]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_removal(case: Case) -> None:
    small = fxcompress.compress(case.net(), [RandomFilterPruner(0.5), Speedup()], example_inputs=case.x)
    for name, expected in case.groups.items():
        (dim,) = {dim for parameter, dim in expected.of(name)[1] if parameter == f"{name}.weight"}
        dense = case.net().get_parameter(f"{name}.weight").shape[dim]
        assert small.get_parameter(f"{name}.weight").shape[dim] == dense // 2


def test_fused_queries_keys_and_values() -> None:
    """Rows 0-7 are q, 8-15 k, 16-23 v: row i of q goes with row i of k, and v with the output's columns."""
    net = Net(fused, qkv=nn.Linear(3, 24), o=nn.Linear(8, 3))
    groups = [group for group in fxcompress.channel_groups(net, TOKENS) if group.removable]
    assert sum(group.width for group in groups) == 16
    parts = [rows for group in groups for rows in rows_of(group, "qkv.weight")]
    assert sorted(parts) == sorted([[i, 8 + i] for i in range(8)] + [[16 + i] for i in range(8)])


def test_a_shared_key_head_goes_with_its_whole_set() -> None:
    case = CASES["grouped queries, expand"]
    group = fxcompress.channel_groups(case.net(), case.x)["q"]
    queries = rows_of(group, "q.weight")
    for channel, (key,) in enumerate(rows_of(group, "k.weight")):
        head, place = divmod(key, 4)
        assert queries[channel] == [head * 8 + place, head * 8 + 4 + place]


def test_rotary_ties_the_halves_of_every_head() -> None:
    case = CASES["rotary"]
    group = fxcompress.channel_groups(case.net(), case.x)["q"]
    for name in ("q.weight", "k.weight"):
        assert sorted(rows_of(group, name)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_tied_weights_are_one_parameter() -> None:
    """The table's columns are the model's width; its rows are words, read by the input and written to the output."""
    groups = fxcompress.channel_groups(tied(), WORDS)
    (group,) = [group for group in groups if group.removable]
    assert group.width == 6
    assert {(name, dim) for name, dim in group.members if "embed" in name or "out" in name} == {("embed.weight", 1)}
    assert {"embed", "mid"} <= set(group.layers)
    (words,) = [group for group in groups if not group.removable]
    assert (words.width, words.members) == (7, (("embed.weight", 0),))
    small = fxcompress.compress(tied(), [RandomFilterPruner(0.5), Speedup()], example_inputs=WORDS)
    assert small.get_parameter("out.weight") is small.get_parameter("embed.weight")
    assert small.get_parameter("out.weight").shape == (7, 3)


def test_window_partition_and_relative_bias() -> None:
    net = Net(
        windowed, a=nn.Conv2d(3, 8, 1), qkv=nn.Linear(8, 24), o=nn.Linear(8, 8), head=nn.Linear(8, 3),
        table=nn.Parameter(torch.zeros(9, 2)), index=torch.randint(0, 9, (4, 4)),
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    groups = fxcompress.channel_groups(net, x)
    assert described(groups["a"]) == (8, {("a.weight", 0), ("a.bias", 0), ("qkv.weight", 1)}, 1, {"a"})
    assert described(groups["o"]) == (8, {("o.weight", 0), ("o.bias", 0), ("head.weight", 1)}, 1, {"o"})
    assert groups.removable == 8 + 16 + 8
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=x)
    assert small.get_parameter("qkv.weight").shape == (12, 4)


def test_torch_attention_is_written_out() -> None:
    """8 of the residual stream, 8 of q and k, 8 of v, 6 of the hidden layer."""
    groups = fxcompress.channel_groups(transformer(), TOKENS)
    assert groups.removable == 8 + 16 + 6
    stream = {"a", "layer.self_attn.out_proj", "layer.linear2"}
    assert set(groups["a"].layers) == stream
    assert ("layer.norm1.weight", 0) in groups["a"].members
    small = fxcompress.compress(transformer(), [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert small.get_parameter("layer.self_attn.in_proj_weight").shape == (12, 4)
    assert small.get_parameter("layer.linear1.weight").shape == (3, 4)


class WholeHead(ChannelPruner):
    """The first four channels score lowest: one head, unless rows must stay equal."""

    def score(self, layer: Layer) -> Tensor:
        return torch.arange(float(len(layer.weight)))


def test_heads_lose_equally_many() -> None:
    case = CASES["scaled dot product"]
    masked = fxcompress.compress(case.net(), [WholeHead(0.5)], example_inputs=case.x)
    for name in ("q.bias", "k.bias", "v.bias"):
        assert fxcompress.masks(masked)[name].tolist() == [False, False, True, True] * 2


def test_products_of_a_convolution_over_tokens() -> None:
    """3 x 5 products for each of the channels that are left, and those of the two linear layers."""
    net = CASES["convolution over tokens, one wide"].net()
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert fxcompress.count(small, TOKENS).macs == 5 * 3 * 4 + 3 * 5 * 4 + 3 * 4 * 3
    cost = fxcompress.count(net, TOKENS)
    assert cost.macs == 5 * 3 * 8 + 3 * 5 * 8 + 3 * 8 * 3
    assert cost.symbolic.evaluate({"a": 4}).macs == fxcompress.count(small, TOKENS).macs


@pytest.mark.parametrize(
    "mix", [nn.Conv1d(5, 3, 3, padding=1), nn.Conv1d(5, 3, 1, stride=2), nn.Conv1d(5, 3, 1, padding=1)]
)
def test_channels_that_a_kernel_slides_over_stay(mix: nn.Module) -> None:
    net = Net(lambda n, x: n.mix(n.a(x)), a=nn.Linear(3, 8), mix=mix)
    reasons = [group.reason for group in fxcompress.channel_groups(net, TOKENS) if "a" in group.layers]
    assert reasons == ["it lies in a spatial dimension (mix)"]


LIKE = {
    "type_as": lambda x, y: x.flip(-1).type_as(y),
    "to": lambda x, y: x.flip(-1).to(y),
    "view_as": lambda x, y: x.unflatten(-1, (2, 4)).transpose(-1, -2).reshape(2, 5, 8).view_as(y),
    "reshape_as": lambda x, y: x.unflatten(-1, (2, 4)).transpose(-1, -2).reshape_as(y),
    "expand_as": lambda x, y: x[:, :1].expand_as(y),
}


@pytest.mark.parametrize("name", LIKE)
def test_another_tensor_is_asked_for_its_shape_or_dtype_alone(name: str) -> None:
    net = Net(
        lambda n, x: n.c(LIKE[name](n.a(x), n.b(x)) + n.b(x)),
        a=nn.Linear(3, 8),
        b=nn.Linear(3, 8),
        c=nn.Linear(8, 3),
    )
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert [getattr(small, layer).out_features for layer in "ab"] == [4, 4]


def test_rearrangements_of_one_of_several_results() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = net.qkv(x).reshape(b, n, 3, 2, 4).unbind(2)
        return net.o((q * k + v).transpose(2, 3).reshape(b, n, 8))

    net = Net(step, qkv=nn.Linear(3, 24), o=nn.Linear(8, 3))
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert small.get_submodule("qkv").out_features == 12


def test_a_prefix_that_is_empty() -> None:
    """Tokens that are left out of a rotation, of which a model may have none, are channels like the others."""

    def step(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.o(torch.cat((x[:, :0], x[:, 0:].sigmoid()), 1))

    net = Net(step, a=nn.Linear(3, 8), o=nn.Linear(8, 3))
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert small.get_submodule("a").out_features == 4
