"""Channels that hold a constant which no reader can take over: that they stay, why, and what goes if one insists."""

from collections.abc import Callable
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from constant_cases import IMAGE, TOKENS, conv, notes, padded, speedup, width, zero
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress import VerificationError
from fxcompress.channels import constant_values, constants
from fxcompress.passes import Speedup

# ---- what stays, and why --------------------------------------------------------------------------------------------


def test_a_padded_convolution_sees_the_constant_inside_only() -> None:
    """Behind relu channel 1 is zero and goes; channel 2 is 0.25 inside and 0 at the border."""
    small = speedup(padded(), IMAGE, "a")
    assert width(small, "a") == 5
    assert "1 channel of a stays: constant 0.25 enters the zero-padded convolution b" in notes(small)


def residual(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    return n.b((x + n.c(x.sigmoid())).sigmoid())


def attention(n: Net, x: Tensor) -> Tensor:
    return n.b((n.q(x) + 1) @ (n.a(x) + 1).transpose(1, 2) @ x)


#: A network on images or tokens, the slices that are zero, how many of the 6 channels of ``a`` stay, and why.
STAYING: dict[str, tuple[Callable[[], Net], tuple[str, ...], int, str]] = {
    "one side of a residual sum": (
        lambda: Net(residual, a=conv(3, 6), c=conv(6, 6), b=conv(6, 4)), ("a",), 6, "c produces them too"
    ),
    "both sides": (lambda: Net(residual, a=conv(3, 6), c=conv(6, 6), b=conv(6, 4)), ("a", "c"), 4, ""),
    "a gate that is not masked": (
        lambda: Net(
            lambda n, x: n.b(n.a(x).sigmoid() * n.c(x).sigmoid()), a=conv(3, 6), c=conv(3, 6), b=conv(6, 4)
        ),
        ("a",), 6, "c produces them too",
    ),
    "transposed": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 2, stride=2)),
        ("a",), 6, "constant 0.5 enters the transposed convolution b",
    ),
    "zero into a transposed one": (
        lambda: Net(lambda n, x: n.b(n.a(x).tanh()), a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)),
        ("a",), 4, "",
    ),
    "padded depthwise": (
        lambda: Net(
            lambda n, x: n.b(n.d(n.a(x).sigmoid())), a=conv(3, 6), d=conv(6, 6, 3, padding=1, groups=6), b=conv(6, 4)
        ),
        ("a",), 6, "constant 0.5 enters the zero-padded convolution d",
    ),
    "a masked depthwise behind": (
        lambda: Net(
            lambda n, x: n.b(n.d(n.a(x).sigmoid()).sigmoid()),
            a=conv(3, 6), d=conv(6, 6, 3, padding=1, groups=6), b=conv(6, 4),
        ),
        ("d",), 4, "",
    ),
    "average pooling that counts its padding": (
        lambda: Net(lambda n, x: n.b(F.avg_pool2d(n.a(x).sigmoid(), 3, 1, 1)), a=conv(3, 6), b=conv(6, 4)),
        ("a",), 6, "what is read of them is no constant",
    ),
    "padding written out": (
        lambda: Net(lambda n, x: n.b(F.pad(n.a(x).sigmoid(), (1, 1, 1, 1))), a=conv(3, 6), b=conv(6, 4, 3)),
        ("a",), 6, "what is read of them is no constant",
    ),
    "a sum over positions": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid().sum((2, 3))), a=conv(3, 6), b=nn.Linear(6, 4)),
        ("a",), 6, "what is read of them is no constant",
    ),
    "a sum over positions of zeros": (
        lambda: Net(lambda n, x: n.b(n.a(x).tanh().sum((2, 3))), a=conv(3, 6), b=nn.Linear(6, 4)), ("a",), 4, ""
    ),
    "the batch size": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid() / x.shape[0]), a=conv(3, 6), b=conv(6, 4)),
        ("a",), 6, "what is read of them is no constant",
    ),
    "an output": (lambda: Net(lambda n, x: n.a(x), a=conv(3, 6)), ("a",), 6, "it is an output of the model"),
    "a sum over channels": (
        lambda: Net(lambda n, x: n.a(x).sigmoid().sum(1), a=conv(3, 6)), ("a",), 6, "takes a statistic over channels"
    ),
    "a sum over channels of zeros": (lambda: Net(lambda n, x: n.a(x).tanh().sum(1), a=conv(3, 6)), ("a",), 4, ""),
    "the largest channel": (
        lambda: Net(lambda n, x: n.a(x).tanh().amax(1), a=conv(3, 6)), ("a",), 6, "takes a statistic over channels"
    ),
    "group norm": (
        lambda: Net(lambda n, x: n.b(n.gn(n.a(x))), a=conv(3, 6), gn=nn.GroupNorm(2, 6), b=conv(6, 4)),
        ("a",), 6, "gn takes a statistic over channels",
    ),
    "written through a view": (lambda: Net(overwritten, a=conv(3, 6), b=conv(6, 4)), ("a",), 6, "no constant"),
    "a parameter that is no layer's": (
        lambda: Net(
            lambda n, x: torch.einsum("bchw,oc->bohw", n.a(x).sigmoid(), n.w), a=conv(3, 6),
            w=nn.Parameter(torch.ones(4, 6)),
        ),
        ("a",), 6, "which is no layer with a bias",
    ),
}  # fmt: skip


def overwritten(n: Net, x: Tensor) -> Tensor:
    y = n.a(x).sigmoid()
    y[:, :, 0] += x.mean((1, 2))[:, None]
    return n.b(y)


#: The same on tokens.
TOKEN_CASES: dict[str, tuple[Callable[[], Net], tuple[str, ...], int, str]] = {
    "layer norm": (
        lambda: Net(lambda n, x: n.b(n.ln(n.a(x))), a=nn.Linear(6, 6), ln=nn.LayerNorm(6), b=nn.Linear(6, 4)),
        ("a",), 6, "2 channels of a stay: ln takes a statistic over channels",
    ),
    "softmax over channels": (
        lambda: Net(lambda n, x: n.b(n.a(x).softmax(-1)), a=nn.Linear(6, 6), b=nn.Linear(6, 4)),
        ("a",), 6, "takes a statistic over channels",
    ),
    "a product of activations": (
        lambda: Net(attention, a=nn.Linear(6, 6), q=nn.Linear(6, 6), b=nn.Linear(6, 4)),
        ("a", "q"), 6, "multiplies it with other activations",
    ),
    "a product with zeros": (
        lambda: Net(
            lambda n, x: n.b((n.q(x) + 1) @ n.a(x).transpose(1, 2) @ x),
            a=nn.Linear(6, 6), q=nn.Linear(6, 6), b=nn.Linear(6, 4),
        ),
        ("a",), 4, "",
    ),
    "values of attention": (
        lambda: Net(
            lambda n, x: n.b(F.scaled_dot_product_attention(n.q(x), n.k(x), n.a(x))),
            a=nn.Linear(6, 6), q=nn.Linear(6, 6), k=nn.Linear(6, 6), b=nn.Linear(6, 4),
        ),
        ("a",), 4, "",
    ),
    "a constant of its own at every position": (
        lambda: Net(
            lambda n, x: n.b((n.a(x) + n.position).sigmoid()),
            a=nn.Linear(6, 6), b=nn.Linear(6, 4), position=nn.Parameter(torch.ones(5, 6)),
        ),
        ("a",), 6, "what is read of them is no constant",
    ),
    "used twice with one constant": (
        lambda: Net(
            lambda n, x: n.b(n.a(x).sigmoid()) + n.b(n.a(2 * x).sigmoid()), a=nn.Linear(6, 6), b=nn.Linear(6, 4)
        ),
        ("a",), 4, "",
    ),
    "used twice with two": (
        lambda: Net(
            lambda n, x: n.b(n.a(x).sigmoid()) + n.b(n.a(x).cos()), a=nn.Linear(6, 6), b=nn.Linear(6, 4)
        ),
        ("a",), 6, "which is called with another one elsewhere",
    ),
    "columns that are zero": (
        lambda: Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 4)), ("b:1",), 4, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("cases, name", [*product([0], STAYING), *product([1], TOKEN_CASES)])
def test_what_stays_is_listed_with_its_reason(cases: int, name: str) -> None:
    table, x = ((STAYING, IMAGE), (TOKEN_CASES, TOKENS))[cases]
    build, slices, left, reason = table[name]
    small = speedup(build(), x, *slices, given=False)
    assert width(small, "a") == left, notes(small)
    assert reason in notes(small)
    assert ("stay" in notes(small)) == bool(reason)


# ---- approximation --------------------------------------------------------------------------------------------------


def test_what_is_inexact_goes_where_that_is_asked_for() -> None:
    net = padded()
    exact, rough = (speedup(net, IMAGE, "a", approximate=flag) for flag in (False, True))
    assert (width(exact, "a"), width(rough, "a")) == (5, 4)
    taken = net.b.bias + 0.25 * net.b.weight[:, 2].sum((1, 2))
    torch.testing.assert_close(rough.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        one, two = exact(IMAGE), rough(IMAGE)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(one[inside], two[inside], rtol=1e-9, atol=1e-9)
    gap = ((one - two).abs().max() / one.abs().max()).item()
    assert gap > 1e-3, "refusing was right"
    (line,) = [note for note in rough.meta["history"][-1].notes if "approximated" in note]
    assert line.startswith("1 channel approximated: the outputs change by ")
    measured = float(line.split(" by ")[1].split()[0])
    assert measured >= 0.99 * gap  # the larger of two batches
    assert "stay" not in notes(rough)


def test_an_approximated_depthwise_convolution() -> None:
    build, slices, _, _ = STAYING["padded depthwise"]
    net = build().double()
    small = speedup(net, IMAGE, *slices, approximate=True)
    assert (width(small, "a"), width(small, "d")) == (4, 4)
    constant = net.d.bias[1:3] + 0.5 * net.d.weight[1:3].sum((1, 2, 3))
    taken = net.b.bias + net.b.weight[:, 1:3, 0, 0] @ constant
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)


def test_statistics_stay_when_approximating() -> None:
    build, slices, _, reason = TOKEN_CASES["layer norm"]
    small = fxcompress.compress(zero(build(), *slices), [Speedup(approximate=True)], example_inputs=TOKENS.float())
    assert width(small, "a") == 6
    assert reason in notes(small)
    assert not small.meta["history"][-1].modified


def test_an_approximation_checks_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is off for the approximation alone: a wrong fold behind an unpadded reader is still an error."""
    monkeypatch.setattr(import_module("fxcompress.constant_channels"), "_contribution", wrong)
    net = Net(lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=conv(6, 4))
    with pytest.raises(VerificationError, match="Speedup differs"):
        speedup(net, IMAGE, "a", approximate=True)


def wrong(module: nn.Module, intake: constants.Intake, gone: Any) -> Tensor:
    return torch.ones(len(module.get_parameter(intake.reader.weight)), dtype=torch.float64)


# ---- planted bugs ---------------------------------------------------------------------------------------------------


def test_the_check_sees_a_padded_convolution_that_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    right = constant_values.Window.of

    def careless(*args: Any) -> constant_values.Window:
        window = right(*args)
        return constant_values.Window(window.inputs, window.used, window.taps, False)

    monkeypatch.setattr(constant_values.Window, "of", careless)
    with pytest.raises(VerificationError, match="Speedup differs"):
        speedup(padded(), IMAGE, "a")


@pytest.mark.parametrize("name", ["layer norm", "used twice with two", "a product of activations"])
def test_the_check_sees_refusals_that_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, slices, _, _ = TOKEN_CASES[name]
    module = import_module("fxcompress.constant_channels")
    right = module.decide

    def careless(*args: Any) -> Any:
        return right(*args[:3], constants.Verdict.STAYS)

    monkeypatch.setattr(module, "decide", careless)
    with pytest.raises(VerificationError, match="Speedup differs"):
        speedup(build(), TOKENS, *slices, given=False)
