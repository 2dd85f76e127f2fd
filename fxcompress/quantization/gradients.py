"""Rounding of gradients to a few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GradientQuantize(nn.Module):
    """Passes values on and rounds their gradient (Zhou et al. 2016, arXiv 1606.06160, equation 12).

    ``2 m (quantize_k(g / (2 m) + 1/2 + noise) - 1/2)`` with ``m = max abs(g)`` of each sample (dimension 0),
    ``quantize_k(x) = round(x (2^k - 1)) / (2^k - 1)`` and ``noise`` uniform in ``[-1/2, 1/2] / (2^k - 1)``. In eval
    mode values pass untouched.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        if not self.training:
            return x
        result: Tensor = _RoundGradient.apply(x, self.bits)
        return result

    def extra_repr(self) -> str:
        """The number of bits."""
        return f"{self.bits} bits"


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.levels = (1 << bits) - 1
        return x.clone()  # who reads a view may not write into it, as an activation in place does

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient, levels = gradients[0], ctx.levels
        largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
        largest = torch.where(largest == 0, 1.0, largest)
        noise = (torch.rand_like(gradient) - 0.5) / levels
        shifted = ((gradient / (2 * largest) + 0.5 + noise).clamp(0, 1) * levels).round() / levels
        return 2 * largest * (shifted - 0.5), None
