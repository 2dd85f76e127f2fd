"""Operators that take statistics over masked channels: against an oracle that picks the live indices by hand.

Every network is written twice: as layers, and as a function of the indices that live. With all of them the function
is the dense network (checked); with the live ones it is what masking must compute.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from scores import Chosen
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import Speedup

TOKENS = torch.randn(2, 5, 3, dtype=torch.float64)
WIDTH = 8


def mixed(statistic: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A statistic between two linear layers: as the model writes it, and on live channels only."""

    def step(net: Net, x: Tensor) -> Tensor:
        return net.b(statistic(net.a(x)))

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        h = statistic(F.linear(x, net.a.weight[live], net.a.bias[live]))
        return F.linear(h, net.b.weight[:, live], net.b.bias)

    return step, oracle


def added(statistic: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A statistic that ends the channels and is the output itself."""

    def step(net: Net, x: Tensor) -> Tensor:
        return statistic(net.a(x))

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        return statistic(F.linear(x, net.a.weight[live], net.a.bias[live]))

    return step, oracle


STATISTICS = {
    "softmax": mixed(lambda h: h.softmax(-1)),
    "log_softmax": mixed(lambda h: h.log_softmax(-1)),
    "minus the mean": mixed(lambda h: h - h.mean(-1, keepdim=True)),
    "standardized": mixed(lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-3).sqrt()),
    "divided by the norm": mixed(lambda h: F.normalize(h, dim=-1)),
    "divided by the largest": mixed(lambda h: h / h.amax(-1, keepdim=True)),
    "minus the smallest": mixed(lambda h: h - h.amin(-1, keepdim=True)),
    "times the deviation": mixed(lambda h: h * h.std(-1, keepdim=True)),
    "minus logsumexp": mixed(lambda h: h - h.logsumexp(-1, keepdim=True)),
    "layer norm without affine": mixed(lambda h: F.layer_norm(h, (h.shape[-1],))),
    "rms norm without affine": mixed(lambda h: F.rms_norm(h, (h.shape[-1],), eps=1e-5)),
    "sigmoid, then softmax": mixed(lambda h: torch.sigmoid(h).softmax(-1)),
    "sum of sigmoids": added(lambda h: torch.sigmoid(h).sum(-1)),
    "mean": added(lambda h: h.mean(-1)),
    "mean over tokens and channels": added(lambda h: h.exp().mean((1, 2))),
    "max": added(lambda h: h.max(-1).values),
    "max of negatives": added(lambda h: (-h.abs() - 1).amax(-1, keepdim=True)),
    "min": added(lambda h: (h.abs() + 1).min(-1).values),
    "product": added(lambda h: h.prod(-1)),
    "variance": added(lambda h: h.var(-1)),
    "norm": added(lambda h: h.norm(dim=-1)),
    "exponential and its square": added(lambda h: (h.exp() * h.exp()).sum(-1)),
    "gram of exponentials": added(lambda h: h.exp() @ h.exp().mT),
}


def pruned(net: Net, x: Tensor, dead: dict[str, list[int]], sparsity: float) -> fxcompress.TracedModule:
    return fxcompress.compress(net.double(), [Chosen(sparsity, dead=dead)], example_inputs=x)


def close(expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def check(net: Net, oracle: Callable[..., Tensor], x: Tensor, dead: dict[str, list[int]], *live: Tensor) -> None:
    """Masked and removed equal the oracle on the live indices, at two batch sizes."""
    dense = [torch.arange(WIDTH) for _ in live]
    close(net.double()(x), oracle(net, x, *dense))
    masked = pruned(net, x, dead, len(next(iter(dead.values()))) / WIDTH)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    for each in (x, torch.cat((x * 0.3, x[:1] + 1))):
        close(oracle(net, each, *live), masked(each))
        close(oracle(net, each, *live), small(each))


DEVIATIONS = ("variance", "times the deviation", "standardized")  # of one number there is none


@pytest.mark.parametrize(
    "name, dead",
    [
        (name, dead)
        for name in STATISTICS
        for dead in ([0], [1, 4, 5], [0, 1, 2, 4, 5, 6, 7])
        if len(dead) < WIDTH - 1 or name not in DEVIATIONS
    ],
    ids=str,
)
def test_statistics_over_channels(name: str, dead: list[int]) -> None:
    step, oracle = STATISTICS[name]
    net = Net(step, a=nn.Linear(3, WIDTH), b=nn.Linear(WIDTH, 4))
    live = torch.tensor([i for i in range(WIDTH) if i not in dead])
    check(net, oracle, TOKENS, {"a": dead}, live)


def test_layers_that_normalise_channels() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        return net.b(net.rms(net.norm(net.a(x))))

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        h = F.linear(x, net.a.weight[live], net.a.bias[live])
        h = F.layer_norm(h, (len(live),), net.norm.weight[live], net.norm.bias[live], 1e-3)
        h = F.rms_norm(h, (len(live),), net.rms.weight[live], 1e-4)
        return F.linear(h, net.b.weight[:, live], net.b.bias)

    net = Net(step, a=nn.Linear(3, 8), norm=nn.LayerNorm(8, eps=1e-3), rms=nn.RMSNorm(8, eps=1e-4), b=nn.Linear(8, 4))
    check(net, oracle, TOKENS, {"a": [1, 4, 5]}, torch.tensor([0, 2, 3, 6, 7]))


def test_layer_norm_over_channels_and_space() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        return net.b(net.norm(net.a(x)))

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        h = F.conv2d(x, net.a.weight[live], net.a.bias[live])
        h = F.layer_norm(h, h.shape[1:], net.norm.weight[live], net.norm.bias[live])
        return F.conv2d(h, net.b.weight[:, live], net.b.bias)

    net = Net(step, a=nn.Conv2d(3, 8, 1), norm=nn.LayerNorm([8, 4, 4]), b=nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    check(net, oracle, x, {"a": [1, 4, 5]}, torch.tensor([0, 2, 3, 6, 7]))


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(affine: bool) -> None:
    """Groups 0-3 and 4-7 lose two channels each, different ones; each is normalised over what it has left."""

    def step(net: Net, x: Tensor) -> Tensor:
        return net.b(net.norm(net.a(x)))

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        h = F.conv2d(x, net.a.weight[live], net.a.bias[live])
        weight = net.norm.weight[live] if affine else None
        bias = net.norm.bias[live] if affine else None
        parts = []
        for part in (live < 4, live >= 4):
            rows = h[:, part]
            mean, var = rows.mean((1, 2, 3), keepdim=True), rows.var((1, 2, 3), unbiased=False, keepdim=True)
            parts.append((rows - mean) / (var + 1e-5).sqrt())
        h = torch.cat(parts, 1)
        if weight is not None and bias is not None:
            h = h * weight[:, None, None] + bias[:, None, None]
        return F.conv2d(h, net.b.weight[:, live], net.b.bias)

    net = Net(step, a=nn.Conv2d(3, 8, 1), norm=nn.GroupNorm(2, 8, affine=affine), b=nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    check(net, oracle, x, {"a": [0, 2, 5, 6]}, torch.tensor([1, 3, 4, 7]))


def heads(t: Tensor, count: int = 2) -> Tensor:
    return t.view(t.shape[0], t.shape[1], count, -1).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("attend", [softmax_attention, F.scaled_dot_product_attention], ids=["by hand", "sdpa"])
def test_attention_over_live_dimensions(attend: Callable[..., Tensor]) -> None:
    """q and k lose 1, 2 and 4, 7; v loses 0, 3 and 5, 6: the scale stays that of heads of four."""

    def step(net: Net, x: Tensor) -> Tensor:
        out = attend(heads(net.q(x)), heads(net.k(x)), heads(net.v(x)))
        return net.o(out.transpose(1, 2).flatten(2))

    def oracle(net: Net, x: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        q, k = (heads(F.linear(x, f.weight[qk], f.bias[qk])) for f in (net.q, net.k))
        out = (q @ k.mT / 2).softmax(-1) @ heads(F.linear(x, net.v.weight[v], net.v.bias[v]))
        return F.linear(out.transpose(1, 2).flatten(2), net.o.weight[:, v], net.o.bias)

    net = Net(step, q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 8), o=nn.Linear(8, 4))
    dead = {"q": [1, 2, 4, 7], "k": [1, 2, 4, 7], "v": [0, 3, 5, 6]}
    check(net, oracle, TOKENS, dead, torch.tensor([0, 3, 5, 6]), torch.tensor([1, 2, 4, 7]))


def test_linear_attention_with_a_feature_map_that_is_not_zero_at_zero() -> None:
    """elu(x) + 1 is 1 where a channel is masked: the sums over features must not see it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return q @ (k.mT @ v) / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)

    def step(net: Net, x: Tensor) -> Tensor:
        return net.o(attend(net.q(x), net.k(x), net.v(x)))

    def oracle(net: Net, x: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        q, k = (F.linear(x, f.weight[qk], f.bias[qk]) for f in (net.q, net.k))
        out = attend(q, k, F.linear(x, net.v.weight[v], net.v.bias[v]))
        return F.linear(out, net.o.weight[:, v], net.o.bias)

    net = Net(step, q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 8), o=nn.Linear(8, 4))
    dead = {"q": [1, 2, 4], "k": [1, 2, 4], "v": [0, 5, 6]}
    check(net, oracle, TOKENS, dead, torch.tensor([0, 3, 5, 6, 7]), torch.tensor([1, 2, 3, 4, 7]))


def test_weights_standardized_over_their_live_inputs() -> None:
    def weight(w: Tensor) -> Tensor:
        return (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3)

    def step(net: Net, x: Tensor) -> Tensor:
        return F.linear(net.a(x), weight(net.b.weight), net.b.bias)

    def oracle(net: Net, x: Tensor, live: Tensor) -> Tensor:
        h = F.linear(x, net.a.weight[live], net.a.bias[live])
        return F.linear(h, weight(net.b.weight[:, live]), net.b.bias)

    net = Net(step, a=nn.Linear(3, 8), b=nn.Linear(8, 4))
    check(net, oracle, TOKENS, {"a": [1, 4, 5]}, torch.tensor([0, 2, 3, 6, 7]))


def test_the_statistics_train() -> None:
    """Gradients are the oracle's too."""

    def step(net: Net, x: Tensor) -> Tensor:
        return net.b(net.norm(net.a(x)).softmax(-1))

    net = Net(step, a=nn.Linear(3, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 4))
    live = torch.tensor([0, 2, 3, 6, 7])
    masked = pruned(net, TOKENS, {"a": [1, 4, 5]}, 3 / 8).train()
    masked(TOKENS).square().sum().backward()
    h = F.linear(TOKENS, net.a.weight[live], net.a.bias[live])
    h = F.layer_norm(h, (5,), net.norm.weight[live], net.norm.bias[live]).softmax(-1)
    F.linear(h, net.b.weight[:, live], net.b.bias).square().sum().backward()
    for name, parameter in masked.named_parameters():
        expected = net.get_parameter(name).grad
        assert expected is not None
        assert parameter.grad is not None
        close(expected, parameter.grad)
