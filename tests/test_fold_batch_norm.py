"""Folding BatchNorm against the model itself, with statistics away from their defaults."""

from typing import Any

import pytest
import torch
from nets import Net
from scores import InOrder
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import FoldBatchNorm, L1FilterPruner, Speedup

IMAGE = torch.randn(2, 4, 6, 6, dtype=torch.float64)


def folded(net: Net, x: Any) -> fxcompress.TracedModule:
    return fxcompress.compress(net.double().eval(), [FoldBatchNorm()], example_inputs=x)


def norms(module: nn.Module) -> list[str]:
    return [name for name, item in module.named_modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]


def close(expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


LAYERS: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), torch.randn(2, 4, 6)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), torch.randn(2, 4, 3, 3, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), IMAGE),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), torch.randn(2, 4, 6)),
    "transposed 3d": (nn.ConvTranspose3d(4, 2, 2), nn.BatchNorm3d(2), torch.randn(2, 4, 3, 3, 3)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(3, 4)),
    "without affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), IMAGE),
    "large eps": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=0.5), IMAGE),
}


@pytest.mark.parametrize("layer, norm, x", LAYERS.values(), ids=LAYERS)
def test_the_function_stays(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    net = Net(lambda n, x: torch.relu(n.bn(n.layer(x))) + 1, layer=layer, bn=norm).double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = folded(net, x.double())
    assert norms(found) == []
    assert [str(n.target) for n in found.graph.nodes if n.op == "call_module"] == ["layer"]
    assert list(found.state_dict()) == ["layer.weight", "layer.bias"]
    for each in (x.double(), torch.randn_like(x.double())[:1]):
        close(net(each), found(each))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    (step,) = found.meta["history"]
    notes = " ".join(step.notes)
    assert step.modified
    assert "bn" in notes
    assert ("adds layer.bias" in notes) == (layer.bias is None)


def test_the_weights_are_those_of_the_equation() -> None:
    net = Net(lambda n, x: n.bn(n.a(x)), a=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)).double()
    found = folded(net, torch.randn(4, 3).double())
    net.requires_grad_(False)
    found.requires_grad_(False)
    for i in range(2):
        scale = float(net.bn.weight[i]) / (float(net.bn.running_var[i]) + net.bn.eps) ** 0.5
        close(net.a.weight[i] * scale, found.get_parameter("a.weight")[i])
        shifted = (float(net.a.bias[i]) - float(net.bn.running_mean[i])) * scale + float(net.bn.bias[i])
        assert float(found.get_parameter("a.bias")[i]) == pytest.approx(shifted, rel=1e-12)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


def tied(net: Net) -> None:
    net.b.weight = net.a.weight


KEPT: dict[str, tuple[Net, Tensor, list[str]]] = {
    "a second user": (Net(lambda n, x: (n.bn(y := n.a(x)), y), a=conv(), bn=nn.BatchNorm2d(4)), IMAGE, ["bn"]),
    "the layer called twice": (
        Net(lambda n, x: n.bn(n.a(n.a(x))), a=conv(), bn=nn.BatchNorm2d(4)), IMAGE, ["bn"]
    ),
    "the norm called twice": (
        Net(lambda n, x: n.bn(n.a(n.bn(n.b(x)))), a=conv(), b=conv(), bn=nn.BatchNorm2d(4)), IMAGE, ["bn"]
    ),
    "a linear layer over tokens": (  # the norm runs over dimension 1, the tokens
        Net(lambda n, x: n.bn(n.a(x)), a=nn.Linear(3, 5), bn=nn.BatchNorm1d(4)), torch.randn(2, 4, 3), ["bn"]
    ),
    "a linear layer over tokens, of equal sizes": (
        Net(lambda n, x: n.bn(n.a(x)), a=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)), torch.randn(2, 4, 3), ["bn"]
    ),
    "an activation in between": (
        Net(lambda n, x: n.bn(torch.relu(n.a(x))), a=conv(), bn=nn.BatchNorm2d(4)), IMAGE, ["bn"]
    ),
    "the batch's own statistics": (
        Net(lambda n, x: n.bn(n.a(x)), a=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False)), IMAGE, ["bn"]
    ),
    "the norm first": (Net(lambda n, x: n.a(n.bn(x)), a=conv(), bn=nn.BatchNorm2d(4)), IMAGE, ["bn"]),
    "another norm": (Net(lambda n, x: n.gn(n.a(x)), a=conv(), gn=nn.InstanceNorm2d(4)), IMAGE, []),
}  # fmt: skip


@pytest.mark.parametrize("net, x, kept", KEPT.values(), ids=KEPT)
def test_what_must_not_be_folded(net: Net, x: Tensor, kept: list[str]) -> None:
    x = x.double()
    found = folded(net, x)
    assert norms(found) == kept or kept == []
    (step,) = found.meta["history"]
    assert not step.modified
    torch.testing.assert_close(found(x), net(x), rtol=0, atol=0)


def test_a_weight_that_another_layer_shares_stays() -> None:
    net = Net(lambda n, x: n.b(torch.relu(n.bn(n.a(x)))), a=conv(), bn=nn.BatchNorm2d(4), b=conv())
    tied(net)
    found = folded(net, IMAGE)
    assert found.get_parameter("a.weight") is found.get_parameter("b.weight")
    close(net(IMAGE), found(IMAGE))


def test_two_branches_fold_each_into_its_own() -> None:
    net = Net(
        lambda n, x: n.bn1(n.a(x)) + n.bn2(n.b(x)),
        a=conv(), b=conv(), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4),
    )  # fmt: skip
    found = folded(net, IMAGE)
    assert norms(found) == []
    close(net(IMAGE), found(IMAGE))


def test_a_model_in_train_mode_is_folded_and_stays_in_train_mode() -> None:
    net = Net(lambda n, x: n.bn(n.a(x)), a=conv(), bn=nn.BatchNorm2d(4)).double().train()
    found = fxcompress.compress(net, [FoldBatchNorm()], example_inputs=IMAGE)
    assert found.training
    close(net.eval()(IMAGE), found.eval()(IMAGE))


def test_masks_stay_on_what_was_folded() -> None:
    """Masked channels are zero after the norm, whatever its bias."""
    net = Net(lambda n, x: n.c(torch.relu(n.bn(n.a(x)))), a=conv(), bn=nn.BatchNorm2d(4), c=conv()).double()
    masked = fxcompress.compress(net, [InOrder(0.5)], example_inputs=IMAGE)
    expected = masked(IMAGE)
    found = fxcompress.compress(masked, [FoldBatchNorm()], example_inputs=IMAGE)
    assert norms(found) == []
    assert set(fxcompress.masks(found)) == {"a.weight", "a.bias", "c.weight"}
    close(expected, found(IMAGE))
    small = fxcompress.compress(found, [Speedup()], example_inputs=IMAGE)
    assert small.get_parameter("a.weight").shape == (2, 4, 1, 1)
    close(expected, small(IMAGE))


def test_folding_before_and_after_removal_gives_the_same() -> None:
    net = Net(lambda n, x: n.c(torch.relu(n.bn(n.a(x)))), a=conv(), bn=nn.BatchNorm2d(4), c=conv()).double()
    passes = [L1FilterPruner(0.5), Speedup(), FoldBatchNorm()]
    after = fxcompress.compress(net, passes, example_inputs=IMAGE)
    before = fxcompress.compress(net, [passes[0], FoldBatchNorm(), Speedup()], example_inputs=IMAGE)
    assert [tuple(p.shape) for p in after.parameters()] == [tuple(p.shape) for p in before.parameters()]
    close(after(IMAGE), before(IMAGE))
