"""Channels that hold a constant because weights are zero: which go, what is folded where, and which stay and why."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from constant_cases import IMAGE, TOKENS, behind, conv, notes, padded, shift, speedup, width, zero
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress.channels import constant_values
from fxcompress.channels.operators import RULES
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, LevelPruner, Speedup
from fxcompress.testing import check_laws

# ---- what comes through, and what the reader's bias takes over ----------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "scaled": lambda x: (2 * x - 0.5) ** 2 / 3,
    "clamped": lambda x: x.clamp(-0.3, 0.6).abs(),
    "chosen": lambda x: torch.where(x > 0.1, x, -x.exp()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_constant_is_what_norm_and_activation_make_of_zero(name: str) -> None:
    f = ACTIVATIONS[name]
    net = Net(lambda n, x: n.b(f(n.bn(n.a(x)))), a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), b=conv(6, 4)).double()
    shift(net.bn, -0.7, 0.4)
    small = speedup(net, IMAGE, "a")
    assert width(small, "a") == 4
    taken = net.b.bias + net.b.weight[:, 1:3, 0, 0] @ f(behind(net.bn)[1:3].clone())
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)
    assert "constants folded into b.bias" in notes(small)


def test_a_bias_that_is_not_masked_is_the_constant() -> None:
    net = Net(lambda n, x: n.b(F.silu(n.bn(n.a(x)))), a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), b=conv(6, 4)).double()
    small = speedup(net, IMAGE, "a.weight")
    taken = net.b.bias + net.b.weight[:, 1:3, 0, 0] @ F.silu(behind(net.bn, net.a.bias)[1:3])
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)


def test_prelu_and_layer_scale() -> None:
    net = Net(
        lambda n, x: n.b(n.act(n.bn(n.a(x))) * n.scale[:, None, None]),
        a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), act=nn.PReLU(6), b=conv(6, 4),
        scale=nn.Parameter(torch.ones(6)),
    )  # fmt: skip
    assert width(speedup(net, IMAGE, "a"), "a") == 4


#: Networks whose channels 1 and 2 of layer ``a`` go if its rows are zero: what lies between, and the reader.
FOLDED: dict[str, Callable[[], Net]] = {
    "linear": lambda: Net(
        lambda n, x: n.b(n.bn(n.a(x)).relu().mean((2, 3))), a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), b=nn.Linear(6, 4)
    ),
    "flattened linear": lambda: Net(
        lambda n, x: n.b(n.bn(n.a(x)).sigmoid().flatten(1)), a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), b=nn.Linear(216, 4)
    ),
    "linear over positions": lambda: Net(
        lambda n, x: n.b(n.bn(n.a(x)).sigmoid().permute(0, 2, 3, 1)),
        a=conv(3, 6, 3), bn=nn.BatchNorm2d(6), b=nn.Linear(6, 4),
    ),
    "1x1": lambda: Net(lambda n, x: n.b(n.bn(n.a(x)).sigmoid()), a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4)),
    "unpadded, dilated, strided": lambda: Net(
        lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=conv(6, 4, 3, stride=2, dilation=2)
    ),
    "1d": lambda: Net(
        lambda n, x: n.b(n.a(x.flatten(2)).sigmoid()), a=nn.Conv1d(3, 6, 1), b=nn.Conv1d(6, 4, 3, bias=False)
    ),
    "grouped": lambda: Net(lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6, 1), b=conv(6, 4, 3, groups=2)),
    "1x1 transposed": lambda: Net(
        lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=nn.ConvTranspose2d(6, 4, 1)
    ),
    "reflected border": lambda: Net(
        lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=conv(6, 4, 3, padding=1, padding_mode="reflect")
    ),
    "replicated border": lambda: Net(
        lambda n, x: n.b(n.a(x).sigmoid()), a=conv(3, 6), b=conv(6, 4, 3, padding=1, padding_mode="replicate")
    ),
    "max pooling": lambda: Net(
        lambda n, x: n.b(F.max_pool2d(n.a(x).sigmoid(), 3, 2, 1)), a=conv(3, 6), b=conv(6, 4)
    ),
    "average pooling": lambda: Net(
        lambda n, x: n.b(F.avg_pool2d(n.a(x).sigmoid(), 3, 2, 1, count_include_pad=False)), a=conv(3, 6), b=conv(6, 4)
    ),
    "adaptive pooling": lambda: Net(
        lambda n, x: n.b(F.adaptive_avg_pool2d(n.a(x).sigmoid(), 3).flatten(1)), a=conv(3, 6), b=nn.Linear(54, 4)
    ),
    "interpolation": lambda: Net(
        lambda n, x: n.b(F.interpolate(n.a(x).sigmoid(), scale_factor=2, mode="bilinear")), a=conv(3, 6), b=conv(6, 4)
    ),
    "concatenation": lambda: Net(
        lambda n, x: n.b(torch.cat([n.c(x), n.a(x).sigmoid(), x], 1)), a=conv(3, 6), c=conv(3, 5), b=conv(14, 4)
    ),
    "two readers": lambda: Net(
        lambda n, x: n.b(n.a(x).sigmoid()).mean((2, 3)) + n.c(n.a(x).sigmoid().mean((2, 3))),
        a=conv(3, 6), b=conv(6, 4, 3), c=nn.Linear(6, 4),
    ),
    "unpadded depthwise": lambda: Net(
        lambda n, x: n.b(n.d(n.a(x).sigmoid())), a=conv(3, 6), d=conv(6, 6, 3, groups=6), b=conv(6, 4)
    ),
    "a chain": lambda: Net(
        lambda n, x: n.c(n.b(n.a(x).sigmoid()).sigmoid()), a=conv(3, 6), b=conv(6, 6, 3), c=conv(6, 4)
    ),
    "shuffle": lambda: Net(
        lambda n, x: n.b(F.pixel_shuffle(n.a(x), 1).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2).sigmoid()),
        a=conv(3, 6), b=conv(6, 4),
    ),
    "gate": lambda: Net(
        lambda n, x: n.b(n.a(x) * n.c(x.mean((2, 3), keepdim=True)).sigmoid()), a=conv(3, 6), c=conv(3, 6), b=conv(6, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", [True, False], ids=["masks", "weights that are zero"])
@pytest.mark.parametrize("name", FOLDED)
def test_constants_that_can_be_folded_go(name: str, given: bool) -> None:
    net = FOLDED[name]()
    small = speedup(net, IMAGE, "a", given=given)
    # Convolution groups keep equal numbers: of rows 1 and 2, both in the first group of three, none can go.
    assert width(small, "a") == (6 if name == "grouped" else 4), notes(small)


def test_convolution_groups_lose_equal_numbers() -> None:
    net = FOLDED["grouped"]().double()
    small = speedup(net, IMAGE, "a")
    assert "2 channels of a stay: as many must stay in every row, and one at least" in notes(small)
    masks = {"a.weight": torch.ones(6, 3, 1, 1, dtype=torch.bool), "a.bias": torch.ones(6, dtype=torch.bool)}
    for mask in masks.values():
        mask[[1, 4]] = False  # one of each group of three
    small = fxcompress.compress(net, [Speedup(masks=masks)], example_inputs=IMAGE)
    assert (width(small, "a"), small.get_parameter("b.weight").shape[1]) == (4, 2)
    taken = net.b.bias + 0.5 * torch.cat([net.b.weight[:2, 1].sum((1, 2)), net.b.weight[2:, 1].sum((1, 2))])
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)


def test_flattened_positions_are_folded_one_by_one() -> None:
    net = FOLDED["flattened linear"]().double()
    small = speedup(net, IMAGE, "a")
    columns = net.b.weight.reshape(4, 6, 36)[:, 1:3].sum(2)
    taken = net.b.bias + columns @ behind(net.bn)[1:3].sigmoid()
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)
    assert small.get_parameter("b.weight").shape == (4, 4 * 36)


# ---- where a reader without a bias puts it --------------------------------------------------------------------------


def unbiased(step: Callable[..., Any]) -> Net:
    return Net(
        step, a=conv(3, 6), b=conv(6, 4, 3, bias=False), bn=nn.BatchNorm2d(4), c=conv(4, 5), d=conv(4, 5)
    ).double()  # fmt: skip


def test_the_running_mean_behind_takes_it_over() -> None:
    net = unbiased(lambda n, x: n.c(n.bn(n.b(n.a(x).sigmoid()))))
    small = speedup(net, IMAGE, "a")
    assert net.bn.running_mean is not None
    taken = net.bn.running_mean - 0.5 * net.b.weight[:, 1:3].sum((1, 2, 3))
    torch.testing.assert_close(small.get_buffer("bn.running_mean"), taken, rtol=1e-12, atol=1e-12)
    assert small.state_dict().keys() <= net.state_dict().keys()
    assert "constants folded into bn.running_mean" in notes(small)


@pytest.mark.parametrize(
    "step",
    [
        lambda n, x: n.c(n.b(n.a(x).sigmoid()).relu()),
        lambda n, x: n.c(n.bn(y := n.b(n.a(x).sigmoid()))) + n.d(y),
        lambda n, x: n.c(n.bn(n.b(n.a(x).sigmoid()))) + n.d(n.bn(n.b(n.a(x).sigmoid()).relu())),
    ],
    ids=["no norm", "read by others", "a norm used twice"],
)
def test_a_bias_is_added_where_no_norm_can(step: Callable[..., Any]) -> None:
    net = unbiased(step)
    small = speedup(net, IMAGE, "a")
    assert set(small.state_dict()) - set(net.state_dict()) == {"b.bias"}
    taken = 0.5 * net.b.weight[:, 1:3].sum((1, 2, 3))
    torch.testing.assert_close(small.get_parameter("b.bias"), taken, rtol=1e-12, atol=1e-12)
    assert "b.bias (added)" in notes(small)
    check_laws(Speedup(), zero(net, "a"), IMAGE)


def test_an_added_bias_has_the_rows_that_are_left() -> None:
    """Rows 1 and 2 of the reader go as well: its bias is made for the others."""
    net = unbiased(lambda n, x: n.c(n.b(n.a(x).sigmoid()).tanh()))
    small = speedup(net, IMAGE, "a", "c:1")
    assert (width(small, "a"), width(small, "b"), small.get_parameter("b.bias").shape) == (4, 2, (2,))


def test_linear_before_a_norm_over_another_dimension() -> None:
    """BatchNorm1d normalises dimension 1 of (batch, tokens, features): it is no place for features' constants."""
    net = Net(
        lambda n, x: n.bn(n.b(n.a(x).sigmoid())), a=nn.Linear(6, 6), b=nn.Linear(6, 5, bias=False), bn=nn.BatchNorm1d(5)
    )
    assert "b.bias (added)" in notes(speedup(net, TOKENS, "a"))


# ---- together with the rest -----------------------------------------------------------------------------------------


def test_nothing_is_analysed_where_no_slice_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_module("fxcompress.context"), "analyse")
    net = padded()
    done = fxcompress.compress(net, [Speedup()], example_inputs=IMAGE)
    assert not done.meta["history"][-1].modified


def test_float32_is_held_to_its_own_rounding() -> None:
    net = FOLDED["1x1"]().float()
    small = fxcompress.compress(zero(net, "a"), [Speedup()], example_inputs=IMAGE.float())
    assert width(small, "a") == 4
    (step,) = small.meta["history"]
    assert step.difference is not None
    assert step.difference < 1e-6


def test_sparse_weights_lose_the_channels_that_are_gone_altogether() -> None:
    net = Net(lambda n, x: n.b(n.bn(n.a(x)).sigmoid()), a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4)).double()
    with torch.no_grad():
        net.a.weight[1:3] *= 1e-3
    masked = fxcompress.compress(net, [LevelPruner({"a": 0.5})], example_inputs=IMAGE)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=IMAGE)
    assert width(small, "a") <= 4
    torch.testing.assert_close(small(IMAGE), masked(IMAGE), rtol=1e-9, atol=1e-9)


def test_masked_channels_and_constants_in_one_run() -> None:
    """Statistics run over live channels of the group that a pruner masked; the other group holds constants."""
    net = Net(
        lambda n, x: n.c(n.ln(n.b(n.a(x).sigmoid()))),
        a=nn.Linear(6, 6), b=nn.Linear(6, 8), ln=nn.LayerNorm(8), c=nn.Linear(8, 3),
    ).double()  # fmt: skip
    masked = fxcompress.compress(zero(net, "a"), [L1FilterPruner(0.5, include="b")], example_inputs=TOKENS)
    small = fxcompress.compress(masked, [Speedup()], example_inputs=TOKENS)
    assert (width(small, "a"), width(small, "b")) == (4, 4)
    torch.testing.assert_close(small(TOKENS), masked(TOKENS), rtol=1e-9, atol=1e-9)


def test_folding_the_norm_first_gives_the_same() -> None:
    net = Net(lambda n, x: n.b(n.bn(n.a(x)).relu()), a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4)).double()
    one = fxcompress.compress(zero(net, "a"), [FoldBatchNorm(), Speedup()], example_inputs=IMAGE)
    two = fxcompress.compress(zero(net, "a"), [Speedup(), FoldBatchNorm()], example_inputs=IMAGE)
    assert width(one, "a") == width(two, "a") == 4
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, two.get_parameter(name), rtol=1e-9, atol=1e-9)


def test_shared_biases_take_nothing() -> None:
    net = Net(
        lambda n, x: n.b(n.a(x).sigmoid()) + n.c(x).sum((2, 3), keepdim=True), a=conv(3, 6), b=conv(6, 4), c=conv(3, 4)
    )
    net.c.bias = net.b.bias
    small = speedup(net, IMAGE, "a", given=False)
    assert width(small, "a") == 6
    assert "constant 0.5 enters b, whose bias is shared" in notes(small)


def test_a_buffer_that_the_forward_writes_is_no_constant() -> None:
    def count(n: Net, x: Tensor) -> Tensor:
        n.steps.add_(1)
        return n.b(n.a(x).sigmoid() * n.steps)

    net = Net(count, a=conv(3, 6), b=conv(6, 4), steps=torch.ones(1)).double()
    small = fxcompress.compress(zero(net, "a"), [Speedup()], example_inputs=IMAGE, verify=False)
    assert width(small, "a") == 6


def test_embeddings_with_columns_of_zeros() -> None:
    net = Net(lambda n, x: n.b(n.a(x).cos()), a=nn.Embedding(7, 6), b=nn.Linear(6, 4)).double()
    with torch.no_grad():
        net.a.weight[:, 2] = 0
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    small = fxcompress.compress(net, [Speedup()], example_inputs=x)
    assert small.get_parameter("a.weight").shape == (7, 5)
    torch.testing.assert_close(small.get_parameter("b.bias"), net.b.bias + net.b.weight[:, 2], rtol=1e-12, atol=0)


def test_every_operator_class_with_constants_is_one_of_the_analysis() -> None:
    assert set(constant_values.VALUES) <= set(RULES.values())
