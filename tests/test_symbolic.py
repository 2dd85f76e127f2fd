"""Figures as polynomials in the widths: equal to what is counted, before and after removal."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import sympy
import torch
from nets import Net
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress import count
from fxcompress.cost import Cost
from fxcompress.symbolic import Figures


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
    assert sympy.expand(found.macs - sympy.sympify(macs, locals=ours)) == 0
    assert sympy.expand(found.params - sympy.sympify(params, locals=ours)) == 0
    assert found.evaluate() == figures(cost)
    assert sum((row.macs for row in found.table), sympy.Integer(0)) == found.macs
