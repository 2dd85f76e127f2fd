"""Convolutional networks of every structure, with their channel groups written out by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from nets import Case, Expected, Net
from torch import Tensor, nn

OUTPUT = "output of the model"
IMAGE = torch.randn(2, 3, 8, 8)


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def shuffled(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return net.b(x)


def squeezed(net: Net, x: Tensor) -> Tensor:
    x = net.bn(net.a(x))
    gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
    return net.b(x * gate)


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.d(F.relu(x + net.c(F.relu(net.b(x)))))


def dense(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    x = torch.cat((x, net.b(F.relu(x))), 1)
    x = torch.cat((x, net.c(F.relu(x))), 1)
    return net.d(x)


def folded(net: Net, x: Tensor) -> Tensor:
    """Space to depth by hand, with the channel first: out channel = c * 4 + position."""
    x = net.a(x)
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return net.b(x.reshape(b, c * 4, h // 2, w // 2))


def shortcut(net: Net, x: Tensor) -> Tensor:
    """ResNet's option A: a strided identity whose new channels are zeros, two on each side."""
    x = net.a(x)
    return net.c(net.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def gated(net: Net, x: Tensor) -> Tensor:
    u, v = net.a(x).chunk(2, 1)
    return net.b(u * torch.sigmoid(v))


class Standardized(nn.Conv2d):
    """Weights that are normalised over everything but the output before each use."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding)


CASES = {
    "conv, norm, flatten": Case(
        lambda: Net(
            lambda n, x: n.fc(F.relu(n.b(F.relu(n.bn(n.a(x))))).flatten(1)),
            a=conv(3, 8, 3), bn=nn.BatchNorm2d(8), b=conv(8, 4, 3), fc=nn.Linear(4 * 64, 5),
        ),
        IMAGE,
        {"a": Expected(8, "a.weight a.bias bn.* b.weight:1"), "b": Expected(4, "b.weight b.bias fc.weight:1")},
        {"fc": OUTPUT},
    ),
    "cat of unequal parts": Case(
        lambda: Net(lambda n, x: n.c(torch.cat((n.a(x), n.b(x)), 1)), a=conv(3, 4), b=conv(3, 6), c=conv(10, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias c.weight:1"), "b": Expected(6, "b.weight b.bias c.weight:1")},
        {"c": OUTPUT},
    ),
    "split into unequal parts": Case(
        lambda: Net(
            lambda n, x: [f(t) for f, t in zip((n.b, n.c), n.a(x).split([4, 6], 1), strict=True)],
            a=conv(3, 10), b=conv(4, 5), c=conv(6, 2),
        ),
        IMAGE,
        {"a": Expected(10, "a.weight a.bias b.weight:1 c.weight:1")},
        {"b": OUTPUT, "c": OUTPUT},
    ),
    "halves multiplied": Case(
        lambda: Net(gated, a=conv(3, 8), b=conv(4, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "gated linear unit": Case(
        lambda: Net(lambda n, x: n.b(F.glu(n.a(x), 1)), a=conv(3, 8), b=conv(4, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "channel shuffle": Case(
        lambda: Net(shuffled, a=conv(3, 8), b=conv(8, 5)),
        IMAGE,
        {"a": Expected(8, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "pixel shuffle": Case(
        lambda: Net(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2)), a=conv(3, 16), b=conv(4, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "pixel shuffle, then a mean over space": Case(
        lambda: Net(lambda n, x: n.fc(F.pixel_shuffle(n.a(x), 2).mean((2, 3))), a=conv(3, 16), fc=nn.Linear(4, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias fc.weight:1")},
        {"fc": OUTPUT},
    ),
    "space to depth": Case(
        lambda: Net(lambda n, x: n.b(F.pixel_unshuffle(n.a(x), 2)), a=conv(3, 4), b=conv(16, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "space to depth by hand": Case(
        lambda: Net(folded, a=conv(3, 4), b=conv(16, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "squeeze and excite": Case(
        lambda: Net(
            squeezed, a=conv(3, 8), bn=nn.BatchNorm2d(8), down=conv(8, 2), up=conv(2, 8), b=conv(8, 5)
        ),
        IMAGE,
        {
            "a": Expected(8, "a.weight a.bias bn.* down.weight:1 up.weight up.bias b.weight:1", 1, "a up"),
            "down": Expected(2, "down.weight down.bias up.weight:1"),
        },
        {"b": OUTPUT},
    ),
    "depthwise": Case(
        lambda: Net(
            lambda n, x: n.b(n.bn(n.dw(n.a(x)))),
            a=conv(3, 6), dw=conv(6, 6, 3, groups=6, bias=False), bn=nn.BatchNorm2d(6), b=conv(6, 5),
        ),
        IMAGE,
        {"a": Expected(6, "a.weight a.bias dw.weight bn.* b.weight:1", 1, "a dw")},
        {"b": OUTPUT},
    ),
    "depthwise with multiplier 2": Case(
        lambda: Net(lambda n, x: n.b(n.dw(n.a(x))), a=conv(3, 4), dw=conv(4, 8, 3, groups=4), b=conv(8, 5)),
        IMAGE,
        {"a": Expected(4, "a.weight a.bias dw.weight dw.bias b.weight:1", 1, "a dw")},
        {"b": OUTPUT},
    ),
    "grouped": Case(
        lambda: Net(lambda n, x: n.b(n.g(n.a(x))), a=conv(3, 8), g=conv(8, 12, 3, groups=4), b=conv(12, 5)),
        IMAGE,
        {
            "a": Expected(8, "a.weight a.bias g.weight:1", rows=4),
            "g": Expected(12, "g.weight g.bias b.weight:1", rows=4),
        },
        {"b": OUTPUT},
    ),
    "dilated": Case(
        lambda: Net(lambda n, x: n.b(n.a(x)), a=conv(3, 6), b=nn.Conv2d(6, 5, 3, dilation=2)),
        IMAGE,
        {"a": Expected(6, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "transposed": Case(
        lambda: Net(
            lambda n, x: n.b(n.bn(n.t(n.a(x)))),
            a=conv(3, 6), t=nn.ConvTranspose2d(6, 4, 2, 2), bn=nn.BatchNorm2d(4), b=conv(4, 5),
        ),
        IMAGE,
        {
            "a": Expected(6, "a.weight a.bias t.weight"),
            "t": Expected(4, "t.weight:1 t.bias bn.* b.weight:1"),
        },
        {"b": OUTPUT},
    ),
    "one dimension": Case(
        lambda: Net(
            lambda n, x: n.c(n.t(n.bn(n.b(F.relu(n.a(x)))))),
            a=nn.Conv1d(3, 6, 3, dilation=2), b=nn.Conv1d(6, 4, 3, groups=2), bn=nn.BatchNorm1d(4),
            t=nn.ConvTranspose1d(4, 7, 3), c=nn.Conv1d(7, 2, 1),
        ),
        torch.randn(2, 3, 12),
        {
            "a": Expected(6, "a.weight a.bias b.weight:1", rows=2),
            "b": Expected(4, "b.weight b.bias bn.* t.weight", rows=2),
            "t": Expected(7, "t.weight:1 t.bias c.weight:1"),
        },
        {"c": OUTPUT},
    ),
    "three dimensions": Case(
        lambda: Net(
            lambda n, x: n.c(n.t(n.bn(n.dw(n.a(x))))),
            a=nn.Conv3d(3, 6, 1), dw=nn.Conv3d(6, 6, 2, groups=6), bn=nn.BatchNorm3d(6),
            t=nn.ConvTranspose3d(6, 7, 2), c=nn.Conv3d(7, 2, 1),
        ),
        torch.randn(2, 3, 4, 4, 4),
        {
            "a": Expected(6, "a.weight a.bias dw.weight dw.bias bn.* t.weight", 1, "a dw"),
            "t": Expected(7, "t.weight:1 t.bias c.weight:1"),
        },
        {"c": OUTPUT},
    ),
    "residual": Case(
        lambda: Net(residual, a=conv(3, 6), b=conv(6, 4, 3), c=conv(4, 6, 3), d=conv(6, 5)),
        IMAGE,
        {
            "a": Expected(6, "a.weight a.bias b.weight:1 c.weight c.bias d.weight:1", 1, "a c"),
            "b": Expected(4, "b.weight b.bias c.weight:1"),
        },
        {"d": OUTPUT},
    ),
    "dense": Case(
        lambda: Net(dense, a=conv(3, 6), b=conv(6, 4), c=conv(10, 3), d=conv(13, 5)),
        IMAGE,
        {
            "a": Expected(6, "a.weight a.bias b.weight:1 c.weight:1 d.weight:1"),
            "b": Expected(4, "b.weight b.bias c.weight:1 d.weight:1"),
            "c": Expected(3, "c.weight c.bias d.weight:1"),
        },
        {"d": OUTPUT},
    ),
    "a layer used twice": Case(
        lambda: Net(lambda n, x: n.c(n.b(F.relu(n.b(F.relu(n.a(x)))))), a=conv(3, 6), b=conv(6, 6, 3), c=conv(6, 5)),
        IMAGE,
        {"a": Expected(6, "a.weight a.bias b.weight b.weight:1 b.bias c.weight:1", 1, "a b")},
        {"c": OUTPUT},
    ),
    "zero-padded shortcut": Case(
        lambda: Net(shortcut, a=conv(3, 4), b=nn.Conv2d(4, 8, 3, 2, 1), c=conv(8, 5)),
        IMAGE,
        {
            "a": Expected(4, "a.weight a.bias b.weight b.weight:1 b.bias c.weight:1", 1, "a b"),
            "b": Expected(4, "b.weight b.bias c.weight:1"),
        },
        {"c": OUTPUT},
    ),
    "padded with ones": Case(
        lambda: Net(lambda n, x: n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, 1), value=1.0)), a=conv(3, 8), b=conv(10, 5)),
        IMAGE,
        {"a": Expected(8, "a.weight a.bias b.weight:1")},
        {"b": OUTPUT},
    ),
    "activation with a slope for each channel": Case(
        lambda: Net(
            lambda n, x: n.c(n.q(n.b(n.p(n.a(x))))),
            a=conv(3, 6), p=nn.PReLU(6), b=conv(6, 4), q=nn.PReLU(), c=conv(4, 5),
        ),
        IMAGE,
        {
            "a": Expected(6, "a.weight a.bias p.weight b.weight:1"),
            "b": Expected(4, "b.weight b.bias c.weight:1"),
        },
        {"c": OUTPUT},
    ),
    "group norm": Case(
        lambda: Net(lambda n, x: n.b(n.gn(n.a(x))), a=conv(3, 12), gn=nn.GroupNorm(3, 12), b=conv(12, 5)),
        IMAGE,
        {"a": Expected(12, "a.weight a.bias gn.weight gn.bias b.weight:1", rows=3)},
        {"b": OUTPUT},
    ),
    "standardized weights": Case(
        lambda: Net(
            lambda n, x: n.c(n.b(F.relu(n.a(x)))),
            a=conv(3, 6), b=Standardized(6, 4, 3, padding=1), c=conv(4, 5),
        ),
        IMAGE,
        {"a": Expected(6, "a.weight a.bias b.weight:1"), "b": Expected(4, "b.weight b.bias c.weight:1")},
        {"c": OUTPUT},
    ),
    "parameters outside layers": Case(
        lambda: Net(
            lambda n, x: n.b(n.a(x) * n.scale + n.shift),
            a=conv(3, 6), scale=nn.Parameter(torch.ones(6, 1, 1)), shift=torch.ones(1, 6, 1, 1), b=conv(6, 5),
        ),
        IMAGE,
        {"a": Expected(6, "a.weight a.bias scale shift:1 b.weight:1")},
        {"b": OUTPUT},
    ),
}  # fmt: skip
