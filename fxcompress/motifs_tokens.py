"""Motifs of generated networks that see an image as a sequence of tokens (see `fxcompress.motifs`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.motifs_channels import EPS

if TYPE_CHECKING:
    from fxcompress.generate import Builder, Network, Op


def tokens(x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, height * width, channels)."""
    return x.flatten(2).transpose(1, 2)


def image(t: Tensor, like: Tensor) -> Tensor:
    """The way back, to the size of `like`."""
    return t.transpose(1, 2).reshape(like.shape[0], t.shape[-1], like.shape[2], like.shape[3])


def attention_fused(b: Builder, op: Op) -> None:
    """Self-attention from one qkv projection, laid out by q, k, v or by heads, without and with a bias."""
    c, heads, dim = b.channels, 1 + op.width % 3, 2 + op.width % 4
    qkv, out = b.linear(c, 3 * heads * dim, bias=op.variant % 2 == 0), b.linear(heads * dim, c)
    pixels = b.size[0] * b.size[1]
    bias = b.bias(heads, pixels, pixels) if op.variant % 4 == 2 else ""

    def reshaped(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        batch, n, _ = t.shape
        q, k, v = m[qkv](t).reshape(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + image(m[out](y.transpose(1, 2).reshape(batch, n, heads * dim)), x)

    def chunked(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        parts = m[qkv](t).chunk(3, dim=-1)
        q, k, v = (part.view(x.size(0), part.size(1), heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + image(m[out](y.transpose(1, 2).flatten(2)), x)

    def biased(m: Network, x: Tensor) -> Tensor:
        y = torch.unflatten(m[qkv](tokens(x)), -1, (3, heads, dim))
        q, k, v = (y[:, :, i].transpose(1, 2) for i in range(3))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.tensor(bias))
        return x + image(m[out](y.permute(0, 2, 1, 3).flatten(2)), x)

    def heads_first(m: Network, x: Tensor) -> Tensor:
        y = m[qkv](tokens(x)).view(x.size(0), -1, heads, 3 * dim).transpose(1, 2)
        q, k, v = torch.split(y, dim, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + image(m[out](y.transpose(1, 2).flatten(2)), x)

    b.choose(op, reshaped, chunked, biased, heads_first)


def attention_explicit(b: Builder, op: Op) -> None:
    """Self-attention with separate projections and softmax(q @ k^T * scale) @ v."""
    c, heads, dim = b.channels, 1 + op.width % 3, 2 + op.width % 4
    if op.variant % 3 == 2:
        _non_local(b, op.width)
        return
    q, k, v = (b.linear(c, heads * dim) for _ in range(3))
    out = b.linear(heads * dim, c)

    def split(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        batch, n, _ = t.shape
        query, key, value = (m[p](t).view(batch, n, heads, dim).transpose(1, 2) for p in (q, k, v))
        score = torch.softmax(query @ key.transpose(-2, -1) * dim**-0.5, dim=-1)
        return x + image(m[out]((score @ value).transpose(1, 2).reshape(batch, n, -1)), x)

    def folded(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        parts = (torch.unflatten(m[p](t), 2, (heads, -1)) for p in (q, k, v))
        query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in parts)
        score = F.softmax(torch.bmm(query, key.mT) / query.size(-1) ** 0.5, dim=-1)
        y = torch.unflatten(torch.bmm(score, value), 0, (x.size(0), heads))
        return x + image(m[out](y.transpose(1, 2).flatten(2)), x)

    b.choose(op, split, folded, split)


def _non_local(b: Builder, width: int) -> None:
    q, k, v = b.conv(width, 1), b.conv(width, 1), b.conv(b.channels, 1)
    gamma = b.scale(1)

    def step(m: Network, x: Tensor) -> Tensor:
        score = torch.einsum("bci,bcj->bij", m[q](x).flatten(2), m[k](x).flatten(2)).mul(width**-0.5).softmax(-1)
        return x + m.tensor(gamma) * torch.bmm(m[v](x).flatten(2), score.transpose(1, 2)).view_as(x)

    b.then(step)


def multihead(b: Builder, op: Op) -> None:
    heads = op.pick(2, 1, 3)
    b.multiple(heads)
    layer = b.layer("attention", nn.MultiheadAttention(b.channels, heads, batch_first=True))
    norm = b.layer("norm", nn.LayerNorm(b.channels, EPS)) if op.variant % 3 == 2 else ""

    def attend(m: Network, query: Tensor, t: Tensor, weights: bool) -> Tensor:
        result: Tensor = m.get_submodule(layer)(query, t, t, need_weights=weights)[0]
        return result

    def pre_norm(m: Network, x: Tensor) -> Tensor:
        t = m[norm](tokens(x))
        return x + image(attend(m, t, t, True), x)

    def pooled(m: Network, x: Tensor) -> Tensor:
        y = attend(m, x.mean((2, 3)).unsqueeze(1), tokens(x), False)
        return x + y.transpose(1, 2).unsqueeze(-1)

    b.choose(op, lambda m, x: x + image(attend(m, t := tokens(x), t, False), x), pooled, pre_norm)


def attention_rotary(b: Builder, op: Op) -> None:
    """Self-attention with rotary positions, k and v with a head each, shared by two, or one for all."""
    groups, shared, dim = 1 + op.width % 2, op.pick(1, 2, 3), 2 + 2 * (op.width % 3)
    q, k, v = (b.linear(b.channels, heads * dim, bias=False) for heads in (groups * shared, groups, groups))
    out = b.linear(groups * shared * dim, b.channels)
    angle = torch.outer(torch.arange(b.size[0] * b.size[1]), 10.0 ** -torch.linspace(0, 1, dim // 2))
    cos, sin = b.buffer("cos", angle.cos().repeat(1, 2)), b.buffer("sin", angle.sin().repeat(1, 2))

    def rotate(m: Network, y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        turned = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
        return y * m.tensor(cos) + turned * m.tensor(sin)

    def step(m: Network, x: Tensor) -> Tensor:
        t = tokens(x)
        query, key, value = (torch.unflatten(m[p](t), 2, (-1, dim)).transpose(1, 2) for p in (q, k, v))
        query, key = rotate(m, query), rotate(m, key)
        if shared > 1:
            batch, _, n, _ = key.shape
            key = key[:, :, None].expand(batch, groups, shared, n, dim).reshape(batch, -1, n, dim)
            value = value.repeat_interleave(shared, dim=1)
        y = F.scaled_dot_product_attention(query, key, value)
        return x + image(m[out](y.transpose(1, 2).reshape(t.shape[0], t.shape[1], -1)), x)

    b.then(step)


def class_token(b: Builder, op: Op) -> None:
    """A learned token and position embedding before a feed-forward layer; the token joins every pixel."""
    c, pixels = b.channels, b.size[0] * b.size[1]
    token, position = b.bias(1, 1, c), b.bias(1, pixels + 1, c)
    norm, up, down = (
        b.layer("norm", nn.LayerNorm(c, EPS)),
        b.linear(c, 2 * op.width),
        b.linear(2 * op.width, c),
    )

    def encode(m: Network, x: Tensor) -> Tensor:
        t = torch.cat((m.tensor(token).expand(x.shape[0], -1, -1), tokens(x)), dim=1) + m.tensor(position)
        return t + m[down](F.gelu(m[up](m[norm](t))))

    def gated(m: Network, x: Tensor) -> Tensor:
        t = encode(m, x)
        return image(t[:, 1:] * torch.sigmoid(t[:, :1]), x)

    b.choose(op, lambda m, x: x + encode(m, x)[:, 0][:, :, None, None], gated)


def mlp(b: Builder, op: Op) -> None:
    """The feed-forward part of a transformer, plain and gated, and MLP-Mixer's across pixels."""
    c, width, pixels = b.channels, op.width, b.size[0] * b.size[1]
    norm = b.layer("norm", nn.LayerNorm(c, EPS))
    inner, outer = (pixels, pixels) if op.variant % 3 == 2 else (c, c)
    up, down = b.linear(inner, 2 * width), b.linear(width if op.variant % 3 == 1 else 2 * width, outer)

    def plain(m: Network, x: Tensor) -> Tensor:
        return x + m[down](F.gelu(m[up](m[norm](x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)

    def gated(m: Network, x: Tensor) -> Tensor:
        value, gate = m[up](m[norm](tokens(x))).chunk(2, dim=-1)
        return x + image(m[down](value * F.silu(gate)), x)

    def mixer(m: Network, x: Tensor) -> Tensor:
        t = m[norm](tokens(x)).transpose(1, 2)
        return x + m[down](F.relu(m[up](t))).reshape(x.shape)

    b.choose(op, plain, gated, mixer)


def window(b: Builder, op: Op) -> None:
    """Swin's windows: pad, roll, partition, mix within each window, and back."""
    c, side, shift = b.channels, op.pick(2, 3), op.pick(0, 1, 1)
    mix, project = b.linear(side * side, side * side), b.linear(c, c)

    def step(m: Network, x: Tensor) -> Tensor:
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -x.shape[3] % side, 0, -x.shape[2] % side))
        if shift:
            y = torch.roll(y, shifts=(-shift, -shift), dims=(1, 2))
        batch, height, width, channels = y.shape
        y = y.view(batch, height // side, side, width // side, side, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)
        y = m[project](F.gelu(m[mix](y.transpose(1, 2))).transpose(1, 2))
        y = y.view(batch, height // side, width // side, side, side, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        if shift:
            y = torch.roll(y, shifts=(shift, shift), dims=(1, 2))
        return x + y[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)

    b.then(step)
