"""Channels that an index puts into another order: which indices are known, and what is removable behind them."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from removal import relative_gap
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import L1FilterPruner, Speedup
from zoo.measure import removable_share


def halved(net: nn.Module, x: Tensor, removable: int, granularity: Any = "channel") -> nn.Module:
    """Half of all that may go is gone, with nothing left to say; equal to the masked model at two batch sizes."""
    net, x = net.double(), x.double()
    assert fxcompress.channel_groups(net, x).removable == removable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked = fxcompress.compress(net, [L1FilterPruner(0.5, granularity=granularity)], example_inputs=x)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    assert not masked.meta["history"][-1].notes
    with torch.no_grad():
        for batch in (1, 5):
            other = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
            assert relative_gap(masked(other), small(other)) <= 1e-9
    return small


def permuted(index: Any) -> Net:
    """12 channels in an order that the forward computes."""
    return Net(
        lambda n, x: n.b(F.relu(n.a(x))[..., index(n, x)]),
        a=nn.Linear(5, 12), b=nn.Linear(12, 3), order=torch.randperm(12),
    )  # fmt: skip


FIXED = {
    "backwards": lambda n, x: torch.arange(11, -1, -1),
    "flipped": lambda n, x: torch.arange(12).flip(0),
    "computed": lambda n, x: torch.arange(12) * 5 % 12,
    "on the input's device": lambda n, x: torch.arange(12, device=x.device).roll(1),
    "evens, then odds": lambda n, x: torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2))),
    "zeros added": lambda n, x: torch.arange(12) + torch.zeros(12, dtype=torch.long),
    "rounded": lambda n, x: torch.linspace(11, 0, 12).long(),
    "a buffer": lambda n, x: n.order.flip(0),
}


@pytest.mark.parametrize("index", FIXED.values(), ids=FIXED)
def test_an_index_made_of_literals_is_known(index: Any) -> None:
    small = halved(permuted(index), torch.randn(4, 5), 12)
    assert small.get_parameter("b.weight").shape == (3, 6)


def written(n: Net, x: Tensor) -> Tensor:
    order = torch.arange(12)
    order[2:4] = torch.tensor([3, 2])
    return order


def written_by_input(n: Net, x: Tensor) -> Tensor:
    order = torch.arange(12)
    order[2:4].copy_(x[0, :2].long().clamp(0, 1))
    return order


VARYING = {
    "the batch is added": lambda n, x: (torch.arange(12) + x.shape[0]) % 12,
    "the batch is added to a buffer": lambda n, x: (n.order + x.shape[0]) % 12,
    "as long as the batch": lambda n, x: torch.arange(x.shape[0] * 12)[-12:] % 12,
    "random": lambda n, x: torch.randperm(12).flip(0) * 0 + 3,
    "written into": written,
    "written into by the input": written_by_input,
}


@pytest.mark.parametrize("index", VARYING.values(), ids=VARYING)
def test_an_index_that_more_than_literals_decide_keeps_what_it_reads(index: Any) -> None:
    (group, _) = fxcompress.channel_groups(permuted(index), torch.randn(4, 5))
    assert not group.removable
    assert "the input, one of its sizes or a write decides which index is read" in group.reason


def test_the_batch_is_still_a_size() -> None:
    """An index along the batch is as long as the batch, whatever that is."""
    net = Net(lambda n, x: n.b(n.a(x)[torch.arange(int(x.shape[0]))]), a=nn.Linear(5, 12), b=nn.Linear(12, 3))
    halved(net, torch.randn(4, 5), 12)


def within_heads(net: Net, x: Tensor) -> Tensor:
    """Positions of queries and keys in another order, and heads of values in another."""
    q, k, v = (layer(x).unflatten(-1, (3, 6)) for layer in (net.q, net.k, net.v))
    q, k, v = q[..., [0, 2, 1, 3, 5, 4]], k[..., torch.tensor([0, 2, 1, 3, 5, 4])], v[:, :, [2, 0, 1]]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("granularity", "left"), [("channel", (9, 9)), ("head_dim", (9, 9)), ("head", (12, 12))])
def test_an_index_within_heads(granularity: Any, left: tuple[int, int]) -> None:
    """18 channels that queries and keys share and 18 of values; heads keep different ones, each 3 of 6."""
    layers = {name: nn.Linear(7, 18) for name in "qkv"}
    small = halved(Net(within_heads, **layers, o=nn.Linear(18, 3)), torch.randn(2, 6, 7), 36, granularity)
    assert (len(small.get_parameter("q.weight")), len(small.get_parameter("v.weight"))) == left


def test_an_index_within_heads_merged_with_the_batch() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 3, 6).transpose(1, 2).reshape(b * 3, n, 6) for f in (net.q, net.k, net.v))
        y = (q[..., [0, 2, 1, 3, 5, 4]] @ k[..., [0, 2, 1, 3, 5, 4]].mT).softmax(-1) @ v
        return net.o(y.view(b, 3, n, 6).transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(7, 18) for name in "qkv"}
    halved(Net(step, **layers, o=nn.Linear(18, 3)), torch.randn(2, 6, 7), 36)


@pytest.mark.parametrize("dims", [(2, 3), (1,), (1, 2, 3)])
def test_means_of_shuffled_pixels(dims: tuple[int, ...]) -> None:
    """4 channels of the result are made of 4 each, which go together."""
    net = Net(lambda n, x: F.pixel_shuffle(n.a(x), 2).mean(dims), a=nn.Conv2d(3, 16, 3))
    if 1 not in dims:
        net = Net(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2).mean(dims)), a=nn.Conv2d(3, 16, 3), b=nn.Linear(4, 3))
    assert halved(net, torch.randn(2, 3, 6, 7), 4).get_parameter("a.weight").shape == (8, 3, 3, 3)


def test_a_buffer_that_is_written_into_after_it_was_read_is_another_index_next_time() -> None:
    def step(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)[..., net.order]
        net.order.copy_(net.order.roll(1))
        return net.b(y)

    net = Net(step, a=nn.Linear(5, 12), b=nn.Linear(12, 3), order=torch.randperm(12))
    x = torch.randn(4, 5)
    with pytest.warns(UserWarning, match="written into"):
        small = fxcompress.compress(net, [L1FilterPruner(0.5), Speedup()], example_inputs=x)
    (note, *_) = small.meta["history"][0].notes
    assert note.startswith("6 channels stay: node getitem")
    assert "is given an index that is written into" in note
    traced = fxcompress.trace(net, x)
    with pytest.warns(UserWarning, match="written into"):
        assert removable_share(traced, fxcompress.channel_groups(traced, x)) == 0
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(small(x), net(x))
