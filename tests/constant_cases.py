"""Networks with slices of zeros, what removing them gave, and a comparison with the network that has them."""

import copy
from typing import Any

import torch
from nets import Net
from torch import Tensor, nn

import fxcompress
from fxcompress.passes import Speedup

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)
TOKENS = torch.randn(2, 5, 6, dtype=torch.float64)


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def zero(net: nn.Module, *names: str) -> nn.Module:
    """A copy with the given slices zero: ``"a"`` is rows 1 and 2 of ``a.weight`` and ``a.bias``, ``"a:1"`` columns 1
    and 2 of the weight, ``"a.bias"`` those of one parameter."""
    made = copy.deepcopy(net)
    for name in names:
        path, _, dim = name.partition(":")
        leaves = ["weight"] if dim else ["weight", "bias"]
        chosen = [f"{path}.{leaf}" for leaf in leaves] if path in dict(made.named_modules()) else [path]
        for parameter_name, parameter in made.named_parameters():
            if parameter_name in chosen:
                parameter.detach().index_fill_(int(dim or 0), torch.tensor([1, 2]), 0)
    return made


def masks_of(net: nn.Module, zeroed: nn.Module) -> dict[str, Tensor]:
    """The masks that made ``zeroed`` of ``net``."""
    twins = dict(zeroed.named_parameters())
    return {name: twins[name] == p for name, p in net.named_parameters() if not torch.equal(p, twins[name])}


def notes(module: fxcompress.TracedModule) -> str:
    return "\n".join(module.meta["history"][-1].notes)


def speedup(net: nn.Module, x: Any, *names: str, given: bool = True, **options: Any) -> fxcompress.TracedModule:
    """Remove what the zero slices allow, and compare with the network that has them, at another batch size too.

    As masks where ``given``, and as weights that simply are zero where not.
    """
    net = net.double()
    twin = zero(net, *names)
    item = Speedup(masks=masks_of(net, twin), **options) if given else Speedup(**options)
    small = fxcompress.compress(net if given else twin, [item], example_inputs=x)
    again = fxcompress.compress(small, [Speedup()], example_inputs=x)
    assert not again.meta["history"][-1].modified, "a second removal finds nothing"
    if not options:
        for trial in (x, torch.cat([x, 2 * x, x.flip(0) - 1])) if isinstance(x, Tensor) else ():
            torch.testing.assert_close(small(trial), twin(trial), rtol=1e-9, atol=1e-9)
    return small


def width(module: nn.Module, name: str) -> int:
    return module.get_parameter(f"{name}.weight").shape[0]


def behind(norm: nn.Module, bias: Tensor | float = 0.0) -> Tensor:
    """What a BatchNorm makes of an input that is zero (or a convolution's bias)."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return (bias - norm.running_mean) * norm.weight / (norm.running_var + norm.eps).sqrt() + norm.bias


def shift(norm: nn.Module, *values: float) -> None:
    """Let a BatchNorm map zero to these values in channels 1 and 2, by its running mean."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        mean = (norm.bias[1:3] - torch.tensor(values)) * (norm.running_var[1:3] + norm.eps).sqrt() / norm.weight[1:3]
        norm.running_mean[1:3] = mean


def padded(**options: Any) -> Net:
    net = Net(
        lambda n, x: n.b(n.bn(n.a(x)).relu()), a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 4, 3, padding=1, **options)
    ).double()  # fmt: skip
    shift(net.bn, -0.7, 0.25)
    return net
