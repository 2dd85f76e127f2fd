"""A convolution or linear layer as one matrix product: what it multiplies its weight with, at sampled positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.quantization.sites import Site


@dataclass(frozen=True)
class Product:
    """What a layer computes without its bias: ``columns @ matrix``, for every group of channels.

    Of a transposed convolution the products are those before the ones that overlap are summed.

    Attributes:
        kind: ``"linear"``, ``"convolution"`` or ``"transposed"``.
        shape: of the weight.
        stride, padding, dilation: of a convolution, a number for each spatial dimension; padding ``(before, after)``.
        groups: 1 of a linear layer.
    """

    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, site: Site, weight: Tensor) -> Product:
        """That of an opened layer, whose options are positional."""
        shape = tuple(weight.shape)
        name = str(getattr(site.node.target, "__name__", ""))
        if name == "linear":
            return cls("linear", shape)
        dims, given = len(shape) - 2, list(site.node.args[3:])
        if "transpose" in name:  # stride, padding, output_padding, groups, dilation
            groups = given[3] if len(given) > 3 else 1
            assert isinstance(groups, int)
            return cls("transposed", shape, groups=groups)
        options: list[Any] = [*given, *(1, 0, 1, 1)[len(given) :]]
        stride, padding, dilation, groups = options
        assert isinstance(groups, int)
        steps = _each(dilation, dims)
        return cls("convolution", shape, _each(stride, dims), _borders(padding, shape[2:], steps), steps, groups)

    @property
    def length(self) -> int:
        """Of a column."""
        count = self.shape[0] // self.groups if self.kind == "transposed" else math.prod(self.shape[1:])
        return int(count)

    def matrix(self, weight: Tensor) -> Tensor:
        """``[groups, length, outputs]``, a view of the weight."""
        if self.kind == "transposed":
            return weight.reshape(self.groups, self.length, -1)
        return weight.reshape(self.groups, -1, self.length).transpose(1, 2)

    def batched(self, x: Tensor) -> Tensor:
        """What the layer reads, with a dimension of samples in front."""
        least = 2 if self.kind == "linear" else len(self.shape)
        return x if x.dim() >= least else x[None]

    def columns(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """At most ``count`` columns of a batch, at random positions: ``[groups, columns, length]``."""
        x = self.batched(x)
        if self.kind == "linear":
            found = x.reshape(-1, x.shape[-1])
            return found[_some(len(found), count, generator).to(x.device)][None]
        if self.kind == "convolution":
            x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
            for dim, (size, stride, dilation) in enumerate(
                zip(self.shape[2:], self.stride, self.dilation, strict=True), 2
            ):
                x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]  # a view
        places = [x.shape[0], *x.shape[2 : len(self.shape)]]
        chosen = torch.unravel_index(_some(math.prod(places), count, generator).to(x.device), places)
        found = x.movedim(1, len(self.shape) - 1)[chosen]  # [columns, channels, kernel...]
        return found.reshape(len(found), self.groups, self.length).transpose(0, 1)


def _some(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Different random indices below ``total``, at most ``count``, where the generator is."""
    return torch.randperm(total, generator=generator, device=generator.device)[:count]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A number for each dimension."""
    given = tuple(value) if isinstance(value, Sequence) else (value,)
    return given * dims if len(given) == 1 else given


def _borders(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after, for each dimension."""
    if padding == "same":
        totals = [steps * (size - 1) for size, steps in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sizes = _each(0 if padding == "valid" else padding, len(kernel))
    return tuple((size, size) for size in sizes)
