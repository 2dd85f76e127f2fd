"""The forms that an operation of a generated network takes: one small function per motif.

Each function reads the shape of the current tensor (batch, channels, height, width) from the builder,
registers layers, and appends a step written as a user would write it. A motif that cannot apply appends
nothing. A new one is a function and a row of `MOTIFS`. Rules: the batch stays first and its size is read
where it is needed; rows do not mix; only tensors made in the same step are changed in place; height and width
stay at least 2; nothing depends on values; every layer that is registered is used.

Here: the table, convolutions, branches, sizes and heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress import motifs_attention, motifs_channels, motifs_sequences, motifs_tokens

if TYPE_CHECKING:
    from fxcompress.generate import Builder, Network, Op

__all__ = ["MOTIFS", "Motif"]

Motif: TypeAlias = "Callable[[Builder, Op], None]"


# -- convolutions


def conv_bn_relu(b: Builder, op: Op) -> None:
    stride = 2 if op.variant % 4 == 2 and b.can_shrink else 1
    conv = b.conv(op.width, op.pick(3, 1, 3, 5), stride=stride, bias=op.variant % 2 == 1)
    norm, relu = b.norm(op.width), b.layer("relu", nn.ReLU(inplace=True))
    b.then(lambda m, x: m[relu](m[norm](m[conv](x))))


def grouped_conv(b: Builder, op: Op) -> None:
    groups = op.pick(2, 3, 4)
    b.multiple(groups)
    out = -(-op.width // groups) * groups
    conv, norm = b.conv(out, groups=groups), b.norm(out)
    b.then(lambda m, x: F.relu(m[norm](m[conv](x))))


def depthwise_conv(b: Builder, op: Op) -> None:
    twice = op.variant % 2 == 1 and b.fits(2 * b.channels)
    out = b.channels * (2 if twice else 1)
    conv, norm = b.conv(out, groups=b.channels), b.norm(out)
    b.then(lambda m, x: m[norm](m[conv](x)).relu())


def dilated_conv(b: Builder, op: Op) -> None:
    if op.variant % 3 == 2:
        weight, bias = b.weight(op.width, b.channels, 3, 3), b.bias(op.width)
        b.then(lambda m, x: F.conv2d(x, m.tensor(weight), m.tensor(bias), padding=2, dilation=2))
    else:
        conv = b.conv(op.width, dilation=2, padding_mode=op.pick("zeros", "replicate", ""))
        b.then(lambda m, x: F.leaky_relu(m[conv](x), 0.1))


def transposed_conv(b: Builder, op: Op) -> None:
    depthwise = op.variant % 6 == 5
    groups = b.channels if depthwise else op.pick(1, 2, 1)
    b.multiple(groups)
    kernel, stride = (2, 2) if op.variant % 2 == 0 and b.can_grow else (3, 1)
    out = groups if depthwise else -(-op.width // groups) * groups
    module = nn.ConvTranspose2d(b.channels, out, kernel, stride, padding=kernel // 3, groups=groups)
    conv, norm = b.layer("deconv", module), b.norm(out)
    b.then(lambda m, x: F.relu(m[norm](m[conv](x))))


def conv1d_3d(b: Builder, op: Op) -> None:
    c, out, form = b.channels, op.width, op.variant % 4
    if form == 0:
        conv = b.layer("conv1d", nn.Conv1d(c, out, 3, padding=1))
        b.then(lambda m, x: m[conv](x.flatten(2)).view(x.size(0), -1, x.size(2), x.size(3)))
    elif form == 1:
        conv = b.layer("conv3d", nn.Conv3d(c, out, (1, 3, 3), padding=(0, 1, 1)))
        b.then(lambda m, x: m[conv](x.unsqueeze(2)).squeeze(2))
    elif form == 2:
        conv = b.layer("conv3d", nn.Conv3d(c, out, (2, 3, 3), padding=(0, 1, 1)))
        b.then(lambda m, x: m[conv](torch.stack((x, x.flip(3)), dim=2)).squeeze(2))
    else:
        weight = b.weight(out, c * 9)
        b.then(lambda m, x: (m.tensor(weight) @ F.unfold(x, 3, padding=1)).view(x.size(0), out, *x.shape[2:]))


def weight_standardised(b: Builder, op: Op) -> None:
    conv, scale = b.conv(op.width), b.scale(op.width, 1, 1, 1)

    def standardise(m: Network, x: Tensor) -> Tensor:
        w = m.tensor(conv, "weight")
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w * m.tensor(scale) * w[0].numel() ** -0.5, m.tensor(conv, "bias"), padding=1)

    def normalise(m: Network, x: Tensor) -> Tensor:
        w = m.tensor(conv, "weight")
        w = m.tensor(scale) * F.normalize(w.flatten(1)).view_as(w)
        return F.conv2d(x, w, m.tensor(conv, "bias"), padding=1)

    b.choose(op, standardise, normalise)


def einsum(b: Builder, op: Op) -> None:
    if op.variant % 4 == 3:
        b.multiple(2)
    weight = b.weight(2, op.width, b.channels // 2) if op.variant % 4 == 3 else b.weight(op.width, b.channels)

    def grouped(m: Network, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], 2, -1, x.shape[2], x.shape[3])
        return torch.einsum("bgchw,goc->bgohw", y, m.tensor(weight)).flatten(1, 2)

    b.choose(
        op,
        lambda m, x: torch.einsum("bchw,oc->bohw", x, m.tensor(weight)),
        lambda m, x: torch.einsum("bchw,oc->bhwo", x, m.tensor(weight)).permute(0, 3, 1, 2),
        lambda m, x: torch.matmul(m.tensor(weight), x.flatten(2)).view(x.size(0), -1, x.size(2), x.size(3)),
        grouped,
    )


def shared_conv(b: Builder, op: Op) -> None:
    """One layer called twice, under one name or under two."""
    c, form = b.channels, op.variant % 4
    conv = b.conv(op.width if form == 1 else c)
    if form == 0:
        b.then(lambda m, x: F.relu(m[conv](F.relu(m[conv](x)))))
    elif form == 1:
        b.then(lambda m, x: F.relu(m[conv](x) + m[conv](x.flip(3))))
    elif form == 2:
        alias = b.name("alias")
        b.net.add_module(alias, b.net.get_submodule(conv))
        b.then(lambda m, x: m[alias](F.silu(m[conv](x))))
    else:
        first, second = b.norm(c), b.norm(c)
        b.then(lambda m, x: x + m[second](m[conv](F.relu(m[first](m[conv](x))))))


def tied_weights(b: Builder, op: Op) -> None:
    form, width = op.variant % 3, op.width
    one = b.conv(b.channels if form == 0 else width)
    if form == 2:
        gain = min(1.0, b.channels / width) ** 0.5
        b.then(lambda m, x: F.conv_transpose2d(gain * m[one](x).relu(), m.tensor(one, "weight"), padding=1))
        return
    two = b.conv(b.channels if form == 0 else width)
    b.net.get_submodule(two).weight = b.net.get_submodule(one).weight
    if form == 0:
        b.then(lambda m, x: m[two](F.relu(m[one](x))))
    else:
        b.then(lambda m, x: torch.cat([m[one](x), m[two](x.flip(2))], dim=1))


# -- branches


def residual(b: Builder, op: Op) -> None:
    """A block with a shortcut: identity, projected, projected with a stride, identity before activation."""
    c, width, form = b.channels, op.width, op.variant % 4
    if form in (0, 3):
        conv1, norm1, conv2, norm2 = b.conv(width), b.norm(width), b.conv(c, inp=width), b.norm(c)
        if form == 0:
            b.then(lambda m, x: F.relu(m[norm2](m[conv2](F.relu(m[norm1](m[conv1](x))))) + x))
        else:
            b.then(lambda m, x: x.add(m[conv2](F.relu(m[norm1](m[conv1](F.relu(m[norm2](x))))))))
        return
    stride, out = (2 if form == 2 and b.can_shrink else 1), width + 1
    conv1, norm1 = b.conv(width, stride=stride, bias=False), b.norm(width)
    conv2, norm2 = b.conv(out, inp=width, bias=False), b.norm(out)
    short = nn.Sequential(nn.Conv2d(c, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
    down = b.layer("downsample", short)
    b.then(lambda m, x: F.relu(m[norm2](m[conv2](F.relu(m[norm1](m[conv1](x))))) + m[down](x)))


def zero_padded_shortcut(b: Builder, op: Op) -> None:
    c, out = b.channels, b.channels + op.width
    if not b.fits(out):
        return
    low, stride = op.width // 2, 2 if op.variant % 3 == 2 and b.can_shrink else 1
    conv, norm = b.conv(out, stride=stride), b.norm(out)

    def pad(m: Network, x: Tensor) -> Tensor:
        return F.relu(F.pad(x, (0, 0, 0, 0, low, out - c - low)) + m[norm](m[conv](x)))

    def zeros(m: Network, x: Tensor) -> Tensor:
        zero = x.new_zeros(x.size(0), out - x.size(1), x.size(2), x.size(3))
        return F.relu(torch.cat([x, zero], dim=1) + m[norm](m[conv](x)))

    def strided(m: Network, x: Tensor) -> Tensor:
        return F.relu(m[norm](m[conv](x)) + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out - c)))

    b.choose(op, pad, zeros, strided)


def concat(b: Builder, op: Op) -> None:
    """Branches of unequal widths, a dense connection, the two signs of one convolution."""
    conv = b.conv(op.width)
    if op.variant % 4 == 0:
        wide = b.conv(op.width + 2, 1)
        b.then(lambda m, x: F.relu(torch.cat([m[conv](x), m[wide](x)], dim=1)))
    elif op.variant % 4 == 1 and b.fits(b.channels + op.width):
        norm = b.norm(b.channels + op.width)
        b.then(lambda m, x: m[norm](torch.cat((x, m[conv](x)), 1)))
    elif op.variant % 4 == 2 and b.fits(b.channels + op.width + 1):
        thin = b.conv(1, 5)
        b.then(lambda m, x: torch.cat([m[thin](x), F.relu(m[conv](x)), F.avg_pool2d(x, 3, 1, 1)], -3))
    else:
        b.then(lambda m, x: F.relu(torch.cat([y := m[conv](x), -y], dim=1)))


def split(b: Builder, op: Op) -> None:
    """Unequal parts with a convolution each, or one passed through."""
    width, small = op.width + 2, (op.width + 2) // 3
    half = -(-width // 2)
    first, rest = op.pick((small, width - small), (half, width - half), (small, width - small))
    conv, one = b.conv(width), b.conv(op.width, inp=first)
    if op.variant % 3 == 2:
        b.then(lambda m, x: torch.cat([m[one]((y := m[conv](x))[:, :small]), y[:, small:]], dim=1))
        return
    two = b.conv(3, 1, inp=rest)

    def split_sizes(m: Network, x: Tensor) -> Tensor:
        p, q = torch.split(m[conv](x), [first, rest], dim=1)
        return torch.cat([m[two](F.relu(q)), m[one](p)], dim=1)

    def chunks(m: Network, x: Tensor) -> Tensor:
        p, q = m[conv](x).chunk(2, dim=1)
        return F.relu(torch.cat([m[one](p), m[two](q)], dim=1))

    b.choose(op, split_sizes, chunks, chunks)


def stack(b: Builder, op: Op) -> None:
    one, two = b.conv(op.width), b.conv(op.width, 1)
    mix = b.bias(2) if op.variant % 4 == 3 else ""

    def mixed(m: Network, x: Tensor) -> Tensor:
        return torch.einsum("sbchw,s->bchw", torch.stack([m[one](x), m[two](x)]), m.tensor(mix).softmax(0))

    b.choose(
        op,
        lambda m, x: torch.stack([m[one](x), m[two](x)]).sum(0),
        lambda m, x: torch.stack((m[one](x), m[two](x).relu()), dim=1).mean(1),
        lambda m, x: torch.stack([m[one](x), m[two](x)], dim=2).flatten(1, 2),
        mixed,
    )


def skip(b: Builder, op: Op) -> None:
    """An earlier tensor, added or concatenated; brought to the current height and width."""
    if len(b.values) < 2:
        first = b.conv(op.width)
        b.then(lambda m, x: m[first](x))
    i = op.variant % (len(b.values) - 1)
    width = b.values[i].shape[1]
    if b.values[i].shape[2:] != b.x.shape[2:]:
        conv = b.conv(width, 1)
        b.join(i, lambda m, x, old: m[conv](x) + F.adaptive_avg_pool2d(old, (x.shape[2], x.shape[3])))
    elif width == b.channels:
        b.join(i, lambda m, x, old: x + old)
    elif op.width % 2 and b.fits(b.channels + width):
        b.join(i, lambda m, x, old: torch.cat([x, old], dim=1))
    else:
        conv = b.conv(width, 1)
        b.join(i, lambda m, x, old: old + m[conv](x))


def inverted_residual(b: Builder, op: Op) -> None:
    c, form = b.channels, op.variant % 3
    hidden, out = min(2 * c + 1, 24), (op.width if form == 1 else c)
    stride = 2 if form == 1 and b.can_shrink else 1
    expand, norm1 = b.conv(hidden, 1, bias=False), b.norm(hidden)
    depth = b.conv(hidden, inp=hidden, stride=stride, groups=hidden, bias=False)
    norm2, project, norm3 = b.norm(hidden), b.conv(out, 1, inp=hidden, bias=False), b.norm(out)

    def block(m: Network, x: Tensor) -> Tensor:
        y = F.relu6(m[norm1](m[expand](x)))
        y = F.hardswish(m[norm2](m[depth](y)))
        return m[norm3](m[project](y))

    b.choose(op, lambda m, x: x + block(m, x), block, lambda m, x: block(m, x) + x)


# -- size


def pool(b: Builder, op: Op) -> None:
    stride, form = (2 if b.can_shrink else 1), op.variant % 4
    if form == 3:
        kernel = torch.tensor([1.0, 2.0, 1.0])
        blur = b.buffer("blur", (kernel[:, None] * kernel / 16).repeat(b.channels, 1, 1, 1))
        b.then(lambda m, x: F.conv2d(x, m.tensor(blur), stride=stride, padding=1, groups=x.shape[1]))
        return
    if form == 2:
        b.then(lambda m, x: F.max_pool2d(x, 2, stride))
        return
    layer = b.layer("pool", nn.MaxPool2d(3, stride, 1) if form == 0 else nn.AvgPool2d(3, stride, 1))
    b.then(lambda m, x: m[layer](x))


def upsample(b: Builder, op: Op) -> None:
    """Up, or down and up again with a skip."""
    form = op.variant % 4
    if form == 0 and b.can_grow:
        layer = b.layer("up", nn.Upsample(scale_factor=2))
        b.then(lambda m, x: m[layer](x))
    elif form == 1 and b.can_grow:
        b.then(lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
    elif form == 2 and b.can_grow:
        b.then(lambda m, x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    elif b.can_shrink and b.fits(b.channels + op.width):
        conv = b.conv(op.width)
        b.then(lambda m, x: torch.cat([F.interpolate(m[conv](F.max_pool2d(x, 2)), size=x.shape[2:]), x], dim=1))


def head(b: Builder, op: Op) -> None:
    """A classifier; where more follows, an auxiliary one."""
    c, (height, width), form = b.channels, b.size, op.variant % 4
    if form == 3:
        hidden = nn.Linear(c, op.width)
        last = nn.Linear(op.width, 5)
        classifier = b.layer("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), hidden, nn.ReLU(), last))
        b.head(lambda m, x: m[classifier](x))
        return
    linear = b.linear(c if form == 2 else c * height * width, 5)
    forms: tuple[Callable[[Network, Tensor], Tensor], ...] = (
        lambda m, x: m[linear](torch.flatten(x, 1)),
        lambda m, x: m[linear](x.contiguous().view(x.size(0), -1)),
        lambda m, x: m[linear](x.mean((2, 3))),
    )
    b.head(forms[form])


MOTIFS: dict[str, Motif] = {
    "conv_bn_relu": conv_bn_relu,
    "grouped_conv": grouped_conv,
    "depthwise_conv": depthwise_conv,
    "dilated_conv": dilated_conv,
    "transposed_conv": transposed_conv,
    "conv1d_3d": conv1d_3d,
    "weight_standardised": weight_standardised,
    "einsum": einsum,
    "shared_conv": shared_conv,
    "tied_weights": tied_weights,
    "residual": residual,
    "zero_padded_shortcut": zero_padded_shortcut,
    "concat": concat,
    "split": split,
    "stack": stack,
    "skip": skip,
    "inverted_residual": inverted_residual,
    "pool": pool,
    "upsample": upsample,
    "head": head,
    "shuffle": motifs_channels.shuffle,
    "pixel_shuffle": motifs_channels.pixel_shuffle,
    "slice_channels": motifs_channels.slice_channels,
    "reorder": motifs_channels.reorder,
    "permute_index": motifs_channels.permute_index,
    "reshape_pairs": motifs_channels.reshape_pairs,
    "activation": motifs_channels.activation,
    "group_norm": motifs_channels.group_norm,
    "layer_norm": motifs_channels.layer_norm,
    "prelu": motifs_channels.prelu,
    "layer_scale": motifs_channels.layer_scale,
    "squeeze_excite": motifs_channels.squeeze_excite,
    "softmax_gate": motifs_channels.softmax_gate,
    "spatial_gate": motifs_channels.spatial_gate,
    "sigmoid_gate": motifs_channels.sigmoid_gate,
    "in_place": motifs_channels.in_place,
    "attention_fused": motifs_tokens.attention_fused,
    "attention_explicit": motifs_tokens.attention_explicit,
    "multihead": motifs_tokens.multihead,
    "attention_rotary": motifs_tokens.attention_rotary,
    "attention_shared": motifs_attention.attention_shared,
    "attention_cross": motifs_attention.attention_cross,
    "attention_window": motifs_attention.attention_window,
    "attention_linear": motifs_attention.attention_linear,
    "attention_talking": motifs_attention.attention_talking,
    "transformer_block": motifs_attention.transformer_block,
    "tied_embedding": motifs_attention.tied_embedding,
    "class_token": motifs_tokens.class_token,
    "mlp": motifs_tokens.mlp,
    "window": motifs_tokens.window,
    "lstm": motifs_sequences.lstm,
    "gru": motifs_sequences.gru,
    "bilinear": motifs_sequences.bilinear,
    "unet": motifs_sequences.unet,
    "feature_pyramid": motifs_sequences.feature_pyramid,
}
