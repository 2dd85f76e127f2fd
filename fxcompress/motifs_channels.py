"""Motifs of generated networks that move, gate, scale or normalise channels (see `fxcompress.motifs`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fxcompress.generate import Builder, Network, Op

# Of the norms that take statistics in eval mode: so large that a rewrite which loses it shows, and that
# rounding stays small where the input is nearly constant.
EPS = 0.01


# -- movement of channels


def shuffle(b: Builder, op: Op) -> None:
    groups = 2 if op.variant < 6 else 3
    b.multiple(groups)
    out = -(-op.width // groups) * groups
    one, two = b.conv(out, groups=groups), b.conv(out, 1, inp=out, groups=groups)

    def transpose(m: Network, x: Tensor) -> Tensor:
        y = F.relu(m[one](x))
        batch, channels, height, width = y.shape
        y = y.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
        return m[two](y.view(batch, -1, height, width))

    def reshape(m: Network, x: Tensor) -> Tensor:
        y = m[one](x)
        y = y.reshape(y.size(0), y.size(1) // groups, groups, y.size(2), y.size(3))
        return m[two](y.permute(0, 2, 1, 3, 4).flatten(1, 2))

    b.choose(op, transpose, reshape, lambda m, x: m[two](torch.channel_shuffle(m[one](x), groups)))


def pixel_shuffle(b: Builder, op: Op) -> None:
    width = min(op.width, 6)
    if op.variant % 2 == 0 and b.can_grow:
        conv = b.conv(4 * width)
        if op.variant % 4 == 0:
            b.then(lambda m, x: F.pixel_shuffle(m[conv](x), 2))
        else:
            layer = b.layer("shuffle", nn.PixelShuffle(2))
            b.then(lambda m, x: m[layer](F.relu(m[conv](x))))
    elif b.can_shrink:
        conv = b.conv(width)

        def unshuffle(m: Network, x: Tensor) -> Tensor:
            y = m[conv](x)
            return F.pixel_unshuffle(y[:, :, : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2], 2)

        def patches(m: Network, x: Tensor) -> Tensor:
            y = m[conv](x)[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            n, c, h, w = y.shape
            return y.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)

        b.choose(op, unshuffle, patches, patches, unshuffle)


def slice_channels(b: Builder, op: Op) -> None:
    c = b.channels
    if c >= 2:
        b.choose(
            op,
            lambda m, x: x[:, ::2],
            lambda m, x: x[:, 1::2],
            lambda m, x: x.narrow(1, 1, c // 2),
            lambda m, x: x[:, : x.size(1) // 2] + x[:, -(x.size(1) // 2) :],
        )


def reorder(b: Builder, op: Op) -> None:
    b.choose(
        op,
        lambda m, x: x.flip(1),
        lambda m, x: x.roll(1, 1),
        lambda m, x: x + 0.5 * torch.flip(x, (1,)),
        lambda m, x: torch.roll(x, (2, 1), dims=(1, 3)),
    )


def permute_index(b: Builder, op: Op) -> None:
    order = b.permutation(b.channels)
    kept = [*order[: -(-len(order) // 2)], order[0]]
    index = b.buffer("index", torch.tensor(order)) if op.variant % 4 < 2 else ""
    b.choose(
        op,
        lambda m, x: x[:, m.tensor(index)],
        lambda m, x: x.index_select(1, m.tensor(index)),
        lambda m, x: x[:, order],
        lambda m, x: x[:, kept],
    )


def reshape_pairs(b: Builder, op: Op) -> None:
    """Size arithmetic on the channels: (batch, channels // 2, 2, height, width)."""
    b.multiple(2)

    def pairs(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2], x.shape[3])

    b.choose(
        op,
        lambda m, x: pairs(x).amax(2),
        lambda m, x: pairs(x)[:, :, 0] + torch.tanh(pairs(x)[:, :, 1]),
        lambda m, x: (pairs(x) * pairs(x).softmax(2)).flatten(1, 2),
        lambda m, x: x.view(x.size(0), 2, x.size(1) // 2, *x.shape[2:]).sum(1),
    )


# -- norms, scales and gates


def activation(b: Builder, op: Op) -> None:
    b.choose(
        op,
        lambda m, x: F.gelu(x),
        lambda m, x: F.silu(x),
        lambda m, x: torch.tanh(x),
        lambda m, x: F.elu(x) + 1,
        lambda m, x: x.clamp(-1, 2),
        lambda m, x: F.softplus(x),
        lambda m, x: torch.exp(-x.abs()),
        lambda m, x: x.abs() - 0.5,
    )


def group_norm(b: Builder, op: Op) -> None:
    groups, form = op.pick(2, 3), op.variant % 4
    if form == 2:
        norm = b.layer("norm", nn.InstanceNorm2d(b.channels, EPS, affine=True))
    else:
        b.multiple(groups)
        norm = b.layer("norm", nn.GroupNorm(groups, b.channels, EPS, affine=form != 3))
    b.then(lambda m, x: F.silu(m[norm](x)))


def layer_norm(b: Builder, op: Op) -> None:
    if b.channels < 2:
        return
    if op.variant % 4 == 0:
        norm = b.layer("norm", nn.LayerNorm(b.channels, EPS))
        b.then(lambda m, x: m[norm](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return
    scale, bias = b.scale(b.channels), b.bias(b.channels)

    def functional(m: Network, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        return F.layer_norm(y, y.shape[-1:], m.tensor(scale), m.tensor(bias), EPS).movedim(-1, 1)

    def by_hand(m: Network, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + EPS)
        return m.tensor(scale)[:, None, None] * y + m.tensor(bias)[:, None, None]

    def rms(m: Network, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPS)
        return y * m.tensor(scale).view(1, -1, 1, 1) + m.tensor(bias).view(-1, 1, 1)

    b.choose(op, functional, functional, by_hand, rms)


def prelu(b: Builder, op: Op) -> None:
    if op.variant % 3 == 2:
        slope = b.scale(b.channels)
        b.then(lambda m, x: F.prelu(x, m.tensor(slope)))
    else:
        act = b.layer("prelu", nn.PReLU(op.pick(b.channels, 1, 1)))
        b.then(lambda m, x: m[act](x))


def layer_scale(b: Builder, op: Op) -> None:
    """Parameters and buffers outside layers: per channel, and as large as the tensor."""
    c, form = b.channels, op.variant % 4
    if form == 0:
        conv, gamma = b.conv(c), b.scale(c, 1, 1)
        b.then(lambda m, x: x + m.tensor(gamma) * m[conv](x))
    elif form == 1:
        gamma, beta = b.scale(c), b.bias(c)
        b.then(lambda m, x: x * m.tensor(gamma).view(1, -1, 1, 1) + m.tensor(beta)[None, :, None, None])
    elif form == 2:
        position = b.bias(1, c, *b.size)
        b.then(lambda m, x: x + m.tensor(position))
    else:
        mean = b.buffer("mean", torch.rand(c, 1, 1, generator=b.generator) + 0.5)
        b.then(lambda m, x: (x - m.tensor(mean)) / m.tensor(mean))


def squeeze_excite(b: Builder, op: Op) -> None:
    c, form = b.channels, op.variant % 4
    if form in (0, 2):
        down, up = b.conv(op.width, 1), b.conv(c, 1, inp=op.width)
        if form == 0:
            b.then(lambda m, x: x * torch.sigmoid(m[up](F.relu(m[down](F.adaptive_avg_pool2d(x, 1))))))
        else:
            b.then(lambda m, x: x * F.hardsigmoid(m[up](F.silu(m[down](x.mean((2, 3), keepdim=True))))))
    elif form == 1:
        one, two = b.linear(c, op.width), b.linear(op.width, c)
        b.then(lambda m, x: x * m[two](F.relu(m[one](x.mean((2, 3))))).sigmoid().view(x.size(0), x.size(1), 1, 1))
    else:
        local = b.layer("conv1d", nn.Conv1d(1, 1, 3, padding=1))
        b.then(lambda m, x: x * m[local](x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid())


def softmax_gate(b: Builder, op: Op) -> None:
    if op.variant % 3 == 1:
        conv = b.conv(b.channels, 1)
        b.then(lambda m, x: F.softmax(m[conv](x), dim=1) * x * x.size(1) ** 0.5)
        return

    def channel_attention(m: Network, x: Tensor) -> Tensor:
        y = x.flatten(2)
        score = torch.bmm(y, y.transpose(1, 2)) / y.shape[-1]
        return x + torch.bmm(score.softmax(-1), y).view_as(x)

    b.choose(op, lambda m, x: x + x * x.softmax(dim=1), channel_attention, channel_attention)


def spatial_gate(b: Builder, op: Op) -> None:
    conv = b.conv(1, inp=2) if op.variant % 4 == 0 else ""

    def cbam(m: Network, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(m[conv](pooled))

    b.choose(
        op,
        cbam,
        lambda m, x: x * torch.sigmoid(x.sum(dim=1, keepdim=True)),
        lambda m, x: x * torch.tanh(torch.max(x, dim=1, keepdim=True)[0]),
        lambda m, x: x - x.max(1, keepdim=True).values + x.sum(1, True) / x.shape[1],
    )


def sigmoid_gate(b: Builder, op: Op) -> None:
    form = op.variant % 3
    conv = b.conv((b.channels, 2 * op.width, 2 * op.width)[form])
    b.choose(
        op,
        lambda m, x: x * torch.sigmoid(m[conv](x)),
        lambda m, x: F.glu(m[conv](x), dim=1),
        lambda m, x: (y := m[conv](x))[:, : y.size(1) // 2].tanh() * y[:, y.size(1) // 2 :].sigmoid().mul(2),
    )


def in_place(b: Builder, op: Op) -> None:
    c, k, form = b.channels, b.channels // 2, op.variant % 4
    conv = b.conv(c) if form < 3 else ""

    def add(m: Network, x: Tensor) -> Tensor:
        y = m[conv](x)
        y += x
        return y.relu_()

    def add_part(m: Network, x: Tensor) -> Tensor:
        y = m[conv](x)
        y[:, :k] += x[:, c - k :]
        return F.relu(y, inplace=True)

    def shift(m: Network, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, :k, :, 1:] = x[:, :k, :, :-1]
        y[:, k:] = x[:, k:]
        return y

    b.choose(op, add, add_part, lambda m, x: m[conv](x).mul_(0.7).add_(0.3).clamp_(min=0.0), shift)
