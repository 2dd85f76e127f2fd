"""Numbers in the code of a forward: constants of the graph, unless the forward writes into them."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import RandomFilterPruner, Speedup

TOKENS = torch.randn(2, 5, 3)


def counted(y: Tensor) -> Tensor:
    number = torch.tensor(0)
    for step in range(3):
        number += step
    return y * number


def shifted(y: Tensor) -> Tensor:
    index = torch.tensor([1, 2, 3])
    index += 1
    return y[..., index - 1]


def overwritten(y: Tensor) -> Tensor:
    index = torch.tensor([1, 2, 3])
    index[0] = 5
    return y[..., index]


def written_through_a_view(y: Tensor) -> Tensor:
    index = torch.tensor([1, 2, 3])
    index[1:].add_(2)
    return y[..., index]


def reversed_by_numbers(y: Tensor) -> Tensor:
    return y[..., torch.tensor(list(range(7, -1, -1)))]


def every_token(y: Tensor) -> Tensor:
    return y[:, torch.arange(y.shape[1])]


#: What the forward makes, and how many channels its index picks.
STEPS: dict[Callable[[Tensor], Tensor], int] = {
    counted: 8,
    reversed_by_numbers: 8,
    every_token: 8,
    shifted: 3,
    overwritten: 3,
    written_through_a_view: 3,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_recording_holds_for_every_call(step: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda n, x: n.b(step(n.a(x))), a=nn.Linear(3, 8), b=nn.Linear(STEPS[step], 3))
    traced = fxcompress.trace(net, TOKENS)
    for tokens in (TOKENS, TOKENS, torch.randn(3, 7, 3)):
        torch.testing.assert_close(traced(tokens), net(tokens), rtol=0, atol=0)
    stays = (
        pytest.warns(UserWarning, match="a write decides which index is read")
        if STEPS[step] == 3
        else contextlib.nullcontext()
    )
    with stays:
        fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)  # verified


@pytest.mark.parametrize("step", [reversed_by_numbers, every_token])
def test_channels_go_through_an_index(step: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda n, x: n.b(step(n.a(x))), a=nn.Linear(3, 8), b=nn.Linear(8, 3))
    small = fxcompress.compress(net, [RandomFilterPruner(0.5), Speedup()], example_inputs=TOKENS)
    assert small.get_submodule("a").out_features == small.get_submodule("b").in_features == 4


def test_numbers_that_count_the_batch() -> None:
    """A recording holds them as they are: it is known to be for the example's batch size only."""
    net = Net(lambda n, x: n.a(x) * torch.tensor([int(x.shape[0])]), a=nn.Linear(3, 8))
    assert fxcompress.trace(net, TOKENS).meta["batched"] == ()
    other = Net(lambda n, x: n.a(x) * torch.tensor([2]), a=nn.Linear(3, 8))
    assert fxcompress.trace(other, TOKENS).meta["batched"] == ("args_0",)


@pytest.mark.parametrize(
    "index",
    [
        lambda h: (slice(None), [1, 3]),
        lambda h: [0, h.shape[0] - 1],
        lambda h: (..., [0, h.shape[2] - 1]),
        lambda h: (..., (1, 3)),
        lambda h: (..., [True, False] * 4),
        lambda h: ([0, 1], [1, 2]),
        lambda h: (..., np.array([1, 3])),
    ],
)
def test_writes_at_listed_positions_warn_of_nothing(index: Callable[[Tensor], Any]) -> None:
    def step(net: Any, x: Tensor) -> Tensor:
        h: Tensor = net.a(x)
        h[index(h)] = 0.5
        h[index(h)] *= h[index(h)] + 1
        return h

    net = Net(step, a=nn.Linear(3, 8))
    traced = fxcompress.trace(net, TOKENS)
    for tokens in (TOKENS, torch.randn(3, 5, 3)):
        torch.testing.assert_close(traced(tokens), net(tokens), rtol=0, atol=0)
