"""Masked modules: what they compute, against copies whose weights were zeroed by hand, and what they keep."""

import copy
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from nets import Net
from scores import Chosen, InOrder, choose
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import Pass, TracedModule
from fxcompress.passes import L1FilterPruner, LevelPruner, RandomFilterPruner, Speedup
from fxcompress.pipeline import Context

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def zero(tensor: Tensor | None, dim: int, dead: Iterable[int]) -> None:
    assert tensor is not None
    with torch.no_grad():
        tensor.index_fill_(dim, torch.tensor(list(dead)), 0)


def close(expected: Any, found: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- networks, the channels that go, and the same channels zeroed by hand -------------------------------------------


def plain() -> Net:
    return Net(
        lambda n, x: n.fc(F.max_pool2d(F.relu(n.bn(n.a(x))), 4).flatten(1)),
        a=nn.Conv2d(3, 6, 3, padding=1), bn=nn.BatchNorm2d(6), fc=nn.Linear(6 * 4, 5),
    )  # fmt: skip


def zero_plain(net: Net) -> None:
    for tensor in (net.a.weight, net.a.bias, net.bn.weight, net.bn.bias):
        zero(tensor, 0, [1, 4])
    zero(net.fc.weight, 1, [4, 5, 6, 7, 16, 17, 18, 19])  # four positions for each channel


def sigmoid() -> Net:
    """An activation with f(0) != 0 in front of the consumer."""
    return Net(lambda n, x: n.b(torch.sigmoid(n.a(x))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 3, padding=1))


def zero_sigmoid(net: Net) -> None:
    zero(net.a.weight, 0, [0, 3, 5])
    zero(net.a.bias, 0, [0, 3, 5])
    zero(net.b.weight, 1, [0, 3, 5])


def residual() -> Net:
    def step(n: Net, x: Tensor) -> Tensor:
        x = n.bn1(n.a(x))
        x = x + n.bn2(n.c(F.relu(n.b(F.silu(x)))))
        return n.d(F.gelu(x).mean((2, 3)))

    return Net(
        step, a=nn.Conv2d(3, 6, 1), bn1=nn.BatchNorm2d(6), b=nn.Conv2d(6, 4, 3, padding=1),
        c=nn.Conv2d(4, 6, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(6), d=nn.Linear(6, 5),
    )  # fmt: skip


def zero_residual(net: Net) -> None:
    for tensor in (net.a.weight, net.a.bias, net.c.weight, *net.bn1.parameters(), *net.bn2.parameters()):
        zero(tensor, 0, [0, 5])
    zero(net.b.weight, 1, [0, 5])
    zero(net.d.weight, 1, [0, 5])
    zero(net.b.weight, 0, [2])
    zero(net.b.bias, 0, [2])
    zero(net.c.weight, 1, [2])


def excited() -> Net:
    def step(n: Net, x: Tensor) -> Tensor:
        x = n.bn(n.dw(F.hardswish(n.a(x))))
        x = x * F.hardsigmoid(n.up(F.relu(n.down(F.adaptive_avg_pool2d(x, 1)))))
        return n.b(x)

    return Net(
        step, a=nn.Conv2d(3, 6, 1), dw=nn.Conv2d(6, 6, 3, padding=1, groups=6), bn=nn.BatchNorm2d(6),
        down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 5, 1),
    )  # fmt: skip


def zero_excited(net: Net) -> None:
    for layer in (net.a, net.dw, net.bn, net.up):
        zero(layer.weight, 0, [1, 2])
        zero(layer.bias, 0, [1, 2])
    zero(net.down.weight, 1, [1, 2])
    zero(net.b.weight, 1, [1, 2])
    zero(net.down.weight, 0, [0])
    zero(net.down.bias, 0, [0])
    zero(net.up.weight, 1, [0])


def grouped() -> Net:
    return Net(
        lambda n, x: n.b(F.relu(n.bn(n.g(F.relu(n.a(x)))))),
        a=nn.Conv2d(3, 6, 1), g=nn.Conv2d(6, 8, 3, groups=2), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 5, 1),
    )  # fmt: skip


def zero_grouped(net: Net) -> None:
    """a loses 1 of 0-2 and 3 of 3-5 (columns 1 and 0 of the groups); g loses 0 of 0-3 and 6 of 4-7."""
    zero(net.a.weight, 0, [1, 3])
    zero(net.a.bias, 0, [1, 3])
    zero(net.g.weight[:4], 1, [1])
    zero(net.g.weight[4:], 1, [0])
    for tensor in (net.g.weight, net.g.bias, *net.bn.parameters()):
        zero(tensor, 0, [0, 6])
    zero(net.b.weight, 1, [0, 6])


def twice() -> Net:
    return Net(
        lambda n, x: n.c(n.b(F.relu(n.b(F.relu(n.a(x)))))),
        a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1), c=nn.Conv2d(6, 5, 1),
    )  # fmt: skip


def zero_twice(net: Net) -> None:
    for layer in (net.a, net.b):
        zero(layer.weight, 0, [2, 3, 4])
        zero(layer.bias, 0, [2, 3, 4])
    zero(net.b.weight, 1, [2, 3, 4])
    zero(net.c.weight, 1, [2, 3, 4])


def transposed() -> Net:
    return Net(
        lambda n, x: n.c(n.p(n.bn(n.t(n.a(x))))),
        a=nn.Conv2d(3, 6, 1), t=nn.ConvTranspose2d(6, 4, 2, 2), bn=nn.BatchNorm2d(4), p=nn.PReLU(4),
        c=nn.Conv2d(4, 5, 1),
    )  # fmt: skip


def zero_transposed(net: Net) -> None:
    zero(net.a.weight, 0, [5])
    zero(net.a.bias, 0, [5])
    zero(net.t.weight, 0, [5])
    zero(net.t.weight, 1, [0, 2])
    for tensor in (net.t.bias, net.p.weight, *net.bn.parameters()):
        zero(tensor, 0, [0, 2])
    zero(net.c.weight, 1, [0, 2])


Network = tuple[Callable[[], Net], Callable[[Net], None], dict[str, int], dict[str, list[int]]]
NETWORKS: dict[str, Network] = {  # the network, the zeros, the widths of its groups, and which channels go
    "plain": (plain, zero_plain, {"a": 6}, {"a": [1, 4]}),
    "sigmoid": (sigmoid, zero_sigmoid, {"a": 6}, {"a": [0, 3, 5]}),
    "residual": (residual, zero_residual, {"a": 6, "b": 4, "c": 6}, {"a": [0, 5], "b": [2], "c": [0, 5]}),
    "excited": (
        excited, zero_excited, {"a": 6, "dw": 6, "up": 6, "down": 3},
        {"a": [1, 2], "dw": [1, 2], "up": [1, 2], "down": [0]},
    ),
    "grouped": (grouped, zero_grouped, {"a": 6, "g": 8}, {"a": [1, 3], "g": [0, 6]}),
    "twice": (twice, zero_twice, {"a": 6, "b": 6}, {"a": [2, 3, 4], "b": [2, 3, 4]}),
    "transposed": (transposed, zero_transposed, {"a": 6, "t": 4}, {"a": [5], "t": [0, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_a_masked_model_is_the_model_with_its_weights_zeroed_by_hand(network: Network, training: bool) -> None:
    make, zeros, widths, dead = network
    net = make().double().train(training)
    masked = fxcompress.compress(net, [choose(widths, dead)], example_inputs=IMAGE)
    expected = copy.deepcopy(net)
    zeros(expected)
    for shape in ((2, 3, 8, 8), (5, 3, 8, 8), (3, 3, 8, 8)):
        x = torch.randn(*shape, dtype=torch.float64)
        close(expected(x), masked(x))
    for name, buffer in expected.named_buffers():  # running statistics of train mode
        if name.endswith("running_mean"):
            live = fxcompress.masks(masked).get(name.replace("running_mean", "bias"), torch.ones_like(buffer).bool())
            close(buffer[live], masked.get_buffer(name)[live])
    small = fxcompress.compress(masked, [Speedup()], example_inputs=IMAGE).eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    if not training:
        torch.testing.assert_close(small(x), expected(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_masks_are_the_zeros(network: Network) -> None:
    """Every parameter's mask is where the copy was zeroed, whoever the parameter belongs to."""
    make, zeros, widths, dead = network
    net = make()
    masked = fxcompress.compress(net, [choose(widths, dead)], example_inputs=IMAGE.float())
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.fill_(1)
    zeros(expected)
    masks = fxcompress.masks(masked)
    for name, parameter in expected.named_parameters():
        assert torch.equal(masks.get(name, torch.ones_like(parameter).bool()), parameter.bool()), name
    assert set(masks) == {name for name, parameter in expected.named_parameters() if not parameter.all()}


# ---- what a masked module keeps -----------------------------------------------------------------------------------


def masked_half(net: Net | None = None) -> tuple[Net, fxcompress.TracedModule]:
    net = net or plain()
    return net, fxcompress.compress(net, [InOrder(0.5)], example_inputs=IMAGE.float())


def test_parameters_keep_their_values_under_the_callers_keys() -> None:
    net, masked = masked_half()
    state = masked.state_dict()
    for key, value in net.state_dict().items():
        assert torch.equal(state[key], value), key
    added = {key for key in state if key not in net.state_dict()}
    assert added == {f"_masks.{name}" for name in ("a.weight", "a.bias", "bn.weight", "bn.bias", "fc.weight")}
    assert {state[key].dtype for key in added} == {torch.bool}
    assert {name for name, _ in masked.named_parameters()} == {name for name, _ in net.named_parameters()}


def test_masks_are_bool_true_keeps_and_copies() -> None:
    net, masked = masked_half()
    found = fxcompress.masks(masked)
    assert all(mask.dtype == torch.bool and mask.shape == net.get_parameter(name).shape for name, mask in found.items())
    assert found["a.bias"].tolist() == [False] * 3 + [True] * 3
    before = masked(IMAGE.float())
    found["a.bias"].fill_(False)
    close(before, masked(IMAGE.float()))
    assert fxcompress.masks(net) == {}


def test_what_is_stored_behind_a_mask_does_not_matter() -> None:
    _, masked = masked_half()
    expected = masked(IMAGE.float())
    with torch.no_grad():
        for name, mask in fxcompress.masks(masked).items():
            masked.get_parameter(name)[~mask] = 1e6
    close(expected, masked(IMAGE.float()))


def test_masked_channels_are_zero_behind_a_norm() -> None:
    """BatchNorm would give them its bias; nobody who looks inside may see that."""
    _, masked = masked_half()
    (relu,) = masked.graph.find_nodes(op="call_function", target=F.relu)
    seen: dict[fx.Node, Any] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Watching(masked).run(IMAGE.float())
    found = seen[relu.args[0]]
    assert not found[:, :3].any()
    assert found[:, 3:].flatten(2).any(2).all()


def test_a_layer_used_twice_has_one_mask() -> None:
    _, masked = masked_half(twice())
    assert sorted(fxcompress.masks(masked)) == ["a.bias", "a.weight", "b.bias", "b.weight", "c.weight"]
    assert [n.target for n in masked.graph.nodes if n.op == "get_attr"].count("_masks.b.weight") == 1
    assert [name for name, _ in masked.named_buffers() if name.endswith("b.weight")] == ["_masks.b.weight"]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_the_callers(training: bool) -> None:
    net = plain().train(training)
    net.bn.eval()
    masked = fxcompress.compress(net, [InOrder(0.5)], example_inputs=IMAGE.float())
    small = fxcompress.compress(masked, [Speedup()], example_inputs=IMAGE.float())
    for made in (masked, small):
        assert (made.training, made.bn.training) == (training, False)  # type: ignore[union-attr]


def test_copies_of_a_masked_module() -> None:
    _, masked = masked_half(residual())
    x = torch.randn(3, 3, 8, 8)
    for made in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        close(masked(x), made(x))
        assert fxcompress.masks(made).keys() == fxcompress.masks(masked).keys()
        small = fxcompress.compress(made, [Speedup()], example_inputs=IMAGE.float())
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
    _, other = masked_half(residual())
    other.load_state_dict(masked.state_dict())
    close(masked(x), other(x))
    assert masked.double()(x.double()).dtype == torch.float64


# ---- how many go --------------------------------------------------------------------------------------------------


def wide(width: int) -> Net:
    return Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(3, width), b=nn.Linear(width, 2))


def dead_of(masked: nn.Module, name: str = "a.bias") -> list[int]:
    masks = fxcompress.masks(masked)
    return (~masks[name]).nonzero().flatten().tolist() if name in masks else []


@pytest.mark.parametrize(
    "width, sparsity, count",
    [
        (50, 0.58, 28),  # 50 * .58 is 28.999999999999996
        (100, 0.29, 28),
        (10, 0.3, 3),
        (10, 0.29, 2),
        (3, 0.34, 1),
        (7, 0.99, 6),
        (8, 0.0, 0),
        (8, 0.124, 0),
        (3, math.nextafter(1, 0), 2),  # int(3 * s) is 3: one stays
        (2, 0.9, 1),
    ],
)
def test_exactly_int_n_s_channels_go(width: int, sparsity: float, count: int) -> None:
    for scope in ("layer", "global"):
        pruner = InOrder(sparsity, scope=scope)  # type: ignore[arg-type]
        masked = fxcompress.compress(wide(width), [pruner], example_inputs=torch.randn(2, 3))
        assert dead_of(masked) == list(range(count))


@pytest.mark.parametrize(
    "width, sparsity, round_to, kept",
    [(50, 0.58, 8, 24), (50, 0.58, 22, 22), (50, 0.58, 1, 22), (64, 0.5, 8, 32), (12, 0.5, 8, 8), (6, 0.5, 8, 6)],
)
def test_round_to_rounds_the_kept_width_up(width: int, sparsity: float, round_to: int, kept: int) -> None:
    pruner = InOrder(sparsity, round_to=round_to)
    masked = fxcompress.compress(wide(width), [pruner], example_inputs=torch.randn(2, 3))
    assert width - len(dead_of(masked)) == kept


def test_ties_go_by_index() -> None:
    net = wide(9)
    with torch.no_grad():
        net.a.weight.fill_(0.5)
    for pruner in (L1FilterPruner(0.5), L1FilterPruner(0.5, scope="global")):
        masked = fxcompress.compress(net, [pruner], example_inputs=torch.randn(2, 3))
        assert dead_of(masked) == [0, 1, 2, 3]


# ---- pruning what is pruned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("second, count", [(0.25, 5), (0.5, 5), (0.7, 7)])
def test_masks_only_grow_and_count_from_the_dense_width(second: float, count: int) -> None:
    x = torch.randn(2, 3)
    first = fxcompress.compress(wide(10), [Chosen(0.5, dead={"a": [1, 3, 5, 7, 9]})], example_inputs=x)
    again = fxcompress.compress(first, [InOrder(second)], example_inputs=x)
    expected = {1, 3, 5, 7, 9} | set([0, 2][: count - 5])
    assert set(dead_of(again)) == expected
    assert dead_of(first) == [1, 3, 5, 7, 9]  # what was handed out before stays as it was
    both = [Chosen(0.5, dead={"a": [1, 3, 5, 7, 9]}), InOrder(second)]
    assert set(dead_of(fxcompress.compress(wide(10), both, example_inputs=x))) == expected


def test_elements_and_channels_are_joined() -> None:
    x = torch.randn(2, 3)
    net = wide(10)
    level = fxcompress.compress(net, [LevelPruner(0.5)], example_inputs=x)
    both = fxcompress.compress(level, [InOrder(0.5)], example_inputs=x)
    kept = torch.arange(10) >= 5
    expected = fxcompress.masks(level)["a.weight"] & kept[:, None]
    assert torch.equal(fxcompress.masks(both)["a.weight"], expected)
    assert torch.equal(fxcompress.masks(both)["b.weight"], fxcompress.masks(level)["b.weight"] & kept)
    other = fxcompress.compress(net, [InOrder(0.5), LevelPruner(0.5)], example_inputs=x)
    weight = net.a.weight.detach().abs().masked_fill(~kept[:, None], -1).flatten()  # 15 of 30: what is masked already
    assert torch.equal(fxcompress.masks(other)["a.weight"], (weight >= 0).view(10, 3))


# ---- training -----------------------------------------------------------------------------------------------------


def test_training_a_masked_model() -> None:
    """Gradients flow where something lives, and what is masked stays masked, momentum and decay included."""
    net, masked = masked_half(residual())
    plain_net = copy.deepcopy(net).train()
    masked.train()
    masks = fxcompress.masks(masked)
    with torch.no_grad():
        for name, mask in masks.items():
            plain_net.get_parameter(name).mul_(mask)
    target = torch.randn(4, 5)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9, weight_decay=0.1) for m in (masked, plain_net)]
    for step in range(3):
        x = torch.randn(4, 3, 8, 8)
        for model, optimizer in zip((masked, plain_net), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            for name, mask in masks.items():
                grad = model.get_parameter(name).grad
                assert grad is not None
                if model is masked:
                    assert not grad[~mask].any()
                    assert step or grad[mask].any()
                else:
                    grad.mul_(mask)
            optimizer.step()
    for name, mask in masks.items():
        effective = masked.get_parameter(name) * mask
        assert not effective[~mask].any()
        torch.testing.assert_close(effective, plain_net.get_parameter(name), rtol=1e-4, atol=1e-5)
    live = masks["bn1.bias"]
    torch.testing.assert_close(masked.get_buffer("bn1.running_var")[live], plain_net.bn1.running_var[live])
    assert masked.get_buffer("bn1.num_batches_tracked") == 3
    small = fxcompress.compress(masked.eval(), [Speedup()], example_inputs=IMAGE.float())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(x), plain_net.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_seeded_pruner_after_another_sees_effective_values() -> None:
    """What the first one masked scores 0 afterwards, however large it is."""
    net = wide(4)
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([[9.0] * 3, [1.0] * 3, [2.0] * 3, [3.0] * 3]))
    x = torch.randn(2, 3)
    first = fxcompress.compress(net, [Chosen(0.25, dead={"a": [0]})], example_inputs=x)
    again = fxcompress.compress(first, [L1FilterPruner(0.5)], example_inputs=x)
    assert dead_of(again) == [0, 1]
    assert len(dead_of(fxcompress.compress(first, [RandomFilterPruner(0.5)], example_inputs=x))) == 2


def test_writes_through_views_behind_live_statistics() -> None:
    """The norm runs over the live channels alone; what it makes lies in memory as in the dense model."""

    def step(net: Any, x: Tensor) -> Tensor:
        h = F.normalize(net.a(x).transpose(1, 2), dim=2).transpose(1, 2)
        h.view(len(h), -1)[:, 0].mul_(3)
        out: Tensor = net.b(h)
        return out

    net = Net(step, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 5, 6).double()
    masked = fxcompress.compress(net, [L1FilterPruner(0.5)], example_inputs=x)
    removed = fxcompress.compress(masked, [Speedup()], example_inputs=x)
    zeroed = copy.deepcopy(net)
    for name, mask in fxcompress.masks(masked).items():
        zeroed.get_parameter(name).data.mul_(mask)
    assert len(removed.get_parameter("a.weight")) < 8
    x = torch.randn(3, 3, 6, 5).double()
    torch.testing.assert_close(masked(x), zeroed(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(removed(x), zeroed(x), rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Widens(Pass):
    """Gives a hidden layer two more outputs."""

    lifts: ClassVar[bool] = True

    def run(self, module: TracedModule, context: Context) -> TracedModule:
        a, b = module.get_submodule("a"), module.get_submodule("b")
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        a.weight, a.bias = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(8))
        b.weight, a.out_features, b.in_features = nn.Parameter(torch.randn(3, 8)), 8, 8
        return module


def test_an_axis_that_changed_its_length_under_masks_is_an_error() -> None:
    net = Net(lambda n, x: n.b(F.relu(n.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    x = torch.randn(2, 5)
    fxcompress.compress(net, [Widens(), L1FilterPruner(0.5), Speedup()], example_inputs=x)
    with pytest.raises(
        fxcompress.GraphError, match=r"dimension 0 of a.weight has a length of 8; expected 6, of which 3"
    ):
        fxcompress.compress(net, [L1FilterPruner(0.5), Widens(), Speedup()], example_inputs=x)
