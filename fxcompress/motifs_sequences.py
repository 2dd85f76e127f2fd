"""Motifs of generated networks that read an image row by row or at several scales (see `fxcompress.motifs`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.motifs_tokens import image, tokens

if TYPE_CHECKING:
    from fxcompress.generate import Builder, Network, Op


def columns(x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, width, channels): one step of a sequence for each column."""
    return x.mean(2).transpose(1, 2)


def spread(x: Tensor, sequence: Tensor) -> Tensor:
    """`x` plus a sequence (batch, width, channels), added to every row."""
    return F.relu(x + sequence.transpose(1, 2).unsqueeze(2))


def lstm(b: Builder, op: Op) -> None:
    """One layer, two directions, two layers, projections, an initial state, the last state as a gate."""
    c, width, form = b.channels, op.width, op.variant % 6
    forms: dict[int, dict[str, Any]] = {1: {"bidirectional": True}, 2: {"num_layers": 2, "dropout": 0.1}}
    forms[3] = {"proj_size": width}
    layer = nn.LSTM(c, width + (2 if form == 3 else 0), batch_first=form != 4, **forms.get(form, {}))
    rnn, conv = b.layer("lstm", layer), b.conv(width * (2 if form == 1 else 1))
    start = b.linear(c, width) if form == 4 else ""

    def plain(m: Network, x: Tensor) -> Tensor:
        return spread(m[conv](x), m.get_submodule(rnn)(columns(x))[0])

    def started(m: Network, x: Tensor) -> Tensor:
        state = torch.tanh(m[start](x.mean((2, 3)))).unsqueeze(0)
        sequence, _ = m.get_submodule(rnn)(columns(x).transpose(0, 1), (state, torch.zeros_like(state)))
        return spread(m[conv](x), sequence.transpose(0, 1))

    def gated(m: Network, x: Tensor) -> Tensor:
        _, (last, _) = m.get_submodule(rnn)(columns(x))
        return m[conv](x) * torch.sigmoid(last[-1])[:, :, None, None]

    b.choose(op, plain, plain, plain, plain, started, gated)


def gru(b: Builder, op: Op) -> None:
    """A GRU; the states of two layers and directions; a cell, step by step; an RNN with a learned initial state."""
    c, width, form = b.channels, op.width, op.variant % 4
    layer = (
        nn.GRU(c, width, batch_first=True),
        nn.GRU(c, width, num_layers=2, bidirectional=True, batch_first=True, bias=False),
        nn.GRUCell(c, width),
        nn.RNN(c, width, batch_first=True, nonlinearity="relu"),
    )[form]
    rnn, conv = b.layer("gru", layer), b.conv(width)
    mix = b.linear(4 * width, width) if form == 1 else ""
    start = b.bias(1, 1, width) if form == 3 else ""

    def plain(m: Network, x: Tensor) -> Tensor:
        return spread(m[conv](x), m.get_submodule(rnn)(columns(x))[0])

    def last(m: Network, x: Tensor) -> Tensor:
        state = m.get_submodule(rnn)(columns(x))[1].transpose(0, 1).reshape(x.size(0), -1)
        return m[conv](x) + m[mix](state)[:, :, None, None]

    def steps(m: Network, x: Tensor) -> Tensor:
        state, made = None, []
        for step in columns(x).unbind(1):
            state = m.get_submodule(rnn)(step, state)
            made.append(state)
        return spread(m[conv](x), torch.stack(made, 1))

    def learned(m: Network, x: Tensor) -> Tensor:
        state = m.tensor(start).expand(-1, x.size(0), -1).contiguous()
        return spread(m[conv](x), m.get_submodule(rnn)(columns(x), state)[0])

    b.choose(op, plain, last, steps, learned)


def bilinear(b: Builder, op: Op) -> None:
    """A layer of torch.nn whose channels nobody follows."""
    layer = b.layer("bilinear", nn.Bilinear(b.channels, b.channels, op.width))
    b.then(lambda m, x: image(m.get_submodule(layer)(t := tokens(x), t), x))


def unet(b: Builder, op: Op) -> None:
    """Down, and up again by a transposed convolution, next to what was there before."""
    if not b.can_shrink:
        return
    width, groups = op.width, op.pick(1, 2, 1)
    deep = -(-2 * width // groups) * groups
    first, norm1, down, norm2 = b.conv(width), b.norm(width), b.conv(deep, inp=width), b.norm(deep)
    up = b.layer("up", nn.ConvTranspose2d(deep, groups * width, 2, stride=2, groups=groups))
    last = b.conv(width, inp=width + groups * width)

    def step(m: Network, x: Tensor) -> Tensor:
        skip = F.relu(m[norm1](m[first](x)))
        y = m[up](F.relu(m[norm2](m[down](F.max_pool2d(skip, 2)))))
        y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
        return m[last](torch.cat([y, skip], dim=1))

    b.then(step)


def feature_pyramid(b: Builder, op: Op) -> None:
    """Two scales brought to one width by 1x1 convolutions; the coarse one is enlarged and added to the fine one."""
    if not b.can_shrink:
        return
    width, wide = op.width, op.width + 3
    fine, norm, coarse = b.conv(width), b.norm(width), b.conv(wide, inp=width, stride=2)
    low, high, smooth = b.conv(width, 1, inp=width), b.conv(width, 1, inp=wide), b.conv(width, inp=width)
    mode = op.pick("nearest", "bilinear")

    def step(m: Network, x: Tensor) -> Tensor:
        c2 = F.relu(m[norm](m[fine](x)))
        top = m[high](F.relu(m[coarse](c2)))
        return m[smooth](m[low](c2) + F.interpolate(top, size=c2.shape[2:], mode=mode))

    b.then(step)
