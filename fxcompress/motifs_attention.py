"""Motifs of generated networks: the forms that attention takes, and the blocks around it (see `fxcompress.motifs`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.motifs_channels import EPS
from fxcompress.motifs_tokens import image, tokens

if TYPE_CHECKING:
    from fxcompress.generate import Builder, Network, Op


def split_heads(t: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * size) -> (batch, heads, tokens, size)."""
    return t.view(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)


def join_heads(t: Tensor) -> Tensor:
    """The way back."""
    return t.transpose(1, 2).flatten(2)


def attention_shared(b: Builder, op: Op) -> None:
    """Heads of keys and values that several queries share, repeated in three ways, or one for all of them."""
    shared, dim = op.pick(2, 3, 2, 3), 2 + op.width % 4
    groups = 1 if op.variant % 4 == 3 else 2 + op.width % 2
    q, k, v = (b.linear(b.channels, heads * dim) for heads in (groups * shared, groups, groups))
    out = b.linear(groups * shared * dim, b.channels)

    def attend(m: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = tokens(x)
        return split_heads(m[q](t), groups * shared), split_heads(m[k](t), groups), split_heads(m[v](t), groups)

    def repeated(m: Network, x: Tensor) -> Tensor:
        query, key, value = attend(m, x)
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        return x + image(m[out](join_heads(F.scaled_dot_product_attention(query, key, value))), x)

    def expanded(m: Network, x: Tensor) -> Tensor:
        query, key, value = attend(m, x)
        key, value = (y[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for y in (key, value))
        score = torch.softmax(query @ key.transpose(-2, -1) * dim**-0.5, dim=-1)
        return x + image(m[out](join_heads(score @ value)), x)

    def enabled(m: Network, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*attend(m, x), enable_gqa=True)
        return x + image(m[out](join_heads(y)), x)

    def one_for_all(m: Network, x: Tensor) -> Tensor:
        query, key, value = attend(m, x)
        score = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
        return x + image(m[out](join_heads(score @ value)), x)

    b.choose(op, repeated, expanded, enabled, one_for_all)


def attention_cross(b: Builder, op: Op) -> None:
    """Queries of the current image, keys and values of an earlier one, or learned queries over all pixels."""
    heads, dim, past = 1 + op.width % 4, 2 + op.width % 3, op.width % len(b.values)
    source = b.values[past].shape[1] if op.variant % 2 == 0 else b.channels
    k, v, out = b.linear(source, heads * dim), b.linear(source, heads * dim), b.linear(heads * dim, b.channels)
    if op.variant % 2 == 0:
        q = b.linear(b.channels, heads * dim)

        def crossed(m: Network, x: Tensor, before: Tensor) -> Tensor:
            query, key, value = m[q](tokens(x)), m[k](tokens(before)), m[v](tokens(before))
            query, key, value = (split_heads(t, heads) for t in (query, key, value))
            y = F.scaled_dot_product_attention(query, key, value)
            return x + image(m[out](join_heads(y)), x)

        b.join(past, crossed)
        return
    latents = b.bias(3, heads * dim)

    def pooled(m: Network, x: Tensor) -> Tensor:
        query = m.tensor(latents).expand(x.shape[0], -1, -1)
        key, value = m[k](tokens(x)), m[v](tokens(x))
        query, key, value = (split_heads(t, heads) for t in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value)
        return x * torch.sigmoid(m[out](join_heads(y)).mean(1))[:, :, None, None]

    b.then(pooled)


def attention_window(b: Builder, op: Op) -> None:
    """Swin's attention: cyclic shift, a mask between what was not neighbours, a bias for every head and offset."""
    c, heads, dim, side = b.channels, 2 + op.width % 2, 2 + op.width % 3, op.pick(2, 3)
    shift = op.pick(1, 0, 1, 1)
    qkv, out = b.linear(c, 3 * heads * dim), b.linear(heads * dim, c)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset = cells[:, None] - cells[None, :] + side - 1
    index = b.buffer("index", offset[..., 0] * (2 * side - 1) + offset[..., 1])
    by_table = op.variant % 3 < 2
    bias = b.bias((2 * side - 1) ** 2, heads) if by_table else b.bias(heads, side * side, side * side)
    height, width = (-(-size // side) * side for size in b.size)
    mask = b.buffer("mask", _shifted_mask(height, width, side, shift)) if shift else ""

    def step(m: Network, x: Tensor) -> Tensor:
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, width - x.shape[3], 0, height - x.shape[2]))
        y = torch.roll(y, shifts=(-shift, -shift), dims=(1, 2)) if shift else y
        batch, rows, columns = y.shape[0], height // side, width // side
        y = y.view(batch, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side * side, c)
        q, k, v = m[qkv](y).reshape(-1, side * side, 3, heads, dim).permute(2, 0, 3, 1, 4)
        score = q * dim**-0.5 @ k.transpose(-2, -1)
        added = m.tensor(bias)
        if by_table:
            added = added[m.tensor(index).view(-1)].view(side * side, side * side, -1).permute(2, 0, 1)
        score = score + (added if by_table else added + m.tensor(index) * 0.01)
        if shift:
            apart = m.tensor(mask)[None, :, None]
            score = (score.view(batch, rows * columns, heads, side * side, -1) + apart).flatten(0, 1)
        y = m[out]((score.softmax(-1) @ v).transpose(1, 2).reshape(-1, side * side, heads * dim))
        y = y.view(batch, rows, columns, side, side, c).transpose(2, 3).reshape(batch, height, width, c)
        y = torch.roll(y, shifts=(shift, shift), dims=(1, 2)) if shift else y
        return x + y[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)

    b.then(step)


def _shifted_mask(height: int, width: int, side: int, shift: int) -> Tensor:
    """Between pixels that only the cyclic shift brought into one window: (windows, side**2, side**2)."""
    region = torch.zeros(height, width)
    for i, rows in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j
    windows = region.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
    return (windows[:, None] != windows[:, :, None]) * -100.0


def attention_linear(b: Builder, op: Op) -> None:
    """Attention whose keys meet the values first: by positive features, by two softmaxes, and between channels."""
    c, heads, dim = b.channels, 1 + op.width % 3, 2 + op.width % 3
    q, k, v = (b.linear(c, heads * dim) for _ in range(3))
    out = b.linear(heads * dim, c)

    def attend(m: Network, x: Tensor) -> list[Tensor]:
        return [split_heads(m[p](tokens(x)), heads) for p in (q, k, v)]

    def features(m: Network, x: Tensor) -> Tensor:
        query, key, value = attend(m, x)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        norm = (query * key.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return x + image(m[out](join_heads(query @ (key.transpose(-2, -1) @ value) / (norm + 1.0))), x)

    def softmaxes(m: Network, x: Tensor) -> Tensor:
        query, key, value = attend(m, x)
        context = torch.einsum("bhnd,bhne->bhde", key.softmax(-2), value)
        return x + image(m[out](join_heads(torch.einsum("bhnd,bhde->bhne", query.softmax(-1), context))), x)

    def covariance(m: Network, x: Tensor) -> Tensor:
        query, key, value = (t.transpose(-2, -1) for t in attend(m, x))
        score = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)).softmax(-1)
        return x + image(m[out](join_heads((score @ value).transpose(-2, -1))), x)

    b.choose(op, features, softmaxes, covariance)


def attention_talking(b: Builder, op: Op) -> None:
    """Scores that heads exchange, before and after softmax, or that a scale of each head's own multiplies."""
    c, heads, dim = b.channels, 2 + op.width % 3, 2 + op.width % 2
    qkv, out = b.linear(c, 3 * heads * dim), b.linear(heads * dim, c)
    form = op.variant % 3
    before = b.linear(heads, heads) if form == 0 else b.conv(heads, 1, inp=heads) if form == 1 else b.scale(heads, 1, 1)
    after = b.linear(heads, heads, bias=False) if form == 0 else ""

    def step(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        q, k, v = m[qkv](t).reshape(t.shape[0], t.shape[1], 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        if form == 2:  # cosine attention
            score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.tensor(before)
            return x + image(m[out](join_heads(score.softmax(-1) @ v)), x)
        score = q @ k.transpose(-2, -1) * dim**-0.5
        score = m[before](score) if form == 1 else m[before](score.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        score = score.softmax(-1)
        if form == 0:
            score = m[after](score.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + image(m[out](join_heads(score @ v)), x)

    b.then(step)


def transformer_block(b: Builder, op: Op) -> None:
    """A block with its norms in front (and a scale for each channel) or behind, a gated feed-forward layer, and a
    class or a distillation token beside the pixels."""
    c, heads, dim, width = b.channels, 1 + op.width % 2, 2 + op.width % 3, op.width
    pre, extra = op.variant % 2 == 0, op.pick(0, 1, 2)
    norm = nn.RMSNorm if op.variant % 4 > 1 else nn.LayerNorm
    first, second = (b.layer("norm", norm(c, EPS)) for _ in range(2))
    qkv, out = b.linear(c, 3 * heads * dim), b.linear(heads * dim, c)
    up, gate, down = b.linear(c, width, bias=False), b.linear(c, width, bias=False), b.linear(width, c)
    scales = [b.scale(c), b.scale(c)] if pre else []
    learned = [b.bias(1, 1, c) for _ in range(extra)]
    position = b.bias(1, b.size[0] * b.size[1] + extra, c)

    def attend(m: Network, t: Tensor) -> Tensor:
        q, k, v = m[qkv](t).reshape(t.shape[0], t.shape[1], 3, heads, dim).permute(2, 0, 3, 1, 4)
        return m[out](join_heads(F.scaled_dot_product_attention(q, k, v)))

    def feed(m: Network, t: Tensor) -> Tensor:
        return m[down]((F.silu if pre else F.gelu)(m[gate](t)) * m[up](t))

    def step(m: Network, x: Tensor) -> Tensor:
        t = torch.cat([*(m.tensor(name).expand(x.shape[0], -1, -1) for name in learned), tokens(x)], dim=1)
        t = t + m.tensor(position)
        if pre:
            t = t + m.tensor(scales[0]) * attend(m, m[first](t))
            t = t + m.tensor(scales[1]) * feed(m, m[second](t))
        else:
            t = m[first](t + attend(m, t))
            t = m[second](t + feed(m, t))
        y = image(t[:, extra:], x)
        return y if extra == 0 else y + (t[:, 0] + t[:, extra - 1])[:, :, None, None] / 2

    b.then(step)


def tied_embedding(b: Builder, op: Op) -> None:
    """A table that both embeds and is the head: what a pixel is most like, and what stands for that."""
    table = b.layer("embedding", nn.Embedding(op.width + 2, b.channels))
    ids = b.buffer("ids", torch.arange(b.size[0] * b.size[1]) % (op.width + 2)) if op.variant % 2 else ""

    def soft(m: Network, x: Tensor) -> Tensor:
        weight = m.tensor(table, "weight")
        return x + image(F.linear(tokens(x), weight).softmax(-1) @ weight, x)

    def looked_up(m: Network, x: Tensor) -> Tensor:
        t = tokens(x) + m[table](m.tensor(ids))
        return x + image(F.linear(t, m.tensor(table, "weight")).mean(-1, keepdim=True), x)

    b.choose(op, soft, looked_up)
